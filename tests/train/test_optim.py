"""The schedule in closed form, decay groups, clipping; AdamW against torch's own update by hand."""

import math

import pytest
import torch
from torch import nn

from coca_video.train.optim import OptimConfig, build_optimizer, learning_rate, update


def test_schedule_in_closed_form() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=4)
    rates = [learning_rate(step, config=config, total_steps=12) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(9)])
    assert rates[12] == pytest.approx(0.0, abs=1e-12)


def test_no_warmup_starts_at_the_peak() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=0)
    assert learning_rate(0, config=config, total_steps=10) == 2.0


def test_decay_is_for_matrices_only() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(requires_grad=False)
    decayed, plain = build_optimizer(model, config=OptimConfig(weight_decay=0.3)).param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 3)] and decayed["weight_decay"] == 0.3
    assert [tuple(p.shape) for p in plain["params"]] == [(4,)] * 3 and plain["weight_decay"] == 0.0


def test_first_update_by_hand() -> None:
    """AdamW's first step is rate * g / (|g| + eps) after decay by rate * weight_decay, on clipped gradients."""
    layer = nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, -2.0]]))
    optimizer = build_optimizer(layer, config=OptimConfig(learning_rate=0.1, weight_decay=0.5))
    norm = update(optimizer, loss=(layer(torch.tensor([[3.0, -4.0]]))).sum(), gradient_clip=1.0)
    assert norm.item() == pytest.approx(5.0)
    assert layer.weight.grad.tolist()[0] == pytest.approx([0.6, -0.8], rel=1e-5)
    expected = [1.0 * (1 - 0.05) - 0.1, -2.0 * (1 - 0.05) + 0.1]
    assert layer.weight.detach().tolist()[0] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"learning_rate": math.nan}, "--optim.learning-rate must be above 0 and finite; got nan"),
        ({"learning_rate": 0.0}, "--optim.learning-rate must be above 0 and finite; got 0.0"),
        ({"weight_decay": -0.1}, "--optim.weight-decay must be 0 or more and finite; got -0.1"),
        ({"beta2": 1.0}, "--optim.beta2 must be at least 0 and below 1; got 1.0"),
        ({"warmup_steps": -1}, "--optim.warmup-steps must be 0 or more; got -1"),
        ({"gradient_clip": 0.0}, "--optim.gradient-clip must be above 0; got 0.0"),
    ],
)
def test_values_out_of_range_are_sentences(values: dict[str, float], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**values)


@pytest.mark.parametrize(
    "changed", [{"beta1": 0.5}, {"beta2": 0.5}, {"weight_decay": 0.9}, {"gradient_clip": 0.1}, {"learning_rate": 0.3}]
)
def test_every_option_changes_the_weights(changed: dict[str, float]) -> None:
    def train(config: OptimConfig) -> list[float]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        optimizer = build_optimizer(layer, config=config)
        for step in range(3):
            loss = (layer(torch.full((2, 3), 0.05 + step)) - 0.1).square().sum() * 0.2
            update(optimizer, loss=loss, gradient_clip=config.gradient_clip)
        return layer.weight.flatten().tolist()

    assert train(OptimConfig()) != train(OptimConfig(**changed))
