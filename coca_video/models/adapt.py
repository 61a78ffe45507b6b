"""What a fine-tuned encoder takes: low-rank adapters, drop path, checkpointed activations, rates that fall with depth.

All of it is applied to an encoder from outside, and none of it stays in the weights that are saved.
"""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, type_before_parametrizations
from torch.utils.checkpoint import checkpoint

from coca_video.models.image import ImageEncoder

ADAPTED = ("attn", "mlp")  # timm's names for what has the matrices of a transformer block


class LowRank(nn.Module):
    """W to W + scale B A (LoRA, arXiv 2106.09685, section 4.1)."""

    def __init__(self, weight: Float[Tensor, "outputs inputs"], *, rank: int, scale: float, seed: int) -> None:
        super().__init__()
        outputs, inputs = weight.shape
        self.scale = scale
        drawn = torch.randn(rank, inputs, generator=torch.Generator().manual_seed(seed)) * inputs**-0.5
        self.down = nn.Parameter(drawn.to(weight))
        self.up = nn.Parameter(weight.new_zeros(outputs, rank))

    def forward(self, weight: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """`weight` and what was learned beside it."""
        # Under autocast the sum would be of a product rounded to bf16, and not what is merged.
        with torch.autocast(device_type=weight.device.type, enabled=False):
            return torch.addmm(weight, self.up, self.down, alpha=self.scale)


def add_lora(encoder: ImageEncoder, *, rank: int, alpha: float, seed: int) -> None:
    """Freezes `encoder` but for adapters: W + alpha / rank B A for each matrix of its attentions and MLPs.

    B starts at zero, so that nothing changes at first, and A as a normal draw of variance 1 / inputs from `seed`. A
    fused matrix of queries, keys and values has one A and one B. The names in the state dict change until `merge_lora`.
    ValueError for a model without such matrices.
    """
    if rank < 1 or alpha <= 0:
        raise ValueError(f"LoRA needs a rank of 1 or more and an alpha above 0; got {rank} and {alpha}.")
    linears = list(_adapted_linears(encoder))
    if not linears:
        raise ValueError("This encoder has no attention or MLP matrices to adapt; take another tuning than Lora.")
    assert not any(is_parametrized(linear) for _, linear in linears), "adapters are there already"
    encoder.requires_grad_(requires_grad=False)
    for number, (_, linear) in enumerate(linears):
        # A seed a matrix: an adapter does not depend on how many come before it draws.
        adapter = LowRank(linear.weight, rank=rank, scale=alpha / rank, seed=seed * len(linears) + number)
        register_parametrization(linear, "weight", adapter)


@torch.no_grad()
def merge_lora(encoder: ImageEncoder) -> None:
    """Puts W + alpha / rank B A in the place of each W: plain names and weights again, frozen; a copy can be merged.

    Layers are replaced: torch's `remove_parametrizations` would take the weight from copies of the encoder too, since a
    copy shares the class that holds it.
    """
    for name, linear in list(_adapted_linears(encoder)):
        if is_parametrized(linear, "weight"):
            parent, _, place = name.rpartition(".")
            setattr(encoder.model.get_submodule(parent), place, _plain_linear(linear))


def _plain_linear(linear: nn.Linear) -> nn.Linear:
    kind: type[nn.Linear] = type_before_parametrizations(linear)
    plain = kind(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
    plain.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
    plain.bias = linear.bias
    return plain.train(linear.training)


def _adapted_linears(encoder: ImageEncoder) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in encoder.model.named_modules():
        if isinstance(module, nn.Linear) and not set(ADAPTED).isdisjoint(name.split(".")):
            yield name, module


def set_drop_path(encoder: ImageEncoder, *, rate: float) -> None:
    """In training each frame skips each residual branch with a probability that rises to `rate` (arXiv 1603.09382).

    From 0 in the first block to `rate` in the last, linearly, as in timm. Draws come from torch's global generator.
    ValueError for a model without transformer blocks.
    """
    if not 0 <= rate < 1:
        raise ValueError(f"A drop path rate must be at least 0 and below 1; got {rate}.")
    blocks = _blocks(encoder, wanted="drop path")
    for number, block in enumerate(blocks):
        places = [name for name, _ in block.named_children() if name.startswith("drop_path")]
        if not places:
            raise ValueError("The blocks of this encoder have no place for drop path; leave its rate at 0.")
        for name in places:
            setattr(block, name, DropPath(rate * number / max(1, len(blocks) - 1)).train(block.training))


def checkpoint_activations(encoder: ImageEncoder) -> None:
    """Keeps each block's input alone, and computes what is inside again in the backward pass.

    Outputs and gradients stay the same to the bit; a step takes about a third longer. ValueError for a model without
    blocks, and for one with batch norms, whose running statistics would count every batch twice.
    """
    if any(isinstance(module, _BatchNorm) for module in encoder.modules()):
        raise ValueError(
            "This encoder has batch norms, whose statistics a second forward would count twice; leave "
            "activation_checkpointing off."
        )
    for block in _blocks(encoder, wanted="activation checkpointing"):
        assert "forward" not in vars(block), "its activations are checkpointed already"
        # By the instance's attribute, so that names stay and a copy of the encoder recomputes its own blocks.
        setattr(block, "forward", partial(checkpoint, block.forward, use_reentrant=False))  # noqa: B010


def layer_rate_factors(encoder: ImageEncoder, *, decay: float) -> dict[str, float]:
    """Factors for `OptimConfig.rate_factors` of a model that holds this one as `encoder`: name to factor.

    As BEiT (arXiv 2106.08254) and MAE: block i of n (from 0) has decay^(n - i), the patch embedding and all else before
    the blocks decay^(n + 1), the norm after them 1, as the head has. (timm counts from the last block: its factors are
    1 / decay of these.) Names whose parameters are all frozen are left out. ValueError for a model without blocks.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"A layer decay must be above 0 and at most 1; got {decay}.")
    depth = len(_blocks(encoder, wanted="a layer decay"))
    parts = [name for name, _ in encoder.model.named_children()]
    after = parts[parts.index("blocks") + 1 :]
    factors: dict[str, float] = {}
    for name, parameter in encoder.named_parameters():
        part, _, rest = name.removeprefix("model.").partition(".")
        if not parameter.requires_grad:
            continue
        if part == "blocks":
            number = int(rest.partition(".")[0])
            factors[f"encoder.model.blocks.{number}"] = decay ** (depth - number)
        else:
            factors[f"encoder.model.{part}"] = 1.0 if part in after else decay ** (depth + 1)
    return factors


def _blocks(encoder: ImageEncoder, *, wanted: str) -> list[nn.Module]:
    blocks = encoder.blocks()
    if not blocks:
        raise ValueError(f"This encoder has no transformer blocks for {wanted}; take a ViT or leave it out.")
    return blocks
