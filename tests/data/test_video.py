"""Clips from files whose frames show their own numbers: which frames, whose box, and what is a function of what."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from coca_video.data.decode import UnreadableVideo, open_video, write_video
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest, VideoRow
from coca_video.data.sampling import sample_rng, uniform_indices
from coca_video.data.transforms import random_crop_box, resize_crop, square_crop_box
from coca_video.data.video import Clip, ClipConfig, VideoDataset, collate_clips, load_clip

NUM_FRAMES, HEIGHT, WIDTH = 60, 64, 64
FIRST = SampleKey(epoch=0, index=0)


def numbers_shown(frames: torch.Tensor) -> list[int]:
    """The numbers that frames [T, 3, H, W] show: eight bits in two rows of four blocks, white for 1."""
    _, _, height, width = frames.shape
    centres = frames[:, 0, height // 4 :: height // 2, width // 8 :: width // 4].flatten(1)
    return [sum(int(value > 127) << bit for bit, value in enumerate(row)) for row in centres.tolist()]


@pytest.fixture(scope="module")
def video_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 numbered frames at 10 frames a second."""
    bits = torch.tensor([[(number >> bit) & 1 for bit in range(8)] for number in range(NUM_FRAMES)], dtype=torch.uint8)
    blocks = (bits * 215 + 20).view(NUM_FRAMES, 1, 2, 4)
    frames = blocks.repeat_interleave(HEIGHT // 2, 2).repeat_interleave(WIDTH // 4, 3).repeat(1, 3, 1, 1)
    path = tmp_path_factory.mktemp("video") / "numbers.mp4"
    write_video(path, frames=frames, frames_per_second=10.0)
    return path


@pytest.fixture(scope="module")
def wide_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 frames of 96 x 160 noise in blocks, not symmetric in any way."""
    blocks = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (12, 3, 12, 20), dtype=np.uint8))
    path = tmp_path_factory.mktemp("video") / "wide.mp4"
    write_video(path, frames=blocks.repeat_interleave(8, 2).repeat_interleave(8, 3), frames_per_second=25.0)
    return path


def dataset(path: Path, *, seed: int = 0, copies: int = 1, row: dict[str, object] | None = None, **config: object):
    rows = tuple(
        VideoRow(
            **{
                "path": path,
                "label": "two",
                "video_id": f"v{i}",
                "start_seconds": None,
                "end_seconds": None,
                "split": None,
                "extra": {},
            }
            | (row or {})
        )
        for i in range(copies)
    )
    manifest = Manifest(source=path, rows=rows, classes=("one", "two"))
    return VideoDataset(manifest, config=ClipConfig(**{"num_frames": 8, "image_size": 64} | config), seed=seed)


def test_interpolation_of_the_resize(wide_path: Path) -> None:
    frames = dataset(wide_path, num_frames=3, image_size=24, interpolation="bicubic")[FIRST].frames
    bilinear = dataset(wide_path, num_frames=3, image_size=24)[FIRST]
    with open_video(wide_path) as reader:
        indices = [int(np.abs(reader.times_seconds - t).argmin()) for t in bilinear.times_seconds]
        decoded = reader.frames(indices)
    box = square_crop_box(*decoded.shape[-2:])
    assert torch.equal(frames, resize_crop(decoded, box=box, size=24, interpolation="bicubic"))
    assert not torch.equal(frames, bilinear.frames)


def test_frames_label_id_and_times(video_path: Path) -> None:
    clips = dataset(video_path)
    clip = clips[FIRST]
    expected = uniform_indices(NUM_FRAMES, num_samples=8).tolist()
    assert expected == [3, 11, 18, 26, 33, 41, 48, 56]  # (i + 0.5) * 7.5
    assert numbers_shown(clip.frames) == expected
    assert (len(clips), clip.label, clip.video_id) == (1, 1, "v0")
    np.testing.assert_allclose(clip.times_seconds, np.array(expected) / 10, rtol=0, atol=1e-9)


@pytest.mark.parametrize("decoder", ["auto", "pyav", "decord"])
def test_one_frame_is_the_middle_frame(video_path: Path, decoder: str) -> None:
    if decoder == "decord":
        pytest.importorskip("decord", reason="decord has wheels for x86-64 only")
    assert numbers_shown(dataset(video_path, num_frames=1, decoder=decoder)[FIRST].frames) == [30]


def test_more_samples_than_frames(video_path: Path) -> None:
    clip = dataset(video_path, num_frames=120)[FIRST]
    assert numbers_shown(clip.frames) == [frame for frame in range(60) for _ in range(2)]


@pytest.mark.parametrize("augment", [False, True])
def test_start_and_end_are_respected(video_path: Path, augment: bool) -> None:
    clips = dataset(
        video_path,
        row={"start_seconds": 2.0, "end_seconds": 3.5},
        num_frames=15,
        augment=augment,
        crop_scale=(1.0, 1.0),
    )
    clip = clips[FIRST]
    assert numbers_shown(clip.frames) == list(range(20, 35))  # 15 segments of one frame each
    assert clip.times_seconds.min() == pytest.approx(2.0) and clip.times_seconds.max() == pytest.approx(3.4)


def test_a_start_after_the_end_of_the_video_is_unreadable(video_path: Path) -> None:
    sample = dataset(video_path, row={"start_seconds": 9.0, "end_seconds": 11.0})[FIRST]
    assert isinstance(sample, Unreadable) and sample.key == "v0"
    assert sample.cause == f"{video_path}: start_seconds is 9.0, but the last frame of the video is at 5.900 s"


def test_an_unreadable_video_is_named_and_never_replaced(video_path: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.mp4"
    bad.write_bytes(video_path.read_bytes()[:500])
    assert dataset(tmp_path / "none.mp4")[FIRST] == Unreadable(
        key="v0", cause=f"{tmp_path / 'none.mp4'}: there is no such file"
    )
    sample = dataset(bad)[FIRST]
    assert isinstance(sample, Unreadable) and sample.cause.startswith(f"{bad}: ")
    with pytest.raises(UnreadableVideo, match="no such file"):
        load_clip(tmp_path / "none.mp4", config=ClipConfig())


def test_a_wrong_label_is_an_error_and_not_an_unreadable_video(video_path: Path) -> None:
    with pytest.raises((ValueError, AssertionError, KeyError)) as caught:
        dataset(video_path, row={"label": "three"})[FIRST]
    assert not isinstance(caught.value, UnreadableVideo)


def test_no_label(video_path: Path) -> None:
    assert dataset(video_path, row={"label": None})[FIRST].label == -1


def test_augmented_clips_are_a_function_of_seed_epoch_and_index(video_path: Path) -> None:
    settings = {"copies": 3, "augment": True}
    keys = [SampleKey(epoch=epoch, index=index) for epoch in (0, 1) for index in (0, 1, 2)]
    one, two = dataset(video_path, **settings), dataset(video_path, **settings)
    clips = [one[key] for key in keys]
    for key, clip in reversed(list(zip(keys, clips, strict=True))):  # another order of asking
        assert torch.equal(two[key].frames, clip.frames)
        np.testing.assert_array_equal(two[key].times_seconds, clip.times_seconds)
    for i, clip in enumerate(clips):
        assert all(not torch.equal(clip.frames, other.frames) for other in clips[:i])
    assert not torch.equal(dataset(video_path, seed=1, **settings)[keys[0]].frames, clips[0].frames)


def test_without_augmentation_nothing_is_random(video_path: Path) -> None:
    frames = dataset(video_path, crop_scale=(0.1, 0.2))[FIRST].frames
    for seed, key in ((0, SampleKey(epoch=7, index=1)), (5, FIRST)):
        assert torch.equal(dataset(video_path, seed=seed, copies=2)[key].frames, frames)


def test_augmented_frames_come_one_from_each_segment(video_path: Path) -> None:
    clips = dataset(video_path, num_frames=6, augment=True, crop_scale=(1.0, 1.0))
    drawn = [numbers_shown(clips[SampleKey(epoch=epoch, index=0)].frames) for epoch in range(12)]
    assert all([number // 10 for number in numbers] == list(range(6)) for numbers in drawn)
    assert len({number for numbers in drawn for number in numbers}) > 30  # of 60; 6 if nothing were drawn


def test_the_central_square(wide_path: Path) -> None:
    clip = dataset(wide_path, num_frames=12, image_size=32)[FIRST]
    whole = open_video(wide_path).frames(range(12))
    cut = v2.functional.center_crop(whole, [96, 96])
    assert torch.equal(clip.frames, v2.functional.resize(cut, [32, 32], antialias=True))


def test_one_box_for_the_whole_clip(wide_path: Path) -> None:
    clips = dataset(wide_path, seed=4, num_frames=12, image_size=32, augment=True)
    key = SampleKey(epoch=3, index=0)
    rng = sample_rng(seed=4, epoch=3, index=0, purpose="crop")
    box = random_crop_box(96, 160, rng=rng, scale=(0.5, 1.0))
    expected = resize_crop(open_video(wide_path).frames(range(12)), box=box, size=32)  # 12 segments of one frame
    assert torch.equal(clips[key].frames, expected)


def test_a_dense_clip_lies_in_the_middle(video_path: Path) -> None:
    """Frames 0 to 59; 4 frames 6 apart are 19 long, so that starts are 0 to 41 and the middle one is 20."""
    clip = dataset(video_path, num_frames=4, sampling="dense", stride=6)[FIRST]
    assert numbers_shown(clip.frames) == [20, 26, 32, 38]
    np.testing.assert_allclose(clip.times_seconds, [2.0, 2.6, 3.2, 3.8], rtol=0, atol=1e-9)
    window = {"start_seconds": 1.0, "end_seconds": 2.0}  # frames 10 to 19: starts 10 to 16 for 4 frames
    clip = dataset(video_path, row=window, num_frames=2, sampling="dense", stride=3)[FIRST]
    assert numbers_shown(clip.frames) == [13, 16]
    clip = dataset(video_path, row=window, num_frames=4, sampling="dense", stride=5)[FIRST]
    assert numbers_shown(clip.frames) == [10, 15, 19, 19]  # longer than the window: its last frame again


def test_augmented_dense_clips_start_anywhere(video_path: Path) -> None:
    clips = dataset(video_path, num_frames=4, image_size=16, augment=True, sampling="dense", stride=18, seed=2)
    whole = dataset(video_path, num_frames=60, image_size=16)[FIRST].times_seconds
    starts = set()
    for epoch in range(60):
        clip = clips[SampleKey(epoch=epoch, index=0)]
        numbers = np.searchsorted(whole, clip.times_seconds - 1e-6).tolist()
        fraction = sample_rng(seed=2, epoch=epoch, index=0, purpose="clip start").random()
        first = int(fraction * 6)  # 55 frames long, of 60: starts 0 to 5
        assert numbers == [first, first + 18, first + 36, first + 54]
        starts.add(numbers[0])
    assert starts == {0, 1, 2, 3, 4, 5}


def test_collate(video_path: Path, wide_path: Path) -> None:
    clips = [
        dataset(video_path, copies=2)[SampleKey(epoch=0, index=1)],
        dataset(wide_path, row={"label": "one"})[FIRST],
    ]
    batch = collate_clips(clips)
    assert batch.frames.shape == (2, 8, 3, 64, 64) and batch.frames.dtype == torch.uint8
    assert torch.equal(batch.frames[1], clips[1].frames)
    assert batch.labels.tolist() == [1, 0] and batch.labels.dtype == torch.int64
    assert batch.video_ids == ("v1", "v0")
    assert batch.keys == (SampleKey(epoch=0, index=1), FIRST)


def test_load_clip(video_path: Path) -> None:
    config = ClipConfig(num_frames=8, image_size=64)
    clip = load_clip(video_path, config=config)
    assert isinstance(clip, Clip)
    assert torch.equal(clip.frames, dataset(video_path)[FIRST].frames)
    assert (clip.label, clip.video_id) == (-1, "numbers")
    with pytest.raises(ValueError, match="augment=False"):
        load_clip(video_path, config=ClipConfig(augment=True))


def test_config_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        ClipConfig(num_frames=0)
    with pytest.raises(ValueError, match="crop_scale"):
        ClipConfig(crop_scale=(0.9, 0.5))
    with pytest.raises(ValueError, match='a stride of 2 does nothing with sampling "uniform"'):
        ClipConfig(stride=2)
    for stride in (None, 0):
        with pytest.raises(ValueError, match=f'sampling "dense" needs a stride of at least 1 frame, got {stride}'):
            ClipConfig(sampling="dense", stride=stride)
