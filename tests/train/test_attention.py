"""The attentional pooler beside linear evaluation: equal to a plain loop, its rate chosen on held-out clips alone."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from tqdm import tqdm

from coca_video.data.loader import Order, SampleKey
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.linear import EvaluatedRow
from coca_video.eval.passes import Rows
from coca_video.eval.token_cache import TokenCache
from coca_video.eval.token_cache_build import build_token_cache
from coca_video.models.head import VideoHead
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.attention import PoolerTraining, attention_row, fresh_head, score_heads, train_heads

CPU = torch.device("cpu")


def encoder_model() -> VideoClassifier:
    torch.manual_seed(0)
    model = VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=5, num_frames=2))
    return model.eval().requires_grad_(False)


def cache_of(manifest: Manifest, *, folder: Path) -> TokenCache:
    model = encoder_model()
    return build_token_cache(
        model,
        dataset=VideoDataset(manifest, config=ClipConfig(num_frames=2, image_size=48), seed=0),
        folder=folder,
        dtype="fp32",
        device=CPU,
        progress=lambda what, *, total, initial=0: tqdm(total=total, disable=True),
        on_estimate=lambda estimate: None,
    )


@pytest.fixture
def caches(drawn_clips: Path, tmp_path: Path) -> tuple[TokenCache, TokenCache]:
    manifest = read_manifest(drawn_clips)
    return cache_of(manifest.select(split="train"), folder=tmp_path), cache_of(
        manifest.select(split="test"), folder=tmp_path
    )


def keys(count: int) -> list[SampleKey]:
    return [SampleKey(0, index) for index in range(count)]


def all_rows(cache: TokenCache) -> Rows:
    return Rows(cache, rows=np.arange(len(cache)))


def plain_training(cache: TokenCache, head: VideoHead, *, rate: float, steps: int, seed: int) -> None:
    """AdamW on whole tokens in memory; the rate, the decay and the clipping written out."""
    batch = TokenCache.collate([cache[key] for key in keys(len(cache))]).to_whole_tokens()
    decayed = [p for p in head.parameters() if p.ndim >= 2]
    others = [p for p in head.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    order, warmup = Order(num_samples=len(cache), batch_size=min(64, len(cache)), seed=seed), steps // 20
    for step in range(steps):
        factor = (
            (step + 1) / warmup
            if step < warmup
            else 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate * factor
        chosen = [key.index for key in order.batch(step)]
        loss = nn.functional.cross_entropy(head(batch.tokens[chosen]), batch.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()


def test_heads_trained_together_are_those_of_a_plain_loop(caches: tuple[TokenCache, TokenCache]) -> None:
    train, test = caches
    encoder, rates, steps = encoder_model().encoder, (1e-3, 2e-2), 40
    heads = [fresh_head(encoder, tokens=train, seed=3) for _ in rates]
    told = []
    config = PoolerTraining(seed=3)
    train_heads(
        heads,
        tokens=all_rows(train),
        rates=rates,
        steps=steps,
        config=config,
        device=CPU,
        on_step=lambda: told.append(1),
    )
    assert len(told) == steps
    scores, labels, unreadable = score_heads(heads, tokens=all_rows(test), num_workers=0, device=CPU)
    assert unreadable == []
    assert labels.tolist() == test.labels.tolist()
    for number, rate in enumerate(rates):
        alone = fresh_head(encoder, tokens=train, seed=3)
        plain_training(train, alone, rate=rate, steps=steps, seed=3)
        whole = TokenCache.collate([test[key] for key in keys(len(test))]).to_whole_tokens()
        with torch.no_grad():
            expected = alone(whole.tokens).double().numpy()
        np.testing.assert_allclose(scores[number], expected, rtol=0, atol=2e-3 * np.abs(expected).max())
    assert np.abs(scores[0] - scores[1]).max() > 0.1


def rows_of(
    caches: tuple[TokenCache, TokenCache], *, rates: Sequence[float] = (1e-9, 1e-2), seed: int = 0, steps: int = 25
) -> EvaluatedRow:
    train, test = caches
    held_out = [row.video_id for row in train.manifest.rows][::3]
    config = PoolerTraining(rates=rates, steps=steps, seed=seed)
    return attention_row(encoder_model().encoder, train=train, test=test, held_out=held_out, config=config, device=CPU)


@pytest.mark.slow
def test_the_rate_is_chosen_on_held_out_clips_and_then_trains_on_all(caches: tuple[TokenCache, TokenCache]) -> None:
    train, test = caches
    row = rows_of(caches)
    held = np.arange(len(train)) % 3 == 0
    encoder, config = encoder_model().encoder, PoolerTraining(seed=0)
    expected = {}
    for rate in (1e-9, 1e-2):
        head = fresh_head(encoder, tokens=train, seed=0)
        rest = Rows(train, rows=np.flatnonzero(~held))
        train_heads([head], tokens=rest, rates=[rate], steps=25, config=config, device=CPU, on_step=None)
        scores, labels, _ = score_heads(
            [head], tokens=Rows(train, rows=np.flatnonzero(held)), num_workers=0, device=CPU
        )
        expected[rate] = float((scores[0].argmax(axis=1) == labels).mean())
    assert row.held_out_top1 == pytest.approx(expected, abs=1e-12)
    assert row.chosen == 1e-2
    assert expected[1e-2] > expected[1e-9]
    final = fresh_head(encoder, tokens=train, seed=0)
    train_heads([final], tokens=all_rows(train), rates=[1e-2], steps=25, config=config, device=CPU, on_step=None)
    scores, labels, _ = score_heads([final], tokens=all_rows(test), num_workers=0, device=CPU)
    assert row.metrics.top1 == pytest.approx((scores[0].argmax(axis=1) == labels).mean(), abs=1e-12)


@pytest.mark.slow
def test_test_labels_choose_nothing(caches: tuple[TokenCache, TokenCache], drawn_clips: Path, tmp_path: Path) -> None:
    whole = read_manifest(drawn_clips).select(split="test")
    labels = np.random.default_rng(0).permutation([row.label for row in whole.rows]).tolist()
    rows = [
        type(row)(path=row.path, label=label, video_id=row.video_id, split="test")
        for row, label in zip(whole.rows, labels, strict=True)
    ]
    shuffled = cache_of(Manifest(source=whole.source, rows=rows, classes=whole.classes), folder=tmp_path)
    row, other = rows_of(caches), rows_of((caches[0], shuffled))
    assert (row.chosen, row.held_out_top1) == (other.chosen, other.held_out_top1)
    assert row.metrics != other.metrics


def test_steps_by_default_are_20_epochs_and_500_at_least() -> None:
    assert PoolerTraining().num_steps(240_000) == 75_000
    assert PoolerTraining().num_steps(100) == 500
    assert PoolerTraining(steps=7).num_steps(240_000) == 7
