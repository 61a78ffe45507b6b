"""The class-balanced order: classes equally often, every member in turn, keys never twice, any step at once."""

from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_video.data.balance import ClassBalancedOrder, class_balanced
from coca_video.data.loader import Order, SampleKey, batches
from coca_video.data.manifest import Manifest, VideoRow

LABELS = np.array([0] * 50 + [3] * 7 + [1] * 3 + [7] * 1, dtype=np.int64)  # 61 samples of 4 classes


def order_of(labels: np.ndarray = LABELS, *, batch_size: int = 100, seed: int = 5) -> ClassBalancedOrder:
    return ClassBalancedOrder(num_samples=len(labels), batch_size=batch_size, seed=seed, labels=labels)


def stream(order: Order, length: int) -> list[SampleKey]:
    steps = -(-length // order.batch_size)
    return [key for step in range(steps) for key in order.batch(step)][:length]


def test_an_epoch_has_as_many_of_each_class_as_far_as_it_divides() -> None:
    keys = stream(order_of(), 61 * 4)
    for epoch in range(4):
        counts = Counter(LABELS[key.index] for key in keys[61 * epoch : 61 * (epoch + 1)])
        assert sorted(counts.values()) == [15, 15, 15, 16]
    assert set(Counter(LABELS[key.index] for key in keys).values()) == {61}  # who gets one more goes round


def test_members_of_a_class_come_in_turn_and_keys_never_twice() -> None:
    keys = stream(order_of(), 61 * 40)
    assert len(set(keys)) == len(keys)  # else two draws of a sample would be augmented alike
    drawn = Counter(key.index for key in keys)
    for label in (0, 1, 3, 7):
        times = [drawn[index] for index in np.flatnonzero(label == LABELS).tolist()]
        assert sum(times) == 610
        assert max(times) - min(times) <= 1
    for index, times in drawn.items():
        assert sorted(key.epoch for key in keys if key.index == index) == list(range(times))


def test_members_are_shuffled_anew_in_each_pass_and_classes_are_mixed() -> None:
    labels = np.zeros(100, dtype=np.int64)
    keys = stream(order_of(labels, batch_size=100), 300)
    passes = [[key.index for key in keys[100 * number : 100 * (number + 1)]] for number in range(3)]
    assert all(sorted(one) == list(range(100)) for one in passes)
    assert len({tuple(one) for one in passes}) == 3
    assert abs(np.corrcoef(passes[0], np.arange(100))[0, 1]) < 0.4  # 4 standard errors
    # never in runs of one class, as the sorted labels are
    drawn = [LABELS[key.index] for key in stream(order_of(), 600)]
    same_as_next = sum(a == b for a, b in pairwise(drawn))
    assert 100 < same_as_next < 200  # 150 expected, standard deviation 10.6


def test_which_members_of_a_large_class_come_first_depends_on_the_seed() -> None:
    first = [{key.index for key in stream(order_of(seed=seed), 61) if key.index < 50} for seed in range(30)]
    assert len({frozenset(one) for one in first}) == 30
    times = Counter(index for one in first for index in one)
    assert sum(times.values()) == sum(map(len, first))
    assert len(times) == 50  # each of the 50 is among the first 15 in about 9 of 30 seeds


@settings(deadline=None, max_examples=20)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=6),
    batch_size=st.integers(20, 200),
    seed=st.integers(0, 9),
)
def test_whatever_the_classes(sizes: list[int], batch_size: int, seed: int) -> None:
    """An independent count: draws of a class are its turns; after k draws each member came k // size or one more."""
    labels = np.repeat(np.arange(len(sizes)), sizes).astype(np.int64)
    order = order_of(labels, batch_size=batch_size, seed=seed)
    total = sum(sizes)
    keys = stream(order, 2 * total)
    assert len(set(keys)) == len(keys)
    for epoch in range(2):
        counts = Counter(labels[key.index] for key in keys[total * epoch : total * (epoch + 1)])
        assert {counts[label] for label in range(len(sizes))} <= {total // len(sizes), -(-total // len(sizes))}
    drawn = Counter(key.index for key in keys)
    for label, size in enumerate(sizes):
        times = [drawn[index] for index in np.flatnonzero(labels == label).tolist()]
        assert set(times) <= {sum(times) // size, -(-sum(times) // size)}


def test_any_step_at_once_at_any_batch_size_and_through_the_loader() -> None:
    keys = stream(order_of(), 240)
    assert order_of(batch_size=8).batch(17) == keys[136:144]
    assert stream(order_of(batch_size=23), 240) == keys

    class Echo:
        def __getitem__(self, key: SampleKey) -> SampleKey:
            return key

    loaded = batches(Echo(), order=order_of(batch_size=8), first_step=3, last_step=6, workers=0, collate=list)
    assert [key for batch, _ in loaded for key in batch or []] == keys[24:48]


def test_of_a_manifest_and_mistakes() -> None:
    rows = [VideoRow(path=Path(f"{n}.mp4"), label="b" if n < 5 else "a", video_id=str(n)) for n in range(6)]
    manifest = Manifest(source=Path("m.csv"), rows=rows, classes=("a", "b", "without clips"))
    order = class_balanced(manifest, batch_size=3, seed=2)
    assert order.labels.tolist() == [1, 1, 1, 1, 1, 0]
    counts = Counter(key.index == 5 for key in stream(order, 12))
    assert counts == {True: 6, False: 6}
    unlabelled = Manifest(source=Path("m.csv"), rows=[VideoRow(path="x", label=None, video_id="x")], classes=())
    with pytest.raises(ValueError, match="without a label"):
        class_balanced(unlabelled, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="5 samples got 61 labels"):
        ClassBalancedOrder(num_samples=5, batch_size=1, seed=0, labels=LABELS)
    with pytest.raises(ValueError, match="Steps count from 0, got -1"):
        order.batch(-1)


def test_a_million_samples() -> None:
    """Long-tailed classes; numbers by arithmetic, and one batch alone, far into the run."""
    sizes = np.array([2**k for k in range(20)], dtype=np.int64)
    labels = np.repeat(np.arange(20), sizes).astype(np.int64)
    keys = order_of(labels, batch_size=4000, seed=1).batch(1_000_000)
    counts = Counter(labels[key.index] for key in keys)
    # 4e9 positions before: each class was drawn 2e8 times and some, so class k's pass is about 2e8 / 2**k
    assert all(abs(key.epoch - 2e8 / sizes[labels[key.index]]) < 2 + 2e5 / sizes[labels[key.index]] for key in keys)
    assert all(120 < counts[label] < 290 for label in range(20))  # 200 expected, standard deviation 13.8
