"""Pixels: on the CPU a crop box, resized to the final uint8 size; on the device flip and normalisation.

Clips and single pictures go through the same functions: all leading dimensions share the box.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

Interpolation = Literal["bilinear", "bicubic"]

NUM_TRIES = 10  # boxes drawn before the central one is taken: torchvision's number


class Box(NamedTuple):
    """A rectangle of whole pixels, (top, left) its first row and column."""

    top: int
    left: int
    height: int
    width: int


def square_crop_box(height: int, width: int) -> Box:
    """The largest centred square: the crop for testing."""
    side = min(height, width)
    return Box(top=(height - side) // 2, left=(width - side) // 2, height=side, width=side)


def random_crop_box(
    height: int,
    width: int,
    *,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random box of `scale` times the area and of aspect `ratio` (width / height): torchvision's RandomResizedCrop.

    The aspect is uniform in its logarithm. If no box fits in 10 tries it is the largest centred one whose aspect lies
    within `ratio`. ValueError for bounds that are not 0 < low <= high, or a scale above 1.
    """
    if not 0 < scale[0] <= scale[1] <= 1 or not 0 < ratio[0] <= ratio[1]:
        raise ValueError(f"expected 0 < low <= high in scale (at most 1) and ratio, got scale {scale}, ratio {ratio}")
    for _ in range(NUM_TRIES):
        area = height * width * rng.uniform(scale[0], scale[1])
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        box_height, box_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < box_height <= height and 0 < box_width <= width:
            top = int(rng.integers(0, height - box_height + 1))
            left = int(rng.integers(0, width - box_width + 1))
            return Box(top=top, left=left, height=box_height, width=box_width)
    box_height = min(height, max(1, round(width / ratio[0]))) if width / height < ratio[0] else height
    box_width = min(width, max(1, round(height * ratio[1]))) if width / height > ratio[1] else width
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def resize_crop(
    frames: UInt8[Tensor, "*batch 3 height width"], *, box: Box, size: int, interpolation: Interpolation = "bilinear"
) -> UInt8[Tensor, "*batch 3 size size"]:
    """The box of every frame, resized to size x size with antialiasing (a box that is not square is stretched)."""
    height, width = frames.shape[-2:]
    if box.top < 0 or box.left < 0 or box.top + box.height > height or box.left + box.width > width:
        raise ValueError(f"expected a box within the frame of {height} x {width}, got {box}")
    mode = InterpolationMode(interpolation)
    resized: Tensor = F.resized_crop(
        frames, box.top, box.left, box.height, box.width, [size, size], mode, antialias=True
    )
    return resized


def horizontal_flip(frames: UInt8[Tensor, "*batch 3 height width"]) -> UInt8[Tensor, "*batch 3 height width"]:
    """Left and right exchanged."""
    return frames.flip(-1)


def normalize(
    frames_u8: UInt8[Tensor, "*batch 3 height width"],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "*batch 3 height width"]:
    """(frames / 255 - mean) / std for the three channels, on the frames' device, computed in fp32, given as `dtype`."""
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"expected three means and three positive deviations, got mean {mean}, std {std}")
    shape = (3, 1, 1)
    # One multiplication and one addition: x / (255 std) - mean / std.
    factor = torch.tensor([1 / (255 * s) for s in std], device=frames_u8.device).view(shape)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=frames_u8.device).view(shape)
    return torch.addcmul(shift, frames_u8.to(torch.float32), factor).to(dtype)
