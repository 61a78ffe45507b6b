"""A fixed number of processes for the calls of many threads: what hangs, crashes or is given up ends its own alone.

concurrent.futures can neither end a call that runs nor outlive a process that dies.
"""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError
from typing import Generic, TypeVar

from coca_video.data.workers import Worker, WorkerFailure, ready

Item = TypeVar("Item")
Result = TypeVar("Result")

# How often a call looks whether it is given up. An Event cannot be waited for together with a process.
_LOOK_SECONDS = 0.05


class WorkerPool(Generic[Item, Result]):
    """Processes that call one function, and are replaced when they end. A context manager; for any number of threads.

    function, warm_up: module-level functions, or functools.partial of them. `warm_up` is called once in each process,
    so that its imports take nothing of an item's time or memory.
    """

    def __init__(
        self,
        function: Callable[[Item], Result],
        *,
        num_workers: int,
        timeout_seconds: float,
        memory_limit_bytes: int | None = None,
        warm_up: Callable[[], object] | None = None,
    ) -> None:
        """Starts the processes and does not wait until they are warm.

        timeout_seconds: of a call, in a warm process. memory_limit_bytes: what a call may take on top of what the warm
        process has (Linux).
        """
        assert num_workers >= 1 and timeout_seconds > 0, (num_workers, timeout_seconds)
        self._num_workers = num_workers
        self._idle: list[Worker[Item]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        try:
            for _ in range(num_workers):
                worker = Worker(
                    function, timeout_seconds=timeout_seconds, warm_up=warm_up, memory_limit_bytes=memory_limit_bytes
                )
                self._idle.append(worker)
        except BaseException:
            for worker in self._idle:
                worker.end()
            raise

    def call(self, item: Item, *, cancelled: threading.Event | None = None) -> Result | WorkerFailure:
        """What the function returns for `item`, in the next free process; WorkerFailure where it is ended or dies.

        Setting `cancelled` ends the call, and the process if it has one, within 0.2 s.

        Raises:
            CancelledError: `cancelled` was set, or the pool closed, before the result came.
            ChildProcessError: processes end before they are ready for work, this one and the next.
            Whatever the function raises: it catches what it expects.
        """
        worker = self._free_worker(cancelled)
        try:
            return self._result(worker, item=item, cancelled=cancelled)
        finally:
            self._give_back(worker)

    def wait_until_warm(self) -> None:
        """Returns when a process takes items at once. CancelledError, ChildProcessError as of `call`."""
        self._give_back(self._free_worker(None))

    def close(self) -> None:
        """Ends all processes; calls under way, and later ones, raise CancelledError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            while len(self._idle) < self._num_workers:  # every call under way gives back its own
                self._changed.wait()
            for worker in self._idle:
                if worker.is_running:
                    worker.end()

    def __enter__(self) -> "WorkerPool[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free_worker(self, cancelled: threading.Event | None) -> Worker[Item]:
        """Takes the first that is warm and has nothing to do; one that ends while it starts gets a second chance."""
        num_failed = 0
        with self._changed:
            while True:
                self._check(cancelled)
                for place, worker in enumerate(self._idle):
                    try:
                        _hear(worker)
                    except ChildProcessError:
                        num_failed += 1
                        if num_failed > 1:
                            raise
                    if worker.is_warm:
                        return self._idle.pop(place)
                self._changed.wait(_LOOK_SECONDS)

    def _result(self, worker: Worker[Item], *, item: Item, cancelled: threading.Event | None) -> Result | WorkerFailure:
        worker.take(item)
        while True:
            self._check(cancelled)
            if ready([worker], at_most_seconds=_LOOK_SECONDS):
                outcome = worker.outcome()
                if outcome is not None:
                    result: Result | WorkerFailure = outcome[1]
                    return result
            worker.watch_memory()

    def _check(self, cancelled: threading.Event | None) -> None:
        if self._is_closed:
            raise CancelledError("the pool of processes is closed")
        if cancelled is not None and cancelled.is_set():
            raise CancelledError("the call was given up")

    def _give_back(self, worker: Worker[Item]) -> None:
        """Ends a process that still works, and has a new one start in place of one that ended."""
        try:
            if worker.is_busy:
                worker.end()
            if not worker.is_running and not self._is_closed:
                worker.start()
        finally:
            with self._changed:
                self._idle.append(worker)
                self._changed.notify_all()


def _hear(worker: Worker[Item]) -> None:
    """Starts an idle worker's process if there is none, and notes that it is warm; ChildProcessError if it ended."""
    if not worker.is_running:
        worker.start()
    if not worker.is_warm and ready([worker], at_most_seconds=0.0):
        worker.outcome()
