"""RandAugment (arXiv 1909.13719) for a batch of clips: drawn on the CPU, applied on the device group by group.

The operations, their magnitudes and their pixels are those of torchvision.transforms.v2.RandAugment with its defaults:
31 magnitude bins, nearest neighbour, black outside the frame. All frames of a clip get the same operations; statistics
(the mean of Contrast, the histogram of Equalize) are of each frame, as torchvision takes them of a video.
"""

import math
from functools import cache
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float64, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

Operation = Literal[
    "Identity",
    "ShearX",
    "ShearY",
    "TranslateX",
    "TranslateY",
    "Rotate",
    "Brightness",
    "Color",
    "Contrast",
    "Sharpness",
    "Posterize",
    "Solarize",
    "AutoContrast",
    "Equalize",
]
OPERATIONS: tuple[Operation, ...] = get_args(Operation)
SIGNED = frozenset(OPERATIONS[1:10])  # ShearX to Sharpness: the magnitude is negative half of the time

NUM_BINS = 31  # torchvision's default; magnitudes are 0 to 30

# The magnitude of the last bin: slopes, shares of the frame's side, degrees, factors beside 1.
_LARGEST: dict[Operation, float] = {
    "ShearX": 0.3,
    "ShearY": 0.3,
    "TranslateX": 150 / 331,
    "TranslateY": 150 / 331,
    "Rotate": 30.0,
    "Brightness": 0.9,
    "Color": 0.9,
    "Contrast": 0.9,
    "Sharpness": 0.9,
}


@cache  # a few hundred combinations a run, asked for each clip
def operation_magnitude(operation: Operation, *, magnitude: int, height: int, width: int) -> float:
    """What bin `magnitude` (0 to 30) means for an operation on frames of height x width px, without a sign.

    A slope for shears, pixels for translations, degrees for Rotate, what is added to a factor of 1 for Brightness,
    Color (saturation), Contrast and Sharpness, bits kept for Posterize, the threshold as a share of 255 for Solarize,
    0 for an operation that has no strength.
    """
    if not 0 <= magnitude < NUM_BINS:
        raise ValueError(f"expected a RandAugment magnitude of 0 to {NUM_BINS - 1}, got {magnitude}")
    match operation:
        case "Identity" | "AutoContrast" | "Equalize":
            return 0.0
        case "Posterize":  # 8 bits down to 4
            return float(8 - round(magnitude / ((NUM_BINS - 1) / 4)))
        case "Solarize":
            low, high = 1.0, 0.0
        case "TranslateX":
            low, high = 0.0, _LARGEST[operation] * width
        case "TranslateY":
            low, high = 0.0, _LARGEST[operation] * height
        case _:
            low, high = 0.0, _LARGEST[operation]
    # linspace and not a product: its rounding in float32 decides over a pixel where a translation is nearly whole.
    return float(torch.linspace(low, high, NUM_BINS)[magnitude])


def draw_operations(
    rng: np.random.Generator, *, num_ops: int, magnitude: int, height: int, width: int
) -> tuple[Int64[np.ndarray, "ops"], Float64[np.ndarray, "ops"]]:
    """One clip's operations (positions in OPERATIONS, drawn evenly and with repeats) and their signed magnitudes."""
    numbers = rng.integers(0, len(OPERATIONS), num_ops)
    is_negative = rng.random(num_ops) < 0.5
    magnitudes = np.zeros(num_ops)
    for i, operation in enumerate(OPERATIONS[number] for number in numbers):
        value = operation_magnitude(operation, magnitude=magnitude, height=height, width=width)
        magnitudes[i] = -value if operation in SIGNED and is_negative[i] else value
    return numbers.astype(np.int64), magnitudes


def apply_operations(
    frames_u8: UInt8[Tensor, "batch frames 3 height width"],
    *,
    operations: Int64[np.ndarray, "batch ops"],
    magnitudes: Float64[np.ndarray, "batch ops"],
) -> UInt8[Tensor, "batch frames 3 height width"]:
    """Each clip's operations one after the other; clips with the same operation and magnitude go together.

    One magnitude holds for the whole draw, so that a step has at most 23 groups, whatever the batch size: 9 operations
    with two signs and 5 without, less what nobody drew.
    """
    result = frames_u8.clone()
    for step in range(operations.shape[1]):
        groups: dict[tuple[int, float], list[int]] = {}
        for clip, group in enumerate(zip(operations[:, step].tolist(), magnitudes[:, step].tolist(), strict=True)):
            groups.setdefault(group, []).append(clip)
        for (number, magnitude), clips in groups.items():
            if OPERATIONS[number] != "Identity":
                index = torch.tensor(clips).to(frames_u8.device, non_blocking=True)
                result[index] = _apply(OPERATIONS[number], result[index], magnitude=magnitude)
    return result


def _apply(operation: Operation, frames: Tensor, *, magnitude: float) -> Tensor:
    """One operation on clips that share its magnitude: torchvision's functions."""
    match operation:
        case "Identity":
            return frames
        case "ShearX" | "ShearY" | "TranslateX" | "TranslateY" | "Rotate":
            return _move(operation, frames, magnitude=magnitude)
        case _:
            return _recolour(operation, frames, magnitude=magnitude)


def _move(operation: Operation, frames: Tensor, *, magnitude: float) -> Tensor:
    result: Tensor
    match operation:
        case "ShearX":
            result = _affine(frames, shear_slopes=(magnitude, 0.0))
        case "ShearY":
            result = _affine(frames, shear_slopes=(0.0, magnitude))
        case "TranslateX":
            result = _affine(frames, translate=(int(magnitude), 0))
        case "TranslateY":
            result = _affine(frames, translate=(0, int(magnitude)))
        case _:
            result = F.rotate(frames, angle=magnitude)
    return result


def _recolour(operation: Operation, frames: Tensor, *, magnitude: float) -> Tensor:
    result: Tensor
    match operation:
        case "Brightness":
            result = F.adjust_brightness(frames, brightness_factor=1 + magnitude)
        case "Color":
            result = F.adjust_saturation(frames, saturation_factor=1 + magnitude)
        case "Contrast":
            result = F.adjust_contrast(frames, contrast_factor=1 + magnitude)
        case "Sharpness":
            result = F.adjust_sharpness(frames, sharpness_factor=1 + magnitude)
        case "Posterize":
            result = F.posterize(frames, bits=int(magnitude))
        case "Solarize":
            result = F.solarize(frames, threshold=255 * magnitude)
        case "AutoContrast":
            result = F.autocontrast(frames)
        case _:
            result = F.equalize(frames)
    return result


def _affine(
    frames: Tensor, *, shear_slopes: tuple[float, float] = (0.0, 0.0), translate: tuple[int, int] = (0, 0)
) -> Tensor:
    """A shear about the top left corner, or a translation (x, y) in px."""
    degrees = [math.degrees(math.atan(slope)) for slope in shear_slopes]
    moved: Tensor = F.affine(frames, angle=0.0, translate=list(translate), scale=1.0, shear=degrees, center=[0.0, 0.0])
    return moved
