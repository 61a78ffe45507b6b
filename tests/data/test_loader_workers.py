"""Worker processes that hang or die: the loader ends with a sentence that names the sample, and leaves no process."""

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coca_video.data import loader_workers
from coca_video.data.loader import Order, SampleKey, Unreadable, batches, in_order
from coca_video.data.loader_workers import worker_timeout
from coca_video.data.manifest import Manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.data.views import protocol
from coca_video.eval.multiview import MultiViewDataset
from coca_video.eval.passes import share_of


@dataclass(frozen=True)
class Numbers:
    """Sample i is i; at index `fatal`, `act` is called first."""

    fatal: int
    act: Callable[[], object]

    def __getitem__(self, key: SampleKey) -> int | Unreadable:
        if key.index == self.fatal:
            self.act()
        return key.index


def hang() -> None:
    """As in a decoder that never returns: what asks it to end is not heard."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGALRM})
    while True:
        time.sleep(60)


def die_of(number: int) -> None:
    time.sleep(0.5)  # so that the batches before have left the process
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)


def load(numbers: Numbers, *, workers: int, timeout_seconds: float = 60.0) -> Iterator[list[int] | None]:
    steps = in_order(
        numbers, num_samples=12, batch_size=2, workers=workers, collate=list, worker_timeout_seconds=timeout_seconds
    )
    return (batch for batch, _ in steps)


class Cyclic:
    """Garbage that only the collector frees; it says in which process."""

    def __init__(self, freed_in: Any) -> None:
        self.freed_in, self.itself = freed_in, self

    def __del__(self) -> None:
        self.freed_in.append(os.getpid())


@dataclass(frozen=True)
class Collecting:
    """Each sample is the number of inherited objects that a collection frees in the worker."""

    freed_in: list[int]

    def __getitem__(self, key: SampleKey) -> int | Unreadable:
        gc.collect()
        return self.freed_in.count(os.getpid())


def test_a_worker_does_not_free_what_it_inherited() -> None:
    """A decoder's threads are not inherited: to free it there may wait for them for ever."""
    freed_in: list[int] = []
    gc.collect()
    gc.disable()
    try:
        Cyclic(freed_in)
        steps = in_order(Collecting(freed_in), num_samples=2, batch_size=1, workers=1, collate=list)
        assert [batch for batch, _ in steps] == [[0], [0]]
        gc.collect()
        assert freed_in == [os.getpid()]  # it was garbage, and is freed where its threads are
    finally:
        gc.enable()


@pytest.mark.parametrize("seconds", [60.0, 600.0, 7200.0])
def test_a_clip_s_own_limit_comes_four_minutes_before_the_workers(seconds: float) -> None:
    manifest = Manifest(source=Path("none.csv"), rows=(), classes=("one",))
    clips = VideoDataset(manifest, config=ClipConfig(timeout_seconds=seconds), seed=0)
    views = MultiViewDataset(manifest, protocol=protocol("slowfast"), image_size=32, timeout_seconds=seconds)
    for dataset in (clips, views, share_of(clips, number=0, count=2)):
        assert worker_timeout(dataset) == seconds + 240
    assert worker_timeout(Numbers(-1, hang)) == 300  # it states none
    assert worker_timeout(share_of(Several(0.1), number=0, count=1)) == 240.1


@dataclass(frozen=True)
class Several:
    """Twelve samples, the last of which takes 1.2 s."""

    sample_timeout_seconds: float

    def __len__(self) -> int:
        return 12

    def __getitem__(self, key: SampleKey) -> int | Unreadable:
        if key.index == 11:
            time.sleep(1.2)
        return key.index


@pytest.mark.parametrize("one_pass", [True, False])
def test_the_data_set_s_own_limit_decides(one_pass: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a margin of 0.2 s: enough for a limit of 5 s, too little for one of 0.1 s."""
    monkeypatch.setattr(loader_workers, "WORKER_MARGIN_SECONDS", 0.2)

    def load_all(limit_seconds: float) -> list[int]:
        options: dict[str, Any] = {"workers": 1, "collate": list}
        if one_pass:
            steps = in_order(Several(limit_seconds), num_samples=12, batch_size=6, **options)
        else:
            order = Order(num_samples=12, batch_size=6, seed=0)
            steps = batches(Several(limit_seconds), order=order, first_step=0, last_step=2, **options)
        return sorted(number for batch, _ in steps for number in batch or [])

    assert load_all(5.0) == list(range(12))
    with pytest.raises(TimeoutError, match=r"finished no sample in 0\.3 s"):
        load_all(0.1)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_worker_that_hangs_is_given_up_and_named(workers: int) -> None:
    found: list[list[int] | None] = []
    message = r"finished no sample in 0\.4 s; at work: sample 7 of epoch 0 \(samples are counted from 0\)"
    with pytest.raises(TimeoutError, match=message):
        found.extend(load(Numbers(7, hang), workers=workers, timeout_seconds=0.4))
    assert found[:3] == [[0, 1], [2, 3], [4, 5]]
    assert multiprocessing.active_children() == []


def test_collating_that_hangs_is_given_up_too() -> None:
    steps = in_order(
        Numbers(-1, hang),
        num_samples=2,
        batch_size=2,
        workers=1,
        collate=lambda samples: hang(),
        worker_timeout_seconds=0.4,
    )
    with pytest.raises(TimeoutError, match="at work: none, so the collating hangs"):
        list(steps)
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_the_limit_is_for_a_sample_and_not_for_a_batch() -> None:
    """Eight samples of 0.3 s make a batch that takes longer than the limit, and come."""

    class Slow:
        def __getitem__(self, key: SampleKey) -> int | Unreadable:
            time.sleep(0.3)
            return key.index

    steps = in_order(Slow(), num_samples=8, batch_size=8, workers=1, collate=list, worker_timeout_seconds=2.0)
    assert [batch for batch, _ in steps] == [list(range(8))]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: die_of(signal.SIGKILL), r"by signal 9 \(Killed\) at sample 5 of epoch 0 .*memory runs out"),
        pytest.param(
            lambda: die_of(signal.SIGSEGV),
            r"by signal 11 \(Segmentation fault\) at sample 5 of epoch 0 .*decoder",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: die_of(signal.SIGBUS),
            r"by signal 7 \(Bus error\) at sample 5 of epoch 0 .*/dev/shm",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            lambda: die_of(signal.SIGUSR1),
            r"by signal 10 \(User defined signal 1\) at sample 5 .*it printed",
            marks=pytest.mark.slow,
        ),
        (lambda: os._exit(3), r"with status 3 at sample 5 of epoch 0 .*it printed"),
        pytest.param(lambda: os._exit(0), r"with status 0 at sample 5 of epoch 0 .*it printed", marks=pytest.mark.slow),
    ],
)
def test_a_worker_that_dies_is_named(act: Callable[[], object], message: str) -> None:
    found: list[list[int] | None] = []
    with pytest.raises(ChildProcessError, match=message):
        found.extend(load(Numbers(5, act), workers=2))
    assert found == [[0, 1], [2, 3]][: len(found)]  # what came before, as far as it was sent
    assert multiprocessing.active_children() == []


def test_a_death_is_told_where_a_batch_is_asked_for_and_not_before() -> None:
    """The main process may be in the midst of a step, where an error would leave the model half changed."""
    stream = load(Numbers(5, lambda: die_of(signal.SIGKILL)), workers=1)
    assert next(stream) == [0, 1]
    deadline = time.monotonic() + 60
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []  # it is dead, and nothing was raised here
    with pytest.raises(ChildProcessError, match="at sample 5 of epoch 0"):
        list(stream)


def test_the_handler_of_child_deaths_is_as_it_was() -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGCHLD, handler)
    try:
        stream = load(Numbers(-1, hang), workers=1)
        assert next(stream) == [0, 1]
        assert signal.getsignal(signal.SIGCHLD) is handler
        del stream
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_data_set_stays_what_it_is(workers: int) -> None:
    def complain() -> None:
        raise RuntimeError("own words")

    with pytest.raises(RuntimeError, match="own words"):
        list(load(Numbers(3, complain), workers=workers))
    assert multiprocessing.active_children() == []


def test_workers_end_with_a_loader_that_is_closed_early() -> None:
    steps = in_order(Numbers(-1, hang), num_samples=12, batch_size=2, workers=2, collate=list)
    assert next(steps) == ([0, 1], [])
    assert len(multiprocessing.active_children()) == 2
    steps.close()
    assert multiprocessing.active_children() == []
