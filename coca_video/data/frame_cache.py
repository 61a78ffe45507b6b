"""Frames of every clip, resized, as JPEG in a few large files: read instead of decoding the videos again each epoch.

`frame_cache_build` writes it. Its index is memory-mapped, so that loader workers share its pages. Pillow and not
torchvision, whose JPEG functions are deprecated since 0.29, though it is slower: 16 frames of 340x256 on one core are
encoded in 4.1 ms by Pillow 13 and 3.0 by torchvision, decoded in 6.1 and 4.6, to the same pixels.
"""

import io
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coca_video.data.deadline import within
from coca_video.data.decode import UnreadableVideo
from coca_video.data.frame_cache_format import (
    BUILD_AGAIN,
    INDEX_FILE,
    FrameCacheConfig,
    read_checked,
    read_facts,
    record_checksum,
    record_dtype,
    shard_path,
)
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import Manifest
from coca_video.data.video import ClipConfig, VideoDataset, clip_indices


@dataclass(frozen=True, kw_only=True)
class CachedClip:
    """The frames kept of one clip, in order: position 0 is the first.

    numbers, times_seconds: each frame's number in the video and its time there. num_frames, frames_per_second: the
    video's; first_frame, last_frame: the row's window of it, last excluded.
    """

    name: str
    numbers: Int64[np.ndarray, "cached"]
    times_seconds: Float64[np.ndarray, "cached"]
    num_frames: int
    frames_per_second: float
    first_frame: int
    last_frame: int
    height: int
    width: int
    shard: Path
    offsets: Int64[np.ndarray, "cached"]
    sizes: Int64[np.ndarray, "cached"]
    checksums: Int64[np.ndarray, "cached"]

    def __len__(self) -> int:
        return len(self.numbers)

    def positions_of(self, numbers: Sequence[int]) -> list[int]:
        """Where frames of the video, by their numbers there, are in the cache; ValueError where one is not kept."""
        places = np.minimum(np.searchsorted(self.numbers, numbers), len(self) - 1)
        missing = np.asarray(numbers)[self.numbers[places] != numbers]
        if missing.size:
            raise ValueError(
                f"{self.name} keeps {len(self)} of the {self.last_frame - self.first_frame} frames of its clip, and "
                f"frame {missing[0]} is not one of them; read the videos themselves for frames that the cache lacks."
            )
        return [int(place) for place in places]

    def frames(self, positions: Sequence[int]) -> UInt8[Tensor, "len 3 height width"]:
        """The frames at these positions, in any order, repeats allowed; no other frame is read.

        Opened for each call, so that there is nothing to share between processes or threads, forked or spawned (15 us
        where decoding takes 5 ms). In memory the channels lie last: resizing 16 frames then takes 1.6 ms and not 3.2.

        ValueError for a position out of range; UnreadableVideo where the file is damaged.
        """
        for position in positions:
            if not 0 <= position < len(self):
                raise ValueError(f"{self.name}: position {position} was asked for, of 0 to {len(self) - 1}")
        pixels = np.empty((len(positions), self.height, self.width, 3), dtype=np.uint8)
        places: dict[int, list[int]] = {}
        for place, position in enumerate(positions):
            places.setdefault(int(position), []).append(place)
        try:
            with self.shard.open("rb", buffering=0) as file:
                for position in sorted(places):
                    pixels[places[position]] = self._decode(file, position=position)
        except (UnidentifiedImageError, OSError) as error:
            raise UnreadableVideo(f"{self.name} cannot be read ({error}); {BUILD_AGAIN}") from error
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _decode(self, file: io.FileIO, *, position: int) -> UInt8[np.ndarray, "height width 3"]:
        data = read_checked(
            file,
            offset=int(self.offsets[position]),
            num_bytes=int(self.sizes[position]),
            checksum=int(self.checksums[position]),
            name=self.name,
        )
        with Image.open(io.BytesIO(data)) as image:
            return np.asarray(image)


class FrameCache:
    """A finished cache, opened for reading. Copies sent to other processes open the files themselves.

    Raises:
        ValueError: there is no cache in the folder, it is not finished, or its files are not whole.
    """

    def __init__(self, folder: Path) -> None:
        facts = read_facts(folder)
        if facts is None:
            raise ValueError(f"{folder} holds no frame cache; build one there first.")
        if facts.shard_sizes is None:
            raise ValueError(f"The frame cache {folder} is not finished; run its building again, it will go on.")
        self.folder, self.facts = folder, facts
        self._dtype = record_dtype(facts.config.num_frames)
        self._records: np.memmap | None = None
        expected = {folder / INDEX_FILE: facts.num_clips * self._dtype.itemsize}
        expected |= {shard_path(folder, number): size for number, size in enumerate(facts.shard_sizes)}
        for path, size in expected.items():
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                there = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(f"{path} {there} where {size} bytes were written; {BUILD_AGAIN}.")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_records": None}  # else a copy of the whole index would travel

    def __len__(self) -> int:
        return self.facts.num_clips

    @property
    def config(self) -> FrameCacheConfig:
        """What is kept of each clip."""
        return self.facts.config

    def check_manifest(self, manifest: Manifest) -> None:
        """Raises a ValueError if the cache is of another manifest."""
        if manifest.fingerprint() != self.facts.fingerprint:
            raise ValueError(
                f"The frame cache {self.folder} was built of another manifest than {manifest.source}: clips, labels, "
                "times, splits or classes differ; build one for this manifest in another folder."
            )

    def cause(self, row: int) -> str | None:
        """Why row `row` of the manifest could not be read when the cache was built, without its path; None if it could.

        UnreadableVideo where the cache is damaged.
        """
        record = self._record(row)
        if record["num_cached"] > 0:
            return None
        place = {"offset": int(record["offset"]), "num_bytes": int(record["num_bytes"])}
        try:
            with shard_path(self.folder, int(record["shard"])).open("rb", buffering=0) as file:
                return read_checked(file, **place, checksum=int(record["checksums"][0]), name=self._name(row)).decode()
        except OSError as error:
            raise UnreadableVideo(f"{self._name(row)} cannot be read ({error}); {BUILD_AGAIN}") from error

    def unreadable(self) -> dict[int, str]:
        """The cause of every row that could not be read."""
        causes = {row: self.cause(row) for row in np.flatnonzero(self._index()["num_cached"] == 0).tolist()}
        return {row: cause for row, cause in causes.items() if cause is not None}

    def clip(self, row: int) -> CachedClip:
        """The frames kept of row `row` of the manifest; none is read yet.

        UnreadableVideo for a clip that could not be read when the cache was built, and where the cache is damaged.
        """
        if (cause := self.cause(row)) is not None:
            raise UnreadableVideo(f"{self._name(row)}: {cause}")
        record = self._record(row)
        kept = slice(int(record["num_cached"]))
        sizes = record["sizes"][kept].astype(np.int64)
        return CachedClip(
            name=self._name(row),
            numbers=record["numbers"][kept].astype(np.int64),
            times_seconds=record["times_seconds"][kept].astype(np.float64),
            num_frames=int(record["video_frames"]),
            frames_per_second=float(record["frames_per_second"]),
            first_frame=int(record["first"]),
            last_frame=int(record["last"]),
            height=int(record["height"]),
            width=int(record["width"]),
            shard=shard_path(self.folder, int(record["shard"])),
            offsets=int(record["offset"]) + np.cumsum(sizes) - sizes,
            sizes=sizes,
            checksums=record["checksums"][kept].astype(np.int64),
        )

    def _name(self, row: int) -> str:
        return f"frame cache {self.folder}, clip {row}"

    def _index(self) -> np.memmap:
        if self._records is None:
            self._records = np.memmap(self.folder / INDEX_FILE, dtype=self._dtype, mode="r")
        return self._records

    def _record(self, row: int) -> np.void:
        if not 0 <= row < len(self):
            raise ValueError(f"the frame cache {self.folder} has clips 0 to {len(self) - 1}, got {row}")
        record: np.void = self._index()[row]
        if record_checksum(record) != record["checksum"]:
            raise UnreadableVideo(f"{self._name(row)}: {INDEX_FILE} is damaged; {BUILD_AGAIN}")
        return record


def check_kept(kept: FrameCacheConfig, *, config: ClipConfig, folder: Path) -> None:
    """ValueError if clips of `config` need frames or pixels that a cache of `kept` (in `folder`) does not keep."""
    if config.sampling != "uniform":
        raise ValueError(
            f"The frame cache {folder} keeps {kept.num_frames} frames spread evenly over a clip, and {config.sampling} "
            'sampling needs frames that lie close together; take sampling "uniform", or the videos themselves.'
        )
    if config.num_frames > kept.num_frames:
        raise ValueError(
            f"The frame cache {folder} keeps {kept.num_frames} frames of a clip, and {config.num_frames} are asked "
            "for; ask for fewer, or build a cache of more."
        )
    if config.image_size > kept.short_side:
        raise ValueError(
            f"The frame cache {folder} keeps frames of {kept.short_side} pixels, and images of {config.image_size} "
            "are asked for; build a cache with a short side of at least that."
        )


@dataclass(frozen=True)
class CachedVideoDataset(VideoDataset):
    """The clips of `VideoDataset`, from a frame cache: the segments are of the cached frames, the box of their size.

    With no more frames in a clip than are cached, the same frames and box as `VideoDataset`'s for every key, but for
    the loss of JPEG (and of the resizing, in a larger video).

    Raises:
        ValueError: the cache is of another manifest, or holds fewer frames or pixels than `config` asks for; or
            `config` names a decoder, which has nothing to decode here.
    """

    _: KW_ONLY
    cache: FrameCache

    def __post_init__(self) -> None:
        self.cache.check_manifest(self.manifest)
        check_kept(self.cache.config, config=self.config, folder=self.cache.folder)
        if self.config.decoder != "auto":
            raise ValueError(f'The decoder "{self.config.decoder}" has no effect on a frame cache; take "auto".')

    def _read(self, key: SampleKey) -> tuple[UInt8[Tensor, "frames 3 height width"], Float64[np.ndarray, "frames"]]:
        if (cause := self.cache.cause(key.index)) is not None:
            raise UnreadableVideo(f"{self.manifest.rows[key.index].path}: {cause}")
        cached = self.cache.clip(key.index)
        positions = clip_indices(
            len(cached), frames_per_second=cached.frames_per_second, config=self.config, seed=self.seed, key=key
        ).tolist()
        frames = within(self.config.timeout_seconds, lambda: cached.frames(positions), name=cached.name)
        return frames, cached.times_seconds[positions]
