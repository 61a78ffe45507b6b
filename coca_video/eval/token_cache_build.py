"""Building a token cache: once, by any number of ranks, and from where it was when something ended the processes.

Every file of tokens holds the clips of fixed rows, and its scales are of its own tokens, so that the same bytes come
whoever writes it. What a kill takes is the files that were being written; those that are whole are not touched again.
Clips that could not be read are part of the cache, with their cause: to read mended files, delete its folder.
"""

import shutil
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from coca_video.config import to_json
from coca_video.data.frame_cache import CachedVideoDataset
from coca_video.data.frame_cache_build import SizeEstimate
from coca_video.data.loader import Unreadable, in_order
from coca_video.data.prefetch import to_device_ahead
from coca_video.data.scan import Progress
from coca_video.data.video import ClipBatch, VideoDataset, collate_clips
from coca_video.distributed import gather_objects, is_main, on_main, rank, world_size
from coca_video.eval.features import Encode, frozen_encode
from coca_video.eval.passes import Rows
from coca_video.eval.token_cache import TokenCache
from coca_video.eval.token_cache_format import (
    PARTIAL_PREFIX,
    SHARD_BYTES,
    ShardFacts,
    TokenCacheFacts,
    TokenCacheKey,
    TokenDtype,
    TokenLayout,
    channel_scales,
    dequantize,
    footer,
    quantize,
    read_facts,
    read_shard_facts,
    shard_path,
    write_durably,
)
from coca_video.hub import fingerprint
from coca_video.models.video import VideoClassifier

ValueT = TypeVar("ValueT")

LOCK_FILE = ".lock"
MEGABYTE = 10**6
NOT_OF_CLIPS = ("augment", "crop_scale", "timeout_seconds")  # what does not change the frames of a clip that is read


def build_token_cache(
    model: VideoClassifier,
    *,
    dataset: VideoDataset,
    folder: Path,
    dtype: TokenDtype,
    device: torch.device,
    progress: Progress,
    on_estimate: Callable[[SizeEstimate], object],
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> TokenCache:
    """The token cache of `dataset` below `folder`, built first if it is not there; all ranks call it with the same.

    Args:
        dataset: clips without augmentation.
        on_estimate: called on rank 0, before any clip is read, with what the cache takes if every clip can be read.
        batch_size: the most clips that are encoded at a time. On the CPU it changes no bit, elsewhere the rounding.
        bf16: whether the encoder computes under bf16 autocast.
        shard_bytes: of tokens in fp32, which a rank holds in memory at a time; a file is that or smaller.

    Raises:
        ValueError: the clips are augmented; the disk is too small; another process is building this cache.
        OSError: what else keeps files from being written.
    """
    if dataset.config.augment:
        raise ValueError("A token cache keeps one clip of each video, and augmented ones differ; take augment=False.")
    key = token_cache_key(model, dataset=dataset, dtype=dtype, bf16=bf16, shard_bytes=shard_bytes)
    place = folder / key.folder_name
    if not _from_main(lambda: _is_finished(place)):
        encode = frozen_encode(model, device=device, bf16=bf16)
        facts = TokenCacheFacts(key=key.to_json(), layout=_layout(encode, dataset=dataset, key=key))
        with ExitStack() as held:
            on_main(lambda: held.enter_context(_locked(place)))
            left = _from_main(lambda: _left(place, facts=facts))
            on_main(lambda: _check_room(place, layout=facts.layout, left=left, on_estimate=on_estimate))
            stream = _Clips(dataset, layout=facts.layout, batch_size=batch_size, num_workers=num_workers, device=device)
            _build(place, left=left, clips=stream, encode=encode, progress=progress)
            on_main(lambda: _finish(place, facts=facts))
    return TokenCache(place, manifest=dataset.manifest)


def token_cache_key(
    model: VideoClassifier, *, dataset: VideoDataset, dtype: TokenDtype, bf16: bool, shard_bytes: int = SHARD_BYTES
) -> TokenCacheKey:
    """What tells a cache of these tokens from any other."""
    clips = {name: value for name, value in to_json(dataset.config).items() if name not in NOT_OF_CLIPS}
    return TokenCacheKey(
        encoder_weights=fingerprint(model.encoder),
        encoder=to_json(model.encoder.config),
        layers=model.config.head.encoder_layers,
        manifest=dataset.manifest.fingerprint(),
        clips=clips,
        frame_cache=asdict(dataset.cache.config) if isinstance(dataset, CachedVideoDataset) else None,
        dtype=dtype,
        precision="bf16" if bf16 else "fp32",
        shard_bytes=shard_bytes,
    )


def _layout(encode: Encode, *, dataset: VideoDataset, key: TokenCacheKey) -> TokenLayout:
    """Encodes one black frame to see how many tokens there are."""
    size = dataset.config.image_size
    _, _, num_tokens, dim = encode(torch.zeros(1, 1, 3, size, size, dtype=torch.uint8)).shape
    return TokenLayout(
        num_clips=len(dataset),
        num_frames=dataset.config.num_frames,
        num_tokens=num_tokens,
        dim=dim,
        dtype=key.dtype,
        shard_bytes=key.shard_bytes,
    )


def _is_finished(place: Path) -> bool:
    facts = read_facts(place)
    return facts is not None and facts.shards is not None


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    """The folder, while no other process builds in it."""
    place.mkdir(parents=True, exist_ok=True)
    with (place / LOCK_FILE).open("wb") as file:
        if sys.platform != "win32":
            import fcntl

            try:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: workers would inherit it, and outlive us
            except OSError as error:
                raise ValueError(f"{place}: another process is building this token cache; wait for it.") from error
        yield


def _left(place: Path, *, facts: TokenCacheFacts) -> list[int]:
    """Clears away what is half written, and returns the shards that are still to be built."""
    for half in place.glob(f"{PARTIAL_PREFIX}*"):
        half.unlink()
    facts.write(place)
    shards = range(facts.layout.num_shards)
    return [shard for shard in shards if read_shard_facts(shard_path(place, shard), layout=facts.layout) is None]


def _check_room(
    place: Path, *, layout: TokenLayout, left: Sequence[int], on_estimate: Callable[[SizeEstimate], object]
) -> None:
    estimate = SizeEstimate(
        total_bytes=layout.size_bytes(shards=range(layout.num_shards)),
        left_bytes=layout.size_bytes(shards=left),
        free_bytes=shutil.disk_usage(place).free,
    )
    on_estimate(estimate)
    if estimate.left_bytes > estimate.free_bytes:
        raise ValueError(
            f"The token cache {place} needs {estimate.left_bytes / MEGABYTE:,.0f} MB more, and "
            f"{estimate.free_bytes / MEGABYTE:,.0f} MB are free; choose another folder, or a smaller dtype."
        )


def _finish(place: Path, *, facts: TokenCacheFacts) -> None:
    """Collects what the shards say in cache.json, which is the mark that all are there."""
    found = [
        read_shard_facts(shard_path(place, shard), layout=facts.layout) for shard in range(facts.layout.num_shards)
    ]
    shards = tuple(shard for shard in found if shard is not None)
    if len(shards) < len(found):
        raise OSError(f"{place}: {len(found) - len(shards)} files of tokens are gone; run the building again.")
    replace(facts, shards=shards).write(place)


class _Clips(NamedTuple):
    """What is read, and how."""

    dataset: VideoDataset
    layout: TokenLayout
    batch_size: int
    num_workers: int
    device: torch.device

    @property
    def encoded_at_a_time(self) -> int:
        """Clips of a batch: as many as fit evenly into a shard, so that the same ones go together on any rank."""
        whole = self.layout.clips_per_shard
        return next(size for size in range(min(self.batch_size, whole), 0, -1) if whole % size == 0)


class _Batch(NamedTuple):
    clips: ClipBatch | None
    unreadable: dict[int, Unreadable]


class _Shard(NamedTuple):
    """A shard's readable clips, mean-free, and the rest."""

    number: int
    tokens: Float32[Tensor, "clips frames tokens dim"]
    variance: Float32[Tensor, "clips frames tokens"]
    mean: Float32[Tensor, "clips frames tokens"]
    unreadable: dict[int, Unreadable]


def _build(place: Path, *, left: Sequence[int], clips: _Clips, encode: Encode, progress: Progress) -> None:
    """Ranks build a shard each at a time; what stops one stops all, and no rank waits long for another."""
    own, layout = left[rank() :: world_size()], clips.layout
    num_left = sum(len(layout.rows(shard)) for shard in left)
    initial = layout.num_clips - num_left
    bar_or_none = progress("caching tokens", total=layout.num_clips, initial=initial) if is_main() else nullcontext()
    with bar_or_none as bar, closing(_batches(clips, shards=own)) as batches, _Writer(place, layout=layout) as writer:
        noted = _noted(batches, bar=bar)
        for turn in range(-(-len(left) // world_size())):
            number = own[turn] if turn < len(own) else None

            def work(number: int | None = number) -> int:
                if number is None:
                    return 0
                writer.put(_encode_shard(number, batches=noted, clips=clips, encode=encode))
                return len(layout.rows(number))

            others = sum(_together(work)) - (0 if number is None else len(layout.rows(number)))
            if bar is not None:
                bar.update(others)
        _together(writer.wait)


def _batches(clips: _Clips, *, shards: Sequence[int]) -> Generator[_Batch, None, None]:
    """The clips of these shards in one stream, so that workers read on while a shard is written."""
    if not shards:
        return
    rows = np.concatenate([np.array(clips.layout.rows(shard), dtype=np.int64) for shard in shards])
    size = clips.encoded_at_a_time
    stream = in_order(
        Rows(clips.dataset, rows=rows),
        num_samples=len(rows),
        batch_size=size,
        workers=clips.num_workers,
        collate=collate_clips,
        pin_memory=clips.device.type == "cuda",
    )
    with closing(to_device_ahead(stream, device=clips.device)) as loaded:
        for number, (batch, failed) in enumerate(loaded):
            asked = rows[number * size : (number + 1) * size].tolist()
            read = set() if batch is None else {key.index for key in batch.keys}
            yield _Batch(batch, dict(zip((row for row in asked if row not in read), failed, strict=True)))


def _noted(batches: Iterable[_Batch], *, bar: Any) -> Iterator[_Batch]:
    for batch in batches:
        if bar is not None:
            bar.update(len(batch.unreadable) + (0 if batch.clips is None else len(batch.clips.keys)))
        yield batch


def _encode_shard(number: int, *, batches: Iterator[_Batch], clips: _Clips, encode: Encode) -> _Shard:
    """Takes as many batches as the shard has, and encodes them."""
    num_rows, size, shape = len(clips.layout.rows(number)), clips.encoded_at_a_time, clips.layout.shape
    tokens = torch.empty(num_rows, *shape, device=clips.device)
    mean, variance = torch.empty(2, num_rows, *shape[:2], device=clips.device)
    unreadable, filled = dict[int, Unreadable](), 0
    for _ in range(-(-num_rows // size)):
        batch = next(batches)
        unreadable |= batch.unreadable
        if batch.clips is None:
            continue
        for encoded in _encode_alike(batch.clips.frames, encode=encode, size=size):
            rows = slice(filled, filled + len(encoded))
            mean[rows] = encoded.mean(dim=-1)
            torch.sub(encoded, mean[rows].unsqueeze(-1), out=tokens[rows])
            variance[rows] = torch.linalg.vector_norm(tokens[rows], dim=-1).square() / shape[-1]
            filled += len(encoded)
    return _Shard(number, tokens[:filled], variance[:filled], mean[:filled], unreadable)


def _encode_alike(
    frames: UInt8[Tensor, "batch frames 3 height width"], *, encode: Encode, size: int
) -> Iterator[Float32[Tensor, "part frames tokens dim"]]:
    """Tokens from batches of one size: matrix products of another number of rows may round otherwise.

    On the CPU clips go one by one: the frames of one fill its matrix products (ViT-B, 8 frames: as fast within 10%).
    """
    if frames.device.type == "cpu":
        yield from (encode(clip).float() for clip in frames.unsqueeze(1))
    else:
        yield _encode_filled(frames, encode=encode, size=size)


def _encode_filled(
    frames: UInt8[Tensor, "batch frames 3 height width"], *, encode: Encode, size: int
) -> Float32[Tensor, "batch frames tokens dim"]:
    """Tokens of a batch that black clips fill up to `size`."""
    missing = frames.new_zeros(size - len(frames), *frames.shape[1:])
    return encode(torch.cat([frames, missing]))[: len(frames)].float()


class _Writer:
    """Writes a shard in a thread, while the next is encoded. A context manager."""

    def __init__(self, place: Path, *, layout: TokenLayout) -> None:
        self._place, self._layout = place, layout
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._writing: Future[None] | None = None

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def put(self, shard: _Shard) -> None:
        """Begins to write; raises what was wrong with the shard before."""
        packed = _pack(shard, layout=self._layout)
        self.wait()
        path = shard_path(self._place, shard.number)
        self._writing = self._thread.submit(write_durably, path, pieces=packed)

    def wait(self) -> None:
        """Until all is written."""
        if self._writing is not None:
            self._writing.result()


def _pack(shard: _Shard, *, layout: TokenLayout) -> list[bytes | memoryview]:
    """The contents of a shard's file; the error of what is stored is measured here, on the very tokens."""
    scales = channel_scales(shard.tokens, dtype=layout.dtype) if len(shard.tokens) else None
    pieces, error_sum = list[bytes | memoryview](), 0.0
    for clip, variance, mean in zip(shard.tokens, shard.variance, shard.mean, strict=True):
        stored = quantize(clip, dtype=layout.dtype, scales=scales)
        error_sum += _squared_error(dequantize(stored, scales=scales), clip)
        record = np.zeros(layout.record_bytes, dtype=np.uint8)
        parts = layout.unpack_record(record)
        bits = stored.view(torch.int16) if stored.dtype == torch.bfloat16 else stored
        for part, values in zip(parts, (bits, variance, mean), strict=True):
            torch.from_numpy(part).copy_(values)
        pieces.append(record.data)
    if layout.dtype == "int8":
        ones = torch.ones(layout.dim) if scales is None else scales.cpu()
        pieces.append(ones.numpy().astype("<f4").tobytes())
    unreadable = {row: (one.key, one.cause) for row, one in shard.unreadable.items()}
    facts = ShardFacts(num_readable=len(shard.tokens), unreadable=unreadable, error_sum=error_sum)
    return [*pieces, footer(facts)]


def _squared_error(stored: Float32[Tensor, "frames tokens dim"], exact: Float32[Tensor, "frames tokens dim"]) -> float:
    """The sum over tokens of |stored - exact|^2 / |exact|^2; a token of zeros has no error."""
    size = torch.linalg.vector_norm(exact, dim=-1)
    error = torch.linalg.vector_norm(stored - exact, dim=-1) / torch.where(size > 0, size, 1.0)
    return float(error.double().square().sum())


def _from_main(action: Callable[[], ValueT]) -> ValueT:
    """What `action` gives on rank 0, on every rank; its ValueError or OSError too."""
    return _together(action if is_main() else lambda: None)[0]  # type: ignore[no-any-return]


def _together(action: Callable[[], object]) -> list[Any]:
    """What `action` gives on each rank; the first ValueError or OSError is raised on all."""
    value, wrong = None, None
    try:
        value = action()
    except (ValueError, OSError) as error:
        wrong = error
    results = gather_objects((value, wrong))
    for _, wrong in results:
        if wrong is not None:
            raise wrong
    return [value for value, _ in results]
