"""Linear evaluation and nearest neighbours: against scikit-learn called directly, and a double loop."""

import math

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from coca_video.data.loader import Unreadable
from coca_video.eval.clip_features import ClipFeatures
from coca_video.eval.linear import choose, linear_row, neighbor_row, neighbor_votes, wilson_interval

NUM_CLASSES, DIM = 7, 6


def clips(count: int, *, seed: int, noise: float = 1.2, unreadable: int = 0) -> ClipFeatures:
    """Normal clouds about the classes' fixed centres, of unequal scale by feature."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(NUM_CLASSES, DIM))
    labels = np.arange(count, dtype=np.int64) % NUM_CLASSES
    values = (centres[labels] + noise * rng.normal(size=(count, DIM))) * np.array([1, 5, 0.1, 1, 30, 1])
    return ClipFeatures(
        features={"mean": values.astype(np.float32)},
        labels=labels,
        video_ids=tuple(f"{seed}-{number}" for number in range(count)),
        unreadable=tuple(Unreadable(f"bad{number}", "no video") for number in range(unreadable)),
    )


TRAIN, TEST = clips(84, seed=1), clips(50, seed=2, unreadable=3)
HELD_OUT = np.arange(84) % 4 == 0


def reference(regularization: float, *, chosen_on: bool) -> tuple[float, float]:
    """Top-1 and top-5 by scikit-learn alone: on held-out clips, or on test clips."""
    model = make_pipeline(StandardScaler(), LogisticRegression(C=regularization, max_iter=1000))
    features, labels = TRAIN.features["mean"], TRAIN.labels
    fit = ~HELD_OUT if chosen_on else np.ones(84, dtype=bool)
    queries, truth = (features[HELD_OUT], labels[HELD_OUT]) if chosen_on else (TEST.features["mean"], TEST.labels)
    model.fit(features[fit], labels[fit])
    top5 = top_k_accuracy_score(truth, model.predict_proba(queries), k=5, labels=np.arange(NUM_CLASSES))
    return accuracy_score(truth, model.predict(queries)), top5


def test_regression_is_scikit_learns_with_c_chosen_on_held_out_clips() -> None:
    values = (1e-4, 1e-2, 1.0, 100.0)
    fits = []
    row = linear_row(
        TRAIN,
        test=TEST,
        name="mean",
        held_out=HELD_OUT,
        num_classes=NUM_CLASSES,
        regularizations=values,
        on_fit=lambda: fits.append(1),
    )
    expected = {value: reference(value, chosen_on=True)[0] for value in values}
    assert row.held_out_top1 == pytest.approx(expected, abs=1e-12)
    assert row.chosen == min(expected, key=lambda value: (-expected[value], value))
    assert (row.metrics.top1, row.metrics.top5) == pytest.approx(reference(row.chosen, chosen_on=False), abs=1e-12)
    assert 0.4 < row.metrics.top1 < row.metrics.top5
    assert row.metrics.top1_unreadable_wrong == pytest.approx(row.metrics.top1 * 50 / 53, abs=1e-12)
    assert len(fits) == 5
    assert row.has_converged


def test_too_few_iterations_are_told_and_change_the_scores() -> None:
    def run(max_iterations: int) -> tuple[bool, int | None, float]:
        row = linear_row(
            TRAIN,
            test=TEST,
            name="mean",
            held_out=HELD_OUT,
            num_classes=NUM_CLASSES,
            regularizations=(10.0,),
            max_iterations=max_iterations,
        )
        return row.has_converged, row.iterations, row.metrics.top1

    few, many = run(1), run(1000)
    assert few[:2] == (False, 1)
    assert many[0]
    assert few[2] != many[2]


def test_classes_without_training_clips_come_last_and_two_classes_do() -> None:
    two = np.isin(TRAIN.labels, (2, 5))
    some = ClipFeatures(
        features={"mean": TRAIN.features["mean"][two]},
        labels=TRAIN.labels[two],
        video_ids=tuple(np.array(TRAIN.video_ids)[two]),
        unreadable=(),
    )
    held_out = np.arange(two.sum()) < 6
    row = linear_row(some, test=TEST, name="mean", held_out=held_out, num_classes=NUM_CLASSES, regularizations=(0.1,))
    model = make_pipeline(StandardScaler(), LogisticRegression(C=0.1)).fit(some.features["mean"], some.labels)
    assert row.metrics.top1 == accuracy_score(TEST.labels, model.predict(TEST.features["mean"]))
    # of 50 test clips, those of classes 2 and 5 are among the first two; the others tie at the end
    assert row.metrics.top5 == pytest.approx(np.isin(TEST.labels, (2, 5)).mean(), abs=1e-12)
    assert row.metrics.top1 > 0.1


def plain_votes(query: np.ndarray, bank: np.ndarray, labels: np.ndarray, k: int) -> np.ndarray:
    cosines = []
    for one in bank:
        dot, norms = 0.0, [0.0, 0.0]
        for a, b in zip(query.tolist(), one.tolist(), strict=True):
            dot, norms = dot + a * b, [norms[0] + a * a, norms[1] + b * b]
        cosines.append(dot / math.sqrt(norms[0] * norms[1]))
    votes = np.zeros(NUM_CLASSES)
    for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
        votes[labels[index]] += math.exp(cosines[index] / 0.07)
    return votes


def test_neighbours_vote_as_in_a_double_loop() -> None:
    bank, labels, queries = TRAIN.features["mean"], TRAIN.labels, TEST.features["mean"][:9]
    found = neighbor_votes(bank, labels=labels, queries=queries, neighbors=[1, 4, 84], num_classes=NUM_CLASSES)
    assert sorted(found) == [1, 4, 84]
    for k, votes in found.items():
        expected = np.stack([plain_votes(query, bank, labels, k) for query in queries])
        np.testing.assert_allclose(votes, expected, rtol=1e-4)  # cosines in fp32, over 0.07


def test_k_is_chosen_on_held_out_clips() -> None:
    neighbors = (1, 3, 9, 40, 200)  # 63 clips are left: 200 cannot vote
    row = neighbor_row(TRAIN, test=TEST, name="mean", held_out=HELD_OUT, num_classes=NUM_CLASSES, neighbors=neighbors)
    features, labels = TRAIN.features["mean"], TRAIN.labels

    def right(queries: np.ndarray, truth: np.ndarray, among: np.ndarray, k: int) -> float:
        votes = [plain_votes(query, features[among], labels[among], k).argmax() for query in queries]
        return float(np.mean(votes == truth))

    expected = {float(k): right(features[HELD_OUT], labels[HELD_OUT], ~HELD_OUT, k) for k in (1, 3, 9, 40)}
    assert row.held_out_top1 == pytest.approx(expected, abs=1e-12)
    assert row.chosen == min(expected, key=lambda value: (-expected[value], value))
    everything = np.ones(84, dtype=bool)
    assert row.metrics.top1 == right(TEST.features["mean"], TEST.labels, everything, int(row.chosen))
    with pytest.raises(ValueError, match="63 clips to be neighbours"):
        neighbor_row(TRAIN, test=TEST, name="mean", held_out=HELD_OUT, num_classes=NUM_CLASSES, neighbors=(64,))


def test_test_labels_choose_nothing() -> None:
    shuffled = ClipFeatures(
        features=TEST.features,
        labels=np.random.default_rng(0).permutation(TEST.labels),
        video_ids=TEST.video_ids,
        unreadable=TEST.unreadable,
    )
    for row in (linear_row, neighbor_row):
        told = [
            row(TRAIN, test=test, name="mean", held_out=HELD_OUT, num_classes=NUM_CLASSES) for test in (TEST, shuffled)
        ]
        assert told[0].chosen == told[1].chosen
        assert told[0].held_out_top1 == told[1].held_out_top1
        assert told[0].metrics.top1 > 1.5 * told[1].metrics.top1


def test_what_is_held_out_decides() -> None:
    other = np.arange(84) % 4 == 1
    rows = [
        linear_row(TRAIN, test=TEST, name="mean", held_out=held, num_classes=NUM_CLASSES, regularizations=(0.01,))
        for held in (HELD_OUT, other)
    ]
    assert rows[0].held_out_top1 != rows[1].held_out_top1
    assert rows[0].metrics == rows[1].metrics  # one value to choose from, and all training clips in the end
    with pytest.raises(ValueError, match="None of the held-out training clips could be read"):
        neighbor_row(TRAIN, test=TEST, name="mean", held_out=np.zeros(84, dtype=bool), num_classes=NUM_CLASSES)
    with pytest.raises(ValueError, match="all of one class"):
        linear_row(TRAIN, test=TEST, name="mean", held_out=TRAIN.labels != 2, num_classes=NUM_CLASSES)


def test_the_best_is_chosen_and_among_equals_the_smallest() -> None:
    assert choose({1.0: 0.5, 0.1: 0.7, 10.0: 0.7}) == 0.1
    assert choose({1.0: 0.71, 0.1: 0.7, 10.0: 0.7}) == 1.0


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (7, 20), (880, 1000), (1, 1)])
def test_intervals_are_wilsons(hits: int, total: int) -> None:
    expected = binomtest(hits, total).proportion_ci(confidence_level=0.95, method="wilson")
    assert wilson_interval(hits, total=total) == pytest.approx((expected.low, expected.high), abs=1e-12)
