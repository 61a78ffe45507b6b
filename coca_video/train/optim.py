"""The optimizer: AdamW or Adafactor, with rates by part; the rate is a pure function of the step."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from timm.optim.adafactor_bv import AdafactorBigVision
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from coca_video.distributed import stays_whole


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The rule of an update, and its learning rate over the run."""

    algorithm: Literal["adamw", "adafactor"] = "adamw"
    """adafactor: a factored second moment, with a first moment and decoupled decay (CoCa; Zhai et al. 2106.04560)."""
    learning_rate: float = 1e-3
    """The peak; it is climbed to over the warm-up, then falls to zero at the last step."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How the rate falls after the warm-up: along a half cosine, or a line (CoCa's pretraining)."""
    rate_factors: dict[str, float] = field(default_factory=dict)
    """Factor on the rate of the parameters below a dotted name, as `encoder 0.1`; the longest name wins, 0 freezes."""
    weight_decay: float = 0.05
    """Acts on matrices only, not on biases, norms and scales; scaled by the rate."""
    beta1: float = 0.9
    """Decay of the mean of gradients (adafactor: of scaled gradients)."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients (adafactor: the cap of 1 - t^-0.8; CoCa has 0.999)."""
    warmup_steps: int = 100
    """Updates until the peak."""
    gradient_clip: float = 1.0
    """Bound on the norm of all gradients together."""
    ema_decay: float | None = None
    """Evaluate and save an average of the weights with this decay (CoCa Table 9: 0.9999); the plain weights when None.
    A decay of (1 + t) / (10 + t) at update t holds while it is the smaller, so that short runs outgrow their start."""

    def __post_init__(self) -> None:
        factors = self.rate_factors.values()
        expected = {
            "learning_rate": ("above 0 and finite", 0 < self.learning_rate < math.inf),
            "rate_factors": ("0 or more and finite", all(0 <= factor < math.inf for factor in factors)),
            "weight_decay": ("0 or more and finite", 0 <= self.weight_decay < math.inf),
            "beta1": ("at least 0 and below 1", 0 <= self.beta1 < 1),
            "beta2": ("at least 0 and below 1", 0 <= self.beta2 < 1),
            "warmup_steps": ("0 or more", self.warmup_steps >= 0),
            "gradient_clip": ("above 0", self.gradient_clip > 0),
            "ema_decay": ("above 0 and below 1", self.ema_decay is None or 0 < self.ema_decay < 1),
        }
        for name, (range_, holds) in expected.items():
            if not holds:
                raise ValueError(f"--optim.{name.replace('_', '-')} must be {range_}; got {getattr(self, name)}.")


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """The rate of update `step` (from 0): (step + 1) / warmup of the peak, then the fall to zero after the last one."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    match config.schedule:
        case "cosine":
            return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
        case "linear":
            return config.learning_rate * (1 - done)


def set_learning_rate(optimizer: torch.optim.Optimizer, *, rate: float) -> None:
    """Gives each group of an optimizer from `build_optimizer` the rate, times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def freeze(model: nn.Module, *, config: OptimConfig) -> None:
    """Turns requires_grad off where the rate factor is 0: before `parallelize`: DDP waits for all it found free."""
    for parameter, factor in _factors_by_parameter(model, rate_factors=config.rate_factors):
        if factor == 0:
            parameter.requires_grad_(False)


def build_optimizer(model: nn.Module, *, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimizer of the trainable parameters: decay for matrices and larger, none for biases, norms and scales.

    See `parameter_groups`. ValueError where nothing is left to train.
    """
    return optimizer_of(parameter_groups(model, config=config), config=config)


def parameter_groups(model: nn.Module, *, config: OptimConfig) -> list[dict[str, Any]]:
    """The trainable parameters as an optimizer takes them.

    A group has the parameters of one rate factor ("rate_factor" in the group) that decay, or that do not. Parameters
    with a factor of 0 are frozen: their requires_grad is turned off. ValueError for a name in `rate_factors` that
    decides on no trainable parameter.
    """
    groups: dict[tuple[float, bool, bool], list[nn.Parameter]] = {}
    for parameter, factor in _factors_by_parameter(model, rate_factors=config.rate_factors):
        if factor == 0:
            parameter.requires_grad_(False)
        else:
            # A fused kernel takes sharded weights or whole ones, not both; groups are the same for any number of ranks.
            kind = (factor, parameter.ndim >= 2, stays_whole(parameter))
            groups.setdefault(kind, []).append(parameter)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay if decays else 0.0,
            "lr": config.learning_rate * factor,
            "rate_factor": factor,
        }
        for (factor, decays, _), parameters in groups.items()
    ]


def optimizer_of(groups: list[dict[str, Any]], *, config: OptimConfig) -> torch.optim.Optimizer:
    """The config's algorithm on groups from `parameter_groups`; ValueError where there are none."""
    if not groups:
        raise ValueError("Expected something to train; every parameter is frozen, so free some (--optim.rate-factors).")
    match config.algorithm:
        case "adamw":
            # torch >= 2.11 has the fused kernel on every device that a run may ask for: cpu, cuda, mps.
            return torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), fused=True)
        case "adafactor":
            return _adafactor(groups, config=config)


def _adafactor(groups: list[dict[str, Any]], *, config: OptimConfig) -> torch.optim.Optimizer:
    """The variant of Zhai et al. (2106.04560, section 3.4): Adafactor with a first moment and a capped beta2.

    Update clipping at 1 is Adafactor's own (1804.04235, Algorithm 4). Matrices with a side below 16 are not factored
    (timm's default). The first moment is kept in float32, where the paper halves it to save memory.
    """
    optimizer: torch.optim.Optimizer = AdafactorBigVision(
        groups,
        momentum=config.beta1,
        momentum_dtype=torch.float32,
        beta2_cap=config.beta2,
        clipping_threshold=1.0,
        unscaled_wd=False,
    )
    return optimizer


def _factors_by_parameter(model: nn.Module, *, rate_factors: dict[str, float]) -> list[tuple[nn.Parameter, float]]:
    """Each trainable parameter with its factor: of the longest name in `rate_factors` that it lies below, else 1."""
    used: set[str] = set()
    found: list[tuple[nn.Parameter, float]] = []
    for name, parameter in model.named_parameters():
        prefixes = [prefix for prefix in rate_factors if f"{name}.".startswith(f"{prefix}.")]
        longest = max(prefixes, key=len, default=None)
        factor = 1.0 if longest is None else rate_factors[longest]
        if longest is not None and (parameter.requires_grad or factor == 0):  # `freeze` may have been here
            used.add(longest)
        if parameter.requires_grad:
            found.append((parameter, factor))
    if unused := sorted(rate_factors.keys() - used):
        parts = sorted({name.split(".")[0] for name, parameter in model.named_parameters() if parameter.requires_grad})
        raise ValueError(
            f"--optim.rate-factors names {', '.join(map(repr, unused))}, which decides on no trainable "
            f"parameter; the trainable parts are {', '.join(parts)}."
        )
    return found


def update(optimizer: torch.optim.Optimizer, *, loss: Tensor, gradient_clip: float) -> Tensor:
    """One update down `loss`; returns the norm of all gradients before clipping."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    return take_step(optimizer, gradient_clip=gradient_clip)


@contextmanager
def adding_up(parallel: nn.Module, *, is_last: bool) -> Iterator[None]:
    """Around the forward and backward of a part of a batch: DDP averages over ranks with the last part alone.

    fsdp2 averages each, which comes to the same.
    """
    with parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not is_last else nullcontext():
        yield


def take_step(optimizer: torch.optim.Optimizer, *, gradient_clip: float) -> Tensor:
    """One update along the gradients that are there; returns the norm of all of them before clipping."""
    norm = clip_gradients(parameters_of(optimizer.param_groups), bound=gradient_clip)
    optimizer.step()
    return norm


def parameters_of(groups: list[dict[str, Any]]) -> list[Tensor]:
    """All parameters of an optimizer's groups."""
    return [parameter for group in groups for parameter in group["params"]]


def clip_gradients(parameters: list[Tensor], *, bound: float) -> Tensor:
    """Scales gradients down to a norm of `bound` in all; returns their norm before. Sharded ones count whole."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    sharded = [parameter for parameter in with_gradient if isinstance(parameter, DTensor)]
    whole = [parameter for parameter in with_gradient if not isinstance(parameter, DTensor)]
    if not sharded:
        norm: Tensor = nn.utils.clip_grad_norm_(whole, bound)
        return norm
    # torch clips a list of one kind only, and scalars (the temperature) cannot be sharded.
    parts = [nn.utils.get_total_norm([p.grad for p in part if p.grad is not None]) for part in (sharded, whole) if part]
    norm = torch.stack([part.full_tensor() if isinstance(part, DTensor) else part for part in parts]).norm()
    for part in (sharded, whole):
        nn.utils.clip_grads_with_norm_(part, bound, norm)
    return norm
