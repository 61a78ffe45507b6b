"""The one attention of text decoders and poolers: multi-head, self or cross, through SDPA; and the MLP beside it."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head attention of `x` over `context` (or over itself), heads of width `dim / num_heads`.

    Args:
        dim: width of the queries and of the output; a multiple of `num_heads`.
        context_dim: width of what is attended to; `dim` when None.
    """

    def __init__(self, dim: int, *, num_heads: int, context_dim: int | None = None) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"Attention needs a width that its heads divide; got width {dim} and {num_heads} heads.")
        context_dim = dim if context_dim is None else context_dim
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(context_dim, dim)
        self.v_proj = nn.Linear(context_dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        *,
        context: Float[Tensor, "batch keys context_dim"] | None = None,
        mask: Bool[Tensor, "#batch #queries keys"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attends; `mask` is True where a query may see a key. A query that may see no key is the caller's error."""
        context = x if context is None else context
        query, key, value = (
            projection(source).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, source in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context))
        )
        per_head_mask = None if mask is None else mask.unsqueeze(1)
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=per_head_mask)
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out


class MLP(nn.Sequential):
    """Linear, GELU (exact), Linear."""

    def __init__(self, dim: int, *, hidden_dim: int) -> None:
        super().__init__(nn.Linear(dim, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, dim))


def causal_mask(length: int, *, device: torch.device) -> Bool[Tensor, "1 length length"]:
    """True where position i may see position j: j <= i."""
    return torch.ones(1, length, length, dtype=torch.bool, device=device).tril()


def init_linear_layers(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every Linear of `module` (big_vision's choice for ViT blocks)."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
