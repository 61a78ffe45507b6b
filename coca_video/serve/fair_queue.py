"""A waiting line in which nobody waits for all that somebody else has sent."""

import bisect
import itertools
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Client:
    """Who asks: a page or a program, and the address that it comes from."""

    session: str
    host: str


def _one(_: object) -> int:
    return 1


class _Turns:
    """Numbers the turns of each name: the next after its last, but not one that is over (start-time fair queueing)."""

    def __init__(self) -> None:
        self._now = 0
        self._next: dict[str, int] = {}

    def give(self, name: str) -> int:
        turn = max(self._now, self._next.get(name, 0))
        self._next[name] = turn + 1
        return turn

    def reach(self, turn: int) -> None:
        self._now = max(self._now, turn)
        self._next = {name: number for name, number in self._next.items() if number > self._now}


class _Entry(NamedTuple, Generic[Item]):
    """Sorted by this, entries are in their order."""

    session_turn: int
    host_turn: int
    arrival: int
    item: Item


class FairQueue(Generic[Item]):
    """Items of many clients, for any number of threads to put and to take.

    Sessions take turns. Among those of one turn, hosts do, so that a program that calls itself another session every
    time gains little by it, while people behind one address still take turns. Ties go by arrival. Whoever has waited
    longest is passed by later ones no more than twice as often as there are items here, and then is the next.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry[Item]] = []
        self._sessions, self._hosts = _Turns(), _Turns()
        self._arrivals = itertools.count()
        self._num_passed, self._passed = 0, -1  # how often, and the arrival of, whoever has waited longest
        self._changed = threading.Condition()
        self._is_closed = False

    def __len__(self) -> int:
        with self._changed:
            return len(self._entries)

    def put(self, item: Item, *, client: Client) -> bool:
        """Behind what the client has here; False, and not taken in, once closed."""
        with self._changed:
            if not self._is_closed:
                turns = self._sessions.give(client.session), self._hosts.give(client.host)
                # Three numbers that differ from all others: items themselves are never compared.
                bisect.insort(self._entries, _Entry(*turns, next(self._arrivals), item))
                self._changed.notify()
            return not self._is_closed

    def take(
        self, *, max_size: int = 1, size: Callable[[Item], int] = _one, key: Callable[[Item], Hashable] = _one
    ) -> list[Item]:
        """The next item, and with it, in order, those of the same key until one no longer fits. [] once closed."""
        with self._changed:
            while not self._entries and not self._is_closed:
                self._changed.wait()
            if self._is_closed:
                return []
            first = self._entries[self._next()]
            taken, left = [first], max_size - size(first.item)
            for entry in self._entries:
                if entry is first or key(entry.item) != key(first.item):
                    continue
                left -= size(entry.item)
                if left < 0:
                    break
                taken.append(entry)
            arrivals = {entry.arrival for entry in taken}
            self._entries = [entry for entry in self._entries if entry.arrival not in arrivals]
            self._sessions.reach(first.session_turn)
            self._hosts.reach(first.host_turn)
            return [entry.item for entry in taken]

    def _next(self) -> int:
        """The place of whoever is taken now."""
        oldest = min(range(len(self._entries)), key=lambda place: self._entries[place].arrival)
        if self._entries[oldest].arrival != self._passed:
            self._num_passed, self._passed = 0, self._entries[oldest].arrival
        if self._num_passed >= 2 * len(self._entries):
            return oldest
        self._num_passed += 1
        return 0

    def items(self) -> list[Item]:
        """All that wait, in order."""
        with self._changed:
            return [entry.item for entry in self._entries]

    def remove(self, item: Item) -> bool:
        """Takes an item out, wherever it stands; whether it was there."""
        with self._changed:
            left = [entry for entry in self._entries if entry.item is not item]
            found = len(left) < len(self._entries)
            self._entries = left
            return found

    def place(self, item: Item) -> int | None:
        """How many go before it; None when it does not wait here."""
        with self._changed:
            return next((place for place, entry in enumerate(self._entries) if entry.item is item), None)

    def close(self) -> list[Item]:
        """Ends all waiting, now and later; what still waited, in order."""
        with self._changed:
            left, self._entries = self._entries, []
            self._is_closed = True
            self._changed.notify_all()
            return [entry.item for entry in left]
