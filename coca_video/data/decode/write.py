"""H.264 files: from frames, and from any video that PyAV decodes (transcoding for fast random access)."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.demux import check_length, clock, decode_stream, open_stream
from coca_video.data.decode.reader import Clock, Timeline
from coca_video.data.decode.reader import timeline as make_timeline
from coca_video.data.decode.source import Source, UnreadableVideo, as_source

if TYPE_CHECKING:
    import av

WRITABLE_SUFFIXES = (".mp4", ".mkv", ".mov")
PARTIAL_PREFIX = ".partial-"
Preset = Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
# x264's macroblock tree (with its SIMD code) reads memory that it never wrote: 1 file in 10 to 200 came out other.
_SAME_BYTES = "mbtree=0"
# Without B-frames. Measured on a Kinetics clip (300 frames, 340x256, gop 16), both files of 716 kB: opening and reading
# 16 frames takes 40.6 ms without and 50.9 ms with 3 B-frames in torchcodec, 49.5 and 61.2 ms in decord; PSNR is 36.16
# and 36.32 dB. Key frames at every gop-th frame and nowhere else; closed groups, so that decoders may start at each.
_FAST_ACCESS = f"{_SAME_BYTES}:bframes=0:scenecut=0:open-gop=0"
_BT601, _LIMITED_RANGE = 6, 1  # AVCOL_SPC_SMPTE170M, AVCOL_RANGE_MPEG
_FINEST_UNIT_SECONDS = Fraction(1, 1_000_000)  # finer ones make QuickTime refuse long files


@dataclass(frozen=True, kw_only=True)
class TranscodeConfig:
    """The look of a transcoded file. Smaller `gop`: quicker random access, larger file."""

    short_side: int = 256
    """Pixels of the shorter side; smaller videos keep theirs."""
    gop: int = 16
    """Frames from key frame to key frame."""
    crf: int = 23
    """x264's quality: 0 loses least, 51 most."""
    preset: Preset = "medium"
    """x264's effort: slower gives smaller files of the same quality."""

    def __post_init__(self) -> None:
        if self.short_side < 16 or self.short_side % 2:
            raise ValueError(f"--short-side must be an even number of pixels, at least 16; got {self.short_side}.")
        if self.gop < 1:
            raise ValueError(f"--gop must be at least 1 frame; got {self.gop}.")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"--crf must lie between 0 and 51; got {self.crf}.")

    def size(self, *, height: int, width: int) -> tuple[int, int]:
        """(height, width) of the file for a video shown at this size: the same shape, even, never enlarged."""
        short = min(height, width)
        if short <= self.short_side:
            return max(2, height // 2 * 2), max(2, width // 2 * 2)  # 2: 4:2:0 has no smaller picture
        height, width = (2 * round(side * self.short_side / short / 2) for side in (height, width))
        return height, width


@dataclass(frozen=True, kw_only=True)
class TranscodedVideo:
    """What was written."""

    num_frames: int
    height: int
    width: int
    duration_seconds: float
    num_bytes: int


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
    partial = partial_path(path)
    encoder_options = {"crf": str(crf), "x264-params": _SAME_BYTES}
    with av.open(str(partial), "w", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=encoder_options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes of x264 depend on the number of threads
        for pixels in frames.permute(0, 2, 3, 1).cpu().contiguous().numpy():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    partial.replace(path)


def partial_path(path: Path) -> Path:
    """Where a file is written before it gets its name."""
    return path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}")


def transcode_video(source: Path, *, out: Path, config: TranscodeConfig) -> TranscodedVideo:
    """Writes the video `source` as an MP4 for fast random access; the same source gives the same bytes.

    H.264, yuv420p, no sound, the index at the front. Every frame is there with its presentation time; what a reader
    returns is, within the loss of the coding, what it returned for the source, scaled down. Frames pass one by one, so
    that memory does not grow with the length. `out` appears only when it is whole.

    Raises:
        UnreadableVideo: the source is no video, damaged, or in a form that cannot be encoded; `out` is not written.
        OSError: `out` cannot be written.
    """
    import av

    opened, partial = as_source(source), partial_path(out)
    try:
        try:
            written = _encode(opened, partial=partial, config=config, timeline=None)
        except _TimesUnknown:  # AVI and raw streams: the times are known when all frames are
            written = _encode(opened, partial=partial, config=config, timeline=_decoded_timeline(opened))
        partial.replace(out)
    except av.error.FFmpegError as error:
        if isinstance(error, OSError):  # a plain one, since av's do not survive the way from one process to another
            raise OSError(error.errno, error.strerror, str(out)) from error
        raise UnreadableVideo(f"{source}: it cannot be encoded ({error.strerror})") from error
    finally:
        partial.unlink(missing_ok=True)
    return written


class _TimesUnknown(Exception):
    """The decoded frames do not come with rising presentation times."""


class _TimedFrame(NamedTuple):
    frame: "av.VideoFrame"
    start_seconds: Fraction
    duration_seconds: Fraction


def _encode(source: Source, *, partial: Path, config: TranscodeConfig, timeline: Timeline | None) -> TranscodedVideo:
    import av

    muxing = {"fflags": "+bitexact", "movflags": "faststart"}
    with open_stream(source) as (container, stream):
        check_length(source, container=container, stream=stream)  # FFmpeg decodes a part of a file without a word
        frames = decode_stream(source, container=container, stream=stream)
        first = next(frames, None)
        if first is None:
            raise UnreadableVideo(f"{source.name}: its video stream holds no frame that decodes")
        height, width = config.size(height=first.height, width=first.width)
        if _quarter_turns(first, name=source.name) % 2:
            height, width = width, height
        source_clock = clock(stream)
        unit_seconds = _time_unit(timeline, clock=source_clock)
        with av.open(str(partial), "w", format="mp4", options=muxing) as target:
            encoder = _add_encoder(target, config=config, height=height, width=width)
            encoder.codec_context.time_base = unit_seconds
            encoder.codec_context.framerate = source_clock.frames_per_second
            encoder.codec_context.color_primaries = stream.codec_context.color_primaries  # no conversion: as tagged
            encoder.codec_context.color_trc = stream.codec_context.color_trc
            num_frames, end_seconds, pts = 0, Fraction(0), -1
            convert = _Converter(height=height, width=width, name=source.name)
            for timed in _timed(chain([first], frames), clock=source_clock, timeline=timeline, name=source.name):
                frame = convert(timed.frame)
                frame.time_base = unit_seconds
                frame.pts = pts = max(pts + 1, round(timed.start_seconds / unit_seconds))
                frame.duration = max(1, round(timed.duration_seconds / unit_seconds))
                num_frames, end_seconds = num_frames + 1, timed.start_seconds + timed.duration_seconds
                target.mux(encoder.encode(frame))
            target.mux(encoder.encode(None))
    return TranscodedVideo(
        num_frames=num_frames,
        height=height,
        width=width,
        duration_seconds=float(end_seconds),
        num_bytes=partial.stat().st_size,
    )


def _add_encoder(
    target: "av.container.OutputContainer", *, config: TranscodeConfig, height: int, width: int
) -> "av.VideoStream":
    # frame_duration: else every frame is said to last as long as the mean, and of the last one a player believes it
    options = {"crf": str(config.crf), "preset": config.preset, "x264-params": _FAST_ACCESS, "flags": "+frame_duration"}
    encoder = target.add_stream("libx264", options=options)
    context = encoder.codec_context
    context.height, context.width, context.pix_fmt = height, width, "yuv420p"
    context.gop_size = config.gop
    context.thread_count = 1  # the bytes of x264 depend on the number of threads
    context.colorspace, context.color_range = _BT601, _LIMITED_RANGE
    return encoder


def _timed(
    frames: Iterator["av.VideoFrame"], *, clock: Clock, timeline: Timeline | None, name: str
) -> Iterator[_TimedFrame]:
    """Each frame with its time from the first on: the timeline's, else its own; _TimesUnknown where it has none."""
    if timeline is None:
        first = last = None
        for frame in frames:
            if frame.pts is None or (last is not None and frame.pts <= last):
                raise _TimesUnknown
            first, last = frame.pts if first is None else first, frame.pts
            duration = frame.duration * clock.unit_seconds if frame.duration > 0 else 1 / clock.frames_per_second
            yield _TimedFrame(frame, (frame.pts - first) * clock.unit_seconds, duration)
        return
    starts = [Fraction(time) for time in (*timeline.times_seconds, timeline.duration_seconds)]
    num_frames = 0
    for start, end, frame in zip(starts, starts[1:], frames, strict=False):  # frames last: zip drops what it read last
        num_frames += 1
        yield _TimedFrame(frame, start, end - start)
    if num_frames != len(timeline.times_seconds) or next(frames, None) is not None:
        raise UnreadableVideo(f"{name}: it decodes to another number of frames the second time: did the file change?")


def _decoded_timeline(source: Source) -> Timeline:
    pts, last_duration = list[int | None](), 0
    with open_stream(source) as (container, stream):
        source_clock = clock(stream)
        for frame in decode_stream(source, container=container, stream=stream):
            pts.append(frame.pts)
            last_duration = frame.duration
    return make_timeline(pts, clock=source_clock, last_duration=last_duration)


def _time_unit(timeline: Timeline | None, *, clock: Clock) -> Fraction:
    """A unit in which times are whole numbers: the source's own, else a frame of its rate, else MPEG's 1/90000 s."""
    if timeline is None:
        return clock.unit_seconds if clock.unit_seconds >= _FINEST_UNIT_SECONDS else Fraction(1, 90_000)
    times = timeline.times_seconds
    for unit_seconds in (clock.unit_seconds, 1 / clock.frames_per_second):
        rounded = np.round(times / float(unit_seconds)) * float(unit_seconds)
        if unit_seconds >= _FINEST_UNIT_SECONDS and np.abs(rounded - times).max() < 1e-6:
            return unit_seconds
    return Fraction(1, 90_000)


def _quarter_turns(frame: "av.VideoFrame", *, name: str) -> int:
    turns = round(frame.rotation / 90)  # round: the angle comes from a matrix and is cut to a whole number
    if abs(frame.rotation - 90 * turns) > 1:
        raise UnreadableVideo(f"{name}: it is to be rotated by {frame.rotation} degrees; expected quarter turns")
    return turns


class _Converter:
    """Frames as a reader shows them, turned and in its RGB, scaled; then as yuv420p.

    By way of RGB, since a source may be in any matrix, range and depth. The result is in BT.601 and limited range,
    which is also what those take who look at no tag, or guess from a small size. Rounded exactly: by swscale's quick
    ways the way to RGB and back darkens by 1.1 of 255 on average, by these by 0.02 (a Kinetics clip, before coding).
    """

    def __init__(self, *, height: int, width: int, name: str) -> None:
        from av.video.reformatter import VideoReformatter

        self._size, self._name = (height, width), name
        self._to_rgb, self._to_yuv = VideoReformatter(), VideoReformatter()

    def __call__(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        import av
        from av.video.reformatter import ColorRange, Colorspace, Interpolation

        turns = _quarter_turns(frame, name=self._name)
        height, width = self._size if turns % 2 == 0 else self._size[::-1]
        exact = Interpolation.ACCURATE_RND | Interpolation.BITEXACT  # and the same on every kind of CPU
        scaling = Interpolation.BICUBIC | Interpolation.FULL_CHR_H_INT | exact
        rgb = self._to_rgb.reformat(frame, format="rgb24", width=width, height=height, interpolation=scaling, threads=1)
        turned: UInt8[np.ndarray, "height width 3"] = np.ascontiguousarray(np.rot90(rgb.to_ndarray(), k=turns))
        return self._to_yuv.reformat(
            av.VideoFrame.from_ndarray(turned, format="rgb24"),
            format="yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation=Interpolation.AREA | exact,
            threads=1,
        )
