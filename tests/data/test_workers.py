"""Processes that hang, crash, raise, are interrupted: every item comes back once, and no process stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from coca_video.data.workers import WorkerFailure, parallel

PATIENCE = 600.0  # seconds that no test here comes near: a slow machine must not look like a hanging call


def square(number: int) -> int:
    return number * number


def square_or_worse(number: int) -> int:
    """0 mod 5 hangs, 1 mod 5 dies of a segmentation fault, 2 mod 5 leaves with a status; the others are squared."""
    match number % 5:
        case 0:
            time.sleep(PATIENCE)
        case 1:
            os.kill(os.getpid(), signal.SIGSEGV)
        case 2:
            os._exit(3)
    return number * number


def refuse(number: int) -> int:
    raise LookupError(f"no {number}")


def unpicklable(number: int) -> object:
    return lambda: number


def process_id(_: int) -> int:
    return os.getpid()


def hang_after_noting(folder: Path, number: int) -> None:
    (folder / f"{os.getpid()}.pid").touch()
    time.sleep(PATIENCE)


def note_process(folder: Path) -> None:
    (folder / str(os.getpid())).touch()


def warm_slowly() -> None:
    time.sleep(2.5)


def leave() -> None:
    os._exit(7)


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie (the parent, not we, collects it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition: Callable[[], bool], *, seconds: float = 60.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def test_every_item_comes_back_once_with_its_own_result() -> None:
    results = list(parallel(square, range(40), num_workers=3, timeout_seconds=PATIENCE))
    assert sorted(results) == [(number, number**2) for number in range(40)]


@pytest.mark.parametrize("seconds", [1e10, float("inf")])
def test_time_limits_beyond_what_poll_takes(seconds: float) -> None:
    assert list(parallel(square, [3], num_workers=1, timeout_seconds=seconds)) == [(3, 9)]


@pytest.mark.parametrize(("num_items", "num_workers", "expected"), [(30, 2, 2), (1, 4, 1)])
def test_as_many_processes_as_asked_but_no_more_than_items(num_items: int, num_workers: int, expected: int) -> None:
    results = dict(parallel(process_id, range(num_items), num_workers=num_workers, timeout_seconds=PATIENCE))
    assert len(results) == num_items
    # A process is warm at its own time; the quicker one may have taken all, so that the number is an upper limit.
    assert 1 <= len(set(results.values())) <= expected
    assert os.getpid() not in results.values()


def test_nothing_to_do_starts_nothing() -> None:
    assert list(parallel(square, [], num_workers=3, timeout_seconds=1.0)) == []


@pytest.mark.slow
def test_calls_that_hang_or_die_are_failures_and_the_others_are_unharmed() -> None:
    results = dict(parallel(square_or_worse, range(10), num_workers=2, timeout_seconds=2.0))
    hung = WorkerFailure(cause="took longer than 2 s", timed_out=True)
    segfault = WorkerFailure(cause="the process that read it died (signal 11)", timed_out=False)
    left = WorkerFailure(cause="the process that read it died (exit status 3)", timed_out=False)
    assert results == {0: hung, 1: segfault, 2: left, 3: 9, 4: 16, 5: hung, 6: segfault, 7: left, 8: 64, 9: 81}


def test_what_the_function_raises_is_raised_here(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(LookupError, match="no 4"):
        list(parallel(refuse, [4], num_workers=1, timeout_seconds=PATIENCE))
    assert "in refuse" in capfd.readouterr().err  # where it happened is told by the process itself


def test_a_result_that_cannot_be_sent_is_an_error_and_no_failure_of_the_item() -> None:
    with pytest.raises((AttributeError, TypeError), match=r"pickle|local object"):
        list(parallel(unpicklable, [4], num_workers=1, timeout_seconds=PATIENCE))


@pytest.mark.slow
def test_warming_up_happens_once_a_process_and_takes_nothing_of_an_items_time(tmp_path: Path) -> None:
    results = dict(
        parallel(process_id, range(9), num_workers=1, timeout_seconds=PATIENCE, warm_up=partial(note_process, tmp_path))
    )
    assert [path.name for path in tmp_path.iterdir()] == [str(results[0])]
    assert len(set(results.values())) == 1
    slow = parallel(square, [3], num_workers=1, timeout_seconds=2.0, warm_up=warm_slowly)
    assert list(slow) == [(3, 9)]


def test_a_process_that_cannot_start_is_an_error_and_no_failure_of_an_item() -> None:
    with pytest.raises(ChildProcessError, match=r"before it was ready \(exit status 7\)"):
        list(parallel(square, [1], num_workers=1, timeout_seconds=PATIENCE, warm_up=leave))


def test_items_are_read_as_workers_become_free() -> None:
    taken: list[int] = []

    def items() -> Iterator[int]:
        for number in range(1000):
            taken.append(number)
            yield number

    with closing(parallel(square, items(), num_workers=2, timeout_seconds=PATIENCE)) as results:
        for _ in range(5):
            next(results)
    # 5 given back and at most 2 under way, and one for each of the two that a finished item was exchanged for
    assert len(taken) <= 5 + 2 + 2


def test_closing_ends_processes_that_hang(tmp_path: Path) -> None:
    items = [3, *range(4)]
    results = parallel(partial(square_or_note, tmp_path), items, num_workers=2, timeout_seconds=PATIENCE)
    assert next(results) == (3, 9)
    assert wait_until(lambda: any(tmp_path.iterdir()))
    results.close()
    pids = [int(path.stem) for path in tmp_path.iterdir()]
    assert pids and not any(map(is_running, pids))


def square_or_note(folder: Path, number: int) -> int:
    return square(number) if number == 3 else hang_after_noting(folder, number) or 0


SCRIPT = """
import sys
from functools import partial
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_workers import PATIENCE, hang_after_noting
from coca_video.data.workers import parallel

if __name__ == "__main__":
    try:
        list(parallel(partial(hang_after_noting, Path({folder!r})), range(9), num_workers=2, timeout_seconds=PATIENCE))
    except KeyboardInterrupt:
        print("stopped")
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_processes_end_with_the_parent_when_it_is_interrupted_or_killed(how: signal.Signals, tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    folder.mkdir()
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), folder=str(folder)))
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    assert wait_until(lambda: len(list(folder.iterdir())) == 2)
    pids = [int(path.stem) for path in folder.iterdir()]
    assert all(map(is_running, pids))
    if how is signal.SIGINT:
        os.killpg(parent.pid, how)  # as a terminal does: to the workers too
    else:
        parent.kill()
    out, err = parent.communicate(timeout=60)
    assert wait_until(lambda: not any(map(is_running, pids)))
    if how is signal.SIGINT:
        assert (out, err) == (b"stopped\n", b"")  # no traceback of any worker
