"""What makes class scores of a clip's tokens: by default CoCa's single learned query and one linear layer."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.blocks import AttentivePooler
from coca_video.models.coca import CoCa
from coca_video.models.pooler import AttentionalPooler, fold_key, pool_folded, stacked_linear
from coca_video.models.time_embedding import TimeEmbedding


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a probe. The defaults are the paper's (CoCa section 3.3): one query, which sees no order."""

    pooling: Literal["query", "mean"] = "query"
    """Learned queries attend over all tokens; or the mean of all tokens, normalised: linear evaluation."""
    time_embedding: Literal["none", "learned", "sincos"] = "none"
    """Added to the tokens of each frame, so that the order of frames counts (arXiv 2503.24298)."""
    num_queries: int = 1
    """Their outputs stand side by side before the linear layer."""
    num_blocks: int = 0
    """0: the paper's pooler. k: V-JEPA 2's attentive classifier of depth k: k - 1 self-attention blocks over all
    tokens, then a cross-attention block, all with an MLP. Depth 4 costs some 900 times the paper's pooler."""
    encoder_layers: tuple[int, ...] = ()
    """The encoder's last layer when empty; else the outputs of these blocks (from 0; -1 is the last), each through the
    encoder's final norm, as more tokens of the frame."""
    width: int | None = None
    """Of the pooler's output (pooling query, num_blocks 0); the encoder's when None."""
    num_heads: int | None = None
    """Of the pooler's attention; the encoder's when None."""

    def __post_init__(self) -> None:
        for name, least in (("num_queries", 1), ("num_blocks", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--head.{name.replace('_', '-')} must be {least} or more; got {getattr(self, name)}.")
        if self.pooling == "mean":
            self._refuse("pooling mean", defaults=("num_queries", "num_blocks", "time_embedding", "width", "num_heads"))
        if self.num_blocks > 0:
            self._refuse("num_blocks above 0", defaults=("width",))

    def _refuse(self, choice: str, *, defaults: tuple[str, ...]) -> None:
        """ValueError for an option that would have no effect."""
        for name in defaults:
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"A head with {choice} has no use for {name}; got {getattr(self, name)}: leave it out."
                )


class MeanPooler(nn.Module):
    """The layer norm of the mean token."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch 1 dim"]:
        """`mask` is True for real tokens; others, if finite, count for nothing."""
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        if mask is None:
            mean = tokens.mean(dim=1, dtype=dtype)
        else:
            mean = (tokens * mask.unsqueeze(-1)).sum(dim=1, dtype=dtype) / mask.sum(dim=1, keepdim=True)
        normed: Tensor = self.norm(mean.to(self.norm.weight.dtype)).unsqueeze(1)
        return normed


class VideoHead(nn.Module):
    """Tokens of all frames to class scores.

    A constant added to a token (to all its features) changes no score: every path begins with a layer norm.
    """

    def __init__(self, config: HeadConfig, *, dim: int, num_heads: int, num_classes: int, num_frames: int) -> None:
        super().__init__()
        self.config = config
        self.num_frames = num_frames
        self.time_embedding: TimeEmbedding | None = None
        if config.time_embedding != "none":
            self.time_embedding = TimeEmbedding(dim, kind=config.time_embedding, num_frames=num_frames)
        width = dim if config.width is None else config.width
        self.pooler = _build_pooler(config, dim=dim, num_heads=num_heads)
        self.classifier = nn.Linear(config.num_queries * width, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        tokens: Float[Tensor, "batch frames tokens dim"],
        *,
        mask: Bool[Tensor, "batch frames"] | None = None,
        variance: Float[Tensor, "batch frames tokens"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Tokens to logits; `mask` is True for real frames.

        `variance` says that the tokens are mean-free, and what the variance of each over its features is: the row
        statistics are not computed then.
        """
        return stacked_logits([self], tokens, mask=mask, variance=variance).squeeze(0)

    def attention(
        self,
        tokens: Float[Tensor, "batch frames tokens dim"],
        *,
        mask: Bool[Tensor, "batch frames"] | None = None,
    ) -> Float[Tensor, "batch frames tokens"] | None:
        """The share of each token in what is pooled, mean over heads and queries; those of a clip sum to 1.

        `mask` is True for real frames; others have 0. None for pooling mean, where nothing is looked at more.
        """
        if isinstance(self.pooler, MeanPooler):
            return None
        if self.time_embedding is not None:
            tokens, _ = _add_time(tokens, embedding=self.time_embedding, mask=mask, variance=None)
        flat, token_mask = _as_one_set(tokens, mask=mask)
        shares = self.pooler.attention_weights(flat.to(self.pooler.query.dtype), mask=token_mask)
        return shares.view(tokens.shape[:3])


def stacked_logits(
    heads: Sequence[VideoHead],
    tokens: Float[Tensor, "batch frames tokens dim"],
    *,
    mask: Bool[Tensor, "batch frames"] | None = None,
    variance: Float[Tensor, "batch frames tokens"] | None = None,
) -> Float[Tensor, "heads batch classes"]:
    """The logits of several heads on the same tokens, equal to those of each alone.

    Heads whose poolers are folded and of one shape, with the same fixed time embedding or none, share one read of the
    tokens: `pool_folded`. The others run one by one.
    """
    groups: dict[object, list[int]] = {}
    for index, head in enumerate(heads):
        groups.setdefault(_share_key(head, index=index), []).append(index)
    parts: list[Tensor] = []
    for indices in groups.values():
        together = [heads[index] for index in indices]
        pooled = _pool(together, tokens=tokens, mask=mask, variance=variance).flatten(2)
        parts.append(stacked_linear(pooled, layers=[head.classifier for head in together]))
    if len(parts) == 1:
        return parts[0]
    rows = dict(zip(itertools.chain(*groups.values()), torch.cat(parts), strict=True))
    return torch.stack([rows[index] for index in range(len(heads))])


def _build_pooler(config: HeadConfig, *, dim: int, num_heads: int) -> AttentionalPooler | AttentivePooler | MeanPooler:
    num_heads = num_heads if config.num_heads is None else config.num_heads
    if config.pooling == "mean":
        return MeanPooler(dim)
    if config.num_blocks > 0:
        return AttentivePooler(dim, num_heads=num_heads, num_queries=config.num_queries, depth=config.num_blocks)
    width = dim if config.width is None else config.width
    return AttentionalPooler(width, num_heads=num_heads, num_queries=config.num_queries, context_dim=dim)


def _folds(pooler: AttentionalPooler) -> bool:
    """Folded, k queries cost 8 N d H k operations in place of 12 N d^2: less up to k = 1.5 head dimensions."""
    return len(pooler.query) * pooler.attention.num_heads <= pooler.query.shape[1]


def _share_key(head: VideoHead, *, index: int) -> object:
    """Equal for heads that share a read of the tokens."""
    pooler = head.pooler
    if not isinstance(pooler, AttentionalPooler) or not _folds(pooler) or head.config.time_embedding == "learned":
        return index
    fixed_time = None if head.time_embedding is None else head.num_frames
    return fold_key(pooler), fixed_time, head.classifier.out_features


def _pool(
    heads: Sequence[VideoHead],
    *,
    tokens: Float[Tensor, "batch frames tokens dim"],
    mask: Bool[Tensor, "batch frames"] | None,
    variance: Float[Tensor, "batch frames tokens"] | None,
) -> Float[Tensor, "heads batch queries width"]:
    """What the poolers of heads of one `_share_key` give."""
    first = heads[0]
    if first.time_embedding is not None:
        tokens, variance = _add_time(tokens, embedding=first.time_embedding, mask=mask, variance=variance)
    flat, token_mask = _as_one_set(tokens, mask=mask)
    pooler = first.pooler
    if isinstance(pooler, AttentionalPooler) and _folds(pooler):
        poolers = [head.pooler for head in heads if isinstance(head.pooler, AttentionalPooler)]
        flat_variance = None if variance is None else variance.flatten(1)
        return pool_folded(poolers, tokens=flat, mask=token_mask, variance=flat_variance)
    if not isinstance(pooler, MeanPooler):
        flat = flat.to(pooler.query.dtype)
    pooled: Tensor = pooler(flat, mask=token_mask)
    return pooled.unsqueeze(0)


def _as_one_set(
    tokens: Float[Tensor, "batch frames tokens dim"], *, mask: Bool[Tensor, "batch frames"] | None
) -> tuple[Float[Tensor, "batch set dim"], Bool[Tensor, "batch set"] | None]:
    """The tokens of all frames side by side, and which of them are of real frames."""
    return tokens.flatten(1, 2), None if mask is None else mask.repeat_interleave(tokens.shape[2], dim=1)


def _add_time(
    tokens: Float[Tensor, "batch frames tokens dim"],
    *,
    embedding: TimeEmbedding,
    mask: Bool[Tensor, "batch frames"] | None,
    variance: Float[Tensor, "batch frames tokens"] | None,
) -> tuple[Float[Tensor, "batch frames tokens dim"], Float[Tensor, "batch frames tokens"] | None]:
    """The tokens with their frame's embedding; mean-free ones stay so, and get the variance of the sum."""
    added = embedding(tokens, mask=mask)
    if variance is not None:
        added = added - added.mean(dim=-1, keepdim=True)
    tokens = tokens + added.unsqueeze(2).to(tokens.dtype)
    if variance is not None:
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        variance = torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=dtype).square() / tokens.shape[-1]
    return tokens, variance


def contrastive_head(config: HeadConfig, *, coca: CoCa) -> HeadConfig:
    """`config` with the width and heads of CoCa's contrastive pooler, for `start_from_contrastive_pooler`."""
    pooler = _contrastive_pooler(coca)
    return replace(config, width=pooler.query.shape[1], num_heads=pooler.attention.num_heads)


@torch.no_grad()
def start_from_contrastive_pooler(head: VideoHead, *, coca: CoCa) -> None:
    """Copies the pooler whose output is CoCa's image embedding into `head`, whose classifier stays as it is.

    That is the contrastive pooler of parallel poolers, and the first query of open_clip's one pooler, which also saw
    the class token where the encoder has one. VideoCoCa (2212.04979) finds that the poolers work unchanged on the
    tokens of all frames. ValueError for cascaded poolers and for a head of another shape.
    """
    theirs, ours = _contrastive_pooler(coca), head.pooler
    if not isinstance(ours, AttentionalPooler) or len(ours.query) != 1:
        raise ValueError("Expected a head with one query and no blocks to start from CoCa's contrastive pooler.")
    shapes = [(pooler.query.shape[1], pooler.attention.num_heads) for pooler in (theirs, ours)]
    if shapes[0] != shapes[1]:
        (width, heads), (our_width, our_heads) = shapes
        raise ValueError(
            f"This CoCa's contrastive pooler has width {width} and {heads} heads, which the head must have too; got "
            f"width {our_width} and {our_heads} heads: build it from contrastive_head(config, coca=coca)."
        )
    weights = theirs.state_dict()
    ours.load_state_dict({**weights, "query": weights["query"][:1]})


def _contrastive_pooler(coca: CoCa) -> AttentionalPooler:
    """The pooler over the encoder's tokens whose first query gives the embedding."""
    match coca.config.poolers:
        case "parallel":
            assert coca.contrastive_pooler is not None
            return coca.contrastive_pooler
        case "open_clip":
            return coca.generative_pooler
        case "cascade":
            raise ValueError(
                "This CoCa's contrastive pooler pools the generative pooler's output (poolers cascade), not the "
                "encoder's tokens, so that no head can start from it: take init_pooler random."
            )
