"""Augmentation of whole batches on the device: flip, RandAugment, colour jitter, erasing; mixup and CutMix.

The CPU has cropped and resized to the final uint8 size; this runs on uint8 [batch, frames, 3, height, width], before
the normalisation. What is random is drawn on the CPU by `draw`, as a pure function of (seed, epoch, sample index), one
draw a clip for all its frames; `apply` and `mixing.mix` use no random state. Pixels equal those of
torchvision.transforms.v2 given the same parameters.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float64, Int64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from coca_video.data.loader import SampleKey
from coca_video.data.mixing import MixParameters, box_mask, draw_mix
from coca_video.data.rand_augment import NUM_BINS, apply_operations, draw_operations
from coca_video.data.sampling import sample_rng
from coca_video.data.transforms import Box, horizontal_flip

ERASE_SCALE, ERASE_RATIO = (0.02, 0.33), (0.3, 3.3)  # share of the frame, height / width: torchvision's defaults
NUM_TRIES = 10  # boxes drawn before nothing is erased: torchvision's number

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)  # columns of a jitter, in torchvision's order
_NO_JITTER = np.array([1.0, 1.0, 1.0, 0.0])

_DIRECTION = re.compile(
    r"\b(left|leftwards?|right(?! (out|away|off|back)\b)|rightwards?|((anti|counter)-?)?clockwise)\b",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """What to draw for each clip; everything but the flip is off by default."""

    flip_probability: float = 0.5
    """Of exchanging left and right, in clips whose class permits it (`flips_allowed`)."""
    rand_augment_num_ops: int = 0
    """Operations of RandAugment one after the other; 0 for none (CoCa on ImageNet: 2, Table 9)."""
    rand_augment_magnitude: int = 0
    """Their strength, 1 to 30 of torchvision's 31 bins (CoCa on ImageNet: 20; the paper does not name the scale)."""
    colour_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Brightness, contrast and saturation by a factor of 1 - x to 1 + x, hue by a shift of -x to x (x at most 0.5)."""
    erase_probability: float = 0.0
    """Of erasing a box of 2% to 33% of the frame (arXiv 1708.04896)."""
    erase_value: Literal["mean", "black"] = "mean"
    """What is put there: the encoder's mean of each channel, which normalises to 0, or 0."""
    mixup_alpha: float = 0.0
    """Of the Beta distribution of mixup's shares; 0 for no mixup."""
    cutmix_alpha: float = 0.0
    """The same of CutMix; with both a clip gets the one or the other, evenly."""

    def __post_init__(self) -> None:
        for name in ("flip_probability", "erase_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"expected {name} between 0 and 1, got {getattr(self, name)}")
        if self.rand_augment_num_ops < 0 or not 0 <= self.rand_augment_magnitude < NUM_BINS:
            raise ValueError(
                f"expected rand_augment_num_ops of at least 0 and rand_augment_magnitude of 0 to {NUM_BINS - 1}, "
                f"got {self.rand_augment_num_ops} and {self.rand_augment_magnitude}"
            )
        if (self.rand_augment_num_ops > 0) != (self.rand_augment_magnitude > 0):
            raise ValueError(
                "expected rand_augment_num_ops and rand_augment_magnitude both above 0, or both 0 for no RandAugment, "
                f"got {self.rand_augment_num_ops} and {self.rand_augment_magnitude}"
            )
        if not all(0 <= x < math.inf for x in self.colour_jitter) or self.colour_jitter[HUE] > 0.5:
            raise ValueError(f"expected colour_jitter of at least 0, its hue at most 0.5, got {self.colour_jitter}")
        if self.erase_value != "mean" and not self.erase_probability:
            raise ValueError(f"erase_value {self.erase_value!r} does nothing while erase_probability is 0")
        for name in ("mixup_alpha", "cutmix_alpha"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"expected {name} of at least 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class AugmentParameters:
    """What was drawn for the clips of a batch: small arrays on the CPU, where the grouping of clips needs them.

    A box is (top, left, height, width), empty where nothing is erased; `size` is the frames' (height, width);
    `jitter_order` names the columns of `jitter_factors` in the order in which they apply.
    """

    size: tuple[int, int]
    flip: Bool[np.ndarray, "batch"]
    operations: Int64[np.ndarray, "batch ops"]
    magnitudes: Float64[np.ndarray, "batch ops"]
    jitter_order: Int64[np.ndarray, "batch 4"]
    jitter_factors: Float64[np.ndarray, "batch 4"]
    erase_boxes: Int64[np.ndarray, "batch 4"]
    erase_value: UInt8[np.ndarray, "3"]
    mix: MixParameters | None


def flips_allowed(classes: Sequence[str]) -> Bool[np.ndarray, "classes"]:
    """False for classes whose mirror image is another action, judged by their names.

    Those are names with a word of direction: "Pushing something from left to right", "sliding left", "turning
    clockwise"; not "pulling it right out". In Something-Something v2 they are six, the three pairs of MMAction2's
    `flip_label_map`. Kinetics, Moments in Time, UCF101, HMDB51 and Diving48 have none: a Kinetics action seen in a
    mirror is the same action, there is no class for one hand, side or sense of rotation.
    """
    return np.array([_DIRECTION.search(name.replace("_", " ")) is None for name in classes], dtype=bool)


def draw(
    config: AugmentConfig,
    *,
    keys: Sequence[SampleKey],
    seed: int,
    height: int,
    width: int,
    mean: Sequence[float],
    may_flip: Bool[np.ndarray, "batch"] | None = None,
) -> AugmentParameters:
    """The parameters for clips `keys` of height x width px, each a function of (seed, its key) and of nothing else.

    `mean` is the encoder's, in [0, 1], as it was before any folding. `may_flip` is False for clips that must not be
    flipped: `flips_allowed(classes)[labels]`; None permits all.
    """
    allowed = np.ones(len(keys), dtype=bool) if may_flip is None else may_flip
    assert len(allowed) == len(keys), f"{len(keys)} clips, {len(allowed)} permissions to flip"

    def rngs(purpose: str) -> list[np.random.Generator]:
        return [sample_rng(seed=seed, epoch=key.epoch, index=key.index, purpose=purpose) for key in keys]

    flip = np.array([rng.random() < config.flip_probability for rng in rngs("flip")], dtype=bool) & allowed
    operations, magnitudes = _draw_rand_augment(config, rngs("rand augment"), height=height, width=width)
    order, factors = np.tile(np.arange(4), (len(keys), 1)), np.tile(_NO_JITTER, (len(keys), 1))
    if any(config.colour_jitter):
        for i, rng in enumerate(rngs("colour jitter")):
            order[i], factors[i] = _draw_jitter(config.colour_jitter, rng)
    boxes = np.zeros((len(keys), 4), dtype=np.int64)
    for i, rng in enumerate(rngs("erase") if config.erase_probability else []):
        if rng.random() < config.erase_probability:
            boxes[i] = erase_box(height, width, rng=rng) or (0, 0, 0, 0)
    mix = None
    if config.mixup_alpha or config.cutmix_alpha:
        alphas = {"mixup_alpha": config.mixup_alpha, "cutmix_alpha": config.cutmix_alpha}
        mix = draw_mix(rngs("mix"), **alphas, height=height, width=width)
    return AugmentParameters(
        size=(height, width),
        flip=flip,
        operations=operations,
        magnitudes=magnitudes,
        jitter_order=order,
        jitter_factors=factors,
        erase_boxes=boxes,
        erase_value=np.array([round(255 * m) if config.erase_value == "mean" else 0 for m in mean], dtype=np.uint8),
        mix=mix,
    )


def erase_box(height: int, width: int, *, rng: np.random.Generator) -> Box | None:
    """The rule of torchvision's RandomErasing: area uniform in 2% to 33%, height / width log-uniform in 0.3 to 3.3.

    None if no box smaller than the frame came in 10 tries.
    """
    for _ in range(NUM_TRIES):
        area = height * width * rng.uniform(*ERASE_SCALE)
        aspect = math.exp(rng.uniform(math.log(ERASE_RATIO[0]), math.log(ERASE_RATIO[1])))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            top = int(rng.integers(0, height - box_height + 1))
            return Box(top, int(rng.integers(0, width - box_width + 1)), box_height, box_width)
    return None


def apply(
    frames_u8: UInt8[Tensor, "batch frames 3 height width"], *, parameters: AugmentParameters
) -> UInt8[Tensor, "batch frames 3 height width"]:
    """Flip, RandAugment, colour jitter, erasing, in this order, on the frames' device. (Mixing is `mixing.mix`.)"""
    assert len(frames_u8) == len(parameters.flip), f"{len(frames_u8)} clips, {len(parameters.flip)} draws"
    assert frames_u8.shape[-2:] == parameters.size, f"frames {frames_u8.shape[-2:]}, drawn for {parameters.size}"
    if parameters.flip.any():
        flip = torch.from_numpy(parameters.flip).to(frames_u8.device).view(-1, 1, 1, 1, 1)
        frames_u8 = torch.where(flip, horizontal_flip(frames_u8), frames_u8)
    if parameters.operations.size:
        frames_u8 = apply_operations(frames_u8, operations=parameters.operations, magnitudes=parameters.magnitudes)
    frames_u8 = colour_jitter(frames_u8, order=parameters.jitter_order, factors=parameters.jitter_factors)
    return _erase(frames_u8, boxes=parameters.erase_boxes, value=parameters.erase_value)


def colour_jitter(
    frames_u8: UInt8[Tensor, "batch frames 3 height width"],
    *,
    order: Int64[np.ndarray, "batch 4"],
    factors: Float64[np.ndarray, "batch 4"],
) -> UInt8[Tensor, "batch frames 3 height width"]:
    """Brightness, contrast, saturation by factors and hue by a shift (columns 0 to 3), each clip in its own order.

    At each of the four places the clips that have the same change go together. A factor of 1, a hue of 0 is no change.
    """
    if (factors == _NO_JITTER).all():
        return frames_u8
    result = frames_u8.clone()
    for place in range(4):
        for change in range(4):
            clips = np.flatnonzero((order[:, place] == change) & (factors[:, change] != _NO_JITTER[change]))
            if clips.size:
                index = torch.from_numpy(clips).to(frames_u8.device, non_blocking=True)
                result[index] = _change_colour(result[index], change=change, factors=factors[clips, change])
    return result


def _draw_rand_augment(
    config: AugmentConfig, rngs: list[np.random.Generator], *, height: int, width: int
) -> tuple[Int64[np.ndarray, "batch ops"], Float64[np.ndarray, "batch ops"]]:
    num_ops, magnitude = config.rand_augment_num_ops, config.rand_augment_magnitude
    operations, magnitudes = np.zeros((len(rngs), num_ops), np.int64), np.zeros((len(rngs), num_ops))
    for i, rng in enumerate(rngs if num_ops else []):
        operations[i], magnitudes[i] = draw_operations(
            rng, num_ops=num_ops, magnitude=magnitude, height=height, width=width
        )
    return operations, magnitudes


def _draw_jitter(
    strengths: tuple[float, float, float, float], rng: np.random.Generator
) -> tuple[Int64[np.ndarray, "4"], Float64[np.ndarray, "4"]]:
    """(order, factors). All is drawn whatever the strengths, so that one of them does not change the others' draws."""
    order, uniform = rng.permutation(4), rng.random(4)
    low = np.maximum(_NO_JITTER - strengths, [0.0, 0.0, 0.0, -0.5])
    high = _NO_JITTER + strengths
    return order, np.where(np.equal(strengths, 0), _NO_JITTER, low + (high - low) * uniform)


def _change_colour(frames: Tensor, *, change: int, factors: Float64[np.ndarray, "clips"]) -> Tensor:
    if change == HUE:  # clip by clip: batched it would restate torchvision's HSV, and hold ten fp32 copies of all clips
        hues = zip(frames, factors.tolist(), strict=True)
        return torch.stack([F.adjust_hue(clip, hue_factor=factor) for clip, factor in hues])
    shape = (-1, 1, 1, 1, 1)
    own = torch.from_numpy(factors.astype(np.float32)).to(frames.device).view(shape)
    scaled = frames * own
    if change != BRIGHTNESS:
        grey: Tensor = F.rgb_to_grayscale(frames).to(torch.float32)
        towards = grey.mean(dim=(-3, -2, -1), keepdim=True) if change == CONTRAST else grey
        rest = torch.from_numpy((1 - factors).astype(np.float32)).to(frames.device).view(shape)
        # addcmul and not * and +: it rounds once, as torchvision's add with alpha does. Rounding twice put 225 of
        # 2.3 million values one level off.
        scaled = torch.addcmul(scaled, towards, rest)
    return scaled.clamp_(0, 255).to(torch.uint8)


def _erase(frames: Tensor, *, boxes: Int64[np.ndarray, "batch 4"], value: UInt8[np.ndarray, "3"]) -> Tensor:
    if not boxes.any():
        return frames
    inside = box_mask(boxes, height=frames.shape[-2], width=frames.shape[-1]).to(frames.device)
    return torch.where(inside[:, None, None], torch.from_numpy(value).to(frames.device).view(3, 1, 1), frames)
