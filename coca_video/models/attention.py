"""The one attention of text decoders and poolers: multi-head, self or cross, through SDPA; its cache; and the MLP."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class KeyValueCache:
    """Keys and values of one layer's self-attention while a text grows. Room for `max_keys` is taken at the start."""

    def __init__(self, *, max_keys: int) -> None:
        self.max_keys = max_keys
        self.length = 0
        self._key: Tensor | None = None
        self._value: Tensor | None = None

    def append(
        self, key: Float[Tensor, "batch heads new head_dim"], *, value: Float[Tensor, "batch heads new head_dim"]
    ) -> tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]:
        """Puts new ones behind the others; returns views of all. The first ones decide dtype and device."""
        if self._key is None or self._value is None:
            batch, heads, _, head_dim = key.shape
            self._key = key.new_empty(batch, heads, self.max_keys, head_dim)
            self._value = value.new_empty(batch, heads, self.max_keys, head_dim)
        start, self.length = self.length, self.length + key.shape[2]
        assert self.length <= self.max_keys
        self._key[:, :, start : self.length] = key
        self._value[:, :, start : self.length] = value
        return self._key[:, :, : self.length], self._value[:, :, : self.length]

    def keep(self, rows: Int[Tensor, "kept"]) -> None:
        """Makes `rows` the whole batch, in this order."""
        assert self._key is not None and self._value is not None
        self._key, self._value = keep_rows(self._key, rows=rows), keep_rows(self._value, rows=rows)


def keep_rows(buffer: Float[Tensor, "batch *rest"], *, rows: Int[Tensor, "kept"]) -> Float[Tensor, "kept *rest"]:
    """`buffer[rows]`, at most as many, in the memory of `buffer`: only rows that change their place are copied."""
    moved = (rows != torch.arange(len(rows), device=rows.device)).nonzero().squeeze(1)
    buffer[moved] = buffer[rows[moved]]
    return buffer[: len(rows)]


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
        is_causal: bool = False,
    ) -> Float[Tensor, "batch queries dim"]:
        """Attends; `mask` is True where a query may see a key. A query that may see no key is the caller's error.

        `is_causal` lets query i see key j only where j <= i, without a mask being built; give one of the two.
        """
        key, value = self.project(x if context is None else context)
        return self.attend(x, key=key, value=value, mask=mask, is_causal=is_causal)

    def project(
        self, context: Float[Tensor, "batch keys context_dim"]
    ) -> tuple[Float[Tensor, "batch heads keys head_dim"], Float[Tensor, "batch heads keys head_dim"]]:
        """Keys and values of what is attended to, for `attend`."""
        return self._split_heads(self.k_proj(context)), self._split_heads(self.v_proj(context))

    def attend(
        self,
        x: Float[Tensor, "batch queries dim"],
        *,
        key: Float[Tensor, "batch heads keys head_dim"],
        value: Float[Tensor, "batch heads keys head_dim"],
        mask: Bool[Tensor, "#batch #queries keys"] | None = None,
        is_causal: bool = False,
    ) -> Float[Tensor, "batch queries dim"]:
        """What `forward` does after keys and values are there."""
        per_head_mask = None if mask is None else mask.unsqueeze(1)
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.q_proj(x)), key, value, attn_mask=per_head_mask, is_causal=is_causal
        )
        out: Tensor = self.out_proj(attended.transpose(1, 2).flatten(2))
        return out

    def attend_cached(
        self,
        x: Float[Tensor, "batch new dim"],
        *,
        cache: KeyValueCache,
        mask: Bool[Tensor, "#batch #new keys"] | None,
    ) -> Float[Tensor, "batch new dim"]:
        """Self-attention of new positions, whose keys and values join the cache, over all that it then holds."""
        new_key, new_value = self.project(x)
        key, value = cache.append(new_key, value=new_value)
        return self.attend(x, key=key, value=value, mask=mask)

    def _split_heads(self, x: Float[Tensor, "batch length dim"]) -> Float[Tensor, "batch heads length head_dim"]:
        heads: Tensor = x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # type: ignore[no-untyped-call]
        return heads


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
