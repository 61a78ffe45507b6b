"""The average of the weights: its decay in closed form, its values against a float64 loop, in a model and out again."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coca_video.data.loader import SampleKey
from coca_video.train.ema import WeightAverage
from coca_video.train.loop import LoopConfig, Training, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer, update
from coca_video.train.run import Run
from coca_video.train.window import Sum


def reference(history: list[np.ndarray], *, decay: float) -> np.ndarray:
    """The average after the weights `history[1:]`, one an update, which starts at `history[0]`."""
    average = history[0].astype(float)
    for number, weights in enumerate(history[1:]):
        share = min(decay, (1 + number) / (10 + number))
        average = share * average + (1 - share) * weights
    return average


def test_decay_in_closed_form() -> None:
    average = WeightAverage([], decay=0.75)
    assert [average.decay_at(step) for step in (0, 8, 17, 25, 26, 27, 1000)] == pytest.approx(
        [1 / 10, 9 / 18, 18 / 27, 26 / 35, 0.75, 0.75, 0.75]
    )


def test_averages_against_a_float64_loop() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4))
    average = WeightAverage(model.named_parameters(), decay=0.6)
    history = {name: [parameter.detach().numpy().copy()] for name, parameter in model.named_parameters()}
    for step in range(30):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(torch.randn(parameter.shape))
                history[name].append(parameter.numpy().copy())
        average.update(step)
    for name, weights in history.items():
        np.testing.assert_allclose(average.averages[name].numpy(), reference(weights, decay=0.6), rtol=1e-5, atol=1e-6)


def test_applied_is_bit_exact_in_both_directions_also_after_an_error() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average = WeightAverage(model.named_parameters(), decay=0.9)
    with torch.no_grad():
        model.weight.mul_(1 / 3)
        model.bias.fill_(-0.0)
    average.update(0)
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    averages = {name: value.clone() for name, value in average.averages.items()}

    def check(inside: dict[str, Tensor], outside: dict[str, Tensor]) -> None:
        for name, parameter in model.named_parameters():
            assert parameter.detach().numpy().tobytes() == inside[name].numpy().tobytes()
            assert average.averages[name].numpy().tobytes() == outside[name].numpy().tobytes()

    assert not torch.equal(weights["weight"], averages["weight"])
    with average.applied():
        check(averages, weights)
    check(weights, averages)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    check(weights, averages)
    average.keep()
    check(averages, averages)


@dataclass(frozen=True)
class Points:
    """Eight points of the plane."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: SampleKey) -> Tensor:
        return torch.tensor([float(key.index), 1.0])


def test_the_loop_evaluates_the_average_and_leaves_it_in_the_model(tmp_path: Path) -> None:
    """Against a float64 average of the weights after each update; the checkpoint keeps the latest weights too."""
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    model.bias.requires_grad_(requires_grad=False)
    optim = OptimConfig(warmup_steps=0, learning_rate=0.1, ema_decay=0.4)
    config = LoopConfig(steps=9, batch_size=4, evaluate_every=3)
    optimizer = build_optimizer(model, config=optim)
    history = [model.weight.detach().numpy().copy()]
    evaluated: list[np.ndarray] = []

    def step(batch: Tensor) -> dict[str, Sum]:
        loss = (model(batch) - 3.0).square().mean()
        update(optimizer, loss=loss, gradient_clip=1.0)
        history.append(model.weight.detach().numpy().copy())
        return {"loss": Sum(loss, 1)}

    def evaluate() -> dict[str, float]:
        evaluated.append(model.weight.detach().numpy().copy())
        return {"weight": model.weight[0, 0].item()}

    training = Training(
        model=model, optimizer=optimizer, step=step, dataset=Points(), collate=torch.stack, evaluate=evaluate
    )
    run = Run(tmp_path, config=config)
    run_loop(training, config=config, optim=optim, run=run)
    for number, weights in zip((3, 6, 9), evaluated, strict=True):
        np.testing.assert_allclose(weights, reference(history[: number + 1], decay=0.4), rtol=1e-5)
    assert model.weight.detach().numpy().tobytes() == evaluated[-1].tobytes() != history[-1].tobytes()
    again = nn.Linear(2, 1)
    again.bias.requires_grad_(requires_grad=False)
    averages = {"weight": torch.zeros(1, 2)}
    restored = run.checkpoints.restore(
        model=again, optimizer=build_optimizer(again, config=optim), extra={"window": ""}, averages=averages
    )
    assert restored == 9
    assert again.weight.detach().numpy().tobytes() == history[-1].tobytes()
    assert averages["weight"].numpy().tobytes() == evaluated[-1].tobytes()
