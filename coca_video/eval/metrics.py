"""Classification metrics as sums and counts over videos, in float64, whatever order the videos came in."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64


@dataclass(frozen=True, kw_only=True)
class ClassificationMetrics:
    """Accuracies in [0, 1]. Videos that could not be read are left out, except where a field says otherwise.

    `mean_class` averages the accuracies of the classes that have videos; for the others `per_class_count` is 0 and
    `per_class_top1` is nan. `top1_unreadable_wrong` counts each unreadable video as a wrong answer.
    """

    num_videos: int
    num_unreadable: int
    top1: float
    top5: float
    mean_class: float
    top1_unreadable_wrong: float
    per_class_top1: tuple[float, ...]
    per_class_count: tuple[int, ...]


def classification_metrics(
    scores: Float64[np.ndarray, "videos classes"], *, labels: Int64[np.ndarray, "videos"], num_unreadable: int = 0
) -> ClassificationMetrics:
    """Metrics of one score per video and class; ties count against the right class: constant scores earn nothing."""
    ranks = ranks_of_labels(scores, labels=labels)
    return metrics_of_ranks(ranks, labels=labels, num_classes=scores.shape[1], num_unreadable=num_unreadable)


def ranks_of_labels(
    scores: Float64[np.ndarray, "videos classes"], *, labels: Int64[np.ndarray, "videos"]
) -> Int64[np.ndarray, "videos"]:
    """How many other classes score as much as the right one, or more; ValueError for scores that are not finite."""
    if not np.isfinite(scores).all():
        raise ValueError(
            "Some scores are not finite, so the model's weights or inputs are broken; nothing was counted."
        )
    own = scores[np.arange(len(scores)), labels]
    ranks: Int64[np.ndarray, "videos"] = (scores >= own[:, None]).sum(axis=1) - 1
    return ranks


def metrics_of_ranks(
    ranks: Int64[np.ndarray, "videos"],
    *,
    labels: Int64[np.ndarray, "videos"],
    num_classes: int,
    num_unreadable: int = 0,
) -> ClassificationMetrics:
    """Metrics of what `ranks_of_labels` gives."""
    num_videos = len(ranks)
    hits = ranks < 1
    counts = np.bincount(labels, minlength=num_classes)
    correct = np.bincount(labels[hits], minlength=num_classes)
    per_class = np.divide(correct, counts, out=np.full(num_classes, np.nan), where=counts > 0)
    all_videos = num_videos + num_unreadable
    return ClassificationMetrics(
        num_videos=num_videos,
        num_unreadable=num_unreadable,
        top1=int(hits.sum()) / num_videos,
        top5=int((ranks < 5).sum()) / num_videos,
        mean_class=float(per_class[counts > 0].mean()),
        top1_unreadable_wrong=int(hits.sum()) / all_videos,
        per_class_top1=tuple(per_class.tolist()),
        per_class_count=tuple(counts.tolist()),
    )
