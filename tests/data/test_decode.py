"""Readers against files whose every frame shows its own number, and against a plain sequential decode by PyAV."""

import random
from collections.abc import Container, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from coca_video.data.decode import PyAVReader, UnreadableVideo, open_video, write_video

HEIGHT, WIDTH = 48, 64
pytest.importorskip("decord", reason="decord has wheels for x86-64 only")


def numbered_frame(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """RGB: eight blocks in two rows, white where the bit of `number` is 1."""
    bits = np.array([(number >> bit) & 1 for bit in range(8)], dtype=np.uint8).reshape(2, 4)
    return np.repeat(np.kron(bits * 215 + 20, np.ones((height // 2, width // 4), np.uint8))[..., None], 3, axis=2)


def numbers_shown(frames: torch.Tensor) -> list[int]:
    """The numbers that frames [T, 3, H, W] show, read at the centres of the eight blocks."""
    _, _, height, width = frames.shape
    centres = frames[:, 0, height // 4 :: height // 2, width // 8 :: width // 4].flatten(1)
    return [sum(int(value > 127) << bit for bit, value in enumerate(row)) for row in centres.tolist()]


def encode(
    path: Path,
    *,
    codec: str = "libx264",
    num_frames: int = 60,
    pts: Sequence[int] | None = None,
    time_base: Fraction = Fraction(1, 30),
    options: dict[str, str] | None = None,
    b_frames: int | None = 3,
    pix_fmt: str = "yuv420p",
    faststart: bool = False,
    height: int = HEIGHT,
) -> Path:
    """A video of frames 0, 1, 2, ... with a key frame every 12."""
    with av.open(str(path), "w", options={"movflags": "faststart"} if faststart else {}) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = WIDTH, height, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.thread_count = 12, 1
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = time_base
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, height=height), format="rgb24")
            frame.pts, frame.time_base = (pts[number] if pts else number), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def sequential(path: Path, *, only: Container[int] | None = None) -> dict[int, torch.Tensor | None]:
    """The reference, number to frame: the best video stream decoded in order, RGB, turned by its rotation.

    `only` names the frames to convert; the others are decoded and None.
    """
    with av.open(str(path), metadata_errors="ignore") as container:
        return {
            number: torch.from_numpy(
                np.rot90(frame.to_ndarray(format="rgb24"), k=frame.rotation // 90).transpose(2, 0, 1).copy()
            )
            if only is None or number in only
            else None
            for number, frame in enumerate(container.decode(container.streams.best("video")))
        }


def stack(frames: dict[int, torch.Tensor | None], order: Iterable[int]) -> torch.Tensor:
    return torch.stack([frames[number] for number in order])


def rotate(path: Path, *, a: int, b: int, c: int, d: int) -> Path:
    """Writes a display matrix into an MP4's track header (ISO 14496-12, 8.3.2): 16.16 numbers at places 0, 1, 3, 4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    for place, value in ((0, a), (1, b), (3, c), (4, d)):
        data[at + 4 * place : at + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


def picture_types(path: Path) -> str:
    with av.open(str(path)) as container:
        return "".join(
            av.video.frame.PictureType(frame.pict_type).name
            for frame in container.decode(container.streams.best("video"))
        )


VARIABLE_PTS = np.cumsum(np.random.default_rng(0).integers(1, 8, 60)).tolist()
EXACT_FOR_ALL = {
    "b_frames.mp4": {},
    "b_frames.mkv": {},
    "one_frame.mp4": {"num_frames": 1},
    "variable_rate.mp4": {"pts": VARIABLE_PTS, "time_base": Fraction(1, 120)},
    "closed_hevc.mp4": {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=0:pools=none:log-level=0"}},
}
OPEN_GOP = "open-gop=1:keyint=12:bframes=3:scenecut=0"
WRONG_IN_DECORD = {
    "open_gop.mp4": ({"options": {"x264-params": OPEN_GOP}}, "open groups of pictures"),
    "open_hevc.mp4": (
        {"codec": "libx265", "options": {"x265-params": "keyint=12:open-gop=1:bframes=3:pools=none:log-level=0"}},
        "open groups of pictures",
    ),
    "edit_list.mp4": ({"pts": list(range(-5, 55))}, "edit list"),
    "mpeg4.avi": ({"codec": "mpeg4", "b_frames": 2}, "mpeg4 in avi"),
    "h264.avi": ({}, "h264 in avi"),
    "h264.ts": ({}, "h264 in mpegts"),
    "flash.flv": ({}, "h264 in flv"),
    "ten_bit.mp4": ({"pix_fmt": "yuv420p10le"}, "8-bit"),
}


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize("name", EXACT_FOR_ALL)
def test_every_frame_is_the_one_asked_for(tmp_path: Path, name: str, backend: str) -> None:
    path = encode(tmp_path / name, **EXACT_FOR_ALL[name])
    reference = sequential(path)
    count = EXACT_FOR_ALL[name].get("num_frames", 60)
    order = [random.Random(1).randrange(count) for _ in range(40)]  # with repeats, back and forth
    with open_video(path, backend=backend) as reader:
        assert (reader.num_frames, reader.height, reader.width) == (count, HEIGHT, WIDTH)
        assert numbers_shown(reader.frames(range(count))) == list(range(count))
        assert torch.equal(reader.frames(range(count)), stack(reference, range(count)))
        assert numbers_shown(reader.frames(order)) == order
        assert torch.equal(reader.frames(order), stack(reference, order))
        assert reader.frames([]).shape == (0, 3, HEIGHT, WIDTH)


def test_the_files_have_the_traps_they_are_named_for(tmp_path: Path) -> None:
    assert "B" in picture_types(encode(tmp_path / "b_frames.mp4"))
    path = encode(tmp_path / "hidden.mp4", pts=list(range(-5, 55)))
    with av.open(str(path)) as container:
        assert sum(packet.is_discard for packet in container.demux(video=0)) == 5


@pytest.mark.parametrize("name", WRONG_IN_DECORD)
def test_what_decord_misreads_is_a_sentence_and_pyav_is_right(tmp_path: Path, name: str) -> None:
    arguments, cause = WRONG_IN_DECORD[name]
    path = encode(tmp_path / name, **arguments)
    with pytest.raises(UnreadableVideo, match=cause) as caught:
        open_video(path, backend="decord")
    assert str(caught.value).startswith(f"{path}: ") and 'use the decoder "auto"' in str(caught.value)
    first = 5 if name == "edit_list.mp4" else 0  # an edit list hides what lies before time 0
    reader = open_video(path)
    assert numbers_shown(reader.frames(range(reader.num_frames))) == list(range(first, 60))
    assert torch.equal(reader.frames([30, 2, 31]), stack(sequential(path), [30, 2, 31]))


def test_decord_does_misread_open_groups_of_pictures(tmp_path: Path) -> None:
    # Should a later decord read these rightly, the refusal above can go.
    import decord

    path = encode(tmp_path / "open_gop.mp4", options={"x264-params": OPEN_GOP})
    order = [random.Random(seed).randrange(60) for seed in range(40)]
    raw = decord.VideoReader(str(path), num_threads=1).get_batch(order).asnumpy()
    assert numbers_shown(torch.from_numpy(raw.transpose(0, 3, 1, 2).copy())) != order


@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_times_are_those_written(tmp_path: Path, backend: str) -> None:
    path = encode(tmp_path / "v.mp4", pts=VARIABLE_PTS, time_base=Fraction(1, 120))
    reader = open_video(path, backend=backend)
    written = [(pts - VARIABLE_PTS[0]) / 120 for pts in VARIABLE_PTS]
    np.testing.assert_allclose(reader.times_seconds, written, rtol=0, atol=1e-9)
    assert reader.duration_seconds > written[-1]
    assert reader.frames_per_second == pytest.approx(60 / reader.duration_seconds, rel=1e-12)


def test_times_of_a_constant_rate_are_exact(tmp_path: Path) -> None:
    path = encode(tmp_path / "c.mp4")
    reader = open_video(path)
    assert reader.times_seconds[30] == 1.0 and reader.times_seconds[0] == 0.0
    assert (reader.duration_seconds, reader.frames_per_second) == (2.0, 30.0)


def test_times_of_avi_with_b_frames_rise(tmp_path: Path) -> None:
    reader = open_video(encode(tmp_path / "b.avi", codec="mpeg4", b_frames=2))
    assert len(reader.times_seconds) == 60
    np.testing.assert_allclose(np.diff(reader.times_seconds), 1 / 30, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kept_frames", [0, 7, 1000])
def test_frames_not_kept_are_decoded_again(tmp_path: Path, kept_frames: int) -> None:
    path = encode(tmp_path / "b.mp4")
    with av.open(str(path)) as container:
        frame_bytes = sum(plane.buffer_size for plane in next(container.decode(video=0)).planes)
    reader = PyAVReader(path, kept_bytes=kept_frames * frame_bytes)
    assert len(reader._kept) == min(kept_frames, 60)
    for order in ([3, 1, 3], [50, 2, 8], list(range(60))):
        assert numbers_shown(reader.frames(order)) == order


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("index", [-1, 60])
def test_a_frame_that_is_not_there(tmp_path: Path, backend: str, index: int) -> None:
    reader = open_video(encode(tmp_path / "b.mp4"), backend=backend)
    with pytest.raises(ValueError, match=f"frame {index} was asked for, but the video has frames 0 to 59"):
        reader.frames([0, index])


def test_a_turned_width_that_decord_fails_on_is_a_sentence(tmp_path: Path) -> None:
    path = rotate(encode(tmp_path / "r.mp4", num_frames=5), a=0, b=1, c=-1, d=0)
    assert open_video(path).frames([0]).shape == (1, 3, WIDTH, HEIGHT)
    with pytest.raises(UnreadableVideo, match="decord cannot decode it"):
        open_video(path, backend="decord")


@pytest.mark.parametrize("backend", ["pyav", "decord"])
@pytest.mark.parametrize("matrix", ["right", "half", "left"])
def test_rotation(tmp_path: Path, backend: str, matrix: str) -> None:
    a, b, c, d, quarter_turns = {"right": (0, 1, -1, 0, -1), "half": (-1, 0, 0, -1, 2), "left": (0, -1, 1, 0, 1)}[
        matrix
    ]
    path = encode(tmp_path / "r.mp4", num_frames=5, height=128)
    upright = stack(sequential(path), range(5))
    rotate(path, a=a, b=b, c=c, d=d)
    turned = torch.rot90(upright, quarter_turns, dims=(2, 3))
    reader = open_video(path, backend=backend)
    assert (reader.height, reader.width) == turned.shape[2:]
    assert torch.equal(reader.frames(range(5)), turned)


def test_best_of_several_streams(tmp_path: Path) -> None:
    path = tmp_path / "two.mp4"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default
        for stream, (height, width) in zip(streams, ((24, 32), (HEIGHT, WIDTH)), strict=True):
            stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for number in range(9):
            for stream in streams:
                pixels = numbered_frame(number, height=stream.height, width=stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    for backend in ("pyav", "decord"):
        reader = open_video(path, backend=backend)
        assert (reader.height, reader.width) == (HEIGHT, WIDTH)
        assert numbers_shown(reader.frames([8, 0, 5])) == [8, 0, 5]


def test_real_clips(data_folder: Path) -> None:
    """Every clip: PyAV equals the sequential decode; decord equals it or gives its reason."""
    paths = sorted(path for path in (data_folder / "clips").iterdir() if path.suffix != ".txt")
    assert len(paths) >= 20
    unreadable, refused = set(), set()
    for path in paths:
        try:
            reader = open_video(path)
        except UnreadableVideo:
            unreadable.add(path.name)
            with pytest.raises(UnreadableVideo):
                open_video(path, backend="decord").frames(range(50))
            continue
        order = np.random.default_rng(0).permutation(reader.num_frames)[:12].tolist()
        reference = sequential(path, only=order)
        assert reader.num_frames == len(reference) and (np.diff(reader.times_seconds) > 0).all(), path.name
        assert torch.equal(reader.frames(order), stack(reference, order)), path.name
        try:
            other = open_video(path, backend="decord")
        except UnreadableVideo:
            refused.add(path.name)
            continue
        assert torch.equal(other.frames(order), stack(reference, order)), path.name
        np.testing.assert_array_equal(other.times_seconds, reader.times_seconds)
    assert unreadable == {"decord_test_corrupted.mp4"}
    assert {name for name in refused if not name.endswith(".avi")} == {
        "torchcodec_av1_video.mkv",
        "torchcodec_h265_video.mp4",
    }


def _cut(path: Path, *, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_bad_files_name_their_cause(tmp_path: Path) -> None:
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "art.txt").write_text("FFmpeg would draw this text as a video\n" * 100)
    encode(tmp_path / "good.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    _cut(encode(tmp_path / "index_lost.mp4"), share=0.6)
    _cut(encode(tmp_path / "index_first.mp4", faststart=True), share=0.7)
    _cut(encode(tmp_path / "cut.avi", codec="mpeg4", b_frames=0), share=0.8)
    _cut(encode(tmp_path / "cut.mkv"), share=0.7)
    _cut(encode(tmp_path / "cut.flv"), share=0.7)
    damaged = bytearray(encode(tmp_path / "damaged.mp4", faststart=True).read_bytes())
    damaged[-900:-300] = random.Random(1).randbytes(600)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    causes = {
        "missing.mp4": "there is no such file",
        "zero.mp4": "empty",
        "text.mp4": "not a video file",
        "art.txt": "not a video file",
        "list.m3u8": "not a video file",
        "audio.mp4": "no video stream",
        "index_lost.mp4": "cut off",
        "index_first.mp4": "the file is cut off: it should have",
        "cut.avi": "the file is cut off: it should have",
        "cut.mkv": "the file is cut off: it should have",
        "cut.flv": "not whole",
        "damaged.mp4": "decoding stops after",
    }
    for name, cause in causes.items():
        with pytest.raises(UnreadableVideo, match=cause) as caught:
            open_video(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        with pytest.raises(UnreadableVideo):
            open_video(tmp_path / name, backend="decord").frames(range(60))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.avi", "cut.mkv"])
def test_a_file_cut_between_two_packets(tmp_path: Path, name: str) -> None:
    # FFmpeg decodes such a file without a word: 30 frames of 60.
    path = encode(tmp_path / name, codec="mpeg4" if name.endswith("avi") else "libx264", b_frames=0, faststart=True)
    assert open_video(path).num_frames == 60
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 0]
    position = packets[30][0] - (8 if name.endswith("avi") else 0)  # an AVI's position is behind a header of 8 bytes
    path.write_bytes(path.read_bytes()[:position])
    assert len(sequential(path)) == 30
    with pytest.raises(UnreadableVideo, match=f"cut off: it should have at least .* bytes, it has {position}"):
        open_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_write_video(tmp_path: Path, suffix: str) -> None:
    frames = torch.from_numpy(np.stack([numbered_frame(number) for number in range(20)])).permute(0, 3, 1, 2)
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_video(first, frames=frames, frames_per_second=30000 / 1001)
    for _ in range(10):
        open_video(first)  # leaves other bytes in freed memory, which a careless encoder would read
        write_video(second, frames=frames, frames_per_second=30000 / 1001)
        assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]
    reader = open_video(first)
    assert numbers_shown(reader.frames(range(20))) == list(range(20))
    assert (reader.frames(range(20)).int() - frames.int()).abs().float().mean() < 3  # of 255; lossy
    assert reader.times_seconds[-1] == pytest.approx(19 * 1001 / 30000, abs=1e-3)  # MKV keeps milliseconds
    with av.open(str(first)) as container:
        context = container.streams.video[0].codec_context
        assert (context.codec.canonical_name, context.pix_fmt) == ("h264", "yuv420p")


def test_write_video_quality(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8))
    for crf in (1, 40):
        write_video(tmp_path / f"{crf}.mp4", frames=noise, frames_per_second=25.0, crf=crf)
    assert (tmp_path / "1.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


def test_write_video_says_what_is_wrong(tmp_path: Path) -> None:
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "a.mp4", frames=frames[..., :7], frames_per_second=25.0)
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", frames=frames[:0], frames_per_second=25.0)
    with pytest.raises(ValueError, match="a name that ends in"):
        write_video(tmp_path / "a.txt", frames=frames, frames_per_second=25.0)
    with pytest.raises(ValueError, match="above 0"):
        write_video(tmp_path / "a.mp4", frames=frames, frames_per_second=0.0)
    assert list(tmp_path.iterdir()) == []
