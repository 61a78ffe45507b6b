"""What is asked of the service and what comes back: no Gradio, no threads, nothing of where files lie."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Float64, UInt8
from numpy import ndarray
from torch import Tensor

from coca_video.data.transforms import Box


class Refused(ValueError):
    """A clip that gets no answer. The message is a sentence for the person who sent it: no path, host or trace."""


class Busy(Refused):
    """Too many requests wait already."""


@dataclass(frozen=True, kw_only=True)
class ReadClip:
    """Frames as a model sees them, and where they lie in the video.

    frames: those of one or several clips (segments) of it. segments: start and end of each in seconds.
    height, width: pixels of the upright video; box: the part of it that `frames` show. plays_in_browser: whether every
    browser plays the file as it is.
    """

    frames: UInt8[Tensor, "clips frames 3 size size"]
    times_seconds: Float64[ndarray, "clips frames"]
    segments: tuple[tuple[float, float], ...]
    duration_seconds: float
    height: int
    width: int
    box: Box
    plays_in_browser: bool
    decode_seconds: float

    def __reduce__(self) -> tuple[Callable[[dict[str, Any]], "ReadClip"], tuple[dict[str, Any]]]:
        """Pickled by value: torch would hand the frames on in shared memory, which a container has 64 MB of."""
        return _clip_of_arrays, (vars(self) | {"frames": self.frames.numpy()},)


@dataclass(frozen=True, kw_only=True)
class Classified:
    """Classes of a clip, most probable first, and what the query looked at.

    attention: the share of each place of each frame, all of them summing to 1; None for a model that pools by the mean.
    seconds: wall time of "wait", "decode", "encode" and "pool".
    """

    model: str
    scores: tuple[tuple[str, float], ...]
    clip: ReadClip
    attention: Float[Tensor, "frames rows columns"] | None
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Segment:
    """A part of a clip and its caption."""

    start_seconds: float
    end_seconds: float
    caption: str


@dataclass(frozen=True, kw_only=True)
class Captioned:
    """The caption of a whole clip, and those of its parts in order. seconds: of "wait", "decode" and "caption"."""

    model: str
    caption: str
    segments: tuple[Segment, ...]
    clip: ReadClip
    seconds: dict[str, float] = field(default_factory=dict)


def _clip_of_arrays(values: dict[str, Any]) -> ReadClip:
    return ReadClip(**values | {"frames": torch.from_numpy(values["frames"])})
