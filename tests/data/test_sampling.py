"""Frame numbers against double loops in whole numbers, windows, pure generators."""

import math
import subprocess
import sys
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from coca_video.data.sampling import (
    BeyondEnd,
    clip_starts,
    dense_indices,
    frame_window,
    linspace_float32,
    random_dense_start,
    sample_rng,
    uniform_indices,
)

GOLDEN = [1580722785938471746, 471189835108207819]


def naive_indices(num_frames: int, offsets: list[float]) -> list[int]:
    """For each segment, the one frame [f, f + 1) in which its point lies, all in fractions."""
    found = []
    for segment, offset in enumerate(offsets):
        length = Fraction(num_frames, len(offsets))
        point = segment * length + Fraction(offset) * length
        found += [frame for frame in range(num_frames) if frame <= point < frame + 1]
    return found


@given(st.integers(1, 300), st.integers(1, 40))
def test_centres(num_frames: int, num_samples: int) -> None:
    indices = uniform_indices(num_frames, num_samples=num_samples)
    assert indices.dtype == np.int64
    assert indices.tolist() == naive_indices(num_frames, [0.5] * num_samples)


@given(st.integers(1, 300), st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=20))
def test_offsets(num_frames: int, offsets: list[float]) -> None:
    indices = uniform_indices(num_frames, num_samples=len(offsets), offsets=np.array(offsets, dtype=np.float64))
    assert indices.tolist() == naive_indices(num_frames, offsets)


@given(st.integers(1, 10**7))
def test_one_sample_is_the_middle_frame(num_frames: int) -> None:
    assert uniform_indices(num_frames, num_samples=1).tolist() == [num_frames // 2]


def test_known_indices() -> None:
    assert uniform_indices(300, num_samples=4).tolist() == [37, 112, 187, 262]
    assert uniform_indices(3, num_samples=6).tolist() == [0, 0, 1, 1, 2, 2]
    assert uniform_indices(1, num_samples=3).tolist() == [0, 0, 0]
    assert uniform_indices(8, num_samples=8).tolist() == list(range(8))


def test_an_offset_just_below_one_stays_in_its_segment() -> None:
    # In floating point 7 + offset rounds to 8: a ninth frame of eight.
    below_one = np.full(8, np.nextafter(1.0, 0.0))
    assert 7 + below_one[7] == 8.0
    assert uniform_indices(8, num_samples=8, offsets=below_one).tolist() == list(range(8))


def test_uniform_indices_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="at least one frame"):
        uniform_indices(0, num_samples=4)
    with pytest.raises(ValueError, match="one sample"):
        uniform_indices(4, num_samples=0)
    for offsets in ([0.5], [0.5, 1.0], [0.5, -0.1], [0.5, float("nan")]):
        with pytest.raises(ValueError, match="2 offsets in"):
            uniform_indices(4, num_samples=2, offsets=np.array(offsets))


@given(
    st.lists(st.integers(1, 5), max_size=30),
    st.integers(0, 200),
    st.integers(1, 200),
)
def test_frame_window(gaps: list[int], start: int, length: int) -> None:
    times = np.cumsum([0, *gaps]) / 8  # eighths are exact in floating point
    start_seconds, end_seconds = start / 8, (start + length) / 8
    if start_seconds > times[-1]:
        with pytest.raises(ValueError, match="the last frame of the video is at"):
            frame_window(times, start_seconds=start_seconds, end_seconds=end_seconds)
        return
    until = [*times[1:].tolist(), float("inf")]  # when each frame leaves the screen
    shown = [i for i in range(len(times)) if times[i] < end_seconds and until[i] > start_seconds]
    first, last = frame_window(times, start_seconds=start_seconds, end_seconds=end_seconds)
    assert list(range(first, last)) == shown and len(shown) >= 1


def test_frame_window_without_bounds() -> None:
    times = np.arange(10) / 5
    assert frame_window(times, start_seconds=None, end_seconds=None) == (0, 10)
    assert frame_window(times, start_seconds=1.0, end_seconds=None) == (5, 10)
    assert frame_window(times, start_seconds=None, end_seconds=1.0) == (0, 5)
    assert frame_window(times, start_seconds=1.1, end_seconds=1.15) == (5, 6)
    assert frame_window(times, start_seconds=1.0, end_seconds=99.0) == (5, 10)
    with pytest.raises(ValueError, match="start_seconds before end_seconds, got 1"):
        frame_window(times, start_seconds=1.0, end_seconds=1.0)


def test_sample_rng_is_a_pure_function() -> None:
    keys = [
        {"seed": seed, "epoch": epoch, "index": index, "purpose": purpose}
        for seed in (0, 1)
        for epoch in (0, 1, 12)
        for index in (0, 1, 2, 123456789)
        for purpose in ("crop", "flip")
    ]
    draws = [tuple(sample_rng(**key).integers(0, 2**62, 3).tolist()) for key in keys]
    assert draws == [tuple(sample_rng(**key).integers(0, 2**62, 3).tolist()) for key in keys]
    assert len(set(draws)) == len(keys)
    # (1, 12) and (11, 2) must not run together in the key
    assert (
        sample_rng(seed=0, epoch=1, index=12, purpose="x").random()
        != sample_rng(seed=0, epoch=11, index=2, purpose="x").random()
    )


def test_sample_rng_golden_and_in_another_process() -> None:
    drawn = sample_rng(seed=3, epoch=5, index=7, purpose="crop").integers(0, 2**63, 2).tolist()
    assert drawn == GOLDEN
    code = (
        "from coca_video.data.sampling import sample_rng;"
        "print(sample_rng(seed=3, epoch=5, index=7, purpose='crop').integers(0, 2**63, 2).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(GOLDEN)


def test_sample_rng_is_uniform_over_samples() -> None:
    first = np.array([sample_rng(seed=0, epoch=0, index=i, purpose="flip").random() for i in range(4000)])
    counts, _ = np.histogram(first, bins=10, range=(0, 1))
    assert ((counts - 400) ** 2 / 400).sum() < 27.9  # chi-square, 9 degrees of freedom, p = 0.001
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def naive_dense(num_frames: int, *, num_samples: int, stride: int, start: int, beyond_end: BeyondEnd) -> list[int]:
    """Walk the video frame by frame, and take every stride-th."""
    found, frame = [], start
    for _ in range(num_samples):
        found.append(frame)
        for _ in range(stride):
            frame += 1
            if frame == num_frames:
                frame = 0 if beyond_end == "loop" else num_frames - 1
    return found


SHARES = st.floats(0, 1, exclude_max=True)


@given(st.integers(1, 200), st.integers(1, 40), st.integers(1, 9), SHARES, st.sampled_from(["clamp", "loop"]))
@example(1, 16, 4, 0.0, "clamp")
@example(1, 16, 4, 0.0, "loop")
def test_dense(num_frames: int, num_samples: int, stride: int, share: float, beyond_end: BeyondEnd) -> None:
    start = int(share * num_frames)
    indices = dense_indices(num_frames, num_samples=num_samples, stride=stride, start=start, beyond_end=beyond_end)
    assert indices.dtype == np.int64
    assert indices.tolist() == naive_dense(
        num_frames, num_samples=num_samples, stride=stride, start=start, beyond_end=beyond_end
    )


def test_known_dense() -> None:
    assert dense_indices(300, num_samples=4, stride=8, start=100).tolist() == [100, 108, 116, 124]
    assert dense_indices(10, num_samples=5, stride=3, start=2).tolist() == [2, 5, 8, 9, 9]
    assert dense_indices(10, num_samples=5, stride=3, start=2, beyond_end="loop").tolist() == [2, 5, 8, 1, 4]


def fitting_starts(num_frames: int, *, num_samples: int, stride: int) -> list[int]:
    """Every start whose clip lies within the video; [0] if it is longer."""
    return [start for start in range(num_frames) if start + (num_samples - 1) * stride <= num_frames - 1] or [0]


@given(st.integers(1, 80), st.integers(1, 12), st.integers(1, 20), st.integers(1, 5))
@example(1, 10, 16, 4)
@example(61, 3, 16, 4)  # a single place for the clip
def test_clip_starts(num_frames: int, num_clips: int, num_samples: int, stride: int) -> None:
    starts = clip_starts(num_frames, num_clips=num_clips, num_samples=num_samples, stride=stride).tolist()
    possible = fitting_starts(num_frames, num_samples=num_samples, stride=stride)
    if num_clips == 1:
        assert starts == [possible[(len(possible) - 1) // 2]]
        return
    assert starts[0] == 0 and starts[-1] == possible[-1]  # the end is included
    for clip, start in enumerate(starts):
        distances = [abs(place * (num_clips - 1) - clip * possible[-1]) for place in possible]
        nearest = [place for place in possible if distances[place] == min(distances)]
        assert start == next(place for place in nearest if len(nearest) == 1 or place % 2 == 0)


def test_known_clip_starts() -> None:
    assert clip_starts(300, num_clips=10, num_samples=16, stride=4).tolist() == [
        0, 27, 53, 80, 106, 133, 159, 186, 212, 239
    ]  # fmt: skip
    assert clip_starts(63, num_clips=5, num_samples=16, stride=4).tolist() == [0, 0, 1, 2, 2]  # 0.5 and 1.5 to even
    assert clip_starts(300, num_clips=1, num_samples=16, stride=4).tolist() == [119]


@given(st.integers(1, 100), st.integers(1, 20), st.integers(1, 9), SHARES)
@example(8, 1, 1, math.nextafter(1.0, 0.0))
def test_random_dense_start(num_frames: int, num_samples: int, stride: int, fraction: float) -> None:
    possible = fitting_starts(num_frames, num_samples=num_samples, stride=stride)
    expected = [
        start
        for place, start in enumerate(possible)
        if Fraction(place, len(possible)) <= Fraction(fraction) < Fraction(place + 1, len(possible))
    ]
    start = random_dense_start(num_frames, num_samples=num_samples, stride=stride, fraction=fraction)
    assert [start] == expected


def test_dense_functions_say_what_is_wrong() -> None:
    for name in ("num_samples", "stride"):
        counts: dict[str, Any] = {"num_samples": 2, "stride": 2} | {name: 0}
        for function, more in (
            (dense_indices, {"start": 1}),
            (clip_starts, {"num_clips": 1}),
            (random_dense_start, {"fraction": 0.0}),
        ):
            with pytest.raises(ValueError, match=f"expected {name} of at least 1, got 0"):
                function(9, **counts | more)
    with pytest.raises(ValueError, match="num_clips of at least 1"):
        clip_starts(9, num_clips=0, num_samples=2, stride=2)
    for start in (-1, 9):
        with pytest.raises(ValueError, match=r"start in \[0, 9\)"):
            dense_indices(9, num_samples=2, stride=2, start=start)
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
            random_dense_start(9, num_samples=2, stride=2, fraction=fraction)


@given(st.integers(0, 2**20), st.integers(0, 2**20), st.integers(1, 70))
def test_linspace_is_that_of_torch(start: int, stop: int, num_samples: int) -> None:
    ours = linspace_float32(start / 1024, stop=stop / 1024, num_samples=num_samples)
    assert torch.equal(torch.from_numpy(ours), torch.linspace(start / 1024, stop / 1024, num_samples))


def test_linspace_of_whole_numbers_is_that_of_torch() -> None:
    differs = 0
    for num_samples in range(1, 65):
        for frames in range(1, 400, 7):
            ours = linspace_float32(0.0, stop=float(frames - 1), num_samples=num_samples)
            assert torch.equal(torch.from_numpy(ours), torch.linspace(0, frames - 1, num_samples))
            exact = np.linspace(0, frames - 1, num_samples).astype(np.int64)
            differs += not np.array_equal(ours.astype(np.int64), exact)
    assert differs > 0  # otherwise numpy's would do
