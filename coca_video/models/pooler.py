"""Attentional pooling (CoCa section 3.2): learned queries attend over tokens. One query is pooled folded, without keys.

models/pooler_fold.py states the fold. Parameters and state dict are those of the ordinary module on both paths.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.attention import Attention, init_linear_layers
from coca_video.models.pooler_fold import folded_pool


class AttentionalPooler(nn.Module):
    """One multi-head attention layer with `num_queries` learned queries over a set of tokens.

    Layer norms on queries, on tokens and on the output, as in open_clip's pooler; the paper names none.
    With one query the folded path is taken; with more, the ordinary one.
    """

    def __init__(self, dim: int, *, num_heads: int, num_queries: int, context_dim: int | None = None) -> None:
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"A pooler needs at least 1 query; got {num_queries}.")
        context_dim = dim if context_dim is None else context_dim
        self.query = nn.Parameter(torch.empty(num_queries, dim))
        self.norm_query = nn.LayerNorm(dim)
        self.norm_context = nn.LayerNorm(context_dim)
        self.attention = Attention(dim, num_heads=num_heads, context_dim=context_dim)
        self.norm_out = nn.LayerNorm(dim)
        init_linear_layers(self)
        nn.init.trunc_normal_(self.query, std=dim**-0.5)

    def forward(
        self,
        tokens: Float[Tensor, "batch tokens context_dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Pools `tokens`. `mask` is True for real ones, at least one a row; others, if finite, count for nothing."""
        pooled = self.attend_folded(tokens, mask=mask) if len(self.query) == 1 else self.attend(tokens, mask=mask)
        normed: Tensor = self.norm_out(pooled)
        return normed

    def attend(
        self, tokens: Float[Tensor, "batch tokens context_dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch queries dim"]:
        """The attention layer by the book, for any number of queries, before the output norm."""
        queries = self.norm_query(self.query).expand(len(tokens), -1, -1)
        key_mask = None if mask is None else mask.unsqueeze(1)
        attended: Tensor = self.attention(queries, context=self.norm_context(tokens), mask=key_mask)
        return attended

    def attend_folded(
        self, tokens: Float[Tensor, "batch tokens context_dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch 1 dim"]:
        """Equal to `attend` for one query: to 1e-10 in float64, 1e-5 in fp32, all gradients included.

        Statistics and softmax are fp32 or more, both products in the tokens' dtype: with bf16 tokens the output is
        within twice the error that the ordinary path has under bf16 autocast (0.3 to 1.5% of the output's norm, the
        latter for sharp attention, where the rounding of a score weighs most).
        """
        # Under autocast the small matrices would be rounded to bf16 before they are folded: keep them whole.
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            pooled = folded_pool(tokens, query=self._folded_query(), mask=mask, eps=self.norm_context.eps)
            return self._folded_output(pooled.to(self.query.dtype))

    def _folded_query(self) -> Float[Tensor, "heads context_dim"]:
        """The query in the raw tokens' space, one mean-free row a head."""
        attention = self.attention
        query = attention.q_proj(self.norm_query(self.query)).view(attention.num_heads, -1)
        key_weight = attention.k_proj.weight.view(*query.shape, -1)
        folded: Tensor = torch.einsum("hd,hdc->hc", query, key_weight) * self.norm_context.weight
        folded = folded * query.shape[-1] ** -0.5
        # The key bias moves all scores alike: its gradient is zero. DDP and optimizers' states want it to be there.
        return folded - folded.mean(dim=-1, keepdim=True) + 0.0 * attention.k_proj.bias.sum()

    def _folded_output(self, pooled: Float[Tensor, "batch heads context_dim"]) -> Float[Tensor, "batch 1 dim"]:
        """Norm, value and output projection, applied to the pooled tokens instead of to every one."""
        attention = self.attention
        pooled = pooled - pooled.mean(dim=-1, keepdim=True)
        normed = pooled * self.norm_context.weight + self.norm_context.bias
        value_weight = attention.v_proj.weight.view(attention.num_heads, -1, normed.shape[-1])
        values = torch.einsum("bhc,hdc->bhd", normed, value_weight).flatten(1) + attention.v_proj.bias
        out: Tensor = attention.out_proj(values).unsqueeze(1)
        return out
