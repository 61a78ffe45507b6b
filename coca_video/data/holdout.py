"""A held-out part of a training split, to choose a rate or a checkpoint on: the test split chooses nothing."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Int64

from coca_video.data.manifest import Manifest
from coca_video.data.table import TextColumn, VideoRows


def split_holdout(
    manifest: Manifest, *, share: float, group: str | None = None, seed: int
) -> tuple[Manifest, Manifest]:
    """The clips to train on and those held out, both in the order of `manifest`, with all classes.

    Of each class the number of clips nearest to `share` of it is held out (a tie stays in training), chosen by a hash
    of (seed, video_id): a clip's place in the draw does not depend on which others there are. A class keeps one
    training clip at least, so a class with a single clip, or a single group, is not in the held-out part.

    group: a column (`path`, `video_id` or one that the manifest adds), whose clips of one cell stay together: people,
    or the recording that several clips were cut from. A clip with an empty cell is a group of its own. Groups are gone
    through in the order of the hash of (seed, cell), and one is held out if that brings its classes' numbers nearer to
    their shares, distances added up over its classes, and each keeps a training clip. So a group of several classes is
    never split, and a class may end further from its share than with groups of one class.

    Raises:
        ValueError: a share that is not in (0, 1), a column that is not there, a clip without a label, or a share that
            holds out nothing.
    """
    if not 0 < share < 1:
        raise ValueError(
            f"The held-out share of the training clips must lie between 0 and 1, both excluded; got {share}."
        )
    manifest.check_labels()
    rows = manifest.rows
    assert isinstance(rows, VideoRows)
    classes, _ = _numbers(rows.labels)
    groups, names = _groups(rows, group=group, source=str(manifest.source))
    held = _choose(classes, groups=groups, order=_hash_order(names, seed=seed), share=share)[groups]
    if not held.any():
        raise ValueError(
            f"{manifest.source}: a share of {share:g} of each class holds out none of its {len(rows)} clips, of which "
            f"the largest class has {int(np.bincount(classes).max())}; take a larger share"
            + (", or smaller groups." if group is not None else ".")
        )
    training, held_out = np.flatnonzero(~held), np.flatnonzero(held)
    return replace(manifest, rows=rows.take(training)), replace(manifest, rows=rows.take(held_out))


def _groups(rows: VideoRows, *, group: str | None, source: str) -> tuple[Int64[np.ndarray, "rows"], list[str]]:
    """Each row's group, and the groups' names."""
    if group is None:
        return _numbers(rows.video_ids)
    columns = {"path": rows.paths, "video_id": rows.video_ids, **rows.extra}
    if group not in columns:
        raise ValueError(f"{source} has no column {group!r} to group clips by; it has {', '.join(columns)}.")
    # the NUL, which no cell of a CSV holds, keeps the clip "a" without a cell apart from the clips of a cell "a"
    own = [text or f"\0{video_id}" for text, video_id in zip(columns[group], rows.video_ids, strict=True)]
    return _numbers(own)


def _numbers(texts: TextColumn | Sequence[str | None]) -> tuple[Int64[np.ndarray, "rows"], list[str]]:
    """A number for each different text, in the order of first appearance, and the texts by number."""
    numbers: dict[str, int] = {}
    codes = np.fromiter((numbers.setdefault(text or "", len(numbers)) for text in texts), np.int64, len(texts))
    return codes, list(numbers)


def _hash_order(names: Sequence[str], *, seed: int) -> Int64[np.ndarray, "groups"]:
    """Group numbers by the hash of (seed, name)."""
    key = hashlib.blake2b(f"held out {seed}".encode(), digest_size=32).digest()
    digests = [
        hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16, key=key).digest() for name in names
    ]
    return np.array(sorted(range(len(names)), key=digests.__getitem__), dtype=np.int64)


def _choose(
    classes: Int64[np.ndarray, "rows"],
    *,
    groups: Int64[np.ndarray, "rows"],
    order: Int64[np.ndarray, "groups"],
    share: float,
) -> Bool[np.ndarray, "groups"]:
    """Which groups are held out."""
    num_classes = int(classes.max()) + 1
    cells, counts = np.unique(groups * num_classes + classes, return_counts=True)
    of_class = (cells % num_classes).tolist()
    first_cell = np.searchsorted(cells, np.arange(len(order) + 1) * num_classes).tolist()
    in_cell: list[int] = counts.tolist()
    totals: list[int] = np.bincount(classes, minlength=num_classes).tolist()
    held, chosen = [0] * num_classes, np.zeros(len(order), dtype=np.bool_)
    for number in order.tolist():
        parts = [(of_class[cell], in_cell[cell]) for cell in range(first_cell[number], first_cell[number + 1])]
        if any(held[name] + count >= totals[name] for name, count in parts):
            continue
        wanted = [(held[name] - share * totals[name], count) for name, count in parts]
        if sum(abs(away + count) - abs(away) for away, count in wanted) < 0:
            chosen[number] = True
            for name, count in parts:
                held[name] += count
    return chosen
