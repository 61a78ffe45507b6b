"""The files of a token cache: cache.json, and the tokens in tokens-00000.bin and so on.

cache.json says of what the tokens are and, last of all, that all are there. A file of tokens holds a record of fixed
size for each readable clip of its rows (tokens, then the variances and the means of the tokens in fp32), the scales of
int8, and at its end what could not be read and how far what is stored is from what was computed. It appears under its
name only when it is whole and on the disk. Numbers are little-endian on every machine. Unlike JPEGs the tokens have no
checksum: an epoch would spend most of its time on them.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Float32, Shaped
from torch import Tensor

TokenDtype = Literal["fp32", "bf16", "int8"]

FORMAT_VERSION = 1
FACTS_FILE = "cache.json"
PARTIAL_PREFIX = ".partial-"
SHARD_BYTES = 2**29
ALIGNMENT = 64  # bytes, of every part of a record
STORED: dict[TokenDtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
IN_NUMPY: dict[TokenDtype, str] = {"fp32": "<f4", "bf16": "<i2", "int8": "i1"}  # numpy has no bf16: its bits
INT8_MAX = 127


@dataclass(frozen=True, kw_only=True)
class TokenCacheKey:
    """Whatever decides the tokens: caches of equal keys hold the same, and each other key has a folder of its own.

    encoder_weights: `hub.fingerprint` of the encoder; encoder: its config. clips: of the ClipConfig what counts without
    augmentation. frame_cache: the config of the JPEG cache that the frames come from, None for videos.
    """

    encoder_weights: str
    encoder: dict[str, Any]
    layers: tuple[int, ...]
    manifest: str
    clips: dict[str, Any]
    frame_cache: dict[str, Any] | None
    dtype: TokenDtype
    precision: Literal["fp32", "bf16"]
    shard_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {**asdict(self), "layers": list(self.layers)}

    @property
    def folder_name(self) -> str:
        """A hash of the key and of the version of the format."""
        text = json.dumps([FORMAT_VERSION, self.to_json()], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, kw_only=True)
class TokenLayout:
    """Where the tokens of each of `num_clips` rows are; each clip has `num_frames` x `num_tokens` of `dim` features."""

    num_clips: int
    num_frames: int
    num_tokens: int
    dim: int
    dtype: TokenDtype
    shard_bytes: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a clip's tokens."""
        return self.num_frames, self.num_tokens, self.dim

    @property
    def token_bytes(self) -> int:
        """Of a clip's tokens, as they are stored."""
        return int(np.prod(self.shape)) * STORED[self.dtype].itemsize

    @property
    def statistics_bytes(self) -> int:
        """Of a clip's variances; as many as of its means."""
        return 4 * self.num_frames * self.num_tokens

    @property
    def record_bytes(self) -> int:
        """Of a clip's record."""
        return _aligned(self.token_bytes) + 2 * _aligned(self.statistics_bytes)

    @property
    def scale_bytes(self) -> int:
        """Of a shard's scales: int8 has one a feature."""
        return 4 * self.dim if self.dtype == "int8" else 0

    @property
    def clips_per_shard(self) -> int:
        """As many as take shard_bytes in fp32, in which a shard waits in memory; in eights, so that batches fit."""
        many = self.shard_bytes // (4 * int(np.prod(self.shape)))
        return max(1, many - many % 8 if many >= 8 else many)

    @property
    def num_shards(self) -> int:
        """How many files of tokens there are."""
        return -(-self.num_clips // self.clips_per_shard)

    def rows(self, shard: int) -> range:
        """The rows of the manifest whose clips are in shard `shard`."""
        return range(shard * self.clips_per_shard, min((shard + 1) * self.clips_per_shard, self.num_clips))

    def size_bytes(self, *, shards: Iterable[int]) -> int:
        """What these shards take if every clip can be read."""
        return sum(len(self.rows(shard)) * self.record_bytes + self.scale_bytes for shard in shards)

    def unpack_record(
        self, record: Shaped[np.ndarray, "record_bytes"]
    ) -> tuple[
        Shaped[np.ndarray, "frames tokens dim"],
        Float32[np.ndarray, "frames tokens"],
        Float32[np.ndarray, "frames tokens"],
    ]:
        """Views of a record's bytes: tokens as they are stored, their variances, their means."""
        first, second = _aligned(self.token_bytes), _aligned(self.token_bytes) + _aligned(self.statistics_bytes)
        tokens = record[: self.token_bytes].view(IN_NUMPY[self.dtype]).reshape(self.shape)
        variance = record[first : first + self.statistics_bytes].view("<f4").reshape(self.shape[:2])
        mean = record[second : second + self.statistics_bytes].view("<f4").reshape(self.shape[:2])
        return tokens, variance, mean


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True, kw_only=True)
class ShardFacts:
    """What a shard says of itself. unreadable: row of the manifest -> (video_id, cause).

    error_sum: the sum, over its tokens, of |stored - computed|^2 / |computed|^2, both mean-free.
    """

    num_readable: int
    unreadable: dict[int, tuple[str, str]]
    error_sum: float

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        unreadable = [[row, *name_and_cause] for row, name_and_cause in sorted(self.unreadable.items())]
        return {"num_readable": self.num_readable, "unreadable": unreadable, "error_sum": self.error_sum}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ShardFacts":
        """What `to_json` gave; KeyError, TypeError or ValueError for anything else."""
        unreadable = {int(row): (str(name), str(cause)) for row, name, cause in data["unreadable"]}
        return cls(num_readable=data["num_readable"], unreadable=unreadable, error_sum=data["error_sum"])


@dataclass(frozen=True, kw_only=True)
class TokenCacheFacts:
    """What cache.json says. key: `TokenCacheKey.to_json`. shards: None as long as the cache is not finished."""

    key: dict[str, Any]
    layout: TokenLayout
    shards: tuple[ShardFacts, ...] | None = None

    def write(self, folder: Path) -> None:
        """Writes cache.json, whole or not at all."""
        shards = None if self.shards is None else [shard.to_json() for shard in self.shards]
        document = {"format_version": FORMAT_VERSION, "key": self.key, "layout": asdict(self.layout), "shards": shards}
        write_durably(folder / FACTS_FILE, pieces=[json.dumps(document, indent=1).encode() + b"\n"])


def read_facts(folder: Path) -> TokenCacheFacts | None:
    """What a cache's folder says of itself; None where there is no cache. ValueError for another format."""
    path = folder / FACTS_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["format_version"] == FORMAT_VERSION:
            shards = None if found["shards"] is None else tuple(map(ShardFacts.from_json, found["shards"]))
            return TokenCacheFacts(key=found["key"], layout=TokenLayout(**found["layout"]), shards=shards)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged; delete the folder and build the token cache again.") from error
    raise ValueError(
        f"{folder} holds a token cache of format {found['format_version']}, and this program reads {FORMAT_VERSION}; "
        "delete the folder, or choose another --token-cache."
    )


def shard_path(folder: Path, number: int) -> Path:
    """The file of tokens of this number."""
    return folder / f"tokens-{number:05d}.bin"


def write_durably(path: Path, *, pieces: Iterable[bytes | memoryview]) -> None:
    """The file appears under its name only when it is whole and on the disk."""
    partial = path.with_name(f"{PARTIAL_PREFIX}{os.getpid()}-{path.name}")
    with partial.open("wb") as file:
        for piece in pieces:
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    if sys.platform != "win32":  # where a folder cannot be opened
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read_shard_facts(path: Path, *, layout: TokenLayout) -> ShardFacts | None:
    """What stands at the end of a shard; None where the file is missing or not whole."""
    try:
        with path.open("rb") as file:
            end = file.seek(-8, os.SEEK_END)
            length = int.from_bytes(file.read(8), "little")
            file.seek(end - length)
            facts = ShardFacts.from_json(json.loads(file.read(length)))
    except (OSError, ValueError, TypeError, KeyError):  # OSError also where a file is too short to be sought in
        return None
    return facts if end + 8 == file_bytes(facts, layout=layout) else None


def footer(facts: ShardFacts) -> bytes:
    """The end of a shard: its facts and how many bytes they are."""
    text = json.dumps(facts.to_json()).encode()
    return text + len(text).to_bytes(8, "little")


def file_bytes(facts: ShardFacts, *, layout: TokenLayout) -> int:
    """The size of a shard's file."""
    return facts.num_readable * layout.record_bytes + layout.scale_bytes + len(footer(facts))


def channel_scales(
    tokens: Float[Tensor, "clips frames tokens dim"], *, dtype: TokenDtype
) -> Float32[Tensor, "dim"] | None:
    """What a stored int8 of each feature is multiplied with: its largest size among `tokens` over 127."""
    if dtype != "int8":
        return None
    largest = torch.stack([clip.abs().amax(dim=(0, 1)) for clip in tokens]).amax(dim=0)  # without a copy of them all
    return largest / INT8_MAX


def quantize(
    tokens: Float32[Tensor, "*shape dim"], *, dtype: TokenDtype, scales: Float32[Tensor, "dim"] | None
) -> Shaped[Tensor, "*shape dim"]:
    """`tokens` as they are stored."""
    if scales is None:
        return tokens.to(STORED[dtype])
    steps = tokens / torch.where(scales > 0, scales, 1.0)
    return steps.round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)


def dequantize(
    values: Shaped[Tensor, "*shape dim"], *, scales: Float32[Tensor, "..."] | None
) -> Float32[Tensor, "*shape dim"]:
    """What was stored, in fp32."""
    return values.float() if scales is None else values * scales
