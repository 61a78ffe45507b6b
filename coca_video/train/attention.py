"""The attentional pooler beside linear evaluation: CoCa's single query on cached tokens, its rate chosen held-out.

The recipe is ours and the same for every data set: AdamW, batch 64, weight decay 0.05 on matrices, gradients clipped
at 1, the rate warmed up over a twentieth of the steps and then falling to zero along a cosine, no label smoothing.
"""

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import nn

from coca_video.data.loader import Order, Unreadable, batches
from coca_video.data.prefetch import to_device_ahead
from coca_video.eval.features import TokenBatch
from coca_video.eval.linear import EvaluatedRow, choose
from coca_video.eval.metrics import classification_metrics
from coca_video.eval.passes import Rows, one_pass
from coca_video.eval.token_cache import CachedTokens, TokenCache
from coca_video.losses import classification_loss
from coca_video.models.head import HeadConfig, VideoHead, stacked_logits
from coca_video.models.image import ImageEncoder
from coca_video.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
BATCH_SIZE = 64
EPOCHS, LEAST_STEPS = 20, 500


@dataclass(frozen=True, kw_only=True)
class PoolerTraining:
    """Which rates to choose among, and how long to train: 20 epochs, and 500 updates at least, when steps is None."""

    rates: Sequence[float] = RATES
    steps: int | None = None
    seed: int = 0
    num_workers: int = 0

    def num_steps(self, num_clips: int) -> int:
        """Updates for so many training clips."""
        return self.steps if self.steps is not None else max(LEAST_STEPS, EPOCHS * num_clips // BATCH_SIZE)


def attention_row(
    encoder: ImageEncoder,
    *,
    train: TokenCache,
    test: TokenCache,
    held_out: Sequence[str],
    config: PoolerTraining,
    device: torch.device,
    on_step: Callable[[], object] | None = None,
) -> EvaluatedRow:
    """Trains a pooler at each rate beside `held_out`, then one at the best rate on all training clips, and tests it.

    encoder: whose tokens they are. held_out: video ids. All rates share one read of the tokens. `on_step` is called
    after each update of the two trainings, 2 * config.num_steps(len(train)) in all.
    """
    names, steps = frozenset(held_out), config.num_steps(len(train))
    is_held = np.array([row.video_id in names for row in train.manifest.rows])

    def trained(rows: Int64[np.ndarray, "rows"], rates: Sequence[float]) -> list[VideoHead]:
        heads = [fresh_head(encoder, tokens=train, seed=config.seed).to(device) for _ in rates]
        tokens = Rows(train, rows=rows)
        train_heads(heads, tokens=tokens, rates=rates, steps=steps, config=config, device=device, on_step=on_step)
        return heads

    rates = sorted(config.rates)
    candidates = trained(np.flatnonzero(~is_held), rates)
    held_out_rows = Rows(train, rows=np.flatnonzero(is_held))
    scores, labels, _ = score_heads(candidates, tokens=held_out_rows, num_workers=config.num_workers, device=device)
    top1 = {rate: classification_metrics(one, labels=labels).top1 for rate, one in zip(rates, scores, strict=True)}
    chosen = choose(top1)
    best = trained(np.arange(len(train)), [chosen])
    test_rows = Rows(test, rows=np.arange(len(test)))
    scores, labels, unreadable = score_heads(best, tokens=test_rows, num_workers=config.num_workers, device=device)
    return EvaluatedRow(
        method="attention",
        features="all tokens",
        parameter="rate",
        chosen=chosen,
        held_out_top1=top1,
        metrics=classification_metrics(scores[0], labels=labels, num_unreadable=len(unreadable)),
        iterations=steps,
    )


def fresh_head(encoder: ImageEncoder, *, tokens: TokenCache, seed: int) -> VideoHead:
    """The paper's head; all of one seed begin alike, and the global random state stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return VideoHead(
            HeadConfig(),
            dim=encoder.width,
            num_heads=encoder.num_heads,
            num_classes=len(tokens.manifest.classes),
            num_frames=tokens.layout.num_frames,
        )


def train_heads(
    heads: Sequence[VideoHead],
    *,
    tokens: Rows[CachedTokens],
    rates: Sequence[float],
    steps: int,
    config: PoolerTraining,
    device: torch.device,
    on_step: Callable[[], object] | None,
) -> None:
    """Each head at its rate, as if it were alone: the sum of their losses has the gradient of each."""
    factors = {str(number): rate for number, rate in enumerate(rates)}
    optim = OptimConfig(learning_rate=1.0, rate_factors=factors, weight_decay=0.05, warmup_steps=steps // 20)
    optimizer = build_optimizer(nn.ModuleList(heads), config=optim)
    order = Order(num_samples=len(tokens), batch_size=min(BATCH_SIZE, len(tokens)), seed=config.seed)
    stream = batches(
        tokens,
        order=order,
        first_step=0,
        last_step=steps,
        workers=config.num_workers,
        collate=TokenCache.collate,
        pin_memory=device.type == "cuda",
    )
    with closing(to_device_ahead(stream, device=device)) as loaded:
        for step, (packed, _) in enumerate(loaded):
            set_learning_rate(optimizer, rate=learning_rate(step, config=optim, total_steps=steps))
            if packed is not None:
                _update(heads, batch=packed.to_tokens(), optimizer=optimizer, gradient_clip=optim.gradient_clip)
            if on_step is not None:
                on_step()


def _update(
    heads: Sequence[VideoHead], *, batch: TokenBatch, optimizer: torch.optim.Optimizer, gradient_clip: float
) -> None:
    logits = stacked_logits(heads, batch.tokens, variance=batch.variance)
    loss = torch.stack([classification_loss(one, labels=batch.labels) for one in logits]).sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    for head in heads:
        nn.utils.clip_grad_norm_(head.parameters(), gradient_clip)
    optimizer.step()


@torch.no_grad()
def score_heads(
    heads: Sequence[VideoHead], *, tokens: Rows[CachedTokens], num_workers: int, device: torch.device
) -> tuple[Float64[np.ndarray, "heads clips classes"], Int64[np.ndarray, "clips"], list[Unreadable]]:
    """Logits of every readable clip, its label, and what could not be read."""
    unreadable: list[Unreadable] = []
    packed = one_pass(
        tokens,
        batch_size=BATCH_SIZE,
        num_workers=num_workers,
        collate=TokenCache.collate,
        device=device,
        unreadable=unreadable,
    )
    logits: list[np.ndarray] = []
    labels: list[int] = []
    for batch in (one.to_tokens() for one in packed):
        logits.append(stacked_logits(heads, batch.tokens, variance=batch.variance).cpu().double().numpy())
        labels += batch.labels.tolist()
    if not logits:
        raise ValueError(f"None of the {len(tokens)} clips could be read; the first: {unreadable[0].cause}")
    return np.concatenate(logits, axis=1), np.array(labels, dtype=np.int64), unreadable
