"""Where a video's bytes come from: a file, memory, an open file, or a URL that fsspec knows."""

import io
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable


@runtime_checkable
class BinaryFile(Protocol):
    """An open file, or what reads like one: io.BytesIO, a file of fsspec, an upload."""

    def read(self, size: int = -1, /) -> bytes:
        """The rest of the file, or so many bytes of it."""

    def seekable(self) -> bool:
        """Whether it can go back."""

    def seek(self, offset: int, /) -> int:
        """Goes to this byte."""


VideoSource = Path | str | bytes | BinaryFile


class UnreadableVideo(ValueError):
    """A file that cannot be read, or not exactly; the message is "<path>: <cause>"."""


class Source(NamedTuple):
    """A video to open as often as needed. name: for messages; data: a file's path, or all its bytes."""

    name: str
    data: Path | bytes

    def open(self) -> str | io.BytesIO:
        """What PyAV and torchcodec take: a path, or a new file object over the bytes."""
        return str(self.data) if isinstance(self.data, Path) else io.BytesIO(self.data)

    def open_file(self) -> io.BufferedReader | io.BytesIO:
        """A file object at the first byte."""
        return self.data.open("rb") if isinstance(self.data, Path) else io.BytesIO(self.data)

    def num_bytes(self) -> int:
        """The size of the file."""
        return self.data.stat().st_size if isinstance(self.data, Path) else len(self.data)

    def stamp(self) -> tuple[int, int]:
        """Size and time of change: another stamp is another file. UnreadableVideo where it is gone."""
        if isinstance(self.data, bytes):
            return len(self.data), 0
        try:
            found = self.data.stat()
        except FileNotFoundError as error:
            raise UnreadableVideo(f"{self.name}: the file was removed while it was read") from error
        return found.st_size, found.st_mtime_ns


def is_url(source: object) -> bool:
    """Whether this is a remote path: a string with a scheme, s3://bucket/clip.mp4."""
    return isinstance(source, str) and "://" in source


def as_source(source: VideoSource) -> Source:
    """The bytes of an open file or of a URL are read whole: a clip is a few MB, and decoders seek back and forth.

    UnreadableVideo where there is no file, or an empty one; ValueError for a URL whose file system is not installed.
    """
    if isinstance(source, bytes):
        found = Source("the bytes given", source)
    elif isinstance(source, str) and is_url(source):
        found = Source(source, _fetch(source))
    elif isinstance(source, str | Path):
        path = Path(source)
        if not path.is_file():
            raise UnreadableVideo(f"{path}: {_not_a_file(path)}")
        found = Source(str(path), path)
    elif isinstance(source, BinaryFile):
        found = Source(str(getattr(source, "name", "the file object given")), _read_whole(source))
    else:
        raise TypeError(f"expected a video's path, URL, bytes or open file, got {type(source).__name__}")
    if found.num_bytes() == 0:
        raise UnreadableVideo(f"{found.name}: the file is empty (0 bytes)")
    return found


def _not_a_file(path: Path) -> str:
    if path.is_symlink():
        return f"it is a link to {path.readlink()}, and there is no such file"
    return "it is not a file that can be read from its start" if path.exists() else "there is no such file"


def _read_whole(file: BinaryFile) -> bytes:
    if file.seekable():
        file.seek(0)
    data = file.read()
    if not isinstance(data, bytes):
        raise TypeError(f"expected a file opened for bytes (mode 'rb'), got one that gives {type(data).__name__}")
    return data


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as file:
            return bytes(file.read())
    except FileNotFoundError as error:
        raise UnreadableVideo(f"{url}: there is no such file") from error
    except (ImportError, ValueError) as error:
        raise ValueError(f"{url}: fsspec knows no such kind of path, or needs a package for it ({error})") from error
    except OSError as error:
        raise UnreadableVideo(f"{url}: it cannot be fetched ({error})") from error
