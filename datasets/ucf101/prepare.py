"""The recipe of UCF101: its own split lists, which count classes from 1, to entries. See README.md here."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from coca_video.data.annotations import find_annotation, path_keys, read_text
from coca_video.data.recipe import Entry, Recipe, Request, Version

CLASS_FILE = "classInd.txt"
LINE = re.compile(r"(?P<label>[^/\s]+)/(?P<name>v_\w+_g\d+_c\d+)\.avi(?:\s+(?P<number>\d+))?")
EXPECTED = "'ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1' (a test list has no number)"
HELP = (
    "The folder ucfTrainTestlist, or its files trainlist0N.txt and testlist0N.txt (N is --version); "
    "classInd.txt is checked where it is given."
)


def list_clips(request: Request) -> list[Entry]:
    """The clips of split `request.version`: those of the train list, then those of the test list.

    Raises:
        ValueError: no list of this split was given, a line cannot be read, a number is another class than the folder
            says, or a group of clips (one actor in one place) is in train and in test.
    """
    class_file = find_annotation(request, names=[CLASS_FILE])
    if class_file is not None:
        _check_classes(class_file, classes=request.classes)
    names = {"train": f"trainlist0{request.version}.txt", "test": f"testlist0{request.version}.txt"}
    paths = {
        split: path for split, name in names.items() if (path := find_annotation(request, names=[name])) is not None
    }
    if not paths:
        given = ", ".join(map(str, request.annotations)) or "nothing"
        raise ValueError(
            f"UCF101 split {request.version} needs {names['train']} or {names['test']}: give --annotations the folder "
            f"ucfTrainTestlist or its files, got {given}."
        )
    entries = [
        entry for split, path in paths.items() for entry in _read_list(path, split=split, classes=request.classes)
    ]
    _check_groups(entries)
    return entries


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The name without suffix, in lower case: copies write v_HandStandPushups_ and v_HandstandPushups_."""
    return (path_keys(path)[-1].lower(),)


def source_id(path: PurePosixPath) -> str | None:
    """The group, one actor in one place: v_ApplyEyeMakeup_g08; spelled as the lists do, whatever a copy made of it."""
    match = re.match(r"v_\w+_g\d+(?=_c\d+)", path.name)
    return match[0].replace("v_HandstandPushups_", "v_HandStandPushups_") if match else None


def _read_list(path: Path, *, split: str, classes: Sequence[str]) -> Iterator[Entry]:
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        match = LINE.fullmatch(line)
        if match is None:
            raise ValueError(f"{where}: expected {EXPECTED}, got {line!r}.")
        label, name = match["label"], match["name"]
        if label not in classes:
            raise ValueError(f"{where}: the folder {label!r} is none of the {len(classes)} classes of UCF101.")
        if match["number"] is not None:
            _check_number(int(match["number"]), label=label, classes=classes, where=where)
        group = source_id(PurePosixPath(name))
        yield Entry(video_id=name, label=label, split=split, keys=(name.lower(),), source_id=group)


def _check_number(number: int, *, label: str, classes: Sequence[str], where: str) -> None:
    ours = classes.index(label) + 1
    if number != ours:
        hint = ", which looks like a list that counts from 0" if number == ours - 1 else ""
        raise ValueError(
            f"{where}: {label} is class {ours}, counted from 1 as UCF101's lists do, got {number}{hint}; take the "
            "lists as they are distributed."
        )


def _check_classes(path: Path, *, classes: Sequence[str]) -> None:
    theirs = [line for _, line in _lines(path)]
    ours = [f"{number} {name}" for number, name in enumerate(classes, start=1)]
    wrong = [pair for pair in zip(theirs, ours, strict=False) if pair[0] != pair[1]]
    if wrong or len(theirs) != len(ours):
        first = f"its first other line is {wrong[0][0]!r} for {wrong[0][1]!r}" if wrong else "their lines agree so far"
        raise ValueError(
            f"{path} is not UCF101's list of classes: expected {len(ours)} lines, got {len(theirs)}, and {first}."
        )


def _check_groups(entries: Sequence[Entry]) -> None:
    splits: dict[str | None, set[str]] = {}
    for entry in entries:
        splits.setdefault(entry.source_id, set()).add(entry.split)
    mixed = [group for group, found in splits.items() if len(found) > 1]
    if mixed:
        raise ValueError(
            f"UCF101: {len(mixed)} groups have clips in train and in test, the first is {mixed[0]}; clips of a group "
            "show one actor in one place, so take both lists of one official split."
        )


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with text and their numbers; the lists end in a carriage return in some copies."""
    lines = read_text(path).split("\n")
    return [(number, line.strip()) for number, line in enumerate(lines, start=1) if line.strip()]


recipe = Recipe(
    name="UCF101",
    versions={
        "1": Version(classes="classes.txt", official={"train": 9_537, "test": 3_783}),
        "2": Version(classes="classes.txt", official={"train": 9_586, "test": 3_734}),
        "3": Version(classes="classes.txt", official={"train": 9_624, "test": 3_696}),
    },
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help=HELP,
    source_id=source_id,
    versions_are_splits=True,
)
