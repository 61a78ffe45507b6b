"""The head: several of them on one read of the tokens, mean-free tokens with their variance, and every option."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_video.config import from_json, to_json
from coca_video.models import pooler
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.head import (
    HeadConfig,
    VideoHead,
    contrastive_head,
    stacked_logits,
    start_from_contrastive_pooler,
)

DIM, HEADS, CLASSES, FRAMES, TOKENS, BATCH = 48, 3, 5, 4, 6, 3
OPTIONS: dict[str, dict[str, Any]] = {
    "paper": {},
    "sincos": {"time_embedding": "sincos"},
    "learned": {"time_embedding": "learned"},
    "queries": {"num_queries": 3},
    "many-queries": {"num_queries": 20},
    "narrow": {"width": 24, "num_heads": 2},
    "mean": {"pooling": "mean"},
    "blocks-1": {"num_blocks": 1, "num_queries": 2},
    "blocks-3": {"num_blocks": 3, "time_embedding": "sincos"},
}


def make_head(seed: int, *, num_frames: int = FRAMES, **options: Any) -> VideoHead:
    """In float64, all weights away from their initial zeros and ones."""
    torch.manual_seed(seed)
    config = HeadConfig(**options)
    head = VideoHead(config, dim=DIM, num_heads=HEADS, num_classes=CLASSES, num_frames=num_frames)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return head.double()


def make_tokens(*, num_frames: int = FRAMES, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    tokens = torch.randn(BATCH, num_frames, TOKENS, DIM, generator=generator, dtype=torch.float64)
    return (tokens + torch.randn(BATCH, num_frames, TOKENS, 1, generator=generator, dtype=torch.float64)).to(dtype)


def make_mask(*, num_frames: int = FRAMES) -> Tensor:
    mask = torch.ones(BATCH, num_frames, dtype=torch.bool)
    mask[1, 1:] = False
    mask[2, 0] = False
    return mask


def mean_free(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens without their means, and the variance of each, as a token cache gives them."""
    return tokens - tokens.mean(dim=-1, keepdim=True), tokens.var(dim=-1, correction=0)


def gradients(logits: Tensor, heads: list[VideoHead]) -> list[dict[str, Tensor]]:
    weight = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for head in heads:
        head.zero_grad()
    (logits * weight.to(logits.dtype)).sum().backward()
    return [{name: p.grad.clone() for name, p in head.named_parameters() if p.grad is not None} for head in heads]


@pytest.fixture(params=["cpu", "accelerator"])
def stacking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way of a CPU, and that of a GPU: matrices one by one, and stacked."""
    if request.param == "accelerator":
        monkeypatch.setattr(pooler, "_batches", lambda modules, **_: [modules])
    return str(request.param)


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(("centred", "num_frames"), [(False, FRAMES), (True, 7)], ids=["raw-4", "mean-free-7"])
def test_stacked_heads_equal_each_alone(masked: bool, centred: bool, num_frames: int) -> None:
    """Outputs and all gradients in float64, heads of all kinds mixed, three of each."""
    heads = [make_head(seed, **options) for seed in range(3) for options in OPTIONS.values()]
    tokens, variance = (
        mean_free(make_tokens(num_frames=num_frames)) if centred else (make_tokens(num_frames=num_frames), None)
    )
    mask = make_mask(num_frames=num_frames) if masked else None
    stacked = stacked_logits(heads, tokens, mask=mask, variance=variance)
    assert stacked.shape == (len(heads), BATCH, CLASSES)
    found = gradients(stacked, heads)
    alone = torch.stack([head(tokens, mask=mask, variance=variance) for head in heads])
    expected = gradients(alone, heads)
    torch.testing.assert_close(stacked, alone, rtol=0, atol=1e-10)
    for ours, theirs, head in zip(found, expected, heads, strict=True):
        assert ours.keys() == theirs.keys() == {name for name, _ in head.named_parameters()}
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-9, atol=1e-10, msg=name)
    assert (alone[0] - alone[1:]).abs().amax(dim=(1, 2)).min() > 1e-3  # the heads do differ


def test_stacked_heads_read_the_tokens_once_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve heads: those without time, those with sines of 4 frames and those of 8 frames are three reads."""
    rows: list[int] = []
    original = pooler.folded_pool
    monkeypatch.setattr(pooler, "folded_pool", lambda x, **k: rows.append(len(k["query"])) or original(x, **k))
    heads = [make_head(seed) for seed in range(6)]
    heads += [make_head(seed, time_embedding="sincos", num_frames=n) for n in (4, 8) for seed in range(3)]
    stacked_logits(heads, make_tokens())
    assert rows == [6 * HEADS, 3 * HEADS, 3 * HEADS]


@pytest.mark.usefixtures("stacking")
def test_a_head_that_diverged_does_not_reach_the_others() -> None:
    """Infinite weights in one of three: the others' scores and gradients are to the bit what they were."""
    heads, tokens = [make_head(seed) for seed in range(3)], make_tokens()
    before = stacked_logits(heads, tokens)
    expected = gradients(before, heads)
    with torch.no_grad():
        for parameter in heads[1].parameters():
            parameter.fill_(float("inf"))
    after = stacked_logits(heads, tokens)
    found = gradients(after, heads)
    assert bool(after[1].isnan().all())
    for index in (0, 2):
        assert torch.equal(after[index], before[index])
        assert all(torch.equal(found[index][name], expected[index][name]) for name in expected[index])


@pytest.mark.usefixtures("stacking")
@pytest.mark.parametrize("autocast", [False, True])
def test_stacked_heads_in_bf16_equal_each_alone(autocast: bool) -> None:
    """fp32 weights and bf16 tokens; to one rounding of a logit (of size 1 to 4) where autocast makes logits bf16."""
    heads = [make_head(seed).float() for seed in range(4)]
    tokens = make_tokens(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        stacked, alone = stacked_logits(heads, tokens), torch.stack([head(tokens) for head in heads])
    assert stacked.dtype == alone.dtype == (torch.bfloat16 if autocast else torch.float32)
    torch.testing.assert_close(stacked, alone, rtol=2**-7 if autocast else 1e-5, atol=2**-7 if autocast else 1e-5)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_mean_free_tokens_with_variance_equal_raw_ones(options: dict[str, Any], masked: bool) -> None:
    """Scores and the gradients of every weight."""
    head, mask = make_head(0, **options), make_mask() if masked else None
    tokens, variance = mean_free(make_tokens())
    raw, centred = head(make_tokens(), mask=mask), head(tokens, mask=mask, variance=variance)
    torch.testing.assert_close(centred, raw, rtol=1e-9, atol=1e-10)
    (expected,), (found,) = gradients(raw, [head]), gradients(centred, [head])
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-8, atol=1e-9, msg=name)


def test_the_variance_given_is_the_one_used() -> None:
    """Four times the variance is half the token (eps apart): so no statistics are computed beside it."""
    head = make_head(0)
    tokens, variance = mean_free(make_tokens())
    halved = make_head(0)
    with torch.no_grad():
        halved.pooler.norm_context.weight /= 2
    torch.testing.assert_close(head(tokens, variance=4 * variance), halved(tokens), rtol=1e-4, atol=1e-4)
    assert (head(tokens, variance=4 * variance) - head(tokens)).abs().max() > 1e-2


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_order_of_frames_counts_only_with_a_time_embedding(options: dict[str, Any]) -> None:
    head, tokens = make_head(0, **options), make_tokens()
    difference = (head(tokens) - head(tokens.flip(1))).abs().max()
    assert difference > 1e-2 if "time_embedding" in options else difference < 1e-10


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("real", [[0, 1], [1, 3]], ids=["first", "scattered"])
def test_masked_frames_count_for_nothing(options: dict[str, Any], real: list[int]) -> None:
    """Real frames are counted by themselves, also in time: a padded clip equals the short one."""
    head, tokens = make_head(0, **options), make_tokens()
    mask = torch.zeros(BATCH, FRAMES, dtype=torch.bool)
    mask[:, real] = True
    torch.testing.assert_close(head(tokens, mask=mask), head(tokens[:, real]), rtol=1e-9, atol=1e-10)


def test_the_pooler_by_the_book() -> None:
    """The paper's pooler and several queries against the ordinary attention and a linear layer."""
    for options in ({}, {"num_queries": 3}, {"num_queries": 20}, {"width": 24, "num_heads": 2}):
        head, tokens = make_head(0, **options), make_tokens()
        pooled = head.pooler.norm_out(head.pooler.attend(tokens.flatten(1, 2))).flatten(1)
        expected = pooled @ head.classifier.weight.T + head.classifier.bias
        torch.testing.assert_close(head(tokens), expected, rtol=1e-9, atol=1e-10)


def test_mean_pooling_by_the_book() -> None:
    """The norm of the mean over real tokens, written out."""
    head, tokens, mask = make_head(0, pooling="mean"), make_tokens(), make_mask()
    for index in range(BATCH):
        mean = tokens[index][mask[index]].reshape(-1, DIM).mean(dim=0)
        normed = (mean - mean.mean()) / (mean.var(correction=0) + 1e-5).sqrt()
        normed = normed * head.pooler.norm.weight + head.pooler.norm.bias
        expected = head.classifier.weight @ normed + head.classifier.bias
        torch.testing.assert_close(head(tokens, mask=mask)[index], expected, rtol=1e-9, atol=1e-10)


def test_the_default_head_is_the_papers() -> None:
    """One query, one attention layer, one linear layer: the names that saved classifiers have."""
    names = {name for name, _ in make_head(0).named_parameters()}
    projections = {f"pooler.attention.{x}_proj.{y}" for x in ("q", "k", "v", "out") for y in ("weight", "bias")}
    norms = {f"pooler.norm_{x}.{y}" for x in ("query", "context", "out") for y in ("weight", "bias")}
    assert names == projections | norms | {"pooler.query", "classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_queries": 0}, "--head.num-queries must be 1 or more; got 0"),
        ({"num_blocks": -1}, "--head.num-blocks must be 0 or more; got -1"),
        ({"pooling": "mean", "num_queries": 2}, "pooling mean has no use for num_queries; got 2"),
        ({"pooling": "mean", "time_embedding": "sincos"}, "pooling mean has no use for time_embedding; got sincos"),
        ({"pooling": "mean", "num_blocks": 1}, "pooling mean has no use for num_blocks; got 1"),
        ({"pooling": "mean", "num_heads": 1}, "pooling mean has no use for num_heads; got 1"),
        ({"num_blocks": 1, "width": 8}, "num_blocks above 0 has no use for width; got 8"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadConfig(**options)


def test_a_config_survives_json() -> None:
    config = HeadConfig(time_embedding="sincos", num_queries=2, encoder_layers=(3, -1), width=24)
    assert from_json(HeadConfig, to_json(config)) == config


def contrastive_coca(poolers: Any, *, width: int = 96) -> CoCa:
    torch.manual_seed(1)
    tiny = CoCaConfig.tiny()
    coca = CoCa(replace(tiny, poolers=poolers, text=replace(tiny.text, width=width)))
    with torch.no_grad():
        for parameter in coca.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return coca.double()


@pytest.mark.parametrize("width", [96, 48])
@pytest.mark.parametrize("poolers", ["parallel", "open_clip"])
def test_a_head_that_starts_as_the_contrastive_pooler(poolers: str, width: int) -> None:
    """Its scores on all tokens of a clip are CoCa's own embedding of them, once the classifier is its projection."""
    coca = contrastive_coca(poolers, width=width)
    config = contrastive_head(HeadConfig(), coca=coca)
    head = VideoHead(config, dim=96, num_heads=coca.encoder.num_heads, num_classes=width, num_frames=2).double()
    start_from_contrastive_pooler(head, coca=coca)
    with torch.no_grad():
        projection = coca.image_projection
        head.classifier.weight.copy_(torch.eye(width) if projection is None else projection.weight)
    tokens = torch.randn(3, 2, 36, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    embedding, _ = coca.pool(tokens.flatten(1, 2))
    scores = head(tokens)
    torch.testing.assert_close(scores / scores.norm(dim=-1, keepdim=True), embedding, rtol=1e-9, atol=1e-10)
    before = coca.generative_pooler.query.detach().clone()
    with torch.no_grad():
        head.pooler.query += 1  # a copy, not the same tensor
    assert torch.equal(coca.generative_pooler.query, before)


def test_contrastive_starts_that_cannot_be() -> None:
    cascade, parallel = contrastive_coca("cascade"), contrastive_coca("parallel", width=48)
    head = VideoHead(HeadConfig(), dim=96, num_heads=3, num_classes=2, num_frames=2)
    with pytest.raises(ValueError, match=r"pools the generative pooler's output.*init_pooler random"):
        start_from_contrastive_pooler(head, coca=cascade)
    with pytest.raises(ValueError, match=r"pools the generative pooler's output.*init_pooler random"):
        contrastive_head(HeadConfig(), coca=cascade)
    with pytest.raises(ValueError, match=r"width 48 and 3 heads.*got width 96 and 3 heads"):
        start_from_contrastive_pooler(head, coca=parallel)
    for options in ({"num_queries": 2}, {"num_blocks": 1}, {"pooling": "mean"}):
        other = VideoHead(HeadConfig(**options), dim=96, num_heads=3, num_classes=2, num_frames=2)
        with pytest.raises(ValueError, match="one query and no blocks"):
            start_from_contrastive_pooler(other, coca=parallel)
