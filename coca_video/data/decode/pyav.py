"""PyAV: the reference. It reads whatever FFmpeg reads, wherever PyAV's wheel installs, in order or by seeking."""

import bisect
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.demux import clock, decode_stream, decode_wanted, open_stream
from coca_video.data.decode.index import PacketIndex
from coca_video.data.decode.reader import VideoReader, timeline
from coca_video.data.decode.source import Source, UnreadableVideo

if TYPE_CHECKING:
    import av

FROM_FILE_START = -1  # in place of a key frame to seek to
KEPT_BYTES = 256 * 2**20  # decoded frames kept by a reader: 65 s of 340x256, 2.7 s of 1920x1080


class _Opened(NamedTuple):
    """A container that is open in this process and no other: forked ones share its place in the file."""

    process_id: int
    container: "av.container.InputContainer"
    stream: "av.VideoStream"
    closing: ExitStack


class PyAVReader(VideoReader):
    """The best video stream, each frame turned by its rotation.

    Where the packets tell the frames, a frame is found by its presentation time: seek to the last clean key frame
    before it, decode on up to its packet, without the pictures that nothing needs. Elsewhere the file is decoded once
    from its start, so that frame numbers and times are what really decodes; the first `kept_bytes` of frames then stay
    in memory in the codec's own pixel format (half the size of RGB), and a frame beyond them costs a second decode from
    the start: slow and exact. Until frames are asked for, an opened file may stay open.
    """

    backend = "pyav"

    def __init__(self, source: Source, *, index: PacketIndex, kept_bytes: int = KEPT_BYTES) -> None:
        from av.video.reformatter import VideoReformatter

        self.name, self._source, self._kept_bytes = source.name, source, kept_bytes
        self._stamp = source.stamp()
        self._converter = VideoReformatter()
        self._kept: list[av.VideoFrame] = []
        self._index: PacketIndex | None = None
        self._opened: _Opened | None = None
        if index.uncountable is None and self._begins_as(index):
            self._index = index
            self._set_timeline(index.timeline)
        else:
            self._decode_all()

    def _begins_as(self, index: PacketIndex) -> bool:
        """Whether the first two frames decoded are the first two of the index: fields of a frame may be two packets.

        The container stays open for the first frames asked for: to open another takes 1.3 ms, 2% of reading 16 frames.
        """
        first_pts = list(index.pts[:2])
        with ExitStack() as stack:
            container, stream = stack.enter_context(open_stream(self._source))
            found = decode_wanted(
                self._source, container=container, stream=stream, wanted_pts=set(first_pts), can_skip=False
            )
            frames = list(itertools.islice(found, 2))
            if [frame.pts for frame in frames] != first_pts:
                return False
            self._set_size(frames[0])
            if index.clean_pts[:1] == index.pts[:1]:
                self._opened = _Opened(os.getpid(), container, stream, stack.pop_all())
        return True

    @contextmanager
    def _open(self) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
        """The container left open, once, else a new one."""
        opened, self._opened = self._opened, None
        if opened is not None and opened.process_id == os.getpid():
            with opened.closing:
                yield opened.container, opened.stream
        else:
            with open_stream(self._source) as (container, stream):
                yield container, stream

    def _set_size(self, frame: "av.VideoFrame") -> None:
        self._size = (frame.width, frame.height)
        self.height, self.width = self._rgb(frame).shape[:2]

    def _decode_all(self) -> None:
        pts, last_duration, free_bytes = list[int | None](), 0, self._kept_bytes
        with open_stream(self._source) as (container, stream):
            stream_clock = clock(stream)
            for frame in decode_stream(self._source, container=container, stream=stream):
                if not pts:
                    self._set_size(frame)
                size = sum(plane.buffer_size for plane in frame.planes)
                if size <= free_bytes and len(self._kept) == len(pts):
                    free_bytes -= size
                    self._kept.append(frame)
                pts.append(frame.pts)
                last_duration = frame.duration
        if not pts:
            raise UnreadableVideo(f"{self.name}: its video stream holds no frame that decodes")
        self._set_timeline(timeline(pts, clock=stream_clock, last_duration=last_duration))

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        if self._source.stamp() != self._stamp:
            raise UnreadableVideo(f"{self.name}: the file changed while it was read")
        # Colours last in memory, as they come: nothing is turned.
        out = np.empty((len(indices), self.height, self.width, 3), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(index, []).append(place)
        wanted = sorted(places)
        if self._index is not None:
            found = self._seek(wanted, index=self._index)
        elif wanted[-1] < len(self._kept):
            found = ((index, self._kept[index]) for index in wanted)
        else:
            found = self._walk(set(wanted))
        for index, frame in found:
            out[places[index]] = self._rgb(frame)
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def _rgb(self, frame: "av.VideoFrame") -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels as shown: rotated, and of the first frame's size where a stream changes it midway."""
        quarter_turns = round(frame.rotation / 90)  # round: the angle comes from a matrix and is cut to a whole number
        if abs(frame.rotation - 90 * quarter_turns) > 1:
            raise UnreadableVideo(
                f"{self.name}: it is to be rotated by {frame.rotation} degrees; expected quarter turns"
            )
        width, height = self._size
        # One converter for all frames, in this thread: frame.to_ndarray sets up another each time (1.4 ms, not 0.03).
        shown = self._converter.reformat(frame, format="rgb24", width=width, height=height, threads=1)
        return np.rot90(shown.to_ndarray(), k=quarter_turns)

    def _walk(self, wanted: set[int]) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """(number, frame) for each number wanted, by decoding from the start."""
        last = max(wanted)
        with open_stream(self._source) as (container, stream):
            for index, frame in enumerate(decode_stream(self._source, container=container, stream=stream)):
                if index in wanted:
                    yield index, frame
                if index == last:
                    return
        raise UnreadableVideo(f"{self.name}: it decodes to fewer frames than when it was opened: did the file change?")

    def _seek(self, wanted: list[int], *, index: PacketIndex) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """(number, frame) for each number wanted, by their presentation times, one clean key frame after the other.

        Where a seek lands elsewhere than the index says, or a frame does not come, the file is walked from its start.
        """
        import av

        left = {index.pts[number]: number for number in wanted}
        with self._open() as (container, stream):
            for start, group in itertools.groupby(sorted(left), key=lambda pts: _start(pts, index=index)):
                if start != FROM_FILE_START:
                    try:
                        container.seek(index.clean_pts[start], stream=stream)
                    except av.error.FFmpegError:  # a damaged file: the walk below gives the cause
                        break
                times = set(group)
                frames = decode_wanted(
                    self._source, container=container, stream=stream, wanted_pts=times, can_skip=index.can_skip
                )
                if start != FROM_FILE_START:
                    frames = _from_key_frame(frames, pts=index.clean_pts[start])
                for frame in frames:
                    if frame.pts in times and frame.pts in left:
                        yield left.pop(frame.pts), frame
                if not times.isdisjoint(left):
                    break
        if left:
            yield from self._walk(set(left.values()))

    def _let_go(self) -> None:
        self._kept, opened, self._opened = [], self._opened, None
        if opened is not None:
            opened.closing.close()


def _start(pts: int, *, index: PacketIndex) -> int:
    """The clean key frame to decode from for this frame, by its place among them, or FROM_FILE_START."""
    return bisect.bisect_right(index.clean_pts, pts) - 1


def _from_key_frame(frames: Iterator["av.VideoFrame"], *, pts: int) -> Iterator["av.VideoFrame"]:
    """The frames from the clean key frame shown at this time on; none where a seek landed behind it."""
    rest = itertools.dropwhile(lambda frame: frame.pts is not None and frame.pts < pts, frames)
    for first in itertools.islice(rest, 1):
        if first.pts == pts:
            yield first
            yield from rest
