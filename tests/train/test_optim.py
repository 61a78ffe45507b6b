"""Schedules in closed form, groups and their rates, clipping; the updates against numpy in float64."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from torch import nn

from coca_video.config import from_json, to_json
from coca_video.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate, update


def test_cosine_in_closed_form() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=4)
    rates = [learning_rate(step, config=config, total_steps=12) for step in range(13)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4:] == pytest.approx([1 + math.cos(math.pi * i / 8) for i in range(9)])
    assert rates[12] == pytest.approx(0.0, abs=1e-12)


def test_line_in_closed_form() -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=4, schedule="linear")
    rates = [learning_rate(step, config=config, total_steps=12) for step in range(14)]
    assert rates == [0.5, 1.0, 1.5, 2.0, 2.0, 1.75, 1.5, 1.25, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_no_warmup_starts_at_the_peak(schedule: Any) -> None:
    config = OptimConfig(learning_rate=2.0, warmup_steps=0, schedule=schedule)
    assert learning_rate(0, config=config, total_steps=10) == 2.0


@pytest.mark.parametrize("algorithm", ["adamw", "adafactor"])
def test_decay_is_for_matrices_only(algorithm: Any) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[2].requires_grad_(requires_grad=False)
    config = OptimConfig(weight_decay=0.3, algorithm=algorithm)
    decayed, plain = build_optimizer(model, config=config).param_groups
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


# Both sides of a matrix as the longer one, one too narrow to be factored, a patch embedding, a vector, a scalar.
SHAPES = {"tall": (40, 17), "wide": (17, 40), "narrow": (3, 20), "patches": (20, 3, 16, 17), "bias": (24,), "scale": ()}
RATES = (0.3, 0.6, 0.9, 0.7, 0.5, 0.4, 0.2, 0.1)
# The gradients' sizes at each update: where they grow, updates are clipped; where they shrink, they are not.
SIZES = (1.0, 3.0, 9.0, 1.0, 0.3, 0.1, 2.0, 0.01)
BETA1, BETA2, DECAY = 0.8, 0.6, 0.25  # 1 - t^-0.8 passes 0.6 at t = 4


class Model(nn.Module):
    """Parameters of many shapes, and gradients for them that depend on the update alone."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.default_rng(0)
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.from_numpy(random.normal(size=shape)).float()))

    def values(self) -> dict[str, np.ndarray]:
        return {name: parameter.detach().double().numpy() for name, parameter in self.named_parameters()}


def gradients(number: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(number + 1)
    return {
        name: (SIZES[number] * random.normal(size=shape)).astype(np.float32).astype(float)
        for name, shape in SHAPES.items()
    }


def train(config: OptimConfig) -> list[dict[str, np.ndarray]]:
    """The weights after each update."""
    model = Model()
    optimizer = build_optimizer(model, config=config)
    history = []
    for number, rate in enumerate(RATES):
        for name, gradient in gradients(number).items():
            model.get_parameter(name).grad = torch.from_numpy(np.asarray(gradient)).float()
        set_learning_rate(optimizer, rate=rate)
        optimizer.step()
        history.append({name: value.copy() for name, value in model.values().items()})
    return history


class ReferenceSecondMoment:
    """Adafactor's estimate (Shazeer and Stern, Algorithm 4): an outer product of running row and column means."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.factored = len(shape) >= 2 and sorted(shape)[-2] >= 16
        self.rows: dict[Any, np.ndarray] = {}
        self.columns: dict[Any, np.ndarray] = {}
        self.whole = np.zeros(shape)

    def update(self, squared: np.ndarray, *, beta2: float) -> np.ndarray:
        if not self.factored:
            self.whole = beta2 * self.whole + (1 - beta2) * squared
            return self.whole
        if squared.ndim == 2:
            return self._matrix("all", squared, beta2=beta2)
        result = np.empty_like(squared)  # [20, 3, 16, 17]: a matrix [20, 17] for each of the others
        for j in range(squared.shape[1]):
            for k in range(squared.shape[2]):
                result[:, j, k] = self._matrix((j, k), squared[:, j, k], beta2=beta2)
        return result

    def _matrix(self, key: Any, squared: np.ndarray, *, beta2: float) -> np.ndarray:
        self.rows[key] = beta2 * self.rows.get(key, 0.0) + (1 - beta2) * squared.mean(axis=1)
        self.columns[key] = beta2 * self.columns.get(key, 0.0) + (1 - beta2) * squared.mean(axis=0)
        return np.outer(self.rows[key], self.columns[key]) / self.rows[key].mean()


def test_adafactor_is_the_published_rule() -> None:
    """Factored second moment, beta2 = 1 - t^-0.8 up to a cap, update clipping at 1, first moment, decoupled decay."""
    weights = Model().values()
    weights = {name: value.copy() for name, value in weights.items()}
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: ReferenceSecondMoment(shape) for name, shape in SHAPES.items()}
    config = OptimConfig(algorithm="adafactor", beta1=BETA1, beta2=BETA2, weight_decay=DECAY)
    sizes = []
    for number, after in enumerate(train(config)):
        beta2 = min(BETA2, 1 - (number + 1) ** -0.8)
        for name, gradient in gradients(number).items():
            step = gradient / np.sqrt(second[name].update(gradient**2 + 1e-30, beta2=beta2))
            sizes.append(np.sqrt((step**2).mean()))
            first[name] = BETA1 * first[name] + (1 - BETA1) * step / max(1.0, sizes[-1])
            decay = DECAY if len(SHAPES[name]) >= 2 else 0.0
            weights[name] = weights[name] - RATES[number] * (first[name] + decay * weights[name])
            np.testing.assert_allclose(after[name], weights[name], rtol=2e-5, atol=2e-6, err_msg=f"{name}, {number}")
    assert min(sizes) < 0.5 and max(sizes) > 1.3  # clipping acted, and did not act


def test_adamw_is_the_published_rule() -> None:
    """Loshchilov and Hutter, Algorithm 2, with bias correction; the fused kernel gives the same."""
    weights = {name: value.copy() for name, value in Model().values().items()}
    first = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    second = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    config = OptimConfig(beta1=BETA1, beta2=BETA2, weight_decay=DECAY)
    for number, after in enumerate(train(config)):
        for name, gradient in gradients(number).items():
            first[name] = BETA1 * first[name] + (1 - BETA1) * gradient
            second[name] = BETA2 * second[name] + (1 - BETA2) * gradient**2
            unbiased = first[name] / (1 - BETA1 ** (number + 1))
            step = unbiased / (np.sqrt(second[name] / (1 - BETA2 ** (number + 1))) + 1e-8)
            decay = DECAY if len(SHAPES[name]) >= 2 else 0.0
            weights[name] = weights[name] - RATES[number] * (step + decay * weights[name])
            np.testing.assert_allclose(after[name], weights[name], rtol=2e-5, atol=2e-6, err_msg=f"{name}, {number}")


class Parts(nn.Module):
    """An encoder of two layers and a head, with a parameter whose name only begins like the encoder's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Sequential(nn.Linear(17, 18), nn.Linear(18, 19))
        self.encoder_scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(19, 20)


@pytest.mark.parametrize("algorithm", ["adamw", "adafactor"])
def test_rate_factors_scale_the_updates_of_their_parts_alone(algorithm: Any) -> None:
    """The longest name wins; the updates' ratio is the factor's, whatever the optimizer has done with the gradient."""
    factors = {"encoder": 0.1, "encoder.1": 0.5, "head.bias": 2.0}
    expected = {
        "encoder_scale": 1.0,
        "encoder.0.weight": 0.1,
        "encoder.0.bias": 0.1,
        "encoder.1.weight": 0.5,
        "encoder.1.bias": 0.5,
        "head.weight": 1.0,
        "head.bias": 2.0,
    }
    steps = []
    for rate_factors in ({}, factors):
        model = Parts()
        before = {name: parameter.detach().double() for name, parameter in model.named_parameters()}
        config = OptimConfig(algorithm=algorithm, rate_factors=rate_factors)
        optimizer = build_optimizer(model, config=config)
        set_learning_rate(optimizer, rate=0.03)
        random = torch.Generator().manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        steps.append({name: parameter.detach().double() - before[name] for name, parameter in model.named_parameters()})
    plain, scaled = steps
    for name, factor in expected.items():
        torch.testing.assert_close(scaled[name], factor * plain[name], rtol=1e-3, atol=1e-6)


def test_a_factor_of_zero_freezes() -> None:
    model = Parts()
    optimizer = build_optimizer(model, config=OptimConfig(rate_factors={"encoder": 0.0, "encoder.1.bias": 1.0}))
    trained = {"encoder_scale", "encoder.1.bias", "head.weight", "head.bias"}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trained
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained)
    with pytest.raises(ValueError, match=r"Expected something to train; every parameter is frozen"):
        build_optimizer(nn.Linear(2, 2), config=OptimConfig(rate_factors={"weight": 0.0, "bias": 0.0}))


@pytest.mark.parametrize(
    ("factors", "unused"),
    [
        ({"encode": 0.1}, "'encode'"),
        ({"head": 0.5, "encoder": 0.1, "encoder.0": 0.1, "encoder.1": 0.2}, "'encoder'"),
        ({"": 0.5}, "''"),
        ({"frozen": 0.5}, "'frozen'"),
    ],
)
def test_a_name_that_decides_nothing_is_a_sentence(factors: dict[str, float], unused: str) -> None:
    model = Parts()
    model.frozen = nn.Linear(2, 2).requires_grad_(requires_grad=False)
    parts = "encoder, encoder_scale, head"
    sentence = rf"names {unused}, which decides on no trainable parameter; the trainable parts are {parts}\."
    with pytest.raises(ValueError, match=sentence):
        build_optimizer(model, config=OptimConfig(rate_factors=factors))


def test_configs_survive_json_and_the_command_line() -> None:
    config = OptimConfig(algorithm="adafactor", schedule="linear", rate_factors={"encoder.a": 0.1}, ema_decay=0.9999)
    assert from_json(OptimConfig, to_json(config)) == config
    words = "--algorithm adafactor --schedule linear --rate-factors encoder.a 0.1 --ema-decay 0.9999"
    assert tyro.cli(OptimConfig, default=OptimConfig(), args=words.split()) == config
    changed = tyro.cli(OptimConfig, default=config, args=["--rate-factors.encoder.a", "0.2"])
    assert changed == replace(config, rate_factors={"encoder.a": 0.2})


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"learning_rate": math.nan}, "--optim.learning-rate must be above 0 and finite; got nan"),
        ({"learning_rate": 0.0}, "--optim.learning-rate must be above 0 and finite; got 0.0"),
        ({"rate_factors": {"a": 1.0, "b": -0.1}}, "--optim.rate-factors must be 0 or more and finite; got .*-0.1"),
        ({"rate_factors": {"a": math.inf}}, "--optim.rate-factors must be 0 or more and finite; got .*inf"),
        ({"weight_decay": -0.1}, "--optim.weight-decay must be 0 or more and finite; got -0.1"),
        ({"beta2": 1.0}, "--optim.beta2 must be at least 0 and below 1; got 1.0"),
        ({"warmup_steps": -1}, "--optim.warmup-steps must be 0 or more; got -1"),
        ({"gradient_clip": 0.0}, "--optim.gradient-clip must be above 0; got 0.0"),
        ({"ema_decay": 0.0}, "--optim.ema-decay must be above 0 and below 1; got 0.0"),
        ({"ema_decay": 1.0}, "--optim.ema-decay must be above 0 and below 1; got 1.0"),
    ],
)
def test_values_out_of_range_are_sentences(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        OptimConfig(**values)


@pytest.mark.parametrize("algorithm", ["adamw", "adafactor"])
@pytest.mark.parametrize(
    "changed", [{"beta1": 0.5}, {"beta2": 0.5}, {"weight_decay": 0.9}, {"gradient_clip": 0.1}, {"learning_rate": 0.3}]
)
def test_every_option_changes_the_weights(algorithm: Any, changed: dict[str, float]) -> None:
    def train(config: OptimConfig) -> list[float]:
        torch.manual_seed(0)
        layer = nn.Linear(3, 3)
        optimizer = build_optimizer(layer, config=config)
        for step in range(3):
            loss = (layer(torch.full((2, 3), 0.05 + step)) - 0.1).square().sum() * 0.2
            update(optimizer, loss=loss, gradient_clip=config.gradient_clip)
        return layer.weight.flatten().tolist()

    config = OptimConfig(algorithm=algorithm)
    assert train(config) != train(replace(config, **changed))
