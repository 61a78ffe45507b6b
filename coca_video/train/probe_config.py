"""What a probe is: its encoder, clips and head, what of the encoder is trained, and every other choice of a run."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from coca_video.data.augment import AugmentConfig
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.video import Sampling, check_clip_seconds, check_stride
from coca_video.models.head import HeadConfig
from coca_video.models.image import ImageConfig
from coca_video.train.loop import Device, LoopConfig
from coca_video.train.optim import OptimConfig


@dataclass(frozen=True, kw_only=True)
class PretrainedEncoder:
    """An image encoder with its weights."""

    model: str
    """A finished run or a model folder, hf:ORG/NAME, open_clip:NAME/TAG or open_clip:FILE, timm:NAME."""


@dataclass(frozen=True, kw_only=True)
class RandomEncoder:
    """A freshly initialised image encoder: the baseline that tells what pretraining is worth."""

    image: ImageConfig


@dataclass(frozen=True, kw_only=True)
class ClipsConfig:
    """Labelled clips."""

    train: Path
    """A manifest (CSV), or a folder laid out as DIR/<class>/clip.mp4 or DIR/<split>/<class>/clip.mp4."""
    test: Path | None = None
    """The same for testing; `train`'s when None."""
    train_split: str | None = "train"
    """Rows to train on; all when None."""
    test_split: str | None = "test"
    """Rows to test on; all of `test` when None, and no test when `test` is None too."""
    test_share: float = 0.0
    """Where no clip has a split and there is no `test`: this share of each class is not trained on but tested on."""
    holdout_share: float = 0.0
    """This share of each class of the training part is kept out too, and evaluated during training in place of the
    test part."""
    holdout_group: str | None = None
    """A column of the manifest; clips with the same value stay on one side of both shares. By video_id when None."""
    classes_by_name: bool = False
    """Where there is no classes.txt, number the classes in the order of their names: for clips of one's own."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""

    def __post_init__(self) -> None:
        for name in ("test_share", "holdout_share"):
            if not 0 <= getattr(self, name) < 1:
                option = name.replace("_", "-")
                raise ValueError(f"--clips.{option} must be at least 0 and below 1; got {getattr(self, name)}.")
        if self.holdout_group is not None and not (self.test_share or self.holdout_share):
            raise ValueError("--clips.holdout-group does nothing without --clips.holdout-share; give both, or neither.")


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """The encoder stays as it is, and only the head is trained (CoCa section 3.3)."""


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The encoder is trained too."""

    rate_factor: float = 0.2
    """The encoder's rate over the head's: the paper's text has 1e-4 of 5e-4, its Table 9 has 1."""
    layer_decay: float = 1.0
    """Factor on the rate from each block of the encoder to the one before it; 1 trains all of them alike."""
    drop_path: float = 0.0
    """Share of samples for which the last block is left out in training; it rises linearly with depth from 0."""
    activation_checkpointing: bool = False
    """Compute the activations of each block a second time for backward in place of keeping them: less memory."""

    def __post_init__(self) -> None:
        _check_rate_factor(self.rate_factor)
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"--tuning.layer-decay must be above 0 and at most 1; got {self.layer_decay}.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"--tuning.drop-path must be at least 0 and below 1; got {self.drop_path}.")


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank changes of the encoder's matrices are trained (arXiv 2106.09685), and merged into them for saving."""

    rank: int = 16
    """Of the change of each matrix."""
    alpha: float = 16.0
    """The change is alpha / rank times the product of its two factors."""
    rate_factor: float = 1.0
    """The factors' rate over the head's."""
    activation_checkpointing: bool = False
    """Compute the activations of each block a second time for backward in place of keeping them: less memory."""

    def __post_init__(self) -> None:
        _check_rate_factor(self.rate_factor)
        if self.rank < 1:
            raise ValueError(f"--tuning.rank must be at least 1; got {self.rank}.")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"--tuning.alpha must be above 0 and finite; got {self.alpha}.")


def _check_rate_factor(factor: float) -> None:
    if not 0 < factor < math.inf:
        raise ValueError(f"--tuning.rate-factor must be above 0 and finite; got {factor}.")


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A classifier of clips on an image encoder. The defaults are the paper's probe: frozen, one query."""

    encoder: PretrainedEncoder | RandomEncoder
    clips: ClipsConfig
    out: Path
    """Folder of the run; the same command goes on where it stopped."""
    num_frames: int = 16
    """Frames a clip; one is the middle frame: an image probe."""
    sampling: Sampling = "uniform"
    """uniform spreads the frames over the clip; dense takes every stride-th of a part of it, in tests the middle;
    pytorchvideo spreads them over clip_seconds of it, as that library does."""
    stride: int | None = None
    """Frames of the video from one to the next, with dense sampling."""
    clip_seconds: float | None = None
    """Length of the part that frames are taken from, with pytorchvideo's sampling."""
    image_size: int | None = None
    """In px; the encoder's own when None."""
    tuning: Frozen | Finetune | Lora = field(default_factory=Frozen)
    """What of the encoder is trained."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """What makes class scores of the tokens."""
    init_pooler: Literal["random", "contrastive"] = "random"
    """contrastive starts the head's pooler from that of the CoCa whose encoder it is."""
    micro_batch_size: int | None = None
    """Clips that go through the model at a time, on each rank; gradients add up to those of the whole batch. Only a
    batch norm in training tells them apart."""
    class_balanced: bool = False
    """Draw the class of a training clip first, all of them alike, then the clip."""
    keep_best: bool = False
    """Test and save the weights that were best on the held-out part, in place of the last; the first among equals."""
    token_cache: Path | None = None
    """Folder for the encoder's tokens of each clip, computed once: many times faster, without augmentation."""
    token_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    """How the token cache keeps a number."""
    augment: bool = True
    """Draw frames, crop and what `augmentation` says anew in each epoch."""
    min_crop_area: float = 0.5
    """Smallest share of the frame that an augmenting crop keeps."""
    augmentation: AugmentConfig = field(default_factory=AugmentConfig)
    """What else augments the training clips, on the device."""
    frame_cache: Path | None = None
    """Folder for JPEG copies of the frames of each clip, built once and read in place of the videos."""
    cache: FrameCacheConfig = field(default_factory=FrameCacheConfig)
    """What the frame cache keeps."""
    label_smoothing: float = 0.1
    """Share of the target spread over all classes (CoCa Table 9: 0.1 for Kinetics)."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    device: Device = "auto"
    """Where to compute."""

    def __post_init__(self) -> None:
        check_stride(self.stride, sampling=self.sampling)
        check_clip_seconds(self.clip_seconds, sampling=self.sampling)
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must be at least 0 and below 1; got {self.label_smoothing}.")
        self._check_augmentation()
        self._check_caches()
        self._check_training()
        self._check_evaluation()

    def _check_augmentation(self) -> None:
        if not self.augment:
            changed = _changed(self.augmentation, prefix="augmentation.")
            changed += ["min-crop-area"] if self.min_crop_area != type(self).min_crop_area else []
            _check_no_effect(changed, without="augment")
        if self.loop.batch_size == 1 and (self.augmentation.mixup_alpha or self.augmentation.cutmix_alpha):
            raise ValueError(
                "mixup and CutMix mix the clips of a batch with each other, and --loop.batch-size is 1; "
                "take a larger batch, or neither of them."
            )

    def _check_caches(self) -> None:
        if self.frame_cache is None:
            _check_no_effect(_changed(self.cache, prefix="cache."), without="frame-cache")
        if self.token_cache is None:
            _check_no_effect(["token-dtype"] if self.token_dtype != "bf16" else [], without="token-cache")
            return
        if self.augment:
            raise ValueError(
                "--token-cache keeps one encoding of each clip, so augment would do nothing: "
                "give --no-augment with --token-cache, or neither."
            )
        if not isinstance(self.tuning, Frozen):
            raise ValueError(
                "--token-cache keeps the tokens of a frozen encoder, and --tuning trains it; leave one of them out."
            )

    def _check_training(self) -> None:
        if self.init_pooler == "contrastive" and isinstance(self.encoder, RandomEncoder):
            raise ValueError(
                "--init-pooler contrastive takes the pooler of a trained CoCa, and the encoder is random; "
                "name a CoCa as the encoder (--encoder.model), or take --init-pooler random."
            )
        if self.init_pooler == "contrastive" and (self.head.width is not None or self.head.num_heads is not None):
            raise ValueError(
                "--init-pooler contrastive has the width and heads of CoCa's pooler; leave --head.width and "
                "--head.num-heads out."
            )
        if not isinstance(self.tuning, Frozen) and "encoder" in self.optim.rate_factors:
            raise ValueError("The encoder's rate is said twice; leave `encoder` out of --optim.rate-factors.")
        if self.micro_batch_size is not None and not 1 <= self.micro_batch_size < self.loop.batch_size:
            raise ValueError(
                f"--micro-batch-size must be at least 1 and below --loop.batch-size {self.loop.batch_size}; "
                f"got {self.micro_batch_size}."
            )

    def _check_evaluation(self) -> None:
        clips, every = self.clips, self.loop.evaluate_every
        if every and clips.test is None and clips.test_split is None and not clips.holdout_share:
            raise ValueError(
                "--loop.evaluate-every does nothing without a test split or --clips.holdout-share; give one, or leave "
                "it out."
            )
        if not self.keep_best:
            return
        if not clips.holdout_share:
            raise ValueError(
                "--keep-best chooses weights on a held-out part of the training clips; give --clips.holdout-share too."
            )
        if not 0 < every < self.loop.steps:
            raise ValueError(
                f"--keep-best chooses among evaluations, and with --loop.evaluate-every {every} there is one in "
                f"{self.loop.steps} steps; give a number from 1 to {self.loop.steps - 1}."
            )


def _changed(config: AugmentConfig | FrameCacheConfig, *, prefix: str) -> list[str]:
    """The options that are not at their defaults, as the command line has them."""
    names = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    return [prefix + name.replace("_", "-") for name in names]


def _check_no_effect(changed: list[str], *, without: str) -> None:
    if changed:
        raise ValueError(f"--{changed[0]} does nothing without --{without}; give both, or neither.")
