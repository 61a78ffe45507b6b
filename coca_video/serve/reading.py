"""Uploaded clips, read in a process that may die: either what a model sees of one, or a sentence for who sent it."""

import contextlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from coca_video.data.decode import (
    BACKENDS,
    UnreadableVideo,
    VideoHeader,
    VideoReader,
    count_packets,
    open_video,
    prove,
    read_header,
    write_video,
)
from coca_video.data.decode.images import is_picture
from coca_video.data.decode.proof import CLIP
from coca_video.data.decode.write import PARTIAL_PREFIX, TranscodeConfig, transcode_video
from coca_video.data.sampling import frame_window
from coca_video.data.transforms import square_crop_box
from coca_video.data.video import ClipConfig, VideoWindow, clip_of
from coca_video.data.workers import is_out_of_memory
from coca_video.serve.answers import ReadClip, Refused
from coca_video.serve.limits import Limits

Answer = TypeVar("Answer")

MAX_SEGMENTS = 64
# What a clip looks like beside its classes: quick to make, and small on the way. A page jumps to single frames of it,
# so that its key frames are close (TranscodeConfig.gop).
DISPLAY = TranscodeConfig(short_side=480, preset="veryfast")
_LONGEST_CAUSE = 300  # characters: a decoder may print a page


@dataclass(frozen=True, kw_only=True)
class ReadRequest:
    """A file to take frames of. num_segments: parts of equal time that get frames of their own besides the whole.

    Refused for a number of them that is not 1 to 64.
    """

    path: str
    clip: ClipConfig
    limits: Limits
    num_segments: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.num_segments <= MAX_SEGMENTS:
            raise Refused(f"A clip is captioned in 1 to {MAX_SEGMENTS} parts; {self.num_segments} were asked for.")


@dataclass(frozen=True, kw_only=True)
class DisplayRequest:
    """A file to make a video of that every browser plays, and the path of that video, which ends in .mp4."""

    path: str
    out: str
    limits: Limits


def warm_up() -> None:
    """Imports what reading takes and tries the decoders, so that no clip pays for it in time or memory."""
    torch.set_num_threads(1)  # the processes are the parallelism
    for backend in BACKENDS:
        prove(backend)
    read = read_clip(ReadRequest(path=str(CLIP), clip=ClipConfig(num_frames=2, image_size=32), limits=Limits()))
    assert isinstance(read, ReadClip), read


def work(request: ReadRequest | DisplayRequest) -> ReadClip | str | None:
    """`read_clip` or `make_display`, by the kind of the request: one pool of processes serves both."""
    match request:
        case ReadRequest():
            return read_clip(request)
        case DisplayRequest():
            return make_display(request)


def read_clip(request: ReadRequest) -> ReadClip | str:
    """The frames that a model sees, or why there are none, in a sentence that names neither path nor host.

    With one segment exactly those of `data.video.load_clip`. With more, first those, then of each part in turn as many
    frames, uniformly over it.
    """
    return _or_sentence(lambda: _read(request), path=request.path)


def make_display(request: DisplayRequest) -> str | None:
    """Writes request.out, an H.264 MP4 that stands upright, of 480 pixels at most on the shorter side, without sound.

    None, or why there is none, in a sentence. The file appears when it is whole; of a process that is ended midway
    `discard_display` removes the rest.
    """
    return _or_sentence(lambda: _make_display(request), path=request.path)


def discard_display(out: Path) -> None:
    """Removes a file of `make_display`, and what a process left of it that was ended midway."""
    with contextlib.suppress(OSError):  # whoever asked for it may remove the folder meanwhile
        out.unlink(missing_ok=True)
        for half in out.parent.glob(f"{PARTIAL_PREFIX}*-{out.name}"):
            half.unlink(missing_ok=True)


def _or_sentence(function: Callable[[], Answer], *, path: str) -> Answer | str:
    try:
        return function()
    except Refused as refused:
        return str(refused)
    except (UnreadableVideo, OSError) as error:
        if is_out_of_memory(error):  # FFmpeg was refused memory and let go of it all: the process is as good as before
            return "The clip cannot be read: it takes more memory than is allowed here, or it is damaged."
        cause = (error.strerror or "it cannot be opened") if isinstance(error, OSError) else str(error)
        return f"The clip cannot be read: {_without_path(cause, path=path)}."


def _without_path(cause: str, *, path: str) -> str:
    """The cause alone, on one line: where the file lies is nobody's business."""
    shown = Path(path)
    cause = cause.removeprefix(f"{shown}: ")
    for name in sorted({str(shown), str(shown.absolute()), str(shown.resolve())}, key=len, reverse=True):
        cause = cause.replace(name, "the file")
    line = " ".join(cause.split()).rstrip(".")
    return line if len(line) <= _LONGEST_CAUSE else f"{line[:_LONGEST_CAUSE]} ..."


def _read(request: ReadRequest) -> ReadClip:
    started = time.monotonic()
    path = Path(request.path)  # never a string: an uploaded name like a URL must not be fetched
    header = _checked_header(path, limits=request.limits)
    with open_video(path, backend=request.clip.decoder) as reader:
        _check_exact(reader, limits=request.limits)
        segments = _segments(reader.duration_seconds, num_segments=request.num_segments)
        clips = [clip_of(VideoWindow(reader, 0, reader.num_frames), config=request.clip)]
        uniform = replace(request.clip, sampling="uniform", stride=None, clip_seconds=None)
        clips += [clip_of(_window(reader, segment=segment), config=uniform) for segment in segments[1:]]
        return ReadClip(
            frames=torch.stack([frames for frames, _ in clips]),
            times_seconds=np.stack([times for _, times in clips]),
            segments=segments,
            duration_seconds=reader.duration_seconds,
            height=reader.height,
            width=reader.width,
            box=square_crop_box(reader.height, reader.width),
            plays_in_browser=header.plays_in_browser,
            decode_seconds=time.monotonic() - started,
        )


def _segments(duration_seconds: float, *, num_segments: int) -> tuple[tuple[float, float], ...]:
    """Start and end of the whole, and of its equal parts where they are several."""
    whole = (0.0, duration_seconds)
    if num_segments == 1:
        return (whole,)
    bounds = [duration_seconds * bound / num_segments for bound in range(num_segments)] + [duration_seconds]
    return (whole, *pairwise(bounds))


def _window(reader: VideoReader, *, segment: tuple[float, float]) -> VideoWindow:
    """The frames on the screen during a segment. The last frame stays there until the video ends."""
    start, end = segment
    last_time = float(reader.times_seconds[-1])
    first, last = frame_window(reader.times_seconds, start_seconds=min(start, last_time), end_seconds=end)
    return VideoWindow(reader, first, last)


def _checked_header(path: Path, *, limits: Limits) -> VideoHeader:
    """Refused for what is too much by its size, its header or its packets: nothing is decoded for it."""
    if not path.is_file():
        raise Refused("The clip cannot be read: there is no such file.")
    megabytes = path.stat().st_size / 1e6
    if megabytes > limits.max_megabytes:
        raise _too_much(
            f"is {_rounded(megabytes)} MB", most=f"{limits.max_megabytes:g} MB", remedy="cut it, or make it smaller"
        )
    header = read_header(path)
    _check_seconds(header.duration_seconds or 0.0, limits=limits)
    _check_side(header.height, header.width, limits=limits)
    if (header.num_frames or 0) > limits.max_frames:
        raise _too_many_frames(str(header.num_frames), limits=limits)
    found = count_packets(path, at_most=limits.max_frames + 1)
    if found.num_packets > limits.max_frames:
        raise _too_many_frames(f"more than {limits.max_frames}", limits=limits)
    _check_seconds(found.span_seconds, limits=limits)
    return header


def _check_exact(reader: VideoReader, *, limits: Limits) -> None:
    """The same of what decodes, whatever the header says."""
    _check_seconds(reader.duration_seconds, limits=limits)
    _check_side(reader.height, reader.width, limits=limits)
    if reader.num_frames > limits.max_frames:
        raise _too_many_frames(str(reader.num_frames), limits=limits)


def _check_seconds(seconds: float, *, limits: Limits) -> None:
    if seconds > limits.max_seconds:
        raise _too_much(f"is {_rounded(seconds)} s long", most=f"{limits.max_seconds:g} s", remedy="cut it")


def _check_side(height: int, width: int, *, limits: Limits) -> None:
    if max(height, width) > limits.max_side:
        raise _too_much(
            f"is {width} x {height} pixels",
            most=f"{limits.max_side} pixels on the longer side",
            remedy="scale it down",
        )


def _too_many_frames(count: str, *, limits: Limits) -> Refused:
    return _too_much(f"has {count} frames", most=f"{limits.max_frames}", remedy="cut it, or lower its frame rate")


def _too_much(found: str, *, most: str, remedy: str) -> Refused:
    return Refused(f"The clip {found}; this demo takes up to {most}: {remedy}.")


def _rounded(number: float) -> str:
    """To one decimal upwards, so that what is too much never looks like the limit."""
    return f"{math.ceil(10 * number) / 10:g}" if number < 1e5 else f"{number:.0f}"


def _make_display(request: DisplayRequest) -> None:
    path, out = Path(request.path), Path(request.out)
    _checked_header(path, limits=request.limits)
    if is_picture(path):
        _make_picture_display(path, out=out)
    else:
        transcode_video(path, out=out, config=DISPLAY)


def _make_picture_display(path: Path, *, out: Path) -> None:
    """A video of the one picture, which lasts a second."""
    with open_video(path) as reader:
        size = DISPLAY.size(height=reader.height, width=reader.width)
        frame = F.resize(reader.frames([0]), list(size), antialias=True)
        write_video(out, frames=frame, frames_per_second=1.0)
