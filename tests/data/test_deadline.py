"""A clip that takes too long is given up, named, and the rest goes on."""

import threading
from pathlib import Path

import pytest

from coca_video.data import video
from coca_video.data.deadline import within
from coca_video.data.decode import UnreadableVideo, open_video
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import read_manifest
from coca_video.data.video import Clip, ClipConfig, VideoDataset


def test_what_returns_in_time_and_what_does_not() -> None:
    never = threading.Event()
    assert within(60.0, lambda: 7, name="a.mp4") == 7
    assert within(float("inf"), lambda: 8, name="a.mp4") == 8
    with pytest.raises(UnreadableVideo, match=r"^a\.mp4: reading it takes longer than 0\.05 s"):
        within(0.05, never.wait, name="a.mp4")
    never.set()


def test_errors_and_interrupts_come_through() -> None:
    def fail(error: BaseException) -> None:
        raise error

    for error in (UnreadableVideo("a.mp4: cut off"), KeyboardInterrupt("stop"), ZeroDivisionError()):
        with pytest.raises(type(error)) as caught:
            within(60.0, lambda error=error: fail(error), name="a.mp4")
        assert caught.value is error


def test_a_data_set_goes_on_behind_a_clip_that_hangs(drawn_clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read_manifest(drawn_clips).select(split="test")
    hanging, never = manifest.rows[1].path, threading.Event()

    def open_or_hang(source: Path, **options: object) -> object:
        if source == hanging:
            never.wait()
        return open_video(source, **options)

    monkeypatch.setattr(video, "open_video", open_or_hang)
    config = ClipConfig(num_frames=2, image_size=16, timeout_seconds=2.0)
    dataset = VideoDataset(manifest, config=config, seed=0)
    samples = [dataset[SampleKey(0, index)] for index in range(3)]
    assert isinstance(samples[0], Clip) and isinstance(samples[2], Clip)
    cause = f"{hanging}: reading it takes longer than 2 s; it was given up"
    assert samples[1] == Unreadable(key=manifest.rows[1].video_id, cause=cause)
    never.set()


def test_a_limit_must_be_positive() -> None:
    with pytest.raises(ValueError, match="timeout_seconds above 0, got 0"):
        ClipConfig(timeout_seconds=0.0)
