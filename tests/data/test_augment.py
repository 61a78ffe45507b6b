"""Augmentation of batches against torchvision v2 clip by clip, its draws against closed forms, flips by class name."""

import math
from collections.abc import Callable
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from coca_video.data.augment import (
    AugmentConfig,
    AugmentParameters,
    apply,
    colour_jitter,
    draw,
    erase_box,
    flips_allowed,
)
from coca_video.data.loader import SampleKey
from coca_video.data.rand_augment import OPERATIONS, SIGNED, apply_operations, operation_magnitude
from coca_video.data.sampling import sample_rng

DATASETS = Path(__file__).resolve().parents[2] / "datasets"
MEAN = (0.485, 0.456, 0.406)
Item = tuple[Callable[..., Any], bool]  # of torchvision's table: the bins of an operation, and whether it is signed
EVERYTHING = AugmentConfig(
    rand_augment_num_ops=2,
    rand_augment_magnitude=20,
    colour_jitter=(0.4, 0.4, 0.4, 0.1),
    erase_probability=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


class TorchDrawn(np.random.Generator):
    """numpy's interface over torch's global generator, so that torchvision and we see the same random numbers."""

    def __init__(self) -> None:
        super().__init__(np.random.PCG64(0))

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low: int, high: int) -> int:
        return torch.randint(low, high, size=(1,)).item()


def clips(batch: int, *, frames: int = 2, height: int = 29, width: int = 36, seed: int = 0) -> torch.Tensor:
    """Noise, a grey clip, where rounding decides most, and one of few, narrow values, which statistics stretch."""
    shape = (batch, frames, 3, height, width)
    result = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))
    result[0] = result[0, :, :1]
    result[1] = 90 + result[1] // 8
    return result


def keys(number: int, *, epoch: int = 0) -> list[SampleKey]:
    return [SampleKey(epoch=epoch, index=index) for index in range(number)]


def drawn(config: AugmentConfig, *, number: int, seed: int = 0) -> AugmentParameters:
    return draw(config, keys=keys(number), seed=seed, height=29, width=36, mean=MEAN)


def arrays(parameters: AugmentParameters) -> dict[str, np.ndarray]:
    """Every array of the parameters that has a row a clip."""
    own = {name: value for name, value in vars(parameters).items() if name not in ("size", "erase_value", "mix")}
    return own if parameters.mix is None else own | vars(parameters.mix)


class ScriptedRandAugment(v2.RandAugment):
    """torchvision's class with the operations given and not drawn."""

    def __init__(self, names: list[str], *, magnitude: int) -> None:
        super().__init__(num_ops=len(names), magnitude=magnitude)
        self.names = iter(names)

    def _get_random_item(
        self, dct: dict[str, tuple[Callable[..., Any], bool]]
    ) -> tuple[str, tuple[Callable[..., Any], bool]]:
        name = next(self.names)
        return name, dct[name]


def torchvision_rand_augment(
    clip: torch.Tensor, *, names: list[str], negative: list[bool], magnitude: int
) -> torch.Tensor:
    """What torchvision makes of a clip, its coin for the sign (drawn for signed operations alone) replaced."""
    coins = iter([0.0 if sign else 1.0 for name, sign in zip(names, negative, strict=True) if name in SIGNED])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "rand", lambda _shape: torch.tensor(next(coins)))
        return ScriptedRandAugment(names, magnitude=magnitude)(clip)


# --- RandAugment


def test_the_operations_are_those_of_torchvision() -> None:
    space = v2.RandAugment._AUGMENTATION_SPACE
    assert tuple(space) == OPERATIONS
    assert {name for name, (_, is_signed) in space.items() if is_signed} == SIGNED
    for name, (bins, _) in space.items():
        expected = bins(31, 97, 181)
        ours = [operation_magnitude(name, magnitude=m, height=97, width=181) for m in range(31)]
        assert ours == ([0.0] * 31 if expected is None else [float(value) for value in expected]), name


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [1, 9, 20, 30])
def test_each_operation_equals_torchvision(name: str, magnitude: int) -> None:
    """A batch in which every clip has the operation, signs mixed, against torchvision on each clip alone."""
    frames, number = clips(4), OPERATIONS.index(name)
    negative = [name in SIGNED and i % 2 == 1 for i in range(4)]
    value = operation_magnitude(name, magnitude=magnitude, height=29, width=36)
    magnitudes = np.array([[-value if sign else value] for sign in negative])
    ours = apply_operations(frames, operations=np.full((4, 1), number), magnitudes=magnitudes)
    for clip, sign, result in zip(frames, negative, ours, strict=True):
        expected = torchvision_rand_augment(clip, names=[name], negative=[sign], magnitude=magnitude)
        assert torch.equal(result, expected)
    if magnitude > 1:  # on this small frame bin 1 moves nothing by half a pixel
        assert torch.equal(ours, frames) == (name == "Identity")


def test_drawn_operations_equal_torchvision_clip_by_clip() -> None:
    """Through draw and apply, 24 clips and three operations each, in the order drawn."""
    config = AugmentConfig(flip_probability=0.0, rand_augment_num_ops=3, rand_augment_magnitude=20)
    frames, parameters = clips(24, seed=3), drawn(config, number=24)
    ours = apply(frames, parameters=parameters)
    assert len({OPERATIONS[number] for number in parameters.operations.flat}) == 14  # the draw leaves none out
    for i, clip in enumerate(frames):
        names = [OPERATIONS[number] for number in parameters.operations[i]]
        negative = [name in SIGNED and value < 0 for name, value in zip(names, parameters.magnitudes[i], strict=True)]
        assert torch.equal(ours[i], torchvision_rand_augment(clip, names=names, negative=negative, magnitude=20))


def test_operations_are_drawn_evenly_and_independently() -> None:
    """1/14 each at both places, 1/196 each pair, half of the signs; each within 4.5 standard deviations."""
    number = 6000
    parameters = drawn(AugmentConfig(rand_augment_num_ops=2, rand_augment_magnitude=20), number=number)
    first, second = parameters.operations.T
    for count in (*np.bincount(first, minlength=14), *np.bincount(second, minlength=14)):
        assert abs(count - number / 14) < 4.5 * math.sqrt(number / 14 * 13 / 14)
    pairs = np.bincount(first * 14 + second, minlength=196)
    assert abs(pairs - number / 196).max() < 4.5 * math.sqrt(number / 196)
    signed = np.isin(parameters.operations, [OPERATIONS.index(name) for name in SIGNED])
    assert abs((parameters.magnitudes[signed] < 0).mean() - 0.5) < 4.5 * 0.5 / math.sqrt(signed.sum())
    assert (parameters.magnitudes[~signed] >= 0).all()


# --- colour jitter


@pytest.mark.parametrize("change", range(4))
def test_each_change_of_colour_equals_torchvision(change: int) -> None:
    """One change for all clips, each with its own factor; the order does not matter then."""
    function = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)[change]
    values = [-0.5, -0.31, 0.07, 0.23, 0.5] if change == 3 else [0.0, 0.3, 0.77, 1.21, 1.9]
    factors = np.tile([1.0, 1.0, 1.0, 0.0], (5, 1))
    factors[:, change] = values
    frames = clips(5, height=64, width=48)
    ours = colour_jitter(frames, order=np.tile(np.arange(4), (5, 1)), factors=factors)
    for clip, value, result in zip(frames, values, ours, strict=True):
        assert torch.equal(result, function(clip, value))
    assert not torch.equal(ours, frames)


def test_jitter_applies_in_the_order_drawn() -> None:
    """All 24 orders in one batch against torchvision's ColorJitter given the same order and factors."""
    orders = np.array(list(permutations(range(4))))
    rng = np.random.default_rng(5)
    factors = np.column_stack([rng.uniform(0.3, 1.7, (24, 3)), rng.uniform(-0.4, 0.4, 24)])
    frames = clips(24, frames=1)
    ours = colour_jitter(frames, order=orders, factors=factors)
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    for i, clip in enumerate(frames):
        parameters = dict(zip(names, factors[i].tolist(), strict=True)) | {"fn_idx": torch.from_numpy(orders[i])}
        assert torch.equal(ours[i], v2.ColorJitter(0.5, 0.5, 0.5, 0.5).transform(clip, parameters))


def test_jitter_is_drawn_as_torchvision_says() -> None:
    """Uniform within the bounds (mean and variance of a uniform number), all orders equally often."""
    number = 4800
    parameters = drawn(AugmentConfig(colour_jitter=(1.2, 1.5, 0.4, 0.1)), number=number)
    bounds = [(0.0, 2.2), (0.0, 2.5), (0.6, 1.4), (-0.1, 0.1)]
    for factors, (low, high) in zip(parameters.jitter_factors.T, bounds, strict=True):
        assert low <= factors.min() and factors.max() <= high
        assert factors.mean() == pytest.approx((low + high) / 2, abs=4.5 * (high - low) / math.sqrt(12 * number))
        assert factors.var() == pytest.approx((high - low) ** 2 / 12, rel=0.1)
    counts = np.unique(parameters.jitter_order, axis=0, return_counts=True)[1]
    assert len(counts) == 24
    assert abs(counts - number / 24).max() < 4.5 * math.sqrt(number / 24)


# --- erasing


@pytest.mark.parametrize(("height", "width"), [(224, 224), (30, 90), (3, 2), (1, 1)])
def test_the_box_to_erase_is_torchvisions(height: int, width: int) -> None:
    erasing, image = v2.RandomErasing(), torch.zeros(3, height, width)
    for seed in range(200):
        torch.manual_seed(seed)
        expected = erasing.make_params([image])
        torch.manual_seed(seed)
        box = erase_box(height, width, rng=TorchDrawn())
        if expected["v"] is None:
            assert box is None
        else:
            assert box == tuple(expected[name] for name in "ijhw")


@pytest.mark.parametrize(("erase_value", "level"), [("mean", (124, 116, 104)), ("black", (0, 0, 0))])
def test_erasing_equals_torchvision(erase_value: str, level: tuple[int, int, int]) -> None:
    """Levels by hand: 255 times 0.485, 0.456 and 0.406 are 123.675, 116.28 and 103.53."""
    config = AugmentConfig(flip_probability=0.0, erase_probability=0.5, erase_value=erase_value)
    frames, parameters = clips(16), drawn(config, number=16)
    ours = apply(frames, parameters=parameters)
    value = torch.tensor(level, dtype=torch.uint8)[:, None, None]
    for clip, box, result in zip(frames, parameters.erase_boxes.tolist(), ours, strict=True):
        assert torch.equal(result, F.erase(clip, *box, value))
    assert 0 < sum(torch.equal(a, b) for a, b in zip(frames, ours, strict=True)) < 16


# --- flips


def test_flip_equals_torchvision_and_keeps_to_what_is_allowed() -> None:
    frames, allowed = clips(12), np.arange(12) % 3 > 0
    parameters = draw(
        AugmentConfig(flip_probability=1.0),
        keys=keys(12),
        seed=0,
        height=29,
        width=36,
        mean=MEAN,
        may_flip=allowed,
    )
    for clip, flipped, result in zip(frames, allowed, apply(frames, parameters=parameters), strict=True):
        assert torch.equal(result, F.horizontal_flip(clip) if flipped else clip)


@pytest.mark.parametrize("probability", [0.0, 0.25, 0.5, 1.0])
def test_flips_come_as_often_as_asked(probability: float) -> None:
    flips = drawn(AugmentConfig(flip_probability=probability), number=3000).flip
    assert abs(flips.mean() - probability) <= 4.5 * math.sqrt(probability * (1 - probability) / 3000)


def test_flips_are_those_that_the_reader_of_clips_draws() -> None:
    """VideoDataset flips by these numbers: a run whose flips move to the device sees the clips that it saw."""
    rngs = [sample_rng(seed=7, epoch=2, index=index, purpose="flip") for index in range(50)]
    parameters = draw(AugmentConfig(), keys=keys(50, epoch=2), seed=7, height=8, width=8, mean=MEAN)
    assert parameters.flip.tolist() == [rng.random() < 0.5 for rng in rngs]


def test_left_and_right_of_something_something_v2() -> None:
    """The six numbers are the keys of MMAction2's flip_label_map for this data set."""
    classes = (DATASETS / "something_something_v2" / "classes.txt").read_text().splitlines()
    assert np.flatnonzero(~flips_allowed(classes)).tolist() == [86, 87, 93, 94, 166, 167]
    swapped = [name.replace("left", "R").replace("right", "left").replace("R", "right") for name in classes]
    for one, other in ((86, 87), (93, 94), (166, 167)):
        assert swapped[one] == classes[other]
    idiom = "Plugging something into something but pulling it right out as you remove your hand"
    assert flips_allowed(classes)[classes.index(idiom)]


def test_no_other_data_set_tells_left_from_right() -> None:
    lists = [path for path in DATASETS.glob("*/classes*.txt") if path.parent.name != "something_something_v2"]
    assert len(lists) == 9
    for path in lists:
        assert flips_allowed(path.read_text().splitlines()).all(), path


def test_words_of_direction() -> None:
    directed = [
        "sliding left",
        "turn_right",
        "Rightward swipe",
        "turning counter-clockwise",
        "anticlockwise",
        "clockwise",
    ]
    harmless = ["standing upright", "sliding", "clock", "leftover food", "pulling it right away", "copyright"]
    assert flips_allowed([*directed, *harmless]).tolist() == [False] * 6 + [True] * 6


# --- the draw


def test_a_draw_is_a_function_of_seed_epoch_and_index() -> None:
    """Alone, in another order and in another batch a clip draws the same; another seed or epoch gives other draws."""
    whole = arrays(draw(EVERYTHING, keys=keys(9), seed=1, height=29, width=36, mean=MEAN))
    backwards = arrays(draw(EVERYTHING, keys=keys(9)[::-1], seed=1, height=29, width=36, mean=MEAN))
    alone = arrays(draw(EVERYTHING, keys=keys(9)[4:5], seed=1, height=29, width=36, mean=MEAN))
    others = [
        arrays(draw(EVERYTHING, keys=keys(9), seed=2, height=29, width=36, mean=MEAN)),
        arrays(draw(EVERYTHING, keys=keys(9, epoch=1), seed=1, height=29, width=36, mean=MEAN)),
    ]
    assert len(whole) == 9
    for name, values in whole.items():
        assert np.array_equal(values, backwards[name][::-1]) and np.array_equal(values[4:5], alone[name]), name
        assert not any(np.array_equal(values, other[name]) for other in others), name


def test_one_option_does_not_change_the_draws_of_another() -> None:
    everything, flips = drawn(EVERYTHING, number=40), drawn(AugmentConfig(), number=40)
    brightness = drawn(AugmentConfig(colour_jitter=(0.4, 0.0, 0.0, 0.0)), number=40)
    assert np.array_equal(everything.flip, flips.flip)
    assert np.array_equal(everything.jitter_factors[:, 0], brightness.jitter_factors[:, 0])
    assert (brightness.jitter_factors[:, 1:] == [1.0, 1.0, 0.0]).all()


def test_neither_drawing_nor_applying_touches_the_global_random_state() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    frames = clips(8)
    untouched = frames.clone()
    first, second = (apply(frames, parameters=drawn(EVERYTHING, number=8)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, frames) and torch.equal(frames, untouched)
    next_numbers = torch.rand(3).tolist(), np.random.random(3).tolist()  # noqa: NPY002
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002
    assert next_numbers == (torch.rand(3).tolist(), np.random.random(3).tolist())  # noqa: NPY002


def test_all_frames_of_a_clip_are_treated_alike() -> None:
    """Frames that are equal stay equal, over 30 clips with everything on."""
    frames = clips(30, frames=1).expand(-1, 3, -1, -1, -1).contiguous()
    result = apply(frames, parameters=drawn(EVERYTHING, number=30))
    assert torch.equal(result, result[:, :1].expand_as(result)) and not torch.equal(result, frames)


def test_everything_comes_in_torchvisions_order() -> None:
    """Flip, RandAugment, jitter, erasing: the composition of torchvision's functions on each clip."""
    frames, parameters = clips(10, seed=8), drawn(EVERYTHING, number=10)
    ours = apply(frames, parameters=parameters)
    functions = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)
    value = torch.from_numpy(parameters.erase_value)[:, None, None]
    for i, expected in enumerate(frames):
        if parameters.flip[i]:
            expected = F.horizontal_flip(expected)
        names = [OPERATIONS[number] for number in parameters.operations[i]]
        negative = [name in SIGNED and value < 0 for name, value in zip(names, parameters.magnitudes[i], strict=True)]
        expected = torchvision_rand_augment(expected, names=names, negative=negative, magnitude=20)
        for change in parameters.jitter_order[i]:
            expected = functions[change](expected, float(parameters.jitter_factors[i, change]))
        assert torch.equal(ours[i], F.erase(expected, *parameters.erase_boxes[i].tolist(), value))


def test_nothing_on_changes_nothing() -> None:
    frames = clips(4)
    assert torch.equal(apply(frames, parameters=drawn(AugmentConfig(flip_probability=0.0), number=4)), frames)
    assert drawn(AugmentConfig(), number=4).mix is None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"flip_probability": 1.5}, "expected flip_probability between 0 and 1, got 1.5"),
    ({"erase_probability": -0.1}, "expected erase_probability between 0 and 1, got -0.1"),
    ({"rand_augment_num_ops": 2, "rand_augment_magnitude": 31}, "rand_augment_magnitude of 0 to 30"),
    ({"rand_augment_num_ops": 2}, "both above 0, or both 0 for no RandAugment, got 2 and 0"),
    ({"rand_augment_magnitude": 9}, "both above 0, or both 0 for no RandAugment, got 0 and 9"),
    ({"colour_jitter": (0.1, 0.1, 0.1, 0.6)}, "its hue at most 0.5"),
    ({"colour_jitter": (-0.1, 0.1, 0.1, 0.1)}, "expected colour_jitter of at least 0"),
    ({"erase_value": "black"}, "does nothing while erase_probability is 0"),
    ({"mixup_alpha": -1.0}, "expected mixup_alpha of at least 0, got -1.0"),
]


@pytest.mark.parametrize(("options", "sentence"), WRONG)
def test_a_config_that_cannot_be_is_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        AugmentConfig(**options)
    with pytest.raises(ValueError, match="expected a RandAugment magnitude of 0 to 30, got 31"):
        operation_magnitude("Rotate", magnitude=31, height=4, width=4)
