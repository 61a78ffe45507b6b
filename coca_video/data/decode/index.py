"""What a video's packets say of its frames, without decoding: every backend's numbers are checked against it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from coca_video.data.decode.bitstream import Start, sequence_headers, start_of, vp9_size_header
from coca_video.data.decode.demux import VideoPacket, check_length, clock, open_stream, read_packets
from coca_video.data.decode.reader import Timeline, timeline
from coca_video.data.decode.source import Source, UnreadableVideo

if TYPE_CHECKING:
    import av

# The containers whose packets carry exact presentation times, and the codecs that show each packet as one frame.
COUNTABLE_CONTAINERS = frozenset({"mov", "matroska"})
COUNTABLE_CODECS = frozenset({"h264", "hevc", "vp9", "av1", "mpeg4", "mjpeg", "prores"})
# MPEG-4 part 2 writes a frame that repeats the last as a stub of some 7 bytes, which decodes to no frame.
MPEG4_STUB_BYTES = 24
PROGRESSIVE_OR_UNKNOWN = (0, 1)  # AVFieldOrder


@dataclass(frozen=True, kw_only=True)
class PacketIndex:
    """The best video stream by its packets.

    pts: presentation times of the frames shown, sorted, in the stream's units. num_key_frames: of those shown.
    clean_pts: those of the key frames from which decoding can start: nothing shown later lies before them in the file,
    or refers to it. hides_packets: by an edit list. changes_size: its pictures may change their size midway. can_skip:
    FFmpeg's decoder knows the pictures to which no other refers. other_colours: why other backends convert its pixels
    to another RGB, None where they do not. uncountable: why the n-th frame shown cannot be told from the packets, None
    where it can.
    """

    container: str
    codec: str
    pts: tuple[int, ...]
    clean_pts: tuple[int, ...]
    num_video_streams: int
    hides_packets: bool
    open_groups: bool
    changes_size: bool
    can_skip: bool
    num_key_frames: int
    other_colours: str | None
    uncountable: str | None
    timeline: Timeline


class _Packet(NamedTuple):
    """What is kept of a packet: a long video's data would not fit in memory. start: of key frames of H.264 and HEVC."""

    pts: int | None
    duration: int
    num_bytes: int
    is_key: bool
    is_hidden: bool
    start: Start | None


def index_packets(source: Source) -> PacketIndex:
    """Reads all packets of the best video stream; UnreadableVideo for what is no video, or cut off."""
    with open_stream(source) as (container, stream):
        check_length(source, container=container, stream=stream)
        context, sizes = stream.codec_context, set[bytes]()
        codec, record = context.codec.canonical_name, context.extradata
        packets = list[_Packet]()
        for packet in read_packets(source, container=container, stream=stream):
            if packet.size > 0:
                data = bytes(packet) if packet.is_keyframe else b""
                packets.append(_note(packet, data=data, codec=codec, record=record))
                if packet.is_keyframe:
                    sizes |= _size_headers(data, codec=codec, record=record)
        shown = [packet for packet in packets if not packet.is_hidden]
        if not shown:
            raise UnreadableVideo(f"{source.name}: its video stream holds no frame")
        times = [packet.pts for packet in shown]
        last = max(shown, key=lambda packet: packet.pts or 0)
        return PacketIndex(
            container=container.format.name,
            codec=codec,
            pts=tuple(sorted(time for time in times if time is not None)),
            clean_pts=_clean_starts(packets, codec=codec),
            num_video_streams=len(container.streams.video),
            hides_packets=len(shown) < len(packets),
            open_groups=_has_open_groups(packets),
            changes_size=len(sizes) > 1,
            can_skip=_can_skip(context),
            num_key_frames=sum(packet.is_key for packet in shown),
            other_colours=_other_colours(context),
            uncountable=_uncountable(packets, stream=stream, container=container.format.name),
            timeline=timeline(times, clock=clock(stream), last_duration=last.duration),
        )


def _note(packet: VideoPacket, *, data: bytes, codec: str, record: bytes | None) -> _Packet:
    starts = packet.is_keyframe and codec in ("h264", "hevc")
    return _Packet(
        pts=packet.pts,
        duration=packet.duration or 0,
        num_bytes=packet.size,
        is_key=packet.is_keyframe,
        is_hidden=packet.is_discard,
        start=start_of(data, record=record, codec=codec) if starts else None,
    )


def _size_headers(data: bytes, *, codec: str, record: bytes | None) -> set[bytes]:
    """What gives the size of the pictures from this key frame's packet on; another may mean another size."""
    if codec == "vp9":
        return {vp9_size_header(data)}
    if codec not in ("h264", "hevc"):
        return set()
    inside = sequence_headers(data, record=record, codec=codec)
    return inside if record is None else {b"the record's", *(header for header in inside if header not in record)}


def _uncountable(packets: Sequence[_Packet], *, stream: "av.VideoStream", container: str) -> str | None:
    codec = stream.codec_context.codec.canonical_name
    if COUNTABLE_CONTAINERS.isdisjoint(container.split(",")) or codec not in COUNTABLE_CODECS:
        return f"{codec} in {container} does not tell its frames by its packets"
    if not packets[0].is_key:
        return "the stream does not begin with a key frame"
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(set(times)) < len(packets):
        return "its packets have no distinct presentation times"
    if times[0] != min(times):
        return "it begins with an open group of pictures"
    if codec == "mpeg4" and any(packet.num_bytes < MPEG4_STUB_BYTES for packet in packets):
        return "some of its packets may repeat a frame without holding one"
    if any(packet.start is not None and not packet.start.is_whole for packet in packets):
        return "some of its key frames need other pictures"
    num_keys = sum(packet.is_key for packet in packets)
    if sum(entry.is_keyframe for entry in stream.index_entries) > num_keys:
        return "its table of key frames names others too"
    if codec in ("vp9", "av1", "mpeg4") and num_keys == len(packets) > 1:
        return "each of its packets is called a key frame, which no encoder of this codec does"
    return None


def _has_open_groups(packets: Sequence[_Packet]) -> bool:
    """Whether some picture that is shown before a key frame comes after it in the file."""
    key_pts = None
    for packet in packets:
        if packet.is_key:
            key_pts = packet.pts
        elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
            return True
    return False


def _clean_starts(packets: Sequence[_Packet], *, codec: str) -> tuple[int, ...]:
    """PacketIndex.clean_pts; none where times are missing.

    A key frame of H.264 that is no IDR leaves older pictures in the decoder, to which later ones may refer. Of HEVC,
    what lies behind a key frame and is shown after it refers neither to what lies before it nor to what lies behind it
    and is shown earlier (H.265, 8.1.3 and 3: trailing pictures), so its open groups are as good as closed ones.
    """
    times = [packet.pts for packet in packets if packet.pts is not None]
    if len(times) < len(packets):
        return ()
    latest_before = list(itertools.accumulate(times, max, initial=min(times) - 1))
    earliest_from = list(itertools.accumulate(reversed(times), min))[::-1]
    return tuple(
        pts
        for packet, pts, before, after in zip(packets, times, latest_before[:-1], earliest_from, strict=True)
        if packet.is_key and not packet.is_hidden and before < pts and (codec == "hevc" or pts == after)
        if packet.start is None or packet.start.forgets
    )


def _can_skip(context: "av.VideoCodecContext") -> bool:
    """Whether FFmpeg's decoder knows the pictures of this stream to which no other refers.

    H.264 marks them (nal_ref_idc 0). HEVC marks those to which none of the same temporal layer refers, so only in
    streams of one layer by their record (hvcC, numTemporalLayers). Not where a picture may be two packets, its fields.
    """
    if context.field_order not in PROGRESSIVE_OR_UNKNOWN:
        return False
    record = context.extradata
    match context.codec.canonical_name:
        case "h264":
            return True
        case "hevc":
            return record is not None and len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1
    return False


def _other_colours(context: "av.VideoCodecContext") -> str | None:
    """Why backends convert these pixels otherwise than PyAV, by up to 46 of 255; None where they were seen to agree."""
    pixels = context.format
    if pixels is None or any(component.bits != 8 for component in pixels.components):
        return "pixels of other than 8 bits"
    if context.field_order not in PROGRESSIVE_OR_UNKNOWN:
        return "interlaced pictures"
    if (context.width % 2 and pixels.chroma_width(2) == 1) or (context.height % 2 and pixels.chroma_height(2) == 1):
        return "an odd size with colours of half the resolution"
    return None
