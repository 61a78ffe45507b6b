"""One pass over a data set, for evaluation: every sample once, in order, shared by the ranks if there are several."""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import KW_ONLY, dataclass
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64

from coca_video.data.loader import SampleKey, Samples, Unreadable, in_order
from coca_video.data.loader_workers import sample_timeout_seconds
from coca_video.data.prefetch import to_device_ahead
from coca_video.distributed import gather_objects, rank, world_size

SampleT = TypeVar("SampleT")
SampleT_co = TypeVar("SampleT_co", covariant=True)
BatchT = TypeVar("BatchT")
ValueT = TypeVar("ValueT")


@runtime_checkable
class SizedSamples(Samples[SampleT_co], Protocol[SampleT_co]):
    """A data set that knows how many samples it has."""

    def __len__(self) -> int: ...


@dataclass(frozen=True)
class Rows(Generic[SampleT]):
    """Some rows of a data set as a data set: a held-out part, a fold, what a rank takes."""

    dataset: SizedSamples[SampleT]
    _: KW_ONLY
    rows: Int64[np.ndarray, "rows"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def sample_timeout_seconds(self) -> float | None:
        """The data set's own."""
        return sample_timeout_seconds(self.dataset)

    def __getitem__(self, key: SampleKey) -> SampleT | Unreadable:
        return self.dataset[SampleKey(key.epoch, int(self.rows[key.index]))]


def share_of(dataset: SizedSamples[SampleT], *, number: int, count: int) -> Rows[SampleT]:
    """The samples `number`, `number + count`, ...: no share has what another has, and all are in one.

    One in `count` and not one part of `count`: manifests are sorted by class, and classes differ in their videos.
    """
    return Rows(dataset, rows=np.arange(number, len(dataset), count, dtype=np.int64))


def share_of_rank(dataset: SizedSamples[SampleT]) -> Rows[SampleT]:
    """What of `dataset` this rank evaluates: all of it without a process group."""
    return share_of(dataset, number=rank(), count=world_size())


def over_ranks(values: list[ValueT]) -> list[ValueT]:
    """The values of all ranks one after the other, on every rank."""
    return [value for part in gather_objects(values) for value in part]


def one_pass(
    dataset: SizedSamples[SampleT],
    *,
    batch_size: int,
    num_workers: int,
    collate: Callable[[list[SampleT]], BatchT],
    device: torch.device,
    unreadable: list[Unreadable],
    on_batch: Callable[[int], object] | None = None,
) -> Generator[BatchT, None, None]:
    """Batches of the readable samples on `device`, the last may be smaller; the others are added to `unreadable`.

    `on_batch` is told how many samples each batch dealt with, unreadable ones included.
    """
    if not (remaining := len(dataset)):  # more ranks than samples
        return
    stream = in_order(
        dataset,
        num_samples=remaining,
        batch_size=batch_size,
        workers=num_workers,
        collate=collate,
        pin_memory=device.type == "cuda",
    )
    with closing(to_device_ahead(stream, device=device)) as loaded:
        for batch, failed in loaded:
            unreadable += failed
            if on_batch is not None:
                on_batch(min(batch_size, remaining))
            remaining -= batch_size
            if batch is not None:
                yield batch
