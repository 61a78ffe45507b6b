"""Processes that may hang or crash: each call of a function runs in one that can be ended from outside.

A decoder that loops for ever or dies with a segmentation fault takes down its own process and the one file it was at.
multiprocessing.Pool waits for ever on the first, and concurrent.futures gives up the whole pool on the second.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads and CUDA do not survive a fork, and a spawned process inherits no memory of the parent.
_SPAWN = multiprocessing.get_context("spawn")
_LONGEST_WAIT_SECONDS = 86_400.0  # poll() takes no more than 2**31 ms, and a time limit may be infinite


def num_usable_cpus() -> int:
    """Those this process may use, which is fewer than the machine's in a container."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True, kw_only=True)
class WorkerFailure:
    """In place of a result: the call did not come to an end. `cause` is what a person reads."""

    cause: str
    timed_out: bool


def parallel(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    num_workers: int,
    timeout_seconds: float,
    warm_up: Callable[[], object] | None = None,
) -> Generator[tuple[Item, Result | WorkerFailure], None, None]:
    """Calls `function` on every item in `num_workers` processes of its own; (item, result) in order of completion.

    A call that takes longer than `timeout_seconds` ends with its process, and so does a call whose process dies: the
    item's result is a WorkerFailure, and a new process takes the next item. Every item comes back once. `items` is read
    as workers become free. Closing the generator, or an exception in it (Ctrl-C), ends all processes.

    function, warm_up: module-level functions, or functools.partial of them. `warm_up` is called once in each process
    before its first item, so that imports take nothing of that item's time.

    Raises:
        ChildProcessError: a process ended before it was ready for work.
        Whatever `function` raises: it catches what it expects.
    """
    assert num_workers >= 1 and timeout_seconds > 0, (num_workers, timeout_seconds)
    waiting = iter(items)
    workers: list[_Worker[Item]] = []
    try:
        for _, item in zip(range(num_workers), waiting, strict=False):  # the range first: zip drops what it read last
            workers.append(_Worker(function, item=item, timeout_seconds=timeout_seconds, warm_up=warm_up))
        while workers:
            for worker in _ready(workers):
                outcome = worker.outcome()
                if outcome is None:  # it has only told that it is warm
                    continue
                done, result = outcome
                try:
                    following = next(waiting)
                except StopIteration:
                    worker.end()
                    workers.remove(worker)
                else:
                    worker.take(following)
                yield done, result
    finally:
        for worker in workers:
            worker.end()


def _ready(workers: "list[_Worker[Item]]") -> "list[_Worker[Item]]":
    """The workers that sent something, died, or are over their time; waits for one, a day at most."""
    deadlines = [worker.deadline for worker in workers if worker.deadline is not None]
    now = time.monotonic()
    seconds = max(0.0, min([*deadlines, now + _LONGEST_WAIT_SECONDS]) - now)
    heard = set(wait([end for worker in workers for end in (worker.connection, worker.process.sentinel)], seconds))
    now = time.monotonic()
    return [
        worker
        for worker in workers
        if worker.connection in heard
        or worker.process.sentinel in heard
        or (worker.deadline is not None and worker.deadline <= now)
    ]


class _Worker(Generic[Item]):
    """One process with the item it is at. The clock of an item starts when its process is warm."""

    def __init__(
        self,
        function: Callable[[Item], Any],
        *,
        item: Item,
        timeout_seconds: float,
        warm_up: Callable[[], object] | None,
    ) -> None:
        self.function = function
        self.timeout_seconds = timeout_seconds
        self.warm_up = warm_up
        self.start(item)

    def start(self, item: Item) -> None:
        """A new process with its first item."""
        self.item = item
        self.deadline: float | None = None
        self.is_warm = False
        self.connection, theirs = _SPAWN.Pipe()
        arguments = (theirs, self.function, self.warm_up)
        self.process = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
        with _interrupts_held_back():
            self.process.start()
        theirs.close()  # so that the pipe breaks when the process dies

    def take(self, item: Item) -> None:
        """Hands over the next item, to a new process if this one has gone."""
        self.item = item
        if not self.is_warm:
            self.start(item)
            return
        try:
            self._send()
        except OSError:  # it died between two items, and so owes none
            self.end()
            self.start(item)

    def _send(self) -> None:
        self.connection.send(self.item)
        self.deadline = time.monotonic() + self.timeout_seconds

    def outcome(self) -> "tuple[Item, Any] | None":
        """The item with its result or failure; None for a process that has just become warm."""
        try:
            # What it sent counts first: it may have died, or its time may have run out, after it was done.
            message = self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):  # the pipe broke
            message = None
        match message:
            case ("warm", _):
                self.is_warm = True
                try:
                    self._send()
                except OSError:
                    return self.item, self._died()
                return None
            case ("result", result):
                self.deadline = None
                return self.item, result
            case ("raised", error):
                self.process.join(timeout=10)  # it is printing where that happened
                raise error
        if self.deadline is not None and self.deadline <= time.monotonic() and self.process.is_alive():
            self.end()
            return self.item, WorkerFailure(cause=f"took longer than {self.timeout_seconds:g} s", timed_out=True)
        return self.item, self._died()

    def _died(self) -> WorkerFailure:
        self.process.join()  # a broken pipe is seen a moment before the exit status
        code, was_warm = self.process.exitcode or 0, self.is_warm
        self.end()
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        if not was_warm:
            raise ChildProcessError(f"a worker process ended before it was ready ({how}); it says why above")
        return WorkerFailure(cause=f"the process that read it died ({how})", timed_out=False)

    def end(self) -> None:
        """Kills the process, whatever it is at: it holds nothing that anybody needs."""
        self.is_warm = False
        self.deadline = None
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: Connection, function: Callable[[Any], Any], warm_up: Callable[[], object] | None) -> None:
    """The life of a process: one item after the other until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent alone answers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if warm_up is not None:
        warm_up()
    connection.send(("warm", None))
    while True:
        try:
            item = connection.recv()
        except EOFError:
            return
        try:
            connection.send(("result", function(item)))
        except BaseException as error:
            connection.send(("raised", error))
            raise  # prints where it happened, which the exception loses on its way to the parent


def _exit_with_parent() -> None:
    """Ends this process when the parent is gone, killed too, even while a call hangs."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Ctrl-C waits until a process is started: the child inherits the mask, and dies of no Ctrl-C while it imports."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else it starts inside, and unblocks what is blocked here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
