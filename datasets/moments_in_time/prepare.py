"""The recipe of Moments in Time v1 (339 classes) and v2 (305) for `coca-video prepare`."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coca_video.data.annotations import ClassNames, check_class_order, read_text
from coca_video.data.recipe import Entry, Recipe, Request, Version

LOGGER = logging.getLogger("coca_video.datasets.moments_in_time")
CATEGORIES, LISTS = "moments_categories.txt", ("trainingSet.csv", "validationSet.csv")
CLIP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One row of a list: workers who agreed with the label and who did not."""

    where: str
    file: PurePosixPath
    label: str
    split: str
    positive: str
    negative: str


def list_clips(request: Request) -> list[Entry]:
    """The clips of trainingSet.csv and validationSet.csv, with the votes as extra columns.

    moments_categories.txt, if given, is checked against the classes of the version. A clip listed twice is kept once,
    and logged.

    Raises:
        ValueError: no list, a list of another name or form, a label that is no class of the version, a label map in
            another order, or a clip with two labels or splits.
    """
    rows: dict[PurePosixPath, _Row] = {}
    repeated: list[str] = []
    for path in _files(request):
        if path.name == CATEGORIES:
            check_class_order(read_text(path).splitlines(), ours=request.classes, source=str(path))
            continue
        for row in _read_csv(path, classes=ClassNames(request.classes), version=request.version):
            first = rows.setdefault(row.file, row)
            if first is row:
                continue
            if (first.label, first.split) != (row.label, row.split):
                raise ValueError(
                    f"{row.where}: {row.file} is {row.label!r} in {row.split}, but {first.where} has it as "
                    f"{first.label!r} in {first.split}; remove one of the rows."
                )
            repeated.append(row.file.as_posix())
    if not rows:
        raise ValueError(f"Moments in Time needs {' or '.join(LISTS)} by --annotations; no clip was listed.")
    if repeated:
        LOGGER.warning("%d rows list a clip again, first %s; each is kept once.", len(repeated), repeated[0])
    return _entries(list(rows.values()))


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The last two parts, "label/file.mp4", as the lists write them: '+' stays '+'. Without a folder, the name."""
    return ("/".join(path.parts[-2:]),)


def _entries(rows: list[_Row]) -> list[Entry]:
    """A bare file name is a second key where only one clip bears it: for those who keep all files in one folder."""
    names = Counter(row.file.name for row in rows)
    return [
        Entry(
            video_id=row.file.as_posix(),
            label=row.label,
            split=row.split,
            keys=tuple(dict.fromkeys([*file_keys(row.file), *([row.file.name] if names[row.file.name] == 1 else [])])),
            nominal_seconds=CLIP_SECONDS,
            extra={"positive_votes": row.positive, "negative_votes": row.negative},
        )
        for row in rows
    ]


def _files(request: Request) -> list[Path]:
    """The files given; of a folder, those of the official names."""
    return [
        path
        for given in request.annotations
        for path in (
            [given / name for name in (CATEGORIES, *LISTS) if (given / name).is_file()] if given.is_dir() else [given]
        )
    ]


def _read_csv(path: Path, *, classes: ClassNames, version: str) -> Iterator[_Row]:
    reader = csv.reader(io.StringIO(read_text(path)), strict=True)
    split = _split(path)
    try:
        for cells in reader:
            where = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != 4 or not (cells[2].strip().isdecimal() and cells[3].strip().isdecimal()):
                raise ValueError(
                    f"{where}: expected filename,label,positive,negative (two numbers of votes, and no header), "
                    f"got {','.join(cells)!r}."
                )
            file, label, positive, negative = (cell.strip() for cell in cells)
            name = classes.find(label)
            if name is None:
                raise ValueError(
                    f"{where}: {label!r} is not one of the {len(classes.index)} classes of Moments in Time {version}; "
                    f"the nearest is {classes.nearest(label)!r}; {_other_version(version)}."
                )
            yield _Row(
                where=where, file=PurePosixPath(file), label=name, split=split, positive=positive, negative=negative
            )
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from error


def _other_version(version: str) -> str:
    """v2's classes are a subset of v1's, so an unknown label can only mean that a v1 list was read as v2."""
    return "v1 has more classes: is this a list of v1 (--version v1)?" if version == "v2" else "v2 has no others"


def _split(path: Path) -> str:
    for beginning, split in (("train", "train"), ("val", "val")):
        if path.name.lower().startswith(beginning):
            return split
    raise ValueError(
        f"{path}: the lists of Moments in Time carry their split in their names alone; expected {LISTS[0]} or "
        f"{LISTS[1]}, or a name that begins with train or val."
    )


recipe = Recipe(
    name="Moments in Time",
    versions={
        "v1": Version(classes="classes_v1.txt", official={}, nominal_seconds=CLIP_SECONDS),
        "v2": Version(classes="classes_v2.txt", official={}, nominal_seconds=CLIP_SECONDS),
    },
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help="trainingSet.csv, validationSet.csv and moments_categories.txt, or the folder that holds them.",
)
