"""What `coca-video prepare` found, as a table of every clip, a summary of counts, and sentences."""

import csv
import io
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from coca_video.data.leaks import Leak
from coca_video.data.manifest import COLUMNS, VideoRow, write_manifest
from coca_video.data.recipe import Entry
from coca_video.data.scan import FileCheck

SCAN_FILE, LEAKS_FILE, SUMMARY_FILE, MANIFEST_FILE = "scan.csv", "leaks.csv", "summary.json", "manifest.csv"
_CHECK_COLUMNS = (
    "num_frames", "duration_seconds", "frames_per_second", "height", "width", "backend", "num_bytes",
)  # fmt: skip
SCAN_COLUMNS = (
    "video_id", "label", "split", "status", "cause", "path", *_CHECK_COLUMNS, "content_hash", "same_content_as",
)  # fmt: skip
NAMES_SHOWN = 3

Status = Literal["ok", "short", "corrupt", "missing", "duplicate_id", "extra"]


@dataclass(frozen=True, kw_only=True)
class ScanRow:
    """One clip of the list with its file, or one file more.

    status: ok; short (of fewer seconds than it should have); corrupt; missing; duplicate_id: another file of a clip
    that has one; extra: a file of no clip. `path` is relative to the folder of videos, empty if missing.
    `same_content_as` is the `name` of the first row whose file has the same bytes.
    """

    entry: Entry | None
    status: Status
    cause: str = ""
    path: str = ""
    check: FileCheck | None = None
    content_hash: str = ""
    same_content_as: str = ""

    @property
    def name(self) -> str:
        """For messages: the clip's id, or the path of a file that is none or one too many."""
        return self.path if self.entry is None or self.status == "duplicate_id" else self.entry.video_id

    def cells(self) -> list[str]:
        """The row of scan.csv."""
        entry, check = self.entry, self.check
        clip = [entry.video_id, entry.label or "", entry.split] if entry is not None else ["", "", ""]
        numbers = ["" if check is None else _cell(getattr(check, name)) for name in _CHECK_COLUMNS]
        return [*clip, self.status, self.cause, self.path, *numbers, self.content_hash, self.same_content_as]


def _cell(value: int | float | str | None) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """Everything that was found. `official` holds the official number of clips of the splits that are listed.

    `is_list` is False where no list was read and the clips are the files found in class folders.
    `leaks` is None if nothing was compared. `notices` are sentences for the user.
    """

    name: str
    videos: Path
    out: Path
    against: Path | None
    check: str
    is_list: bool
    classes: tuple[str, ...]
    official: dict[str, int]
    rows: tuple[ScanRow, ...]
    manifest_rows: tuple[VideoRow, ...]
    leaks: tuple[Leak, ...] | None
    notices: tuple[str, ...]

    @property
    def manifest(self) -> Path:
        """The manifest's path."""
        return self.out / MANIFEST_FILE

    def of(self, *statuses: Status) -> list[ScanRow]:
        """The rows of these statuses."""
        return [row for row in self.rows if row.status in statuses]

    def num_unreadable(self) -> int:
        """Files that were opened in vain, second files of a clip among them."""
        return sum(row.check is not None and row.check.status == "corrupt" for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """All counts, for summary.json; "listed" is None where there was no list."""
        listed = [row for row in self.rows if row.entry is not None and row.status != "duplicate_id"]
        found = [row for row in listed if row.status != "missing"]
        in_manifest = Counter(row.split or "" for row in self.manifest_rows)
        by_split = {
            split: {
                "official": self.official.get(split),
                "listed": count if self.is_list else None,
                "found": _splits(found)[split],
                "in_manifest": in_manifest[split],
            }
            for split, count in _splits(listed).items()
        }
        counts = Counter(row.status for row in self.rows)
        return {
            "data": self.name,
            "videos": str(self.videos),
            "check": self.check,
            "splits": by_split,
            "listed": len(listed) if self.is_list else None,
            "found": len(found),
            "in_manifest": len(self.manifest_rows),
            **{status: counts[status] for status in ("ok", "short", "corrupt", "missing", "duplicate_id", "extra")},
            "unreadable_files": self.num_unreadable(),
            "causes": dict(Counter(row.cause for row in self.of("corrupt")).most_common()),
            "duplicate_content": sum(bool(row.same_content_as) for row in self.rows),
            "against": None if self.against is None else str(self.against),
            "leaks": None if self.leaks is None else _count_leaks(self.leaks),
            "notices": list(self.notices),
        }


def _splits(rows: Sequence[ScanRow]) -> Counter[str]:
    return Counter(row.entry.split for row in rows if row.entry is not None)


def _count_leaks(leaks: Sequence[Leak]) -> dict[str, int]:
    """Clips of ours, not pairs."""
    ids = {by: {leak.video_id for leak in leaks if leak.by == by} for by in ("source", "content")}
    return {"clips": len(ids["source"] | ids["content"]), **{by: len(found) for by, found in ids.items()}}


def write_report(report: PrepareReport) -> None:
    """Writes scan.csv, leaks.csv, summary.json, classes.txt and, last, manifest.csv, each whole or not at all.

    Raises:
        ValueError: no clip is left for a manifest; the other files are written.
    """
    _write_csv(report.out / SCAN_FILE, header=SCAN_COLUMNS, rows=[row.cells() for row in report.rows])
    leaks_path = report.out / LEAKS_FILE
    if report.leaks is None:
        leaks_path.unlink(missing_ok=True)  # an earlier run's would seem to belong to this one
    else:
        header = tuple(field.name for field in fields(Leak))
        _write_csv(leaks_path, header=header, rows=[list(asdict(leak).values()) for leak in report.leaks])
    _write_whole(report.out / SUMMARY_FILE, text=json.dumps(report.summary(), indent=2) + "\n")
    if not report.manifest_rows:
        report.manifest.unlink(missing_ok=True)  # an earlier run's, of files that are no longer fit
        unfit = report.of("corrupt", "short")
        raise ValueError(
            f"None of the {len(unfit)} files found is fit for a manifest: the first is {unfit[0].path} "
            f"({unfit[0].cause}); {report.out / SCAN_FILE} lists them all."
        )
    write_manifest(report.manifest, rows=report.manifest_rows, classes=report.classes)


def manifest_row(row: ScanRow, *, videos: Path) -> VideoRow:
    """The row of the manifest, with source_id and the data set's own columns."""
    entry = row.entry
    assert entry is not None and not set(COLUMNS) & set(entry.extra)
    return VideoRow(
        path=videos / row.path,
        label=entry.label,
        video_id=entry.video_id,
        split=entry.split or None,
        extra={"source_id": entry.source_id or entry.video_id, **entry.extra},
    )


def summary_lines(report: PrepareReport) -> list[str]:
    """The summary for a person: what was found of what is listed, and each fault with its count and first names."""
    counts = report.summary()
    listed = f"of {counts['listed']:,} listed clips" if report.is_list else "files"
    lines = [f"{report.name}: {counts['found']:,} {listed} found"]
    for split, one in counts["splits"].items():
        official = "" if one["official"] is None else f" of {one['official']:,} official"
        if report.is_list:
            here = f"{one['listed']:,} listed{official}, {one['found']:,} found"
        else:
            here = f"{one['found']:,} found{official}"
        lines.append(f"  {split or 'no split'}: {here}, {one['in_manifest']:,} in the manifest")
    lines += _fault_lines("missing", [_told(row) for row in report.of("missing")])
    lines += _fault_lines("corrupt", [_told(row) for row in report.of("corrupt")])
    lines += _fault_lines("too short", [_told(row) for row in report.of("short")])
    lines += _fault_lines("second file of a clip", [_told(row) for row in report.of("duplicate_id")])
    same = [f"{row.name} (as {row.same_content_as})" for row in report.rows if row.same_content_as]
    lines += _fault_lines("same content", same)
    lines += _fault_lines("file of no clip", [row.path for row in report.of("extra")])
    if report.leaks is not None:
        names = dict.fromkeys(f"{leak.video_id} ({leak.by}: {leak.other_video_id})" for leak in report.leaks)
        clips = len({leak.video_id for leak in report.leaks})
        lines += _fault_lines(f"also in {report.against}", list(names), count=clips) or [
            f"also in {report.against}: none"
        ]
    return [*lines, f"manifest: {report.manifest}"]


def _told(row: ScanRow) -> str:
    return f"{row.name} ({row.cause})" if row.cause else row.name


def _fault_lines(what: str, names: Sequence[str], *, count: int | None = None) -> list[str]:
    if not names:
        return []
    shown = ", ".join(names[:NAMES_SHOWN]) + (", ..." if len(names) > NAMES_SHOWN else "")
    return [f"{what}: {len(names) if count is None else count:,}: {shown}"]


def _write_csv(path: Path, *, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    _write_whole(path, text=text.getvalue())


def _write_whole(path: Path, *, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    # surrogateescape: a file name need not be UTF-8
    partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")
    partial.replace(path)
