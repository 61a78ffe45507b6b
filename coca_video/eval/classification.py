"""Evaluating a classifier on a manifest: one score per video, metrics, and the files that keep them."""

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from coca_video.data.loader import Unreadable
from coca_video.data.video import Clip, collate_clips
from coca_video.eval.features import TokenBatch, encode_batch
from coca_video.eval.metrics import ClassificationMetrics, classification_metrics
from coca_video.eval.passes import SizedSamples, one_pass, over_ranks, share_of_rank
from coca_video.eval.token_cache import CachedTokens, TokenCache
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class ClassificationResult:
    """Softmax scores of every readable video, sorted by video id, the metrics of all, and what could not be read."""

    classes: tuple[str, ...]
    video_ids: tuple[str, ...]
    labels: Int64[np.ndarray, "videos"]
    scores: Float64[np.ndarray, "videos classes"]
    metrics: ClassificationMetrics
    unreadable: tuple[Unreadable, ...]


class Scored(NamedTuple):
    """One video's softmax scores in float64, its label and its id."""

    video_id: str
    label: int
    scores: Float64[np.ndarray, "classes"]


@torch.no_grad()
def evaluate_clips(
    model: VideoClassifier,
    *,
    dataset: SizedSamples[Clip],
    classes: tuple[str, ...],
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> ClassificationResult:
    """Scores every video of `dataset` with one clip each. `on_batch` is told how many samples each batch dealt with.

    Ranks share the videos, and each gets the whole result.
    """
    unreadable: list[Unreadable] = []
    clips = one_pass(
        share_of_rank(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate=collate_clips,
        device=device,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    tokens = (encode_batch(model, batch, device=device, bf16=bf16) for batch in clips)
    scored = list(_scored(model, tokens))
    return make_result(over_ranks(scored), classes=classes, unreadable=over_ranks(unreadable))


@torch.no_grad()
def evaluate_tokens(
    model: VideoClassifier,
    *,
    dataset: SizedSamples[CachedTokens],
    classes: tuple[str, ...],
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    on_batch: Callable[[int], object] | None = None,
) -> ClassificationResult:
    """The same on tokens of the model's encoder, from a token cache or some rows of it; the head computes in fp32."""
    unreadable: list[Unreadable] = []
    packed = one_pass(
        share_of_rank(dataset),
        batch_size=batch_size,
        num_workers=num_workers,
        collate=TokenCache.collate,
        device=device,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    scored = list(_scored(model, (batch.to_tokens() for batch in packed)))
    return make_result(over_ranks(scored), classes=classes, unreadable=over_ranks(unreadable))


def _scored(model: VideoClassifier, batches: Iterable[TokenBatch]) -> Iterator[Scored]:
    for batch in batches:
        scores = softmax_scores(model, batch.tokens, variance=batch.variance)
        yield from map(Scored, batch.video_ids, batch.labels.tolist(), scores)


def softmax_scores(
    model: VideoClassifier,
    tokens: Float[Tensor, "batch frames tokens dim"],
    *,
    variance: Float[Tensor, "batch frames tokens"] | None = None,
) -> Float64[np.ndarray, "batch classes"]:
    """Class scores of tokens that are pooled together, the softmax in float64. `variance`: see `TokenBatch`."""
    logits = model.classify(tokens, variance=variance)
    scores: Float64[np.ndarray, "batch classes"] = logits.cpu().double().softmax(dim=1).numpy()
    return scores


def make_result(
    scored: Iterable[Scored], *, classes: tuple[str, ...], unreadable: Sequence[Unreadable]
) -> ClassificationResult:
    """Scores in any order to the result; ValueError if there are none."""
    videos = sorted(scored, key=attrgetter("video_id"))
    if not videos:
        raise ValueError(f"None of the {len(unreadable)} videos could be read; the first: {unreadable[0].cause}")
    scores = np.stack([video.scores for video in videos])
    labels = np.array([video.label for video in videos], dtype=np.int64)
    return ClassificationResult(
        classes=classes,
        video_ids=tuple(video.video_id for video in videos),
        labels=labels,
        scores=scores,
        metrics=classification_metrics(scores, labels=labels, num_unreadable=len(unreadable)),
        unreadable=tuple(sorted(unreadable)),
    )


def free_name(folder: Path, *, name: str, facts: dict[str, Any]) -> str:
    """`name`, or `name-2`, `name-3` ... where a result of other `facts` has the name already."""
    candidate, number = name, 1
    while (path := folder / f"{candidate}.json").is_file():
        before = json.loads(path.read_text())
        if all(before.get(key) == value for key, value in facts.items()):
            break
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def write_result(folder: Path, *, name: str, result: ClassificationResult, facts: dict[str, Any]) -> Path:
    """Writes `<name>.json` (metrics, unreadable videos, `facts` on the run) and `<name>_videos.csv` (scores).

    A result of other facts under that name is left as it is: the new one is called `<name>-2`, and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = free_name(folder, name=name, facts=facts)
    with (folder / f"{name}_videos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["video_id", "label", "predicted", *result.classes])
        for video_id, label, scores in zip(result.video_ids, result.labels, result.scores, strict=True):
            predicted = result.classes[int(scores.argmax())]
            writer.writerow([video_id, result.classes[label], predicted, *(f"{score:.9g}" for score in scores)])
    metrics = result.metrics
    per_class = {
        class_name: {"videos": count, "top1": None if math.isnan(top1) else top1}
        for class_name, count, top1 in zip(result.classes, metrics.per_class_count, metrics.per_class_top1, strict=True)
    }
    document = {
        **facts,
        "num_videos": metrics.num_videos,
        "num_unreadable": metrics.num_unreadable,
        "top1": metrics.top1,
        "top5": metrics.top5,
        "mean_class": metrics.mean_class,
        "top1_unreadable_wrong": metrics.top1_unreadable_wrong,
        "per_class": per_class,
        "unreadable": {sample.key: sample.cause for sample in result.unreadable},
    }
    path = folder / f"{name}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
