"""The optimizer: AdamW, warm-up then cosine to zero, clipped gradients; the rate is a pure function of the step."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and a cosine to zero."""

    learning_rate: float = 1e-3
    """The peak; it is climbed to over the warm-up, then falls along a half cosine to zero at the last step."""
    weight_decay: float = 0.05
    """Acts on matrices only, not on biases, norms and scales."""
    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    warmup_steps: int = 100
    """Updates until the peak."""
    gradient_clip: float = 1.0
    """Bound on the norm of all gradients together."""

    def __post_init__(self) -> None:
        expected = {
            "learning_rate": ("above 0 and finite", 0 < self.learning_rate < math.inf),
            "weight_decay": ("0 or more and finite", 0 <= self.weight_decay < math.inf),
            "beta1": ("at least 0 and below 1", 0 <= self.beta1 < 1),
            "beta2": ("at least 0 and below 1", 0 <= self.beta2 < 1),
            "warmup_steps": ("0 or more", self.warmup_steps >= 0),
            "gradient_clip": ("above 0", self.gradient_clip > 0),
        }
        for name, (range_, holds) in expected.items():
            if not holds:
                raise ValueError(f"--optim.{name.replace('_', '-')} must be {range_}; got {getattr(self, name)}.")


def learning_rate(step: int, *, config: OptimConfig, total_steps: int) -> float:
    """The rate of update `step` (from 0): (step + 1) / warmup of the peak, then cosine, zero after the last update."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def build_optimizer(model: nn.Module, *, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; decay for matrices and larger, none for biases, norms and scales."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def update(optimizer: torch.optim.Optimizer, *, loss: Tensor, gradient_clip: float) -> Tensor:
    """One update down `loss`; returns the norm of all gradients before clipping."""
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = nn.utils.clip_grad_norm_(parameters, gradient_clip)
    optimizer.step()
    return norm
