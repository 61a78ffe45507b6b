"""What every backend gives: frames of one video by number, and when each is shown."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

BackendName = Literal["torchcodec", "decord", "pyav"]
Backend = Literal["auto", "torchcodec", "decord", "pyav"]
BACKENDS: tuple[BackendName, ...] = ("torchcodec", "decord", "pyav")  # in `auto`'s order, where PyAV is not fastest
USE_AUTO = 'use the decoder "auto" or "pyav"'


class Timeline(NamedTuple):
    """When each frame is first shown, from the first frame on, and when the last ends."""

    times_seconds: Float64[np.ndarray, "num_frames"]
    duration_seconds: float


class Clock(NamedTuple):
    """A stream's time unit, and its frame rate by the header."""

    unit_seconds: Fraction
    frames_per_second: Fraction


def timeline(pts: Sequence[int | None], *, clock: Clock, last_duration: int) -> Timeline:
    """Presentation times in seconds of frames with these presentation times in units of the clock, in any order.

    AVI has no presentation times: FFmpeg gives a frame those of another, and sorted they are right. Times that are
    missing or not distinct are replaced by a constant rate.
    """
    known = sorted(time for time in pts if time is not None)
    last = last_duration * clock.unit_seconds if last_duration > 0 else 1 / clock.frames_per_second
    if len(set(known)) == len(pts):
        ticks, unit = [time - known[0] for time in known], clock.unit_seconds
    else:
        ticks, unit = list(range(len(pts))), 1 / clock.frames_per_second
    # Whole numbers up to the one division: frame 30 at 1/15360 s units must lie at 1.0 and not just before it.
    seconds = [tick * unit.numerator / unit.denominator for tick in ticks]
    return Timeline(np.array(seconds, dtype=np.float64), float(ticks[-1] * unit + last))


class VideoReader(ABC):
    """Frames of one video by number; a context manager.

    name: the path, URL or kind of source, for messages. backend: what decodes. times_seconds: when each frame is first
    shown, rising, the first at 0. height, width: pixels after rotation. frames_per_second is num_frames /
    duration_seconds, the mean rate where it varies.
    """

    name: str
    backend: Literal["torchcodec", "decord", "pyav", "images"]
    num_frames: int
    frames_per_second: float
    duration_seconds: float
    height: int
    width: int
    times_seconds: Float64[np.ndarray, "num_frames"]
    _is_closed = False

    def frames(self, indices: Sequence[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames of these numbers, in any order, repeats allowed.

        ValueError for a number out of range, or a closed reader; UnreadableVideo where the file is damaged.
        """
        if self._is_closed:
            raise ValueError(f"{self.name}: the reader is closed; open the video again")
        for index in indices:
            if not 0 <= index < self.num_frames:
                last = self.num_frames - 1
                raise ValueError(f"{self.name}: frame {index} was asked for, but the video has frames 0 to {last}")
        if len(indices) == 0:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        return self._frames([operator.index(index) for index in indices])

    @abstractmethod
    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames of one or more numbers that exist."""

    def close(self) -> None:
        """Lets go of the file and of the frames kept."""
        self._is_closed = True
        self._let_go()

    @abstractmethod
    def _let_go(self) -> None:
        """What close does, once or again."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_timeline(self, timeline: Timeline) -> None:
        self.times_seconds = timeline.times_seconds
        self.num_frames = len(timeline.times_seconds)
        self.duration_seconds = timeline.duration_seconds
        self.frames_per_second = self.num_frames / self.duration_seconds
