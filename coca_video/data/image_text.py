"""Image-text pairs from local tar shards in img2dataset's layout, indexed once and read at random.

For each key a shard holds an image (key.jpg, .jpeg, .png or .webp), its caption (key.txt) and details (key.json, whose
list "captions" gives all captions of the image). The index (where each member lies) is kept in a cache
folder, so that a second run opens a set of any size without scanning it.
"""

import glob
import hashlib
import io
import json
import logging
import os
import re
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coca_video.data.decode.images import upright_rgb
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.sampling import sample_rng
from coca_video.data.transforms import Interpolation, horizontal_flip, random_crop_box, resize_crop, square_crop_box

LOGGER = logging.getLogger(__name__)

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MEMBER_NAME = re.compile(r"^((?:.*/)?[^./][^./]*)\.([^/]+)$")  # key, suffix: parted at the first dot, as in webdataset
BRACE_RANGE = re.compile(r"^(.*)\{(\d+)\.\.(\d+)\}(.*)$")
IMAGE, DETAILS, CAPTION = 0, 1, 2  # the rows of a pair's spans
ABSENT = -1
MAX_OPEN_SHARDS = 128  # of the 1,024 files a process may usually hold open


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One image with the caption drawn for this epoch, and all captions it has."""

    image: UInt8[Tensor, "3 height width"]
    caption: str
    captions: tuple[str, ...]
    key: str


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """Where every member lies: spans[i] holds (offset, size) in bytes of pair i's image, details and caption."""

    shards: tuple[Path, ...]
    shard_numbers: Int64[np.ndarray, "pairs"]
    keys: np.ndarray  # UTF-8 bytes of fixed length [pairs]: a list of str would take ten times the memory
    spans: Int64[np.ndarray, "pairs 3 2"]

    def __len__(self) -> int:
        return len(self.keys)

    def fingerprint(self) -> str:
        """A hash of keys and of the sizes of their members: another set of pairs has another."""
        digest = hashlib.blake2b(self.keys.tobytes(), digest_size=16)
        digest.update(np.ascontiguousarray(self.spans[:, :, 1]).tobytes())
        return digest.hexdigest()

    def key(self, index: int) -> str:
        """The key of pair `index`."""
        return bytes(self.keys[index]).decode()


class PairDataset:
    """Pairs of the shards in the order of their members, by SampleKey: a pure function of (seed, epoch, index).

    The image is the largest centred square, or with `augment` a random box of `crop_scale` times the area and a flip
    with `flip_probability` (0 by default: captions name left and right), resized to image_size x image_size.
    One of the image's captions is drawn anew for each epoch.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        *,
        image_size: int,
        seed: int,
        augment: bool,
        crop_scale: tuple[float, float] = (0.9, 1.0),
        flip_probability: float = 0.0,
        interpolation: Interpolation = "bilinear",
        on_shard: Callable[[], object] | None = None,
    ) -> None:
        if image_size < 1:
            raise ValueError(f"image_size must be at least 1 pixel, got {image_size}.")
        if not 0 <= flip_probability <= 1:
            raise ValueError(f"flip_probability must lie in [0, 1], got {flip_probability}.")
        if flip_probability and not augment:
            raise ValueError(f"flip_probability {flip_probability} has no effect without augment=True.")
        self.index = index_shards(shards, on_shard=on_shard)
        self._image_size, self._seed, self._augment = image_size, seed, augment
        self._crop_scale, self._flip_probability, self._interpolation = crop_scale, flip_probability, interpolation
        self._files = _ShardFiles()

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, key: SampleKey) -> Pair | Unreadable:
        """Pair key.index as seen in epoch key.epoch, or the name and cause of one that cannot be read."""
        name = self.index.key(key.index)
        try:
            captions = self._captions(key.index)
            image = self._image(key)
        except UnreadablePair as error:
            shard = self.index.shards[self.index.shard_numbers[key.index]]
            return Unreadable(key=name, cause=f"{shard}: {name}: {error}")
        chosen = int(self._rng(key, purpose="caption").integers(len(captions)))
        return Pair(image=image, caption=captions[chosen], captions=captions, key=name)

    def all_captions(self) -> Iterator[tuple[str, ...]]:
        """The captions of each pair, in order; none where they cannot be read."""
        for index in range(len(self)):
            try:
                yield self._captions(index)
            except UnreadablePair as error:
                LOGGER.warning("%s: %s", self.index.key(index), error)
                yield ()

    def _captions(self, index: int) -> tuple[str, ...]:
        details = self._member(index, member=DETAILS)
        text = self._member(index, member=CAPTION)
        try:
            found = _captions_in(details=details, text=text)
        except ValueError as error:  # JSON and Unicode errors are ValueErrors
            raise UnreadablePair(f"its caption cannot be read: {error}") from error
        if not found:
            raise UnreadablePair("it has no caption (neither captions in .json nor .txt)")
        return found

    def _image(self, key: SampleKey) -> UInt8[Tensor, "3 size size"]:
        encoded = self._member(key.index, member=IMAGE)
        if encoded is None:
            raise UnreadablePair(f"it has no image ({', '.join('.' + suffix for suffix in IMAGE_SUFFIXES)})")
        image = decode_image(encoded)
        height, width = image.shape[-2:]
        box = square_crop_box(height, width)
        if self._augment:
            box = random_crop_box(height, width, rng=self._rng(key, purpose="crop"), scale=self._crop_scale)
        image = resize_crop(image, box=box, size=self._image_size, interpolation=self._interpolation)
        flip = self._augment and self._rng(key, purpose="flip").random() < self._flip_probability
        return horizontal_flip(image) if flip else image

    def _member(self, index: int, *, member: int) -> bytes | None:
        offset, size = self.index.spans[index, member].tolist()
        if offset == ABSENT:
            return None
        return self._files.read(self.index.shards[self.index.shard_numbers[index]], offset=offset, size=size)

    def _rng(self, key: SampleKey, *, purpose: str) -> np.random.Generator:
        return sample_rng(seed=self._seed, epoch=key.epoch, index=key.index, purpose=purpose)


class UnreadablePair(ValueError):
    """A pair whose image or caption cannot be read; the message is the cause."""


def _captions_in(*, details: bytes | None, text: bytes | None) -> tuple[str, ...]:
    """The list "captions" of the details, else the .txt, else the one "caption" of the details; blank ones left out."""
    found: Any = json.loads(details) if details is not None else {}
    if not isinstance(found, dict):
        raise ValueError(f"its .json must hold an object, got {type(found).__name__}")
    many: Any = found.get("captions") or []
    if not many and text is not None:
        many = [text.decode()]
    if not many and found.get("caption"):
        many = [found["caption"]]
    if not (isinstance(many, list) and all(isinstance(caption, str) for caption in many)):
        raise ValueError("its captions must be a list of texts")
    return tuple(caption.strip() for caption in many if caption.strip())


def decode_image(encoded: bytes) -> UInt8[Tensor, "3 height width"]:
    """The RGB pixels of a JPEG, PNG or WebP; UnreadablePair for bytes that are none, or only a part of one.

    Upright by its EXIF orientation, as a person saw it who wrote its caption.
    """
    if not encoded:
        raise UnreadablePair("its image is empty")
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            pixels = np.array(upright_rgb(image))
    except UnidentifiedImageError as error:
        raise UnreadablePair("its image cannot be decoded: it is of no format that Pillow knows") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # Pillow's, for bad bytes
        raise UnreadablePair(f"its image cannot be decoded: {str(error).splitlines()[0]}") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def encode_jpeg(image: UInt8[Tensor, "3 height width"], *, quality: int = 95) -> bytes:
    """JPEG of RGB pixels; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


class _ShardFiles:
    """Open shards of this process, the least recently used closed first. Copies in other processes start with none."""

    def __init__(self) -> None:
        self._open: OrderedDict[Path, BinaryIO] = OrderedDict()

    def read(self, shard: Path, *, offset: int, size: int) -> bytes:
        """Exactly `size` bytes at `offset`. pread leaves no position behind, so forked workers may share the file."""
        if shard not in self._open:
            if len(self._open) == MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
            self._open[shard] = shard.open("rb", buffering=0)
        self._open.move_to_end(shard)
        data = os.pread(self._open[shard].fileno(), size, offset)
        if len(data) != size:
            raise UnreadablePair(f"{len(data)} of {size} bytes at {offset} are there: the shard was cut after indexing")
        return data

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": OrderedDict()}

    def __del__(self) -> None:
        for file in self._open.values():
            file.close()


def open_shards(spec: str | Path) -> list[Path]:
    """The shards that `spec` names: a tar, a folder of tars, a glob, or a range as train-{00000..00005}.tar.

    Raises:
        ValueError: it names none, or one of the range is missing.
    """
    text = str(spec)
    if match := BRACE_RANGE.match(text):
        head, first, last, tail = match.groups()
        shards = [Path(f"{head}{number:0{len(first)}d}{tail}") for number in range(int(first), int(last) + 1)]
    elif Path(text).is_dir():
        shards = sorted(Path(text).glob("*.tar"))
    elif Path(text).is_file():
        shards = [Path(text)]
    else:
        shards = sorted(Path(name) for name in glob.glob(text, recursive=True))  # noqa: PTH207  # Path.glob takes no absolute pattern
    missing = [shard for shard in shards if not shard.is_file()]
    if missing:
        raise ValueError(f"{len(missing)} of the {len(shards)} shards of {text} are missing, first {missing[0]}.")
    if not shards:
        raise ValueError(f"No shards at {text}: expected a .tar, a folder of them, a glob or a range {{000..005}}.")
    return shards


def index_shards(
    shards: Sequence[Path], *, cache_folder: Path | None = None, on_shard: Callable[[], object] | None = None
) -> ShardIndex:
    """Where every pair lies; each shard is scanned once and its index kept in `cache_folder`.

    A kept index is used while the shard's absolute path, size and time of change are the same. The folder is by
    default COCA_VIDEO_CACHE, else ~/.cache/coca_video.

    Raises:
        ValueError: no shards, a shard that is no tar file or holds no pairs, or a key that stands in two places.
    """
    if not shards:
        raise ValueError("An index needs at least one shard, got none.")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"There is no shard {shard}: expected a tar file.")
    folder = cache_folder or Path(os.environ.get("COCA_VIDEO_CACHE") or Path.home() / ".cache" / "coca_video")
    parts = []
    for shard in shards:
        parts.append(_index_shard(shard, cache_folder=folder))
        if on_shard is not None:
            on_shard()
    index = ShardIndex(
        shards=tuple(shards),
        shard_numbers=np.repeat(np.arange(len(parts), dtype=np.int64), [len(part.keys) for part in parts]),
        keys=np.concatenate([part.keys for part in parts]),
        spans=np.concatenate([part.spans for part in parts]),
    )
    _check_unique(index)
    return index


class _Part(NamedTuple):
    keys: np.ndarray
    spans: Int64[np.ndarray, "pairs 3 2"]


def _index_shard(shard: Path, *, cache_folder: Path) -> _Part:
    path = shard.absolute()
    stamp = [str(path), *(str(value) for value in (path.stat().st_size, path.stat().st_mtime_ns))]
    kept = cache_folder / f"shard-{hashlib.blake2b(str(path).encode(), digest_size=12).hexdigest()}.npz"
    if kept.is_file() and (part := _load_part(kept, stamp=stamp)) is not None:
        return part
    part = _scan_shard(path)
    _keep_part(kept, part=part, stamp=stamp)
    return part


def _load_part(kept: Path, *, stamp: Sequence[str]) -> _Part | None:
    """A kept index, or None if it is of an older shard (usual) or damaged (logged)."""
    try:
        with kept.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            if arrays["stamp"].tolist() != list(stamp):
                return None
            part = _Part(keys=arrays["keys"], spans=arrays["spans"])
    except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile) as error:
        LOGGER.warning("the kept index %s is damaged (%s): scanning %s again", kept, error, stamp[0])
        return None
    return part


def _keep_part(kept: Path, *, part: _Part, stamp: Sequence[str]) -> None:
    partial = kept.with_name(f".{kept.stem}.{os.getpid()}.partial.npz")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        np.savez(partial, stamp=np.array(stamp), keys=part.keys, spans=part.spans)
        partial.replace(kept)
    except OSError as error:
        LOGGER.warning("the index of %s cannot be kept (%s): set COCA_VIDEO_CACHE to another folder", stamp[0], error)


def _scan_shard(shard: Path) -> _Part:
    spans: dict[str, list[list[int]]] = {}
    try:
        with tarfile.open(shard, mode="r:") as tar:
            for member in tar:
                if member.isreg() and (match := MEMBER_NAME.match(member.name)):
                    _note(spans, key=match[1], suffix=match[2].lower(), member=member, shard=shard)
            end = tar.offset
    except tarfile.TarError as error:
        raise ValueError(f"{shard} is not a whole, uncompressed tar file: {error}.") from error
    with shard.open("rb") as file:
        if os.pread(file.fileno(), tarfile.BLOCKSIZE, end) != bytes(tarfile.BLOCKSIZE):
            # tarfile stops without a word at a damaged or cut header that is not the first
            raise ValueError(
                f"{shard} is cut or damaged at byte {end}: no header and no end mark is there; fetch it again."
            )
    if all(found[IMAGE][0] == ABSENT for found in spans.values()):
        raise ValueError(f"{shard} holds no images: expected members such as 000.jpg, 000.txt and 000.json.")
    return _Part(np.array([key.encode() for key in spans]), np.array(list(spans.values()), dtype=np.int64))


def _note(spans: dict[str, list[list[int]]], *, key: str, suffix: str, member: tarfile.TarInfo, shard: Path) -> None:
    kinds = {"json": DETAILS, "txt": CAPTION, **dict.fromkeys(IMAGE_SUFFIXES, IMAGE)}
    if suffix not in kinds:
        return
    found = spans.setdefault(key, [[ABSENT, ABSENT] for _ in range(3)])
    if found[kinds[suffix]][0] != ABSENT:
        raise ValueError(f"{shard} holds key {key!r} twice (second time: {member.name}); keys must be unique.")
    found[kinds[suffix]] = [member.offset_data, member.size]


def _check_unique(index: ShardIndex) -> None:
    order = np.argsort(index.keys, kind="stable")
    same = np.flatnonzero(index.keys[order[1:]] == index.keys[order[:-1]])
    if same.size:
        first, second = order[same[0] : same[0] + 2].tolist()
        names = [index.shards[index.shard_numbers[place]] for place in (first, second)]
        raise ValueError(f"Key {index.key(first)!r} stands in {names[0]} and in {names[1]}; keys must be unique.")


def write_shard(path: Path, *, pairs: Iterable[tuple[str, bytes, Sequence[str]]]) -> None:
    """Writes (key, JPEG bytes, captions) in img2dataset's layout; the same pairs give the same bytes.

    Members: key.jpg, key.txt (the first caption), key.json (caption, captions, key, status, width, height). The file
    appears whole or not at all.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(partial, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, image, captions in pairs:
            if "." in key or not captions:
                raise ValueError(f"A pair needs a key without dots and some caption, got {key!r} and {captions!r}.")
            height, width = decode_image(image).shape[-2:]
            details = {"caption": captions[0], "captions": list(captions), "key": key, "status": "success"}
            text = json.dumps({**details, "width": width, "height": height}, ensure_ascii=False)
            for suffix, data in (("jpg", image), ("txt", captions[0].encode()), ("json", text.encode())):
                member = tarfile.TarInfo(f"{key}.{suffix}")  # by default owner 0, time 0
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    partial.replace(path)
