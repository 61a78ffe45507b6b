"""The recipe of Kinetics-400, -600 and -700 for `coca-video prepare`: official CSVs, and how files are named."""

import csv
import io
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coca_video.data.annotations import ClassNames, read_text
from coca_video.data.manifest import read_classes
from coca_video.data.recipe import Entry, Recipe, Request, Version

LOGGER = logging.getLogger("coca_video.datasets.kinetics")
FOLDER = Path(__file__).parent
REQUIRED = ("youtube_id", "time_start", "time_end", "split")
SPLITS = {"train": "train", "val": "val", "validate": "val", "validation": "val", "test": "test"}
CLIP_SECONDS = 10.0

# an id has 11 characters and may hold "_" or begin with "-": so it is never found by splitting at "_"
_ID = r"(?P<id>[A-Za-z0-9_-]{11})"
_TIMED = re.compile(_ID + r"_(?P<start>\d{1,6})_(?P<end>\d{1,6})")
_BARE = re.compile(_ID + r"(?:\.f\d+)?")  # youtube-dl leaves "ID.f137.mp4" where it could not merge the sound
_TITLED = re.compile(rf".*(?:-{_ID}|\[{_ID.replace('<id>', '<bracketed>')}\])")  # "title-ID", "title [ID]"


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of an official CSV; `where` is its place in words. The label is None in a test list."""

    where: str
    youtube_id: str
    start: int
    end: int
    split: str
    label: str | None
    is_cc: str


def list_clips(request: Request) -> list[Entry]:
    """The clips of the official CSVs in their order. A clip listed twice is kept once, and logged.

    Raises:
        ValueError: no CSV, a column missing, a cell that cannot be right, a label that is no class of the version, or
            a clip with two labels or splits.
    """
    kept: dict[str, tuple[_Row, Entry]] = {}
    repeated: list[str] = []
    for path in _csv_files(request):
        rows = list(_read_csv(path))
        labels = _labels(rows, request=request, path=path)
        for row in rows:
            entry = _entry(row, label=labels.get(row.label or ""))
            first, first_entry = kept.setdefault(entry.video_id, (row, entry))
            if first is row:
                continue
            if (first_entry.label, first_entry.split) != (entry.label, entry.split):
                raise ValueError(
                    f"{row.where}: clip {entry.video_id} is {entry.label!r} in {entry.split}, but {first.where} has "
                    f"it as {first_entry.label!r} in {first_entry.split}; remove one of the rows."
                )
            repeated.append(entry.video_id)
    if repeated:
        LOGGER.warning("%d rows list a clip again, first %s; each is kept once.", len(repeated), repeated[0])
    return [entry for _, entry in kept.values()]


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """ID_START_END in CVDF's six digits if the name holds times (they tell clips of one video apart), else the id."""
    timed = _TIMED.fullmatch(path.stem)
    if timed:
        return (_clip_id(timed["id"], start=int(timed["start"]), end=int(timed["end"])),)
    bare = _BARE.fullmatch(path.stem)
    if bare:
        return (bare["id"],)
    titled = _TITLED.fullmatch(path.stem)
    return (titled["id"] or titled["bracketed"],) if titled else ()


def source_id(path: PurePosixPath) -> str | None:
    """The video's id at YouTube, which each of the keys begins with."""
    keys = file_keys(path)
    return keys[0][:11] if keys else None


def _clip_id(youtube_id: str, *, start: int, end: int) -> str:
    return f"{youtube_id}_{start:06d}_{end:06d}"


def _entry(row: _Row, *, label: str | None) -> Entry:
    clip_id = _clip_id(row.youtube_id, start=row.start, end=row.end)
    return Entry(
        video_id=clip_id,
        label=label,
        split=row.split,
        keys=(clip_id, row.youtube_id),
        source_id=row.youtube_id,
        nominal_seconds=float(row.end - row.start),
        extra={"is_cc": row.is_cc} if row.is_cc else {},
    )


def _csv_files(request: Request) -> list[Path]:
    """The files given; of a folder, its CSVs."""
    paths = [
        path for given in request.annotations for path in (sorted(given.glob("*.csv")) if given.is_dir() else [given])
    ]
    if not paths:
        given = ", ".join(map(str, request.annotations)) or "nothing"
        raise ValueError(f"Kinetics needs its official CSVs (train.csv, val.csv, ...), got {given} without any.")
    return paths


def _read_csv(path: Path) -> Iterator[_Row]:
    """Columns may stand in any order; others than ours are ignored."""
    reader = csv.DictReader(io.StringIO(read_text(path)), skipinitialspace=True, strict=True)
    try:
        columns = [name.strip() for name in reader.fieldnames or []]
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            raise ValueError(
                f"{path} needs the columns {', '.join(REQUIRED)} (and label, save in a test list), but has no "
                f"{missing[0]}; the columns found: {', '.join(columns)[:200] or 'none'}."
            )
        reader.fieldnames = columns
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if None in cells or None in cells.values():
                raise ValueError(f"{where} has not {len(columns)} cells like the header; quote cells with commas.")
            yield _row({name: cell.strip() for name, cell in cells.items()}, where=where)
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from error


def _row(cells: Mapping[str, str], *, where: str) -> _Row:
    start, end = (_whole_seconds(cells[column], column=column, where=where) for column in ("time_start", "time_end"))
    if start >= end:
        raise ValueError(f"{where}: time_start {start} must be less than time_end {end}.")
    if not re.fullmatch(_ID, cells["youtube_id"]):
        raise ValueError(
            f"{where}: youtube_id must have 11 letters, digits, '_' or '-', got {cells['youtube_id']!r}; a spreadsheet "
            "spoils ids that begin with '-', so take the list as it was published."
        )
    if cells["split"] not in SPLITS:
        raise ValueError(f"{where}: the split must be train, val (or validate) or test, got {cells['split']!r}.")
    return _Row(
        where=where,
        youtube_id=cells["youtube_id"],
        start=start,
        end=end,
        split=SPLITS[cells["split"]],
        label=cells.get("label") or None,
        is_cc=cells.get("is_cc", ""),
    )


def _whole_seconds(cell: str, *, column: str, where: str) -> int:
    if not re.fullmatch(r"\d+(\.0*)?", cell):
        raise ValueError(f"{where}: {column} must be whole seconds, got {cell!r}.")
    return int(cell.partition(".")[0])


def _labels(rows: list[_Row], *, request: Request, path: Path) -> dict[str, str]:
    """The class of each label of a file; the sentence about an unknown one names the version that the file fits."""
    names = ClassNames(request.classes)
    first_rows: dict[str, _Row] = {}
    for row in rows:
        if row.label is not None:
            first_rows.setdefault(row.label, row)
        elif row.split != "test":
            raise ValueError(f"{row.where}: a clip of {row.split} has no label; only the test lists come without.")
    labels = {label: name for label in first_rows if (name := names.find(label)) is not None}
    unknown = [label for label in first_rows if label not in labels]
    if unknown:
        fitting = [version for version in recipe.versions if _fits(version, labels=list(first_rows))]
        hints = [f"; all labels of {path.name} are classes of version {name}: use --version {name}" for name in fitting]
        raise ValueError(
            f"{first_rows[unknown[0]].where}: {unknown[0]!r} is not one of the {len(request.classes)} classes of "
            f"Kinetics-{request.version}; the nearest is {names.nearest(unknown[0])!r}{hints[0] if hints else ''}."
        )
    return labels


def _fits(version: str, *, labels: list[str]) -> bool:
    names = ClassNames(read_classes(FOLDER / recipe.versions[version].classes))
    return all(names.find(label) is not None for label in labels)


recipe = Recipe(
    name="Kinetics",
    versions={
        # rows of the official CSVs; where no source gives a count, there is none
        "400": Version(
            classes="classes_400.txt",
            official={"train": 246_534, "val": 19_906, "test": 39_805},
            nominal_seconds=CLIP_SECONDS,
        ),
        "600": Version(classes="classes_600.txt", official={"val": 30_000}, nominal_seconds=CLIP_SECONDS),
        "700": Version(classes="classes_700.txt", official={}, nominal_seconds=CLIP_SECONDS),
    },
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help="The official CSVs (train.csv, val.csv or validate.csv, test.csv), or a folder that holds them.",
    source_id=source_id,
)
