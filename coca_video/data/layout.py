"""Which file is which clip: the files below a folder, matched with a data set's list by the keys that names hold."""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from coca_video.data.manifest import VIDEO_SUFFIXES
from coca_video.data.recipe import Entry
from coca_video.data.scan import is_image

FileKeys = Callable[[PurePosixPath], tuple[str, ...]]


@dataclass(frozen=True, kw_only=True)
class VideoFiles:
    """Paths relative to the folder that was walked, sorted: video files, and folders that hold images."""

    videos: tuple[PurePosixPath, ...]
    image_folders: tuple[PurePosixPath, ...]


@dataclass(frozen=True, kw_only=True)
class Matches:
    """The files of each clip by its video_id, sorted; why a clip has none where that is known; files of no clip."""

    files: dict[str, tuple[PurePosixPath, ...]]
    causes: dict[str, str]
    extra: tuple[PurePosixPath, ...]


def find_videos(folder: Path) -> VideoFiles:
    """Walks `folder` once. Links are followed, each folder is read once; names that begin with a dot are passed over.

    Raises:
        ValueError: there is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; expected the one with the video files.")
    videos, image_folders = list[PurePosixPath](), list[PurePosixPath]()
    for parent, names in _walk(folder):
        videos += [parent / name for name in names if PurePosixPath(name).suffix.lower() in VIDEO_SUFFIXES]
        if any(map(is_image, names)):
            image_folders.append(parent)
    return VideoFiles(videos=tuple(sorted(videos)), image_folders=tuple(sorted(image_folders)))


def _walk(folder: Path) -> Iterator[tuple[PurePosixPath, list[str]]]:
    """(folder relative to the first, names of files); a link back to a folder above does not go round for ever."""
    seen: set[tuple[int, int]] = set()
    for parent, folders, names in os.walk(folder, followlinks=True, onerror=_raise):
        stat = Path(parent).stat()
        if (stat.st_dev, stat.st_ino) in seen:
            folders.clear()
            continue
        seen.add((stat.st_dev, stat.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = PurePosixPath(Path(parent).relative_to(folder).as_posix())
        yield relative, [name for name in names if not name.startswith(".")]


def _raise(error: OSError) -> None:
    raise error  # os.walk would pass over a folder that cannot be read, and all its clips would count as missing


def match_files(entries: Sequence[Entry], *, found: VideoFiles, file_keys: FileKeys) -> Matches:
    """The files of each entry: those that bear its best key that any file bears; video files before folders of images.

    A key that several entries hold (a YouTube id with two clips) tells none of them, and no file is taken by it.
    """
    holders = Counter(key for entry in entries for key in dict.fromkeys(entry.keys))
    videos = _by_key(found.videos, file_keys=file_keys)
    image_folders = _by_key(found.image_folders, file_keys=file_keys)
    files, causes = dict[str, tuple[PurePosixPath, ...]](), dict[str, str]()
    for entry in entries:
        usable = [key for key in entry.keys if holders[key] == 1]
        here = _first(usable, by_key=videos) or _first(usable, by_key=image_folders)
        if here:
            files[entry.video_id] = here
        elif not entry.keys:
            causes[entry.video_id] = "its path in the list ends like another's: no name of a file would tell it"
        elif unsure := _first([key for key in entry.keys if holders[key] > 1], by_key=videos):
            causes[entry.video_id] = f"{unsure[0]} may be this clip or another of the list: its name does not tell"
    taken = {path for paths in files.values() for path in paths}
    return Matches(files=files, causes=causes, extra=tuple(path for path in found.videos if path not in taken))


def _by_key(paths: Sequence[PurePosixPath], *, file_keys: FileKeys) -> dict[str, list[PurePosixPath]]:
    by_key = defaultdict[str, list[PurePosixPath]](list)
    for path in paths:
        for key in dict.fromkeys(file_keys(path)):
            by_key[key].append(path)
    return by_key


def _first(keys: Sequence[str], *, by_key: Mapping[str, list[PurePosixPath]]) -> tuple[PurePosixPath, ...]:
    return next((tuple(by_key[key]) for key in keys if key in by_key), ())
