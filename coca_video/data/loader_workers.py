"""The loader's worker processes, watched: one that hangs or dies ends the run with a sentence. (issue 5)

The time limit of one clip (`deadline`) catches a decoder that takes too long. What is left to this file is a decoder
that holds the interpreter, crashes, or takes all memory, and a file system that does not answer.
"""

import gc
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any, Generic, Protocol, TypeVar, cast, runtime_checkable

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

SampleT = TypeVar("SampleT")
SampleT_co = TypeVar("SampleT_co", covariant=True)

WORKER_TIMEOUT_SECONDS = 300.0  # for samples of which no limit is known
WORKER_MARGIN_SECONDS = 240.0  # above the limit of a sample, which comes first: it names the file, and the run goes on
POLL_SECONDS = 1.0  # how often the workers are looked at while a batch is waited for
TIMED_OUT = "DataLoader timed out"  # how torch's RuntimeError starts
SIGNAL_HINTS: dict[int, str] = {
    signal.SIGKILL: "the system does that when memory runs out, so use fewer workers or smaller batches",
    signal.SIGSEGV: "a decoder crashed on that file, so leave it out or try another decoder",
    signal.SIGBUS: "/dev/shm is full, so make it larger or use fewer workers",
}
GRACE_SECONDS = 20  # schedulers send SIGKILL some 30 s after SIGTERM


@runtime_checkable
class Indexed(Protocol[SampleT_co]):
    """What is indexed with (epoch, index)."""

    def __getitem__(self, key: Any, /) -> SampleT_co: ...


@runtime_checkable
class TimeLimited(Protocol):
    """A data set that gives a sample up after a time of its own."""

    @property
    def sample_timeout_seconds(self) -> float | None:
        """The most that reading a sample takes; None where there is no such limit."""


def sample_timeout_seconds(dataset: object) -> float | None:
    """After how long `dataset` itself gives up a sample; None for one that says nothing of it."""
    return dataset.sample_timeout_seconds if isinstance(dataset, TimeLimited) else None


def worker_timeout(dataset: object) -> float:
    """How long workers may take for a sample of `dataset`, in seconds: the margin above its own limit."""
    limit = sample_timeout_seconds(dataset)
    return WORKER_TIMEOUT_SECONDS if limit is None else limit + WORKER_MARGIN_SECONDS


@dataclass(frozen=True, kw_only=True)
class Watched(Generic[SampleT]):
    """The data set as workers index it: each notes what it is at in memory that the main process sees."""

    dataset: Indexed[SampleT]
    work: Int64[Tensor, "workers 4"]  # of each worker: samples done, whether it is at one, its epoch and index

    @classmethod
    def by(cls, num_workers: int, *, dataset: Indexed[SampleT]) -> "Watched[SampleT]":
        """`dataset` as that many workers index it, none of which is at anything yet."""
        work = torch.zeros(num_workers, 4, dtype=torch.int64)
        return cls(dataset=dataset, work=work.share_memory_())  # type: ignore[no-untyped-call]

    def __getitem__(self, key: tuple[int, int], /) -> SampleT:
        info = get_worker_info()
        assert info is not None, "only workers are watched"
        own = self.work[info.id].numpy()
        own[1:] = 1, *key
        sample = self.dataset[key]
        own[:2] = own[0] + 1, 0
        return sample


def from_workers(
    loader: DataLoader[Any], *, work: Int64[Tensor, "workers 4"], timeout_seconds: float
) -> Generator[Any, None, None]:
    """What the loader's workers send; they end with the generator, also where that is closed before its end."""
    iterator = cast(Any, _iterate(loader))
    # torch has no public name for these two. Deleting the iterator would do, were it not for tracebacks that hold it.
    processes, shut_down = list(iterator._workers), iterator._shutdown_workers
    failed = True
    try:
        while loaded := _next(iterator, processes=processes, work=work, timeout_seconds=timeout_seconds):
            yield loaded
        failed = False
    except GeneratorExit:
        failed = False
        raise
    finally:
        if failed:
            _kill(processes)
        shut_down()
        _kill(processes)  # SIGTERM, which torch sends, is nothing to one that hangs inside a decoder


def _iterate(loader: DataLoader[Any]) -> Iterator[Any]:
    """iter(loader), without its SIGCHLD handler: that raises wherever the main process is, in the midst of a step."""
    before = signal.getsignal(signal.SIGCHLD)
    # A forked process inherits the main one's garbage but not its threads: FFmpeg's filters, freed there by the
    # collector, waited for ever for theirs. What is frozen at the fork is never collected there (nor copied by it).
    gc.freeze()
    try:
        iterator = iter(loader)
    finally:
        gc.unfreeze()
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, before)
    return iterator


def poll_seconds(timeout_seconds: float) -> float:
    """After how long a wait the workers are looked at: the `timeout` for DataLoader."""
    return min(POLL_SECONDS, timeout_seconds)


def _next(
    iterator: Iterator[Any],
    *,
    processes: Sequence[BaseProcess],
    work: Int64[Tensor, "workers 4"],
    timeout_seconds: float,
) -> Any:
    """The next batch, None after the last; its time is counted in polls, so that a stopped terminal costs nothing."""
    waited_seconds, done = 0.0, -1
    while True:
        try:
            return next(iterator, None)
        except RuntimeError as error:
            _check_alive(processes, work=work, error=error)
            if not str(error).startswith(TIMED_OUT):
                raise
        before, done = done, int(work[:, 0].sum())
        waited_seconds = waited_seconds + poll_seconds(timeout_seconds) if done == before else 0.0
        if waited_seconds >= timeout_seconds:
            at_work = [f"sample {index} of epoch {epoch}" for _, busy, epoch, index in work.tolist() if busy]
            raise TimeoutError(
                f"The worker processes finished no sample in {timeout_seconds:g} s; "
                f"at work: {', '.join(at_work) or 'none, so the collating hangs'} (samples are counted from 0); "
                "look at their files, or give more time (worker_timeout_seconds)."
            )


def _check_alive(processes: Sequence[BaseProcess], *, work: Int64[Tensor, "workers 4"], error: RuntimeError) -> None:
    for process, (_, busy, epoch, index) in zip(processes, work.tolist(), strict=True):
        if not process.is_alive():
            where = f"at sample {index} of epoch {epoch} (counted from 0)" if busy else "between samples"
            code = process.exitcode or 0
            end, hint = f"with status {code}", "look at what it printed"
            if code < 0:
                end, hint = f"by signal {-code} ({signal.strsignal(-code)})", SIGNAL_HINTS.get(-code, hint)
            raise ChildProcessError(f"A worker process of the loader was ended {end} {where}: {hint}.") from error


def _kill(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        if process.is_alive():
            process.kill()
            process.join()


def leave_signals_to_the_main_process(_: int) -> None:
    """A terminal or a scheduler signals every process; a run that is about to save still needs its workers.

    SIGTERM is obeyed after a while and not ignored: multiprocessing ends forgotten workers by it, and waits for them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE_SECONDS))
