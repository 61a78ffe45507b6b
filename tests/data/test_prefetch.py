"""Copies one batch ahead: in the order of the stream, each started before the one before is handed out."""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor

from coca_video.data.loader import SampleKey, Unreadable, in_order
from coca_video.data.prefetch import map_tensors, one_ahead, to_device_ahead
from coca_video.data.video import Clip, ClipBatch, collate_clips

BatchT = TypeVar("BatchT")


class Pair(NamedTuple):
    """A named tuple with a tensor."""

    left: Tensor
    name: str


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Everything that a batch may hold."""

    tensor: Tensor
    pairs: list[Pair]
    named: dict[str, Tensor]
    plain: tuple[str, int, None]
    times: np.ndarray
    kind: type


def test_every_tensor_of_a_batch_is_mapped_and_nothing_else() -> None:
    times = np.arange(3.0)
    mixed = Mixed(
        tensor=torch.tensor([1]),
        pairs=[Pair(torch.tensor([2]), "a"), Pair(torch.tensor([3]), "b")],
        named={"x": torch.tensor([4])},
        plain=("text", 5, None),
        times=times,
        kind=Mixed,
    )
    seen: list[int] = []

    def tenfold(tensor: Tensor) -> Tensor:
        seen.append(int(tensor))
        return tensor * 10

    mapped = map_tensors(mixed, function=tenfold)
    assert seen == [1, 2, 3, 4]
    assert (mapped.tensor.tolist(), mapped.named["x"].tolist()) == ([10], [40])
    assert [(pair.left.tolist(), pair.name) for pair in mapped.pairs] == [([20], "a"), ([30], "b")]
    assert all(isinstance(pair, Pair) for pair in mapped.pairs)
    assert mapped.plain == ("text", 5, None) and mapped.times is times and mapped.kind is Mixed
    assert (mixed.tensor.tolist(), mixed.pairs[0].left.tolist()) == ([1], [2])  # the original is left alone


@dataclass
class Recorder:
    """A Copier that writes down what happens."""

    events: list[str] = field(default_factory=list)

    def start(self, batch: BatchT) -> BatchT:
        self.events.append(f"start {batch}")
        return batch

    def finish(self, batch: BatchT) -> None:
        self.events.append(f"finish {batch}")


def stream(*batches: int | None, events: list[str]) -> Generator[tuple[int | None, str], None, None]:
    try:
        for number, batch in enumerate(batches):
            events.append(f"read {batch}")
            yield batch, f"note {number}"
    finally:
        events.append("closed")


def test_a_copy_starts_before_the_batch_before_it_is_handed_out() -> None:
    copier = Recorder()
    for batch, _ in one_ahead(stream(0, 1, 2, events=copier.events), copier=copier):
        copier.events.append(f"use {batch}")
    assert copier.events == [
        "read 0", "start 0", "read 1", "start 1", "finish 0", "use 0",
        "read 2", "start 2", "finish 1", "use 1", "closed", "finish 2", "use 2",
    ]  # fmt: skip


@pytest.mark.parametrize("batches", [(), (7,), (7, 8), (None, 7, None, None, 8, None)])
def test_order_and_notes_are_those_of_the_stream(batches: tuple[int | None, ...]) -> None:
    """A step without a readable sample has no batch, and is handed out all the same."""
    copier = Recorder()
    found = list(one_ahead(stream(*batches, events=[]), copier=copier))
    assert found == [(batch, f"note {number}") for number, batch in enumerate(batches)]
    copied = [batch for batch in batches if batch is not None]
    assert [event for event in copier.events if "finish" in event] == [f"finish {batch}" for batch in copied]


@pytest.mark.parametrize("ahead", [True, False])
def test_closing_early_closes_the_stream(ahead: bool) -> None:
    events: list[str] = []
    source = stream(0, 1, 2, events=events)
    found = one_ahead(source, copier=Recorder()) if ahead else to_device_ahead(source, device=torch.device("cpu"))
    assert next(found) == (0, "note 0")
    assert "closed" not in events
    found.close()
    assert events[-1] == "closed"


class Clips:
    """Clip i holds the number i; clip 2 cannot be read."""

    def __getitem__(self, key: SampleKey) -> Clip | Unreadable:
        if key.index == 2:
            return Unreadable(key="2", cause="two")
        frames = torch.full((2, 3, 4, 4), key.index, dtype=torch.uint8)
        return Clip(key=key, frames=frames, label=key.index, video_id=str(key.index), times_seconds=np.zeros(2))


def clip_steps(*, pin_memory: bool = False) -> Generator[tuple[ClipBatch | None, list[Unreadable]], None, None]:
    return in_order(Clips(), num_samples=9, batch_size=2, workers=1, collate=collate_clips, pin_memory=pin_memory)


def test_on_the_cpu_batches_pass_unchanged() -> None:
    steps = [(object(), "a"), (None, "b"), (object(), "c")]
    found = list(to_device_ahead((step for step in steps), device=torch.device("cpu")))
    assert len(found) == 3
    assert all(batch is expected for (batch, _), (expected, _) in zip(found, steps, strict=True))


def test_on_another_device_every_batch_is_there() -> None:
    """`meta` stands for a device that is neither the CPU nor CUDA, such as MPS."""
    found = list(to_device_ahead(clip_steps(), device=torch.device("meta")))
    assert [batch.video_ids for batch, _ in found if batch is not None] == [
        ("0", "1"), ("3",), ("4", "5"), ("6", "7"), ("8",),
    ]  # fmt: skip
    assert all(batch.frames.is_meta and batch.labels.is_meta for batch, _ in found if batch is not None)
    assert [failed for _, failed in found if failed] == [[Unreadable(key="2", cause="two")]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
def test_on_cuda_every_batch_is_there_and_equal() -> None:
    device = torch.device("cuda")
    assert all(batch.frames.is_pinned() for batch, _ in clip_steps(pin_memory=True) if batch is not None)
    found = list(to_device_ahead(clip_steps(pin_memory=True), device=device))
    for (batch, failed), (expected, expected_failed) in zip(found, clip_steps(), strict=True):
        assert failed == expected_failed
        assert batch is not None and expected is not None
        assert batch.frames.is_cuda and batch.video_ids == expected.video_ids
        assert torch.equal(batch.frames.cpu(), expected.frames) and torch.equal(batch.labels.cpu(), expected.labels)
