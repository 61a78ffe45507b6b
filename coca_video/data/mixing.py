"""Mixup (arXiv 1710.09412) and CutMix (arXiv 1905.04899): each clip with the one before it in its batch.

One draw a clip, so that a clip's share does not depend on who else is in the batch. Its partner does: it is the
previous clip of the batch at hand (the last one for the first), as in torchvision, and so another number of ranks or
another batch size makes other pairs.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from coca_video.data.transforms import Box


@dataclass(frozen=True, kw_only=True)
class MixParameters:
    """What was drawn for each clip of a batch.

    `weights` is the share of a clip's own label. Where `is_cutmix`, the pixels in its box (top, left, height, width)
    are the partner's; elsewhere all pixels are the clip's own by `weights`, the partner's by the rest.
    """

    weights: Float64[np.ndarray, "batch"]
    is_cutmix: Bool[np.ndarray, "batch"]
    boxes: Int64[np.ndarray, "batch 4"]


def cutmix_box(share: float, *, row: int, column: int, height: int, width: int) -> Box:
    """The box about (row, column) that leaves `share` of the frame, cut off at the frame's edges.

    torchvision's rule: half sides are cut to whole pixels, so that the box can be smaller than 1 - share, or empty.
    """
    half = 0.5 * math.sqrt(1 - share)
    half_height, half_width = int(half * height), int(half * width)
    top, left = max(row - half_height, 0), max(column - half_width, 0)
    return Box(top, left, min(row + half_height, height) - top, min(column + half_width, width) - left)


def draw_mix(
    rngs: list[np.random.Generator], *, mixup_alpha: float, cutmix_alpha: float, height: int, width: int
) -> MixParameters:
    """One draw for each generator: the share from Beta(alpha, alpha), for CutMix a box with an evenly drawn centre.

    With both alphas above 0 a clip gets the one or the other, evenly. CutMix's share is afterwards that of its box.
    """
    assert mixup_alpha > 0 or cutmix_alpha > 0
    weights, is_cutmix, boxes = np.ones(len(rngs)), np.zeros(len(rngs), dtype=bool), np.zeros((len(rngs), 4), np.int64)
    for i, rng in enumerate(rngs):
        is_cutmix[i] = rng.random() < 0.5 if mixup_alpha and cutmix_alpha else cutmix_alpha > 0
        alpha = cutmix_alpha if is_cutmix[i] else mixup_alpha
        weights[i] = rng.beta(alpha, alpha)
        if is_cutmix[i]:
            row, column = int(rng.integers(0, height)), int(rng.integers(0, width))
            box = cutmix_box(float(weights[i]), row=row, column=column, height=height, width=width)
            boxes[i] = box
            weights[i] = 1 - box.height * box.width / (height * width)
    return MixParameters(weights=weights, is_cutmix=is_cutmix, boxes=boxes)


def mix(
    frames_u8: UInt8[Tensor, "batch frames 3 height width"],
    *,
    labels_onehot: Float[Tensor, "batch classes"],
    parameters: MixParameters,
) -> tuple[UInt8[Tensor, "batch frames 3 height width"], Float[Tensor, "batch classes"]]:
    """(frames, soft labels), mixed. Mixup's pixels are rounded to whole levels, half to even.

    Mixing before the normalisation is mixing after it, up to that rounding: the shares add up to 1.
    """
    assert len(frames_u8) == len(parameters.weights), f"{len(frames_u8)} clips, {len(parameters.weights)} draws"
    own = torch.from_numpy(parameters.weights.astype(np.float32)).to(frames_u8.device)
    other = torch.from_numpy((1 - parameters.weights).astype(np.float32)).to(frames_u8.device)
    labels = labels_onehot * own[:, None] + labels_onehot.roll(1, 0) * other[:, None]
    partners, mixed = frames_u8.roll(1, 0), frames_u8
    if parameters.is_cutmix.any():
        inside = box_mask(parameters.boxes, height=frames_u8.shape[-2], width=frames_u8.shape[-1])
        mixed = torch.where(inside.to(frames_u8.device)[:, None, None], partners, frames_u8)
    if (blended := np.flatnonzero(~parameters.is_cutmix)).size:
        index = torch.from_numpy(blended).to(frames_u8.device)
        shape = (-1, 1, 1, 1, 1)
        sum_ = frames_u8[index] * own[index].view(shape) + partners[index] * other[index].view(shape)
        mixed = mixed.index_copy(0, index, sum_.round_().to(torch.uint8))
    return mixed, labels.to(labels_onehot.dtype)


def box_mask(boxes: Int64[np.ndarray, "batch 4"], *, height: int, width: int) -> Bool[Tensor, "batch height width"]:
    """True inside each box (top, left, height, width)."""
    top, left, box_height, box_width = (side[:, None] for side in torch.from_numpy(boxes).unbind(1))
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top) & (rows < top + box_height)
    in_columns = (columns >= left) & (columns < left + box_width)
    return in_rows[:, :, None] & in_columns[:, None, :]
