"""Checks of real files, good and bad, and a journal that a killed run leaves in order."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coca_video.data import decode as decode_package
from coca_video.data.decode import write_video
from coca_video.data.scan import FileCheck, Journal, check_file, content_bytes, hash_contents, hash_file, scan
from coca_video.data.workers import WorkerFailure

PATIENCE = 600.0


class CountedBar:
    """Counts what a progress bar would show."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int]] = []
        self.updates = 0

    @contextmanager
    def __call__(self, what: str, *, total: int, initial: int = 0) -> Iterator["CountedBar"]:
        self.made.append((what, initial, total))
        yield self

    def update(self, n: float | None = 1, /) -> None:
        self.updates += int(n or 0)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 frames at 15 a second, 48 px wide and 32 high."""
    frames = torch.randint(0, 255, (30, 3, 32, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, frames=frames, frames_per_second=15.0)
    return path


def a_scan(folder: Path, paths: list[Path], **changes: Any) -> tuple[dict[Path, FileCheck], CountedBar]:
    bar = CountedBar()
    options = {"check": "none", "num_workers": 1, "timeout_seconds": PATIENCE, **changes}
    return scan(paths, journal=folder / "scan.jsonl", progress=bar, **options), bar


def lines(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()]


@pytest.fixture(autouse=True)
def _no_choice_by_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COCA_VIDEO_DECODER", raising=False)


@pytest.mark.parametrize("check", ["quick", "full"])
def test_a_good_file_is_told_with_its_numbers(check: Any, clip: Path) -> None:
    found = check_file(clip, check=check)
    assert (found.status, found.cause, found.check, found.path) == ("ok", "", check, str(clip))
    assert (found.num_frames, found.duration_seconds, found.frames_per_second) == (30, 2.0, 15.0)
    assert (found.height, found.width, found.num_bytes) == (32, 48, clip.stat().st_size)
    assert found.backend in {"torchcodec", "decord", "pyav"}


def test_without_a_check_a_file_is_not_opened(tmp_path: Path) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    found = check_file(text, check="none")
    assert (found.status, found.num_frames, found.duration_seconds, found.num_bytes) == ("ok", None, None, 8)
    text.write_text("")
    assert check_file(text, check="none").cause == "the file is empty (0 bytes)"


def test_bad_files_are_corrupt_with_a_cause_that_leaves_out_the_path(clip: Path, tmp_path: Path) -> None:
    cut, empty, text = (tmp_path / name for name in ("cut.mp4", "empty.mp4", "text.mp4"))
    cut.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    empty.touch()
    text.write_text("<html>Video unavailable</html>\n" * 50)
    expected = {
        cut: "not a video file",
        empty: "the file is empty (0 bytes)",
        text: "not a video file",
        tmp_path / "gone.mp4": "it cannot be read (No such file or directory)",
    }
    for path, cause in expected.items():
        for check in ("quick", "full"):
            found = check_file(path, check=check)
            assert found.status == "corrupt" and cause in found.cause and str(tmp_path) not in found.cause
            assert (found.num_frames, found.backend) == (None, "")


def test_a_folder_of_images_is_one_video_of_unknown_rate(tmp_path: Path) -> None:
    for index in range(5):
        Image.new("RGB", (24, 16), (index, 0, 0)).save(tmp_path / f"img_{index}.png")
    found = check_file(tmp_path, check="quick")
    assert (found.status, found.num_frames, found.height, found.width) == ("ok", 5, 16, 24)
    assert (found.duration_seconds, found.frames_per_second, found.backend) == (None, None, "images")
    assert found.num_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    (tmp_path / "img_3.png").write_bytes(b"no image")  # neither first, nor middle, nor last
    assert check_file(tmp_path, check="quick").status == "ok"
    assert "img_3.png" in check_file(tmp_path, check="full").cause


def test_a_name_that_is_not_utf8_is_a_cause(clip: Path, tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4"))
    shutil.copy(clip, path)
    found = check_file(path, check="quick")
    assert (found.status, found.cause) == ("corrupt", "its name is not UTF-8, as a manifest's are; rename it")


def test_what_each_check_decodes(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    decode = decode_package.VideoReader.frames

    def counting(reader: Any, indices: Any) -> Any:
        asked.append(list(indices))
        return decode(reader, indices)

    monkeypatch.setattr(decode_package.VideoReader, "frames", counting)
    check_file(clip, check="quick")
    assert asked[0] == [0, 15, 29]
    monkeypatch.setattr(decode_package, "count_frames", lambda path: 29)
    found = check_file(clip, check="full")
    assert (found.status, found.cause) == ("corrupt", "its packets tell of 30 frames, and 29 decode")


def test_hashes_are_those_of_hashlib(clip: Path, tmp_path: Path) -> None:
    assert hash_file(clip) == hashlib.blake2b(clip.read_bytes(), digest_size=16).hexdigest()
    assert hash_file(tmp_path / "gone.mp4") == ""
    for name in ("b.jpg", "a.jpg", "notes.txt"):
        (tmp_path / name).write_text(name)
    assert hash_file(tmp_path) == hashlib.blake2b(b"a.jpg\0a.jpgb.jpg\0b.jpg", digest_size=16).hexdigest()
    assert (content_bytes(clip), content_bytes(tmp_path)) == (clip.stat().st_size, 10)
    assert content_bytes(tmp_path / "gone.mp4") is None


def test_frames_larger_than_memory_are_the_files_fault(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(decode_package.VideoReader, "frames", too_large)
    found = check_file(clip, check="quick")
    assert (found.status, found.cause) == ("corrupt", "its frames need more memory than there is")


@pytest.mark.parametrize(("named", "message"), [("ffmpeg", "is 'ffmpeg'; expected one of"), ("decord", "has gone")])
def test_a_decoder_that_does_not_work_is_told_before_any_process_starts(
    named: str, message: str, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COCA_VIDEO_DECODER", named)
    monkeypatch.setattr(decode_package, "prove", lambda backend: f"{backend} has gone")
    with pytest.raises(ValueError, match=message):
        a_scan(tmp_path, [clip], check="quick")
    assert (tmp_path / "scan.jsonl").read_bytes() == b""
    found, _ = a_scan(tmp_path, [clip], check="none")  # which needs no decoder
    assert found[clip].status == "ok"


@pytest.mark.slow
def test_what_was_done_is_not_done_again_unless_the_file_changed_or_more_is_asked(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(6)]
    for path in paths:
        path.write_text(path.name)
    found, bar = a_scan(tmp_path, paths)
    assert list(found) == paths and {one.num_bytes for one in found.values()} == {5}
    assert (bar.made, bar.updates) == ([("checking files", 0, 6)], 6)
    again, bar = a_scan(tmp_path, paths)
    assert again == found and (bar.made, bar.updates) == ([("checking files", 6, 6)], 0)

    paths[0].write_text("longer than before")
    os.utime(paths[1], ns=(1, 1))
    changed, bar = a_scan(tmp_path, paths)
    assert (bar.made, bar.updates) == ([("checking files", 4, 6)], 2)
    assert (changed[paths[0]].num_bytes, changed[paths[1]].mtime_ns) == (18, 1)

    stronger, bar = a_scan(tmp_path, paths[:2], check="quick")
    assert bar.updates == 2 and [one.status for one in stronger.values()] == ["corrupt"] * 2
    weaker, bar = a_scan(tmp_path, paths[:2], check="none")
    assert bar.updates == 0 and weaker == stronger
    assert len(lines(tmp_path / "scan.jsonl")) == 6 + 2 + 2


def test_a_journal_cut_at_any_byte_costs_one_line_at_most(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.mp4" for number in range(3)]
    for path in paths:
        path.write_text(path.name)
    a_scan(tmp_path, paths)
    journal = tmp_path / "scan.jsonl"
    whole = journal.read_bytes()
    for size in range(len(whole) + 1):
        journal.write_bytes(whole[:size])
        with Journal(journal) as known:
            remembered = sum(known.check(path, check="none", timeout_seconds=PATIENCE) is not None for path in paths)
        assert remembered == whole[:size].count(b"\n")
        assert journal.read_bytes() == whole[: whole.rfind(b"\n", 0, size) + 1]  # the next line starts on its own


def test_lines_that_say_nothing_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("a")
    found, _ = a_scan(tmp_path, [path])
    journal = tmp_path / "scan.jsonl"
    journal.write_bytes(b'\0\0\0\n[]\n{}\n7\n{"path": "x", "colour": 1}\n' + journal.read_bytes())
    again, bar = a_scan(tmp_path, [path])
    assert again == found and bar.updates == 0


@pytest.mark.drill
def test_a_file_that_takes_too_long_is_tried_again_only_with_more_time(clip: Path, tmp_path: Path) -> None:
    found, _ = a_scan(tmp_path, [clip], check="quick", timeout_seconds=1e-6)
    assert (found[clip].status, found[clip].cause) == ("corrupt", "took longer than 1e-06 s")
    _, bar = a_scan(tmp_path, [clip], check="quick", timeout_seconds=1e-6)
    assert bar.updates == 0
    found, bar = a_scan(tmp_path, [clip], check="quick")
    assert (found[clip].status, bar.updates) == ("ok", 1)


def test_what_takes_too_long_in_full_may_be_quick_in_part(clip: Path, tmp_path: Path) -> None:
    failure = WorkerFailure(cause="took longer than 60 s", timed_out=True)
    with Journal(tmp_path / "scan.jsonl") as known:
        known.note_check(clip, result=failure, check="full", timeout_seconds=60.0)
    with Journal(tmp_path / "scan.jsonl") as known:
        remembered = {
            check: known.check(clip, check=check, timeout_seconds=60.0) for check in ("none", "quick", "full")
        }
    assert [check for check, found in remembered.items() if found is not None] == ["full"]


def test_hashes_are_kept_until_the_file_changes(tmp_path: Path) -> None:
    path, gone = tmp_path / "a.mp4", tmp_path / "gone.mp4"
    path.write_text("a")

    def hashes() -> tuple[dict[Path, str], int]:
        bar = CountedBar()
        journal = tmp_path / "scan.jsonl"
        options = {"num_workers": 1, "timeout_seconds": PATIENCE, "progress": bar}
        return hash_contents([path, gone], journal=journal, **options), bar.updates  # type: ignore[arg-type]

    digest = hashlib.blake2b(b"a", digest_size=16).hexdigest()
    assert hashes() == ({path: digest}, 2)
    assert hashes() == ({path: digest}, 1)  # the one that cannot be read is tried again
    path.write_text("bc")
    assert hashes() == ({path: hashlib.blake2b(b"bc", digest_size=16).hexdigest()}, 2)


class ShortFile:
    """Takes a byte less than it is given."""

    def write(self, line: bytes) -> int:
        return len(line) - 1

    def close(self) -> None: ...

    def __enter__(self) -> "ShortFile":
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.mark.parametrize(
    ("file", "message"),
    [(partial(open, "/dev/full", "ab", buffering=0), "No space left"), (ShortFile, "is the disk full")],
)
def test_a_full_disk_is_an_error(file: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_text("a")
    found = check_file(path, check="none")
    with Journal(tmp_path / "scan.jsonl") as known:
        known._file.close()
        with file() as known._file, pytest.raises(OSError, match=message):
            known.note_check(path, result=found, check="none", timeout_seconds=1.0)


SCRIPT = """
import sys
from pathlib import Path
from contextlib import contextmanager
from functools import partial
from coca_video.data.scan import scan

class Bar:
    def update(self, n=1, /): ...

@contextmanager
def progress(what, *, total, initial=0):
    print(initial, flush=True)
    yield Bar()

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    found = scan(
        sorted(folder.glob("*.mp4")), check="quick", journal=folder / "scan.jsonl", num_workers=2,
        timeout_seconds=600.0, progress=progress,
    )
    print(sum(one.status == "ok" for one in found.values()))
"""


@pytest.mark.drill
def test_a_scan_killed_in_the_middle_goes_on_where_it_was(clip: Path, tmp_path: Path) -> None:
    for number in range(200):
        shutil.copyfile(clip, tmp_path / f"{number:03d}.mp4")
    script, journal = tmp_path / "script.py", tmp_path / "scan.jsonl"
    script.write_text(SCRIPT)
    first = subprocess.Popen([sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE)
    end = time.monotonic() + 120
    while time.monotonic() < end and (not journal.exists() or journal.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert first.returncode == -signal.SIGKILL
    done = journal.read_bytes().count(b"\n")
    assert 20 <= done < 200
    out = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], stdout=subprocess.PIPE, check=True, timeout=300
    ).stdout
    assert out.split() == [str(done).encode(), b"200"]  # what was done is not read again, and nothing is lost
    paths = [line["path"] for line in lines(journal)]
    assert len(paths) == len(set(paths)) == 200
