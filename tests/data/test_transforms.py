"""Crops, resizing and normalisation against torchvision's own classes and against plain loops."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from coca_video.data.transforms import (
    Box,
    horizontal_flip,
    normalize,
    random_crop_box,
    resize_crop,
    square_crop_box,
)

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class TorchDrawn(np.random.Generator):
    """numpy's interface over torch's global generator, so that torchvision and we see the same random numbers."""

    def uniform(self, low: float, high: float) -> float:
        return torch.empty(1).uniform_(low, high).item()

    def integers(self, low: int, high: int) -> int:
        return torch.randint(low, high, size=(1,)).item()


def pictures(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


@given(st.integers(1, 500), st.integers(1, 500))
def test_square_crop_box(height: int, width: int) -> None:
    box = square_crop_box(height, width)
    assert box.height == box.width == min(height, width)
    for before, length, whole in ((box.top, box.height, height), (box.left, box.width, width)):
        after = whole - before - length
        assert before >= 0 and 0 <= after - before <= 1


@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.5, 1.0), (0.9, 1.0)])
@pytest.mark.parametrize("size", [(240, 320), (426, 320), (100, 1000), (1000, 100), (7, 5)])
def test_random_crop_box_is_torchvisions(size: tuple[int, int], scale: tuple[float, float]) -> None:
    height, width = size
    picture = torch.zeros(3, height, width)
    reference = v2.RandomResizedCrop(8, scale=scale)
    for seed in range(200):
        torch.manual_seed(seed)
        box = random_crop_box(height, width, rng=TorchDrawn(np.random.Philox(0)), scale=scale)
        torch.manual_seed(seed)
        theirs = reference.make_params([picture])
        # torchvision computes the aspect in fp32: a side may round the other way, by one pixel
        expected = Box(top=theirs["top"], left=theirs["left"], height=theirs["height"], width=theirs["width"])
        assert max(abs(a - b) for a, b in zip(box, expected, strict=True)) <= 1
    torch.manual_seed(0)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 10**6), st.floats(0.05, 1.0))
def test_random_crop_box_lies_within(height: int, width: int, seed: int, low: float) -> None:
    box = random_crop_box(height, width, rng=np.random.default_rng(seed), scale=(low, 1.0))
    assert box.height >= 1 and box.width >= 1 and box.top >= 0 and box.left >= 0
    assert box.top + box.height <= height and box.left + box.width <= width


def test_random_crop_box_spread() -> None:
    rng = np.random.default_rng(0)
    boxes = [random_crop_box(1000, 1000, rng=rng, scale=(0.1, 0.5)) for _ in range(3000)]
    areas = np.array([box.height * box.width for box in boxes]) / 1e6
    aspects = np.log([box.width / box.height for box in boxes])
    assert 0.099 < areas.min() < 0.105 and 0.495 < areas.max() < 0.501
    assert areas.mean() == pytest.approx(0.3, abs=3 * 0.4 / math.sqrt(12 * 3000))  # three deviations of a mean
    assert aspects.mean() == pytest.approx(0.0, abs=3 * 2 * math.log(4 / 3) / math.sqrt(12 * 3000))


def test_random_crop_box_says_what_is_wrong() -> None:
    for scale in ((0.0, 1.0), (0.8, 0.5), (0.5, 1.5)):
        with pytest.raises(ValueError, match="0 < low <= high"):
            random_crop_box(9, 9, rng=np.random.default_rng(0), scale=scale)


@pytest.mark.parametrize("shape", [(3, 50, 70), (4, 3, 50, 70), (2, 4, 3, 50, 70)])
@pytest.mark.parametrize("size", [16, 40, 96])  # smaller and larger than the box
def test_resize_crop_is_torchvisions(shape: tuple[int, ...], size: int) -> None:
    frames, box = pictures(*shape), Box(top=5, left=11, height=40, width=40)
    out = resize_crop(frames, box=box, size=size)
    cut = v2.functional.crop(frames, 5, 11, 40, 40)
    assert out.dtype == torch.uint8
    assert torch.equal(out, v2.Resize((size, size), antialias=True)(cut))


def test_bicubic_resizing_is_torchvisions() -> None:
    frames, box = pictures(3, 50, 70), Box(top=5, left=11, height=40, width=40)
    cut = v2.functional.crop(frames, 5, 11, 40, 40)
    resize = v2.Resize((24, 24), interpolation=v2.InterpolationMode.BICUBIC, antialias=True)
    out = resize_crop(frames, box=box, size=24, interpolation="bicubic")
    assert torch.equal(out, resize(cut))
    assert not torch.equal(out, resize_crop(frames, box=box, size=24))


def test_resize_crop_against_floating_point() -> None:
    frames = pictures(2, 3, 60, 90)
    out = resize_crop(frames, box=Box(top=3, left=8, height=50, width=64), size=24)
    exact = F.interpolate(frames[..., 3:53, 8:72].double(), size=(24, 24), mode="bilinear", antialias=True)
    assert (out.double() - exact).abs().max() <= 1.0  # uint8 arithmetic: one grey level
    assert (out.double() - exact).abs().mean() < 0.3  # rounding alone gives 0.25


def test_a_box_of_the_final_size_is_cut_out_unchanged() -> None:
    frames = pictures(2, 3, 30, 30)
    out = resize_crop(frames, box=Box(top=2, left=4, height=20, width=20), size=20)
    assert torch.equal(out, frames[..., 2:22, 4:24])


def test_a_box_outside_the_frame() -> None:
    # torchvision would pad it with black
    for box in (Box(0, 0, 31, 10), Box(-1, 0, 5, 5), Box(0, 25, 5, 6)):
        with pytest.raises(ValueError, match="a box within the frame of 30 x 30"):
            resize_crop(pictures(3, 30, 30), box=box, size=8)


def test_horizontal_flip() -> None:
    frames = pictures(2, 3, 5, 7)
    assert torch.equal(horizontal_flip(frames), v2.functional.horizontal_flip(frames))
    assert torch.equal(horizontal_flip(frames)[..., 0], frames[..., 6])


@pytest.mark.parametrize("shape", [(3, 4, 5), (2, 3, 4, 5), (2, 6, 3, 4, 5)])
def test_normalize(shape: tuple[int, ...]) -> None:
    frames = pictures(*shape)
    out = normalize(frames, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    scaled = v2.functional.to_dtype(frames, torch.float64, scale=True)
    exact = v2.functional.normalize(scaled, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=1e-6)


def test_normalize_in_bf16_rounds_once() -> None:
    frames = pictures(2, 3, 8, 8)
    single = normalize(frames, mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assert torch.equal(normalize(frames, mean=IMAGENET_MEAN, std=IMAGENET_STD, dtype=torch.bfloat16), single.bfloat16())


def test_normalize_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="three means"):
        normalize(pictures(3, 4, 4), mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="positive deviations"):
        normalize(pictures(3, 4, 4), mean=(0.5, 0.5, 0.5), std=(0.5, 0.0, 0.5))
