"""What a log line is made of: sums since the line before, over all ranks, and how fast and in how much memory."""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from coca_video.distributed import gather_objects, is_main, world_size

if sys.platform != "win32":
    import resource

ItemT = TypeVar("ItemT")
MEGABYTE = 10**6


@dataclass(frozen=True)
class Sum:
    """A value summed over `count` things; its mean over steps is the sum of totals over the sum of counts."""

    total: Tensor | float
    count: Tensor | int | float


def one_of_ranks(value: Tensor) -> Sum:
    """A value of which every rank has its own, and whose mean over ranks is meant: a step counts once in all."""
    return Sum(value / world_size(), 1 / world_size())


class Window:
    """Sums since the last log line, on the device until it is written; saved with checkpoints: lines stay exact.

    Sums are over all ranks: every rank has to ask at the same steps. Times are training's alone: on a GPU a wait for
    data may hide behind queued work.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}
        self.samples = 0
        self.rate = 0.0
        self.empty_steps = 0
        self.failed: set[str] = set()
        self.started = time.perf_counter()
        self.waited_seconds = 0.0

    def timed(self, stream: Iterator[ItemT]) -> Iterator[ItemT]:
        """What `stream` yields, counting the time until it does."""
        while True:
            began = time.perf_counter()
            try:
                item = next(stream)
            except StopIteration:
                return
            self.waited_seconds += time.perf_counter() - began
            yield item

    @contextmanager
    def paused(self, *, before_step: int) -> Iterator[None]:
        """Leaves what happens inside out of the times. Steps that the device still works on are waited for first."""
        self.check_finite(before_step=before_step)
        began = time.perf_counter()
        yield
        self.started += time.perf_counter() - began

    def add(self, values: dict[str, Sum], *, samples: int) -> None:
        """Adds what a step of this rank says of its samples."""
        self.empty_steps = 0
        self.samples += samples
        for name, value in values.items():
            total = value.total
            if isinstance(total, Tensor):
                total = total.detach() if total.device.type == "mps" else total.detach().double()  # MPS has no float64
            old = self.sums.get(name)
            self.sums[name] = (
                Sum(total, value.count) if old is None else Sum(old.total + total, old.count + value.count)
            )

    def merged(self) -> dict[str, tuple[float, float]]:
        """The sums and counts over all ranks."""
        own = {name: (float(sums.total), float(sums.count)) for name, sums in self.sums.items()}
        ranks = gather_objects(own)
        names = dict.fromkeys(name for part in ranks for name in part)
        parts = {name: [part[name] for part in ranks if name in part] for name in names}
        return {
            name: (sum(total for total, _ in found), sum(count for _, count in found)) for name, found in parts.items()
        }

    def means(self) -> dict[str, float]:
        """The mean of every value over what it counts."""
        return {name: total / count if count else 0.0 for name, (total, count) in self.merged().items()}

    def check_finite(self, *, before_step: int) -> None:
        """ValueError, with what to do, when a mean is not a number or is infinite."""
        for name, value in self.means().items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} became {value} shortly before step {before_step}; no checkpoint was written since it did. "
                    "Start another --out with a lower --optim.learning-rate or a longer --optim.warmup-steps."
                )

    def take(self, *, before_step: int, device: torch.device) -> dict[str, float]:
        """The log line's values; starts the next window. Samples are of all ranks, wait and memory of the worst one."""
        self.check_finite(before_step=before_step)
        now = time.perf_counter()
        seconds = max(now - self.started, 1e-9)
        ranks = gather_objects((self.samples, self.waited_seconds / seconds, peak_memory(device)))
        memory = [peak for _, _, peak in ranks if peak is not None]
        line = {
            **self.means(),
            "learning_rate": self.rate,
            "samples_per_second": round(sum(samples for samples, _, _ in ranks) / seconds, 2),
            "data_wait_share": round(max(share for _, share, _ in ranks), 4),
            **({"memory_mb": max(memory)} if memory else {}),
        }
        self.sums, self.samples, self.started, self.waited_seconds = {}, 0, now, 0.0
        return line

    def dump(self) -> str:
        """The sums over all ranks, for a checkpoint."""
        return json.dumps(self.merged())

    def load(self, dumped: str) -> None:
        """Takes up the sums of a checkpoint, on one rank for all; time is counted from here on."""
        sums = json.loads(dumped).items() if is_main() else ()
        self.sums = {name: Sum(total, count) for name, (total, count) in sums}
        self.started = time.perf_counter()


def peak_memory(device: torch.device) -> float | None:
    """The most memory in use so far, in megabytes: torch's on the GPU, else the process's (Windows tells none)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / MEGABYTE
    if sys.platform == "win32":
        return None
    unit_bytes = 1 if sys.platform == "darwin" else 1024  # getrusage(2): bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes / MEGABYTE
