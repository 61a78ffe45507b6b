"""Which frames of a video make a clip: pure functions from times and counts to frame numbers, and their randomness."""

import hashlib
import math
from fractions import Fraction
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

Seconds = float | Fraction
BeyondEnd = Literal["clamp", "loop"]

# pytorchvideo/data/clip_sampling.py, UniformClipSampler: two ends closer than this are the same
SAME_END_SECONDS = 1e-6


class ClipTimes(NamedTuple):
    """A clip [start_seconds, end_seconds) of a video; the end may lie beyond that of the video."""

    start_seconds: Fraction
    end_seconds: Fraction


def frame_window(
    times_seconds: Float64[np.ndarray, "num_frames"], *, start_seconds: float | None, end_seconds: float | None
) -> tuple[int, int]:
    """(first, last), last excluded: the frames on the screen at some moment of [start_seconds, end_seconds).

    Frame i is on the screen from its time until the time of frame i + 1. None means the beginning, or the end, of the
    video; an end beyond the video is the video's end. There is at least one frame. ValueError for a start that is
    not before the end, or after the time of the last frame.
    """
    start = 0.0 if start_seconds is None else start_seconds
    end = float("inf") if end_seconds is None else end_seconds
    if not start < end:
        raise ValueError(f"expected start_seconds before end_seconds, got {start} and {end}")
    if not start <= times_seconds[-1]:
        raise ValueError(f"start_seconds is {start}, but the last frame of the video is at {times_seconds[-1]:.3f} s")
    first = int(np.searchsorted(times_seconds, start, side="right")) - 1
    last = int(np.searchsorted(times_seconds, end, side="left"))
    return max(first, 0), max(last, 1)  # 0 and 1: where start or end lie before the first frame


def uniform_indices(
    num_frames: int, *, num_samples: int, offsets: Float64[np.ndarray, "samples"] | None = None
) -> Int64[np.ndarray, "samples"]:
    """One frame from each of `num_samples` equal segments of a video, rising; repeats where there are fewer frames.

    Segment i is [i * N / T, (i + 1) * N / T) for N frames and T samples; its frame is the one at `offsets[i]` of its
    length, in [0, 1). Without offsets it is the centre (0.5), so that one sample is frame N // 2: TSN's rule for
    testing; offsets drawn at random are its rule for training (arXiv 1608.00859).
    """
    if num_frames < 1 or num_samples < 1:
        raise ValueError(f"expected at least one frame and one sample, got {num_frames} frames, {num_samples} samples")
    if offsets is None:
        offsets = np.full(num_samples, 0.5)
    if len(offsets) != num_samples or not ((offsets >= 0) & (offsets < 1)).all():
        raise ValueError(f"expected {num_samples} offsets in [0, 1), got {offsets}")
    # In whole numbers: in floating point i + offset can round up to i + 1, a frame of the next segment or none.
    ratios = [float(offset).as_integer_ratio() for offset in offsets]
    indices = [(i * below + above) * num_frames // (num_samples * below) for i, (above, below) in enumerate(ratios)]
    return np.array(indices, dtype=np.int64)


def _check_counts(**counts: int) -> None:
    """ValueError for a count below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"expected {name} of at least 1, got {count}")


def _share(fraction: float, *, of: int) -> int:
    """floor(fraction * of) in whole numbers, so that it stays below `of`: fraction in [0, 1)."""
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    above, below = fraction.as_integer_ratio()
    return above * of // below


def dense_indices(
    num_frames: int, *, num_samples: int, stride: int, start: int, beyond_end: BeyondEnd = "clamp"
) -> Int64[np.ndarray, "samples"]:
    """Frames start, start + stride, start + 2 stride, ... of a video: a dense clip.

    What lies beyond the last frame is the last frame again ("clamp", PySlowFast's rule) or goes on from frame 0
    ("loop", MMAction2's rule: the number modulo N).
    """
    _check_counts(num_frames=num_frames, num_samples=num_samples, stride=stride)
    if not 0 <= start < num_frames:
        raise ValueError(f"expected start in [0, {num_frames}), got {start}")
    indices = start + stride * np.arange(num_samples, dtype=np.int64)
    return indices % num_frames if beyond_end == "loop" else np.minimum(indices, num_frames - 1)


def _last_start(num_frames: int, *, num_samples: int, stride: int) -> int:
    """The last start at which a dense clip, (T - 1) * stride + 1 frames long, lies within the video; 0 if none does."""
    _check_counts(num_frames=num_frames, num_samples=num_samples, stride=stride)
    return max(num_frames - ((num_samples - 1) * stride + 1), 0)


def clip_starts(num_frames: int, *, num_clips: int, num_samples: int, stride: int) -> Int64[np.ndarray, "clips"]:
    """Starts of `num_clips` dense clips, evenly over a video: the first at frame 0, the last ends with the video.

    Start i is round(i * last / (num_clips - 1)), halves to the even number; a single clip lies in the middle. All are
    0 where the clip is longer than the video.
    """
    _check_counts(num_clips=num_clips)
    last = _last_start(num_frames, num_samples=num_samples, stride=stride)
    if num_clips == 1:
        return np.array([last // 2], dtype=np.int64)
    return np.array([round(Fraction(i * last, num_clips - 1)) for i in range(num_clips)], dtype=np.int64)


def random_dense_start(num_frames: int, *, num_samples: int, stride: int, fraction: float) -> int:
    """For training: the start of a dense clip, each possible one equally likely for a `fraction` uniform in [0, 1)."""
    return _share(fraction, of=_last_start(num_frames, num_samples=num_samples, stride=stride) + 1)


def linspace_float32(start: float, *, stop: float, num_samples: int) -> Float32[np.ndarray, "samples"]:
    """`torch.linspace(start, stop, num_samples)`, bit for bit, with numpy.

    PySlowFast and pytorchvideo truncate these float32 numbers to frames; for 446 of 25,536 pairs (up to 399 frames, up
    to 64 samples) that gives another frame than float64 does. PyTorch counts the first half from the start and the
    second from the stop and rounds each once, by a fused multiply-add; so sum and product are taken in float64 here
    (which is exact unless the numbers lie more than some eight decimal places apart in size).
    """
    _check_counts(num_samples=num_samples)
    first, last = np.float32(start), np.float32(stop)
    if num_samples == 1:
        return np.array([first])
    step = np.float64((last - first) / np.float32(num_samples - 1))
    steps = np.arange(num_samples)
    from_last = last - step * (num_samples - 1 - steps)
    return np.where(steps < num_samples // 2, first + step * steps, from_last).astype(np.float32)


def pytorchvideo_uniform(
    duration_seconds: Seconds,
    *,
    clip_seconds: Seconds,
    stride_seconds: Seconds | None = None,
    backpad_last: bool = False,
) -> tuple[ClipTimes, ...]:
    """All clips of pytorchvideo's `make_clip_sampler("uniform", clip_seconds, stride_seconds, backpad_last)`.

    One every `stride_seconds` (None: `clip_seconds`), as long as they end within the video; the first always.
    `backpad_last` adds one that ends with the video. Given as Fractions, the times are exact; floats are summed as
    pytorchvideo sums them (UniformClipSampler in its data/clip_sampling.py).
    """
    stride = clip_seconds if stride_seconds is None else stride_seconds
    _check_clip(duration_seconds, clip_seconds=clip_seconds)
    if not 0 < stride <= clip_seconds:
        raise ValueError(f"expected 0 < stride_seconds <= clip_seconds ({clip_seconds}), got {stride}")
    clip = Fraction(clip_seconds)
    overlap: Seconds = max(Fraction(0), clip - stride)
    found: list[ClipTimes] = []
    last_end: Seconds = 0.0
    while True:
        start = Fraction(max(last_end - overlap, Fraction(0)))
        if backpad_last:
            beyond: Seconds = max(Fraction(0), start + clip - duration_seconds)
            start = Fraction(max(Fraction(0), start - beyond))
        end = start + clip
        gap: Seconds = end - last_end
        if found and (-SAME_END_SECONDS < gap < SAME_END_SECONDS if backpad_last else end > duration_seconds):
            return tuple(found)
        found.append(ClipTimes(start, end))
        last_end = end


def pytorchvideo_constant(duration_seconds: Seconds, *, clip_seconds: Seconds, num_clips: int) -> tuple[ClipTimes, ...]:
    """All clips of pytorchvideo's `make_clip_sampler("constant_clips_per_video", clip_seconds, num_clips)`.

    Clip i starts at i / num_clips (not num_clips - 1: the end is never reached) of the last possible start.
    """
    _check_clip(duration_seconds, clip_seconds=clip_seconds)
    _check_counts(num_clips=num_clips)
    clip = Fraction(clip_seconds)
    step = Fraction(max(duration_seconds - clip, 0)) / num_clips
    return tuple(ClipTimes(i * step, i * step + clip) for i in range(num_clips))


def pytorchvideo_random(duration_seconds: Seconds, *, clip_seconds: Seconds, fraction: float) -> ClipTimes:
    """The clip of pytorchvideo's `make_clip_sampler("random", clip_seconds)`, `random.random()` being `fraction`."""
    _check_clip(duration_seconds, clip_seconds=clip_seconds)
    if not 0 <= fraction < 1:
        raise ValueError(f"expected a fraction in [0, 1), got {fraction}")
    clip = Fraction(clip_seconds)
    start = Fraction(max(duration_seconds - clip, 0) * fraction)
    return ClipTimes(start, start + clip)


def _check_clip(duration_seconds: Seconds, *, clip_seconds: Seconds) -> None:
    """ValueError for a duration or a clip that is not positive and finite."""
    for name, seconds in (("duration_seconds", duration_seconds), ("clip_seconds", clip_seconds)):
        if not 0 < seconds < math.inf:
            raise ValueError(f"expected {name} above 0 and finite, got {seconds}")


def pytorchvideo_frames(
    num_frames: int, *, frames_per_second: Seconds, clip: ClipTimes, num_samples: int
) -> Int64[np.ndarray, "samples"]:
    """The frames that pytorchvideo's `get_clip` and `uniform_temporal_subsample` take from a clip.

    Those whose time i / frames_per_second lies in [start, end), then num_samples of them by `linspace_float32`,
    truncated: the first and the last (with one sample the first), repeats where there are fewer. The rate as a
    Fraction gives the frames of its PyAV reader, as a float those of its decord reader, which rounds start * rate. A
    video of varying frame rate is taken as one of constant rate. ValueError for a clip without a frame.
    """
    _check_counts(num_frames=num_frames, num_samples=num_samples)
    first = math.ceil(frames_per_second * clip.start_seconds)
    last = min(math.ceil(frames_per_second * clip.end_seconds), num_frames)
    if not 0 <= first < last:
        start, end = float(clip.start_seconds), float(clip.end_seconds)
        raise ValueError(f"expected a clip with a frame in it, got {start:.3f} to {end:.3f} s of {num_frames} frames")
    return first + linspace_float32(0.0, stop=float(last - first - 1), num_samples=num_samples).astype(np.int64)


def exact_rate(frames_per_second: float) -> Fraction:
    """The fraction that a rate stands for: 29.97002997 is 30000/1001. It itself where none up to 1001ths is so near."""
    near = Fraction(frames_per_second).limit_denominator(1001)
    return near if abs(near - Fraction(frames_per_second)) <= near / 10**6 else Fraction(frames_per_second)


def pytorchvideo_indices(
    num_frames: int, *, frames_per_second: Fraction, clip: ClipTimes, num_samples: int
) -> Int64[np.ndarray, "samples"]:
    """`pytorchvideo_frames` for a clip that starts in the video, always with frames.

    A clip shorter than a frame may lie between the times of two. pytorchvideo then has nothing and goes on to another
    video; here it is the frame on the screen at its start.
    """
    on_screen = min(math.floor(frames_per_second * clip.start_seconds), num_frames - 1)
    first = math.ceil(frames_per_second * clip.start_seconds)
    if first >= min(math.ceil(frames_per_second * clip.end_seconds), num_frames):
        return np.full(num_samples, on_screen, dtype=np.int64)
    return pytorchvideo_frames(num_frames, frames_per_second=frames_per_second, clip=clip, num_samples=num_samples)


def sample_rng(*, seed: int, epoch: int, index: int, purpose: str) -> np.random.Generator:
    """A generator for one use ("crop", "caption") of one sample: the same in every process and on every platform.

    Counter-based (Philox), its key a hash of all four arguments: neighbouring samples and uses are independent, and
    another use added later changes none of those there are.
    """
    text = f"{purpose} {seed} {epoch} {index}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
