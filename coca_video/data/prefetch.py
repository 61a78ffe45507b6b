"""Batches go to the device one ahead: while the device computes on a batch, the next is copied beside it. (issue 5)"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import fields, is_dataclass, replace
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

import torch
from torch import Tensor

ValueT = TypeVar("ValueT")
BatchT = TypeVar("BatchT")
NotesT = TypeVar("NotesT")


@runtime_checkable
class Copier(Protocol):
    """Copies in two parts, so that something else can be done in between."""

    def start(self, batch: BatchT, /) -> BatchT:
        """The batch on the device; its contents need not have arrived."""
        ...

    def finish(self, batch: BatchT, /) -> None:
        """After this, what the device is told to compute on `batch` finds its contents there."""
        ...


def map_tensors(value: ValueT, *, function: Callable[[Tensor], Tensor]) -> ValueT:
    """`value` with each tensor in it replaced by `function` of it; everything else stays the same object.

    Tensors are looked for in the fields of dataclasses and named tuples, and in tuples, lists and dicts.
    """
    changed: Any = value
    if isinstance(value, Tensor):
        changed = function(value)
    elif is_dataclass(value) and not isinstance(value, type):
        values = {f.name: getattr(value, f.name) for f in fields(value) if f.init}
        changed = replace(value, **map_tensors(values, function=function))
    elif isinstance(value, dict):
        changed = {key: map_tensors(item, function=function) for key, item in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        changed = type(value)(*(map_tensors(item, function=function) for item in value))
    elif isinstance(value, tuple | list):
        changed = type(value)(map_tensors(item, function=function) for item in value)
    return cast(ValueT, changed)


def to_device_ahead(
    stream: Generator[tuple[BatchT | None, NotesT], None, None], *, device: torch.device
) -> Generator[tuple[BatchT | None, NotesT], None, None]:
    """What `loader.batches` or `in_order` yields, with the batches' tensors on `device`; the order is the same.

    On CUDA the copy of batch k + 1 is started on a stream of its own before batch k is handed out, so that it runs
    beside the work on batch k; that takes pinned memory (`pin_memory=True` there). On the CPU batches pass unchanged.
    Closing it closes `stream`.
    """
    if device.type == "cuda":
        return one_ahead(stream, copier=_SideStream(device))
    return _moved(stream, device=device)


def one_ahead(
    stream: Generator[tuple[BatchT | None, NotesT], None, None], *, copier: Copier
) -> Generator[tuple[BatchT | None, NotesT], None, None]:
    """What `stream` yields, copied by `copier`: the copy of each batch is started before the one before is yielded."""
    with closing(stream):
        waiting: list[tuple[BatchT | None, NotesT]] = []
        for batch, notes in stream:
            waiting.append((None if batch is None else copier.start(batch), notes))
            if len(waiting) > 1:
                yield _finished(waiting.pop(0), copier=copier)
        for pair in waiting:
            yield _finished(pair, copier=copier)


def _finished(pair: tuple[BatchT | None, NotesT], *, copier: Copier) -> tuple[BatchT | None, NotesT]:
    if pair[0] is not None:
        copier.finish(pair[0])
    return pair


def _moved(
    stream: Generator[tuple[BatchT | None, NotesT], None, None], *, device: torch.device
) -> Generator[tuple[BatchT | None, NotesT], None, None]:
    with closing(stream):
        for batch, notes in stream:
            if device.type != "cpu":
                batch = map_tensors(batch, function=lambda tensor: tensor.to(device))
            yield batch, notes


class _SideStream:
    """Copies on a CUDA stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._arrived: list[torch.cuda.Event] = []  # of the batches started and not finished, oldest first

    def start(self, batch: BatchT) -> BatchT:
        with torch.cuda.stream(self._stream):
            copied = map_tensors(batch, function=lambda tensor: tensor.to(self._device, non_blocking=True))
            self._arrived.append(self._stream.record_event())
        return copied

    def finish(self, batch: BatchT) -> None:
        consumer = torch.cuda.current_stream(self._device)
        # The event and not the whole stream: by now the copy of the next batch is under way on it.
        consumer.wait_event(self._arrived.pop(0))
        # The allocator would otherwise give the memory to the next copy as soon as the consumer drops the batch,
        # while kernels that read it still wait on the consumer's stream.
        map_tensors(batch, function=lambda tensor: _used_on(tensor, stream=consumer))


def _used_on(tensor: Tensor, *, stream: torch.cuda.Stream) -> Tensor:
    if tensor.is_cuda:
        tensor.record_stream(stream)
    return tensor
