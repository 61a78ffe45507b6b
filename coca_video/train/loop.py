"""The one training loop: batches in order, a step, a log line, a checkpoint; stops and resumes at any update."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from coca_video.data.loader import Order, batches
from coca_video.train.optim import OptimConfig, learning_rate
from coca_video.train.run import Run

Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["fp32", "bf16"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how often, in updates."""

    steps: int = 1000
    """Updates in all."""
    batch_size: int = 64
    """Samples an update."""
    seed: int = 0
    """Of initial weights, order, captions, crops, flips and frames."""
    precision: Precision = "fp32"
    """bf16 is autocast: weights and losses stay fp32."""
    log_every: int = 10
    """Updates a line of metrics.jsonl, which holds their means."""
    checkpoint_every: int = 500
    """Updates that may be lost to a kill."""
    evaluate_every: int = 0
    """Updates between evaluations; 0 evaluates at the end only."""
    num_workers: int = 0
    """Processes that read data; changes no number."""

    def __post_init__(self) -> None:
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("log_every", 1),
            ("checkpoint_every", 1),
            ("num_workers", 0),
            ("evaluate_every", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(
                    f"--loop.{name.replace('_', '-')} must be at least {least}; got {getattr(self, name)}."
                )


@dataclass(frozen=True)
class Sum:
    """A value summed over `count` things; its mean over steps is the sum of totals over the sum of counts."""

    total: Tensor | float
    count: Tensor | int


class Stopped(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state after `step` updates."""

    def __init__(self, step: int) -> None:
        super().__init__(f"Stopped after step {step}, with a checkpoint; run the same command again to go on.")


@dataclass(kw_only=True)
class Training:
    """What one run trains and on what. `step` does one update on a collated batch and returns what is to be logged."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Any], dict[str, Sum]]
    dataset: Any
    collate: Callable[[Any], Any]
    evaluate: Callable[[], dict[str, float]] | None = None
    num_workers: int = 0


def pick_device(device: Device) -> torch.device:
    """The device meant; `auto` is CUDA where there is one, then MPS, then the CPU. ValueError when it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(name for name, there in present.items() if there))
    if not present[device]:
        raise ValueError(f"--device {device} was asked for, and torch finds none; use --device auto.")
    return torch.device(device)


def run_loop(training: Training, *, config: LoopConfig, optim: OptimConfig, run: Run) -> None:
    """Trains to `config.steps` updates from the newest checkpoint of `run`. Raises `Stopped` after an asked stop.

    Everything random comes from (seed, step) or (seed, epoch, sample), so that a resumed run is bit-equal to one that
    never stopped (on a GPU: with deterministic algorithms on).
    """
    window = _Window()
    extra = {"window": window.dump()}
    first = run.checkpoints.restore(model=training.model, optimizer=training.optimizer, extra=extra)
    window.load(extra["window"])
    run.log.truncate_after(first)
    order = Order(num_samples=len(training.dataset), batch_size=config.batch_size, seed=config.seed)
    stream = batches(
        training.dataset,
        order=order,
        first_step=first,
        last_step=config.steps,
        workers=training.num_workers,
        collate=training.collate,
    )
    training.model.train()
    with (
        closing(stream),
        _stop_requests() as stop_requested,
        progress_bar("training", total=config.steps, initial=first) as bar,
    ):
        for step, (batch, unreadable) in zip(range(first, config.steps), stream, strict=True):
            _one_step(
                training,
                batch,
                num_unreadable=len(unreadable),
                step=step,
                window=window,
                config=config,
                optim=optim,
            )
            run.note_unreadable(unreadable)
            window.failed.update(sample.key for sample in unreadable)
            _check_something_was_read(window, run=run, dataset_size=len(training.dataset))
            _after_step(training, done=step + 1, window=window, config=config, run=run, bar=bar, stop=stop_requested())


def _one_step(
    training: Training,
    batch: Any,
    *,
    num_unreadable: int,
    step: int,
    window: "_Window",
    config: LoopConfig,
    optim: OptimConfig,
) -> None:
    rate = learning_rate(step, config=optim, total_steps=config.steps)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    window.rate = rate
    if batch is None:
        window.empty_steps += 1
        return
    torch.manual_seed(config.seed * 1_000_003 + step)
    window.empty_steps = 0
    window.add(training.step(batch), samples=config.batch_size - num_unreadable)


def _after_step(
    training: Training, *, done: int, window: "_Window", config: LoopConfig, run: Run, bar: "tqdm[Any]", stop: bool
) -> None:
    """Logs, evaluates and saves where update number `done` calls for it; raises `Stopped` when a stop was asked for."""
    last = done == config.steps
    if done % config.log_every == 0 or last:
        means = window.take(before_step=done)
        run.log.write("train", step=done, values=means)
        if "loss" in means:
            bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
    paused = time.perf_counter()
    if training.evaluate is not None and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
        training.model.eval()
        run.log.write("evaluation", step=done, values=training.evaluate())
        training.model.train()
    if done % config.checkpoint_every == 0 or last or stop:
        window.check_finite(before_step=done)
        extra = {"window": window.dump()}
        run.checkpoints.save(done, model=training.model, optimizer=training.optimizer, extra=extra)
        run.draw_curves()
    window.started += time.perf_counter() - paused  # samples per second are training's alone
    bar.update(1)
    if stop and not last:
        raise Stopped(done)


def _check_something_was_read(window: "_Window", *, run: Run, dataset_size: int) -> None:
    if window.empty_steps and len(window.failed) >= dataset_size:
        key = min(window.failed)
        raise ValueError(
            f"None of the {dataset_size} samples could be read; the first is {key} ({run.unreadable[key]})."
        )


class _Window:
    """Sums since the last log line, on the device until it is written; saved with checkpoints: lines stay exact."""

    def __init__(self) -> None:
        self.sums: dict[str, Sum] = {}
        self.samples = 0
        self.rate = 0.0
        self.empty_steps = 0
        self.failed: set[str] = set()
        self.started = time.perf_counter()

    def add(self, values: dict[str, Sum], *, samples: int) -> None:
        self.samples += samples
        for name, value in values.items():
            total = value.total
            if isinstance(total, Tensor):
                total = total.detach() if total.device.type == "mps" else total.detach().double()  # MPS has no float64
            old = self.sums.get(name)
            self.sums[name] = (
                Sum(total, value.count) if old is None else Sum(old.total + total, old.count + value.count)
            )

    def means(self) -> dict[str, float]:
        return {name: float(sums.total) / max(1, int(sums.count)) for name, sums in self.sums.items()}

    def check_finite(self, *, before_step: int) -> None:
        for name, value in self.means().items():
            if not math.isfinite(value):
                raise ValueError(
                    f"{name} became {value} shortly before step {before_step}; no checkpoint was written since it did. "
                    "Start another --out with a lower --optim.learning-rate or a longer --optim.warmup-steps."
                )

    def take(self, *, before_step: int) -> dict[str, float]:
        """The log line's values; starts the next window."""
        self.check_finite(before_step=before_step)
        now = time.perf_counter()
        speed = self.samples / max(now - self.started, 1e-9)
        line = {**self.means(), "learning_rate": self.rate, "samples_per_second": round(speed, 2)}
        self.sums, self.samples, self.started = {}, 0, now
        return line

    def dump(self) -> str:
        return json.dumps({name: [float(sums.total), int(sums.count)] for name, sums in self.sums.items()})

    def load(self, dumped: str) -> None:
        sums = json.loads(dumped).items()
        self.sums = {name: Sum(total, count) for name, (total, count) in sums}


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag read between updates; a second interrupts at once."""
    requested = False

    def request(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        print("Stopping after this step; once more to stop at once.", file=sys.stderr)

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def progress_bar(what: str, *, total: int, initial: int = 0) -> "tqdm[Any]":
    """A bar with time left on standard error; every ten seconds where that is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(total=total, initial=initial, desc=what, mininterval=interval, maxinterval=30.0, dynamic_ncols=True)
