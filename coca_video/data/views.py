"""Test protocols: which frames and which crops of a video a published accuracy was computed from.

A protocol names a peer's rule. Its frame numbers are those that the peer computes, float rounding included; its crops
are the peer's, taken back from the frame that the peer resizes to the source's pixels (nearest pixel, halves up), so
that a crop is decoded, cut and resized once. Pixels are not the peer's: it resizes first, and with its own filter.
"""

import math
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int64

from coca_video.data import view_frames
from coca_video.data.transforms import Box

ProtocolName = Literal[
    "uniform",
    "mmaction2_tsn",
    "mmaction2_dense",
    "slowfast",
    "pytorchvideo",
    "uniformerv2",
    "videomae",
    "videomae_ssv2",
    "vjepa2",
]
CropRule = Literal["centre", "three", "ten"]
Aggregate = Literal["mean_softmax", "concatenate_clips"]

NUM_CROPS: dict[CropRule, int] = {"centre": 1, "three": 3, "ten": 10}
STRIDED = ("mmaction2_dense", "slowfast", "videomae", "vjepa2")  # rules with a fixed step between two frames of a clip


class CropView(NamedTuple):
    """A square region of a frame in source pixels, mirrored left to right afterwards if `flipped`."""

    box: Box
    flipped: bool


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Clips x crops of a video, and how their scores become one. `protocol(name)` gives the presets.

    frame_indices follows `name`, where N is the number of frames, T of frames a clip, s the stride, C of clips and c
    the clip, i the frame in it, both from 0:

    - "uniform": ours. Frame i lies (c + 1/2) / C into segment i of T equal ones; with one clip in its centre.
    - "mmaction2_tsn": mmaction/datasets/transforms/loading.py, SampleFrames with clip_len=1, test_mode:
      floor(c N / C + N / C / 2) in floating point. 25 clips of one frame, TenCrop.
    - "mmaction2_dense": the same class with clip_len > 1: (round(c max(N - (T-1) s - 1, 0) / (C-1)) + s i) modulo N
      (out_of_bound_opt="loop"); half the largest start for one clip. 10 clips of 16 x 4, ThreeCrop.
    - "slowfast": slowfast/datasets/decoder.py, get_start_end_idx and temporal_sampling on a wholly decoded video:
      L = max(T s fps / 30, 1), start = max(N - L, 0) c / C (the end is not reached), then T numbers by torch.linspace
      from start to start + L - 1, cut to [0, N - 1] and truncated. 10 clips of 8 x 8 (SLOW_8x8), 3 crops.
      Not reproduced: where PySlowFast decodes selectively, it rounds the start to packet times, which depends on the
      container and its decoder; and USE_OFFSET_SAMPLING, which is off by default.
    - "pytorchvideo": make_clip_sampler("constant_clips_per_video", clip_seconds, C), its clips from
      c (N / fps - clip_seconds) / C on, then uniform_temporal_subsample(T) of the frames in each, by torch.linspace,
      truncated; see `pytorchvideo_indices`. A rate of 29.97 is 30000 / 1001. 10 clips of 2.13 s with 8 frames, 3 crops
      (pytorchvideo_trainer/conf: datamodule/dataloader/kinetics_classification.yaml, classification_slow_8x8_r50.yaml).
    - "uniformerv2": slowfast/datasets/decoder.py of UniFormerV2, get_seq_frames (sparse, decord): g = (N - 1) / T,
      frame min(round(g i) + floor(g / (C + 1) (c + 1)), N - 1), halves to even. 8 frames, 4 clips, 3 crops.
    - "videomae": kinetics.py of VideoMAE, mode "test": every s-th frame 0, s, 2s, ... (the last repeated up to T); of
      these M, T from floor(c max((M - T) / (C-1), 0)) on. 5 clips of 16 x 4, 3 crops.
    - "videomae_ssv2": ssv2.py of VideoMAE, mode "test": N / T a segment; clip 0 has the starts of the segments, clip 1
      their centres, both rounded down. 2 clips of 16 frames, 3 crops.
    - "vjepa2": src/datasets/video_dataset.py of V-JEPA 2, with overlap allowed as in its video_classification_frozen.
      P = floor(N / C), L = T s. If P > L: clip c is T numbers by np.linspace from a to a + L, at most a + L - 1,
      truncated, with a = c P + (P - L - 1) // 2. V-JEPA 2 draws that window at random, in evaluation too, from
      [0, P - L - 1]; we take the middle one. With 8 clips of 16 x 4 this concerns videos of 520 frames and more.
      Otherwise: m = min(L, N) - 1, floor(m / s) numbers from 0 to m, then m itself up to T, all at most m - 1 and
      truncated, plus c floor((N - L) / (C-1)) where N > L. (Of one frame it makes number -1; we take 0.)
      8 clips of 16 x 4, 3 crops; the tokens of all clips of a crop are pooled together.

    crop_views follows `name` too. The short side becomes `short_side`, the long side that times the aspect, rounded
    down (MMAction2's mmcv.rescale_size: to nearest), and squares of `crop_size` are cut. With S the slack along the
    long side, offsets are, in the peer's order:

    - "uniform": in source pixels: 0, floor(S / 2), S.
    - MMAction2 (processing.py): ThreeCrop 0, 2 floor(S / 2), floor(S / 2); TenCrop upper left, upper right, lower
      left, lower right, centre with steps of floor(S / 4) (so the far corner is 4 floor(S / 4)), each followed by its
      mirror image; CenterCrop floor(S / 2).
    - PySlowFast, pytorchvideo and UniFormerV2 (uniform_crop): 0, ceil(S / 2), S.
    - VideoMAE: floor(k S / 2) for k = 0, 1, 2. V-JEPA 2 (evals/video_classification_frozen/utils.py): k floor(S / 2).

    "centre" is the peer's middle crop, "ten" MMAction2's rule for all. ValueError for fields without effect or sense.
    """

    name: ProtocolName
    num_clips: int
    frames_per_clip: int
    stride: int | None = None  # source frames from one frame of a clip to the next; None where the rule has no stride
    clip_seconds: float | None = None  # for "pytorchvideo" alone
    crops: CropRule
    short_side: int = 224
    crop_size: int = 224
    aggregate: Aggregate = "mean_softmax"

    def __post_init__(self) -> None:
        counts = (self.num_clips, self.frames_per_clip, self.crop_size, 1 if self.stride is None else self.stride)
        if min(counts) < 1 or self.crop_size > self.short_side:
            raise ValueError(f"expected counts of at least 1 and crop_size <= short_side, got {self}")
        if (self.stride is not None) != (self.name in STRIDED):
            needs = "a stride" if self.name in STRIDED else "no stride"
            raise ValueError(f"expected {needs} for protocol {self.name!r}, got {self.stride}")
        if (self.clip_seconds is not None) != (self.name == "pytorchvideo"):
            needs = "clip_seconds" if self.name == "pytorchvideo" else "no clip_seconds"
            raise ValueError(f"expected {needs} for protocol {self.name!r}, got {self.clip_seconds}")
        if self.clip_seconds is not None and not 0 < self.clip_seconds < math.inf:
            raise ValueError(f"expected clip_seconds above 0 and finite, got {self.clip_seconds}")
        if self.crops == "three" and self.crop_size != self.short_side:
            raise ValueError(f"expected three crops as wide as the short side, {self.short_side}, got {self.crop_size}")
        match self.name:
            case "mmaction2_tsn" if self.frames_per_clip != 1:
                raise ValueError(f"expected clips of 1 frame for 'mmaction2_tsn', got {self.frames_per_clip}")
            case "mmaction2_dense" if self.frames_per_clip == 1:
                raise ValueError("expected clips of 2 frames or more: with one, MMAction2 uses 'mmaction2_tsn'")
            case "videomae" if self.num_clips == 1:
                raise ValueError("expected 2 clips or more for 'videomae', whose rule divides by their number less 1")
            case "videomae_ssv2" if self.num_clips != 2:
                raise ValueError(f"expected 2 clips for 'videomae_ssv2' (starts and centres), got {self.num_clips}")

    @property
    def num_crops(self) -> int:
        """1, 3 or 10."""
        return NUM_CROPS[self.crops]

    @property
    def num_views(self) -> int:
        """Clips x crops of a video."""
        return self.num_clips * self.num_crops

    def frame_indices(self, *, num_frames: int, frames_per_second: float) -> Int64[np.ndarray, "clips frames"]:
        """The frames of each clip, all in [0, num_frames), for a video of so many frames; see the class.

        Only "slowfast" and "pytorchvideo" look at frames_per_second. ValueError for a video without a frame or a rate
        not above 0.
        """
        if num_frames < 1 or not 0 < frames_per_second < math.inf:
            raise ValueError(f"expected a frame and a positive rate, got {num_frames} at {frames_per_second} a second")
        clips, frames = self.num_clips, self.frames_per_clip
        match self.name:
            case "uniform":
                return view_frames.uniform(num_frames, num_clips=clips, frames_per_clip=frames)
            case "mmaction2_tsn":
                return view_frames.mmaction2_tsn(num_frames, num_clips=clips)
            case "pytorchvideo":
                assert self.clip_seconds is not None
                return view_frames.pytorchvideo(
                    num_frames,
                    frames_per_second=frames_per_second,
                    num_clips=clips,
                    frames_per_clip=frames,
                    clip_seconds=self.clip_seconds,
                )
            case "uniformerv2":
                return view_frames.uniformerv2(num_frames, num_clips=clips, frames_per_clip=frames)
            case "videomae_ssv2":
                return view_frames.videomae_ssv2(num_frames, frames_per_clip=frames)
            case "mmaction2_dense" | "slowfast" | "videomae" | "vjepa2":
                return self._strided(num_frames, frames_per_second=frames_per_second)

    def _strided(self, num_frames: int, *, frames_per_second: float) -> Int64[np.ndarray, "clips frames"]:
        """`frame_indices` of the rules with a stride."""
        clips, frames, stride = self.num_clips, self.frames_per_clip, self.stride
        assert stride is not None
        match self.name:
            case "mmaction2_dense":
                return view_frames.mmaction2_dense(num_frames, num_clips=clips, frames_per_clip=frames, stride=stride)
            case "slowfast":
                return view_frames.slowfast(
                    num_frames,
                    frames_per_second=frames_per_second,
                    num_clips=clips,
                    frames_per_clip=frames,
                    stride=stride,
                )
            case "videomae":
                return view_frames.videomae(num_frames, num_clips=clips, frames_per_clip=frames, stride=stride)
            case "vjepa2":
                return view_frames.vjepa2(num_frames, num_clips=clips, frames_per_clip=frames, stride=stride)
            case _:
                raise AssertionError(f"{self.name} has no stride")

    def crop_views(self, height: int, width: int) -> tuple[CropView, ...]:
        """`num_crops` square regions of a height x width frame, in the peer's order; see the class."""
        if height < 1 or width < 1:
            raise ValueError(f"expected a height and width of at least 1, got {height} x {width}")
        scaled_height, scaled_width, side = _scaled(self, height=height, width=width)
        rows, columns = scaled_height - side, scaled_width - side  # slack
        views = [
            CropView(Box(y, x, side, side), flipped) for y, x, flipped in _offsets(self, rows=rows, columns=columns)
        ]
        if self.name == "uniform":
            return tuple(views)  # no peer's resized frame to come back from
        source_side = max(_nearest(side * min(height, width), self.short_side), 1)
        return tuple(
            CropView(
                Box(
                    top=min(_nearest(view.box.top * height, scaled_height), height - source_side),
                    left=min(_nearest(view.box.left * width, scaled_width), width - source_side),
                    height=source_side,
                    width=source_side,
                ),
                view.flipped,
            )
            for view in views
        )


def protocol(name: ProtocolName, *, frames_per_clip: int | None = None) -> Protocol:
    """The preset: the peer's clips, stride, crops and sizes; see `Protocol`. None: the peer's own frames per clip.

    `dataclasses.replace` varies the rest. Sizes matter only as a ratio: the model's own image size is what a crop is
    resized to.
    """
    preset = _preset(name)
    return preset if frames_per_clip is None else replace(preset, frames_per_clip=frames_per_clip)


def _preset(name: ProtocolName) -> Protocol:
    """The peer's own protocol."""
    match name:
        case "uniform":
            return Protocol(name=name, num_clips=1, frames_per_clip=16, crops="centre")
        case "mmaction2_tsn":
            return Protocol(name=name, num_clips=25, frames_per_clip=1, crops="ten", short_side=256)
        case "mmaction2_dense":
            return Protocol(
                name=name, num_clips=10, frames_per_clip=16, stride=4, crops="three", short_side=256, crop_size=256
            )
        case "slowfast":
            return Protocol(
                name=name, num_clips=10, frames_per_clip=8, stride=8, crops="three", short_side=256, crop_size=256
            )
        case "pytorchvideo":
            return Protocol(
                name=name,
                num_clips=10,
                frames_per_clip=8,
                clip_seconds=2.13,  # 64 frames at 30 a second: SLOW_8x8
                crops="three",
                short_side=256,
                crop_size=256,
            )
        case "uniformerv2":
            return Protocol(name=name, num_clips=4, frames_per_clip=8, crops="three")
        case "videomae":
            return Protocol(name=name, num_clips=5, frames_per_clip=16, stride=4, crops="three")
        case "videomae_ssv2":
            return Protocol(name=name, num_clips=2, frames_per_clip=16, crops="three")
        case "vjepa2":
            return Protocol(
                name=name,
                num_clips=8,
                frames_per_clip=16,
                stride=4,
                crops="three",
                short_side=256,
                crop_size=256,
                aggregate="concatenate_clips",
            )


def _scaled(rule: Protocol, *, height: int, width: int) -> tuple[int, int, int]:
    """Height and width of the frame that the peer cuts crops from, and the side of a crop in its pixels."""
    short, long = min(height, width), max(height, width)
    if rule.name == "uniform":
        return height, width, max(short * rule.crop_size // rule.short_side, 1)
    scaled = _scaled_long(rule, short=short, long=long)
    return (scaled, rule.short_side, rule.crop_size) if height > width else (rule.short_side, scaled, rule.crop_size)


def _scaled_long(rule: Protocol, *, short: int, long: int) -> int:
    """The long side once the short side is `rule.short_side`, rounded as the peer rounds it."""
    match rule.name:
        case "mmaction2_tsn" | "mmaction2_dense":
            return int(long * (rule.short_side / short) + 0.5)
        case "slowfast" | "uniformerv2":
            # In this order, which decides the rounding; a frame of that size already is left alone.
            return long if short == rule.short_side else math.floor(long / short * rule.short_side)
        case "pytorchvideo":  # short_side_scale, which resizes a frame of that size too
            return math.floor(long / short * rule.short_side)
        case "uniform" | "videomae" | "videomae_ssv2" | "vjepa2":
            return int(rule.short_side * long / short)


def _offsets(rule: Protocol, *, rows: int, columns: int) -> list[tuple[int, int, bool]]:
    """(top, left, flipped) of each crop, with `rows` and `columns` of slack, in the pixels of `_scaled`."""
    middle = (_middle(rule, slack=rows), _middle(rule, slack=columns))
    match rule.crops:
        case "centre":
            return [(*middle, False)]
        case "three" if rows > columns:
            return [(along, middle[1], False) for along in _three(rule, slack=rows)]
        case "three":
            return [(middle[0], along, False) for along in _three(rule, slack=columns)]
        case "ten":
            down, right = rows // 4, columns // 4
            places = [(0, 0), (0, 4 * right), (4 * down, 0), (4 * down, 4 * right), (2 * down, 2 * right)]
            return [(top, left, flipped) for top, left in places for flipped in (False, True)]


def _middle(rule: Protocol, *, slack: int) -> int:
    """The offset of the middle crop."""
    return -(-slack // 2) if rule.name in ("slowfast", "pytorchvideo", "uniformerv2") else slack // 2


def _three(rule: Protocol, *, slack: int) -> tuple[int, int, int]:
    """Offsets along the long side, in the peer's order."""
    middle = _middle(rule, slack=slack)
    match rule.name:
        case "mmaction2_tsn" | "mmaction2_dense":
            return (0, 2 * middle, middle)
        case "vjepa2":
            return (0, middle, 2 * middle)
        case "uniform" | "slowfast" | "pytorchvideo" | "uniformerv2" | "videomae" | "videomae_ssv2":
            return (0, middle, slack)


def _nearest(above: int, below: int) -> int:
    """The quotient, rounded to the nearest whole number, halves up."""
    return (2 * above + below) // (2 * below)
