"""Class-balanced order: as many clips of each class in an epoch, however many each has."""

import hashlib
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt64

from coca_video.data.loader import MASK_64, MIN_HALF_BITS, NUM_ROUNDS, Order, SampleKey, keyed_permutation
from coca_video.data.manifest import Manifest
from coca_video.data.table import VideoRows

_GOLDEN = 0x9E3779B97F4A7C15  # splitmix64's increment (Steele, Lea, Flood 2014)


@dataclass(frozen=True, kw_only=True, eq=False)
class ClassBalancedOrder(Order):
    """An endless stream like `Order`, in which every class that has samples comes equally often.

    An epoch is `num_samples` positions; in it a class has num_samples / classes of them, rounded down or up (which
    classes get one more goes round from epoch to epoch). The draws of a class go through its members in keyed
    permutations, one after the other: a small class repeats its members, a large one shows them all in the course of
    several epochs. A SampleKey's `epoch` is how often that sample has been drawn before, so that a clip that comes
    three times in an epoch is augmented in three ways.

    labels: the class of each sample. The memory is two numbers a sample.
    """

    labels: Int64[np.ndarray, "samples"]
    _members: Int64[np.ndarray, "samples"] = field(init=False, repr=False)
    _firsts: Int64[np.ndarray, "classes"] = field(init=False, repr=False)
    _sizes: Int64[np.ndarray, "classes"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.labels) != self.num_samples:
            raise ValueError(f"A class-balanced order of {self.num_samples} samples got {len(self.labels)} labels.")
        _, sizes = np.unique(self.labels, return_counts=True)
        object.__setattr__(self, "_members", np.argsort(self.labels, kind="stable"))
        object.__setattr__(self, "_firsts", np.cumsum(sizes) - sizes)
        object.__setattr__(self, "_sizes", sizes)

    def batch(self, step: int) -> list[SampleKey]:
        """The keys of step `step` (from 0), in order."""
        if step < 0:
            raise ValueError(f"Steps count from 0, got {step}.")
        stream = np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)
        epochs, positions = np.divmod(stream, self.num_samples)
        slots = np.empty_like(stream)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            key = int(_hash(f"balanced {self.seed} {epoch}"))
            slots[here] = keyed_permutation(positions[here], size=self.num_samples, key=key)
        # Slots number the stream through all epochs: the classes take turns in them, and so does who gets one more.
        draws, classes = np.divmod(epochs * self.num_samples + slots, len(self._sizes))
        passes, places = np.divmod(draws, self._sizes[classes])
        keys = _mix(
            _hash(f"members {self.seed}")
            + _mix(classes.astype(np.uint64) * np.uint64(_GOLDEN))
            + passes.astype(np.uint64)
        )
        members = self._members[self._firsts[classes] + _permute_each(places, sizes=self._sizes[classes], keys=keys)]
        return [SampleKey(*pair) for pair in zip(passes.tolist(), members.tolist(), strict=True)]


def class_balanced(manifest: Manifest, *, batch_size: int, seed: int) -> ClassBalancedOrder:
    """The class-balanced order of a manifest's clips; ValueError if one has no label."""
    manifest.check_labels()
    rows = manifest.rows
    assert isinstance(rows, VideoRows)
    number = {name: index for index, name in enumerate(manifest.classes)}
    labels = np.fromiter((number[label or ""] for label in rows.labels), np.int64, len(rows))
    return ClassBalancedOrder(num_samples=len(rows), batch_size=batch_size, seed=seed, labels=labels)


def _hash(text: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def _permute_each(
    places: Int64[np.ndarray, "n"], *, sizes: Int64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"]
) -> Int64[np.ndarray, "n"]:
    """Each place's image under a bijection of range(its size) chosen by its key: `keyed_permutation`, one of each.

    128 permutations of one place each would take 128 times its 0.1 ms.
    """
    bits = np.ceil(np.log2(np.maximum(sizes, 2))).astype(np.uint64)  # exact to 2**48 samples
    half_bits = np.maximum((bits + np.uint64(1)) // np.uint64(2), np.uint64(MIN_HALF_BITS))
    images, outside = places.astype(np.uint64), np.arange(len(places))
    while outside.size:
        images[outside] = _feistel(images[outside], half_bits=half_bits[outside], keys=keys[outside])
        outside = outside[images[outside] >= sizes[outside].astype(np.uint64)]
    return images.astype(np.int64)


def _feistel(
    values: UInt64[np.ndarray, "n"], *, half_bits: UInt64[np.ndarray, "n"], keys: UInt64[np.ndarray, "n"]
) -> UInt64[np.ndarray, "n"]:
    mask = (np.uint64(1) << half_bits) - np.uint64(1)
    left, right = values >> half_bits, values & mask
    for number in range(NUM_ROUNDS):
        round_keys = _mix(keys + np.uint64((number + 1) * _GOLDEN & MASK_64))
        left, right = right, left ^ (_mix(right ^ round_keys) & mask)
    joined: UInt64[np.ndarray, "n"] = (left << half_bits) | right
    return joined


def _mix(values: UInt64[np.ndarray, "n"]) -> UInt64[np.ndarray, "n"]:
    """The finaliser of splitmix64: every input bit moves every output bit."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(factor)
    mixed: UInt64[np.ndarray, "n"] = values ^ (values >> np.uint64(31))
    return mixed
