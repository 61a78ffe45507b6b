"""The manifest of clips: a CSV, or a folder laid out by hand. The contract between data sets and everything else.

Columns: path (a video, a picture or a folder of images, relative to the manifest; or a URL), label (a class NAME),
video_id, start_seconds, end_seconds, split; other columns are kept as `extra`. The order of classes, and so every
class index, comes from `classes.txt` beside the CSV and from nowhere else: sorting folder names permutes classes of
Kinetics.
"""

import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import shlex
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from coca_video.data.clip_files import VIDEO_SUFFIXES as VIDEO_SUFFIXES
from coca_video.data.clip_files import clip_files
from coca_video.data.table import TextColumn, VideoRows
from coca_video.data.table import VideoRow as VideoRow  # whoever uses a manifest finds its rows here

COLUMNS = ("path", "label", "video_id", "start_seconds", "end_seconds", "split")
CLASSES_FILE = "classes.txt"
Place = Callable[[int], str]  # where a row stands, in words


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Rows in the order of the file, and the classes in the order of their indices. `source` is for messages.

    Rows are kept as columns: given as any Sequence of VideoRow, they come out as `VideoRows`.
    """

    source: Path
    rows: Sequence[VideoRow]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.rows, VideoRows):
            object.__setattr__(self, "rows", VideoRows.of(self.rows))

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
        splits = self._columns.splits
        chosen = np.flatnonzero([name == split for name in splits])
        if not chosen.size:
            there = sorted({name for name in splits if name is not None})
            names = "the splits there are: " + ", ".join(map(repr, there)) if there else "no row has a split"
            raise ValueError(f"{self.source} has no clips of split {split!r}; {names}.")
        return replace(self, rows=self._columns.take(chosen.astype(np.int64)))

    def fingerprint(self) -> str:
        """A hash of what is learned or measured on: ids, labels, times, splits and classes, not where the files lie."""
        digest = hashlib.blake2b(digest_size=16)
        for text in itertools.chain(["[["], self._columns.json_pieces(), [f"], {json.dumps(self.classes)}]"]):
            digest.update(text.encode())
        return digest.hexdigest()

    def check_labels(self) -> None:
        """Raises a ValueError if a row has no label: for those who learn from labels or count right answers."""
        unlabelled = np.flatnonzero(~self._columns.labels.present)
        if unlabelled.size:
            raise ValueError(
                f"{self.source} has {unlabelled.size} of {len(self.rows)} clips without a label, the first is "
                f"{self._columns.video_ids[int(unlabelled[0])]!r}; give each a label, or leave them out."
            )

    def check_files(self) -> None:
        """Raises a ValueError with the count and the first three names if files are missing on disk.

        URLs are not asked for: a request each would take hours where a look at the disk takes seconds.
        """
        columns = self._columns
        paths = dict.fromkeys(path for path, is_url in zip(columns.paths, columns.is_url, strict=True) if not is_url)
        missing = [path for path in paths if path is not None and not Path(path).exists()]
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            raise ValueError(
                f"{self.source} names {len(missing)} of {len(paths)} files that are not on disk: {names}; "
                "fetch them, or correct the paths, which are relative to the manifest."
            )

    @property
    def _columns(self) -> VideoRows:
        assert isinstance(self.rows, VideoRows)
        return self.rows

    @cached_property
    def _class_indices(self) -> dict[str, int]:
        return {name: index for index, name in enumerate(self.classes)}


def read_manifest(source: Path, *, classes: Sequence[str] | None = None, classes_by_name: bool = False) -> Manifest:
    """Reads a CSV, or a folder laid out as DIR/<class>/clip.mp4 or DIR/<split>/<class>/clip.mp4.

    `classes` is a trained model's, in its order; without it, they are read from classes.txt beside the CSV or inside
    the folder, or, with `classes_by_name` and no such file, numbered in the order of their names. A folder's rows are
    sorted by path. Files are not opened: see `Manifest.check_files`.

    Raises:
        ValueError: one sentence for each thing that may be wrong with the manifest or its classes.
    """
    if source.is_dir():
        (rows, place), classes_path = _read_folder(source), source / CLASSES_FILE
    elif source.is_file():
        (rows, place), classes_path = _read_csv(source), source.parent / CLASSES_FILE
    else:
        raise ValueError(f"There is no manifest {source}: expected a CSV file or a folder of clips.")
    if classes is None and classes_by_name and not classes_path.is_file():
        classes = sorted({label for label in rows.labels if label is not None})
    names, classes_from = _choose_classes(rows.labels, source=source, given=classes, path=classes_path)
    _check_labels(rows.labels, place=place, classes=names, classes_from=classes_from)
    _check_video_ids(rows.video_ids, place=place)
    return Manifest(source=source, rows=rows, classes=tuple(names))


def write_manifest(path: Path, *, rows: Sequence[VideoRow], classes: Sequence[str]) -> None:
    """Writes `rows` as a CSV that `read_manifest` reads back, and `classes` as classes.txt beside it.

    Paths are written relative to the manifest. Each file appears whole or not at all, the CSV last. Without
    classes (and then without labels) no classes.txt is written.
    """
    columns = rows if isinstance(rows, VideoRows) else VideoRows.of(rows)
    if not columns:
        raise ValueError(f"{path} would be a manifest without clips; expected at least one row.")
    place = _row_numbers(path, numbers=range(2, len(columns) + 2))
    _check_labels(columns.labels, place=place, classes=classes, classes_from="the classes given")
    _check_video_ids(columns.video_ids, place=place)
    path.parent.mkdir(parents=True, exist_ok=True)
    if classes:
        _check_classes(classes, where="The classes given")
        _write_whole(path.parent / CLASSES_FILE, lines=[f"{name}\n" for name in classes])
    _write_whole(path, lines=_csv_lines(columns, folder=path.parent.resolve()))


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
    column: TextColumn, *, source: Path, given: Sequence[str] | None, path: Path
) -> tuple[tuple[str, ...], str]:
    """The classes and what to call their origin in messages."""
    if given is not None:
        _check_classes(given, where="The classes given")
        return tuple(given), "the classes given"
    labels = sorted({label for label in column if label is not None})
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


def _check_labels(labels: TextColumn, *, place: Place, classes: Sequence[str], classes_from: str) -> None:
    known = frozenset(classes)
    for row, label in enumerate(labels):
        if label is not None and label not in known:
            raise ValueError(_unknown_label(label, where=place(row), classes=classes, classes_from=classes_from))


def _unknown_label(label: str, *, where: str, classes: Sequence[str], classes_from: str) -> str:
    nearest = difflib.get_close_matches(label, classes, n=1, cutoff=0.0)
    hint = f"; the nearest class is {nearest[0]!r}" if nearest else ""
    return f"{where}: label {label!r} is not one of the {len(classes)} classes of {classes_from}{hint}."


def _check_video_ids(video_ids: TextColumn, *, place: Place) -> None:
    first_row: dict[str | None, int] = {}
    for row, video_id in enumerate(video_ids):
        if first_row.setdefault(video_id, row) != row:
            raise ValueError(
                f"{place(row)}: video_id {video_id!r} stands already at {place(first_row[video_id])}; "
                "give each clip its own in the column video_id."
            )


def _row_numbers(source: Path, *, numbers: Sequence[int]) -> Place:
    return lambda row: f"{source}, row {numbers[row]}"


def _read_csv(source: Path) -> tuple[VideoRows, Place]:
    """The rows and their places: 'm.csv, row 2' is the first after the header, as a spreadsheet counts.

    The text is gone through twice, so that no more than one row of it is in memory as Python objects.
    """
    text = _read_text(source)
    header = [name.strip() for name in next(_csv_cells(source, text=text), [])]
    if "path" not in header:
        raise ValueError(f"{source} needs a column 'path'; the columns found: {', '.join(header) or 'none'}.")
    repeated = [name for name, count in Counter(header).items() if count > 1]
    if repeated:
        raise ValueError(f"{source} has the column {repeated[0]!r} more than once; keep one of them.")
    numbers = array("q")
    paths_and_ids: list[tuple[str, str]] = []
    for number, cells in _numbered_cells(source, text=text, header=header):
        numbers.append(number)
        paths_and_ids.append((cells["path"], cells.get("video_id", "")))
    if not numbers:
        raise ValueError(f"{source} is an empty manifest: it has a header but no clips.")
    place, folder, video_ids = _row_numbers(source, numbers=numbers), source.parent.resolve(), _video_ids(paths_and_ids)
    numbered = enumerate(_numbered_cells(source, text=text, header=header))
    rows = VideoRows.of(
        _row_from_cells(cells, folder=folder, video_id=video_ids[row], where=place(row)) for row, (_, cells) in numbered
    )
    return rows, place


def _csv_cells(source: Path, *, text: str) -> Iterator[list[str]]:
    try:
        yield from csv.reader(io.StringIO(text), strict=True)
    except csv.Error as error:
        raise ValueError(f"{source} is not a CSV file: {error}.") from error


def _numbered_cells(source: Path, *, text: str, header: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """The number and the cells by name of each row that is not blank, below the header."""
    for number, cells in enumerate(_csv_cells(source, text=text), start=1):
        if number > 1 and cells:
            yield number, _name_cells(cells, header=header, where=f"{source}, row {number}")


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


def _read_folder(folder: Path) -> tuple[VideoRows, Place]:
    paths = clip_files(folder)
    if not paths:
        raise ValueError(
            f"{folder} is an empty manifest: it holds no video files or pictures; expected {folder}/<class>/clip.mp4 "
            f"or {folder}/<split>/<class>/clip.mp4 (or the path of a CSV)."
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
    rows = VideoRows.of(
        VideoRow(
            path=absolute / path,
            label=path.parts[-2],
            video_id=video_id,
            split=path.parts[0] if depth == 3 else None,
        )
        for path, video_id in zip(paths, video_ids, strict=True)
    )
    return rows, lambda row: str(folder / paths[row])


def _csv_lines(rows: VideoRows, *, folder: Path) -> list[str]:
    extras = [name for name, column in rows.extra.items() if column.present.any()]
    columns: list[Iterable[str]] = [
        [
            (path if is_url else os.path.relpath(path, folder)).replace(os.sep, "/")
            for path, is_url in zip(_or_empty(rows.paths), rows.is_url.tolist(), strict=True)
        ],
        _or_empty(rows.labels),
        _or_empty(rows.video_ids),
        *(["" if math.isnan(s) else repr(s) for s in c.tolist()] for c in (rows.start_seconds, rows.end_seconds)),
        _or_empty(rows.splits),
        *(_or_empty(rows.extra[name]) for name in extras),
    ]
    table = itertools.chain([(*COLUMNS, *extras)], zip(*columns, strict=True))
    lines: list[str] = []
    csv.writer(_Lines(lines), lineterminator="\n").writerows(table)
    return lines


def _or_empty(column: TextColumn) -> Iterator[str]:
    return (text or "" for text in column)


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
