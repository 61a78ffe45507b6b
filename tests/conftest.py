"""Fixtures shared by all tests: where the real data lies, and which missing things may be skipped."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]


def skip_or_fail(need: str, *, reason: str) -> None:
    """Skips for `reason`, unless COCA_VIDEO_REQUIRE (comma separated: data,ffmpeg,chromium) names `need`: then fails."""
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
