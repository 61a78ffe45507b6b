"""Which files of a folder are clips, by their endings."""

import os
from pathlib import Path

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".3gp", ".mts", ".m2ts"}
)
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


def clip_files(folder: Path) -> list[Path]:
    """Sorted paths relative to `folder` of the video files below it, or, where there are none, of the pictures.

    Not of both: thumbnails lie beside clips. Names that start with a dot (macOS leaves ._clip.mp4) are no clips.
    """
    videos: list[Path] = []
    pictures: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            path = (Path(parent) / name).relative_to(folder)
            if not name.startswith("."):
                videos += [path] if path.suffix.lower() in VIDEO_SUFFIXES else []
                pictures += [path] if path.suffix.lower() in IMAGE_SUFFIXES else []
    return sorted(videos or pictures)
