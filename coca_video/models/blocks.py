"""A deeper pooler: V-JEPA 2's attentive classifier without its last linear layer (arXiv 2506.09985, section 4)."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.attention import MLP, Attention
from coca_video.models.pooler import mean_shares

INITIAL_STD = 0.02
MLP_RATIO = 4


class SelfAttentionBlock(nn.Module):
    """Self-attention and MLP, both pre-norm with a residual."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=num_heads)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden_dim=MLP_RATIO * dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch 1 tokens"] | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """`mask` is True for tokens that may be seen."""
        tokens = tokens + self.attention(self.norm_self(tokens), mask=mask)
        out: Tensor = tokens + self.mlp(self.norm_mlp(tokens))
        return out


class CrossAttentionBlock(nn.Module):
    """Queries attend over normalised tokens, then an MLP; the queries have no norm, the attention no output layer."""

    def __init__(self, dim: int, *, num_heads: int) -> None:
        super().__init__()
        self.norm_context = nn.LayerNorm(dim)
        self.attention = Attention(dim, num_heads=num_heads)
        self.attention.out_proj = nn.Identity()  # type: ignore[assignment]  # as published
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = MLP(dim, hidden_dim=MLP_RATIO * dim)

    def forward(
        self,
        queries: Float[Tensor, "batch queries dim"],
        *,
        tokens: Float[Tensor, "batch tokens dim"],
        mask: Bool[Tensor, "batch 1 tokens"] | None,
    ) -> Float[Tensor, "batch queries dim"]:
        """`mask` is True for tokens that may be seen."""
        queries = queries + self.attention(queries, context=self.norm_context(tokens), mask=mask)
        out: Tensor = queries + self.mlp(self.norm_mlp(queries))
        return out


class AttentivePooler(nn.Module):
    """`depth` blocks: self-attention over all tokens in all but the last, where learned queries attend over them.

    V-JEPA 2's probes are of depth 4, V-JEPA's of depth 1. Weights begin as theirs: truncated normal with a deviation
    of 0.02, the last matrix of every residual branch of block i (from 1) divided by sqrt(2 i).
    """

    def __init__(self, dim: int, *, num_heads: int, num_queries: int, depth: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(num_queries, dim))
        layers = [SelfAttentionBlock(dim, num_heads=num_heads) for _ in range(depth - 1)]
        self.layers = nn.ModuleList(layers)
        self.cross = CrossAttentionBlock(dim, num_heads=num_heads)
        nn.init.trunc_normal_(self.query, std=INITIAL_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=INITIAL_STD)
                nn.init.zeros_(module.bias)
        for number, block in enumerate(layers, start=1):
            _shrink([block.attention.out_proj, block.mlp[-1]], number=number)
        _shrink([self.cross.mlp[-1]], number=max(1, len(layers)))

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """Pools `tokens`. `mask` is True for real ones, at least one a row; others, if finite, count for nothing."""
        key_mask = None if mask is None else mask.unsqueeze(1)
        tokens = self._mix(tokens, mask=key_mask)
        pooled: Tensor = self.cross(self.query.expand(len(tokens), -1, -1), tokens=tokens, mask=key_mask)
        return pooled

    def attention_weights(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """The share of each token in the cross-attention, mean over heads and queries; the shares of a row sum to 1.

        With self-attention blocks it is the share of what they made of that token and of what it saw of the others.
        """
        attention = self.cross.attention
        tokens = self._mix(tokens, mask=None if mask is None else mask.unsqueeze(1))
        query = attention.q_proj(self.query).unflatten(-1, (attention.num_heads, -1))
        key = attention.k_proj(self.cross.norm_context(tokens)).unflatten(-1, (attention.num_heads, -1))
        scores = torch.einsum("qhd,bnhd->bqhn", query * query.shape[-1] ** -0.5, key)
        return mean_shares(scores.flatten(1, 2), mask=mask)

    def _mix(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch 1 tokens"] | None
    ) -> Float[Tensor, "batch tokens dim"]:
        """The tokens after all self-attention blocks."""
        for block in self.layers:
            tokens = block(tokens, mask=mask)
        return tokens


@torch.no_grad()
def _shrink(linears: list[nn.Module], *, number: int) -> None:
    for linear in linears:
        assert isinstance(linear, nn.Linear)
        linear.weight /= (2 * number) ** 0.5
