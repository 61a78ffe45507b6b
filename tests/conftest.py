"""Fixtures shared by all tests: where the real data lies, and which missing things may be skipped."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def skip_or_fail(need: str, *, reason: str) -> None:
    """Skips for `reason`, or fails where COCA_VIDEO_REQUIRE (data,ffmpeg,chromium) names `need`."""
    if need in os.environ.get("COCA_VIDEO_REQUIRE", "").split(","):
        pytest.fail(f"COCA_VIDEO_REQUIRE names {need!r}, but {reason}")
    pytest.skip(reason)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real data: COCA_VIDEO_DATA, else the git-ignored data/ in the checkout."""
    folder = Path(os.environ.get("COCA_VIDEO_DATA") or REPOSITORY / "data")
    if not folder.is_dir():
        skip_or_fail("data", reason=f"there is no folder {folder}: set COCA_VIDEO_DATA or link data/")
    return folder


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two tar shards with 24 drawn, captioned pictures of 48 px."""
    from coca_video.synthetic import draw_pictures

    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder, num_pictures=24, seed=1, pictures_per_shard=12)
    return folder


@pytest.fixture(scope="session")
def drawn_clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifest of 20 drawn clips to train on and 10 to test on, five actions, 48 px, 16 frames."""
    from coca_video.synthetic import draw_clip_set

    return draw_clip_set(tmp_path_factory.mktemp("clips"), num_train=20, num_test=10, seed=1)
