"""Readers where they live: thousands of opens, workers by fork and spawn, bytes and open files, files that vanish."""

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from coca_video.data.decode import UnreadableVideo, VideoReader, open_video, prove
from tests.conftest import REPOSITORY, skip_or_fail
from tests.data.numbered_videos import encode, numbers_shown, sequential, stack

BACKENDS = ("torchcodec", "decord", "pyav", "auto")
ORDER = [59, 0, 31, 30, 31, 7]
MIB = 2**20

# One process of its own for a backend: what another one keeps must not count. 500 opens fill every cache and pool.
OPEN_OFTEN = """
import os, sys
from pathlib import Path
from coca_video.data.decode import open_video

def resident_bytes():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

path, backend, kind = sys.argv[1:]
data = Path(path).read_bytes()
for number in range(2000):
    if number == 500:
        before = resident_bytes()
    with open_video(data if kind == "bytes" else path, backend=backend) as reader:
        reader.frames([59, 0, 30])
print(resident_bytes() - before)
"""


@pytest.fixture(autouse=True)
def no_choice_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCA_VIDEO_DECODER", raising=False)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each backend that works here."""
    if request.param != "auto" and (cause := prove(request.param)) is not None:
        skip_or_fail("ffmpeg" if request.param == "torchcodec" else "decord", reason=cause)
    return request.param


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return encode(tmp_path / "numbered.mp4", height=96, width=128)


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["path", "bytes"])
def test_two_thousand_opens_keep_no_memory(path: Path, backend: str, kind: str) -> None:
    # 1,500 opens within 20 MB: 13 kB each, less than the 18 kB of one frame's pixels.
    command = [sys.executable, "-c", OPEN_OFTEN, str(path), backend, kind]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 20 * MIB


class Frames(Dataset):
    """Sample n is frame n, by a reader of its own."""

    def __init__(self, path: Path, *, backend: str) -> None:
        self.path, self.backend = path, backend

    def __len__(self) -> int:
        return len(ORDER)

    def __getitem__(self, place: int) -> torch.Tensor:
        with open_video(self.path, backend=self.backend) as reader:
            return reader.frames([ORDER[place]])[0]


@pytest.mark.drill
@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(path: Path, backend: str, start: str) -> None:
    frames = Frames(path, backend=backend)
    here = torch.stack([frames[place] for place in range(len(ORDER))])  # first: a fork inherits libraries in use
    loader = DataLoader(frames, batch_size=2, num_workers=2, multiprocessing_context=start, timeout=120)
    there = torch.cat(list(loader))
    assert numbers_shown(there) == ORDER
    assert torch.equal(there, here)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_bytes_and_open_files_give_what_the_path_gives(tmp_path: Path, backend: str, suffix: str) -> None:
    if suffix == ".avi" and backend in ("torchcodec", "decord"):
        pytest.skip("these refuse MPEG-4 in AVI, as tests/data/test_exact.py shows")
    path = encode(tmp_path / f"numbered{suffix}", codec="mpeg4" if suffix == ".avi" else "libx264", b_frames=0)
    expected = stack(sequential(path), ORDER)
    with path.open("rb") as file:
        file.seek(100)  # wherever it stands
        for source in (path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), file):
            with open_video(source, backend=backend) as reader:
                assert reader.num_frames == 60
                assert torch.equal(reader.frames(ORDER), expected)


def test_bytes_that_are_no_video_name_their_kind(backend: str) -> None:
    for data in (b"", b"no video at all\n" * 50):
        with pytest.raises(UnreadableVideo, match=r"^the bytes given: "):
            open_video(data, backend=backend)
        with pytest.raises(UnreadableVideo, match=r"^the file object given: "):
            open_video(io.BytesIO(data), backend=backend)


CHANGES: dict[str, Callable[[Path], object]] = {
    "removed": Path.unlink,
    "emptied": lambda path: os.truncate(path, 0),
    "cut": lambda path: os.truncate(path, path.stat().st_size // 3),
    "replaced": lambda path: path.with_name("text").rename(path),
}


def frames_or_cause(reader: VideoReader, *, indices: list[int]) -> torch.Tensor | str:
    """The frames, or why they cannot be read."""
    try:
        return reader.frames(indices)
    except UnreadableVideo as error:
        return str(error)


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, backend: str, change: str) -> None:
    # Noise: 60 frames of some 20 kB each, more than any decoder has read ahead.
    noise = torch.randint(
        0, 256, (60, 96, 128, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    ).numpy()
    path = encode(tmp_path / "noise.mp4", height=96, width=128, draw=lambda number: noise[number], options={"crf": "5"})
    (tmp_path / "text").write_text("another file under the old name\n" * 100)
    expected = stack(sequential(path), range(60))
    with open_video(path, backend=backend) as reader:
        assert torch.equal(reader.frames([0])[0], expected[0])
        CHANGES[change](path)
        found = frames_or_cause(reader, indices=[59, 58, 3])
    if isinstance(found, str):
        assert found.startswith(f"{path}: ") and "\n" not in found
    else:  # the file was still open, or read ahead
        assert torch.equal(found, expected[[59, 58, 3]])
    if change == "removed":
        with pytest.raises(UnreadableVideo, match="there is no such file"):
            open_video(path, backend=backend)


def test_closing_twice_and_reading_two_at_once(path: Path, backend: str) -> None:
    expected = stack(sequential(path), ORDER)
    first, second = open_video(path, backend=backend), open_video(path, backend=backend)
    for place, number in enumerate(ORDER):  # one reader's seek must not move the other
        assert torch.equal(first.frames([number])[0], expected[place])
        assert torch.equal(second.frames([ORDER[-1 - place]])[0], expected[-1 - place])
    first.close()
    first.close()
    assert torch.equal(second.frames(ORDER), expected)
    second.close()
