"""Lists and layouts that many data sets share: peers' lists of clips, folders of classes, and the check of their order.

A peer's list numbers its clips by a class order of its own, which is often the order of sorted folder names and then
not the data set's. So wherever a path holds a class folder, its number is checked against the classes file.
"""

import difflib
import json
import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from coca_video.data.layout import find_videos
from coca_video.data.manifest import VIDEO_SUFFIXES
from coca_video.data.recipe import Entry, Request

LOGGER = logging.getLogger(__name__)
NUM_LINES_LOOKED_AT = 100
SPLIT_FOLDERS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validate", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}

# UCF101's and HMDB51's own split files look like a peer's list ("clip.avi 1"), but their numbers are something else
_OFFICIAL_SPLIT_FILES = re.compile(r"(train|test)list\d+\.txt|.+_test_split\d\.txt", re.IGNORECASE)
_NUMBERED = re.compile(r"(?P<head>.+?)(?:\s*::\s*|\s*,\s*|\s+)(?P<number>-?\d+)\s*")
_NOT_IN_FOLDER_NAMES = re.compile(r"[\s_'\"’()]")


def class_key(name: str) -> str:
    """The form in which a class name and its folder agree: without spaces, underscores, quotes, parentheses and case.

    torchvision strips "massaging person's head" to massaging_persons_head, MMAction2 changes the spaces alone, macOS
    decomposes accents. Other characters count, '+' and ',' among them. Unique within each of our classes files.
    """
    return _NOT_IN_FOLDER_NAMES.sub("", unicodedata.normalize("NFC", name)).casefold()


class ClassNames:
    """The classes of a data set, to be found by their names or by any folder naming of them."""

    def __init__(self, classes: Sequence[str]) -> None:
        keys = Counter(class_key(name) for name in classes)
        self._by_key = {class_key(name): name for name in classes if keys[class_key(name)] == 1}
        self.index = {name: index for index, name in enumerate(classes)}

    def find(self, name: str) -> str | None:
        """The class that `name` means: exactly, else by `class_key` if that is one class alone; else None."""
        return name if name in self.index else self._by_key.get(class_key(name))

    def nearest(self, name: str) -> str:
        """For messages: the class that is spelt most like `name`."""
        spelling = {class_key(known): known for known in self.index}
        return spelling[difflib.get_close_matches(class_key(name), spelling, n=1, cutoff=0.0)[0]]


@dataclass(frozen=True, kw_only=True)
class PeerList:
    """The clips of a peer's list, and how many of its lines' numbers could be checked against a class folder.

    `first_unchecked` says in words which line is the first without one; empty if all were checked.
    """

    source: Path
    entries: list[Entry]
    num_checked: int
    num_lines: int
    first_unchecked: str

    @property
    def notice(self) -> str | None:
        """A sentence for the user if the number of a line could not be checked; else None."""
        if self.num_checked == self.num_lines:
            return None
        if self.num_checked == 0:
            what = "no path holds a class folder, so the order of classes could not be checked"
        else:
            num_left = self.num_lines - self.num_checked
            what = f"{num_left:,} of {self.num_lines:,} lines could not be checked; first {self.first_unchecked}"
        return (
            f"{self.source}: {what}; the numbers were taken as indices into the classes file (give the list's own "
            "label map by --classes to check it)."
        )


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One line of a peer's list; `num_frames` is set if the path is a folder of images."""

    number: int
    path: PurePosixPath
    num_frames: int | None
    label: int

    @property
    def folder(self) -> str:
        """The folder that the clip lies in, where class folders are; empty if it lies in none."""
        return self.path.parent.name


def path_keys(path: PurePosixPath) -> tuple[str, ...]:
    """What a clip of a list may be known by, best first: the path, its ends down to the file name, the bare stem.

    The same function serves files (relative to the folder of videos), so that the longest common end is the match.
    """
    whole = path.as_posix()
    parts = [part for part in path.parts if part not in ("/", "..")]
    ends = ["/".join(parts[start:]) for start in range(len(parts))]
    stem = [path.stem] if path.suffix.lower() in VIDEO_SUFFIXES else []
    return tuple(dict.fromkeys([whole, *ends, *stem]))


def is_peer_list(path: Path) -> bool:
    """Whether the first lines are all "video label", "video,label", "video::label" or "directory num_frames label"."""
    if not path.is_file() or _OFFICIAL_SPLIT_FILES.fullmatch(path.name):
        return False
    with path.open("rb") as file:
        text = file.read(NUM_LINES_LOOKED_AT * 400).decode("utf-8-sig", errors="replace")
    lines = [line for line in text.splitlines()[:NUM_LINES_LOOKED_AT] if line.strip()]
    if len(text) >= NUM_LINES_LOOKED_AT * 400:
        lines = lines[:-1]  # which may have been cut
    return bool(lines) and all(_parse_line(line, number=0) is not None for line in lines)


def read_peer_list(path: Path, *, classes: Sequence[str], split: str) -> PeerList:
    """The clips of a list of MMAction2, SlowFast, VideoMAE, V-JEPA or InternVideo2: a path and a class number a line.

    Entries' keys are `path_keys` of the path as written, without those that several clips share; a folder of frames
    carries its listed number of them as `listed_frames`. A line that is there twice is kept once and logged.

    Raises:
        ValueError: a line of another form, a number that is no class index, a clip with two labels, a folder that is
            no class where those of most lines are, or a class folder whose number is another class's: then the order
            of classes differs, and the sentence says how and why.
    """
    if not classes:
        raise ValueError(f"{path} numbers classes, and none are given; give the names in their order by --classes.")
    lines = list(_read_lines(path))
    unchecked = _check_label_order(lines, classes=classes, path=path)
    num_lines = len(lines)
    for line in lines:
        if not 0 <= line.label < len(classes):
            raise ValueError(
                f"{path}, line {line.number}: {line.label} is not the number of a class; expected 0 to "
                f"{len(classes) - 1} for the {len(classes)} classes."
            )
    lines = _without_repeats(lines, path=path)
    all_keys = [path_keys(line.path) for line in lines]
    counts = Counter(key for keys in all_keys for key in keys)
    unique_stems = all(counts[keys[-1]] == 1 for keys in all_keys)
    entries = [
        Entry(
            video_id=keys[-1] if unique_stems else line.path.as_posix(),
            label=classes[line.label],
            split=split,
            keys=tuple(key for key in keys if counts[key] == 1),
            extra={} if line.num_frames is None else {"listed_frames": str(line.num_frames)},
        )
        for line, keys in zip(lines, all_keys, strict=True)
    ]
    return PeerList(
        source=path,
        entries=entries,
        num_checked=num_lines - len(unchecked),
        num_lines=num_lines,
        first_unchecked=f"line {unchecked[0].number}, folder {unchecked[0].folder!r}" if unchecked else "",
    )


def _read_lines(path: Path) -> Iterator[_Line]:
    text = read_text(path)
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            parsed = _parse_line(line, number=number)
            if parsed is None:
                raise ValueError(
                    f"{path}, line {number}: expected 'video label' or 'directory num_frames label' with one whole "
                    f"number as the label, got {line.strip()!r}."
                )
            yield parsed
    if not text.strip():
        raise ValueError(f"{path} is an empty list; expected a path and a class number a line.")


def _parse_line(text: str, *, number: int) -> _Line | None:
    """None if the line has another form; MMAction2's lists of several labels, or with offsets, are none of ours."""
    labelled = _NUMBERED.fullmatch(text.strip())
    if labelled is None:
        return None
    label, head = int(labelled["number"]), labelled["head"].strip().strip('"')
    if _is_video(head):
        return _Line(number=number, path=PurePosixPath(head), num_frames=None, label=label)
    counted = _NUMBERED.fullmatch(head)
    if counted is None:
        return None
    folder = counted["head"].strip().strip('"')
    # a comma, or one more number, is another table: Moments in Time's "file,label,3,1", MMAction2's offsets
    if "," in folder or _is_video(folder) or _NUMBERED.fullmatch(folder):
        return None
    return _Line(number=number, path=PurePosixPath(folder), num_frames=int(counted["number"]), label=label)


def _is_video(text: str) -> bool:
    return PurePosixPath(text).suffix.lower() in VIDEO_SUFFIXES


def _without_repeats(lines: Sequence[_Line], *, path: Path) -> list[_Line]:
    kept: dict[PurePosixPath, _Line] = {}
    repeated = [line for line in lines if kept.setdefault(line.path, line) is not line]
    for line in repeated:
        first = kept[line.path]
        if first.label != line.label:
            raise ValueError(
                f"{path}: {line.path} has the label {first.label} on line {first.number} and {line.label} on line "
                f"{line.number}; keep one of them."
            )
    if repeated:
        LOGGER.warning("%s lists %d clips more than once, first %s.", path, len(repeated), repeated[0].path)
    return list(kept.values())


def _check_label_order(lines: Sequence[_Line], *, classes: Sequence[str], path: Path) -> list[_Line]:
    """The lines that lie in no class folder; a ValueError at the first whose class folder has another number."""
    names = ClassNames(classes)
    found = {folder: names.find(folder) for folder in {line.folder for line in lines}}
    in_folders = [(line, name) for line in lines if (name := found[line.folder]) is not None]
    unknown = [line for line in lines if found[line.folder] is None]
    wrong = [(line, name) for line, name in in_folders if names.index[name] != line.label]
    if not wrong:
        _check_spelling(unknown, num_known=len(in_folders), names=names, path=path)
        return unknown
    line, name = wrong[0]
    there = repr(classes[line.label]) if 0 <= line.label < len(classes) else "no class"
    raise ValueError(
        f"{path}, line {line.number}: the folder {line.folder!r} has the number {line.label}, which is "
        f"{there} in the classes file, where {name!r} is {names.index[name]}; {len({name for _, name in wrong})} of "
        f"the {len(classes)} classes differ{_why_numbers_differ(in_folders, classes=classes)}; write the list anew "
        "with the numbers of the classes file."
    )


def _check_spelling(unknown: Sequence[_Line], *, num_known: int, names: ClassNames, path: Path) -> None:
    """Where the folders of most lines are classes, one that is none is misspelt, or of another version."""
    strange = [line for line in unknown if line.folder]
    if num_known > len(strange) > 0:
        line = strange[0]
        raise ValueError(
            f"{path}, line {line.number}: the folder {line.folder!r} is not one of the {len(names.index)} classes, as "
            f"those of {num_known:,} lines are ({len(strange):,} are not); the nearest is "
            f"{names.nearest(line.folder)!r}; correct it in the list."
        )


def _why_numbers_differ(in_folders: Sequence[tuple[_Line, str]], *, classes: Sequence[str]) -> str:
    """', because ...' where the numbers are those of a well-known wrong order; else nothing."""
    stripped = sorted(classes, key=_torchvision_folder)
    folders = sorted({line.folder for line, _ in in_folders})
    by_name = {name: number for number, name in enumerate(stripped)}
    by_folder = {folder: number for number, folder in enumerate(folders)}
    official = {name: number for number, name in enumerate(classes)}
    if all(by_name[name] == line.label for line, name in in_folders):
        return ", because the list numbers sorted folder names as torchvision writes them"
    if all(by_folder[line.folder] == line.label for line, _ in in_folders):
        return ", because the list numbers its own sorted folder names"
    if all(official[name] + 1 == line.label for line, name in in_folders):
        return ", because the list counts from 1"
    return ""


def _torchvision_folder(name: str) -> str:
    """The folder that torchvision.datasets.Kinetics makes for a class."""
    return re.sub(r"['()]", "", name.replace(" ", "_"))


def check_class_order(theirs: Sequence[str], *, ours: Sequence[str], source: str) -> None:
    """Checks the lines of a peer's label map: names, "name,index" (Moments in Time) or "index name" (UCF101, X-CLIP).

    Indices count from 0 or from 1, and lines may stand in any order. Names are compared by `class_key`.

    Raises:
        ValueError: another number of classes, a name that is not ours, or another order; `source` is named.
    """
    names = _names_of_label_map([line.strip() for line in theirs if line.strip()], source=source)
    classes = ClassNames(ours)
    unknown = [name for name in names if classes.find(name) is None]
    if unknown:
        raise ValueError(
            f"{source}: {unknown[0]!r} is not one of the {len(ours)} classes ({len(unknown)} names are not); the "
            f"nearest is {classes.nearest(unknown[0])!r}; is this the label map of another version?"
        )
    if len(names) != len(ours):
        raise ValueError(f"{source} has {len(names)} classes; expected {len(ours)}; is it of another version?")
    wrong = [index for index, name in enumerate(names) if classes.find(name) != ours[index]]
    if wrong:
        stripped = sorted(ours, key=_torchvision_folder)
        is_sorted = [classes.find(name) for name in names] == stripped
        raise ValueError(
            f"{source}: class {wrong[0]} is {names[wrong[0]]!r}, expected {ours[wrong[0]]!r}; {len(wrong)} of the "
            f"{len(ours)} classes differ{', because these are sorted folder names' if is_sorted else ''}; what was "
            "numbered by this map must be renumbered."
        )


def _names_of_label_map(lines: Sequence[str], *, source: str) -> list[str]:
    """The names in the order of their indices, whatever the form of the lines."""
    rows = lines[1:] if lines and re.fullmatch(r"id\s*,\s*name", lines[0], re.IGNORECASE) else lines
    for form in (r"(?P<name>.+?)\s*,\s*(?P<index>\d+)", r"(?P<index>\d+)(?:\s*,\s*|\s+)(?P<name>.+)"):
        matches = [match for row in rows if (match := re.fullmatch(form, row))]
        if rows and len(matches) == len(rows):
            numbered = sorted((int(match["index"]), match["name"].strip().strip('"')) for match in matches)
            first = numbered[0][0]
            if first not in (0, 1) or [index for index, _ in numbered] != list(range(first, first + len(rows))):
                raise ValueError(f"{source}: the indices must be 0, 1, 2, ... or 1, 2, 3, ..., each once.")
            return [name for _, name in numbered]
    return [row.strip('"') for row in rows]


def read_class_folders(videos: Path, *, classes: Sequence[str], annotations_help: str = "") -> list[Entry]:
    """The clips of DIR/<class>/clip.mp4 or DIR/<split>/<class>/clip.mp4, sorted by path; the label is the folder's.

    Folders may be named in any way that `class_key` understands; with no `classes` their names are the labels. The
    split is train, val or test, by the upper folder ("validation" is val), else empty. An entry's only key is its path
    relative to `videos`. `annotations_help`: which lists could be given instead, for messages.

    Raises:
        ValueError: no videos, another or a mixed layout, an upper folder that is no split, or a folder that is no
            class.
    """
    paths = find_videos(videos).videos
    lists = f"--annotations{f' ({annotations_help})' if annotations_help else ''}"
    _check_layout(paths, videos=videos, lists=lists)
    names = ClassNames(classes)
    labels: dict[str, str] = {}
    for folder in dict.fromkeys(path.parts[-2] for path in paths):
        label = names.find(folder) if classes else folder
        if label is None:
            raise ValueError(
                f"{videos}: the folder {folder!r} is not one of the {len(classes)} classes; the nearest is "
                f"{names.nearest(folder)!r}; rename the folder, or give the lists of clips by {lists}."
            )
        labels[folder] = label
    unique_stems = len({path.stem for path in paths}) == len(paths)
    return [
        Entry(
            video_id=path.stem if unique_stems else path.as_posix(),
            label=labels[path.parts[-2]],
            split=SPLIT_FOLDERS[path.parts[0].lower()] if len(path.parts) == 3 else "",
            keys=(path.as_posix(),),
        )
        for path in paths
    ]


def _check_layout(paths: Sequence[PurePosixPath], *, videos: Path, lists: str) -> None:
    layout = "<class>/clip.mp4 or <split>/<class>/clip.mp4"
    if not paths:
        raise ValueError(f"{videos} holds no video files; expected {layout}.")
    for path in paths:
        if len(path.parts) not in (2, 3) or len(path.parts) != len(paths[0].parts):
            other = f" and {path}" if path != paths[0] else ""
            raise ValueError(
                f"{videos} must be laid out as {layout} throughout, got {paths[0]}{other}; for another layout give "
                f"the lists of clips by {lists}."
            )
    uppers = dict.fromkeys(path.parts[0] for path in paths if len(path.parts) == 3)
    strange = [upper for upper in uppers if upper.lower() not in SPLIT_FOLDERS]
    if strange:
        remedy = f"give --videos {videos / strange[0]}" if len(uppers) == 1 else "rename it train, val or test"
        raise ValueError(f"{videos}: the upper folder {strange[0]!r} is no split; {remedy}.")


def find_annotation(request: Request, *, names: Sequence[str]) -> Path | None:
    """The first of --annotations that has one of these names, or is a folder that holds a file of such a name."""
    places = [path / name if path.is_dir() else path for path in request.annotations for name in names]
    return next((path for path in places if path.name in names and path.is_file()), None)


def read_json(path: Path) -> Any:
    """What a JSON file holds; ValueError if it is none."""
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON file: {error}.") from error


def read_text(path: Path) -> str:
    """The text of an annotation file; spreadsheets put a byte order mark first. ValueError if it is no UTF-8 text."""
    if not path.is_file():
        raise ValueError(f"There is no annotation file {path}.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a text file in UTF-8: {error.reason} at byte {error.start}.") from error
