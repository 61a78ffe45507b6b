"""What a head looks at: the shares of all tokens against attention by the book, head by head, in float64."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from coca_video.models.head import HeadConfig, VideoHead
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

DIM, HEADS, FRAMES, TOKENS, BATCH = 24, 3, 4, 5, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sincos": {"time_embedding": "sincos"},
    "learned": {"time_embedding": "learned"},
    "queries": {"num_queries": 3},
    "many-queries": {"num_queries": 20},
    "narrow": {"width": 12, "num_heads": 2},
    "blocks-1": {"num_blocks": 1, "num_queries": 2},
    "blocks-3": {"num_blocks": 3, "time_embedding": "sincos"},
}
Weights = dict[str, np.ndarray]


def make_head(**options: Any) -> VideoHead:
    """In float64, with weights so large that the shares are far from equal."""
    torch.manual_seed(0)
    head = VideoHead(HeadConfig(**options), dim=DIM, num_heads=HEADS, num_classes=2, num_frames=FRAMES)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return head.double().eval()


def make_tokens() -> Tensor:
    """Not centred: the layer norm has something to take away."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(BATCH, FRAMES, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return tokens + 3 * torch.randn(BATCH, FRAMES, TOKENS, 1, generator=generator, dtype=torch.float64)


def make_mask() -> Tensor:
    mask = torch.ones(BATCH, FRAMES, dtype=torch.bool)
    mask[1, 1:] = False
    mask[2, 0] = False
    return mask


def norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def shares(query: np.ndarray, key: np.ndarray, *, num_heads: int) -> np.ndarray:
    """The softmax of each head of each query, their mean."""
    size, total = query.shape[-1] // num_heads, np.zeros(len(key))
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(query)):
            scores = np.exp(key[:, part] @ query[row, part] / np.sqrt(size))
            total += scores / scores.sum()
    return total / (num_heads * len(query))


def by_the_book(head: VideoHead, tokens: np.ndarray) -> np.ndarray:
    """[visible tokens] of one clip, whose hidden tokens have been left out."""
    weights = {name: value.numpy() for name, value in head.pooler.state_dict().items()}
    config = head.config
    num_heads = HEADS if config.num_heads is None else config.num_heads
    if config.num_blocks == 0:
        query = linear(norm(weights["query"], weights, "norm_query"), weights, "attention.q_proj")
        key = linear(norm(tokens, weights, "norm_context"), weights, "attention.k_proj")
        return shares(query, key, num_heads=num_heads)
    blocks = head.pooler.layers
    mixed = torch.from_numpy(tokens)[None]  # the blocks themselves are checked in test_blocks.py
    for block in blocks:
        mixed = block(mixed, mask=None)
    key = linear(norm(mixed[0].detach().numpy(), weights, "cross.norm_context"), weights, "cross.attention.k_proj")
    return shares(linear(weights["query"], weights, "cross.attention.q_proj"), key, num_heads=num_heads)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", OPTIONS)
def test_shares_equal_attention_by_the_book(name: str, masked: bool) -> None:
    head, tokens = make_head(**OPTIONS[name]), make_tokens()
    mask = make_mask() if masked else None
    with torch.no_grad():
        found = head.attention(tokens, mask=mask)
    assert found is not None and found.shape == (BATCH, FRAMES, TOKENS)
    for clip in range(BATCH):
        real = torch.ones(FRAMES, dtype=torch.bool) if mask is None else mask[clip]
        visible = tokens[clip, real]
        if head.time_embedding is not None:
            visible = visible + head.time_embedding(visible[None], mask=None)[0].unsqueeze(1)
        expected = by_the_book(head, visible.detach().flatten(0, 1).numpy())
        assert expected.max() > 1.5 * expected.min()
        assert found[clip, real].flatten().tolist() == pytest.approx(expected.tolist(), abs=1e-12)
        assert not found[clip, ~real].any()
        assert float(found[clip].sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("name", ["paper", "narrow"])
def test_shares_are_those_that_the_head_pools_by(name: str) -> None:
    """With one head each: the pooled token is the sum of the values, weighted by the shares."""
    head = make_head(**{**OPTIONS[name], "num_heads": 1})
    tokens = make_tokens()
    found = head.attention(tokens)
    assert found is not None
    pooler = head.pooler
    values = pooler.attention.v_proj(pooler.norm_context(tokens.flatten(1, 2)))
    pooled = pooler.norm_out(pooler.attention.out_proj((found.flatten(1).unsqueeze(-1) * values).sum(dim=1)))
    torch.testing.assert_close(head.classifier(pooled), head(tokens), rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", OPTIONS)
def test_half_precision_tokens_are_weighed_in_fp32(name: str) -> None:
    """Equal to the same bf16 numbers in float64 to what fp32 rounds."""
    head, tokens = make_head(**OPTIONS[name]), make_tokens().bfloat16()
    if head.time_embedding is not None:
        tokens = make_tokens().float().bfloat16().float()  # the sum with an embedding is rounded as the tokens are
    expected = head.attention(tokens.double())
    found = head.float().attention(tokens)
    assert found is not None and expected is not None and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=5e-6)


def test_a_mean_looks_at_nothing_more_than_at_the_rest() -> None:
    assert make_head(pooling="mean").attention(make_tokens()) is None


def test_each_layer_of_the_encoder_has_its_own_shares() -> None:
    """The tokens of two layers stand side by side, and both are looked at."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(
        image=VitConfig.tiny(), num_classes=2, num_frames=2, head=HeadConfig(encoder_layers=(0, -1))
    )
    model = VideoClassifier(config).eval()
    with torch.no_grad():
        model.head.pooler.query.add_(torch.randn_like(model.head.pooler.query))
        model.head.pooler.attention.k_proj.weight.mul_(4)
        tokens = model.encode(torch.randn(1, 2, 3, 48, 48))
        both = model.head.attention(tokens)
        assert both is not None and both.shape == (1, 2, 72)
        weights = {name: value.double().numpy() for name, value in model.head.pooler.state_dict().items()}
    assert 0.2 < float(both[:, :, :36].sum()) < 0.8
    query = linear(norm(weights["query"], weights, "norm_query"), weights, "attention.q_proj")
    key = linear(norm(tokens[0].double().flatten(0, 1).numpy(), weights, "norm_context"), weights, "attention.k_proj")
    assert both.flatten().tolist() == pytest.approx(shares(query, key, num_heads=3).tolist(), abs=1e-6)
