"""One reader interface over video decoders, exact to the frame, and a writer of H.264 files.

The reference is the sequential decode of the best video stream by PyAV, each frame turned by its rotation: what any
other backend returns must equal it, else the backend refuses the file in a sentence. This file alone imports av and
decord, and only when a video is opened.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor

if TYPE_CHECKING:
    import av

    VideoPacket = av.Packet[av.VideoStream]
else:
    VideoPacket = Any  # av's classes take no type parameters when they run

Backend = Literal["auto", "pyav", "decord"]

KEPT_BYTES = 256 * 2**20  # decoded frames kept by a reader: 65 s of 340x256, 2.7 s of 1920x1080
# A text file is a video to FFmpeg's "tty" demuxer, and a playlist opens other files and URLs: only real containers.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,gif,mjpeg,h264,hevc,ivf,3gp,mxf,dv,nut,rm,wtv"
# decord 0.6 returns wrong frames on random access to AVI, FLV, TS and PS; VP8 and VP9 can change their size midway.
DECORD_CONTAINERS = {"mov", "matroska"}
DECORD_CODECS = {"h264", "hevc", "mpeg4"}
WRITABLE_SUFFIXES = (".mp4", ".mkv", ".mov")


class UnreadableVideo(ValueError):
    """A file that cannot be read, or not exactly; the message is "<path>: <cause>"."""


class VideoReader(ABC):
    """Frames of one video by number; a context manager.

    times_seconds: when each frame is first shown, rising, the first at 0. height, width: pixels after rotation.
    frames_per_second is num_frames / duration_seconds, the mean rate where it varies.
    """

    path: Path
    num_frames: int
    frames_per_second: float
    duration_seconds: float
    height: int
    width: int
    times_seconds: Float64[np.ndarray, "num_frames"]

    @abstractmethod
    def frames(self, indices: Sequence[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames of these numbers, in any order, repeats allowed; ValueError for a number out of range."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the file and of the frames kept."""

    def __enter__(self) -> "VideoReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_timeline(self, timeline: "_Timeline") -> None:
        self.times_seconds = timeline.times_seconds
        self.num_frames = len(timeline.times_seconds)
        self.duration_seconds = timeline.duration_seconds
        self.frames_per_second = self.num_frames / self.duration_seconds

    def _check(self, indices: Sequence[int]) -> None:
        for index in indices:
            if not 0 <= index < self.num_frames:
                last = self.num_frames - 1
                raise ValueError(f"{self.path}: frame {index} was asked for, but the video has frames 0 to {last}")


def open_video(path: Path, *, backend: Backend = "auto") -> VideoReader:
    """A reader of the video file `path`; `auto` is PyAV, the reference.

    UnreadableVideo for a file that is missing, empty, no video, cut off or damaged, or that this backend would not read
    exactly; ValueError where the backend is not installed.
    """
    match backend:
        case "auto" | "pyav":
            return PyAVReader(path)
        case "decord":
            return DecordReader(path)


class PyAVReader(VideoReader):
    """The reference: decodes the file once from its start, so that frame numbers and times are what really decodes.

    The first `kept_bytes` of decoded frames stay in memory in the codec's own pixel format (half the size of RGB). A
    frame beyond them costs a second decode from the start: slow and exact, where a seek is quick and not.
    """

    def __init__(self, path: Path, *, kept_bytes: int = KEPT_BYTES) -> None:
        from av.video.reformatter import VideoReformatter

        self.path = path
        self._converter = VideoReformatter()
        self._kept: list[av.VideoFrame] = []
        pts, last_duration = list[int | None](), 0
        with _open_stream(path) as (container, stream):
            clock = _clock(stream)
            for frame in _decode(path, container=container, stream=stream):
                if not pts:
                    self._size = (frame.width, frame.height)
                    self.height, self.width = self._rgb(frame).shape[:2]
                size = sum(plane.buffer_size for plane in frame.planes)
                if size <= kept_bytes and len(self._kept) == len(pts):
                    kept_bytes -= size
                    self._kept.append(frame)
                pts.append(frame.pts)
                last_duration = frame.duration
        if not pts:
            raise UnreadableVideo(f"{path}: its video stream holds no frame that decodes")
        self._set_timeline(_timeline(pts, clock=clock, last_duration=last_duration))

    def frames(self, indices: Sequence[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames of these numbers, in any order, repeats allowed; ValueError for a number out of range."""
        self._check(indices)
        out = np.empty((len(indices), 3, self.height, self.width), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            places.setdefault(int(index), []).append(place)
        for index, frame in self._walk(set(places)):
            out[places[index]] = self._rgb(frame).transpose(2, 0, 1)
        return torch.from_numpy(out)

    def _rgb(self, frame: "av.VideoFrame") -> UInt8[np.ndarray, "height width 3"]:
        """RGB pixels as shown: rotated, and of the first frame's size where a stream changes it midway."""
        quarter_turns = round(frame.rotation / 90)  # round: the angle comes from a matrix and is cut to a whole number
        if abs(frame.rotation - 90 * quarter_turns) > 1:
            raise UnreadableVideo(
                f"{self.path}: it is to be rotated by {frame.rotation} degrees; expected quarter turns"
            )
        width, height = self._size
        # One converter for all frames, in this thread: frame.to_ndarray sets up another each time (1.4 ms, not 0.03).
        shown = self._converter.reformat(frame, format="rgb24", width=width, height=height, threads=1)
        return np.rot90(shown.to_ndarray(), k=quarter_turns)

    def _walk(self, wanted: set[int]) -> Iterator[tuple[int, "av.VideoFrame"]]:
        """(number, frame) for each number wanted, from the frames kept, else by decoding again."""
        if not wanted or max(wanted) < len(self._kept):
            yield from ((index, self._kept[index]) for index in wanted)
            return
        with _open_stream(self.path) as (container, stream):
            for index, frame in enumerate(_decode(self.path, container=container, stream=stream)):
                if index in wanted:
                    yield index, frame
                if index == max(wanted):
                    return
        raise UnreadableVideo(f"{self.path}: it decodes to fewer frames than when it was opened: did the file change?")

    def close(self) -> None:
        """Lets go of the frames kept."""
        self._kept = []


class DecordReader(VideoReader):
    """decord, on the files that it reads exactly; it refuses the others by what PyAV's demuxer says of them.

    decord finds a frame by counting on from the key frame before it, over a table of packets. That is wrong without a
    word where pictures shown before a key frame are coded after it (open groups of pictures, the rule in HEVC), where
    an edit list hides packets, and in containers without exact times; and it converts 10-bit pixels otherwise.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        timeline = _decord_timeline(path)
        decord = _import_decord()
        self._error: type[Exception] = decord.DECORDError
        try:
            # One thread: a data loader's workers are the parallelism, and decord's own threads have hung (decord#220).
            self._reader: Any = decord.VideoReader(str(path), num_threads=1)
            if (found := len(self._reader)) != (true := len(timeline.times_seconds)):
                raise UnreadableVideo(f"{path}: decord finds {found} frames where there are {true}; {_USE_AUTO}")
            # get_batch, since that is what fails: on frames turned to a width that is not a multiple of 64.
            _, self.height, self.width, _ = self._reader.get_batch([0]).shape
        except self._error as error:
            raise UnreadableVideo(f"{path}: decord cannot decode it ({_short(error)}); {_USE_AUTO}") from error
        self._set_timeline(timeline)

    def frames(self, indices: Sequence[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames of these numbers, in any order, repeats allowed; ValueError for a number out of range."""
        self._check(indices)
        if len(indices) == 0:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        try:
            rgb = self._reader.get_batch([int(index) for index in indices]).asnumpy()
        except self._error as error:
            raise UnreadableVideo(f"{self.path}: decord stops ({_short(error)}); {_USE_AUTO}") from error
        return torch.from_numpy(np.ascontiguousarray(rgb.transpose(0, 3, 1, 2)))

    def close(self) -> None:
        """Lets go of the file."""
        self._reader = None


def write_video(
    path: Path, *, frames: UInt8[Tensor, "frames 3 height width"], frames_per_second: float, crf: int = 18
) -> None:
    """Writes frames (RGB, even height and width) as H.264, yuv420p; the same frames give the same bytes.

    crf is x264's quality: 0 loses least, 51 most. The suffix gives the container: .mp4, .mkv or .mov. The file appears
    under its name only when it is whole.
    """
    import av

    height, width = frames.shape[2:]
    if frames.numel() == 0 or height % 2 or width % 2:
        raise ValueError(f"{path}: expected at least one frame of even height and width, got {tuple(frames.shape)}")
    if path.suffix.lower() not in WRITABLE_SUFFIXES:
        raise ValueError(f"{path}: expected a name that ends in {', '.join(WRITABLE_SUFFIXES)}, got {path.suffix!r}")
    if not 0 < frames_per_second < float("inf"):
        raise ValueError(f"{path}: expected frames_per_second above 0, got {frames_per_second}")
    rate = Fraction(frames_per_second).limit_denominator(1001)  # 1001: so that 29.97... is NTSC's 30000/1001
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    # x264's macroblock tree (with its SIMD code) reads memory that it never wrote: 1 file in 10 to 200 came out other.
    encoder_options = {"crf": str(crf), "x264-params": "mbtree=0"}
    with av.open(str(partial), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=encoder_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes of x264 depend on the number of threads
        for pixels in frames.permute(0, 2, 3, 1).cpu().contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)


_USE_AUTO = 'use the decoder "auto" or "pyav"'


class _Timeline(NamedTuple):
    times_seconds: Float64[np.ndarray, "num_frames"]
    duration_seconds: float


class _Clock(NamedTuple):
    unit: Fraction  # seconds
    rate: Fraction  # frames per second by the header


def _timeline(pts: Sequence[int | None], *, clock: _Clock, last_duration: int) -> _Timeline:
    """Presentation times from the first frame on, in seconds.

    AVI has no presentation times: FFmpeg gives a frame those of another, and sorted they are right. Times that are
    missing or not distinct are replaced by a constant rate.
    """
    known = sorted(time for time in pts if time is not None)
    last = last_duration * clock.unit if last_duration > 0 else 1 / clock.rate
    if len(set(known)) == len(pts):
        times = [(time - known[0]) * clock.unit for time in known]
    else:
        times = [index / clock.rate for index in range(len(pts))]
    # Exact fractions up to here: frame 30 at 1/15360 s units must lie at 1.0 and not just before it.
    return _Timeline(np.array([float(time) for time in times], dtype=np.float64), float(times[-1] + last))


def _clock(stream: "av.VideoStream") -> _Clock:
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)  # 25: FFmpeg's own where nothing is said
    return _Clock(unit=Fraction(stream.time_base or 1 / rate), rate=rate)


@contextmanager
def _open_stream(path: Path) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """The container and its best video stream, single-threaded; UnreadableVideo where there is none."""
    import av

    if not path.is_file():
        raise UnreadableVideo(f"{path}: there is no such file")
    if path.stat().st_size == 0:
        raise UnreadableVideo(f"{path}: the file is empty (0 bytes)")
    options = {"format_whitelist": CONTAINERS, "protocol_whitelist": "file"}
    try:
        # metadata_errors: titles of old AVI files are not UTF-8, and nobody reads them here.
        container = av.open(str(path), "r", options=options, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        raise UnreadableVideo(f"{path}: not a video file, or one cut off or damaged ({error.strerror})") from error
    with container:
        # best: the first of several streams is often a thumbnail or a lower resolution.
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise UnreadableVideo(f"{path}: the file has no video stream")
        if stream.codec_context is None:
            raise UnreadableVideo(f"{path}: there is no decoder for its video stream")
        stream.codec_context.thread_count = 1  # a data loader's workers are the parallelism
        yield container, stream


def _packets(
    path: Path, *, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator[VideoPacket]:
    """The stream's packets in the file's order, then an empty one; UnreadableVideo where the file is cut off."""
    needed, size = _bytes_needed(path, container=container, stream=stream), path.stat().st_size
    if needed > size:
        raise UnreadableVideo(f"{path}: the file is cut off: it should have at least {needed} bytes, it has {size}")
    for packet in container.demux(stream):
        if packet.is_corrupt:
            raise UnreadableVideo(f"{path}: the file is cut off or damaged: a packet of its video stream is not whole")
        yield packet


def _bytes_needed(path: Path, *, container: "av.container.InputContainer", stream: "av.VideoStream") -> int:
    """How long the file must be by its own header (0: unknown): FFmpeg may decode a part of it without an error."""
    containers = container.format.name.split(",")
    if "mov" in containers:
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    with path.open("rb") as file:
        head = file.read(2**16)
    if "avi" in containers and (at := head.find(b"movi")) >= 4:  # the list of all packets, its size before its name
        return at + int.from_bytes(head[at - 4 : at], "little")
    if "matroska" in containers and (at := head.find(b"\x18\x53\x80\x67") + 4) >= 4:  # Segment: all but the EBML header
        length = 9 - head[at].bit_length()  # RFC 8794: the leading zeros of its first byte tell the number's length
        whole = 1 << 7 * length
        segment = int.from_bytes(head[at : at + length], "big") % whole
        return 0 if segment == whole - 1 else at + length + segment  # all ones: a live recording, size unknown
    return 0


def _decode(
    path: Path, *, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator["av.VideoFrame"]:
    """All frames in the order they are shown; UnreadableVideo at the decoder's first error.

    Damage that the codec itself patches over (H.264 conceals a lost slice) is no error, here as in a player.
    """
    import av

    num_frames = 0
    try:
        for packet in _packets(path, container=container, stream=stream):
            for frame in stream.decode(packet):
                yield frame
                num_frames += 1
    except av.error.FFmpegError as error:
        cause = f"decoding stops after {num_frames} frames ({error.strerror})"
        raise UnreadableVideo(f"{path}: the file is damaged: {cause}") from error


def _decord_timeline(path: Path) -> _Timeline:
    """The timeline by demuxing alone (no decoding); UnreadableVideo if decord would not read the file exactly."""
    with _open_stream(path) as (container, stream):
        context, name = stream.codec_context, container.format.name
        codec = context.codec.canonical_name
        if DECORD_CONTAINERS.isdisjoint(name.split(",")) or codec not in DECORD_CODECS:
            known = f"{'/'.join(sorted(DECORD_CODECS))} in MP4, MOV or MKV"
            raise UnreadableVideo(f"{path}: decord reads {known} exactly, and this is {codec} in {name}; {_USE_AUTO}")
        if context.format is None or any(component.bits != 8 for component in context.format.components):
            raise UnreadableVideo(f"{path}: decord converts only 8-bit pixels rightly; {_USE_AUTO}")
        packets = [packet for packet in _packets(path, container=container, stream=stream) if packet.size > 0]
        clock = _clock(stream)
    if not packets:
        raise UnreadableVideo(f"{path}: its video stream holds no frame")
    cause = _decord_misreads(packets)
    if cause is not None:
        raise UnreadableVideo(f"{path}: decord would return wrong frames: {cause}; {_USE_AUTO}")
    pts = [packet.pts for packet in packets]
    last = max(packets, key=lambda packet: packet.pts or 0)
    return _timeline(pts, clock=clock, last_duration=last.duration or 0)


def _decord_misreads(packets: Sequence[VideoPacket]) -> str | None:
    """Why decord would misread a stream of these packets (in coding order), or None."""
    if not packets[0].is_keyframe:
        return "the stream does not begin with a key frame"
    if any(packet.is_discard for packet in packets):
        return "an edit list hides some of its packets"
    key_pts, seen = 0, set()
    for packet in packets:
        if packet.pts is None or packet.pts in seen:
            return "its packets have no distinct presentation times"
        seen.add(packet.pts)
        if packet.is_keyframe:
            key_pts = packet.pts
        elif packet.pts < key_pts:
            return "it has open groups of pictures, whose first pictures are shown before their key frame"
    return None


def _import_decord() -> Any:
    try:
        import decord
    except ImportError as error:
        raise ValueError(f"decord cannot be imported ({error}): pip install decord, or {_USE_AUTO}") from error
    return decord


def _short(error: Exception) -> str:
    """What decord says, without its source position and stack trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rsplit(": ", 1)[-1]
