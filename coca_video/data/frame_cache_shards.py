"""A frame cache while it grows: clips in files of their own, appended in order to the files of frames and the index."""

import io
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from coca_video.data.frame_cache_format import INDEX_FILE, FrameCacheConfig, record_checksum, record_dtype, shard_path

CLIPS_FOLDER = "clips"
PARTIAL_PREFIX = ".partial-"


class EncodedClip(NamedTuple):
    """A record, in which only the place is not yet known, and the bytes that it speaks of."""

    record: np.void
    data: bytes


def failed_clip(cause: str, *, config: FrameCacheConfig) -> EncodedClip:
    """In place of a clip's frames, why there are none."""
    record, data = np.zeros(1, dtype=record_dtype(config.num_frames))[0], cause.encode()
    record["checksums"][0] = zlib.crc32(data)
    return EncodedClip(record, data)


def _clip_path(clips: Path, *, number: int) -> Path:
    return clips / f"{number:08d}"


def write_clip(clips: Path, *, number: int, clip: EncodedClip) -> int:
    """Writes the clip of row `number` to a file of its own, which waits to be appended; how many bytes it has."""
    clip.record["num_bytes"] = len(clip.data)
    clip.record["checksum"] = record_checksum(clip.record)
    write_whole(_clip_path(clips, number=number), data=clip.record.tobytes() + clip.data)
    return len(clip.data)


def write_whole(path: Path, *, data: bytes) -> None:
    """The file appears under its name only when it is whole."""
    partial_path = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}")
    with partial_path.open("wb") as file:
        file.write(data)
    partial_path.replace(path)


@contextmanager
def locked_index(folder: Path) -> Iterator[io.FileIO]:
    """The index, to append to, while no other process builds in this folder."""
    with (folder / INDEX_FILE).open("ab", buffering=0) as index:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.flock(index, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of by the system, even after kill -9
            except BlockingIOError as error:
                raise ValueError(f"{folder}: another process is building this frame cache; wait for it.") from error
        yield index


class Shards:
    """The files of frames and the index, to which clips are appended in the order of their rows.

    A clip's bytes come before its record, and its own file goes after both: whatever a kill leaves, what the index
    tells of is there.
    """

    def __init__(self, folder: Path, *, index: io.FileIO, config: FrameCacheConfig) -> None:
        self._folder, self._index, self._config = folder, index, config
        self._clips = folder / CLIPS_FOLDER
        self._dtype = record_dtype(config.num_frames)
        self.num_bytes = 0
        """Of frames, in this folder, appended or waiting."""
        self._num_rows = self._shard = self._end = 0

    def recover(self, *, num_clips: int) -> Int64[np.ndarray, "left"]:
        """Puts in order what an earlier run left, and returns the rows that are still to be cached."""
        self._find_end()
        self._clips.mkdir(exist_ok=True)
        for half in (*self._folder.glob(f"{PARTIAL_PREFIX}*"), *self._clips.glob(f"{PARTIAL_PREFIX}*")):
            half.unlink()
        waiting = {}
        for path in self._clips.iterdir():
            clip = self._load(path) if int(path.name) >= self._num_rows else None
            if clip is None:  # appended already, or not whole after a power cut
                path.unlink()
            else:
                waiting[int(path.name)] = len(clip.data)
        self.num_bytes += sum(waiting.values())
        self._append_those_next()
        left = np.setdiff1d(np.arange(self._num_rows, num_clips), np.array(list(waiting), dtype=np.int64))
        return left.astype(np.int64)

    def take(self, *, num_bytes: int) -> None:
        """Notes that a clip of so many bytes is done, and appends all whose turn it is.

        Its file may have gone already: a worker writes it before it says so, and the clip before it may come between.
        """
        self.num_bytes += num_bytes
        self._append_those_next()

    def finish(self) -> tuple[int, ...]:
        """Everything is on the disk: the size of each file of frames."""
        os.fsync(self._index.fileno())
        _sync(shard_path(self._folder, self._shard))
        shutil.rmtree(self._clips)
        return tuple(shard_path(self._folder, number).stat().st_size for number in range(self._shard + 1))

    def _find_end(self) -> None:
        """The last record that is whole and whose bytes are there; what comes after it is cut off."""
        index = self._folder / INDEX_FILE
        count = index.stat().st_size // self._dtype.itemsize
        while count > 0:
            offset = (count - 1) * self._dtype.itemsize
            record = np.fromfile(index, dtype=self._dtype, count=1, offset=offset)[0]
            shard, end = int(record["shard"]), int(record["offset"]) + int(record["num_bytes"])
            path = shard_path(self._folder, shard)
            if record_checksum(record) == record["checksum"] and path.is_file() and path.stat().st_size >= end:
                self._shard, self._end = shard, end
                break
            count -= 1
        self._num_rows = count
        os.truncate(index, count * self._dtype.itemsize)
        current = shard_path(self._folder, self._shard)
        for path in sorted(self._folder.glob(shard_path(Path(), 0).name.replace("00000", "*"))):
            if path.name > current.name:
                path.unlink()
            else:
                if path == current:
                    os.truncate(path, self._end)
                self.num_bytes += path.stat().st_size

    def _append_those_next(self) -> None:
        while (path := _clip_path(self._clips, number=self._num_rows)).exists():
            clip = self._load(path)
            if clip is None:
                raise OSError(f"{path} changed after it was written; run the building again.")
            self._append(clip)
            path.unlink()

    def _append(self, clip: EncodedClip) -> None:
        if self._end > 0 and self._end + len(clip.data) > self._config.shard_bytes:
            _sync(shard_path(self._folder, self._shard))
            self._shard, self._end = self._shard + 1, 0
        clip.record["shard"], clip.record["offset"] = self._shard, self._end
        clip.record["checksum"] = record_checksum(clip.record)
        with shard_path(self._folder, self._shard).open("ab", buffering=0) as file:
            _write_all(file, data=clip.data)
        _write_all(self._index, data=clip.record.tobytes())
        self._end += len(clip.data)
        self._num_rows += 1

    def _load(self, path: Path) -> EncodedClip | None:
        """A clip's own file; None if it is not what was written."""
        data = path.read_bytes()
        if len(data) < self._dtype.itemsize:
            return None
        record = np.frombuffer(data, dtype=self._dtype, count=1).copy()[0]
        data = data[self._dtype.itemsize :]
        whole = len(data) == record["num_bytes"] and record_checksum(record) == record["checksum"]
        return EncodedClip(record, data) if whole else None


def _write_all(file: io.FileIO, *, data: bytes) -> None:
    written = file.write(data)
    if written != len(data):
        raise OSError(f"{file.name}: only {written} of {len(data)} bytes could be written; is the disk full?")


def _sync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
