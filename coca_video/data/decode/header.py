"""What the header of a video or picture claims, read without decoding: enough to turn a file away before it costs."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from PIL import BmpImagePlugin, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

from coca_video.data.decode.demux import clock, demux, header_seconds, open_stream
from coca_video.data.decode.images import is_picture
from coca_video.data.decode.index import PROGRESSIVE_OR_UNKNOWN
from coca_video.data.decode.source import Source, UnreadableVideo, VideoSource, as_source

if TYPE_CHECKING:
    import av

# By their names and not through Image.open: that turns large pictures away without telling their size, and tries
# formats that start other programs.
_PICTURES = (
    JpegImagePlugin.JpegImageFile,
    PngImagePlugin.PngImageFile,
    WebPImagePlugin.WebPImageFile,
    BmpImagePlugin.BmpImageFile,
)
# ISO 14496-12, 4.3: the major brands of MP4 files. QuickTime's, "qt  ", and phones' 3GP play in some browsers only.
_MP4_BRANDS = frozenset(
    {"isom", *(f"iso{number}" for number in range(2, 10)), "mp41", "mp42", "avc1", "M4V ", "M4VH", "M4VP", "MSNV"}
)
# What the browsers of desktops and phones play without a plug-in: developer.mozilla.org, "Media container formats".
_PLAYED_CODECS = {"mp4": frozenset({"h264"}), "webm": frozenset({"vp8", "vp9"})}
_PLAYED_SOUND = {"mp4": frozenset({"aac", "mp3"}), "webm": frozenset({"vorbis", "opus"})}
# Clips that were scaled to a short side are often stretched by 639:640. B-frames without an edit list delay by 0.07 s.
_SEEN_STRETCH, _SEEN_DELAY_SECONDS = 0.01, 0.1
_MAX_PROBED_PIXELS = 4096 * 4096  # some 16000 x 16000 of H.264 took 4 s and 1.8 GB to describe, so limited 0.04 s
_PLAYED_PIXELS = frozenset({"yuv420p", "yuvj420p"})  # the second: full range, of H.264


@dataclass(frozen=True, kw_only=True)
class VideoHeader:
    """The best video stream of a file as its header describes it; what really decodes may be otherwise.

    height, width: pixels as stored, before any turn; 0 where they are not told. duration_seconds, num_frames: None
    where they are not told; num_frames of MP4 is that of its table of packets, elsewhere a mere claim.
    plays_in_browser: whether every current browser plays the file as it is, as it is shown here.
    """

    container: str
    codec: str
    pixel_format: str | None
    height: int
    width: int
    duration_seconds: float | None
    num_frames: int | None
    plays_in_browser: bool


class PacketCount(NamedTuple):
    """Packets of the best video stream, and the time from the first that is shown to the last."""

    num_packets: int
    span_seconds: float


def read_header(source: VideoSource) -> VideoHeader:
    """The header of a video, or of a picture by the ending of its path, which then is one frame of unknown length.

    FFmpeg reads on where a header leaves things out, up to 5 MB; no picture of more than 4096 x 4096 pixels is decoded.
    UnreadableVideo for a file that is missing, empty, or neither.
    """
    opened = as_source(source)
    if is_picture(source):
        return _picture_header(opened)
    with open_stream(opened, max_probed_pixels=_MAX_PROBED_PIXELS) as (container, stream):
        context = stream.codec_context
        return VideoHeader(
            container=container.format.name,
            codec=context.codec.canonical_name,
            pixel_format=context.pix_fmt,
            height=context.height,
            width=context.width,
            duration_seconds=header_seconds(container, stream),
            num_frames=stream.frames if stream.frames > 0 else None,
            plays_in_browser=_plays_in_browser(opened, container=container, stream=stream),
        )


def count_packets(source: VideoSource, *, at_most: int) -> PacketCount:
    """Counts the packets of a video up to `at_most`, without decoding: a header may claim any number of frames.

    UnreadableVideo where there is no video, or where it cannot be read on. For a picture one.
    """
    if is_picture(source):
        return PacketCount(1, 0.0)
    opened, num_packets = as_source(source), 0
    first = last = None
    with open_stream(opened) as (container, stream):
        unit_seconds = clock(stream).unit_seconds
        for packet in demux(opened, container=container, stream=stream):
            if packet.size == 0:
                continue
            num_packets += 1
            if packet.pts is not None:
                first = packet.pts if first is None else min(first, packet.pts)
                last = packet.pts if last is None else max(last, packet.pts)
            if num_packets == at_most:
                break
    span = 0.0 if first is None or last is None else float((last - first) * unit_seconds)
    return PacketCount(num_packets, span)


def _picture_header(source: Source) -> VideoHeader:
    for kind in _PICTURES:
        with source.open_file() as file:
            try:
                picture = kind(file)
            except (SyntaxError, OSError, ValueError, IndexError, TypeError, KeyError, EOFError):
                continue  # not of this kind
            width, height = picture.size
            return VideoHeader(
                container="image",
                codec=str(picture.format).lower(),
                pixel_format=picture.mode,
                height=height,
                width=width,
                duration_seconds=None,
                num_frames=1,
                plays_in_browser=False,
            )
    raise UnreadableVideo(f"{source.name}: not a JPEG, PNG, WebP or BMP picture, or one whose header is damaged")


def _plays_in_browser(source: Source, *, container: "av.container.InputContainer", stream: "av.VideoStream") -> bool:
    kind, context = _browser_container(source, container=container), stream.codec_context
    if kind is None or len(container.streams.video) > 1:  # of several, a browser may show another
        return False
    sounds = {_codec_name(sound) for sound in container.streams.audio}
    return (
        context.codec.canonical_name in _PLAYED_CODECS[kind]
        and context.pix_fmt in _PLAYED_PIXELS
        and context.field_order in PROGRESSIVE_OR_UNKNOWN
        and abs(float(stream.sample_aspect_ratio or 1) - 1) < _SEEN_STRETCH  # frames are not stretched
        and abs(float((stream.start_time or 0) * clock(stream).unit_seconds)) < _SEEN_DELAY_SECONDS  # nor do they wait
        and stream.metadata.get("alpha_mode") != "1"  # VP8 and VP9 keep their alpha beside the pixels
        and sounds <= _PLAYED_SOUND[kind]
    )


def _browser_container(source: Source, *, container: "av.container.InputContainer") -> str | None:
    """ "mp4" or "webm", None for all others, and for a name that would be served as something else."""
    suffix = source.data.suffix.lower() if isinstance(source.data, Path) else None
    kinds = container.format.name.split(",")
    if "mp4" in kinds and container.metadata.get("major_brand") in _MP4_BRANDS:
        return "mp4" if suffix in (None, ".mp4", ".m4v") else None
    if "webm" in kinds and _document_type(source) == b"webm":
        return "webm" if suffix in (None, ".webm") else None
    return None


def _document_type(source: Source) -> bytes:
    """Of a Matroska or WebM file (RFC 8794, 11.2.8, DocType), which FFmpeg does not tell apart."""
    with source.open_file() as file:
        _, found, after = file.read(1024).partition(b"\x42\x82")
    return after[1 : 1 + (after[0] & 0x7F)].rstrip(b"\0") if found and after else b""


def _codec_name(sound: "av.AudioStream") -> str:
    context: "av.AudioCodecContext | None" = sound.codec_context  # None where there is no decoder
    return "unknown" if context is None else str(context.codec.canonical_name)
