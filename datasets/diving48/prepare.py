"""The recipe of Diving48: its JSON lists to entries. See README.md here."""

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from coca_video.data.annotations import find_annotation, path_keys, read_json
from coca_video.data.recipe import Entry, Recipe, Request, Version

VOCABULARY = "Diving48_vocab.json"
FILES = {
    "v2": {"train": "Diving48_V2_train.json", "test": "Diving48_V2_test.json"},
    "v1": {"train": "Diving48_train.json", "test": "Diving48_test.json"},
}
HELP = (
    "The folder with Diving48_V2_train.json and Diving48_V2_test.json (v1: the names without _V2), or one of the two; "
    "Diving48_vocab.json is checked where it is given."
)


def list_clips(request: Request) -> list[Entry]:
    """The clips of the lists given, train before test.

    Raises:
        ValueError: no list of this version was given, one is not as distributed, a number is no class, or the
            vocabulary has another order of classes.
    """
    vocabulary = find_annotation(request, names=[VOCABULARY])
    if vocabulary is not None:
        _check_vocabulary(vocabulary, classes=request.classes)
    names = FILES[request.version]
    paths = {
        split: path for split, name in names.items() if (path := find_annotation(request, names=[name])) is not None
    }
    if not paths:
        given = ", ".join(map(str, request.annotations)) or "nothing"
        raise ValueError(
            f"Diving48 {request.version} needs {names['train']} or {names['test']}: give --annotations their folder or "
            f"the files, got {given}."
        )
    return [
        _entry(item, split=split, classes=request.classes, where=f"{path}, clip {number}")
        for split, path in paths.items()
        for number, item in enumerate(_read_list(path), start=1)
    ]


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The name without suffix: -mmq0PT-u8k_00155.mp4, or a folder of frames of that name."""
    return (path_keys(path)[-1],)


def source_id(path: PurePosixPath) -> str | None:
    """The long video: dives are cut from such, and a name is a YouTube id, then a number."""
    video, cut, _ = path_keys(path)[-1].rpartition("_")
    return video if cut and video else None


def _entry(item: Mapping[str, Any], *, split: str, classes: Sequence[str], where: str) -> Entry:
    name, label = str(item["vid_name"]), item["label"]
    if type(label) is not int or not 0 <= label < len(classes):
        raise ValueError(
            f"{where}: the label of {name} must be a whole number from 0 to {len(classes) - 1}, got {label!r}."
        )
    source = source_id(PurePosixPath(name))
    return Entry(video_id=name, label=classes[label], split=split, keys=(name,), source_id=source)


def _read_list(path: Path) -> list[dict[str, Any]]:
    items = read_json(path)
    if not isinstance(items, list) or not all(
        isinstance(item, dict) and {"vid_name", "label"} <= set(item) for item in items
    ):
        raise ValueError(f'{path}: expected a JSON list of objects with "vid_name" and "label", as Diving48 has them.')
    return items


def _check_vocabulary(path: Path, *, classes: Sequence[str]) -> None:
    """The vocabulary is a list of [take-off, somersaults, twists, position], whose place is the number of the class."""
    rows = read_json(path)
    theirs = ["+".join(map(str, row)) for row in rows if isinstance(row, list)] if isinstance(rows, list) else []
    wrong = [number for number, pair in enumerate(zip(theirs, classes, strict=False)) if pair[0] != pair[1]]
    if wrong or len(theirs) != len(classes):
        first = f"number {wrong[0]} is {theirs[wrong[0]]!r} for {classes[wrong[0]]!r}" if wrong else "they agree so far"
        raise ValueError(
            f"{path} is not Diving48's vocabulary: expected {len(classes)} classes, got {len(theirs)}, and {first}."
        )


recipe = Recipe(
    name="Diving48",
    versions={
        "v2": Version(classes="classes.txt", official={"train": 15_027, "test": 1_970}),
        "v1": Version(classes="classes.txt", official={"train": 15_943, "test": 2_096}),
    },
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help=HELP,
    source_id=source_id,
)
