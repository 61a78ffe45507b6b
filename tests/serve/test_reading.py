"""What a model gets of an uploaded clip, or the sentence its sender gets; bombs and liars in a process of their own."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from coca_video.data import video
from coca_video.data.decode import open_video, read_header, write_video
from coca_video.data.sampling import uniform_indices
from coca_video.data.transforms import Box, resize_crop, square_crop_box
from coca_video.data.video import ClipConfig, load_clip
from coca_video.data.worker_pool import WorkerPool
from coca_video.data.workers import WorkerFailure
from coca_video.serve.answers import ReadClip, Refused
from coca_video.serve.limits import Limits
from coca_video.serve.reading import (
    DisplayRequest,
    ReadRequest,
    discard_display,
    make_display,
    read_clip,
    warm_up,
    work,
)
from tests.data.numbered_videos import encode, numbers_shown, patch, sequential
from tests.data.odd_videos import BUILDERS, VARIABLE_PTS
from tests.data.test_header import annex_b, picture_bomb, write_liar

CLIP = ClipConfig(num_frames=4, image_size=48)
MUCH_MEMORY = "The clip cannot be read: it takes more memory than is allowed here, or it is damaged."


def request(path: Path, *, clip: ClipConfig = CLIP, num_segments: int = 1, **limits: float) -> ReadRequest:
    return ReadRequest(path=str(path), clip=clip, limits=Limits(**limits), num_segments=num_segments)


def frames_of(path: Path, **arguments: object) -> ReadClip:
    read = read_clip(request(path, **arguments))
    assert isinstance(read, ReadClip), read
    return read


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 numbered frames of 48 x 64, two seconds."""
    return encode(tmp_path_factory.mktemp("clip") / "clip.mp4")


@pytest.mark.parametrize(
    "config",
    [
        CLIP,
        replace(CLIP, interpolation="bicubic", num_frames=7),
        replace(CLIP, sampling="dense", stride=3),
        replace(CLIP, sampling="pytorchvideo", clip_seconds=1.0),
        replace(CLIP, num_frames=90, decoder="pyav"),
    ],
)
def test_one_segment_is_the_clip_that_evaluation_reads(clip: Path, config: ClipConfig) -> None:
    read, expected = frames_of(clip, clip=config), load_clip(clip, config=config)
    assert torch.equal(read.frames, expected.frames.unsqueeze(0))
    np.testing.assert_array_equal(read.times_seconds, expected.times_seconds[None])
    assert read.segments == ((0.0, 2.0),)
    assert (read.duration_seconds, read.height, read.width, read.box) == (2.0, 48, 64, Box(0, 8, 48, 48))
    assert read.plays_in_browser and read.decode_seconds > 0


def test_frames_of_a_large_video_are_cut_piece_by_piece(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(CLIP, num_frames=7, image_size=24)
    whole = load_clip(clip, config=config)
    with open_video(clip) as reader:
        indices = uniform_indices(60, num_samples=7).tolist()
        at_once = resize_crop(reader.frames(indices), box=square_crop_box(48, 64), size=24)
    assert torch.equal(whole.frames, at_once)
    for num_bytes in (1, 3 * 3 * 48 * 64):  # one frame at a time, and three
        monkeypatch.setattr(video, "_PIECE_BYTES", num_bytes)
        pieces = load_clip(clip, config=config)
        assert torch.equal(pieces.frames, at_once) and np.array_equal(pieces.times_seconds, whole.times_seconds)


def test_segments_are_the_whole_and_its_equal_parts(tmp_path: Path) -> None:
    """Of 24 frames, two from each third: those at 1/4 and 3/4 of its 8 frames."""
    path = encode(tmp_path / "clip.mp4", num_frames=24, height=48, width=48)
    read = frames_of(path, clip=replace(CLIP, num_frames=2), num_segments=3)
    assert [numbers_shown(frames) for frames in read.frames] == [[6, 18], [2, 6], [10, 14], [18, 22]]
    np.testing.assert_allclose(read.segments, [(0, 0.8), (0, 0.8 / 3), (0.8 / 3, 1.6 / 3), (1.6 / 3, 0.8)], atol=1e-9)
    np.testing.assert_allclose(read.times_seconds * 30, [[6, 18], [2, 6], [10, 14], [18, 22]], atol=1e-6)


def test_parts_are_uniform_whatever_the_sampling_of_the_whole(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", num_frames=24, height=48, width=48)
    dense = replace(CLIP, num_frames=2, sampling="dense", stride=1)
    read = frames_of(path, clip=dense, num_segments=2)
    assert [numbers_shown(frames) for frames in read.frames] == [[11, 12], [3, 9], [15, 21]]


def test_parts_are_equal_in_time_where_the_rate_varies(tmp_path: Path) -> None:
    path = tmp_path / "variable_rate.mp4"
    BUILDERS[path.name](path)
    read = frames_of(path, num_segments=4)
    times = (np.array(VARIABLE_PTS) - VARIABLE_PTS[0]) / 120
    np.testing.assert_allclose(np.diff(read.segments[1:]), read.duration_seconds / 4)
    for (start, end), taken in zip(read.segments[1:], read.times_seconds[1:], strict=True):
        on_screen = [
            time for time, after in zip(times, [*times[1:], np.inf], strict=True) if time < end and after > start
        ]
        assert {round(float(time), 6) for time in taken} <= {round(float(time), 6) for time in on_screen}


def test_more_parts_than_frames(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", num_frames=2, height=48, width=48)
    read = frames_of(path, clip=replace(CLIP, num_frames=1), num_segments=5)
    # frame 1 is shown from 1/30 of 2/30 s on, so the third fifth begins with frame 0 and ends with frame 1
    assert [numbers_shown(frames) for frames in read.frames] == [[1], [0], [0], [1], [1], [1]]


@pytest.mark.parametrize("number", [0, -1, 65])
def test_a_number_of_parts_out_of_bounds(clip: Path, number: int) -> None:
    with pytest.raises(Refused, match=f"captioned in 1 to 64 parts; {number} were asked for"):
        request(clip, num_segments=number)


def test_what_stands_sideways_is_read_upright(tmp_path: Path) -> None:
    path = tmp_path / "turned_90.mp4"
    BUILDERS[path.name](path)
    read = frames_of(path, clip=replace(CLIP, num_frames=60, image_size=64))
    assert (read.height, read.width, read.box) == (64, 128, Box(0, 32, 64, 64))
    reference = torch.stack(list(sequential(path).values()))
    assert torch.equal(read.frames[0], reference[..., 32:96])


@pytest.mark.slow
def test_every_real_clip_is_read_or_refused_in_a_sentence(data_folder: Path) -> None:
    causes = {}
    for path in sorted((data_folder / "clips").iterdir()):
        read = read_clip(request(path))
        if isinstance(read, ReadClip):
            assert torch.equal(read.frames[0], load_clip(path, config=CLIP).frames), path.name
        else:
            causes[path.name] = read
    assert causes == {
        "SOURCES.txt": "The clip cannot be read: not a video file, or one cut off or damaged (Invalid argument).",
        "decord_test_corrupted.mp4": "The clip cannot be read: the file is damaged: decoding stops after 14 frames "
        "(Invalid data found when processing input).",
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_odd_videos_are_read_and_shown(tmp_path: Path, name: str) -> None:
    path, out = tmp_path / name, tmp_path / "out.mp4"
    shown = BUILDERS[name](path)
    read = frames_of(path, num_segments=2)
    assert torch.equal(read.frames[0], load_clip(path, config=CLIP).frames)
    assert make_display(DisplayRequest(path=str(path), out=str(out), limits=Limits())) is None
    assert read_header(out).plays_in_browser
    with open_video(path) as before, open_video(out) as after:
        assert after.num_frames == before.num_frames == len(shown)
        np.testing.assert_allclose(after.times_seconds, before.times_seconds, atol=1e-3)
        assert (after.height, after.width) == (before.height // 2 * 2, before.width // 2 * 2)


@pytest.mark.parametrize(
    ("limits", "sentence"),
    [
        ({"max_seconds": 1.9}, "The clip is 2 s long; this demo takes up to 1.9 s: cut it."),
        (
            {"max_side": 63},
            "The clip is 64 x 48 pixels; this demo takes up to 63 pixels on the longer side: scale it down.",
        ),
        ({"max_frames": 59}, "The clip has 60 frames; this demo takes up to 59: cut it, or lower its frame rate."),
        (
            {"max_megabytes": 0.001},
            "The clip is {size} MB; this demo takes up to 0.001 MB: cut it, or make it smaller.",
        ),
    ],
)
def test_limits(clip: Path, tmp_path: Path, limits: dict[str, float], sentence: str) -> None:
    size = np.ceil(clip.stat().st_size / 1e5) / 10
    sentence = sentence.format(size=f"{size:g}")
    assert read_clip(request(clip, **limits)) == sentence
    out = tmp_path / "out.mp4"
    assert make_display(DisplayRequest(path=str(clip), out=str(out), limits=Limits(**limits))) == sentence
    assert not out.exists()


def test_what_is_at_a_limit_passes(clip: Path) -> None:
    megabytes = clip.stat().st_size / 1e6
    frames_of(clip, max_seconds=2.0, max_side=64, max_frames=60, max_megabytes=megabytes)


def test_lengths_are_rounded_so_that_they_never_look_like_the_limit(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", num_frames=31)
    refused = read_clip(request(path, max_seconds=1.0))
    assert refused == "The clip is 1.1 s long; this demo takes up to 1 s: cut it."


@pytest.mark.parametrize("name", ["count_low.avi", "count_low.mp4", "count_low.mkv"])
def test_headers_that_claim_less_than_there_is(tmp_path: Path, name: str) -> None:
    """17 frames, or as long as those, by the header; 60 by the packets."""
    path = tmp_path / name
    BUILDERS[name](path)
    frames_of(path, max_frames=60)
    count = "60 frames" if path.suffix == ".mp4" else "more than 59 frames"  # MP4's count is its table, and no claim
    assert read_clip(request(path, max_frames=59)) == (
        f"The clip has {count}; this demo takes up to 59: cut it, or lower its frame rate."
    )
    seconds = {".avi": "2", ".mp4": "2", ".mkv": "2"}[path.suffix]
    long = read_clip(request(path, max_seconds=1.5))
    assert long == f"The clip is {seconds} s long; this demo takes up to 1.5 s: cut it."


def test_a_hundred_thousand_frames_behind_a_header_of_ten(tmp_path: Path) -> None:
    path = tmp_path / "liar.avi"
    write_liar(path)
    assert read_clip(request(path)) == (
        "The clip has more than 40000 frames; this demo takes up to 40000: cut it, or lower its frame rate."
    )


def test_a_packet_for_which_there_is_no_memory(tmp_path: Path) -> None:
    """FFmpeg allocates none of 2**29 bytes, however much there is."""
    path = encode(tmp_path / "clip.mp4", num_frames=3)
    patch(path, after=b"stsz", skip=12, value=2**29, order="big")  # ISO 14496-12, 8.7.3: the first packet's size
    assert read_clip(request(path)) == MUCH_MEMORY


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".h264"])
def test_enormous_pictures_are_refused_by_their_header(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"bomb{suffix}"
    picture_bomb(path, width=16_000, height=12_000)
    assert read_clip(request(path)) == (
        "The clip is 16000 x 12000 pixels; this demo takes up to 4096 pixels on the longer side: scale it down."
    )


def test_files_that_are_none(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "link.mp4").symlink_to(tmp_path / "secret-place.mp4")
    (tmp_path / "words.jpg").write_text("no picture")
    missing = "The clip cannot be read: there is no such file."
    assert read_clip(request(tmp_path / "missing.mp4")) == missing
    assert read_clip(request(tmp_path / "folder.mp4")) == missing
    assert read_clip(request(tmp_path / "link.mp4")) == missing
    assert read_clip(request(tmp_path / "empty.mp4")) == "The clip cannot be read: the file is empty (0 bytes)."
    assert read_clip(request(tmp_path / "words.jpg")) == (
        "The clip cannot be read: not a JPEG, PNG, WebP or BMP picture, or one whose header is damaged."
    )
    url = ReadRequest(path=clip.as_uri(), clip=CLIP, limits=Limits())  # file:///..., which fsspec would fetch
    assert read_clip(url) == missing


def test_no_sentence_tells_where_files_lie(tmp_path: Path) -> None:
    """Of a picture with a whole header and damaged pixels Pillow's own message, of a video FFmpeg's."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    whole = encode(tmp_path / "whole.mp4", faststart=True).read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    for name, cause in (
        ("cut.png", "the picture cannot be decoded"),
        ("cut.mp4", "the file is cut off: it should have"),
    ):
        refused = read_clip(request(tmp_path / name))
        assert isinstance(refused, str) and refused.startswith(f"The clip cannot be read: {cause}"), refused
        assert refused.endswith(".") and not refused.endswith("..")
        assert not any(part in refused for part in (str(tmp_path), tmp_path.name, name)), refused


def test_pictures_are_clips_of_one_frame(tmp_path: Path) -> None:
    """A photo of 40 x 60 stored pixels that is to be turned a quarter to the right (EXIF 2.32, orientation 6)."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    path, out = tmp_path / "photo.png", tmp_path / "out.mp4"
    Image.fromarray(pixels).save(path, exif=exif)
    read = frames_of(path, clip=replace(CLIP, num_frames=3, image_size=40), num_segments=2)
    upright = torch.from_numpy(np.rot90(pixels, k=-1)[10:50].transpose(2, 0, 1).copy())
    assert torch.equal(read.frames, upright.expand(3, 3, 3, 40, 40))
    assert (read.height, read.width, read.box) == (60, 40, Box(10, 0, 40, 40))
    assert not read.times_seconds.any() and not read.plays_in_browser
    assert make_display(DisplayRequest(path=str(path), out=str(out), limits=Limits())) is None
    with open_video(out) as reader:
        assert (reader.height, reader.width, reader.num_frames, reader.duration_seconds) == (60, 40, 1, 1.0)
    assert read_header(out).plays_in_browser


def test_displays_are_small_upright_and_close_to_the_clip(tmp_path: Path) -> None:
    path, out = tmp_path / "large.mp4", tmp_path / "out.mp4"
    columns = torch.linspace(0, 255, 1280).to(torch.uint8).expand(6, 3, 960, 1280)
    write_video(path, frames=columns, frames_per_second=30.0)
    assert make_display(DisplayRequest(path=str(path), out=str(out), limits=Limits())) is None
    with open_video(out) as reader:
        assert (reader.height, reader.width, reader.num_frames) == (480, 640, 6)
        shown = reader.frames([5])[0, :, 240].float()
    assert (shown - torch.linspace(0, 255, 640)).abs().max() < 8


def test_what_a_process_left_is_removed(tmp_path: Path) -> None:
    for name in ("out.mp4", ".partial-123-out.mp4", ".partial-45-out.mp4", ".partial-9-other.mp4", "other.mp4"):
        (tmp_path / name).touch()
    discard_display(tmp_path / "out.mp4")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-9-other.mp4", "other.mp4"]
    discard_display(tmp_path / "out.mp4")  # nothing is there any more


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool[ReadRequest | DisplayRequest, ReadClip | str | None]]:
    with WorkerPool(
        work, num_workers=1, timeout_seconds=120.0, memory_limit_bytes=200 * 10**6, warm_up=warm_up
    ) as pool:
        yield pool


@pytest.mark.slow
def test_one_pool_reads_and_shows(
    pool: WorkerPool[ReadRequest | DisplayRequest, ReadClip | str | None], clip: Path, tmp_path: Path
) -> None:
    read = pool.call(request(clip))
    assert isinstance(read, ReadClip) and torch.equal(read.frames[0], load_clip(clip, config=CLIP).frames)
    out = tmp_path / "out.mp4"
    assert pool.call(DisplayRequest(path=str(clip), out=str(out), limits=Limits())) is None
    with open_video(out) as reader:
        assert numbers_shown(reader.frames([0, 59])) == [0, 59]


@pytest.mark.slow
def test_what_needs_more_memory_than_a_clip_may_take(
    pool: WorkerPool[ReadRequest | DisplayRequest, ReadClip | str | None], clip: Path, tmp_path: Path
) -> None:
    """200 MB: in Pillow 10000 x 10000 pixels of 3 bytes; in FFmpeg pictures of 16000 x 12000, 1.5 bytes each."""
    picture = tmp_path / "large.png"
    Image.new("RGB", (10_000, 10_000)).save(picture, compress_level=1)
    found = pool.call(request(picture, max_side=10_000))
    assert found == WorkerFailure(cause="needs more than 200 MB of memory", timed_out=False)
    raw = tmp_path / "large.h264"
    raw.write_bytes(annex_b(width=16_000, height=12_000, num_frames=30))
    refused = pool.call(request(raw, max_side=16_000))
    # FFmpeg's decoder calls a picture for which it gets no memory invalid, its demuxer says the truth
    assert isinstance(refused, str) and refused.startswith("The clip cannot be read: ")
    assert isinstance(pool.call(request(clip)), ReadClip)


def test_a_copy_under_a_strange_name(clip: Path, tmp_path: Path) -> None:
    strange = tmp_path / "ünïcode %s {0} 'quote'.mp4"
    shutil.copy(clip, strange)
    assert torch.equal(frames_of(strange).frames, frames_of(clip).frames)
