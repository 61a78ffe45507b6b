"""What a video file is, and what is odd about it, by reading and decoding all of it with PyAV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from coca_video.data.decode.demux import VideoPacket, clock, demux, header_seconds, open_stream
from coca_video.data.decode.reader import Clock, timeline
from coca_video.data.decode.source import Source, UnreadableVideo, VideoSource, as_source

if TYPE_CHECKING:
    import av

_MPEG4_PICTURE = b"\0\0\1\xb6"  # the start code of a VOP (ISO 14496-2, 6.2.1)


@dataclass(frozen=True, kw_only=True)
class VideoFacts:
    """The best video stream of a file. Counts and times are of the frames that decode, whatever the header says.

    height, width: pixels as shown, after a turn by `rotation_degrees` anticlockwise. pixel_aspect: width to height of
    one pixel. header_num_frames, header_seconds: None where the header says nothing. key_frames: the numbers of the
    frames that are key frames. key_frame_spacing: the longest way from one to the next, or to the end. oddities: what
    makes readers stumble, a sentence without its full stop each.
    """

    name: str
    num_bytes: int
    container: str
    codec: str
    profile: str | None
    pixel_format: str | None
    bit_depth: int
    height: int
    width: int
    rotation_degrees: int
    pixel_aspect: str
    num_video_streams: int
    audio_codecs: tuple[str, ...]
    num_frames: int
    header_num_frames: int | None
    frames_per_second: float
    header_frames_per_second: float
    duration_seconds: float
    header_seconds: float | None
    first_time_seconds: float | None
    key_frames: tuple[int, ...]
    key_frame_spacing: int
    oddities: tuple[str, ...]


def describe(source: VideoSource) -> VideoFacts:
    """Reads the whole file and decodes its best video stream, which takes as long as it is.

    UnreadableVideo for what is no video at all. Damage further on is among the oddities.
    """
    opened = as_source(source)
    with open_stream(opened) as (container, stream):
        seen = _watch(opened, container=container, stream=stream)
        context, stream_clock = stream.codec_context, clock(stream)
        components = context.format.components if context.format is not None else ()
        said_seconds = header_seconds(container, stream)
        times = timeline(seen.pts or [0], clock=stream_clock, last_duration=seen.last_duration)
        known = [time for time in seen.pts if time is not None]
        ends = [*seen.key_frames, len(seen.pts)]
        aspect = stream.sample_aspect_ratio or Fraction(1)
        height, width = seen.size or (context.height, context.width)
        if round(seen.rotation_degrees / 90) % 2:
            height, width = width, height
        oddities = (
            *_odd_layout(container, stream, seen=seen, aspect=aspect),
            *_odd_packets(seen.packets),
            *_odd_times(seen, clock=stream_clock, header_seconds=said_seconds, duration=times.duration_seconds),
            *_odd_counts(seen, header_num_frames=stream.frames),
        )
        return VideoFacts(
            name=opened.name,
            num_bytes=opened.num_bytes(),
            container=container.format.name,
            codec=context.codec.canonical_name,
            profile=context.profile,
            pixel_format=context.pix_fmt,
            bit_depth=max((component.bits for component in components), default=0),
            height=height,
            width=width,
            rotation_degrees=seen.rotation_degrees,
            pixel_aspect=f"{aspect.numerator}:{aspect.denominator}",
            num_video_streams=len(container.streams.video),
            audio_codecs=tuple(_audio_codec(audio) for audio in container.streams.audio),
            num_frames=len(seen.pts),
            header_num_frames=stream.frames or None,
            frames_per_second=len(seen.pts) / times.duration_seconds,
            header_frames_per_second=float(stream_clock.frames_per_second),
            duration_seconds=times.duration_seconds if seen.pts else 0.0,
            header_seconds=said_seconds,
            first_time_seconds=float(min(known) * stream_clock.unit_seconds) if known else None,
            key_frames=tuple(seen.key_frames),
            key_frame_spacing=max((after - before for before, after in pairwise(ends)), default=0),
            oddities=oddities,
        )


def ffmpeg_versions() -> dict[str, str]:
    """The FFmpeg libraries that PyAV brings, and the major version of those that torchcodec found in the system."""
    import av

    versions = {"av": "libavcodec " + ".".join(map(str, av.library_versions["libavcodec"]))}
    try:
        import torchcodec
    except (ImportError, OSError, RuntimeError):  # prove("torchcodec") tells why
        return versions
    return versions | {"torchcodec": f"FFmpeg {torchcodec.ffmpeg_major_version}"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Packet:
    """A packet without its bytes, so that hours of video fit."""

    pts: int | None
    is_key: bool
    is_hidden: bool
    is_corrupt: bool
    num_pictures: int  # of MPEG-4 part 2; 1 elsewhere


@dataclass(kw_only=True)
class _Seen:
    packets: list[_Packet] = field(default_factory=list)
    pts: list[int | None] = field(default_factory=list)
    key_frames: list[int] = field(default_factory=list)
    last_duration: int = 0
    size: tuple[int, int] | None = None
    changes_size: bool = False
    rotation_degrees: int = 0
    num_interlaced: int = 0
    failure: str | None = None


def _watch(opened: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream") -> _Seen:
    import av

    seen = _Seen()
    is_mpeg4 = stream.codec_context.codec.canonical_name == "mpeg4"
    try:
        for packet in demux(opened, container=container, stream=stream):
            if packet.size > 0:
                seen.packets.append(_without_bytes(packet, is_mpeg4=is_mpeg4))
            for frame in stream.decode(packet):
                _watch_frame(frame, seen=seen)
    except av.error.FFmpegError as error:
        seen.failure = f"decoding stops after {len(seen.pts)} frames ({error.strerror})"
    except UnreadableVideo as error:
        seen.failure = str(error).removeprefix(f"{opened.name}: ")
    return seen


def _watch_frame(frame: "av.VideoFrame", *, seen: _Seen) -> None:
    size = (frame.height, frame.width)
    if seen.size is None:
        seen.size, seen.rotation_degrees = size, frame.rotation
    seen.changes_size |= size != seen.size
    if frame.key_frame:
        seen.key_frames.append(len(seen.pts))
    seen.num_interlaced += frame.interlaced_frame
    seen.pts.append(frame.pts)
    seen.last_duration = frame.duration


def _without_bytes(packet: VideoPacket, *, is_mpeg4: bool) -> _Packet:
    return _Packet(
        pts=packet.pts,
        is_key=packet.is_keyframe,
        is_hidden=packet.is_discard,
        is_corrupt=packet.is_corrupt,
        num_pictures=bytes(packet).count(_MPEG4_PICTURE) if is_mpeg4 else 1,
    )


def _audio_codec(audio: "av.AudioStream") -> str:
    context: Any = audio.codec_context  # None where there is no decoder, whatever its type says
    return "unknown" if context is None else str(context.codec.canonical_name)


def _odd_layout(
    container: "av.container.InputContainer", stream: "av.VideoStream", *, seen: _Seen, aspect: Fraction
) -> Iterator[str]:
    pixels = stream.codec_context.format
    if len(container.streams.video) > 1:
        yield f"it has {len(container.streams.video)} video streams, of which number {stream.index} is read"
    if seen.rotation_degrees != 0:
        yield f"it is stored turned, and shown turned by {seen.rotation_degrees} degrees"
    if aspect != 1:
        yield f"its pixels are not square ({aspect.numerator}:{aspect.denominator}); frames come as stored"
    if seen.num_interlaced:
        yield f"{seen.num_interlaced} of its frames are interlaced"
    if seen.changes_size:
        yield "its frames change their size midway"
    # VP8 and VP9 have no pixels with alpha: WebM keeps it beside them, and says so in a tag.
    if stream.metadata.get("alpha_mode") == "1" or (
        pixels is not None and any(part.is_alpha for part in pixels.components)
    ):
        yield "it has an alpha channel, which frames leave out"
    if pixels is not None and (bits := max(component.bits for component in pixels.components)) > 8:
        yield f"its pixels have {bits} bits, and frames 8"


def _odd_packets(packets: Sequence[_Packet]) -> Iterator[str]:
    hidden = sum(packet.is_hidden for packet in packets)
    if hidden:
        yield f"an edit list hides {hidden} of its {len(packets)} packets"
    if packets and not packets[0].is_key:
        yield "it does not begin with a key frame"
    key_pts, open_groups = None, set[int]()
    for packet in packets:
        if packet.is_key:
            key_pts = packet.pts
        elif key_pts is not None and packet.pts is not None and packet.pts < key_pts:
            open_groups.add(key_pts)
    if open_groups:
        yield f"{len(open_groups)} of its groups of pictures are open: pictures of theirs come before the key frame"
    if any(packet.num_pictures > 1 for packet in packets):
        yield "its B-frames are packed: a packet of two pictures, then one of none"
    if any(packet.is_corrupt for packet in packets):
        yield f"{sum(packet.is_corrupt for packet in packets)} of its packets are damaged or cut off"


def _odd_times(seen: _Seen, *, clock: Clock, header_seconds: float | None, duration: float) -> Iterator[str]:
    missing = sum(packet.pts is None for packet in seen.packets)
    if missing:
        yield f"{missing} of its {len(seen.packets)} packets have no presentation time"
    known = sorted(time for time in seen.pts if time is not None)
    if len(set(known)) < len(known):
        yield "some of its frames share a presentation time; a constant rate is taken instead"
    elif len(known) > 2:
        steps = [after - before for before, after in pairwise(known)]
        if max(steps) - min(steps) > 1:  # 1: a rate that is no whole number of units, as 33, 33, 34 ms
            shortest, longest = (float(1000 * step * clock.unit_seconds) for step in (min(steps), max(steps)))
            yield f"its frame rate varies: frames are {shortest:.4g} to {longest:.4g} ms apart"
    if known and known[0] != 0:
        yield f"its first frame is shown at {float(known[0] * clock.unit_seconds):.6g} s and not at 0"
    # Some containers count the time before the first frame in, others not.
    ends = [duration, duration + float((known[0] if known else 0) * clock.unit_seconds)]
    if header_seconds is not None and min(abs(header_seconds - end) for end in ends) > 1 / clock.frames_per_second:
        yield f"its header says that it lasts {header_seconds:.3f} s, and its frames last {duration:.3f} s"


def _odd_counts(seen: _Seen, *, header_num_frames: int) -> Iterator[str]:
    if header_num_frames not in (0, len(seen.pts)):
        yield f"its header counts {header_num_frames} frames, and {len(seen.pts)} decode"
    if seen.failure is not None:
        yield seen.failure
    elif not seen.pts:
        yield "no frame of it decodes"
