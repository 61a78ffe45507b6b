"""Tokens of a frozen encoder on disk: an epoch of a probe reads them in place of decoding and encoding its videos.

`token_cache_build` writes it, `token_cache_format` tells of its files. They are memory-mapped, so that processes share
their pages, and a clip is one piece of a file: the system is told of all clips of a batch before the first is copied.
"""

import mmap
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, Int64, Shaped
from torch import Tensor

from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest
from coca_video.data.video import NO_LABEL
from coca_video.eval.features import TokenBatch
from coca_video.eval.token_cache_format import ShardFacts, TokenLayout, dequantize, file_bytes, read_facts, shard_path

MAX_MAPS = 256  # of shards at a time: each holds a file descriptor, of which a process has 1,024 as a rule


@dataclass(frozen=True, kw_only=True)
class CachedTokens:
    """A clip's tokens as they are stored (bf16 as its bits), mean-free over features; what they lack stands beside.

    scales: of each feature, for int8. The arrays are views of the file.
    """

    values: Shaped[np.ndarray, "frames tokens dim"]
    scales: Float32[np.ndarray, "dim"] | None
    variance: Float32[np.ndarray, "frames tokens"]
    mean: Float32[np.ndarray, "frames tokens"]
    label: int
    video_id: str


@dataclass(frozen=True, kw_only=True)
class PackedTokens:
    """A batch of tokens as they are stored, to be moved to the device before they take more room there."""

    values: Shaped[Tensor, "batch frames tokens dim"]
    scales: Float32[Tensor, "batch dim"] | None
    variance: Float32[Tensor, "batch frames tokens"]
    mean: Float32[Tensor, "batch frames tokens"]
    labels: Int64[Tensor, "batch"]
    video_ids: tuple[str, ...]

    def to_tokens(self, dtype: torch.dtype = torch.float32) -> TokenBatch:
        """Mean-free tokens and their variances: what a head needs, since all begin with a layer norm."""
        tokens = self.values if self.values.dtype == dtype else self._values_fp32().to(dtype)
        return TokenBatch(tokens=tokens, labels=self.labels, video_ids=self.video_ids, variance=self.variance)

    def to_whole_tokens(self, dtype: torch.dtype = torch.float32) -> TokenBatch:
        """The tokens with their means, as the encoder gave them; for what does not begin with a layer norm."""
        tokens = (self._values_fp32() + self.mean.unsqueeze(-1)).to(dtype)
        return TokenBatch(tokens=tokens, labels=self.labels, video_ids=self.video_ids)

    def _values_fp32(self) -> Float32[Tensor, "batch frames tokens dim"]:
        return dequantize(self.values, scales=None if self.scales is None else self.scales[:, None, None])


class TokenCache:
    """A finished cache, opened for reading: indexed like the clips that it is of. Copies open the files themselves.

    Raises:
        ValueError: there is no cache in the folder, it is not finished, its files are not whole, or it is of another
            manifest.
    """

    def __init__(self, folder: Path, *, manifest: Manifest) -> None:
        facts = read_facts(folder)
        if facts is None:
            raise ValueError(f"{folder} holds no token cache; build one there first.")
        if facts.shards is None:
            raise ValueError(f"The token cache {folder} is not finished; run its building again, it will go on.")
        if facts.key["manifest"] != manifest.fingerprint():
            raise ValueError(
                f"The token cache {folder} was built of another manifest than {manifest.source}: clips, labels, "
                "times, splits or classes differ; build one for this manifest."
            )
        self.folder, self.manifest, self.facts = folder, manifest, facts
        self.shards = facts.shards
        self._check_files()
        self._slots = _slots(self.shards, layout=self.layout)
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_maps": OrderedDict()}  # else the tokens would travel

    def __len__(self) -> int:
        return self.layout.num_clips

    @property
    def layout(self) -> TokenLayout:
        """Shapes and places."""
        return self.facts.layout

    @property
    def num_bytes(self) -> int:
        """Of all files of tokens."""
        return sum(file_bytes(shard, layout=self.layout) for shard in self.shards)

    @property
    def labels(self) -> Int64[np.ndarray, "clips"]:
        """The class of each row, -1 where it is not labelled."""
        labels = [self._label(row) for row in range(len(self))]
        return np.array(labels, dtype=np.int64)

    @property
    def unreadable(self) -> tuple[Unreadable, ...]:
        """Clips that could not be read when the cache was built, in the order of their rows."""
        return tuple(Unreadable(*shard.unreadable[row]) for shard in self.shards for row in sorted(shard.unreadable))

    @property
    def relative_error(self) -> float:
        """How far stored tokens are from computed ones: the root mean square, over tokens, of |error| / |token|.

        Of tokens without their means, since that is what a head's layer norm makes unit size. NaN without tokens.
        """
        num_tokens = sum(shard.num_readable for shard in self.shards) * self.layout.num_frames * self.layout.num_tokens
        return (
            float(np.sqrt(sum(shard.error_sum for shard in self.shards) / num_tokens)) if num_tokens else float("nan")
        )

    def __getitem__(self, key: SampleKey) -> CachedTokens | Unreadable:
        """The tokens of row key.index, or the name and cause of a clip that could not be read. Epochs do not differ."""
        if not 0 <= key.index < len(self):
            raise ValueError(f"the token cache {self.folder} has clips 0 to {len(self) - 1}, got {key.index}")
        number, slot = key.index // self.layout.clips_per_shard, int(self._slots[key.index])
        if slot < 0:
            return Unreadable(*self.shards[number].unreadable[key.index])
        shard, size = self._shard(number), self.layout.record_bytes
        _announce(shard, start=slot * size, num_bytes=size)
        record = np.frombuffer(shard, dtype=np.uint8, count=size, offset=slot * size)
        values, variance, mean = self.layout.unpack_record(record)
        num_scales, scales_at = self.layout.scale_bytes // 4, self.shards[number].num_readable * size
        return CachedTokens(
            values=values,
            scales=np.frombuffer(shard, dtype="<f4", count=num_scales, offset=scales_at) if num_scales else None,
            variance=variance,
            mean=mean,
            label=self._label(key.index),
            video_id=self.manifest.rows[key.index].video_id,
        )

    @staticmethod
    def collate(clips: Sequence[CachedTokens]) -> PackedTokens:
        """One batch out of clips of one cache: each is copied once."""
        values = torch.from_numpy(np.stack([clip.values for clip in clips]))
        scales = [clip.scales for clip in clips if clip.scales is not None]
        return PackedTokens(
            values=values.view(torch.bfloat16) if values.dtype == torch.int16 else values,
            scales=torch.from_numpy(np.stack(scales)) if scales else None,
            variance=torch.from_numpy(np.stack([clip.variance for clip in clips])),
            mean=torch.from_numpy(np.stack([clip.mean for clip in clips])),
            labels=torch.tensor([clip.label for clip in clips], dtype=torch.int64),
            video_ids=tuple(clip.video_id for clip in clips),
        )

    def _label(self, row: int) -> int:
        found = self.manifest.rows[row]
        return NO_LABEL if found.label is None else self.manifest.label_index(found)

    def _check_files(self) -> None:
        for number, shard in enumerate(self.shards):
            path, size = shard_path(self.folder, number), file_bytes(shard, layout=self.layout)
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                there = "is missing" if found is None else f"has {found} bytes"
                raise ValueError(
                    f"{path} {there} where {size} bytes were written; delete the folder and build it again."
                )

    def _shard(self, number: int) -> mmap.mmap:
        """A shard, mapped; those least recently asked for are let go, once nothing reads them."""
        if number not in self._maps:
            with shard_path(self.folder, number).open("rb") as file:
                self._maps[number] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._maps) > MAX_MAPS:
                self._maps.popitem(last=False)
        self._maps.move_to_end(number)
        return self._maps[number]


def _announce(shard: mmap.mmap, *, start: int, num_bytes: int) -> None:
    """Has the system begin to read these bytes, where it takes such advice, without waiting for them."""
    if hasattr(mmap, "MADV_WILLNEED"):
        before = start % mmap.PAGESIZE
        shard.madvise(mmap.MADV_WILLNEED, start - before, num_bytes + before)


def _slots(shards: Sequence[ShardFacts], *, layout: TokenLayout) -> Int64[np.ndarray, "clips"]:
    """Which record of its shard each row has; -1 for one that could not be read."""
    readable = np.ones(layout.num_clips, dtype=bool)
    readable[[row for shard in shards for row in shard.unreadable]] = False
    before = np.cumsum(readable) - readable
    first_of_shard = before[np.arange(layout.num_clips) // layout.clips_per_shard * layout.clips_per_shard]
    return np.where(readable, before - first_of_shard, -1).astype(np.int64)
