"""Sampling as pytorchvideo does it, against itself: its samplers, its readers, the preset and clips to train on."""

import importlib.util
import math
import random
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from coca_video.data.decode import open_video, write_video
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import Manifest, VideoRow
from coca_video.data.sampling import (
    ClipTimes,
    Seconds,
    exact_rate,
    pytorchvideo_constant,
    pytorchvideo_frames,
    pytorchvideo_indices,
    pytorchvideo_random,
    pytorchvideo_uniform,
    sample_rng,
)
from coca_video.data.video import Clip, ClipConfig, VideoDataset, clip_indices
from coca_video.data.views import protocol
from tests.data.numbered_videos import encode, numbered_frame, numbers_shown

FIRST = SampleKey(epoch=0, index=0)
NTSC = Fraction(30000, 1001)


@pytest.fixture(scope="module")
def pytorchvideo() -> Iterator[SimpleNamespace]:
    """Its samplers, EncodedVideo and, from a package that today's torchvision cannot import, its subsampling."""
    with warnings.catch_warnings():
        # invalid escape sequences in its strings, reported when Python compiles them
        warnings.filterwarnings("ignore", "invalid escape sequence", DeprecationWarning)
        warnings.filterwarnings("ignore", ".*invalid escape sequence", SyntaxWarning)
        from pytorchvideo.data import clip_sampling, encoded_video

        file = Path(clip_sampling.__file__).parents[1] / "transforms" / "functional.py"
        spec = importlib.util.spec_from_file_location("pytorchvideo_functional", file)
        assert spec is not None and spec.loader is not None
        functional = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(functional)
    yield SimpleNamespace(
        make_clip_sampler=clip_sampling.make_clip_sampler,
        open_video=encoded_video.EncodedVideo.from_path,
        subsample=functional.uniform_temporal_subsample,
    )
    if "decord" in sys.modules:  # pytorchvideo makes it return torch's tensors, to whoever else reads in this thread
        sys.modules["decord"].bridge.set_bridge("native")


def all_clips(sampler: Any, duration: Seconds) -> tuple[ClipTimes, ...]:
    """As its LabeledVideoDataset calls a sampler: from 0.0, then from the end of the clip before, until the last."""
    found: list[ClipTimes] = []
    last_end: Seconds = 0.0
    while True:
        info = sampler(last_end, duration, None)
        found.append(ClipTimes(info.clip_start_sec, info.clip_end_sec))
        last_end = info.clip_end_sec
        if info.is_last_clip:
            return tuple(found)


def times(lowest: float, highest: float) -> st.SearchStrategy[Seconds]:
    """Seconds as floats and as exact fractions of whole frames at 30 and 25 a second."""
    floats = st.floats(lowest, highest)
    frames = st.tuples(st.integers(math.ceil(lowest * 30), math.floor(highest * 30)), st.sampled_from([25, 30]))
    return floats | frames.map(lambda pair: Fraction(*pair))


@given(times(0.05, 20), times(0.5, 4), st.none() | st.floats(0.1, 0.99) | st.just(Fraction(1, 2)), st.booleans())
@example(Fraction(39, 30), Fraction(32, 30), Fraction(1, 2), True)  # the example of its docstring
@example(0.04, 2.0, None, True)  # a clip longer than the video
@example(10.0, 2.0, None, True)
def test_uniform_clips_are_those_of_pytorchvideo(
    pytorchvideo: SimpleNamespace, duration: Seconds, clip: Seconds, share: Seconds | None, backpad_last: bool
) -> None:
    stride = None if share is None else clip * share
    sampler = pytorchvideo.make_clip_sampler("uniform", clip, stride, backpad_last)
    ours = pytorchvideo_uniform(duration, clip_seconds=clip, stride_seconds=stride, backpad_last=backpad_last)
    assert ours == all_clips(sampler, duration)


@given(times(0.05, 20), times(0.1, 8), st.integers(1, 12))
@example(0.04, 2.0, 5)
def test_constant_clips_are_those_of_pytorchvideo(
    pytorchvideo: SimpleNamespace, duration: Seconds, clip: Seconds, num_clips: int
) -> None:
    sampler = pytorchvideo.make_clip_sampler("constant_clips_per_video", clip, num_clips)
    ours = pytorchvideo_constant(duration, clip_seconds=clip, num_clips=num_clips)
    assert ours == all_clips(sampler, duration)
    assert len(ours) == num_clips


@given(times(0.05, 20), times(0.1, 8), st.integers(0, 2**32))
def test_random_clips_are_those_of_pytorchvideo(
    pytorchvideo: SimpleNamespace, duration: Seconds, clip: Seconds, seed: int
) -> None:
    sampler = pytorchvideo.make_clip_sampler("random", clip)
    before = random.getstate()
    random.seed(seed)
    expected = all_clips(sampler, duration)
    random.setstate(before)
    fraction = random.Random(seed).random()
    assert (pytorchvideo_random(duration, clip_seconds=clip, fraction=fraction),) == expected


@pytest.mark.parametrize(("decoder", "rate"), [("pyav", Fraction(30)), ("decord", 30.0)])
def test_frames_are_those_of_pytorchvideo(
    pytorchvideo: SimpleNamespace, decoder: str, rate: Seconds, tmp_path: Path
) -> None:
    pytest.importorskip({"pyav": "av", "decord": "decord"}[decoder], reason="decord has wheels for x86-64 only")
    path = encode(tmp_path / "a.mp4", num_frames=45)  # 1.5 s
    video = pytorchvideo.open_video(str(path), decode_audio=False, decoder=decoder)
    clips = [
        *pytorchvideo_constant(video.duration, clip_seconds=0.7, num_clips=3),
        *pytorchvideo_uniform(video.duration, clip_seconds=Fraction(8, 30), stride_seconds=Fraction(5, 30)),
        *pytorchvideo_uniform(video.duration, clip_seconds=Fraction(1, 30)),
        pytorchvideo_random(video.duration, clip_seconds=0.5, fraction=0.77),
        *pytorchvideo_uniform(video.duration, clip_seconds=2.0),
    ]
    empty = 0
    for clip in clips:
        taken = video.get_clip(*clip)["video"]
        for num_samples in (1, 4, 16):
            options: dict[str, Any] = {"frames_per_second": rate, "clip": clip, "num_samples": num_samples}
            if taken.shape[1] == 0:  # clips of one frame whose float start rounds up to the next
                empty += 1
                with pytest.raises(ValueError, match="expected a clip with a frame in it"):
                    pytorchvideo_frames(45, **options)
                continue
            shown = numbers_shown(pytorchvideo.subsample(taken, num_samples).permute(1, 0, 2, 3))
            assert pytorchvideo_frames(45, **options).tolist() == shown, (clip, num_samples)
    assert (empty > 0) == (decoder == "decord")


def test_known_pytorchvideo_frames() -> None:
    clip = ClipTimes(Fraction(1), Fraction(2))
    assert pytorchvideo_frames(300, frames_per_second=30.0, clip=clip, num_samples=4).tolist() == [30, 39, 49, 59]
    assert pytorchvideo_frames(33, frames_per_second=30.0, clip=clip, num_samples=5).tolist() == [30, 30, 31, 31, 32]
    assert pytorchvideo_frames(300, frames_per_second=25.0, clip=clip, num_samples=2).tolist() == [25, 49]
    with pytest.raises(ValueError, match=r"a clip with a frame in it, got 1.000 to 2.000 s of 30 frames"):
        pytorchvideo_frames(30, frames_per_second=30.0, clip=clip, num_samples=2)


def test_pytorchvideo_clips_say_what_is_wrong() -> None:
    for duration in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="duration_seconds above 0 and finite"):
            pytorchvideo_uniform(duration, clip_seconds=1.0)
        with pytest.raises(ValueError, match="duration_seconds above 0 and finite"):
            pytorchvideo_constant(duration, clip_seconds=1.0, num_clips=2)
    with pytest.raises(ValueError, match="clip_seconds above 0"):
        pytorchvideo_random(1.0, clip_seconds=0.0, fraction=0.5)
    with pytest.raises(ValueError, match=r"fraction in \[0, 1\)"):
        pytorchvideo_random(1.0, clip_seconds=0.5, fraction=1.0)
    with pytest.raises(ValueError, match="num_clips of at least 1"):
        pytorchvideo_constant(1.0, clip_seconds=0.5, num_clips=0)
    for stride in (0.0, 1.5):
        with pytest.raises(ValueError, match="0 < stride_seconds <= clip_seconds"):
            pytorchvideo_uniform(3.0, clip_seconds=1.0, stride_seconds=stride)


def frames_between(clip: ClipTimes, *, num_frames: int, rate: Fraction) -> list[int]:
    """Those whose time lies in the clip, asked one by one."""
    return [frame for frame in range(num_frames) if clip.start_seconds <= frame / rate < clip.end_seconds]


@given(
    st.integers(1, 400),
    st.sampled_from([Fraction(30), Fraction(25), NTSC, Fraction(15), Fraction(10), Fraction(60)]),
    st.floats(0.11, 12.0),
    st.integers(1, 10),
    st.integers(1, 20),
)
@example(300, Fraction(30), 2.13, 10, 8)
@example(20, Fraction(30), 2.13, 10, 8)  # a clip longer than the video
def test_the_preset_is_what_its_sampler_and_subsampling_give(
    pytorchvideo: SimpleNamespace, num_frames: int, rate: Fraction, clip_seconds: float, num_clips: int, samples: int
) -> None:
    rule = replace(protocol("pytorchvideo", frames_per_clip=samples), num_clips=num_clips, clip_seconds=clip_seconds)
    sampler = pytorchvideo.make_clip_sampler("constant_clips_per_video", clip_seconds, num_clips)
    expected = []
    for clip in all_clips(sampler, num_frames / rate):
        taken = torch.tensor(frames_between(clip, num_frames=num_frames, rate=rate))
        expected.append(pytorchvideo.subsample(taken.view(1, -1, 1, 1), samples).flatten().tolist())
    ours = rule.frame_indices(num_frames=num_frames, frames_per_second=float(rate))
    assert ours.tolist() == expected


@pytest.mark.parametrize("rate", [Fraction(30), Fraction(25), NTSC])
def test_the_preset_shows_the_frames_that_pytorchvideo_s_reader_gives(
    pytorchvideo: SimpleNamespace, rate: Fraction, tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    pictures = np.stack([numbered_frame(number) for number in range(90)])
    write_video(path, frames=torch.from_numpy(pictures).permute(0, 3, 1, 2), frames_per_second=float(rate))
    video = pytorchvideo.open_video(str(path), decode_audio=False, decoder="pyav")
    rule = replace(protocol("pytorchvideo"), clip_seconds=1.07)
    expected = []
    for clip in all_clips(pytorchvideo.make_clip_sampler("constant_clips_per_video", 1.07, 10), video.duration):
        taken = pytorchvideo.subsample(video.get_clip(*clip)["video"], 8)
        expected.append(numbers_shown(taken.permute(1, 0, 2, 3)))
    with open_video(path) as reader:
        indices = rule.frame_indices(num_frames=reader.num_frames, frames_per_second=reader.frames_per_second)
        assert indices.tolist() == expected
        shown = [numbers_shown(reader.frames(clip.tolist())) for clip in indices]
    assert shown == expected and len({str(clip) for clip in shown}) == 10


def test_known_frames_of_the_preset() -> None:
    """10 s at 30 a second: clips of 63.9 frames from 23.61 c on, so that clip 1 has frames 24 to 87."""
    indices = protocol("pytorchvideo").frame_indices(num_frames=300, frames_per_second=30.0)
    assert [clip[0] for clip in indices.tolist()] == [0, 24, 48, 71, 95, 119, 142, 166, 189, 213]
    assert indices[0].tolist() == [0, 9, 18, 27, 36, 45, 54, 63]
    assert indices[5].tolist() == [119, 127, 136, 145, 154, 163, 172, 181]  # 63 frames: steps of 62 / 7
    assert indices[9].tolist() == [213, 222, 231, 240, 249, 258, 267, 276]
    slow = protocol("pytorchvideo").frame_indices(num_frames=300, frames_per_second=60.0)
    assert slow[0].tolist() == [0, 18, 36, 54, 72, 90, 108, 127]  # 128 frames: steps of 127 / 7


def test_a_clip_between_two_frames_is_the_one_on_the_screen() -> None:
    """Clips of 0.1 s at 1 frame a second: from 1.45 s to 1.55 s frame 1 is shown, and pytorchvideo finds none."""
    clip = ClipTimes(Fraction(29, 20), Fraction(31, 20))
    with pytest.raises(ValueError, match="expected a clip with a frame in it"):
        pytorchvideo_frames(4, frames_per_second=Fraction(1), clip=clip, num_samples=3)
    assert pytorchvideo_indices(4, frames_per_second=Fraction(1), clip=clip, num_samples=3).tolist() == [1, 1, 1]
    late = ClipTimes(Fraction(39, 10), Fraction(4))
    assert pytorchvideo_indices(4, frames_per_second=Fraction(1), clip=late, num_samples=2).tolist() == [3, 3]
    rule = replace(protocol("pytorchvideo", frames_per_clip=1), num_clips=3, clip_seconds=0.1)
    found = rule.frame_indices(num_frames=4, frames_per_second=1.0)  # starts 0, 1.3, 2.6
    assert found.tolist() == [[0], [1], [2]]


def test_exact_rates() -> None:
    for rate in (Fraction(30), Fraction(25), NTSC, Fraction(24000, 1001), Fraction(25, 2), Fraction(60000, 1001)):
        assert exact_rate(float(rate)) == rate
    assert exact_rate(1e-5) == Fraction(1e-5)  # and not 0
    assert abs(exact_rate(29.8765432) - Fraction(29.8765432)) < Fraction(1, 10**5)


def dataset(path: Path, *, seed: int = 0, start_seconds: float | None = None, **config: Any) -> VideoDataset:
    row = VideoRow(path=path, label="one", video_id="a", start_seconds=start_seconds)
    manifest = Manifest(source=path, rows=(row,), classes=("one",))
    return VideoDataset(manifest, config=ClipConfig(num_frames=4, sampling="pytorchvideo", **config), seed=seed)


def clip_numbers(clips: VideoDataset, *, key: SampleKey = FIRST) -> list[int]:
    """The frames of a video of 30 a second, by their times."""
    clip = clips[key]
    assert isinstance(clip, Clip)
    return np.round(clip.times_seconds * 30).astype(int).tolist()


def test_training_clips_are_those_of_the_random_sampler(pytorchvideo: SimpleNamespace, tmp_path: Path) -> None:
    path = encode(tmp_path / "a.mp4", num_frames=60)
    clips = dataset(path, seed=3, clip_seconds=0.73, image_size=32, augment=True)
    sampler = pytorchvideo.make_clip_sampler("random", 0.73)
    starts = set()
    for epoch in range(25):
        rng = sample_rng(seed=3, epoch=epoch, index=0, purpose="clip start")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(random, "uniform", lambda low, high, rng=rng: low + (high - low) * float(rng.random()))
            (clip,) = all_clips(sampler, Fraction(2))
        taken = torch.tensor(frames_between(clip, num_frames=60, rate=Fraction(30)))
        expected = pytorchvideo.subsample(taken.view(1, -1, 1, 1), 4).flatten().tolist()
        assert clip_numbers(clips, key=SampleKey(epoch=epoch, index=0)) == expected
        starts.add(expected[0])
    assert len(starts) > 10  # of the 39 that there are


def test_without_augmentation_the_clip_lies_in_the_middle(tmp_path: Path) -> None:
    """2 s, a clip of 0.5 s: from 0.75 s on, frames 23 (22.5) to 37. Of the second half: from 1.25 s, 38 to 52."""
    path = encode(tmp_path / "a.mp4", num_frames=60)
    assert clip_numbers(dataset(path, clip_seconds=0.5)) == [23, 27, 32, 37]  # 14 / 3 apart
    assert clip_numbers(dataset(path, clip_seconds=0.5, start_seconds=1.0)) == [38, 42, 47, 52]
    assert clip_numbers(dataset(path, clip_seconds=1.0)) == [15, 24, 34, 44]
    assert clip_numbers(dataset(path, clip_seconds=9.0)) == [0, 19, 39, 59]  # longer than the video
    options: dict[str, Any] = {"config": dataset(path, clip_seconds=0.5).config, "seed": 0, "key": FIRST}
    assert clip_indices(60, frames_per_second=30.0, **options).tolist() == [23, 27, 32, 37]
    # 6 s: from 2.75 s on, frames 28 (27.5) to 32
    assert clip_indices(60, frames_per_second=10.0, **options).tolist() == [28, 29, 30, 32]


def test_clip_seconds_that_do_nothing_or_are_missing_are_a_sentence() -> None:
    with pytest.raises(ValueError, match='clip_seconds of 2 do nothing with sampling "uniform"; take "pytorchvideo"'):
        ClipConfig(clip_seconds=2.0)
    with pytest.raises(ValueError, match='clip_seconds of 2 do nothing with sampling "dense"'):
        ClipConfig(sampling="dense", stride=2, clip_seconds=2.0)
    for seconds in (None, 0.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"needs clip_seconds above 0 and finite, got {seconds}"):
            ClipConfig(sampling="pytorchvideo", clip_seconds=seconds)
    with pytest.raises(ValueError, match='a stride of 4 does nothing with sampling "pytorchvideo"; take "dense"'):
        ClipConfig(sampling="pytorchvideo", clip_seconds=2.0, stride=4)
