"""Every backend on files of every odd kind: each frame asked for is the one that a plain sequential decode shows.

The reference is a sequential decode by PyAV, itself held against the numbers that were drawn into the files.
"""

import functools
import random
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from coca_video.data.decode import UnreadableVideo, VideoReader, open_video, prove
from tests.conftest import skip_or_fail
from tests.data.numbered_videos import numbers_shown, sequential, sequential_seconds, stack
from tests.data.odd_videos import BUILDERS

BACKENDS = ("torchcodec", "decord", "pyav", "auto")
# What must not be refused: a suite in which a backend may refuse all would prove nothing.
COMMON = {"b_frames.mp4", "b_frames.mkv", "b_frames.mov", "fragmented.mp4", "long_gop.mp4", "closed_gop_hevc.mp4"}
COMMON |= {"variable_rate.mp4", "variable_rate.mkv", "one_frame.mp4", "narrow.mp4", "start_delay.mp4", "h264_422.mp4"}
COMMON |= {"h264_444.mp4", "non_zero_start.mkv", "turned_90.mp4", "turned_180.mp4", "turned_270.mov", "count_high.mp4"}
COMMON |= {"count_low.mp4", "count_high.mkv", "count_low.mkv", "fine_time_base.mp4", "full_range.mp4", "bt709.mp4"}
COMMON |= {"bt709_full.mp4", "bt601.mp4", "smpte240.mp4", "bt2020.mp4"}
MUST_READ = {
    "decord": COMMON,
    "torchcodec": COMMON
    | {"open_gop_h264.mp4", "open_gop_h264.mkv", "open_gop_hevc.mp4", "open_gop_hevc.mkv", "edit_list.mp4"}
    | {"edit_list_end.mp4", "one_frame.mkv", "av1.mkv", "av1.mp4", "av1.webm", "vp9.mp4", "vp9_alt_ref.webm"}
    | {"streams.mp4", "streams_audio_first.mkv"},
}
CHOSEN = {
    "b_frames.mp4": "pyav",
    "open_gop_hevc.mkv": "pyav",
    "edit_list.mp4": "pyav",
    "open_gop_h264.mp4": "torchcodec",
    "open_gop_h264.mkv": "torchcodec",
    "vp9.mp4": "torchcodec",
    "av1.webm": "torchcodec",
    "mpeg4_packed.avi": "pyav",
    "mpeg4_b_frames.avi": "pyav",
    "h264.ts": "pyav",
    "ten_bit_hevc.mp4": "pyav",
    "cut_at_open_key_hevc.mkv": "pyav",
    "shared_times.mkv": "pyav",
}
# Kr and Kb: the shares of red and blue in luma
LUMA_WEIGHTS = {
    Colorspace.ITU601: (0.299, 0.114),
    Colorspace.ITU709: (0.2126, 0.0722),
    Colorspace.SMPTE240M: (0.212, 0.087),
    Colorspace.BT2020: (0.2627, 0.0593),
}
SATURATED = [(220, 30, 30), (30, 200, 40), (40, 40, 230), (230, 220, 20), (20, 210, 210), (210, 30, 200)]
UNREADABLE_CLIPS = {"decord_test_corrupted.mp4"}
Case = tuple[Path, list[int]]


@pytest.fixture(autouse=True)
def no_choice_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCA_VIDEO_DECODER", raising=False)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    """Writes each file once: its path, and the numbers that it shows."""
    folder = tmp_path_factory.mktemp("odd")
    return functools.cache(lambda name: (folder / name, BUILDERS[name](folder / name)))


def need(backend: str) -> None:
    """Skips where the backend does not work here: no libraries of FFmpeg's, or no wheel of decord's."""
    if backend in ("torchcodec", "decord") and (cause := prove(backend)) is not None:
        skip_or_fail("ffmpeg" if backend == "torchcodec" else "decord", reason=cause)


def open_or_refuse(path: Path, *, backend: str) -> VideoReader | None:
    """None where the backend refuses the file with a reason, which the reference and `auto` never may."""
    need(backend)
    try:
        return open_video(path, backend=backend)
    except UnreadableVideo as error:
        message = str(error)
        assert backend in ("torchcodec", "decord"), message
        assert message.startswith(f"{path}: {backend} ") and "\n" not in message, message
        assert message.endswith('; use the decoder "auto" or "pyav"'), message
        return None


@pytest.mark.parametrize("name", BUILDERS)
def test_the_reference_shows_what_was_drawn(build: Callable[[str], Case], name: str) -> None:
    path, shown = build(name)
    frames = sequential(path)
    assert numbers_shown(stack(frames, range(len(frames)))) == shown


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BUILDERS)
def test_every_frame_is_the_one_asked_for(build: Callable[[str], Case], name: str, backend: str) -> None:
    path, shown = build(name)
    reader = open_or_refuse(path, backend=backend)
    if reader is None:
        assert name not in MUST_READ[backend]
        return
    with reader:
        count = len(shown)
        reference = stack(sequential(path), range(count))
        assert (reader.num_frames, reader.height, reader.width) == (count, *reference.shape[2:])
        np.testing.assert_allclose(reader.times_seconds, sequential_seconds(path), rtol=0, atol=1e-6)
        shuffled = random.Random(name).choices(range(count), k=count) + list(range(count))
        random.Random(1).shuffle(shuffled)
        # One by one as well: a decoder may sort the numbers of a batch, and then hardly seeks.
        for order in ([count - 1], *([index] for index in shuffled[:40]), shuffled, range(count)):
            frames = reader.frames(order)
            assert numbers_shown(frames) == [shown[index] for index in order]
            assert torch.equal(frames, reference[list(order)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("matrix", LUMA_WEIGHTS, ids=lambda matrix: matrix.name)
@pytest.mark.parametrize("levels", [ColorRange.MPEG, ColorRange.JPEG], ids=["limited", "full"])
def test_colours_follow_the_tags_of_the_file(
    tmp_path: Path, matrix: Colorspace, levels: ColorRange, backend: str
) -> None:
    # YUV by the standards' own formula: read by another matrix or range, a colour is off by 4 (SMPTE 240M for BT.709)
    # to 46.
    path = tmp_path / "saturated.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=30, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv444p"
        stream.codec_context.colorspace, stream.codec_context.color_range = matrix, levels
        for colour in SATURATED:
            planes = to_yuv(colour, red_blue=LUMA_WEIGHTS[matrix], full=levels == ColorRange.JPEG)
            frame = av.VideoFrame.from_ndarray(np.tile(planes[:, None, None], (1, 64, 64)), format="yuv444p")
            frame.colorspace, frame.color_range = matrix, levels
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    reader = open_or_refuse(path, backend=backend)
    assert reader is not None
    off = reader.frames(range(len(SATURATED))).int() - torch.tensor(SATURATED).reshape(-1, 3, 1, 1)
    assert off.abs().max() <= 3  # rounding to 8 bits, there and back, and x264 at its finest


def to_yuv(colour: tuple[int, int, int], *, red_blue: tuple[float, float], full: bool) -> np.ndarray:
    """ITU-R BT.601, BT.709, BT.2020 and SMPTE 240M: Y', Cb, Cr as bytes, of R'G'B' as bytes."""
    red, green, blue = (value / 255 for value in colour)
    k_red, k_blue = red_blue
    luma = k_red * red + (1 - k_red - k_blue) * green + k_blue * blue
    chroma = np.array([(blue - luma) / (2 - 2 * k_blue), (red - luma) / (2 - 2 * k_red)])
    scaled = [255 * luma, *(128 + 255 * chroma)] if full else [16 + 219 * luma, *(128 + 224 * chroma)]
    return np.round(scaled).astype(np.uint8)


@pytest.mark.parametrize("name", CHOSEN)
def test_what_auto_takes(build: Callable[[str], Case], name: str) -> None:
    need("torchcodec")
    path, _ = build(name)
    with open_video(path) as reader:
        assert reader.backend == CHOSEN[name]
        reader.frames(range(reader.num_frames))
        assert reader.backend == CHOSEN[name]


@pytest.mark.parametrize(
    "name", ["mpeg4.avi", "mpeg4_b_frames.avi", "mpeg4_packed.avi", "av1.mkv", "av1.mp4", "av1.webm"]
)
def test_what_decord_never_reads(build: Callable[[str], Case], name: str) -> None:
    need("decord")
    path, _ = build(name)
    with pytest.raises(UnreadableVideo, match="mpeg4 in avi" if "avi" in name else "av1") as caught:
        open_video(path, backend="decord")
    assert str(caught.value).startswith(f"{path}: decord ")


def picked(num_frames: int) -> list[int]:
    """Frames to compare, out of order: all of a short clip, 24 of a longer one with the last among them."""
    numbers = np.random.default_rng(0).permutation(num_frames).tolist()
    return numbers if num_frames <= 90 else [num_frames - 1, *numbers[:23]]


@pytest.fixture(scope="module")
def clips(data_folder: Path) -> dict[Path, tuple[list[float], dict[int, torch.Tensor | None]]]:
    """The times of the real clips, and those of their frames that are picked, by the reference."""
    paths = (path for path in sorted((data_folder / "clips").iterdir()) if path.suffix != ".txt")
    seconds = {path: sequential_seconds(path) for path in paths if path.name not in UNREADABLE_CLIPS}
    return {path: (times, sequential(path, only=set(picked(len(times))))) for path, times in seconds.items()}


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_real_clips(clips: dict, data_folder: Path, backend: str) -> None:
    refused = set()
    for path, (seconds, reference) in clips.items():
        reader = open_or_refuse(path, backend=backend)
        if reader is None:
            refused.add(path.name)
            continue
        with reader:
            assert reader.num_frames == len(seconds), path.name
            np.testing.assert_allclose(reader.times_seconds, seconds, rtol=0, atol=1e-6, err_msg=path.name)
            order = picked(len(seconds))
            assert torch.equal(reader.frames(order), stack(reference, order)), path.name
            for index in order[:6]:
                assert torch.equal(reader.frames([index])[0], reference[index]), (path.name, index)
    avi = {path.name for path in clips if path.suffix == ".avi"}
    assert len(clips) >= 20 and len(avi) >= 4
    decord = avi | {"torchcodec_av1_video.mkv", "torchcodec_h265_video.mp4", "torchcodec_nasa_13013.mp4"}
    assert refused == {"torchcodec": avi, "decord": decord, "pyav": set(), "auto": set()}[backend]
    for name in UNREADABLE_CLIPS:
        with pytest.raises(UnreadableVideo):
            open_video(data_folder / "clips" / name, backend=backend).frames(range(50))
