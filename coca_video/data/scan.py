"""Which files really decode: every file opened and decoded, in parallel, with a journal that outlives a killed run.

A file name, a size and a header say little: FFmpeg opens files whose second half is missing. What was found is appended
to the journal line by line, so that 240,000 files need not be read again because the last ten were not.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

from coca_video.data.workers import WorkerFailure, parallel

Check = Literal["none", "quick", "full"]
_STRENGTH: dict[str, int] = {"none": 0, "quick": 1, "full": 2}

_READ_BYTES = 2**20


@runtime_checkable
class Bar(Protocol):
    """What shows progress: tqdm's, say."""

    def update(self, n: float | None = 1, /) -> object:
        """So many more are done."""


@runtime_checkable
class Progress(Protocol):
    """Makes a bar that counts from `initial` to `total`."""

    def __call__(self, what: str, *, total: int, initial: int = 0) -> AbstractContextManager[Bar]:
        """A bar to be used in a `with`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileCheck:
    """What was found of one file. `cause` says what is wrong, without the path; what is not known is None."""

    path: str
    status: Literal["ok", "corrupt"]
    cause: str = ""
    num_frames: int | None = None
    duration_seconds: float | None = None
    frames_per_second: float | None = None
    height: int | None = None
    width: int | None = None
    backend: str = ""
    num_bytes: int
    mtime_ns: int
    check: Check


class _Identity(NamedTuple):
    """A file as it was when it was read: if the size and the time of change are the same, so is the rest."""

    path: str
    num_bytes: int
    mtime_ns: int


def check_file(path: Path, *, check: Check) -> FileCheck:
    """Whether a video file, or a folder of images, really decodes. A bad file is an answer and no exception.

    quick: the first, the middle and the last frame. full: every frame, in order, by PyAV. none: not opened; only an
    empty or unreachable file is found out.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        cause = "its name is not UTF-8, as a manifest's are; rename it"
        return FileCheck(path=str(path), status="corrupt", cause=cause, num_bytes=0, mtime_ns=0, check=check)
    try:
        identity = _identify(path)
    except OSError as error:
        return FileCheck(path=str(path), status="corrupt", cause=_told(error), num_bytes=0, mtime_ns=0, check=check)
    found = FileCheck(**identity._asdict(), status="ok", check=check)
    if found.num_bytes == 0:
        return replace(found, status="corrupt", cause="the file is empty (0 bytes)")
    return found if check == "none" else _decode(path, found=found, check=check)


def _decode(path: Path, *, found: FileCheck, check: Literal["quick", "full"]) -> FileCheck:
    from coca_video.data.decode import UnreadableVideo, count_frames, open_video

    try:
        with open_video(path) as video:
            last = video.num_frames - 1
            if check == "quick":
                video.frames([0, video.num_frames // 2, last])
            elif path.is_dir():
                for number in range(video.num_frames):
                    video.frames([number])
            elif (num_decoded := count_frames(path)) != video.num_frames:
                cause = f"its packets tell of {video.num_frames} frames, and {num_decoded} decode"
                return replace(found, status="corrupt", cause=cause)
            timed = video.backend != "images"  # a folder of images does not say how fast they follow
            return replace(
                found,
                num_frames=video.num_frames,
                duration_seconds=float(video.duration_seconds) if timed else None,
                frames_per_second=float(video.frames_per_second) if timed else None,
                height=video.height,
                width=video.width,
                backend=video.backend,
            )
    except UnreadableVideo as error:
        return replace(found, status="corrupt", cause=str(error).removeprefix(f"{path}: "))
    except OSError as error:
        return replace(found, status="corrupt", cause=_told(error))
    except MemoryError:  # a damaged header may tell of any size
        return replace(found, status="corrupt", cause="its frames need more memory than there is")


def hash_file(path: Path) -> str:
    """BLAKE2b of all bytes of a file, or of the names and bytes of a folder's images; empty if it cannot be read."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        for file in _files_of(path):
            if file != path:
                digest.update(os.fsencode(file.name) + b"\0")
            with file.open("rb") as opened:
                while block := opened.read(_READ_BYTES):
                    digest.update(block)
    except OSError:
        return ""  # the check has already said what is wrong with this file
    return digest.hexdigest()


def check_decoder() -> None:
    """ValueError where COCA_VIDEO_DECODER names no decoder, or one that does not work here: no file would be read."""
    from coca_video.data.decode import prove
    from coca_video.data.decode.open import choose_backend

    chosen = choose_backend("auto")
    if chosen != "auto" and (cause := prove(chosen)) is not None:
        raise ValueError(f"{cause}; install or mend it, or unset COCA_VIDEO_DECODER")


def load_decoders() -> None:
    """Imports the first decoder that proves itself, so that this takes nothing of the first file's time."""
    from coca_video.data.decode import BackendName, prove

    backends: tuple[BackendName, ...] = ("torchcodec", "decord", "pyav")
    next((backend for backend in backends if prove(backend) is None), None)


def scan(
    paths: Sequence[Path],
    *,
    check: Check,
    journal: Path,
    num_workers: int,
    timeout_seconds: float,
    progress: Progress,
) -> dict[Path, FileCheck]:
    """Checks every file, in the order of `paths`; what the journal knows of a file that has not changed is not redone.

    A file that hangs a decoder for `timeout_seconds`, or kills its process, is corrupt, with that as its cause. One
    that hung is read again only when it is given more time, one that killed its process at the next run.

    Raises:
        ValueError: the decoder that COCA_VIDEO_DECODER names does not work here.
    """
    with Journal(journal) as known:
        found = {path: known.check(path, check=check, timeout_seconds=timeout_seconds) for path in paths}
        left = [path for path, one in found.items() if one is None]
        if left and check != "none":
            check_decoder()
        work = parallel(
            partial(check_file, check=check),
            left,
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            warm_up=None if check == "none" else load_decoders,
        )
        with progress("checking files", total=len(found), initial=len(found) - len(left)) as bar, closing(work):
            for path, result in work:
                found[path] = known.note_check(path, result=result, check=check, timeout_seconds=timeout_seconds)
                bar.update(1)
    return {path: one for path, one in found.items() if one is not None}


def hash_contents(
    paths: Sequence[Path], *, journal: Path, num_workers: int, timeout_seconds: float, progress: Progress
) -> dict[Path, str]:
    """The content hash of every file that can be read, in parallel; those in the journal are not read again."""
    with Journal(journal) as known:
        identities = {path: _identity_or_none(path) for path in paths}  # of before: a later change shows
        found = {path: known.content_hash(identity) for path, identity in identities.items()}
        left = [path for path, one in found.items() if not one]
        work = parallel(hash_file, left, num_workers=num_workers, timeout_seconds=timeout_seconds)
        with progress("comparing contents", total=len(found), initial=len(found) - len(left)) as bar, closing(work):
            for path, result in work:
                found[path] = known.note_hash(identities[path], result=result)
                bar.update(1)
    return {path: one for path, one in found.items() if one}


class Journal:
    """What is known of files, on disk: one JSON object a line, appended when a file is done. A context manager.

    A line counts if it is whole: the process may be killed at any byte, and what was written before stays.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._checks: dict[str, tuple[FileCheck, float | None]] = {}
        self._hashes: dict[_Identity, str] = {}

    def __enter__(self) -> "Journal":
        self._path.parent.mkdir(parents=True, exist_ok=True)
        whole_bytes = 0
        if self._path.exists():
            with self._path.open("rb") as file:
                for line in file:
                    if line.endswith(b"\n"):
                        whole_bytes += len(line)
                        self._take(line)
            os.truncate(self._path, whole_bytes)  # a torn last line would spoil the next one
        self._file = self._path.open("ab", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def check(self, path: Path, *, check: Check, timeout_seconds: float) -> FileCheck | None:
        """What is known of a file as it is now, from a check at least as strong; else None."""
        found, failed_after_seconds = self._checks.get(str(path), (None, None))
        if found is None or _STRENGTH[found.check] < _STRENGTH[check]:
            return None
        if failed_after_seconds is not None and (failed_after_seconds < timeout_seconds or found.check != check):
            return None  # what takes too long in full may be quick in part
        return found if _identity_or_none(path) == _Identity(found.path, found.num_bytes, found.mtime_ns) else None

    def content_hash(self, identity: _Identity | None) -> str:
        """The hash of a file in this state; empty if it is not known."""
        return "" if identity is None else self._hashes.get(identity, "")

    def note_check(
        self, path: Path, *, result: FileCheck | WorkerFailure, check: Check, timeout_seconds: float
    ) -> FileCheck:
        """Writes down one result; a failure of the process becomes a corrupt file."""
        if isinstance(result, FileCheck):
            self._append(asdict(result))
            return result
        identity = _identity_or_none(path) or _Identity(str(path), 0, 0)
        found = FileCheck(**identity._asdict(), status="corrupt", cause=result.cause, check=check)
        if result.timed_out:
            self._append({**asdict(found), "failed_after_seconds": timeout_seconds})
        return found

    def note_hash(self, identity: _Identity | None, *, result: str | WorkerFailure) -> str:
        """Writes down a hash; empty where there is none."""
        if isinstance(result, WorkerFailure) or not result or identity is None:
            return ""
        self._append({**identity._asdict(), "content_hash": result})
        return result

    def _take(self, line: bytes) -> None:
        try:
            record: dict[str, Any] = json.loads(line)
            if "content_hash" in record:
                content_hash = record.pop("content_hash")
                self._hashes[_Identity(**record)] = content_hash
            else:
                failed_after_seconds = record.pop("failed_after_seconds", None)
                self._checks[record["path"]] = (FileCheck(**record), failed_after_seconds)
        except (ValueError, TypeError, KeyError, AttributeError):
            return  # after a power cut, say; the worst that comes of it is that a file is read once more

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(record).encode("ascii") + b"\n"
        written = self._file.write(line)  # one system call a line
        if written != len(line):
            raise OSError(f"{self._path}: only {written} of {len(line)} bytes could be written; is the disk full?")


def _files_of(path: Path) -> list[Path]:
    """The file itself, or the images directly inside a folder, sorted by name."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if is_image(file.name))


def is_image(name: str) -> bool:
    """Whether a file of this name is a frame of a folder of frames."""
    from coca_video.data.decode.images import IMAGE_SUFFIXES  # here, since it loads torch

    return not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES


def content_bytes(path: Path) -> int | None:
    """How many bytes `hash_file` would read; None if there is no such file or folder."""
    identity = _identity_or_none(path)
    return None if identity is None else identity.num_bytes


def _identify(path: Path) -> _Identity:
    stats = [file.stat() for file in _files_of(path)]
    num_bytes, mtime_ns = sum(one.st_size for one in stats), max((one.st_mtime_ns for one in stats), default=0)
    return _Identity(path=str(path), num_bytes=num_bytes, mtime_ns=mtime_ns)


def _identity_or_none(path: Path) -> _Identity | None:
    try:
        return _identify(path)
    except OSError:  # gone, or not to be read: its check says so
        return None


def _told(error: OSError) -> str:
    return f"it cannot be read ({error.strerror or error})"
