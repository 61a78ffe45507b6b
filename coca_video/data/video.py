"""Clips: a manifest's rows, decoded, sampled, cropped and resized to the size that the model sees."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor

from coca_video.data.deadline import within
from coca_video.data.decode import Backend, UnreadableVideo, VideoReader, VideoSource, open_video
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest
from coca_video.data.sampling import (
    clip_starts,
    dense_indices,
    exact_rate,
    frame_window,
    pytorchvideo_indices,
    pytorchvideo_random,
    random_dense_start,
    sample_rng,
    uniform_indices,
)
from coca_video.data.transforms import Interpolation, random_crop_box, resize_crop, square_crop_box

Sampling = Literal["uniform", "dense", "pytorchvideo"]

NO_LABEL = -1
_FIRST = SampleKey(epoch=0, index=0)
_PIECE_BYTES = 256 * 2**20  # of decoded frames: 16 of 1920x1080 are 100 MB and stay together, 16 of 4096x4096 806


@dataclass(frozen=True, kw_only=True)
class ClipConfig:
    """How a clip is made of a video: num_frames frames of image_size x image_size pixels.

    sampling: "uniform" takes one frame from each of num_frames equal parts of the whole video, "dense" every
    stride-th frame of a part of it, "pytorchvideo" what its RandomClipSampler and uniform_temporal_subsample take of
    clip_seconds of it. augment draws a random frame within each part, or where the part starts, and a random box of
    crop_scale times the area; without it the frames are the parts' centres, or the part lies in the middle (where
    pytorchvideo's own sampler for tests, asked for one clip, takes the first), and the box is the central square. One
    box holds for the whole clip. A clip that takes longer than timeout_seconds to read counts as unreadable.
    """

    num_frames: int = 16
    image_size: int = 224
    interpolation: Interpolation = "bilinear"
    decoder: Backend = "auto"
    timeout_seconds: float = 60.0
    augment: bool = False
    crop_scale: tuple[float, float] = (0.5, 1.0)
    sampling: Sampling = "uniform"
    stride: int | None = None
    clip_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.image_size < 1:
            raise ValueError(
                f"expected num_frames and image_size of at least 1, got {self.num_frames} and {self.image_size}"
            )
        if not self.timeout_seconds > 0:
            raise ValueError(f"expected timeout_seconds above 0, got {self.timeout_seconds}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"expected crop_scale as 0 < low <= high <= 1, got {self.crop_scale}")
        check_stride(self.stride, sampling=self.sampling)
        check_clip_seconds(self.clip_seconds, sampling=self.sampling)


def sampling_of(*, stride: int | None, clip_seconds: float | None) -> Sampling:
    """The sampling that a stride or a length belongs to, of which there is one at most."""
    if stride is not None:
        return "dense"
    return "uniform" if clip_seconds is None else "pytorchvideo"


def check_stride(stride: int | None, *, sampling: Sampling) -> None:
    """ValueError for a stride without dense sampling, for dense sampling without one, and for one below 1."""
    if sampling != "dense" and stride is not None:
        raise ValueError(f'a stride of {stride} does nothing with sampling "{sampling}"; take "dense", or no stride')
    if sampling == "dense" and (stride is None or stride < 1):
        raise ValueError(f'sampling "dense" needs a stride of at least 1 frame, got {stride}')


def check_clip_seconds(clip_seconds: float | None, *, sampling: Sampling) -> None:
    """ValueError for clip_seconds without pytorchvideo's sampling, for that without them, and for 0 or less."""
    if sampling != "pytorchvideo" and clip_seconds is not None:
        raise ValueError(
            f'clip_seconds of {clip_seconds:g} do nothing with sampling "{sampling}"; take "pytorchvideo", or none'
        )
    if sampling == "pytorchvideo" and (clip_seconds is None or not 0 < clip_seconds < float("inf")):
        raise ValueError(f'sampling "pytorchvideo" needs clip_seconds above 0 and finite, got {clip_seconds}')


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A sample: RGB frames, the class number (-1: unlabelled), and when in the video each frame is first shown."""

    key: SampleKey
    frames: UInt8[Tensor, "frames 3 height width"]
    label: int
    video_id: str
    times_seconds: Float64[np.ndarray, "frames"]


@dataclass(frozen=True, kw_only=True)
class ClipBatch:
    """Clips of one size, stacked; `keys` are what each was asked for by, for whoever draws more of its randomness."""

    keys: tuple[SampleKey, ...]
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

    @property
    def sample_timeout_seconds(self) -> float:
        """The most that reading a clip takes: see `loader_workers.TimeLimited`."""
        return self.config.timeout_seconds

    def __getitem__(self, key: SampleKey) -> Clip | Unreadable:
        """The clip of row key.index, or the name and cause of a video that cannot be read."""
        row = self.manifest.rows[key.index]
        label = NO_LABEL if row.label is None else self.manifest.label_index(row)
        try:
            frames, times_seconds = self._read(key)
        except UnreadableVideo as error:
            return Unreadable(key=row.video_id, cause=str(error))
        frames = _crop(frames, config=self.config, seed=self.seed, key=key)
        return Clip(key=key, frames=frames, label=label, video_id=row.video_id, times_seconds=times_seconds)

    def _read(self, key: SampleKey) -> tuple[UInt8[Tensor, "frames 3 height width"], Float64[np.ndarray, "frames"]]:
        """Frames as they are and their times; UnreadableVideo with the cause."""
        row = self.manifest.rows[key.index]
        return _read_frames(
            row.path,
            config=self.config,
            start_seconds=row.start_seconds,
            end_seconds=row.end_seconds,
            seed=self.seed,
            key=key,
        )


def collate_clips(clips: Sequence[Clip]) -> ClipBatch:
    """Stacks clips of one shape."""
    return ClipBatch(
        keys=tuple(clip.key for clip in clips),
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

    def read() -> tuple[Tensor, np.ndarray]:
        with open_window(source, decoder=config.decoder, start_seconds=None, end_seconds=None) as window:
            return clip_of(window, config=config)

    frames, times_seconds = within(config.timeout_seconds, read, name=_name(source))
    video_id = Path(source).stem if isinstance(source, str | Path) else ""
    return Clip(key=_FIRST, frames=frames, label=NO_LABEL, video_id=video_id, times_seconds=times_seconds)


class VideoWindow(NamedTuple):
    """An open video, and the frames of it that are asked for: first to last, last excluded."""

    reader: VideoReader
    first: int
    last: int


def clip_of(
    window: VideoWindow, *, config: ClipConfig
) -> tuple[UInt8[Tensor, "frames 3 size size"], Float64[np.ndarray, "frames"]]:
    """A part of an open video as in evaluation: its frames, cut and resized, and their times in the video.

    Frames are cut as they come, so that those of a large video are never in memory all at once. No time limit is kept.
    UnreadableVideo for a damaged file.
    """
    assert not config.augment, "there is no seed and epoch to augment by"
    reader = window.reader
    indices = window.first + _window_indices(window, config=config, seed=0, key=_FIRST)
    per_piece = max(1, _PIECE_BYTES // (3 * reader.height * reader.width))
    pieces = [
        _crop(reader.frames(indices[start : start + per_piece].tolist()), config=config, seed=0, key=_FIRST)
        for start in range(0, len(indices), per_piece)
    ]
    return torch.cat(pieces), reader.times_seconds[indices]


@contextmanager
def open_window(
    source: VideoSource, *, decoder: Backend, start_seconds: float | None, end_seconds: float | None
) -> Iterator[VideoWindow]:
    """Opens a video for the frames between two times; UnreadableVideo also where it ends before the first."""
    with open_video(source, backend=decoder) as reader:
        try:
            first, last = frame_window(reader.times_seconds, start_seconds=start_seconds, end_seconds=end_seconds)
        except ValueError as error:
            raise UnreadableVideo(f"{reader.name}: {error}") from error
        yield VideoWindow(reader, first, last)


def clip_indices(
    num_frames: int, *, frames_per_second: float, config: ClipConfig, seed: int, key: SampleKey
) -> Int64[np.ndarray, "{config.num_frames}"]:
    """Which of `num_frames` frames make the clip; with augment a function of (seed, key).

    Only "pytorchvideo" looks at frames_per_second.
    """
    match config.sampling:
        case "uniform":
            offsets = None
            if config.augment:
                offsets = _rng(seed, key=key, purpose="frame offsets").random(config.num_frames)
            return uniform_indices(num_frames, num_samples=config.num_frames, offsets=offsets)
        case "dense":
            return _dense_clip(num_frames, config=config, fraction=_start_fraction(config, seed=seed, key=key))
        case "pytorchvideo":
            assert config.clip_seconds is not None
            rate = exact_rate(frames_per_second)
            fraction = _start_fraction(config, seed=seed, key=key)
            clip = pytorchvideo_random(
                num_frames / rate,
                clip_seconds=config.clip_seconds,
                fraction=0.5 if fraction is None else fraction,
            )
            return pytorchvideo_indices(num_frames, frames_per_second=rate, clip=clip, num_samples=config.num_frames)


def _start_fraction(config: ClipConfig, *, seed: int, key: SampleKey) -> float | None:
    """Where among its possible starts a clip starts, in [0, 1); None for the middle."""
    return float(_rng(seed, key=key, purpose="clip start").random()) if config.augment else None


def _dense_clip(
    num_frames: int, *, config: ClipConfig, fraction: float | None
) -> Int64[np.ndarray, "{config.num_frames}"]:
    count, stride = config.num_frames, config.stride
    assert stride is not None
    if fraction is None:
        start = int(clip_starts(num_frames, num_clips=1, num_samples=count, stride=stride)[0])
    else:
        start = random_dense_start(num_frames, num_samples=count, stride=stride, fraction=fraction)
    return dense_indices(num_frames, num_samples=count, stride=stride, start=start)


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
        times = {"start_seconds": start_seconds, "end_seconds": end_seconds}
        with open_window(source, decoder=config.decoder, **times) as window:
            indices = window.first + _window_indices(window, config=config, seed=seed, key=key)
            return window.reader.frames(indices.tolist()), window.reader.times_seconds[indices]

    return within(config.timeout_seconds, read, name=_name(source))


def _window_indices(
    window: VideoWindow, *, config: ClipConfig, seed: int, key: SampleKey
) -> Int64[np.ndarray, "{config.num_frames}"]:
    """Which frames of the window make the clip, from its first."""
    reader, first, last = window
    return clip_indices(last - first, frames_per_second=reader.frames_per_second, config=config, seed=seed, key=key)


def _name(source: VideoSource) -> str:
    return str(source) if isinstance(source, str | Path) else "the video given"


def _crop(
    frames: UInt8[Tensor, "frames 3 height width"], *, config: ClipConfig, seed: int, key: SampleKey
) -> UInt8[Tensor, "frames 3 size size"]:
    height, width = frames.shape[-2:]
    box = square_crop_box(height, width)
    if config.augment:
        box = random_crop_box(height, width, rng=_rng(seed, key=key, purpose="crop"), scale=config.crop_scale)
    return resize_crop(frames, box=box, size=config.image_size, interpolation=config.interpolation)


def _rng(seed: int, *, key: SampleKey, purpose: str) -> np.random.Generator:
    return sample_rng(seed=seed, epoch=key.epoch, index=key.index, purpose=purpose)
