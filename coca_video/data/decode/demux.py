"""PyAV's containers, opened so that only videos pass for videos: packets, and frames decoded in order."""

import re
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from coca_video.data.decode.reader import Clock
from coca_video.data.decode.source import Source, UnreadableVideo

if TYPE_CHECKING:
    import av

    VideoPacket = av.Packet[av.VideoStream]
else:
    VideoPacket = Any  # av's classes take no type parameters when they run

# A text file is a video to FFmpeg's "tty" demuxer, and a playlist opens other files and URLs: only real containers.
CONTAINERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,mpegvideo,asf,flv,ogg,gif,mjpeg,h264,hevc,ivf,3gp,mxf,dv,nut,rm,wtv"


def clock(stream: "av.VideoStream") -> Clock:
    """The stream's time unit and nominal rate."""
    rate = Fraction(stream.average_rate or stream.guessed_rate or 25)  # 25: FFmpeg's own where nothing is said
    return Clock(unit_seconds=Fraction(stream.time_base or 1 / rate), frames_per_second=rate)


def header_seconds(container: "av.container.InputContainer", stream: "av.VideoStream") -> float | None:
    """How long the stream lasts by its header, else the whole file; None where neither is told."""
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / 1_000_000  # AV_TIME_BASE


@contextmanager
def open_stream(
    source: Source, *, max_probed_pixels: int | None = None
) -> Iterator[tuple["av.container.InputContainer", "av.VideoStream"]]:
    """The container and its best video stream, single-threaded; UnreadableVideo where there is none.

    FFmpeg decodes the first pictures of some streams to find out what they are; max_probed_pixels: none of more pixels.
    """
    import av

    options = {"format_whitelist": CONTAINERS}
    if max_probed_pixels is not None:
        options["max_pixels"] = str(max_probed_pixels)
    if isinstance(source.data, bytes):
        opened: Any = source.open()
    else:
        opened, options["protocol_whitelist"] = source.open(), "file"
    try:
        # metadata_errors: titles of old AVI files are not UTF-8, and nobody reads them here.
        container = av.open(opened, "r", options=options, metadata_errors="ignore")
    except av.error.FFmpegError as error:
        cause = f"not a video file, or one cut off or damaged ({error.strerror})"
        raise UnreadableVideo(f"{source.name}: {cause}") from error
    with container:
        # best: the first of several streams is often a thumbnail or a lower resolution.
        stream = container.streams.best("video")
        if not isinstance(stream, av.VideoStream):
            raise UnreadableVideo(f"{source.name}: the file has no video stream")
        if stream.codec_context is None:
            raise UnreadableVideo(f"{source.name}: there is no decoder for its video stream")
        stream.codec_context.thread_count = 1  # a data loader's workers are the parallelism
        yield container, stream


def read_packets(
    source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator[VideoPacket]:
    """The stream's packets from where it stands, then an empty one; UnreadableVideo where one is cut off."""
    # FFmpeg calls whole packets corrupt where parts of a transport stream were joined; there, only a last one is cut.
    only_last, suspect = container.format.name == "mpegts", False
    for packet in demux(source, container=container, stream=stream):
        suspect = packet.is_corrupt or (suspect and packet.size == 0)
        if suspect and (packet.size == 0 or not only_last):
            cause = "the file is cut off or damaged: a packet of its video stream is not whole"
            raise UnreadableVideo(f"{source.name}: {cause}")
        yield packet


def demux(
    source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator[VideoPacket]:
    """The stream's packets as PyAV gives them; UnreadableVideo where the container cannot be read on."""
    import av

    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except IndexError as error:  # PyAV's own list of streams is that of the header
            cause = "the file is damaged: a stream begins midway that its header does not name"
            raise UnreadableVideo(f"{source.name}: {cause}") from error
        except av.error.FFmpegError as error:
            raise UnreadableVideo(f"{source.name}: the file is damaged: reading stops ({error.strerror})") from error
        yield packet


def check_length(source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream") -> None:
    """UnreadableVideo where the file is shorter than its header says."""
    needed, size = _bytes_needed(source, container=container, stream=stream), source.num_bytes()
    if needed > size:
        cause = f"the file is cut off: it should have at least {needed} bytes, it has {size}"
        raise UnreadableVideo(f"{source.name}: {cause}")


def _bytes_needed(source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream") -> int:
    """How long the file must be by its own header (0: unknown): FFmpeg may decode a part of it without an error."""
    containers = container.format.name.split(",")
    if "mov" in containers:
        return max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    with source.open_file() as file:
        head = file.read(2**16)
    if "avi" in containers and (found := re.search(rb"LIST(....)movi", head, re.DOTALL)):  # the list of all packets
        return found.start() + 8 + int.from_bytes(found[1], "little")
    if "matroska" in containers and (at := head.find(b"\x18\x53\x80\x67") + 4) >= 4:  # Segment: all but the EBML header
        length = 9 - head[at].bit_length()  # RFC 8794: the leading zeros of its first byte tell the number's length
        whole = 1 << 7 * length
        segment = int.from_bytes(head[at : at + length], "big") % whole
        return 0 if segment == whole - 1 else at + length + segment  # all ones: a live recording, size unknown
    return 0


def decode_stream(
    source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream"
) -> Iterator["av.VideoFrame"]:
    """All frames from where the container stands, in the order they are shown.

    UnreadableVideo at the decoder's first error. Damage that the codec itself patches over (H.264 conceals a lost
    slice) is no error, here as in a player.
    """
    return _decode(source, packets=read_packets(source, container=container, stream=stream), stream=stream)


def decode_wanted(
    source: Source,
    *,
    container: "av.container.InputContainer",
    stream: "av.VideoStream",
    wanted_pts: Set[int],
    can_skip: bool,
) -> Iterator["av.VideoFrame"]:
    """The frames with these presentation times, and some others, from where the container stands.

    No packet behind the last one wanted is decoded: the decoder is drained, and is of no use until the next seek.
    can_skip (PacketIndex.can_skip): pictures to which no other refers are left out, unless wanted. UnreadableVideo at
    the decoder's first error, but not for damage to what is left out.
    """
    packets = read_packets(source, container=container, stream=stream)
    needed = _needed(packets, stream=stream, wanted_pts=wanted_pts, can_skip=can_skip)
    return _decode(source, packets=needed, stream=stream)


def _needed(
    packets: Iterable[VideoPacket], *, stream: "av.VideoStream", wanted_pts: Set[int], can_skip: bool
) -> Iterator[VideoPacket | None]:
    """Packets up to the last one wanted, then None, which drains the decoder."""
    left = set(wanted_pts)
    for packet in packets:
        if can_skip:  # a decoder of one thread reads this at each packet
            stream.codec_context.skip_frame = "DEFAULT" if packet.pts in wanted_pts else "NONREF"
        yield packet
        left.discard(packet.pts)
        if not left:
            yield None
            return


def _decode(
    source: Source, *, packets: Iterable[VideoPacket | None], stream: "av.VideoStream"
) -> Iterator["av.VideoFrame"]:
    import av

    num_frames = 0
    try:
        for packet in packets:
            for frame in stream.decode(packet):
                yield frame
                num_frames += 1
    except av.error.FFmpegError as error:
        cause = f"decoding stops after {num_frames} frames ({error.strerror})"
        raise UnreadableVideo(f"{source.name}: the file is damaged: {cause}") from error
