"""The recipe of HMDB51: 51 files a split, each line a clip and 0, 1 or 2, to entries. See README.md here."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from coca_video.data.annotations import path_keys, read_text
from coca_video.data.manifest import CLASSES_FILE, read_classes
from coca_video.data.recipe import Entry, Recipe, Request, Version

# film or web video, class, then visible body parts, camera motion, people, view, quality and a number
NAME = re.compile(r"(?P<source_and_class>.+)_[a-z]_(?:cm|nm)_np\d+_[a-z]{2}_(?:bad|med|goo)_\d+")
CLASSES = read_classes(Path(__file__).parent / CLASSES_FILE)
LOGGER = logging.getLogger("coca_video.datasets.hmdb51")
SPLITS = {"0": None, "1": "train", "2": "test"}  # 0: the clip is not used in this split
HELP = (
    "The folder testTrainMulti_7030_splits with {class}_test_splitN.txt (N is --version), or the 51 files themselves."
)


def list_clips(request: Request) -> list[Entry]:
    """The clips that split `request.version` trains and tests on, class by class.

    Those marked 0 are left out; how many they are is logged.

    Raises:
        ValueError: the file of a class is missing, or a line is not a name and 0, 1 or 2.
    """
    paths = _split_files(request)
    clips = [(label, *clip) for label, path in paths.items() for clip in _read_split(path)]
    times = Counter(_key(name) for _, name, _ in clips)
    unused = sum(split is None for _, _, split in clips)
    if unused:
        LOGGER.warning("HMDB51 split %s does not use %d of %d clips (marked 0).", request.version, unused, len(clips))
    return [
        _entry(name, label=label, split=split, alone=times[_key(name)] == 1)
        for label, name, split in clips
        if split is not None
    ]


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """class/name and name, without suffix; spelled as one Unicode form, for macOS writes u and umlaut apart."""
    name = path_keys(path)[-1]
    return _key(f"{path.parent.name}/{name}"), _key(name)


def source_id(path: PurePosixPath) -> str | None:
    """The film or web video: what stands before the class, which is the folder's, else the longest that fits."""
    match = NAME.fullmatch(path_keys(path)[-1])
    if match is None:
        return None
    head = unicodedata.normalize("NFC", match["source_and_class"])
    fitting = [label for label in CLASSES if head.endswith(f"_{label}")]
    label = path.parent.name if path.parent.name in fitting else max(fitting, key=len, default=None)
    return None if label is None else head.removesuffix(f"_{label}")


def _entry(name: str, *, label: str, split: str, alone: bool) -> Entry:
    """A name that stands in two classes is known by its class folder only, and has it in its id."""
    in_class = f"{label}/{name}"
    source = unicodedata.normalize("NFC", name).rpartition(f"_{label}_")[0]
    return Entry(
        video_id=name if alone else in_class,
        label=label,
        split=split,
        keys=(_key(in_class), _key(name)) if alone else (_key(in_class),),
        source_id=source or source_id(PurePosixPath(in_class)),
    )


def _split_files(request: Request) -> dict[str, Path]:
    """The file of each class, in the order of classes."""
    given: dict[str, Path] = {}
    for path in request.annotations:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            given.setdefault(file.name, file)
    names = {label: f"{label}_test_split{request.version}.txt" for label in request.classes}
    missing = [name for name in names.values() if name not in given]
    if missing:
        raise ValueError(
            f"HMDB51 split {request.version} needs {len(names)} files, one a class, and {len(missing)} are not among "
            f"--annotations: {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}; give it the folder "
            "testTrainMulti_7030_splits."
        )
    return {label: given[name] for label, name in names.items()}


def _read_split(path: Path) -> Iterator[tuple[str, str | None]]:
    """(name without suffix, split or None) of each line; names hold spaces, '#', ';', '[' and '&'."""
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        name, _, mark = line.strip().rpartition(" ")
        if mark not in SPLITS or not name.lower().endswith(".avi"):
            raise ValueError(f"{path}, line {number}: expected 'name.avi' and 0, 1 or 2, got {line.strip()!r}.")
        yield name.strip()[: -len(".avi")], SPLITS[mark]


def _key(text: str) -> str:
    return unicodedata.normalize("NFC", text).lower()


recipe = Recipe(
    name="HMDB51",
    # 70 clips of each of the 51 classes to train on and 30 to test on
    versions={
        split: Version(classes="classes.txt", official={"train": 3_570, "test": 1_530}) for split in ("1", "2", "3")
    },
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help=HELP,
    source_id=source_id,
    versions_are_splits=True,
)
