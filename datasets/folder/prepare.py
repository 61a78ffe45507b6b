"""The recipe of one's own clips: a folder for each class, to entries. See README.md here."""

from pathlib import PurePosixPath

from coca_video.data.annotations import read_class_folders
from coca_video.data.manifest import CLASSES_FILE, read_classes
from coca_video.data.recipe import Entry, Recipe, Request, Version

HELP = (
    "None for class folders, DIR/<class>/clip.mp4 or DIR/<split>/<class>/clip.mp4; else lists of lines 'path label', "
    "with --classes and --split."
)


def list_clips(request: Request) -> list[Entry]:
    """A clip for each video file below `request.videos`, sorted by path; without folders of splits they have no split.

    Labels are folder names; where classes were given, or stand in a classes.txt there, the classes that folders mean.

    Raises:
        ValueError: --annotations is no list of lines "path label" (such a list is read without this function), there
            are no clips, the layout is mixed, or classes.txt lacks a folder.
    """
    if request.annotations:
        raise ValueError(
            f"{request.annotations[0]} is no list of lines 'path label', as the recipe 'folder' takes it with "
            "--classes and --split; leave it out where class folders are the list, or take the recipe of its data set."
        )
    own = request.videos / CLASSES_FILE
    classes = request.classes or (read_classes(own) if own.is_file() else ())
    return read_class_folders(request.videos, classes=classes)


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The whole path: an own clip has no other name."""
    return (path.as_posix(),)


recipe = Recipe(
    name="own clips",
    # no list of ours gives the classes, and no one says how many clips there should be
    versions={"1": Version(classes="", official={})},
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help=HELP,
)
