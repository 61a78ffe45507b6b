"""The attentive pooler of several blocks against its published description, written out in numpy in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from coca_video.models.blocks import AttentivePooler

DIM, HEADS = 24, 3
Weights = dict[str, np.ndarray]


def make_pooler(*, depth: int, num_queries: int) -> AttentivePooler:
    torch.manual_seed(depth)
    pooler = AttentivePooler(DIM, num_heads=HEADS, num_queries=num_queries, depth=depth)
    with torch.no_grad():
        for parameter in pooler.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return pooler.double()


def norm(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def linear(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mlp(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    hidden = linear(x, weights, f"{name}.0")
    erf = torch.erf(torch.from_numpy(hidden) / 2**0.5).numpy()
    return linear(hidden * (1 + erf) / 2, weights, f"{name}.2")


def attention(x: np.ndarray, context: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """Head by head, query by query."""
    query, key, value = (
        linear(source, weights, f"{name}.{kind}_proj") for source, kind in ((x, "q"), (context, "k"), (context, "v"))
    )
    out = np.zeros_like(query)
    size = DIM // HEADS
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        for row in range(len(query)):
            scores = np.exp(key[:, part] @ query[row, part] / np.sqrt(size))
            out[row, part] = scores / scores.sum() @ value[:, part]
    return out


def published(tokens: np.ndarray, weights: Weights, *, depth: int) -> np.ndarray:
    """One clip: depth - 1 pre-norm blocks, then queries, which have no norm, over normalised tokens, and an MLP."""
    for block in range(depth - 1):
        name = f"layers.{block}"
        normed = norm(tokens, weights, f"{name}.norm_self")
        seen = attention(normed, normed, weights, f"{name}.attention")
        tokens = tokens + linear(seen, weights, f"{name}.attention.out_proj")
        tokens = tokens + mlp(norm(tokens, weights, f"{name}.norm_mlp"), weights, f"{name}.mlp")
    query = weights["query"]
    query = query + attention(query, norm(tokens, weights, "cross.norm_context"), weights, "cross.attention")
    return query + mlp(norm(query, weights, "cross.norm_mlp"), weights, "cross.mlp")


@pytest.mark.parametrize("depth", [1, 2, 4])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_equals_the_published_description(depth: int, num_queries: int) -> None:
    pooler = make_pooler(depth=depth, num_queries=num_queries)
    weights = {name: value.numpy() for name, value in pooler.state_dict().items()}
    tokens = torch.randn(2, 7, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[1, [1, 4]] = False
    pooled = pooler(tokens, mask=mask).detach()
    assert pooled.shape == (2, num_queries, DIM)
    for clip in range(2):
        expected = published(tokens[clip][mask[clip]].numpy(), weights, depth=depth)
        np.testing.assert_allclose(pooled[clip].numpy(), expected, rtol=1e-9, atol=1e-10)


def test_every_weight_is_used_and_named_in_the_description() -> None:
    """A published block has 12 tensors and 12 d^2 weights; the last one has no output projection: 11 d^2."""
    pooler = make_pooler(depth=3, num_queries=1)
    pooler(torch.randn(1, 5, DIM, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in pooler.parameters())
    matrices = sum(parameter.numel() for name, parameter in pooler.named_parameters() if parameter.ndim == 2)
    assert matrices == 2 * 12 * DIM**2 + 11 * DIM**2 + DIM


def test_initial_deviations() -> None:
    """0.02, and less by sqrt(2 i) for what ends a residual branch of block i."""
    torch.manual_seed(0)
    pooler = AttentivePooler(384, num_heads=6, num_queries=1, depth=4)

    def deviation(weight: Tensor) -> float:
        return float(weight.detach().std())

    for number, block in enumerate(pooler.layers, start=1):
        assert deviation(block.attention.q_proj.weight) == pytest.approx(0.02, rel=0.02)
        assert deviation(block.mlp[0].weight) == pytest.approx(0.02, rel=0.02)
        for weight in (block.attention.out_proj.weight, block.mlp[2].weight):
            assert deviation(weight) == pytest.approx(0.02 / (2 * number) ** 0.5, rel=0.02)
    assert deviation(pooler.cross.mlp[2].weight) == pytest.approx(0.02 / 6**0.5, rel=0.02)
    assert deviation(pooler.cross.attention.v_proj.weight) == pytest.approx(0.02, rel=0.02)
