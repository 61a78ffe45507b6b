"""What the benchmarks measure with: interleaved times, extra memory in a fresh process, and one table.

A side is one way of doing the same thing: a function without arguments that does it once, forward and backward.
"""

import argparse
import json
import multiprocessing
import platform
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Side = Callable[[], object]
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def parser(description: str | None) -> argparse.ArgumentParser:
    """A command line with the options that all benchmarks have."""
    parsed = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parsed.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parsed.add_argument("--json", type=Path, help="write the table and what it was measured on to this file")
    parsed.add_argument("--repeats", type=int, default=5, help="the times in the table are medians of so many")
    return parsed


def median_milliseconds(sides: Mapping[str, Side], *, device: str, repeats: int) -> dict[str, float]:
    """The median time of each side, after one run of each that does not count.

    The sides take turns, so that a busy machine slows all of them. On the CPU it is this process's CPU time, on one
    thread; on a GPU the time between two events in its queue.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            milliseconds = _cuda_milliseconds(side) if device == "cuda" else _cpu_milliseconds(side)
            if turn > 0:
                taken[name].append(milliseconds)
    return {name: statistics.median(values) for name, values in taken.items()}


def _cpu_milliseconds(side: Side) -> float:
    assert torch.get_num_threads() == 1
    started = time.process_time()
    side()
    return 1e3 * (time.process_time() - started)


def _cuda_milliseconds(side: Side) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    side()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def extra_mebibytes(build: Callable[..., Side], *arguments: Any, device: str) -> float:
    """The peak of memory while the side that `build(*arguments)` returns runs, over what its inputs take.

    Measured in a fresh process, where nothing freed earlier can be used again; `build` is a function of a module.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
        return process.submit(_extra_mebibytes_here, build, arguments, device).result() / 2**20


def _extra_mebibytes_here(build: Callable[..., Side], arguments: Sequence[Any], device: str) -> int:
    torch.set_num_threads(1)
    side = build(*arguments)
    warm_up = torch.ones(64, 64, device=device, requires_grad=True)  # libraries' own buffers count for no side
    (warm_up @ warm_up).sum().backward()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR.exists():
        sys.exit(
            "Peak memory on a CPU is read from Linux's /proc, which is not here: run on Linux or with --device cuda."
        )
    # getrusage's ru_maxrss would start from the parent's peak, which a child inherits; this peak is set back to now.
    CLEAR.write_text("5")
    before = _peak_bytes()
    side()
    return _peak_bytes() - before


def _peak_bytes() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", STATUS.read_text())
    assert found is not None
    return int(found[1]) * 1024


def largest_relative_error(actual: Iterable[Tensor], *, expected: Iterable[Tensor]) -> float:
    """The largest norm of a difference over the norm of what was expected."""
    errors = [(a.double() - e.double()).norm() / e.double().norm() for a, e in zip(actual, expected, strict=True)]
    return float(torch.stack(errors).max())


def ratios(rows: Sequence[dict[str, Any]], *, of: str) -> list[dict[str, Any]]:
    """The rows with two columns more: time and memory as multiples of those of the side called `of`."""
    (base,) = (row for row in rows if row["side"] == of)
    return [
        row | {"time ratio": row["ms"] / base["ms"], "memory ratio": row["extra MiB"] / base["extra MiB"]}
        for row in rows
    ]


def report(rows: Sequence[dict[str, Any]], *, options: argparse.Namespace) -> None:
    """Prints `rows`, whose keys are the columns, as one table, and writes them to --json with the circumstances."""
    circumstances = {
        "command": shlex.join(["python", *sys.argv]),
        "torch": torch.__version__,
        "hardware": torch.cuda.get_device_name() if options.device == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads() if options.device == "cpu" else None,
    }
    print(", ".join(f"{name} {value}" for name, value in circumstances.items() if value is not None), end="\n\n")
    cells = [list(rows[0]), *([_cell(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(circumstances | {"rows": list(rows)}, indent=1) + "\n")


def _cell(value: object) -> str:
    """A figure with three digits or more; everything else as it is."""
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cpu_name() -> str:
    """What the CPU calls itself, where Linux tells."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor()
