"""Many videos to H.264 files for fast random access: planned up front, in parallel, resumable, originals untouched."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from coca_video.data.decode.source import UnreadableVideo
from coca_video.data.decode.write import PARTIAL_PREFIX, TranscodeConfig, transcode_video
from coca_video.data.layout import find_videos
from coca_video.data.manifest import CLASSES_FILE, VIDEO_SUFFIXES, Manifest, read_manifest, write_manifest
from coca_video.data.workers import WorkerFailure, parallel

JOURNAL = "transcode.jsonl"
MANIFEST = "manifest.csv"
_JOURNAL_KEYS = frozenset({"target", "source", "source_bytes", "source_mtime_ns", "settings", "num_bytes"})


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video and the file to be made of it."""

    source: Path
    target: Path


@dataclass(frozen=True, kw_only=True)
class TranscodePlan:
    """What is to be done; nothing is written yet. `base` is what source paths are relative to in the journal.

    `classes` is the classes.txt of a folder, to be copied.
    """

    base: Path
    out: Path
    jobs: tuple[Job, ...]
    manifest: Manifest | None
    classes: Path | None = None


@dataclass(kw_only=True)
class TranscodeReport:
    """What came of it. bytes_in, bytes_out: of the files done now, not of those that were there."""

    num_done: int = 0
    num_kept: int = 0
    bytes_in: int = 0
    bytes_out: int = 0
    unreadable: dict[Path, str] = field(default_factory=dict)
    """The cause of each, which names the file."""


def plan_transcode(source: Path, *, out: Path) -> TranscodePlan:
    """Finds the videos of a folder (any depth) or of a manifest, and their places below `out`: same layout, .mp4.

    One video alone becomes a file in `out`, which may then lie beside it.

    Raises:
        ValueError: there are no videos; two would get one name; `out` would put files among the originals, or over
            files that this command did not write.
    """
    base, manifest, classes = source.absolute(), None, None
    if source.is_dir():
        paths = [base / path for path in find_videos(source).videos]
        if not paths:
            raise ValueError(f"{source} holds no video files; expected {', '.join(sorted(VIDEO_SUFFIXES))}.")
        originals = {base}
        classes = base / CLASSES_FILE if (base / CLASSES_FILE).is_file() else None
    elif not source.is_file():
        raise ValueError(f"There is no folder or manifest {source}, and no video of that name.")
    elif source.suffix.lower() in VIDEO_SUFFIXES:
        paths, originals, base = [base], set[Path](), base.parent
    else:
        manifest = read_manifest(source)
        paths = _files_of(manifest)
        originals = {path.parent for path in paths}
        above, folder = Path(os.path.commonpath(originals)), source.parent.resolve()
        if not folder.is_relative_to(above):  # else what they share says little: the folder of a project, or "/"
            originals = {above}
        base = folder if above.is_relative_to(folder) else above
        if out.resolve() == folder:
            raise ValueError(f"--out {out} is the folder of {source} itself; choose another.")
    target = out.resolve()
    for inside in sorted(originals):
        if target.is_relative_to(inside.resolve()):
            raise ValueError(f"--out {out} lies inside {inside}, among the originals; choose a folder elsewhere.")
    jobs = [Job(source=path, target=(out / path.relative_to(base)).with_suffix(".mp4")) for path in paths]
    _check_targets(jobs, out=out)
    return TranscodePlan(base=base, out=out, jobs=tuple(jobs), manifest=manifest, classes=classes)


def run_transcode(
    plan: TranscodePlan,
    *,
    config: TranscodeConfig,
    num_workers: int,
    timeout_seconds: float,
    on_done: Callable[[TranscodeReport], object],
) -> TranscodeReport:
    """Transcodes what is missing, or whose source or settings changed since the journal's entry; then the manifest.

    Each file, and the line of the journal that tells of it, appears whole or not at all, whatever ends the process.
    `on_done` is called after each file. Files that cannot be read are listed and left out of the new manifest.

    Raises:
        ValueError: another process is writing to the same folder.
        OSError: the disk is full, or what else keeps files from being written.
    """
    plan.out.mkdir(parents=True, exist_ok=True)
    report = TranscodeReport()
    with _locked_journal(plan.out / JOURNAL) as journal:
        done = _read_journal(plan.out / JOURNAL)
        todo = []
        for job in plan.jobs:
            if _is_done(job, entry=done.get(_name(job, plan=plan)), plan=plan, config=config):
                report.num_kept += 1
                on_done(report)
            else:
                todo.append(job)
        work = partial(_transcode_one, config=config)
        results = parallel(work, todo, num_workers=num_workers, timeout_seconds=timeout_seconds)
        with closing(results):
            for job, result in results:
                _note(job, result, report=report, plan=plan, config=config, journal=journal)
                on_done(report)
    _write_lists(plan, report=report)
    return report


def _files_of(manifest: Manifest) -> list[Path]:
    """The video files of its rows, each once, in order."""
    files = dict[Path, None]()
    for row in manifest.rows:
        if isinstance(row.path, str):
            raise ValueError(f"{manifest.source} names {row.path}, a URL; transcode reads files: fetch it first.")
        files[row.path] = None
    return list(files)


def _check_targets(jobs: Sequence[Job], *, out: Path) -> None:
    """No target twice, none in a folder of originals (by links either), none over a file of somebody else."""
    by_target: dict[Path, Path] = {}
    for job in jobs:
        if job.target in by_target:
            raise ValueError(
                f"{by_target[job.target]} and {job.source} would both become {job.target}; rename one of them."
            )
        by_target[job.target] = job.source
    folders = {path for job in jobs for path in (job.source.parent, job.target.parent)}
    parents = {path: path.resolve() for path in folders}
    originals = {job.source.resolve().parent if job.source.is_symlink() else parents[job.source.parent] for job in jobs}
    ours = (out / JOURNAL).is_file()
    for job in jobs:
        if parents[job.target.parent] in originals:
            raise ValueError(f"{job.target} would lie among the originals; choose another --out.")
        if not ours and job.target.exists():
            raise ValueError(f"{job.target} is there, and not by this command; choose an empty folder as --out.")


def _name(job: Job, *, plan: TranscodePlan) -> str:
    return job.target.relative_to(plan.out).as_posix()


def _source_name(job: Job, *, plan: TranscodePlan) -> str:
    return Path(os.path.relpath(job.source, plan.base)).as_posix()


def _is_done(job: Job, *, entry: Mapping[str, Any] | None, plan: TranscodePlan, config: TranscodeConfig) -> bool:
    if entry is None or not job.source.is_file() or not job.target.is_file():
        return False
    status = job.source.stat()
    found = (_source_name(job, plan=plan), status.st_size, status.st_mtime_ns, asdict(config))
    noted = tuple(entry[key] for key in ("source", "source_bytes", "source_mtime_ns", "settings"))
    return found == noted and job.target.stat().st_size == entry["num_bytes"]


def _transcode_one(job: Job, *, config: TranscodeConfig) -> dict[str, Any] | str:
    """The facts for the journal, or the cause; the source's state is taken before, so that a later change shows."""
    if job.source.is_dir():
        return f"{job.source}: a folder of images, which is not transcoded"
    job.target.parent.mkdir(parents=True, exist_ok=True)
    try:
        status = job.source.stat()
    except OSError as error:
        return f"{job.source}: {(error.strerror or 'it cannot be opened').lower()}"
    try:
        written = transcode_video(job.source, out=job.target, config=config)
    except UnreadableVideo as error:
        return str(error)
    return {"source_bytes": status.st_size, "source_mtime_ns": status.st_mtime_ns, **asdict(written)}


def _note(
    job: Job,
    result: dict[str, Any] | str | WorkerFailure,
    *,
    report: TranscodeReport,
    plan: TranscodePlan,
    config: TranscodeConfig,
    journal: IO[str],
) -> None:
    if isinstance(result, dict):
        entry = {"target": _name(job, plan=plan), "source": _source_name(job, plan=plan), "settings": asdict(config)}
        journal.write(json.dumps(entry | result) + "\n")
        journal.flush()
        report.num_done += 1
        report.bytes_in += result["source_bytes"]
        report.bytes_out += result["num_bytes"]
        return
    cause = f"{job.source}: {result.cause}" if isinstance(result, WorkerFailure) else result
    report.unreadable[job.source] = cause
    job.target.unlink(missing_ok=True)  # of an earlier state of the source


@contextmanager
def _locked_journal(path: Path) -> Iterator[IO[str]]:
    """The journal, to append to, while no other process of this kind writes to its folder."""
    with path.open("a", encoding="utf-8") as journal:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the system, even after kill -9
            except BlockingIOError as error:
                raise ValueError(f"{path.parent}: another process is transcoding into it; wait for it.") from error
        text = path.read_bytes()
        if text and not text.endswith(b"\n"):  # a kill cut off its last line
            journal.write("\n")
        _remove_halves(path.parent)  # of an earlier process that was killed
        try:
            yield journal
        finally:
            _remove_halves(path.parent)  # of our own that took too long


def _remove_halves(folder: Path) -> None:
    for half in folder.rglob(f"{PARTIAL_PREFIX}*"):
        half.unlink(missing_ok=True)


def _read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The last entry of each target; a line that a kill cut off counts for nothing."""
    entries = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(entry, dict) and set(entry) >= _JOURNAL_KEYS:  # else of another version, or spoiled
            entries[entry["target"]] = entry
    return entries


def _write_lists(plan: TranscodePlan, *, report: TranscodeReport) -> None:
    """manifest.csv with the new paths and classes.txt; of a folder, its classes.txt if it has one."""
    if plan.manifest is None:
        if plan.classes is not None:
            shutil.copyfile(plan.classes, plan.out / CLASSES_FILE)
        return
    targets = {job.source: job.target for job in plan.jobs if job.source not in report.unreadable}
    rows = [
        replace(row, path=targets[row.path])
        for row in plan.manifest.rows
        if isinstance(row.path, Path) and row.path in targets
    ]
    if rows:
        write_manifest(plan.out / MANIFEST, rows=rows, classes=plan.manifest.classes)
    else:
        (plan.out / MANIFEST).unlink(missing_ok=True)  # an earlier run's would name files that are gone
