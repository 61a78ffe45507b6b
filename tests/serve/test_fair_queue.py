"""The order of a fair line, against a round robin that serves one session after the other."""

import threading
import time
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coca_video.serve.fair_queue import Client, FairQueue


def session(name: str) -> Client:
    return Client(session=name, host=name)


def drain(queue: FairQueue[str]) -> list[str]:
    return [queue.take()[0] for _ in range(len(queue))]


@given(st.lists(st.sampled_from("abcd"), max_size=30))
def test_sessions_take_turns_in_the_order_in_which_they_came(arrivals: list[str]) -> None:
    queue = FairQueue[tuple[str, int]]()
    lines: dict[str, deque[tuple[str, int]]] = {}
    for number, name in enumerate(arrivals):
        queue.put((name, number), client=session(name))
        lines.setdefault(name, deque()).append((name, number))
    expected = []
    while any(lines.values()):
        round_of_all = [line.popleft() for line in lines.values() if line]
        expected += sorted(round_of_all, key=lambda item: item[1])
    assert [queue.take()[0] for _ in arrivals] == expected


def test_whoever_sends_ten_does_not_delay_whoever_sends_one() -> None:
    queue = FairQueue[str]()
    for number in range(10):
        queue.put(f"many {number}", client=session("many"))
    queue.put("one", client=session("one"))
    assert [queue.take()[0] for _ in range(3)] == ["many 0", "one", "many 1"]


def test_new_sessions_of_one_host_gain_nothing() -> None:
    queue = FairQueue[str]()
    for number in range(5):
        queue.put(f"program {number}", client=Client(session=str(number), host="program"))
    queue.put("page", client=Client(session="page", host="page"))
    assert drain(queue)[:3] == ["program 0", "page", "program 1"]


def test_people_behind_one_address_take_turns() -> None:
    queue = FairQueue[str]()
    for name in ("a0 a", "a1 a", "a2 a", "b0 b"):
        item, person = name.split()
        queue.put(item, client=Client(session=person, host="proxy"))
    assert drain(queue) == ["a0", "b0", "a1", "a2"]


def test_a_place_is_the_number_that_go_before() -> None:
    queue = FairQueue[str]()
    items = ["x0", "x1", "x2", "y0"]
    for item in items:
        queue.put(item, client=session(item[0]))
    places = {item: queue.place(item) for item in items}
    assert places == {"x0": 0, "y0": 1, "x1": 2, "x2": 3}
    assert queue.remove("y0") and not queue.remove("y0")
    assert [queue.place(item) for item in items] == [0, 1, 2, None]


@pytest.mark.parametrize(("max_size", "taken"), [(1, "b0"), (5, "b0"), (6, "b0 b2"), (99, "b0 b2 b3")])
def test_a_batch_is_what_has_the_key_of_the_next_and_fits(max_size: int, taken: str) -> None:
    queue = FairQueue[str]()
    for item in ("b0", "c1", "b2", "b3"):
        queue.put(item, client=session(item))
    sizes = {"b0": 4, "c1": 1, "b2": 2, "b3": 1}
    batch = queue.take(max_size=max_size, size=sizes.__getitem__, key=lambda item: item[0])
    assert batch == taken.split()
    assert sorted([*batch, *drain(queue)]) == ["b0", "b2", "b3", "c1"]


def test_closing_wakes_whoever_waits_and_gives_back_what_is_left() -> None:
    queue = FairQueue[str]()
    got: list[list[str]] = []
    threads = [threading.Thread(target=lambda: got.append(queue.take())) for _ in range(2)]
    for thread in threads:
        thread.start()
    queue.put("served", client=session("a"))
    deadline = time.monotonic() + 10
    while not got and time.monotonic() < deadline:
        time.sleep(0.01)
    assert queue.close() == []
    for thread in threads:
        thread.join(10)
    assert sorted(got) == [[], ["served"]]
    assert not queue.put("late", client=session("a")) and len(queue) == 0


def test_what_waits_at_the_end_is_handed_back_in_order() -> None:
    queue = FairQueue[str]()
    for item in ("x0", "x1", "y0"):
        queue.put(item, client=session(item[0]))
    assert queue.close() == ["x0", "y0", "x1"]
    assert queue.take() == []


def test_a_newcomer_waits_for_one_turn_of_whoever_was_served_before() -> None:
    queue = FairQueue[str]()
    for number in range(10):
        queue.put(f"many {number}", client=session("many"))
    for _ in range(5):
        queue.take()
    for name in ("one", "two"):
        queue.put(name, client=session(name))
    assert drain(queue) == ["one", "two", "many 5", "many 6", "many 7", "many 8", "many 9"]


def test_nobody_is_passed_for_ever() -> None:
    """A program that is somebody new every time, and always there, against one that was served before."""
    queue = FairQueue[str]()
    for item in ("mine 0", "mine 1"):
        queue.put(item, client=session("mine"))
    taken = []
    for number in range(20):
        queue.put(f"new {number}", client=Client(session=str(number), host="program"))
        taken += queue.take()
    assert taken[0] == "mine 0"
    assert taken.index("mine 1") == 1 + 2 * 3  # three wait whenever one is taken


def test_all_that_wait_can_be_looked_at_in_order() -> None:
    queue = FairQueue[str]()
    for item in ("x0", "x1", "y0"):
        queue.put(item, client=session(item[0]))
    assert queue.items() == ["x0", "y0", "x1"] and len(queue) == 3
