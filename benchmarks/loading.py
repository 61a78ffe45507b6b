"""The loader against its decoder, and epochs of one, ten and a hundred times as many clips: parts of decode.py.

loader: clips of 224x224 through `VideoDataset` and the loader by one and two worker processes, against the decoder's
    own limit: the same decoding and resizing in as many plain processes. Time from the start of the processes to the
    last clip. Goal: 90% of the limit. The CPU time, of all processes, is steady on a busy machine where wall time is
    not.
epoch: 1x, 10x and 100x as many clips, links to one small file, each in a fresh process with two workers. The time of
    a clip is that between a short pass of the same process and a whole epoch, so that starting workers counts for
    none. Goals: time a clip within 5% of that of 1x, and no more than 5% more memory in the main process or a worker.
"""

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from timing import CLEAR, Side

from coca_video.data.decode import BACKENDS, open_video, prove
from coca_video.data.loader import Order, batches
from coca_video.data.manifest import Manifest, VideoRow
from coca_video.data.prefetch import to_device_ahead
from coca_video.data.sampling import uniform_indices
from coca_video.data.table import VideoRows
from coca_video.data.transforms import resize_crop, square_crop_box
from coca_video.data.video import ClipConfig, VideoDataset, collate_clips

BATCH_SIZE = 8
LOADER_GOAL, EPOCH_TOLERANCE = 0.9, 0.05
EPOCH_FACTORS, EPOCH_WORKERS = (1, 10, 100), 2
SHORT_STEPS = 4 * EPOCH_WORKERS  # by then each worker has touched the memory that it copies on its first clips
EPOCH_CONFIG = ClipConfig(num_frames=4, image_size=32)


class Spent(NamedTuple):
    """What a pass took, of all processes, and the most memory of the main process and of a worker in MiB."""

    wall_seconds: float
    cpu_seconds: float
    main_mebibytes: float = 0.0
    worker_mebibytes: float = 0.0


def row(
    part: str,
    case: str,
    *,
    side: str,
    ratio: float,
    cpu: float | str = "",
    wall: float | str = "",
    memory: tuple[float, float] | tuple[str, str] = ("", ""),
    at_least: float | None = None,
    at_most: float | None = None,
) -> dict[str, Any]:
    """A row of the table; times are milliseconds a clip."""
    goals = [f">= {at_least:g}"] if at_least is not None else []
    goals += [f"<= {at_most:g}"] if at_most is not None else []
    met = ratio >= (at_least or 0.0) and ratio <= (at_most or float("inf"))
    return {
        "part": part,
        "case": case,
        "side": side,
        "CPU ms": cpu,
        "wall ms": wall,
        "main MiB": memory[0],
        "worker MiB": memory[1],
        "ratio": ratio,
        "goal": ", ".join(goals),
        "met": ("yes" if met else "NO") if goals else "",
    }


def _manifest(paths: Iterator[Path]) -> Manifest:
    rows = VideoRows.of(VideoRow(path=path, label="a class", video_id=path.stem) for path in paths)
    return Manifest(source=Path("benchmark"), rows=rows, classes=("a class",))


def _links(path: Path, *, folder: Path, count: int) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    for number in range(count):
        link = folder / f"clip-{number:06}{path.suffix}"
        if not link.exists():
            link.symlink_to(path)
        yield link


def _cpu_seconds() -> float:
    """Of this process and of all that it waited for."""
    spent = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(used.ru_utime + used.ru_stime for used in spent)


def _load_decoders() -> None:
    """Imports all, which takes a second, before anything is measured or forked."""
    for backend in BACKENDS:
        prove(backend)


def _timed(run: Side) -> Spent:
    wall, cpu = time.perf_counter(), _cpu_seconds()
    run()
    return Spent(time.perf_counter() - wall, _cpu_seconds() - cpu)


def load_all(dataset: VideoDataset, *, num_steps: int, workers: int, device: str, on_step: Callable[[], object]) -> int:
    """One pass in training's order; how many clips came."""
    stream = batches(
        dataset,
        order=Order(num_samples=len(dataset), batch_size=BATCH_SIZE, seed=0),
        first_step=0,
        last_step=num_steps,
        workers=workers,
        collate=collate_clips,
        pin_memory=device == "cuda",
    )
    num_clips = 0
    with closing(to_device_ahead(stream, device=torch.device(device))) as moved:
        for batch, unreadable in moved:
            assert batch is not None and not unreadable
            num_clips += len(batch.labels)
            on_step()
    return num_clips


def _decode_plainly(paths: list[Path], config: ClipConfig) -> None:
    """What a clip of these costs at the least: no data set, no batches, nothing sent to another process."""
    torch.set_num_threads(1)
    for path in paths:
        with open_video(path, backend=config.decoder) as reader:
            frames = reader.frames(uniform_indices(reader.num_frames, num_samples=config.num_frames).tolist())
        box = square_crop_box(*frames.shape[-2:])
        resize_crop(frames, box=box, size=config.image_size, interpolation=config.interpolation)


def plain_processes(paths: list[Path], *, config: ClipConfig, workers: int) -> None:
    """The paths shared by as many processes, forked as the loader's are."""
    context = multiprocessing.get_context("fork")
    shares = [paths[number::workers] for number in range(workers)]
    processes = [context.Process(target=_decode_plainly, args=(share, config)) for share in shares]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def loader_rows(path: Path, *, case: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for each number of workers: the loader is ours."""
    _load_decoders()
    num_steps = max(1, options.clips // BATCH_SIZE)
    num_clips, config = num_steps * BATCH_SIZE, ClipConfig()
    manifest = _manifest(_links(path, folder=path.parent / "loader", count=num_clips))
    paths = [Path(found.path) for found in manifest.rows]
    dataset, rows = VideoDataset(manifest, config=config, seed=0), []
    for workers in (1, 2):
        load = partial(load_all, dataset, num_steps=num_steps, workers=workers, device=options.device, on_step=int)
        plain = partial(plain_processes, paths, config=config, workers=workers)
        sides: dict[str, Side] = {"loader": load, "plain processes": plain}
        load()
        spent: dict[str, list[Spent]] = {name: [] for name in sides}
        for _ in range(options.repeats):
            for name, side in sides.items():
                spent[name].append(_timed(side))
        wall = {name: statistics.median(pass_.wall_seconds for pass_ in found) for name, found in spent.items()}
        cpu = {name: statistics.median(pass_.cpu_seconds for pass_ in found) for name, found in spent.items()}
        rows += [
            row(
                "loader",
                f"{case}, {workers} worker{'s' if workers > 1 else ''}",
                side=f"{name}, {num_clips / wall[name]:.1f} clips/s",
                cpu=1e3 * cpu[name] / num_clips,
                wall=1e3 * wall[name] / num_clips,
                ratio=wall[name] / wall["loader"],
                at_least=LOADER_GOAL if name == "plain processes" else None,
            )
            for name in sides
        ]
    return rows


def _status_mebibytes(process: str, *, field: str) -> float:
    """A size that Linux gives in kB."""
    text = Path(f"/proc/{process}/status").read_text()
    return int(text.split(f"{field}:")[1].split()[0]) / 1024


def _epoch(paths_from: Path, folder: Path, num_clips: int, device: str, repeats: int) -> list[Spent]:
    """Epochs in this fresh process, each less a short pass: time of (num_clips - those of the short pass) clips."""
    multiprocessing.set_start_method("fork", force=True)  # the usual one, which this process, spawned, has lost
    torch.set_num_threads(1)
    _load_decoders()
    dataset = VideoDataset(_manifest(_links(paths_from, folder=folder, count=num_clips)), config=EPOCH_CONFIG, seed=0)
    worker_mebibytes = [0.0]

    def look() -> None:
        sizes = [_status_mebibytes(str(child.pid), field="VmHWM") for child in multiprocessing.active_children()]
        worker_mebibytes[0] = max(worker_mebibytes[0], *sizes)

    run = partial(load_all, dataset, workers=EPOCH_WORKERS, device=device)
    run(num_steps=SHORT_STEPS, on_step=int)
    CLEAR.write_text("5")
    found = []
    for _ in range(repeats):
        short = _timed(partial(run, num_steps=SHORT_STEPS, on_step=int))
        whole = _timed(partial(run, num_steps=num_clips // BATCH_SIZE, on_step=look))
        wall, cpu = whole.wall_seconds - short.wall_seconds, whole.cpu_seconds - short.cpu_seconds
        counted = (num_clips // BATCH_SIZE - SHORT_STEPS) * BATCH_SIZE
        main = _status_mebibytes("self", field="VmHWM")
        found.append(Spent(wall / counted, cpu / counted, main, worker_mebibytes[0]))
    return found


def epoch_rows(path: Path, *, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for each length of the epoch: time, and memory, whose ratio is the larger of the two processes'."""
    spent: dict[int, list[Spent]] = {factor: [] for factor in EPOCH_FACTORS}
    context = multiprocessing.get_context("spawn")
    for factor in EPOCH_FACTORS:
        # Small epochs are repeated more: they take half a second, in which other processes weigh much.
        repeats = {1: 5 * options.repeats, 10: options.repeats}.get(factor, 1)
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            arguments = (path, folder / "epoch", factor * options.epoch_clips, options.device, repeats)
            spent[factor] = process.submit(_epoch, *arguments).result()
    rows = []
    medians = {factor: Spent(*map(statistics.median, zip(*found, strict=True))) for factor, found in spent.items()}
    base = medians[EPOCH_FACTORS[0]]
    for factor, now in medians.items():
        case, is_base = f"{factor * options.epoch_clips} clips ({factor}x)", factor == EPOCH_FACTORS[0]
        worst = max(now.main_mebibytes / base.main_mebibytes, now.worker_mebibytes / base.worker_mebibytes)
        rows.append(
            row(
                "epoch",
                case,
                side="time",
                cpu=1e3 * now.cpu_seconds,
                wall=1e3 * now.wall_seconds,
                ratio=now.cpu_seconds / base.cpu_seconds,
                at_least=None if is_base else 1 - EPOCH_TOLERANCE,
                at_most=None if is_base else 1 + EPOCH_TOLERANCE,
            )
        )
        rows.append(
            row(
                "epoch",
                case,
                side="memory",
                memory=(now.main_mebibytes, now.worker_mebibytes),
                ratio=worst,
                at_most=None if is_base else 1 + EPOCH_TOLERANCE,
            )
        )
    return rows
