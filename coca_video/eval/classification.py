"""Evaluating a classifier on a manifest: one score per video, metrics, and the files that keep them."""

import csv
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from coca_video.data.loader import Unreadable, in_order
from coca_video.data.video import VideoDataset, collate_clips
from coca_video.eval.features import TokenBatch, TokenDataset, collate_tokens, encode_batch
from coca_video.eval.metrics import ClassificationMetrics, classification_metrics
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


@torch.no_grad()
def evaluate_clips(
    model: VideoClassifier,
    *,
    dataset: VideoDataset,
    classes: tuple[str, ...],
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> ClassificationResult:
    """Scores every video of `dataset` with one clip each. `on_batch` is told how many samples each batch dealt with."""
    unreadable: list[Unreadable] = []

    def token_batches() -> Iterable[TokenBatch]:
        stream = in_order(
            dataset, num_samples=len(dataset), batch_size=batch_size, workers=num_workers, collate=collate_clips
        )
        for batch, failed in stream:
            unreadable.extend(failed)
            if on_batch is not None:
                on_batch(len(failed) + (0 if batch is None else len(batch.video_ids)))
            if batch is not None:
                yield encode_batch(model, batch, device=device, bf16=bf16)

    return _result(model, token_batches(), classes=classes, unreadable=unreadable)


@torch.no_grad()
def evaluate_tokens(
    model: VideoClassifier, *, dataset: TokenDataset, classes: tuple[str, ...], batch_size: int = 64
) -> ClassificationResult:
    """The same on tokens that were encoded before."""
    unreadable = list(dataset.unreadable)
    stream = in_order(dataset, num_samples=len(dataset), batch_size=batch_size, workers=0, collate=collate_tokens)
    batches = (batch for batch, _ in stream if batch is not None)
    return _result(model, batches, classes=classes, unreadable=unreadable)


def _result(
    model: VideoClassifier, batches: Iterable[TokenBatch], *, classes: tuple[str, ...], unreadable: list[Unreadable]
) -> ClassificationResult:
    """`unreadable` may still be growing while `batches` are drawn."""
    names: list[str] = []
    labels: list[int] = []
    scores: list[np.ndarray] = []
    for batch in batches:
        logits = model.classify(batch.tokens).cpu().double()
        names += batch.video_ids
        labels += batch.labels.tolist()
        scores += list(logits.softmax(dim=1).numpy())
    if not names:
        raise ValueError(f"None of the {len(unreadable)} videos could be read; the first: {unreadable[0].cause}")
    order = sorted(range(len(names)), key=names.__getitem__)
    sorted_scores = np.stack([scores[i] for i in order])
    sorted_labels = np.array([labels[i] for i in order], dtype=np.int64)
    return ClassificationResult(
        classes=classes,
        video_ids=tuple(names[i] for i in order),
        labels=sorted_labels,
        scores=sorted_scores,
        metrics=classification_metrics(sorted_scores, labels=sorted_labels, num_unreadable=len(unreadable)),
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
