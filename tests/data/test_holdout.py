"""The held-out part of a training split: shares by class, groups whole, nothing lost, a function of the seed."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coca_video.data.holdout import split_holdout
from coca_video.data.manifest import Manifest, VideoRow


def manifest_of(labels: Sequence[str | None], *, groups: Sequence[str] | None = None, prefix: str = "v") -> Manifest:
    rows = [
        VideoRow(
            path=Path(f"/clips/{prefix}{number}.mp4"),
            label=label,
            video_id=f"{prefix}{number}",
            extra={"person": groups[number]} if groups is not None and groups[number] else {},
        )
        for number, label in enumerate(labels)
    ]
    return Manifest(source=Path("m.csv"), rows=rows, classes=tuple(sorted({label for label in labels if label})))


def ids(manifest: Manifest) -> list[str]:
    return [row.video_id for row in manifest.rows]


def counts(manifest: Manifest) -> Counter[str | None]:
    return Counter(row.label for row in manifest.rows)


def test_each_class_gives_the_number_nearest_to_its_share_and_order_and_classes_stay() -> None:
    whole = manifest_of(["a"] * 10 + ["b"] * 4 + ["c"] * 7 + ["d"])
    training, held_out = split_holdout(whole, share=0.2, seed=0)
    assert counts(held_out) == {"a": 2, "b": 1, "c": 1}  # 2.0, 0.8, 1.4, 0.2
    assert counts(training) == {"a": 8, "b": 3, "c": 6, "d": 1}
    assert sorted(ids(training) + ids(held_out), key=lambda name: int(name[1:])) == ids(whole)
    for part in (training, held_out):
        assert ids(part) == sorted(ids(part), key=lambda name: int(name[1:]))
        assert part.classes == whole.classes
    assert [row for row in whole.rows if row.video_id in ids(held_out)] == list(held_out.rows)


def test_a_tie_and_the_last_clip_stay_in_training() -> None:
    _, held_out = split_holdout(manifest_of(["a"] * 5 + ["b"] * 2 + ["c"]), share=0.5, seed=0)
    assert counts(held_out) == {"a": 2, "b": 1}  # 2.5 of a; of c, 0.5 is a tie and it would be the last
    _, held_out = split_holdout(manifest_of(["a"] * 3 + ["b"]), share=0.99, seed=0)
    assert counts(held_out) == {"a": 2}


def test_the_seed_chooses_and_other_clips_do_not() -> None:
    labels = ["a"] * 40 + ["b"] * 40
    chosen = [frozenset(ids(split_holdout(manifest_of(labels), share=0.25, seed=seed)[1])) for seed in range(20)]
    assert len(set(chosen)) == 20
    assert chosen[3] == frozenset(ids(split_holdout(manifest_of(labels), share=0.25, seed=3)[1]))
    # how often each clip was drawn in 20 draws at a quarter: 5 expected, binomial with a standard deviation of 1.9
    drawn = Counter(name for names in chosen for name in names)
    assert all(0 <= drawn[f"v{number}"] <= 14 for number in range(80))
    assert sum(drawn.values()) == 20 * 20
    # class b changes nothing in class a; nor does the order of the rows
    alone = frozenset(ids(split_holdout(manifest_of(["a"] * 40), share=0.25, seed=3)[1]))
    assert alone == {name for name in chosen[3] if int(name[1:]) < 40}
    whole = manifest_of(labels)
    backwards = Manifest(source=whole.source, rows=list(whole.rows)[::-1], classes=whole.classes)
    assert frozenset(ids(split_holdout(backwards, share=0.25, seed=3)[1])) == chosen[3]


def test_groups_are_whole_and_a_class_of_one_group_stays() -> None:
    labels = ["a"] * 20 + ["b"] * 20 + ["c"] * 6
    groups = [f"a{number // 2}" for number in range(20)] + [f"b{number // 5}" for number in range(20)] + ["c"] * 6
    whole = manifest_of(labels, groups=groups)
    for seed in range(10):
        training, held_out = split_holdout(whole, share=0.25, group="person", seed=seed)
        of = [{row.extra["person"] for row in part.rows} for part in (training, held_out)]
        assert not of[0] & of[1]
        assert counts(held_out) == {"a": 4, "b": 5}  # 5 of a: 4 and 6 are as near, and a tie stays in training
        assert counts(training)["c"] == 6


def test_groups_that_span_classes_come_near_every_share() -> None:
    """UT-Interaction's layout: 10 recordings with one clip of each of 6 classes; and 5 with one or two of each."""
    labels = [name for _ in range(10) for name in "abcdef"]
    groups = [f"r{recording}" for recording in range(10) for _ in range(6)]
    for share, expected in ((0.1, 1), (0.2, 2), (0.34, 3), (0.96, 9)):
        training, held_out = split_holdout(manifest_of(labels, groups=groups), share=share, group="person", seed=1)
        assert set(counts(held_out).values()) == {expected}
        assert len(counts(held_out)) == len(counts(training)) == 6


def test_a_path_groups_clips_cut_from_one_file_and_an_empty_cell_is_alone() -> None:
    rows = [
        VideoRow(path=Path(f"/f{number // 4}.mp4"), label="a", video_id=f"v{number}", start_seconds=float(number))
        for number in range(24)
    ]
    whole = Manifest(source=Path("m.csv"), rows=rows, classes=("a",))
    training, held_out = split_holdout(whole, share=0.3, group="path", seed=0)
    assert len({row.path for row in held_out.rows}) == 2  # 7.2 clips wanted, 8 are nearest
    assert not {row.path for row in held_out.rows} & {row.path for row in training.rows}
    alone = manifest_of(["a"] * 10, groups=["x"] + [""] * 9)
    assert split_holdout(alone, share=0.3, group="person", seed=0)[1].rows  # no group of nine
    assert len(split_holdout(alone, share=0.3, group="person", seed=0)[1].rows) == 3


@settings(deadline=None, max_examples=60)
@given(
    cells=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=2, max_size=60),
    share=st.floats(0.05, 0.95),
    seed=st.integers(-5, 5),
)
def test_whatever_the_groups(cells: list[tuple[int, int]], share: float, seed: int) -> None:
    """Set arithmetic: parts disjoint and complete, groups whole, classes kept, and no group more would be nearer."""
    whole = manifest_of([f"c{label}" for label, _ in cells], groups=[f"g{group}" for _, group in cells])
    try:
        training, held_out = split_holdout(whole, share=share, group="person", seed=seed)
    except ValueError as error:
        assert "holds out none" in str(error)  # noqa: PT017, what is raised depends on the example
        training, held_out = whole, Manifest(source=whole.source, rows=(), classes=whole.classes)
    assert sorted(ids(training) + ids(held_out)) == sorted(ids(whole))
    of = [{row.extra["person"] for row in part.rows} for part in (training, held_out)]
    assert not of[0] & of[1]
    assert set(counts(training)) == set(counts(whole))
    members = defaultdict(Counter)
    for label, group in cells:
        members[f"g{group}"][f"c{label}"] += 1
    for group in of[0]:  # a group left in training was refused when less was held out: it would still be refused
        after = counts(held_out) + members[group]
        if all(after[label] < counts(whole)[label] for label in members[group]):
            away = {name: counts(held_out)[name] - share * counts(whole)[name] for name in members[group]}
            assert sum(abs(away[n] + members[group][n]) - abs(away[n]) for n in away) >= -1e-9


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_share_outside_is_one_sentence(share: float) -> None:
    with pytest.raises(ValueError, match=r"must lie between 0 and 1, both excluded; got .*\.$"):
        split_holdout(manifest_of(["a"] * 4), share=share, seed=0)


def test_mistakes_are_sentences() -> None:
    with pytest.raises(
        ValueError, match=r"m\.csv has no column 'actor' to group clips by; it has path, video_id, person"
    ):
        split_holdout(manifest_of(["a"] * 4, groups=["x", "y", "z", "x"]), share=0.5, group="actor", seed=0)
    with pytest.raises(ValueError, match=r"m\.csv: a share of 0\.1 of each class holds out none of its 4 clips.*has 4"):
        split_holdout(manifest_of(["a"] * 4), share=0.1, seed=0)
    with pytest.raises(ValueError, match="1 of 4 clips without a label"):
        split_holdout(manifest_of(["a", "a", "a", None]), share=0.5, seed=0)
