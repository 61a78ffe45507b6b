"""The files of a frame cache: cache.json, index.bin and the JPEGs, one after the other in frames-00000.bin and so on.

cache.json says what is cached and, last of all, that all of it is there. index.bin holds one record of fixed size a
clip, to be memory-mapped. Numbers are little-endian on every machine.
"""

import io
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from coca_video.data.decode import UnreadableVideo

FORMAT_VERSION = 1
FACTS_FILE = "cache.json"
INDEX_FILE = "index.bin"
BUILD_AGAIN = "delete the folder and build the frame cache again"


@dataclass(frozen=True, kw_only=True)
class FrameCacheConfig:
    """What is kept of each clip."""

    num_frames: int = 64
    """Frames of a clip, one from the centre of each of as many equal parts; a shorter clip is kept whole."""
    short_side: int = 256
    """Pixels of the shorter side; smaller videos keep theirs."""
    quality: int = 90
    """JPEG's, 1 to 100."""
    shard_bytes: int = 1_000_000_000
    """The most bytes in one file; a single clip may be larger."""

    def __post_init__(self) -> None:
        if self.num_frames < 1 or self.short_side < 1 or self.shard_bytes < 1:
            raise ValueError(
                "a frame cache needs num_frames, short_side and shard_bytes of at least 1, got "
                f"{self.num_frames}, {self.short_side} and {self.shard_bytes}"
            )
        if not 1 <= self.quality <= 100:
            raise ValueError(f"expected a JPEG quality from 1 to 100, got {self.quality}")


@dataclass(frozen=True, kw_only=True)
class CacheFacts:
    """What cache.json says. shard_sizes: bytes of each file of frames, None as long as the cache is not finished."""

    fingerprint: str
    num_clips: int
    config: FrameCacheConfig
    shard_sizes: tuple[int, ...] | None = None

    def to_json(self) -> str:
        """As text, the same for the same facts."""
        return json.dumps({"format_version": FORMAT_VERSION, **asdict(self)}, indent=1) + "\n"


def read_facts(folder: Path) -> CacheFacts | None:
    """What a cache's folder says of itself; None where there is no cache. ValueError for another format."""
    path = folder / FACTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        version = found.pop("format_version")
        if version == FORMAT_VERSION:
            sizes, config = found.pop("shard_sizes"), FrameCacheConfig(**found.pop("config"))
            return CacheFacts(**found, config=config, shard_sizes=None if sizes is None else tuple(sizes))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged; delete the folder and build the frame cache again.") from error
    raise ValueError(
        f"{folder} holds a frame cache of format {version}, and this program reads {FORMAT_VERSION}; "
        "build it again in another folder."
    )


def record_dtype(num_frames: int) -> np.dtype[np.void]:
    """A clip's record: where its bytes are, and its `num_cached` frames; num_cached 0: the bytes say what was wrong.

    video_frames, frames_per_second: the source's; first, last: the window of frames that the row names, last excluded.
    """
    per_frame = (num_frames,)
    return np.dtype(
        [
            ("shard", "<u4"),
            ("offset", "<u8"),
            ("num_bytes", "<u4"),
            ("num_cached", "<u4"),
            ("height", "<u4"),
            ("width", "<u4"),
            ("video_frames", "<u4"),
            ("first", "<u4"),
            ("last", "<u4"),
            ("frames_per_second", "<f8"),
            ("numbers", "<u4", per_frame),
            ("sizes", "<u4", per_frame),
            ("checksums", "<u4", per_frame),
            ("times_seconds", "<f8", per_frame),
            ("checksum", "<u4"),
        ]
    )


def record_checksum(record: np.void) -> int:
    """CRC-32 of a record up to its own field `checksum`, the last."""
    return zlib.crc32(record.tobytes()[:-4])


def shard_path(folder: Path, number: int) -> Path:
    """The file of frames of this number."""
    return folder / f"frames-{number:05d}.bin"


def read_checked(file: io.FileIO, *, offset: int, num_bytes: int, checksum: int, name: str) -> bytes:
    """Bytes of a file of frames; UnreadableVideo if they are not those that were written.

    Most flipped bits of a JPEG decode to a picture, so each frame has its CRC-32 (0.06 ms for 16 frames).
    """
    file.seek(offset)
    data = file.read(num_bytes)
    if len(data) != num_bytes or zlib.crc32(data) != checksum:
        raise UnreadableVideo(f"{name}: {file.name} is damaged at byte {offset}; {BUILD_AGAIN}")
    return data
