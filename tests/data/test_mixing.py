"""Mixup and CutMix against torchvision v2's classes given the same share and box; the draw against closed forms."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

from coca_video.data.augment import AugmentConfig, draw
from coca_video.data.loader import SampleKey
from coca_video.data.mixing import MixParameters, box_mask, cutmix_box, mix
from coca_video.data.transforms import Box, normalize

HEIGHT, WIDTH = 20, 33


def batch(number: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Clips and one-hot labels of five classes."""
    rng = np.random.default_rng(0)
    frames = torch.from_numpy(rng.integers(0, 256, (number, 2, 3, HEIGHT, WIDTH), dtype=np.uint8))
    labels = torch.nn.functional.one_hot(torch.from_numpy(rng.integers(0, 5, number)), 5).float()
    return frames, labels


def video(transform: v2.Transform, frames: torch.Tensor, *, given: dict[str, Any]) -> torch.Tensor:
    """Torchvision's transform of a batch of videos, its parameters given."""
    return transform.transform(tv_tensors.Video(frames), given).as_subclass(torch.Tensor)


def drawn(*, number: int, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0) -> MixParameters:
    config = AugmentConfig(mixup_alpha=mixup_alpha, cutmix_alpha=cutmix_alpha)
    keys = [SampleKey(epoch=0, index=index) for index in range(number)]
    parameters = draw(config, keys=keys, seed=0, height=HEIGHT, width=WIDTH, mean=(0.5, 0.5, 0.5)).mix
    assert parameters is not None
    return parameters


def test_mixup_equals_torchvision() -> None:
    """Each row against torchvision's whole batch with that row's share; pixels rounded, labels exactly."""
    frames, labels = batch()
    parameters = drawn(number=6, mixup_alpha=0.8)
    mixed, soft = mix(frames, labels_onehot=labels, parameters=parameters)
    for i, share in enumerate(parameters.weights.tolist()):
        given = {"lam": share, "labels": labels, "batch_size": 6}
        assert torch.equal(mixed[i], video(v2.MixUp(), frames.float(), given=given)[i].round().to(torch.uint8))
        assert torch.equal(soft[i], v2.MixUp().transform(labels, given)[i])
    assert len(set(parameters.weights)) == 6 and not torch.equal(soft, labels)


def test_cutmix_equals_torchvision() -> None:
    frames, labels = batch()
    parameters = drawn(number=6, cutmix_alpha=1.0)
    mixed, soft = mix(frames, labels_onehot=labels, parameters=parameters)
    for i, (top, left, height, width) in enumerate(parameters.boxes.tolist()):
        share = 1 - height * width / (HEIGHT * WIDTH)
        corners = (left, top, left + width, top + height)
        given = {"box": corners, "lam_adjusted": share, "labels": labels, "batch_size": 6}
        assert torch.equal(mixed[i], video(v2.CutMix(), frames, given=given)[i])
        assert torch.equal(soft[i], v2.CutMix().transform(labels, given)[i])
    assert not torch.equal(mixed, frames)


def test_both_in_one_batch() -> None:
    """A clip gets its own kind; the label's share is the mean share of its own pixels."""
    frames, labels = batch(8)
    frames[:] = torch.arange(8, dtype=torch.uint8).view(-1, 1, 1, 1, 1) * 10  # clip i is 10 i everywhere
    weights = np.array([0.5, 0.25, 0.75, 0.5, 0.0, 1.0, 0.5, 0.5])
    boxes = np.zeros((8, 4), dtype=np.int64)
    boxes[1], boxes[6] = (0, 0, 15, 33), (5, 0, 10, 33)
    is_cutmix = np.isin(np.arange(8), [1, 6])
    parameters = MixParameters(weights=weights, is_cutmix=is_cutmix, boxes=boxes)
    mixed, soft = mix(frames, labels_onehot=labels, parameters=parameters)
    means = mixed.float().mean(dim=(1, 2, 3, 4)).tolist()
    assert means == [35, 2.5, 18, 25, 30, 50, 55, 65]  # by hand; 17.5 is rounded to the even 18
    assert torch.equal(mixed[1, :, :, :15], torch.zeros(2, 3, 15, 33, dtype=torch.uint8))
    for i in range(8):
        assert torch.equal(soft[i], weights[i] * labels[i] + (1 - weights[i]) * labels[i - 1])


def test_mixing_before_the_normalisation_is_mixing_after_it() -> None:
    """Up to half a level: 0.5 / 255 / std."""
    frames, labels = batch()
    parameters = drawn(number=6, mixup_alpha=1.0)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mixed, _ = mix(frames, labels_onehot=labels, parameters=parameters)
    share = torch.from_numpy(parameters.weights).view(-1, 1, 1, 1, 1)
    normalised = normalize(frames, mean=mean, std=std).double()
    expected = share * normalised + (1 - share) * normalised.roll(1, 0)
    difference = (normalize(mixed, mean=mean, std=std).double() - expected).abs().max()
    assert 0.4 / 255 / 0.224 < difference < 0.5 / 255 / 0.224 + 1e-5


def test_the_box_of_cutmix_is_torchvisions(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(2)
    for _ in range(300):
        height, width = (int(side) for side in rng.integers(1, 60, 2))
        share, row, column = float(rng.random()), int(rng.integers(height)), int(rng.integers(width))
        transform = v2.CutMix()
        monkeypatch.setattr(transform._dist, "sample", lambda _shape, share=share: torch.tensor(share).double())
        centre = iter([column, row])
        with monkeypatch.context() as patch:
            patch.setattr(torch, "randint", lambda _high, size, centre=centre: torch.tensor([next(centre)]))
            expected = transform.make_params([torch.zeros(3, height, width)])
        box = cutmix_box(share, row=row, column=column, height=height, width=width)
        assert (box.left, box.top, box.left + box.width, box.top + box.height) == expected["box"]
        assert 1 - box.height * box.width / (height * width) == pytest.approx(expected["lam_adjusted"], abs=1e-15)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_shares_of_mixup_are_beta(alpha: float) -> None:
    """Mean 1/2 and variance 1 / (4 (2 alpha + 1)) of Beta(alpha, alpha); the fourth moment is at most the second."""
    number = 4000
    parameters = drawn(number=number, mixup_alpha=alpha)
    variance = 1 / (4 * (2 * alpha + 1))
    assert parameters.weights.mean() == pytest.approx(0.5, abs=4.5 * math.sqrt(variance / number))
    assert parameters.weights.var() == pytest.approx(variance, rel=0.1)
    assert not parameters.is_cutmix.any() and not parameters.boxes.any()


def test_cutmix_boxes_are_drawn_as_torchvision_says() -> None:
    """Centres uniform, a box's area at most 1 - share; the label's share is that of the clip's own pixels."""
    parameters = drawn(number=3000, cutmix_alpha=1.0)
    top, left, height, width = parameters.boxes.T
    assert parameters.is_cutmix.all()
    assert np.allclose(parameters.weights, 1 - height * width / (HEIGHT * WIDTH), rtol=0, atol=1e-15)
    inside = box_mask(parameters.boxes, height=HEIGHT, width=WIDTH)
    assert np.allclose(parameters.weights, 1 - inside.double().mean(dim=(1, 2)).numpy(), rtol=0, atol=1e-12)
    middle = (top > 0) & (left > 0) & (top + height < HEIGHT) & (left + width < WIDTH) & (height > 0) & (width > 0)
    centres = np.column_stack([top + height / 2, left + width / 2])[middle]
    # A box that no edge cuts lies in the middle; mirrored positions come equally often. Centres are whole pixels, the
    # first of which is 0: their mean is (side - 1) / 2, mirrored about side / 2, so within half a pixel.
    deviation = centres.std(axis=0) / math.sqrt(len(centres))
    assert (abs(centres.mean(axis=0) - np.array([HEIGHT, WIDTH]) / 2) < 0.5 + 4.5 * deviation).all()


def test_one_or_the_other_evenly() -> None:
    both = drawn(number=3000, mixup_alpha=0.8, cutmix_alpha=1.0)
    assert abs(both.is_cutmix.mean() - 0.5) < 4.5 * 0.5 / math.sqrt(3000)
    assert (both.boxes.any(axis=1) <= both.is_cutmix).all()
    assert both.weights[~both.is_cutmix].var() == pytest.approx(1 / (4 * 2.6), rel=0.1)


def test_box_mask() -> None:
    expected = np.zeros((2, 4, 5), dtype=bool)
    expected[0, 1:3, 2:5] = True
    mask = box_mask(np.array([Box(1, 2, 2, 3), Box(0, 0, 0, 0)], dtype=np.int64), height=4, width=5)
    assert np.array_equal(mask.numpy(), expected)
