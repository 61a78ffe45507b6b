"""Ordering, batching and exact position: which sample comes at which step is a pure function of (seed, step).

The order of an epoch is a keyed permutation computed position by position, so that no list of indices is kept and any
step can be reached at once. A run that starts at step k therefore sees exactly what a longer run sees from step k on.
"""

import hashlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar, cast, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from coca_video.data.loader_workers import (
    Watched,
    from_workers,
    leave_signals_to_the_main_process,
    poll_seconds,
    worker_timeout,
)
from coca_video.data.prefetch import map_tensors

SampleT = TypeVar("SampleT")
SampleT_co = TypeVar("SampleT_co", covariant=True)
BatchT = TypeVar("BatchT")

MASK_64 = (1 << 64) - 1
NUM_ROUNDS = 8  # Feistel rounds; 4 already pass as random for wide halves, small sizes have halves of 3 bits
MIN_HALF_BITS = 3  # halves of 1 or 2 bits have too few round functions to reach most orders of a tiny data set


class SampleKey(NamedTuple):
    """What a data set is indexed with: all randomness of a sample is drawn from (seed, epoch, index)."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls on a key


class Share(NamedTuple):
    """One of `count` contiguous parts of every step's samples, as even as can be: what one of several ranks reads."""

    number: int = 0
    count: int = 1  # type: ignore[assignment]  # hides tuple.count, which nobody calls on a share

    def of(self, keys: list[SampleKey]) -> list[SampleKey]:
        """This part of `keys`; the parts one after the other are `keys`."""
        return keys[len(keys) * self.number // self.count : len(keys) * (self.number + 1) // self.count]


class Unreadable(NamedTuple):
    """What a data set returns in place of a sample that it cannot read: its name and the cause, for the report."""

    key: str
    cause: str


@runtime_checkable
class Samples(Protocol[SampleT_co]):
    """A data set: a pure function from SampleKey to a sample, or to Unreadable."""

    def __getitem__(self, key: SampleKey, /) -> SampleT_co | Unreadable: ...


def keyed_permutation(positions: Int64[np.ndarray, "n"], *, size: int, key: int) -> Int64[np.ndarray, "n"]:
    """The images of `positions` under a bijection of range(size) chosen by `key`; O(1) memory besides the result.

    A balanced Feistel network permutes the smallest even power of two that holds `size`; images outside range(size)
    are sent through again until they fall inside (cycle walking, Black and Rogaway 2002, section 3), which keeps it a
    bijection and takes fewer than 4 passes on average for size > 16.

    Raises:
        ValueError: `size` is not positive, or a position lies outside range(size).
    """
    if size < 1:
        raise ValueError(f"A permutation needs a size of at least 1, got {size}.")
    if positions.size and (positions.min() < 0 or positions.max() >= size):
        raise ValueError(f"Positions must lie in [0, {size}), got {positions.min()} to {positions.max()}.")
    half_bits = max(MIN_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    round_keys = _round_keys(key)
    images = _feistel(positions.astype(np.uint64), half_bits=half_bits, round_keys=round_keys)
    outside = np.flatnonzero(images >= size)
    while outside.size:
        images[outside] = _feistel(images[outside], half_bits=half_bits, round_keys=round_keys)
        outside = outside[images[outside] >= size]
    return images.astype(np.int64)


def _round_keys(key: int) -> list[int]:
    digest = hashlib.blake2b((key & MASK_64).to_bytes(8, "little"), digest_size=8 * NUM_ROUNDS).digest()
    return [int.from_bytes(digest[8 * r : 8 * r + 8], "little") for r in range(NUM_ROUNDS)]


def _feistel(values: UInt64[np.ndarray, "n"], *, half_bits: int, round_keys: Sequence[int]) -> UInt64[np.ndarray, "n"]:
    """One pass of the network over uint64 `values` < 2**(2 * half_bits); a bijection for any round function."""
    shift, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> shift, values & mask
    for round_key in round_keys:
        left, right = right, left ^ (_mix(right ^ np.uint64(round_key)) & mask)
    return (left << shift) | right


def _mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): every input bit moves every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    mixed: UInt64[np.ndarray, "n"] = values ^ (values >> np.uint64(31))
    return mixed


@dataclass(frozen=True, kw_only=True)
class Order:
    """An endless stream of epochs over `num_samples` samples in steps of `batch_size`, shuffled by (seed, epoch).

    Step s takes positions [s * batch_size, (s + 1) * batch_size) of the stream, so a batch may straddle epochs and
    no sample is dropped or repeated within an epoch.
    """

    num_samples: int
    batch_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, value in (("num_samples", self.num_samples), ("batch_size", self.batch_size)):
            if value < 1:
                raise ValueError(f"An order needs {name} of at least 1, got {value}.")

    def batch(self, step: int) -> list[SampleKey]:
        """The keys of step `step` (from 0), in order."""
        if step < 0:
            raise ValueError(f"Steps count from 0, got {step}.")
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, positions = np.divmod(stream, self.num_samples)
        keys: list[SampleKey] = []
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            key = _epoch_key(self.seed, epoch=epoch)
            indices = keyed_permutation(positions[epochs == epoch], size=self.num_samples, key=key)
            keys.extend(SampleKey(epoch, index) for index in indices.tolist())
        return keys


def _epoch_key(seed: int, *, epoch: int) -> int:
    return int.from_bytes(hashlib.blake2b(f"order {seed} {epoch}".encode(), digest_size=8).digest(), "little")


def batches(
    dataset: Samples[SampleT],
    *,
    order: Order,
    first_step: int,
    last_step: int,
    workers: int,
    collate: Callable[[list[SampleT]], BatchT],
    share: Share = Share(),  # noqa: B008, it cannot be changed
    pin_memory: bool = False,
    worker_timeout_seconds: float | None = None,
) -> Generator[tuple[BatchT | None, list[Unreadable]], None, None]:
    """Yields one (batch, unreadable samples) for each step in [first_step, last_step), or the `share` of each.

    The result is the same for any number of `workers` (0: in this process). `collate` gets only the readable samples;
    the batch is None where a step has none. No global random state is read or written.

    pin_memory: hand the batches out in page-locked memory, from which CUDA copies beside its work (`to_device_ahead`).
    worker_timeout_seconds: None is WORKER_MARGIN_SECONDS above the data set's own limit of a sample, if it has one
        (`TimeLimited`), else WORKER_TIMEOUT_SECONDS.

    Raises, besides what `dataset` and `collate` raise:
        ChildProcessError: a worker process died (out of memory, a crash in a decoder); it names the sample.
        TimeoutError: no worker came to the end of a sample for `worker_timeout_seconds` while a batch was waited for.
    """
    if not 0 <= share.number < share.count <= order.batch_size:
        raise ValueError(
            f"A batch of {order.batch_size} cannot be shared by {share.count} ranks (here: {share.number}); "
            "take a larger batch or fewer ranks."
        )
    if not 0 <= first_step <= last_step:
        raise ValueError(f"Steps must satisfy 0 <= first_step <= last_step, got {first_step} and {last_step}.")
    steps = _KeyBatches(order=order, first_step=first_step, last_step=last_step, share=share)
    return _load(
        dataset,
        key_batches=steps,
        workers=workers,
        collate=collate,
        pin_memory=pin_memory,
        worker_timeout_seconds=worker_timeout_seconds,
    )


def in_order(
    dataset: Samples[SampleT],
    *,
    num_samples: int,
    batch_size: int,
    workers: int,
    collate: Callable[[list[SampleT]], BatchT],
    pin_memory: bool = False,
    worker_timeout_seconds: float | None = None,
) -> Generator[tuple[BatchT | None, list[Unreadable]], None, None]:
    """One pass in the order of the data set, for evaluation: epoch 0, indices 0 to num_samples - 1, each once.

    Yields and raises what `batches` does; the last batch may be smaller.
    """
    if num_samples < 1 or batch_size < 1:
        raise ValueError(f"A pass needs num_samples and batch_size of at least 1, got {num_samples} and {batch_size}.")
    return _load(
        dataset,
        key_batches=_OnePass(num_samples=num_samples, batch_size=batch_size),
        workers=workers,
        collate=collate,
        pin_memory=pin_memory,
        worker_timeout_seconds=worker_timeout_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class _OnePass:
    num_samples: int
    batch_size: int

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for first in range(0, self.num_samples, self.batch_size):
            yield [SampleKey(0, index) for index in range(first, min(first + self.batch_size, self.num_samples))]

    def __len__(self) -> int:
        return -(-self.num_samples // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class _KeyBatches:
    order: Order
    first_step: int
    last_step: int
    share: Share

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return (self.share.of(self.order.batch(step)) for step in range(self.first_step, self.last_step))

    def __len__(self) -> int:
        return self.last_step - self.first_step


@dataclass(frozen=True, kw_only=True)
class _Loaded(Generic[BatchT]):
    """What a worker sends. A class of its own because torch's pinning thread asks what it gets for `pin_memory`."""

    batch: BatchT | None
    unreadable: list[Unreadable]

    def pin_memory(self) -> "_Loaded[BatchT]":
        return replace(self, batch=map_tensors(self.batch, function=Tensor.pin_memory))


@dataclass(frozen=True, kw_only=True)
class _CollateReadable(Generic[SampleT, BatchT]):
    """Collates in the worker; a class and not a closure, so that it can be sent to a spawned process."""

    collate: Callable[[list[SampleT]], BatchT]

    def __call__(self, samples: list[SampleT | Unreadable]) -> _Loaded[BatchT]:
        readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
        unreadable = [sample for sample in samples if isinstance(sample, Unreadable)]
        return _Loaded(batch=self.collate(readable) if readable else None, unreadable=unreadable)


def _load(
    dataset: Samples[SampleT],
    *,
    key_batches: Iterable[list[SampleKey]],
    workers: int,
    collate: Callable[[list[SampleT]], BatchT],
    pin_memory: bool,
    worker_timeout_seconds: float | None,
) -> Generator[tuple[BatchT | None, list[Unreadable]], None, None]:
    if workers < 0:
        raise ValueError(f"The number of workers must be 0 or more, got {workers}.")
    if worker_timeout_seconds is None:
        worker_timeout_seconds = worker_timeout(dataset)
    if not worker_timeout_seconds > 0:
        raise ValueError(f"worker_timeout_seconds must be more than 0, got {worker_timeout_seconds:g}.")
    watched = Watched.by(workers, dataset=dataset) if workers else None
    loader = DataLoader(
        # only __getitem__ is called when batch_sampler gives the keys
        cast(Dataset[Any], dataset if watched is None else watched),
        batch_sampler=cast(Any, key_batches),
        num_workers=workers,
        collate_fn=_CollateReadable(collate=collate),
        pin_memory=pin_memory,
        timeout=0 if watched is None else poll_seconds(worker_timeout_seconds),
        worker_init_fn=leave_signals_to_the_main_process,
        generator=torch.Generator(),  # else each pass draws its workers' base seed from the global generator
    )
    if watched is None:
        return _unwrapped(loaded for loaded in loader)
    return _unwrapped(from_workers(loader, work=watched.work, timeout_seconds=worker_timeout_seconds))


def _unwrapped(
    loads: Generator[_Loaded[BatchT], None, None],
) -> Generator[tuple[BatchT | None, list[Unreadable]], None, None]:
    with closing(loads):
        for loaded in loads:
            yield loaded.batch, loaded.unreadable
