"""Which frames of a video make a clip: pure functions from times and counts to frame numbers, and their randomness."""

import hashlib

import numpy as np
from jaxtyping import Float64, Int64


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


def sample_rng(*, seed: int, epoch: int, index: int, purpose: str) -> np.random.Generator:
    """A generator for one use ("crop", "caption") of one sample: the same in every process and on every platform.

    Counter-based (Philox), its key a hash of all four arguments: neighbouring samples and uses are independent, and
    another use added later changes none of those there are.
    """
    text = f"{purpose} {seed} {epoch} {index}"
    key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key))
