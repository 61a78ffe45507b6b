"""PyAV: the reference. It reads whatever FFmpeg reads, wherever PyAV's wheel installs, in order or by seeking."""

import bisect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.demux import clock, decode_stream, open_stream
from coca_video.data.decode.index import PacketIndex
from coca_video.data.decode.reader import VideoReader, timeline
from coca_video.data.decode.source import Source, UnreadableVideo

if TYPE_CHECKING:
    import av

KEPT_BYTES = 256 * 2**20  # decoded frames kept by a reader: 65 s of 340x256, 2.7 s of 1920x1080


class PyAVReader(VideoReader):
    """The best video stream, each frame turned by its rotation.

    Where the packets tell the frames, a frame is found by its presentation time: seek to the last clean key frame
    before it, decode on until it comes. Elsewhere the file is decoded once from its start, so that frame numbers and
    times are what really decodes; the first `kept_bytes` of frames then stay in memory in the codec's own pixel format
    (half the size of RGB), and a frame beyond them costs a second decode from the start: slow and exact.
    """

    backend = "pyav"

    def __init__(self, source: Source, *, index: PacketIndex, kept_bytes: int = KEPT_BYTES) -> None:
        from av.video.reformatter import VideoReformatter

        self.name, self._source, self._kept_bytes = source.name, source, kept_bytes
        self._stamp = source.stamp()
        self._converter = VideoReformatter()
        self._kept: list[av.VideoFrame] = []
        self._index: PacketIndex | None = None
        if index.uncountable is None and self._begins_as(index):
            self._index = index
            self._set_timeline(index.timeline)
        else:
            self._decode_all()

    def _begins_as(self, index: PacketIndex) -> bool:
        """Whether the first two frames decoded are the first two of the index: fields of a frame may be two packets."""
        with open_stream(self._source) as (container, stream):
            frames = decode_stream(self._source, container=container, stream=stream)
            for number, frame in enumerate(itertools.islice(frames, 2)):
                if number == 0:
                    self._set_size(frame)
                if frame.pts != index.pts[min(number, len(index.pts) - 1)]:
                    return False
        return True

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
        out = np.empty((len(indices), 3, self.height, self.width), dtype=np.uint8)
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
            out[places[index]] = self._rgb(frame).transpose(2, 0, 1)
        return torch.from_numpy(out)

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
        """(number, frame) for each number wanted, rising, by their presentation times.

        Where a seek lands elsewhere than the index says, or a frame does not come, the file is walked from its start.
        """
        import av

        num_found = 0
        with open_stream(self._source) as (container, stream):
            start, frames = 0, decode_stream(self._source, container=container, stream=stream)
            for number in wanted:
                pts = index.pts[number]
                best = bisect.bisect_right(index.clean_pts, pts) - 1
                if best > start:
                    try:
                        container.seek(index.clean_pts[best], stream=stream)
                    except av.error.FFmpegError:  # a damaged file: the walk below gives the cause
                        break
                    decoded = decode_stream(self._source, container=container, stream=stream)
                    start, frames = best, _if_clean(decoded, index=index)
                frame = next((frame for frame in frames if frame.pts is None or frame.pts >= pts), None)
                if frame is None or frame.pts != pts:
                    break
                yield number, frame
                num_found += 1
        if num_found < len(wanted):
            yield from self._walk(set(wanted[num_found:]))

    def _let_go(self) -> None:
        self._kept = []


def _if_clean(frames: Iterator["av.VideoFrame"], *, index: PacketIndex) -> Iterator["av.VideoFrame"]:
    """The frames decoded after a seek, or none if it did not land on a clean key frame."""
    first = next(frames, None)
    if first is None or first.pts is None:
        return
    if index.clean_pts[bisect.bisect_right(index.clean_pts, first.pts) - 1] == first.pts:
        yield first
        yield from frames
