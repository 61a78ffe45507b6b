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
    """The files of each clip by its video_id, best first; why a clip has none where that is known; files of no clip."""

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
    """All files that bear a key of the entry, those of its best key first; folders of images where there is no video.

    A file is of one clip alone, the one that its own best key names. A key that several entries hold (a YouTube id with
    two clips) tells none of them, and no file is taken by it.
    """
    holders = Counter(key for entry in entries for key in dict.fromkeys(entry.keys))
    owners = {
        key: (entry.video_id, rank)
        for entry in entries
        for rank, key in enumerate(dict.fromkeys(entry.keys))
        if holders[key] == 1
    }
    videos = _by_owner(found.videos, owners=owners, file_keys=file_keys)
    image_folders = _by_owner(found.image_folders, owners=owners, file_keys=file_keys)
    files = {
        entry.video_id: here
        for entry in entries
        if (here := videos.get(entry.video_id) or image_folders.get(entry.video_id))
    }
    taken = {path for paths in files.values() for path in paths}
    extra = tuple(path for path in found.videos if path not in taken)
    unsure = {key: path for path in reversed(extra) for key in file_keys(path) if holders[key] > 1}
    causes = {
        entry.video_id: cause
        for entry in entries
        if entry.video_id not in files and (cause := _why_missing(entry, unsure=unsure))
    }
    return Matches(files=files, causes=causes, extra=extra)


def _by_owner(
    paths: Sequence[PurePosixPath], *, owners: Mapping[str, tuple[str, int]], file_keys: FileKeys
) -> dict[str, tuple[PurePosixPath, ...]]:
    """The paths of each video_id, by the rank of the key that they bear, then in their own order."""
    ranked = defaultdict[str, list[tuple[int, PurePosixPath]]](list)
    for path in paths:
        owner = next((owners[key] for key in file_keys(path) if key in owners), None)
        if owner is not None:
            ranked[owner[0]].append((owner[1], path))
    return {video_id: tuple(path for _, path in sorted(found)) for video_id, found in ranked.items()}


def _why_missing(entry: Entry, *, unsure: Mapping[str, PurePosixPath]) -> str:
    if not entry.keys:
        return "its path in the list ends like another's: no name of a file would tell it"
    path = next((unsure[key] for key in entry.keys if key in unsure), None)
    return "" if path is None else f"{path} may be this clip or another of the list: its name does not tell"
