"""The manifest of clips: a CSV, or a folder laid out by hand. The contract between data sets and everything else.

Columns: path (a file or a folder of images, relative to the manifest; or a URL), label (a class NAME), video_id,
start_seconds, end_seconds, split; other columns are kept as `extra`. The order of classes, and so every class index,
comes from `classes.txt` beside the CSV and from nowhere else: sorting folder names permutes classes of Kinetics.
"""

import csv
import difflib
import hashlib
import io
import json
import math
import os
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

COLUMNS = ("path", "label", "video_id", "start_seconds", "end_seconds", "split")
CLASSES_FILE = "classes.txt"
VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts", ".m2ts"}
)


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """One clip: a file, or the part of it in [start_seconds, end_seconds); None is the file's own start or end.

    path: of a video file or of a folder of images; a str is a URL that fsspec knows, s3://bucket/clip.mp4.
    """

    path: Path | str
    label: str | None
    video_id: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    split: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Rows in the order of the file, and the classes in the order of their indices. `source` is for messages."""

    source: Path
    rows: tuple[VideoRow, ...]
    classes: tuple[str, ...]

    def label_index(self, row: VideoRow) -> int:
        """The class index of the row's label: its place in `classes`."""
        if row.label is None:
            raise ValueError(f"{self.source}: clip {row.video_id!r} has no label, which is needed here.")
        if row.label not in self._class_indices:
            where = f"{self.source}: clip {row.video_id!r}"
            raise ValueError(_unknown_label(row.label, where=where, classes=self.classes, classes_from="the manifest"))
        return self._class_indices[row.label]

    def select(self, *, split: str) -> "Manifest":
        """The rows of one split, with all classes.

        Raises:
            ValueError: no row has this split; the sentence names the splits there are.
        """
        rows = tuple(row for row in self.rows if row.split == split)
        if not rows:
            there = sorted({row.split for row in self.rows if row.split is not None})
            names = "the splits there are: " + ", ".join(map(repr, there)) if there else "no row has a split"
            raise ValueError(f"{self.source} has no clips of split {split!r}; {names}.")
        return replace(self, rows=rows)

    def fingerprint(self) -> str:
        """A hash of what is learned or measured on: ids, labels, times, splits and classes, not where the files lie."""
        rows = [[row.video_id, row.label, row.start_seconds, row.end_seconds, row.split] for row in self.rows]
        text = json.dumps([rows, self.classes])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def check_labels(self) -> None:
        """Raises a ValueError if a row has no label: for those who learn from labels or count right answers."""
        unlabelled = [row.video_id for row in self.rows if row.label is None]
        if unlabelled:
            raise ValueError(
                f"{self.source} has {len(unlabelled)} of {len(self.rows)} clips without a label, the first is "
                f"{unlabelled[0]!r}; give each a label, or leave them out."
            )

    def check_files(self) -> None:
        """Raises a ValueError with the count and the first three names if files are missing on disk.

        URLs are not asked for: a request each would take hours where a look at the disk takes seconds.
        """
        paths = dict.fromkeys(row.path for row in self.rows if isinstance(row.path, Path))
        missing = [path for path in paths if not path.exists()]
        if missing:
            names = ", ".join(map(str, missing[:3])) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{self.source} names {len(missing)} of {len(paths)} files that are not on disk: {names}; "
                "fetch them, or correct the paths, which are relative to the manifest."
            )

    @cached_property
    def _class_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}


def read_manifest(source: Path, *, classes: Sequence[str] | None = None) -> Manifest:
    """Reads a CSV, or a folder laid out as DIR/<class>/clip.mp4 or DIR/<split>/<class>/clip.mp4.

    `classes` is a trained model's, in its order; without it, they are read from classes.txt beside the CSV or inside
    the folder. A folder's rows are sorted by path. Files are not opened: see `Manifest.check_files`.

    Raises:
        ValueError: one sentence for each thing that may be wrong with the manifest or its classes.
    """
    if source.is_dir():
        numbered, classes_path = _read_folder(source), source / CLASSES_FILE
    elif source.is_file():
        numbered, classes_path = _read_csv(source), source.parent / CLASSES_FILE
    else:
        raise ValueError(f"There is no manifest {source}: expected a CSV file or a folder of clips.")
    rows = list(numbered.values())
    names, classes_from = _choose_classes(rows, source=source, given=classes, path=classes_path)
    _check_labels(numbered, classes=names, classes_from=classes_from)
    _check_video_ids(numbered)
    return Manifest(source=source, rows=tuple(rows), classes=tuple(names))


def write_manifest(path: Path, *, rows: Sequence[VideoRow], classes: Sequence[str]) -> None:
    """Writes `rows` as a CSV that `read_manifest` reads back, and `classes` as classes.txt beside it.

    Paths are written relative to the manifest. Each file appears whole or not at all, the CSV last. Without
    classes (and then without labels) no classes.txt is written.
    """
    numbered = {f"{path}, row {number}": row for number, row in enumerate(rows, start=2)}
    if not numbered:
        raise ValueError(f"{path} would be a manifest without clips; expected at least one row.")
    _check_labels(numbered, classes=classes, classes_from="the classes given")
    _check_video_ids(numbered)
    path.parent.mkdir(parents=True, exist_ok=True)
    if classes:
        _check_classes(classes, where="The classes given")
        _write_whole(path.parent / CLASSES_FILE, lines=[f"{name}\n" for name in classes])
    _write_whole(path, lines=_csv_lines(rows, folder=path.parent.resolve()))


def read_classes(path: Path) -> tuple[str, ...]:
    """The class names of a classes.txt: one a line, in the order of their indices; none empty, none twice."""
    if not path.is_file():
        raise ValueError(f"There is no file of classes {path}: expected one class name a line, in the model's order.")
    text = _read_text(path).removesuffix("\n")
    names = tuple(line.strip() for line in text.split("\n")) if text else ()
    _check_classes(names, where=str(path))
    return names


def _check_classes(names: Sequence[str], *, where: str) -> None:
    if not names:
        raise ValueError(f"{where}: there are no classes; expected one class name a line.")
    first_line: dict[str, int] = {}
    for line, name in enumerate(names, start=1):
        if not name.strip():
            raise ValueError(f"{where}: line {line} is empty; expected one class name a line.")
        if name in first_line:
            raise ValueError(f"{where}: class {name!r} stands on lines {first_line[name]} and {line}; remove one.")
        first_line[name] = line


def _choose_classes(
    rows: Sequence[VideoRow], *, source: Path, given: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], str]:
    """The classes and what to call their origin in messages."""
    if given is not None:
        _check_classes(given, where="The classes given")
        return tuple(given), "the classes given"
    labels = sorted({row.label for row in rows if row.label is not None})
    if path.is_file():
        return read_classes(path), str(path)
    if not labels:
        return (), str(path)
    quoted = " ".join("'" + label.replace("'", "'\"'\"'") + "'" for label in labels)
    raise ValueError(
        f"{source} has labels but there is no {path}, which gives the order of classes; take the file that belongs to "
        f"the data set, or, for your own clips, where any order will do, write it with: "
        f"printf '%s\\n' {quoted} > {shlex.quote(str(path))}"
    )


def _check_labels(numbered: Mapping[str, VideoRow], *, classes: Sequence[str], classes_from: str) -> None:
    known = frozenset(classes)
    for where, row in numbered.items():
        if row.label is not None and row.label not in known:
            raise ValueError(_unknown_label(row.label, where=where, classes=classes, classes_from=classes_from))


def _unknown_label(label: str, *, where: str, classes: Sequence[str], classes_from: str) -> str:
    nearest = difflib.get_close_matches(label, classes, n=1, cutoff=0.0)
    hint = f"; the nearest class is {nearest[0]!r}" if nearest else ""
    return f"{where}: label {label!r} is not one of the {len(classes)} classes of {classes_from}{hint}."


def _check_video_ids(numbered: Mapping[str, VideoRow]) -> None:
    first_place: dict[str, str] = {}
    for where, row in numbered.items():
        if row.video_id in first_place:
            raise ValueError(
                f"{where}: video_id {row.video_id!r} stands already at {first_place[row.video_id]}; "
                "give each clip its own in the column video_id."
            )
        first_place[row.video_id] = where


def _read_csv(source: Path) -> dict[str, VideoRow]:
    """The rows by their place in words: 'm.csv, row 2' is the first after the header, as a spreadsheet counts."""
    try:
        table = list(csv.reader(io.StringIO(_read_text(source)), strict=True))
    except csv.Error as error:
        raise ValueError(f"{source} is not a CSV file: {error}.") from error
    header = [name.strip() for name in table[0]] if table else []
    if "path" not in header:
        raise ValueError(f"{source} needs a column 'path'; the columns found: {', '.join(header) or 'none'}.")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ValueError(f"{source} has the column {repeated[0]!r} more than once; keep one of them.")
    numbered = {f"{source}, row {number}": cells for number, cells in enumerate(table[1:], start=2) if cells}
    if not numbered:
        raise ValueError(f"{source} is an empty manifest: it has a header but no clips.")
    named = {where: _name_cells(cells, header=header, where=where) for where, cells in numbered.items()}
    video_ids = _video_ids([(cells["path"], cells.get("video_id", "")) for cells in named.values()])
    folder = source.parent.resolve()
    return {
        where: _row_from_cells(cells, folder=folder, video_id=video_id, where=where)
        for (where, cells), video_id in zip(named.items(), video_ids, strict=True)
    }


def _name_cells(cells: Sequence[str], *, header: Sequence[str], where: str) -> dict[str, str]:
    if len(cells) != len(header):
        raise ValueError(f"{where} has {len(cells)} cells where the header has {len(header)}; quote cells with commas.")
    named = {name: cell.strip() for name, cell in zip(header, cells, strict=True)}
    if not named["path"]:
        raise ValueError(f"{where} has an empty path; expected the path of a video file.")
    return named


def _row_from_cells(cells: Mapping[str, str], *, folder: Path, video_id: str, where: str) -> VideoRow:
    start = _seconds(cells.get("start_seconds", ""), column="start_seconds", where=where)
    end = _seconds(cells.get("end_seconds", ""), column="end_seconds", where=where)
    if end is not None and (start or 0.0) >= end:
        raise ValueError(f"{where}: start_seconds {start or 0.0:g} must be less than end_seconds {end:g}.")
    return VideoRow(
        # normpath and not resolve(): a link to a clip keeps its name; `folder` has no links, so ".." means the same
        path=cells["path"] if "://" in cells["path"] else Path(os.path.normpath(folder / cells["path"])),
        label=cells.get("label") or None,
        video_id=video_id,
        start_seconds=start,
        end_seconds=end,
        split=cells.get("split") or None,
        extra={name: cell for name, cell in cells.items() if name not in COLUMNS and cell},
    )


def _seconds(cell: str, *, column: str, where: str) -> float | None:
    if not cell:
        return None
    try:
        seconds = float(cell)
    except ValueError:
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds >= 0):
        raise ValueError(f"{where}: {column} must be a number of seconds, 0 or more, got {cell!r}.")
    return seconds


def _video_ids(paths_and_ids: Sequence[tuple[str, str]]) -> list[str]:
    """Ids where given, else path stems; if those repeat, the paths in all rows without an id."""
    stems = Counter(Path(path).stem for path, given in paths_and_ids if not given)
    unique = all(count == 1 for count in stems.values())
    return [given or (Path(path).stem if unique else Path(path).as_posix()) for path, given in paths_and_ids]


def _read_folder(folder: Path) -> dict[str, VideoRow]:
    paths = sorted(_video_files(folder))
    if not paths:
        raise ValueError(
            f"{folder} is an empty manifest: it holds no video files; expected {folder}/<class>/clip.mp4 or "
            f"{folder}/<split>/<class>/clip.mp4 (or the path of a CSV)."
        )
    depth = len(paths[0].parts)
    for path in paths:
        if len(path.parts) not in (2, 3) or len(path.parts) != depth:
            raise ValueError(
                f"{folder} must be laid out as <class>/clip.mp4 or <split>/<class>/clip.mp4 throughout; "
                f"got {paths[0]}" + (f" and {path}" if path != paths[0] else "") + "."
            )
    video_ids = _video_ids([(path.as_posix(), "") for path in paths])
    absolute = folder.absolute()
    return {
        str(folder / path): VideoRow(
            path=absolute / path,
            label=path.parts[-2],
            video_id=video_id,
            split=path.parts[0] if depth == 3 else None,
        )
        for path, video_id in zip(paths, video_ids, strict=True)
    }


def _video_files(folder: Path) -> Iterable[Path]:
    """Paths of video files relative to `folder`; names that start with a dot (macOS leaves ._clip.mp4) are no clips."""
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            if Path(name).suffix.lower() in VIDEO_SUFFIXES and not name.startswith("."):
                yield (Path(parent) / name).relative_to(folder)


def _csv_lines(rows: Sequence[VideoRow], *, folder: Path) -> list[str]:
    extras = list(dict.fromkeys(name for row in rows for name in row.extra))
    table: list[list[str]] = [[*COLUMNS, *extras]]
    for row in rows:
        path = row.path if isinstance(row.path, str) else os.path.relpath(row.path.absolute(), folder)
        seconds = ["" if value is None else repr(value) for value in (row.start_seconds, row.end_seconds)]
        extra = [row.extra.get(name, "") for name in extras]
        table.append([path.replace(os.sep, "/"), row.label or "", row.video_id, *seconds, row.split or "", *extra])
    lines: list[str] = []
    csv.writer(_Lines(lines), lineterminator="\n").writerows(table)
    return lines


@dataclass(frozen=True)
class _Lines:
    """What csv.writer writes to: a list in place of a file."""

    lines: list[str]

    def write(self, line: str) -> int:
        self.lines.append(line)
        return len(line)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # spreadsheets put a byte order mark first
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}.") from error


def _write_whole(path: Path, *, lines: Sequence[str]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text("".join(lines), encoding="utf-8", newline="")
    partial.replace(path)
