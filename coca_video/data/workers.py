"""Processes that may hang or crash: each call of a function runs in one that can be ended from outside.

A decoder that loops for ever or dies with a segmentation fault takes down its own process and the one file it was at.
multiprocessing.Pool waits for ever on the first, and concurrent.futures gives up the whole pool on the second.
"""

import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Threads and CUDA do not survive a fork, and a spawned process inherits no memory of the parent.
_SPAWN = multiprocessing.get_context("spawn")
_LONGEST_WAIT_SECONDS = 86_400.0  # poll() takes no more than 2**31 ms, and a time limit may be infinite
# Starting a process collects every one that has ended. Two threads must not collect the same: the second would not
# learn how it ended.
_COLLECTING = threading.RLock()
# The share of its allowance that a process was seen to use when its death is put down to memory. What allocates
# natively may abort where it gets no more, and then it used less than its allowance.
_NEARLY_ALL = 0.8
_OUT_OF_MEMORY = ("can't allocate memory", "can't start new thread")  # torch; threading, for want of a stack


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

    A call that takes longer than `timeout_seconds` ends with its process, and so does a call whose process dies or
    runs out of memory: the item's result is a WorkerFailure, and a new process takes the next item. Every item comes
    back once. `items` is read as workers become free. Closing the generator, or an exception in it (Ctrl-C), ends all
    processes.

    function, warm_up: module-level functions, or functools.partial of them. `warm_up` is called once in each process
    before its first item, so that imports take nothing of that item's time.

    Raises:
        ChildProcessError: a process ended before it was ready for work.
        Whatever `function` raises: it catches what it expects.
    """
    assert num_workers >= 1 and timeout_seconds > 0, (num_workers, timeout_seconds)
    waiting = iter(items)
    workers: list[Worker[Item]] = []
    try:
        for _, item in zip(range(num_workers), waiting, strict=False):  # the range first: zip drops what it read last
            workers.append(Worker(function, timeout_seconds=timeout_seconds, warm_up=warm_up))
            workers[-1].take(item)
        while workers:
            for worker in ready(workers):
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


def ready(workers: "Sequence[Worker[Item]]", *, at_most_seconds: float = _LONGEST_WAIT_SECONDS) -> "list[Worker[Item]]":
    """The workers that sent something, died, or are over their time; waits for one, a day at most."""
    deadlines = [worker.deadline for worker in workers if worker.deadline is not None]
    now = time.monotonic()
    seconds = max(0.0, min([*deadlines, now + at_most_seconds]) - now)
    heard = set(wait([end for worker in workers for end in (worker.connection, worker.process.sentinel)], seconds))
    now = time.monotonic()
    return [
        worker
        for worker in workers
        if worker.connection in heard
        or worker.process.sentinel in heard
        or (worker.deadline is not None and worker.deadline <= now)
    ]


class Worker(Generic[Item]):
    """One process, which is started at once, and the item it is at. The clock of an item starts when it is warm.

    For one thread at a time. is_running: there is a process, as far as is known. is_warm: it takes items. is_busy: it
    owes the result of `item`.
    """

    item: Item

    def __init__(
        self,
        function: Callable[[Item], Any],
        *,
        timeout_seconds: float,
        warm_up: Callable[[], object] | None,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """memory_limit_bytes: what a call may take on top of what the warm process has; kept to on Linux alone."""
        self.function = function
        self.timeout_seconds = timeout_seconds
        self.warm_up = warm_up
        self.memory_limit_bytes = memory_limit_bytes
        self.is_running = self.is_busy = False
        self.start()

    def start(self) -> None:
        """A new process in place of one that has ended."""
        assert not self.is_running, "the process before has not ended"
        self.deadline: float | None = None
        self.is_warm = False
        self._idle_bytes = self._peak_bytes = 0
        self.connection, theirs = _SPAWN.Pipe()
        arguments = (theirs, self.function, self.warm_up, self.memory_limit_bytes)
        self.process = _SPAWN.Process(target=_serve, args=arguments, daemon=True)
        with _COLLECTING, _interrupts_held_back():
            self.process.start()
        theirs.close()  # so that the pipe breaks when the process dies
        self.is_running = True

    def take(self, item: Item) -> None:
        """Hands over the next item, to a new process if this one has gone."""
        assert not self.is_busy, "it owes the result of another item"
        if self.is_warm:
            try:
                self._send(item)
            except OSError:  # it died between two items, and so owes none
                self.end()
        if not self.is_running:
            self.start()
        self.item, self.is_busy = item, True

    def _send(self, item: Item) -> None:
        self._peak_bytes = 0  # of this call
        self.connection.send(item)
        self.deadline = time.monotonic() + self.timeout_seconds

    def outcome(self) -> "tuple[Item, Any] | None":
        """The item with its result or failure; None for a process that has just become warm.

        For one that is `ready`. ChildProcessError where it ended before it was warm; what the function raised.
        """
        try:
            # What it sent counts first: it may have died, or its time may have run out, after it was done.
            message = self.connection.recv() if self.connection.poll() else None
        except (EOFError, OSError):  # the pipe broke
            message = None
        match message:
            case ("warm", idle_bytes):
                self.is_warm, self._idle_bytes = True, idle_bytes
                try:
                    if self.is_busy:
                        self._send(self.item)
                except OSError:
                    return self.item, self._died()
                return None
            case ("result", result):
                self.deadline, self.is_busy = None, False
                return self.item, result
            case ("out of memory", _):
                self.end()
                return self.item, self._out_of_memory()
            case ("raised", error):
                self.process.join(timeout=10)  # it is printing where that happened
                self.end()
                raise error
        with _COLLECTING:
            is_alive = self.process.is_alive()
        if self.deadline is not None and self.deadline <= time.monotonic() and is_alive:
            self.end()
            return self.item, WorkerFailure(cause=f"took longer than {self.timeout_seconds:g} s", timed_out=True)
        failure = self._died()  # first: it raises for a process that never had an item
        return self.item, failure

    def watch_memory(self) -> None:
        """Notes what the call takes by now, for the cause of a death: to be called now and then while it works."""
        if self.memory_limit_bytes is not None and self.is_warm:
            self._peak_bytes = max(self._peak_bytes, data_bytes(self.process.pid or "self"))

    def _died(self) -> WorkerFailure:
        wait([self.process.sentinel], 10)  # a broken pipe is seen a moment before the end
        was_warm, taken_bytes = self.is_warm, self._peak_bytes - self._idle_bytes
        self.end()  # which changes nothing of how it ended
        code = self.process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        if not was_warm:
            raise ChildProcessError(f"a worker process ended before it was ready ({how}); it says why above")
        if self.memory_limit_bytes is not None and taken_bytes > _NEARLY_ALL * self.memory_limit_bytes:
            return self._out_of_memory()
        return WorkerFailure(cause=f"the process that read it died ({how})", timed_out=False)

    def _out_of_memory(self) -> WorkerFailure:
        limit = self.memory_limit_bytes
        much = "more memory than there is" if limit is None else f"more than {limit / 1e6:g} MB of memory"
        return WorkerFailure(cause=f"needs {much}", timed_out=False)

    def end(self) -> None:
        """Kills the process, whatever it is at: it holds nothing that anybody needs."""
        self.is_running = self.is_warm = self.is_busy = False
        self.deadline = None
        with _COLLECTING:
            self.process.kill()
            self.process.join()
        self.connection.close()


def _serve(
    connection: Connection,
    function: Callable[[Any], Any],
    warm_up: Callable[[], object] | None,
    memory_limit_bytes: int | None,
) -> None:
    """The life of a process: one item after the other until the parent closes the pipe or dies."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent alone answers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if warm_up is not None:
        warm_up()
    idle_bytes = data_bytes("self")
    if memory_limit_bytes is not None:
        _limit_memory(idle_bytes + memory_limit_bytes)
    connection.send(("warm", idle_bytes))
    while True:
        try:
            item = connection.recv()
        except (EOFError, ConnectionResetError):  # the parent wants no more
            return
        try:
            connection.send(("result", function(item)))
        except BaseException as error:
            if is_out_of_memory(error):
                _limit_memory(None)  # to tell so takes some, too
                connection.send(("out of memory", None))
                continue  # until the parent ends it: what the call took may stay taken
            connection.send(("raised", error))
            raise  # prints where it happened, which the exception loses on its way to the parent


def data_bytes(process_id: int | Literal["self"]) -> int:
    """What a process has allocated for itself, used or not, as RLIMIT_DATA counts it; 0 where it is not told."""
    if sys.platform != "linux":
        return 0
    try:
        status = Path(f"/proc/{process_id}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it has ended
        return 0
    sizes = [line.split()[1] for line in status.splitlines() if line.startswith("VmData:")]  # none: a zombie
    return 1024 * int(sizes[0]) if sizes else 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation that failed is behind this error; native libraries have exceptions of their own for it."""
    cause: BaseException | None = error
    while cause is not None:
        told = isinstance(cause, RuntimeError) and any(words in str(cause) for words in _OUT_OF_MEMORY)
        if told or isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno == errno.ENOMEM):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _limit_memory(num_bytes: int | None) -> None:
    """Allocations beyond fail; None: they no longer do. Linux alone counts all of them."""
    if sys.platform == "linux":
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = most if num_bytes is None else num_bytes
        resource.setrlimit(
            resource.RLIMIT_DATA, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )


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
