"""Clips: a manifest's rows, decoded, sampled, cropped and resized to the size that the model sees."""

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from coca_video.data.deadline import within
from coca_video.data.decode import Backend, UnreadableVideo, VideoSource, open_video
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest
from coca_video.data.sampling import frame_window, sample_rng, uniform_indices
from coca_video.data.transforms import Interpolation, horizontal_flip, random_crop_box, resize_crop, square_crop_box

NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a clip is made of a video: num_frames uniformly sampled frames of image_size x image_size pixels.

    augment draws a random frame within each segment, a random box of crop_scale times the area, and a flip with
    flip_probability; without it the frames are the segments' centres and the box is the central square. One box and
    one flip hold for the whole clip. No flip by default: it turns "sliding left" into "sliding right". A clip that
    takes longer than timeout_seconds to read counts as unreadable.
    """

    num_frames: int = 16
    image_size: int = 224
    interpolation: Interpolation = "bilinear"
    decoder: Backend = "auto"
    timeout_seconds: float = 60.0
    augment: bool = False
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip_probability: float = 0.0

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.image_size < 1:
            raise ValueError(
                f"expected num_frames and image_size of at least 1, got {self.num_frames} and {self.image_size}"
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"expected timeout_seconds above 0, got {self.timeout_seconds}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"expected crop_scale as 0 < low <= high <= 1, got {self.crop_scale}")
        if not 0 <= self.flip_probability <= 1:
            raise ValueError(f"expected flip_probability between 0 and 1, got {self.flip_probability}")


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A sample: RGB frames, the class number (-1: unlabelled), and when in the video each frame is first shown."""

    frames: UInt8[Tensor, "frames 3 height width"]
    label: int
    video_id: str
    times_seconds: Float64[np.ndarray, "frames"]


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Clips of one size, stacked."""

    frames: UInt8[Tensor, "batch frames 3 height width"]
    labels: Int64[Tensor, "batch"]
    video_ids: tuple[str, ...]


@dataclass(frozen=True)
class VideoDataset:
    """A manifest's clips by SampleKey: everything random is a pure function of (seed, epoch, index)."""

    manifest: Manifest
    _: KW_ONLY
    config: ClipConfig
    seed: int

    def __len__(self) -> int:
        return len(self.manifest.rows)

    def __getitem__(self, key: SampleKey) -> Clip | Unreadable:
        """The clip of row key.index, or the name and cause of a video that cannot be read."""
        row = self.manifest.rows[key.index]
        label = NO_LABEL if row.label is None else self.manifest.label_index(row)
        try:
            frames, times_seconds = _read_frames(
                row.path,
                config=self.config,
                start_seconds=row.start_seconds,
                end_seconds=row.end_seconds,
                seed=self.seed,
                key=key,
            )
        except UnreadableVideo as error:
            return Unreadable(key=row.video_id, cause=str(error))
        return Clip(frames=frames, label=label, video_id=row.video_id, times_seconds=times_seconds)


def collate_clips(clips: Sequence[Clip]) -> ClipBatch:
    """Stacks clips of one shape."""
    return ClipBatch(
        frames=torch.stack([clip.frames for clip in clips]),
        labels=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
        video_ids=tuple(clip.video_id for clip in clips),
    )


def load_clip(source: VideoSource, *, config: ClipConfig) -> Clip:
    """One video without a manifest, as in evaluation: its whole length, unlabelled, a file named by its stem.

    Raises UnreadableVideo for a file that cannot be read, ValueError for a config with augment.
    """
    if config.augment:
        raise ValueError("expected augment=False to load a single file: there is no seed and epoch to augment by")
    frames, times_seconds = _read_frames(
        source, config=config, start_seconds=None, end_seconds=None, seed=0, key=SampleKey(epoch=0, index=0)
    )
    video_id = Path(source).stem if isinstance(source, str | Path) else ""
    return Clip(frames=frames, label=NO_LABEL, video_id=video_id, times_seconds=times_seconds)


def _read_frames(
    source: VideoSource,
    *,
    config: ClipConfig,
    start_seconds: float | None,
    end_seconds: float | None,
    seed: int,
    key: SampleKey,
) -> tuple[UInt8[Tensor, "frames 3 height width"], Float64[np.ndarray, "frames"]]:
    """Frames and their times; UnreadableVideo also where the video ends before start_seconds, or takes too long."""

    def read() -> tuple[Tensor, np.ndarray]:
        with open_video(source, backend=config.decoder) as reader:
            try:
                first, last = frame_window(reader.times_seconds, start_seconds=start_seconds, end_seconds=end_seconds)
            except ValueError as error:
                raise UnreadableVideo(f"{reader.name}: {error}") from error
            offsets = None
            if config.augment:
                offsets = _rng(seed, key=key, purpose="frame offsets").random(config.num_frames)
            indices = first + uniform_indices(last - first, num_samples=config.num_frames, offsets=offsets)
            return reader.frames(indices.tolist()), reader.times_seconds[indices]

    name = str(source) if isinstance(source, str | Path) else "the video given"
    frames, times_seconds = within(config.timeout_seconds, read, name=name)
    return _crop(frames, config=config, seed=seed, key=key), times_seconds


def _crop(
    frames: UInt8[Tensor, "frames 3 height width"], *, config: ClipConfig, seed: int, key: SampleKey
) -> UInt8[Tensor, "frames 3 size size"]:
    height, width = frames.shape[-2:]
    box = square_crop_box(height, width)
    if config.augment:
        box = random_crop_box(height, width, rng=_rng(seed, key=key, purpose="crop"), scale=config.crop_scale)
    frames = resize_crop(frames, box=box, size=config.image_size, interpolation=config.interpolation)
    if config.augment and _rng(seed, key=key, purpose="flip").random() < config.flip_probability:
        frames = horizontal_flip(frames)
    return frames


def _rng(seed: int, *, key: SampleKey, purpose: str) -> np.random.Generator:
    return sample_rng(seed=seed, epoch=key.epoch, index=key.index, purpose=purpose)
