"""Linear evaluation and nearest neighbours with scikit-learn: what frozen features tell without a learned pooler.

What is to be chosen (the penalty of the regression, the number of neighbours) is chosen on a held-out part of the
training clips; the test clips are looked at once, by the classifier that all training clips then give.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float32, Float64, Int64
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.preprocessing import StandardScaler

from coca_video.eval.clip_features import ClipFeatures, FeatureName
from coca_video.eval.metrics import ClassificationMetrics, classification_metrics

REGULARIZATIONS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C; features of unit variance have their best in here
NEIGHBORS = (1, 5, 10, 20, 100, 200)  # DINO tries 10 to 200 and takes 20 (arXiv 2104.14294, section 4.1)
TEMPERATURE = 0.07  # of the votes (arXiv 1805.01978, section 3.4)
Z_95 = 1.959963984540054  # a normal variable is within 95% of the time


@dataclass(frozen=True, kw_only=True)
class EvaluatedRow:
    """A line of the table: what was chosen, top-1 on the held-out clips by value, and the metrics on the test clips.

    iterations: of the solver, of the last fit; None where there is none. has_converged: in no more than allowed.
    """

    method: Literal["linear", "k-NN", "attention"]
    features: str
    parameter: Literal["C", "k", "rate"]
    chosen: float
    held_out_top1: dict[float, float]
    metrics: ClassificationMetrics
    iterations: int | None = None
    has_converged: bool = True

    @property
    def interval(self) -> tuple[float, float]:
        """The 95% interval of top-1 over test videos."""
        hits = round(self.metrics.top1 * self.metrics.num_videos)
        return wilson_interval(hits, total=self.metrics.num_videos)


def wilson_interval(hits: int, *, total: int) -> tuple[float, float]:
    """The 95% score interval of a share (Wilson 1927); holds for few videos and near 0 and 1 too."""
    share, weight = hits / total, Z_95**2 / total
    centre = (share + weight / 2) / (1 + weight)
    half = Z_95 * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, centre - half), min(1.0, centre + half)


def choose(top1: Mapping[float, float]) -> float:
    """The value of the best top-1; among equals the smallest, which is the stronger penalty and the lower rate."""
    return min(top1, key=lambda value: (-top1[value], value))


def linear_row(
    train: ClipFeatures,
    *,
    test: ClipFeatures,
    name: FeatureName,
    held_out: Bool[np.ndarray, "clips"],
    num_classes: int,
    regularizations: Sequence[float] = REGULARIZATIONS,
    max_iterations: int = 1000,
    on_fit: Callable[[], object] | None = None,
) -> EvaluatedRow:
    """Multinomial logistic regression on standardised features (scikit-learn, L-BFGS).

    held_out: the training clips that C, the inverse of the L2 penalty, is chosen on. `on_fit` is called after each of
    len(regularizations) + 1 fits.
    """
    features, labels = train.features[name], train.labels
    _check_parts(labels, held_out=held_out)
    top1: dict[float, float] = {}
    scaled, queries = _standardized(features[~held_out], queries=features[held_out])
    for value in sorted(regularizations):
        fit = _fit(
            scaled,
            labels=labels[~held_out],
            queries=queries,
            num_classes=num_classes,
            regularization=value,
            max_iterations=max_iterations,
        )
        top1[value] = classification_metrics(fit.scores, labels=labels[held_out]).top1
        _tell(on_fit)
    chosen = choose(top1)
    del scaled, queries  # before the next: all frames of 240,000 clips are gigabytes
    scaled, queries = _standardized(features, queries=test.features[name])
    fit = _fit(
        scaled,
        labels=labels,
        queries=queries,
        num_classes=num_classes,
        regularization=chosen,
        max_iterations=max_iterations,
    )
    _tell(on_fit)
    return EvaluatedRow(
        method="linear",
        features=name,
        parameter="C",
        chosen=chosen,
        held_out_top1=top1,
        metrics=_metrics(fit.scores, test=test),
        iterations=fit.iterations,
        has_converged=fit.iterations < max_iterations,
    )


def neighbor_row(
    train: ClipFeatures,
    *,
    test: ClipFeatures,
    name: FeatureName,
    held_out: Bool[np.ndarray, "clips"],
    num_classes: int,
    neighbors: Sequence[int] = NEIGHBORS,
) -> EvaluatedRow:
    """The k nearest training clips by cosine vote for their class with weight exp(cosine / 0.07).

    held_out: the training clips that k is chosen on, among the values that are not above the number of the others.
    """
    features, labels = train.features[name], train.labels
    _check_parts(labels, held_out=held_out)
    num_others = int((~held_out).sum())
    possible = sorted(k for k in neighbors if k <= num_others)
    if not possible:
        raise ValueError(
            f"There are {num_others} clips to be neighbours; expected a k of at most that, got {neighbors}."
        )
    votes = neighbor_votes(
        features[~held_out],
        labels=labels[~held_out],
        queries=features[held_out],
        neighbors=possible,
        num_classes=num_classes,
    )
    held_out_labels = labels[held_out]
    top1 = {float(k): classification_metrics(scores, labels=held_out_labels).top1 for k, scores in votes.items()}
    chosen = int(choose(top1))
    scores = neighbor_votes(
        features, labels=labels, queries=test.features[name], neighbors=[chosen], num_classes=num_classes
    )[chosen]
    return EvaluatedRow(
        method="k-NN",
        features=name,
        parameter="k",
        chosen=float(chosen),
        held_out_top1=top1,
        metrics=_metrics(scores, test=test),
    )


def neighbor_votes(
    bank: Float32[np.ndarray, "clips dim"],
    *,
    labels: Int64[np.ndarray, "clips"],
    queries: Float32[np.ndarray, "queries dim"],
    neighbors: Sequence[int],
    num_classes: int,
) -> dict[int, Float64[np.ndarray, "queries classes"]]:
    """The sums of the votes for each class, by the number of neighbours that vote; one search for all of them."""
    search = NearestNeighbors(n_neighbors=max(neighbors), metric="cosine", algorithm="brute").fit(bank)
    distances, indices = search.kneighbors(queries)
    weights = np.exp((1.0 - distances.astype(np.float64)) / TEMPERATURE)
    votes = np.zeros((len(queries), num_classes))
    found: dict[int, Float64[np.ndarray, "queries classes"]] = {}
    for nearest in range(max(neighbors)):
        votes[np.arange(len(queries)), labels[indices[:, nearest]]] += weights[:, nearest]
        if nearest + 1 in neighbors:
            found[nearest + 1] = votes.copy()
    return found


class _Fit(NamedTuple):
    """Scores of the queries, and how many iterations the solver took."""

    scores: Float64[np.ndarray, "queries classes"]
    iterations: int


def _standardized(
    features: Float32[np.ndarray, "clips dim"], *, queries: Float32[np.ndarray, "queries dim"]
) -> tuple[Float32[np.ndarray, "clips dim"], Float32[np.ndarray, "queries dim"]]:
    """Both by the mean and the deviation of `features`."""
    scaler = StandardScaler().fit(features)
    return scaler.transform(features), scaler.transform(queries)


def _fit(
    features: Float32[np.ndarray, "clips dim"],
    *,
    labels: Int64[np.ndarray, "clips"],
    queries: Float32[np.ndarray, "queries dim"],
    num_classes: int,
    regularization: float,
    max_iterations: int,
) -> _Fit:
    """Classes without clips score below all others."""
    model = LogisticRegression(C=regularization, max_iter=max_iterations)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told in the table
        model.fit(features, labels)
    margins = model.decision_function(queries).astype(np.float64)
    if margins.ndim == 1:  # of two classes, scikit-learn gives the margin of the second
        margins = np.stack([-margins, margins], axis=1)
    scores = np.repeat(margins.min(axis=1, keepdims=True) - 1.0, num_classes, axis=1)
    scores[:, model.classes_] = margins
    return _Fit(scores=scores, iterations=int(model.n_iter_.max()))


def _check_parts(labels: Int64[np.ndarray, "clips"], *, held_out: Bool[np.ndarray, "clips"]) -> None:
    if not held_out.any():
        raise ValueError("None of the held-out training clips could be read, so there is nothing to choose on.")
    if len(np.unique(labels[~held_out])) < 2:
        raise ValueError("The training clips that could be read are all of one class; expected two or more.")


def _metrics(scores: Float64[np.ndarray, "videos classes"], *, test: ClipFeatures) -> ClassificationMetrics:
    return classification_metrics(scores, labels=test.labels, num_unreadable=len(test.unreadable))


def _tell(on_fit: Callable[[], object] | None) -> None:
    if on_fit is not None:
        on_fit()
