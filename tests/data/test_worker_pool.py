"""Many threads, few processes: what hangs, crashes, eats memory or is given up costs its own call and no other."""

import ctypes
import mmap
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from coca_video.data.worker_pool import WorkerPool
from coca_video.data.workers import WorkerFailure, data_bytes, is_out_of_memory

PATIENCE = 600.0  # seconds that no test here comes near: a slow machine must not look like a hanging call
MB = 10**6
Task = Callable[[], object]


def run(task: Task) -> object:
    """The function of the pools below: each item is what to do."""
    return task()


def square(number: int) -> int:
    return number * number


def hang() -> None:
    time.sleep(PATIENCE)


def hang_with_the_lock() -> None:
    ctypes.PyDLL(None).sleep(int(PATIENCE))  # PyDLL keeps Python's global lock: no other thread of the process runs


def crash() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave(status: int) -> None:
    os._exit(status)


def refuse() -> None:
    raise LookupError("not this one")


def fill(num_bytes: int) -> int:
    return int(np.ones(num_bytes, np.uint8).sum())


def fill_and_wait(num_bytes: int) -> int:
    kept = np.ones(num_bytes, np.uint8)
    time.sleep(0.5)  # so that it is seen
    return len(kept)


def fill_for_a_while(num_bytes: int) -> None:
    kept = np.ones(num_bytes, np.uint8)
    time.sleep(1.0)
    assert len(kept) == num_bytes
    os.abort()


def allocate_natively(*, abort: bool) -> int:
    """Takes and writes MB after MB of C's own memory until there is no more; how much there was, unless it aborts."""
    c = ctypes.CDLL(None)
    c.malloc.restype, c.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    taken = 0
    while (address := c.malloc(MB)) is not None:
        ctypes.memset(address, 1, MB)
        taken += MB
    if abort:
        time.sleep(1.0)
        os.abort()
    return taken


def note_and_hang(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(PATIENCE)


def meet(folder: Path, *, number: int) -> int:
    """Returns the process when so many processes are in here at once."""
    (folder / str(os.getpid())).touch()
    end = time.monotonic() + 60
    while len(list(folder.iterdir())) < number:
        assert time.monotonic() < end, "the others did not come"
        time.sleep(0.01)
    return os.getpid()


def leave_at_first(folder: Path) -> None:
    """As many processes as there are files in the folder end while they start."""
    for file in sorted(folder.iterdir()):
        file.unlink()
        os._exit(7)


def first_alone(folder: Path) -> None:
    """Of all processes, the first is warm at once and the others never."""
    try:
        (folder / "first").mkdir()
    except FileExistsError:
        time.sleep(PATIENCE)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def pid_in(folder: Path) -> int:
    """The process that notes itself in the folder, waited for."""
    end = time.monotonic() + 60
    while not (names := [path.name for path in folder.iterdir()]) and time.monotonic() < end:
        time.sleep(0.01)
    return int(names[0])


def processes(pool: WorkerPool[Task, object], folder: Path, *, number: int) -> set[int]:
    """The processes of a pool of `number`, each of which waits for the others."""
    folder.mkdir()
    with ThreadPoolExecutor(number) as threads:
        return set(threads.map(pool.call, [partial(meet, folder, number=number)] * number))


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool[Task, object]]:
    with WorkerPool(run, num_workers=2, timeout_seconds=PATIENCE) as pool:
        yield pool


@pytest.fixture(scope="module")
def small_pool() -> Iterator[WorkerPool[Task, object]]:
    """One process, in which a call takes 100 MB at most."""
    with WorkerPool(run, num_workers=1, timeout_seconds=PATIENCE, memory_limit_bytes=100 * MB) as pool:
        yield pool


def test_each_of_many_threads_gets_its_own_result(pool: WorkerPool[Task, object]) -> None:
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(pool.call, [partial(square, number) for number in range(100)])) == [
            number**2 for number in range(100)
        ]


@pytest.mark.slow
def test_calls_that_hang_or_die_fail_alone_and_are_replaced(tmp_path: Path) -> None:
    hung = WorkerFailure(cause="took longer than 2 s", timed_out=True)
    expected = {
        crash: WorkerFailure(cause="the process that read it died (signal 11)", timed_out=False),
        partial(leave, 3): WorkerFailure(cause="the process that read it died (exit status 3)", timed_out=False),
        hang: hung,
        hang_with_the_lock: hung,
    }
    with WorkerPool(run, num_workers=2, timeout_seconds=2.0) as pool, ThreadPoolExecutor(8) as threads:
        before = processes(pool, tmp_path / "before", number=2)
        bad = {task: threads.submit(pool.call, task) for task in expected}
        good = list(threads.map(pool.call, [partial(square, number) for number in range(20)]))
        assert good == [number**2 for number in range(20)]
        assert {task: future.result() for task, future in bad.items()} == expected
        after = processes(pool, tmp_path / "after", number=2)
        assert len(before) == len(after) == 2  # at once, or they would not have met
        assert not any(map(is_running, before - after))


def test_what_the_function_raises_is_raised_in_its_callers_thread(capfd: pytest.CaptureFixture[str]) -> None:
    with WorkerPool(run, num_workers=2, timeout_seconds=PATIENCE) as pool:
        with ThreadPoolExecutor(2) as threads:
            bad, good = threads.submit(pool.call, refuse), threads.submit(pool.call, partial(square, 7))
            with pytest.raises(LookupError, match="not this one"):
                bad.result()
            assert good.result() == 49
        assert "in refuse" in capfd.readouterr().err  # where it happened is told by the process itself
        assert pool.call(partial(square, 8)) == 64


def test_an_item_that_cannot_be_sent_is_an_error_and_ends_nothing(pool: WorkerPool[Task, object]) -> None:
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        pool.call(lambda: 3)
    assert pool.call(partial(square, 8)) == 64


def test_a_process_that_died_between_two_calls_costs_none(small_pool: WorkerPool[Task, object]) -> None:
    pid = small_pool.call(os.getpid)
    os.kill(pid, signal.SIGKILL)
    while is_running(pid) or len(list(Path(f"/proc/{pid}/task").iterdir())) > 1:  # threads still hold files open
        time.sleep(0.01)
    later = small_pool.call(os.getpid)
    assert isinstance(later, int) and later != pid


def test_memory_up_to_the_limit_and_beyond(small_pool: WorkerPool[Task, object]) -> None:
    out_of_memory = WorkerFailure(cause="needs more than 100 MB of memory", timed_out=False)
    assert small_pool.call(partial(fill, 80 * MB)) == 80 * MB
    pid = small_pool.call(os.getpid)
    assert small_pool.call(partial(fill, 120 * MB)) == out_of_memory
    assert not is_running(pid)
    assert small_pool.call(partial(fill, 80 * MB)) == 80 * MB


def test_the_limit_is_the_one_asked_for_and_holds_for_native_memory(small_pool: WorkerPool[Task, object]) -> None:
    """What C's malloc gives before it refuses; some goes to its own book-keeping, and to Python meanwhile."""
    taken = small_pool.call(partial(allocate_natively, abort=False))
    assert isinstance(taken, int) and 90 * MB < taken <= 101 * MB


def test_a_limit_of_more_memory_gives_more() -> None:
    with WorkerPool(run, num_workers=1, timeout_seconds=PATIENCE, memory_limit_bytes=200 * MB) as pool:
        assert pool.call(partial(fill, 120 * MB)) == 120 * MB
        assert pool.call(partial(fill, 220 * MB)) == WorkerFailure(
            cause="needs more than 200 MB of memory", timed_out=False
        )


@pytest.mark.slow
def test_a_death_with_little_memory_left_is_put_down_to_memory(small_pool: WorkerPool[Task, object]) -> None:
    out_of_memory = WorkerFailure(cause="needs more than 100 MB of memory", timed_out=False)
    assert small_pool.call(partial(allocate_natively, abort=True)) == out_of_memory
    assert small_pool.call(partial(fill_for_a_while, 90 * MB)) == out_of_memory
    died = WorkerFailure(cause="the process that read it died (signal 6)", timed_out=False)
    assert small_pool.call(partial(fill_for_a_while, 40 * MB)) == died


def test_what_an_earlier_call_took_is_no_cause(small_pool: WorkerPool[Task, object]) -> None:
    small_pool.call(partial(fill_and_wait, 95 * MB))
    found = small_pool.call(crash)
    assert isinstance(found, WorkerFailure) and "signal 11" in found.cause


def test_without_a_limit_a_refused_allocation_is_a_failure_too(pool: WorkerPool[Task, object]) -> None:
    beyond = 2**60  # bytes, which no machine has
    assert pool.call(partial(fill, beyond)) == WorkerFailure(cause="needs more memory than there is", timed_out=False)


def test_errors_that_tell_of_memory() -> None:
    torch = RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 9 bytes")
    wrapped = ValueError("the file is damaged")
    wrapped.__cause__ = OSError(12, "Cannot allocate memory")  # ENOMEM
    for error, told in (
        (MemoryError(), True),
        (torch, True),
        (wrapped, True),
        (RuntimeError("can't start new thread"), True),
        (RuntimeError("shapes do not match"), False),
        (OSError(28, "No space left on device"), False),
        (ValueError("the file is damaged"), False),
    ):
        assert is_out_of_memory(error) is told, error


def test_data_bytes_grow_by_what_is_allocated() -> None:
    before = data_bytes("self")
    with mmap.mmap(-1, 50 * MB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS):  # what malloc may have kept is no growth
        assert data_bytes("self") - before == pytest.approx(50 * MB, abs=2 * MB)


def test_a_call_given_up_ends_its_process_and_no_other(pool: WorkerPool[Task, object], tmp_path: Path) -> None:
    cancelled = threading.Event()
    with ThreadPoolExecutor(3) as threads:
        given_up: Future[object] = threads.submit(pool.call, partial(note_and_hang, tmp_path), cancelled=cancelled)
        pid = pid_in(tmp_path)
        assert is_running(pid)
        assert pool.call(partial(square, 3), cancelled=threading.Event()) == 9
        cancelled.set()
        with pytest.raises(CancelledError, match="given up"):
            given_up.result()
    assert not is_running(pid)
    assert len(processes(pool, tmp_path / "after", number=2)) == 2


def test_a_call_given_up_while_it_waits_for_a_process(small_pool: WorkerPool[Task, object], tmp_path: Path) -> None:
    first, second = threading.Event(), threading.Event()
    with ThreadPoolExecutor(2) as threads:
        busy = threads.submit(small_pool.call, partial(note_and_hang, tmp_path), cancelled=first)
        pid = pid_in(tmp_path)
        waiting = threads.submit(small_pool.call, partial(square, 3), cancelled=second)
        second.set()
        with pytest.raises(CancelledError):
            waiting.result()
        assert is_running(pid) and not busy.done()
        first.set()
        with pytest.raises(CancelledError):
            busy.result()


def test_closing_ends_what_is_under_way(tmp_path: Path) -> None:
    pool = WorkerPool(run, num_workers=2, timeout_seconds=PATIENCE)
    with ThreadPoolExecutor(1) as threads:
        under_way = threads.submit(pool.call, partial(note_and_hang, tmp_path))
        pid = pid_in(tmp_path)
        pool.close()
        with pytest.raises(CancelledError, match="closed"):
            under_way.result()
    assert not is_running(pid)
    with pytest.raises(CancelledError, match="closed"):
        pool.call(partial(square, 3))
    pool.close()  # once more changes nothing


def test_a_process_that_is_not_ready_keeps_nobody_waiting(tmp_path: Path) -> None:
    with WorkerPool(run, num_workers=3, timeout_seconds=PATIENCE, warm_up=partial(first_alone, tmp_path)) as pool:
        assert len({pool.call(os.getpid) for _ in range(5)}) == 1


def test_a_process_that_ends_while_it_starts_gets_a_second_chance(tmp_path: Path) -> None:
    (tmp_path / "once").touch()
    with WorkerPool(run, num_workers=1, timeout_seconds=PATIENCE, warm_up=partial(leave_at_first, tmp_path)) as pool:
        assert pool.call(partial(square, 3)) == 9
    for number in range(2):
        (tmp_path / str(number)).touch()
    with WorkerPool(run, num_workers=1, timeout_seconds=PATIENCE, warm_up=partial(leave_at_first, tmp_path)) as pool:
        with pytest.raises(ChildProcessError, match=r"before it was ready \(exit status 7\)"):
            pool.call(partial(square, 3))
        assert pool.call(partial(square, 4)) == 16  # the third process


def note_late(folder: Path) -> None:
    time.sleep(1.0)
    (folder / "warm").touch()


def test_a_pool_can_be_waited_for(tmp_path: Path) -> None:
    with WorkerPool(run, num_workers=1, timeout_seconds=PATIENCE, warm_up=partial(note_late, tmp_path)) as pool:
        assert not (tmp_path / "warm").exists()
        pool.wait_until_warm()
        assert (tmp_path / "warm").exists()
        assert pool.call(partial(square, 3)) == 9
