"""Attentional pooling (CoCa section 3.2): learned queries attend over tokens. One query is pooled folded, without keys.

models/pooler_fold.py states the fold. Parameters and state dict are those of the ordinary module on both paths.
Several poolers over the same tokens are folded side by side: their queries are the rows of one product, and their small
matrices are stacked inside the forward, so that parameters, and their optimizers, stay apart.
"""

from collections.abc import Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.attention import Attention, init_linear_layers
from coca_video.models.pooler_fold import folded_pool

ModuleT = TypeVar("ModuleT", bound=nn.Module)


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
        self,
        tokens: Float[Tensor, "batch tokens context_dim"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        variance: Float[Tensor, "batch tokens"] | None = None,
    ) -> Float[Tensor, "batch queries dim"]:
        """Equal to `attend`: to 1e-10 in float64, 1e-5 in fp32, all gradients included. Cheaper for few queries.

        `variance` as in `folded_pool`. Statistics and softmax are fp32 or more, both products in the tokens' dtype:
        with bf16 tokens the output is within twice the error that the ordinary path has under bf16 autocast (0.3 to
        1.5% of the output's norm, the latter for sharp attention, where the rounding of a score weighs most).
        """
        return _attend_folded([self], tokens=tokens, mask=mask, variance=variance).squeeze(0)

    def attention_weights(
        self, tokens: Float[Tensor, "batch tokens context_dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch tokens"]:
        """The share of each token in what is pooled, mean over heads and queries; the shares of a row sum to 1.

        By the folded queries, without keys, for any number of queries. At least fp32, whatever the tokens are.
        """
        dtype = torch.promote_types(tokens.dtype, self.query.dtype)
        with torch.autocast(device_type=tokens.device.type, enabled=False):
            query = _folded_queries([self]).flatten(0, 2).to(dtype)
            # The gain is folded into the queries, and the bias moves all scores of a query alike.
            normed = F.layer_norm(tokens.to(dtype), tokens.shape[-1:], eps=self.norm_context.eps)
            return mean_shares((normed @ query.T).transpose(1, 2), mask=mask)


def mean_shares(
    scores: Float[Tensor, "batch rows tokens"], *, mask: Bool[Tensor, "batch tokens"] | None
) -> Float[Tensor, "batch tokens"]:
    """The softmax of each row (a head of a query) over the tokens that `mask` does not hide, mean over the rows."""
    visible = scores if mask is None else scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    return visible.softmax(dim=-1).mean(dim=1)


def pool_folded(
    poolers: Sequence[AttentionalPooler],
    *,
    tokens: Float[Tensor, "batch tokens context_dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    variance: Float[Tensor, "batch tokens"] | None = None,
) -> Float[Tensor, "poolers batch queries dim"]:
    """What each pooler gives of the same tokens, which are read once for all. The poolers are of one shape."""
    pooled = _attend_folded(poolers, tokens=tokens, mask=mask, variance=variance)
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        return _norm(pooled, norms=[pooler.norm_out for pooler in poolers])


def fold_key(pooler: AttentionalPooler) -> tuple[object, ...]:
    """Equal for poolers that `pool_folded` takes together."""
    shapes = tuple((name, tensor.shape) for name, tensor in pooler.named_parameters())
    return pooler.attention.num_heads, *(norm.eps for norm in _norms(pooler)), *shapes


def _norms(pooler: AttentionalPooler) -> tuple[nn.LayerNorm, nn.LayerNorm, nn.LayerNorm]:
    return pooler.norm_query, pooler.norm_context, pooler.norm_out


def _attend_folded(
    poolers: Sequence[AttentionalPooler],
    *,
    tokens: Float[Tensor, "batch tokens context_dim"],
    mask: Bool[Tensor, "batch tokens"] | None,
    variance: Float[Tensor, "batch tokens"] | None,
) -> Float[Tensor, "poolers batch queries dim"]:
    """The attention layers, before the output norms: one `folded_pool` with the rows of all."""
    eps, batches = poolers[0].norm_context.eps, _batches(poolers, device=tokens.device)
    # Under autocast the small matrices would be rounded to bf16 before they are folded: keep them whole.
    with torch.autocast(device_type=tokens.device.type, enabled=False):
        query = torch.cat([_folded_queries(batch) for batch in batches])
        pooled = folded_pool(tokens, query=query.flatten(0, 2), mask=mask, eps=eps, variance=variance)
        pooled = pooled.to(query.dtype).view(len(pooled), *query.shape)
        parts = pooled.split([len(batch) for batch in batches], dim=1)  # type: ignore[no-untyped-call]
        return torch.cat([_folded_outputs(batch, pooled=part) for batch, part in zip(batches, parts, strict=True)])


def _batches(modules: Sequence[ModuleT], *, device: torch.device) -> list[Sequence[ModuleT]]:
    """The modules whose matrices are stacked: all of them where each call to the device costs, none on the CPU.

    There, copies of the matrices and of their gradients took 33 of the 72 ms a clip of 20 poolers at a batch of 8.
    """
    return [[module] for module in modules] if device.type == "cpu" else [modules]


def _folded_queries(poolers: Sequence[AttentionalPooler]) -> Float[Tensor, "poolers queries heads context_dim"]:
    """The queries in the raw tokens' space, one mean-free row a head."""
    attentions = [pooler.attention for pooler in poolers]
    num_heads = attentions[0].num_heads
    query = _norm(_stack([pooler.query for pooler in poolers]), norms=[pooler.norm_query for pooler in poolers])
    query = _linear(query, layers=[attention.q_proj for attention in attentions])
    query = query.view(*query.shape[:2], num_heads, -1)
    key_weight = _stack([attention.k_proj.weight for attention in attentions])
    key_weight = key_weight.view(len(poolers), num_heads, query.shape[-1], -1)
    gain = _stack([pooler.norm_context.weight for pooler in poolers]) * query.shape[-1] ** -0.5
    folded: Tensor = torch.einsum("pqhd,phdc->pqhc", query, key_weight) * gain[:, None, None]
    # The key bias moves all scores alike: its gradient is zero. DDP and optimizers' states want it to be there.
    # (A sum for each pooler: one that has diverged must not reach the others.)
    unused = 0.0 * _stack([attention.k_proj.bias for attention in attentions]).sum(dim=1)
    return folded - folded.mean(dim=-1, keepdim=True) + unused[:, None, None, None]


def _folded_outputs(
    poolers: Sequence[AttentionalPooler], *, pooled: Float[Tensor, "batch poolers queries heads context_dim"]
) -> Float[Tensor, "poolers batch queries dim"]:
    """Norm, value and output projection, applied to the pooled tokens instead of to every one."""
    attentions = [pooler.attention for pooler in poolers]
    gain, bias = (_stack([getattr(p.norm_context, name) for p in poolers]) for name in ("weight", "bias"))
    pooled = pooled - pooled.mean(dim=-1, keepdim=True)
    normed = pooled * gain[:, None, None] + bias[:, None, None]
    value_weight = _stack([attention.v_proj.weight for attention in attentions])
    value_weight = value_weight.view(len(poolers), pooled.shape[3], -1, pooled.shape[-1])
    values = torch.einsum("bpqhc,phdc->pbqhd", normed, value_weight).flatten(3)
    values = values + _stack([attention.v_proj.bias for attention in attentions])[:, None, None]
    return _linear(values, layers=[attention.out_proj for attention in attentions])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape along a new first axis; a single one is not copied."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def stacked_linear(
    x: Float[Tensor, "layers *rows dim_in"], *, layers: Sequence[nn.Linear]
) -> Float[Tensor, "layers *rows dim_out"]:
    """Each layer on its own part of `x`."""
    batches = _batches(layers, device=x.device)
    parts = x.split([len(batch) for batch in batches])  # type: ignore[no-untyped-call]
    return torch.cat([_linear(part, layers=batch) for part, batch in zip(parts, batches, strict=True)])


def _linear(
    x: Float[Tensor, "layers *rows dim_in"], *, layers: Sequence[nn.Linear]
) -> Float[Tensor, "layers *rows dim_out"]:
    """`stacked_linear` as one batched product."""
    flat = x.flatten(1, -2)
    weight, bias = _stack([layer.weight for layer in layers]), _stack([layer.bias for layer in layers])
    out: Tensor = torch.baddbmm(bias.unsqueeze(1), flat, weight.transpose(1, 2))
    return out.view(*x.shape[:-1], -1)


def _norm(x: Float[Tensor, "norms *rows dim"], *, norms: Sequence[nn.LayerNorm]) -> Float[Tensor, "norms *rows dim"]:
    """Each layer norm on its own part of `x`."""
    flat = F.layer_norm(x.flatten(1, -2), x.shape[-1:], eps=norms[0].eps)
    weight, bias = _stack([norm.weight for norm in norms]), _stack([norm.bias for norm in norms])
    return (flat * weight.unsqueeze(1) + bias.unsqueeze(1)).view(x.shape)
