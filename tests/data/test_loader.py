"""The order of samples: a bijection, the same for any number of workers, exact at any step."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from coca_video.data.loader import Order, SampleKey, Share, Unreadable, batches, in_order, keyed_permutation

# two cores are few for three workers, and torch says so
three_workers = pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes:UserWarning")

GOLDEN = [SampleKey(0, 657), SampleKey(0, 461), SampleKey(0, 70), SampleKey(0, 645)]


class Squares:
    """Sample (epoch, index) is epoch * 1000 + index**2; every index divisible by 7 cannot be read."""

    def __getitem__(self, key: SampleKey) -> int | Unreadable:
        if key.index % 7 == 0:
            return Unreadable(key=f"sample {key.index}", cause="divisible by 7")
        return key.epoch * 1000 + key.index**2


@dataclass(frozen=True)
class Noise:
    """Sample (epoch, index) is its key and 3 numbers drawn from it; index 5 cannot be read."""

    def __getitem__(self, key: SampleKey) -> tuple[SampleKey, torch.Tensor] | Unreadable:
        if key.index == 5:
            return Unreadable(key=str(key.index), cause="five")
        return key, noise(key)


def noise(key: SampleKey) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng([key.epoch, key.index]).random(3))


def expected_step(order: Order, step: int) -> tuple[list[int] | None, list[str]]:
    keys = order.batch(step)
    good = [epoch * 1000 + index**2 for epoch, index in keys if index % 7]
    return good or None, [f"sample {index}" for _, index in keys if index % 7 == 0]


def collect(order: Order, *, first_step: int, last_step: int, workers: int) -> list[tuple[list[int] | None, list[str]]]:
    found = batches(Squares(), order=order, first_step=first_step, last_step=last_step, workers=workers, collate=list)
    return [(batch, [u.key for u in unreadable]) for batch, unreadable in found]


def test_permutation_is_a_bijection_for_every_small_size() -> None:
    for size in range(1, 201):
        for key in (0, 1, 2**63 + 5, -3):
            images = keyed_permutation(np.arange(size, dtype=np.int64), size=size, key=key)
            assert sorted(images.tolist()) == list(range(size)), (size, key)


def test_permutation_of_a_large_size_is_one_to_one_and_inside() -> None:
    size = 5_000_000_011
    positions = np.unique(np.random.default_rng(0).integers(0, size, 100_000))
    images = keyed_permutation(positions, size=size, key=9)
    assert images.min() >= 0
    assert images.max() < size
    assert np.unique(images).size == positions.size
    assert abs(images.mean() / size - 0.5) < 0.005  # standard error of a uniform mean of 100,000: 0.0009
    assert abs(np.corrcoef(positions, images)[0, 1]) < 0.015


def test_permutation_is_pointwise() -> None:
    whole = keyed_permutation(np.arange(1000, dtype=np.int64), size=1000, key=4)
    some = np.array([999, 0, 500, 500], dtype=np.int64)
    assert keyed_permutation(some, size=1000, key=4).tolist() == whole[some].tolist()


@pytest.mark.slow
def test_permutation_over_keys_is_uniform() -> None:
    """Where position 0 and position 3 of 10 go, over 4,000 keys: chi-square with 9 degrees of freedom, p = 1e-4."""
    at = np.array([0, 3], dtype=np.int64)
    images = np.stack([keyed_permutation(at, size=10, key=key) for key in range(4000)])
    for image in images.T:
        counts = np.bincount(image, minlength=10)
        assert ((counts - 400.0) ** 2 / 400.0).sum() < 33.7


def test_permutation_differs_by_key() -> None:
    positions = np.arange(100, dtype=np.int64)
    orders = {tuple(keyed_permutation(positions, size=100, key=key).tolist()) for key in range(50)}
    assert len(orders) == 50


def test_permutation_refuses_positions_outside() -> None:
    with pytest.raises(ValueError, match=r"must lie in \[0, 5\), got 2 to 5"):
        keyed_permutation(np.array([2, 5], dtype=np.int64), size=5, key=0)
    with pytest.raises(ValueError, match="size of at least 1"):
        keyed_permutation(np.array([], dtype=np.int64), size=0, key=0)


@pytest.mark.parametrize("batch_size", [1, 4, 10, 23])
def test_order_shows_every_sample_once_in_every_epoch(batch_size: int) -> None:
    order = Order(num_samples=10, batch_size=batch_size, seed=3)
    stream = [key for step in range(-(-30 // batch_size)) for key in order.batch(step)][:30]
    assert [key.epoch for key in stream] == [0] * 10 + [1] * 10 + [2] * 10
    by_epoch = [[key.index for key in stream[10 * e : 10 * e + 10]] for e in range(3)]
    assert all(sorted(indices) == list(range(10)) for indices in by_epoch)
    assert len({tuple(indices) for indices in by_epoch}) == 3


def test_order_does_not_depend_on_the_batch_size_but_on_the_seed() -> None:
    def stream(batch_size: int, seed: int) -> list[SampleKey]:
        order = Order(num_samples=12, batch_size=batch_size, seed=seed)
        return [key for step in range(24 // batch_size) for key in order.batch(step)]

    assert stream(2, 0) == stream(8, 0) == stream(24, 0)
    assert stream(2, 0) != stream(2, 1)


def test_order_is_the_same_on_every_machine() -> None:
    """A golden order: a change of it breaks resuming of runs that exist."""
    assert Order(num_samples=1000, batch_size=4, seed=0).batch(249) == GOLDEN


def test_batches_are_equal_for_any_number_of_workers() -> None:
    order = Order(num_samples=20, batch_size=6, seed=1)
    expected = [expected_step(order, step) for step in range(9)]
    assert collect(order, first_step=0, last_step=9, workers=0) == expected
    assert collect(order, first_step=0, last_step=9, workers=2) == expected
    assert sum(len(names) for _, names in expected) > 5  # unreadable samples did come out


def test_starting_late_equals_the_tail() -> None:
    order = Order(num_samples=20, batch_size=6, seed=1)
    whole = collect(order, first_step=0, last_step=9, workers=0)
    for first in (0, 1, 5, 9):
        assert collect(order, first_step=first, last_step=9, workers=0) == whole[first:]


@pytest.mark.parametrize("count", [1, 2, 3, 6])
def test_shares_of_a_step_make_up_the_step(count: int) -> None:
    """For any number of ranks the same samples in the same order, each by one of them."""
    order = Order(num_samples=20, batch_size=6, seed=1)
    options = {"order": order, "first_step": 2, "last_step": 6, "workers": 0, "collate": list}
    whole = [([] if batch is None else batch, names) for batch, names in batches(Squares(), **options)]
    shares = [list(batches(Squares(), share=Share(number, count), **options)) for number in range(count)]
    for step, (batch, names) in enumerate(whole):
        assert [sample for share in shares for sample in share[step][0] or []] == batch
        assert [name for share in shares for name in share[step][1]] == names
    sizes = [len(Share(number, count).of(order.batch(0))) for number in range(count)]
    assert max(sizes) - min(sizes) <= 1 and sum(sizes) == 6


@dataclass(frozen=True, kw_only=True)
class Leg:
    """A part of a run: up to which step, by how many workers and ranks."""

    last_step: int
    workers: int
    ranks: int


@pytest.mark.slow
@three_workers
@pytest.mark.parametrize(
    "legs",
    [
        *([Leg(last_step=8, workers=workers, ranks=ranks)] for workers in (0, 1, 2, 3) for ranks in (1, 2, 3)),
        [
            Leg(last_step=2, workers=0, ranks=1),
            Leg(last_step=5, workers=2, ranks=3),
            Leg(last_step=8, workers=1, ranks=2),
        ],
        [
            Leg(last_step=1, workers=3, ranks=2),
            Leg(last_step=2, workers=1, ranks=1),
            Leg(last_step=8, workers=0, ranks=3),
        ],
        [Leg(last_step=7, workers=1, ranks=3), Leg(last_step=8, workers=3, ranks=1)],
    ],
    ids=lambda legs: " then ".join(f"to {leg.last_step} by {leg.workers}x{leg.ranks}" for leg in legs),
)
def test_a_run_sees_the_same_however_it_is_divided_and_stopped(legs: list[Leg]) -> None:
    """8 steps of 7 over 17 samples: epochs end in mid-step, legs end in mid-epoch, 3 ranks share 7 unevenly."""
    order = Order(num_samples=17, batch_size=7, seed=4)
    expected = [key for step in range(8) for key in order.batch(step)]
    assert sorted(expected[17:34]) == [(1, index) for index in range(17)]
    found: list[SampleKey] = []
    first_step = 0
    for leg in legs:
        options = {"order": order, "first_step": first_step, "last_step": leg.last_step, "workers": leg.workers}
        shares = [Share(number, leg.ranks) for number in range(leg.ranks)]
        ranks = [list(batches(Noise(), share=share, collate=list, **options)) for share in shares]
        for step in zip(*ranks, strict=True):
            samples = [sample for batch, _ in step for sample in batch or []]
            assert all(torch.equal(numbers, noise(key)) for key, numbers in samples)
            found += [key for key, _ in samples]
        first_step = leg.last_step
    assert found == [key for key in expected if key.index != 5]
    assert len(found) == 56 - 4  # index 5 comes once an epoch, and early in the fourth


def test_a_step_without_readable_samples_is_none() -> None:
    steps = list(in_order(Squares(), num_samples=8, batch_size=1, workers=0, collate=list))
    assert steps[0] == (None, [Unreadable(key="sample 0", cause="divisible by 7")])
    assert steps[1] == ([1], [])
    assert steps[7] == (None, [Unreadable(key="sample 7", cause="divisible by 7")])


@three_workers
@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_in_order_passes_once_and_keeps_the_last_small_batch(workers: int) -> None:
    steps = list(in_order(Squares(), num_samples=10, batch_size=4, workers=workers, collate=list))
    assert [batch for batch, _ in steps] == [[1, 4, 9], [16, 25, 36], [64, 81]]
    assert [[u.key for u in unreadable] for _, unreadable in steps] == [["sample 0"], ["sample 7"], []]


def test_loading_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # noqa: NPY002
    order = Order(num_samples=20, batch_size=6, seed=1)
    collect(order, first_step=0, last_step=4, workers=0)
    collect(order, first_step=0, last_step=4, workers=1)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002


def test_wrong_numbers_are_sentences() -> None:
    with pytest.raises(ValueError, match="num_samples of at least 1, got 0"):
        Order(num_samples=0, batch_size=1, seed=0)
    with pytest.raises(ValueError, match="batch_size of at least 1, got 0"):
        Order(num_samples=1, batch_size=0, seed=0)
    order = Order(num_samples=4, batch_size=2, seed=0)
    with pytest.raises(ValueError, match="first_step <= last_step, got 3 and 2"):
        batches(Squares(), order=order, first_step=3, last_step=2, workers=0, collate=list)
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        batches(Squares(), order=order, first_step=0, last_step=2, workers=-1, collate=list)
    with pytest.raises(ValueError, match="worker_timeout_seconds must be more than 0, got 0"):
        in_order(Squares(), num_samples=1, batch_size=1, workers=1, collate=list, worker_timeout_seconds=0.0)
    with pytest.raises(ValueError, match="A batch of 2 cannot be shared by 3 ranks"):
        batches(Squares(), order=order, first_step=0, last_step=2, workers=0, collate=list, share=Share(2, 3))
    with pytest.raises(ValueError, match="count from 0, got -1"):
        order.batch(-1)
