"""Classification metrics against scikit-learn and a count by hand; recall@K against a double loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import balanced_accuracy_score, top_k_accuracy_score

from coca_video.eval.metrics import classification_metrics
from coca_video.eval.retrieval import recall_at


@pytest.mark.parametrize("seed", range(5))
def test_against_scikit_learn(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, labels = rng.normal(size=(60, 9)), rng.integers(0, 9, size=60)
    scores[np.arange(60), labels] += rng.normal(1, 1, size=60)
    metrics = classification_metrics(scores, labels=labels)
    classes = np.arange(9)
    assert metrics.top1 == pytest.approx(top_k_accuracy_score(labels, scores, k=1, labels=classes), abs=1e-12)
    assert metrics.top5 == pytest.approx(top_k_accuracy_score(labels, scores, k=5, labels=classes), abs=1e-12)
    assert metrics.mean_class == pytest.approx(balanced_accuracy_score(labels, scores.argmax(axis=1)), abs=1e-12)
    assert sum(metrics.per_class_count) == 60


def test_by_hand() -> None:
    """Four videos of three classes, one class without videos, two more videos that could not be read."""
    scores = np.array([[0.7, 0.2, 0.1, 0.0], [0.1, 0.6, 0.3, 0.0], [0.2, 0.5, 0.3, 0.0], [0.1, 0.1, 0.8, 0.0]])
    metrics = classification_metrics(scores, labels=np.array([0, 0, 1, 2]), num_unreadable=2)
    assert (metrics.num_videos, metrics.num_unreadable) == (4, 2)
    assert (metrics.top1, metrics.top5, metrics.top1_unreadable_wrong) == (3 / 4, 1.0, 3 / 6)
    assert metrics.mean_class == pytest.approx((1 / 2 + 1 + 1) / 3)
    assert metrics.per_class_top1[:3] == (0.5, 1.0, 1.0) and math.isnan(metrics.per_class_top1[3])
    assert metrics.per_class_count == (2, 1, 1, 0)


def test_ties_earn_nothing() -> None:
    """A model that has not learned to tell classes apart must not score by the order in which they stand."""
    metrics = classification_metrics(np.full((4, 6), 1 / 6), labels=np.array([0, 1, 2, 3]))
    assert (metrics.top1, metrics.top5) == (0.0, 0.0)


def test_broken_scores_are_no_score() -> None:
    """Comparisons with nan are all false, which must not pass for a perfect rank."""
    with pytest.raises(ValueError, match="Some scores are not finite"):
        classification_metrics(np.full((4, 6), np.nan), labels=np.array([0, 1, 2, 3]))
    with pytest.raises(ValueError, match="Some similarities are not finite"):
        recall_at(torch.full((2, 3), torch.nan), text=torch.ones(2, 3), owners=torch.arange(2))


def test_order_of_videos_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    scores, labels, order = rng.normal(size=(30, 4)), rng.integers(0, 4, size=30), rng.permutation(30)
    assert classification_metrics(scores, labels=labels) == classification_metrics(scores[order], labels=labels[order])


def test_recall_against_a_double_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    image = F.normalize(torch.randn(30, 6, dtype=torch.float64, generator=generator), dim=1)
    owners = torch.arange(30).repeat_interleave(torch.tensor([1, 2, 3] * 10))
    noise = torch.randn(len(owners), 6, dtype=torch.float64, generator=generator)
    text = F.normalize(image[owners] + 0.7 * noise, dim=1)
    recalls = recall_at(image, text=text, owners=owners)
    similarity = (image @ text.T).tolist()
    for k in (1, 5, 10):
        image_hits = text_hits = 0
        for i in range(30):
            nearest = sorted(range(len(owners)), key=lambda t, i=i: -similarity[i][t])[:k]
            image_hits += any(int(owners[t]) == i for t in nearest)
        for t in range(len(owners)):
            nearest = sorted(range(30), key=lambda i, t=t: -similarity[i][t])[:k]
            text_hits += int(owners[t]) in nearest
        assert recalls[f"image_to_text_recall@{k}"] == pytest.approx(image_hits / 30)
        assert recalls[f"text_to_image_recall@{k}"] == pytest.approx(text_hits / len(owners))
    assert 0 < recalls["image_to_text_recall@1"] < 1


def test_recall_of_constant_embeddings_is_zero() -> None:
    ones = F.normalize(torch.ones(4, 3), dim=1)
    assert set(recall_at(ones.repeat(4, 1)[:16], text=ones.repeat(4, 1), owners=torch.arange(16)).values()) == {0.0}
