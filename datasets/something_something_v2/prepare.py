"""The recipe of Something-Something v2: its JSON lists to entries. See README.md here."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from coca_video.data.annotations import find_annotation, path_keys, read_json, read_text
from coca_video.data.recipe import Entry, Recipe, Request, Version

PREFIX = "something-something-v2-"  # older copies have it before each name, newer ones do not
FILES = {"train": "train.json", "val": "validation.json", "test": "test.json"}
LABELS, ANSWERS = "labels.json", "test-answers.csv"
HELP = (
    "The folder with train.json, validation.json and test.json (or something-something-v2-train.json and so on), or "
    "some of these files; labels.json is checked and test-answers.csv read where they are given."
)


def list_clips(request: Request) -> list[Entry]:
    """The clips of the lists given, in the order train, val, test; test has labels only with test-answers.csv.

    Raises:
        ValueError: none of the lists was given, one is not as distributed, labels.json has another order of classes,
            or a template is no class.
    """
    labels = _find(request, name=LABELS)
    if labels is not None:
        _check_labels(labels, classes=request.classes)
    paths = {split: path for split, name in FILES.items() if (path := _find(request, name=name)) is not None}
    if not paths:
        given = ", ".join(map(str, request.annotations)) or "nothing"
        raise ValueError(
            f"Something-Something v2 needs train.json, validation.json or test.json, with or without {PREFIX!r} before "
            f"the name: give --annotations their folder, got {given}."
        )
    answers_path = _find(request, name=ANSWERS)
    answers = _read_answers(answers_path) if answers_path is not None else {}
    return [
        _entry(item, split=split, answers=answers, classes=request.classes, where=f"{path}, clip {number}")
        for split, path in paths.items()
        for number, item in enumerate(_read_list(path), start=1)
    ]


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The name without suffix, which is the id: 78687.webm, 78687.mp4, or a folder 78687 of frames."""
    return (path_keys(path)[-1],)


def _entry(
    item: Mapping[str, Any], *, split: str, answers: Mapping[str, str], classes: Sequence[str], where: str
) -> Entry:
    video_id = str(item["id"])
    if split == "test":
        label = answers.get(video_id)
    elif isinstance(item.get("template"), str):
        label = item["template"].replace("[", "").replace("]", "")
    else:
        raise ValueError(f"{where}: id {video_id} has no template, which is its class; got the keys {sorted(item)}.")
    if label is not None and label not in classes:
        raise ValueError(f"{where}: {label!r} is none of the {len(classes)} classes of Something-Something v2.")
    return Entry(video_id=video_id, label=label, split=split, keys=(video_id,))


def _read_list(path: Path) -> list[dict[str, Any]]:
    items = read_json(path)
    if not isinstance(items, list) or not all(isinstance(item, dict) and "id" in item for item in items):
        raise ValueError(f'{path}: expected a JSON list of objects with "id", as Something-Something v2 has them.')
    return items


def _read_answers(path: Path) -> dict[str, str]:
    """{id: class} of lines such as `1420;Throwing something`."""
    rows = [row for row in csv.reader(read_text(path).splitlines(), delimiter=";") if row]
    wrong = [row for row in rows if len(row) != 2]
    if wrong:
        raise ValueError(f"{path}: expected lines 'id;class', got {';'.join(wrong[0])!r}.")
    return {video_id.strip(): label.strip() for video_id, label in rows}


def _check_labels(path: Path, *, classes: Sequence[str]) -> None:
    theirs = read_json(path)
    ours = {name: str(index) for index, name in enumerate(classes)}
    if not isinstance(theirs, dict) or {name: str(index) for name, index in theirs.items()} != ours:
        names = theirs if isinstance(theirs, dict) else {}
        other = [name for name, index in ours.items() if str(names.get(name)) != index]
        raise ValueError(
            f"{path} is not Something-Something v2's map of classes: expected {len(ours)} names, numbered from 0, got "
            f"{len(names)}, and {len(other)} of ours have another number there or none"
            + (f"; the first is {other[0]!r}." if other else ".")
        )


def _find(request: Request, *, name: str) -> Path | None:
    return find_annotation(request, names=(name, PREFIX + name))


recipe = Recipe(
    name="Something-Something v2",
    versions={"v2": Version(classes="classes.txt", official={"train": 168_913, "val": 24_777, "test": 27_157})},
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help=HELP,
)
