"""The one training loop: batches in order, a step, a log line, a checkpoint; stops and resumes at any update."""

import signal
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from coca_video.data.loader import Order, Share, Unreadable, batches
from coca_video.data.prefetch import to_device_ahead
from coca_video.distributed import (
    Strategy,
    any_rank,
    forget_gathered_weights,
    gather_objects,
    is_main,
    rank,
    world_size,
)
from coca_video.train.best import BestWeights
from coca_video.train.ema import WeightAverage
from coca_video.train.optim import OptimConfig, learning_rate, set_learning_rate
from coca_video.train.precision import Precision
from coca_video.train.run import Run
from coca_video.train.window import Sum, Window

Device = Literal["auto", "cpu", "cuda", "mps"]


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long and how often, in updates."""

    steps: int = 1000
    """Updates in all."""
    batch_size: int = 64
    """Samples an update, of all ranks together."""
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
    """Processes that read data, on each rank; changes no number."""
    strategy: Strategy = "ddp"
    """Over several ranks (torchrun): ddp keeps all weights on each, fsdp2 shards them."""

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


class Stopped(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has saved its state after `step` updates."""

    def __init__(self, step: int) -> None:
        super().__init__(f"Stopped after step {step}, with a checkpoint; run the same command again to go on.")


@dataclass(kw_only=True)
class Training:
    """What one run trains and on what. `step` does one update on a collated batch and returns what is to be logged.

    `order` says which samples come at which step; None shuffles them by the seed, each once an epoch. `best` keeps the
    weights of the best evaluation. `device` is where batches are brought before the step, one ahead of it; None leaves
    them where they are.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    step: Callable[[Any], dict[str, Sum]]
    dataset: Any
    collate: Callable[[Any], Any]
    order: Order | None = None
    evaluate: Callable[[], dict[str, float]] | None = None
    best: BestWeights | None = None
    num_workers: int = 0
    device: torch.device | None = None


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

    Over several ranks each reads its share of every batch; a step of which some rank can read nothing is left out by
    all of them. Rank 0 alone writes.

    With `optim.ema_decay` the averaged weights are evaluated, and are what `training.model` holds at the end; the
    latest ones stay in the checkpoints. With `training.best` it holds the weights of the best evaluation.

    Everything random comes from (seed, step) or (seed, epoch, sample), so that a resumed run is bit-equal to one that
    never stopped (on a GPU: with deterministic algorithms on).
    """
    window = Window()
    average = _weight_average(training.model, decay=optim.ema_decay)
    first = _restore(training, average=average, window=window, run=run)
    order = training.order
    if order is None:
        order = Order(num_samples=len(training.dataset), batch_size=config.batch_size, seed=config.seed)
    share = Share(rank(), world_size())
    own_samples = len(share.of(order.batch(0)))
    stream = _stream(training, order=order, share=share, first=first, last=config.steps)
    training.model.train()
    with (
        closing(run.log),
        closing(stream),
        _stop_requests() as stop_requested,
        progress_bar("training", total=config.steps, initial=first) as bar,
    ):
        for step, (batch, unreadable) in zip(range(first, config.steps), window.timed(stream), strict=True):
            window.rate = learning_rate(step, config=optim, total_steps=config.steps)
            _note_unreadable(unreadable, window=window, run=run)
            if any_rank(batch is None):  # where a rank has nothing to learn from, the others would wait for it
                window.empty_steps += 1
                _check_something_was_read(window, run=run, dataset_size=len(training.dataset))
            else:
                samples = own_samples - len(unreadable)
                _one_step(training, batch, num_samples=samples, step=step, window=window, config=config)
                if average is not None:
                    average.update(step)
            stop = any_rank(stop_requested())
            _after_step(
                training, done=step + 1, average=average, window=window, config=config, run=run, bar=bar, stop=stop
            )
    if training.best is not None:
        training.best.load_into(training.model)
    elif average is not None:
        average.keep()


def _stream(
    training: Training, *, order: Order, share: Share, first: int, last: int
) -> Generator[tuple[Any, list[Unreadable]], None, None]:
    """The batches of updates `first` to `last`, on the device of the training."""
    device = training.device
    stream = batches(
        training.dataset,
        order=order,
        first_step=first,
        last_step=last,
        workers=training.num_workers,
        collate=training.collate,
        share=share,
        pin_memory=device is not None and device.type == "cuda",
    )
    return stream if device is None else to_device_ahead(stream, device=device)


def _note_unreadable(unreadable: list[Unreadable], *, window: Window, run: Run) -> None:
    """Notes what any rank could not read."""
    if any_rank(bool(unreadable)):
        of_all_ranks = [sample for part in gather_objects(unreadable) for sample in part]
        run.note_unreadable(of_all_ranks)
        window.failed.update(sample.key for sample in of_all_ranks)


def _weight_average(model: nn.Module, *, decay: float | None) -> WeightAverage | None:
    """The average of the trainable weights, if one is asked for."""
    if decay is None:
        return None
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    return WeightAverage(trainable, decay=decay)


def _restore(training: Training, *, average: WeightAverage | None, window: Window, run: Run) -> int:
    """Brings everything to the newest checkpoint; the number of updates done."""
    extra = _extra(training, window=window)
    first = run.checkpoints.restore(
        model=training.model,
        optimizer=training.optimizer,
        extra=extra,
        averages=None if average is None else average.averages,
    )
    run.log.truncate_after(first)
    window.load(extra["window"])
    if training.best is not None:
        training.best.load(extra["best"])
    return first


def _extra(training: Training, *, window: Window) -> dict[str, str]:
    """What a checkpoint holds beside weights and moments."""
    return {"window": window.dump()} | ({} if training.best is None else {"best": training.best.dump()})


def _one_step(
    training: Training,
    batch: Any,
    *,
    num_samples: int,
    step: int,
    window: Window,
    config: LoopConfig,
) -> None:
    set_learning_rate(training.optimizer, rate=window.rate)
    torch.manual_seed(config.seed * 1_000_003 + step + (rank() << 40))  # ranks drop different paths
    window.add(training.step(batch), samples=num_samples)


def _after_step(
    training: Training,
    *,
    done: int,
    average: WeightAverage | None,
    window: Window,
    config: LoopConfig,
    run: Run,
    bar: "tqdm[Any]",
    stop: bool,
) -> None:
    """Logs, evaluates and saves where update number `done` calls for it; raises `Stopped` when a stop was asked for."""
    last = done == config.steps
    if done % config.log_every == 0 or last:
        values = window.take(before_step=done, device=next(training.model.parameters()).device)
        run.log.write("train", step=done, values=values)
        if "loss" in values:
            bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
    if training.evaluate is not None and (last or (config.evaluate_every and done % config.evaluate_every == 0)):
        with window.paused(before_step=done):
            _evaluate(training, done=done, average=average, run=run)
    if done % config.checkpoint_every == 0 or last or stop:
        with window.paused(before_step=done):
            _save(training, done=done, average=average, window=window, run=run)
    bar.update(1)
    if stop and not last:
        raise Stopped(done)


def _evaluate(training: Training, *, done: int, average: WeightAverage | None, run: Run) -> None:
    assert training.evaluate is not None
    with nullcontext() if average is None else average.applied():
        training.model.eval()
        values = training.evaluate()
        run.log.write("evaluation", step=done, values=values)
        if training.best is not None:
            training.best.offer(training.model, values=values, step=done)
        training.model.train()
        forget_gathered_weights(training.model)


def _save(training: Training, *, done: int, average: WeightAverage | None, window: Window, run: Run) -> None:
    run.checkpoints.save(
        done,
        model=training.model,
        optimizer=training.optimizer,
        extra=_extra(training, window=window),
        averages=None if average is None else average.averages,
    )
    if training.best is not None:
        training.best.after_checkpoint()
    run.draw_curves()


def _check_something_was_read(window: Window, *, run: Run, dataset_size: int) -> None:
    if window.empty_steps and len(window.failed) >= dataset_size:
        key = min(window.failed)
        raise ValueError(
            f"None of the {dataset_size} samples could be read; the first is {key} ({run.unreadable[key]})."
        )


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Turns the first Ctrl-C or SIGTERM into a flag read between updates; a second interrupts at once."""
    requested = False

    def request(_signal: int, _frame: FrameType | None) -> None:
        nonlocal requested
        if requested:
            raise KeyboardInterrupt
        requested = True
        if is_main():
            print("Stopping after this step; once more to stop at once.", file=sys.stderr)

    old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: requested
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def progress_bar(what: str, *, total: int, initial: int = 0) -> "tqdm[Any]":
    """A bar with time left on standard error, of the main rank; every ten seconds where that is no terminal."""
    interval = 0.2 if sys.stderr.isatty() else 10.0
    return tqdm(
        total=total,
        initial=initial,
        desc=what,
        mininterval=interval,
        maxinterval=30.0,
        dynamic_ncols=True,
        disable=not is_main(),
    )
