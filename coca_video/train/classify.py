"""The probe: a frozen image encoder, ONE learned query over the tokens of all frames, softmax (CoCa section 3.3)."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from coca_video.data.augment import AugmentConfig, flips_allowed
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipBatch, ClipConfig, VideoDataset, check_stride, collate_clips
from coca_video.eval.classification import ClassificationResult, evaluate_clips, evaluate_tokens, write_result
from coca_video.eval.features import TokenBatch, TokenDataset, collate_tokens, encode_frames
from coca_video.hub import Saved, fingerprint, load, save
from coca_video.losses import classification_loss
from coca_video.models.image import ImageConfig, resize_encoder
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.loop import Device, LoopConfig, Training, pick_device, progress_bar, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer, update
from coca_video.train.probe_data import augment_batch, cached_clips, cached_tokens, check_decoder
from coca_video.train.run import Run
from coca_video.train.window import Sum


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
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """A single-query probe on a frozen encoder."""

    encoder: PretrainedEncoder | RandomEncoder
    clips: ClipsConfig
    out: Path
    """Folder of the run; the same command goes on where it stopped."""
    num_frames: int = 16
    """Frames a clip; one is the middle frame: an image probe."""
    sampling: Literal["uniform", "dense"] = "uniform"
    """uniform spreads the frames over the clip; dense takes every stride-th of a part of it, in tests the middle."""
    stride: int | None = None
    """Frames of the video from one to the next, with dense sampling."""
    image_size: int | None = None
    """In px; the encoder's own when None."""
    cache_tokens: bool = False
    """Encode each clip once and keep its tokens in memory: many times faster, without augmentation."""
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
        if self.cache_tokens and self.augment:
            raise ValueError(
                "cache_tokens keeps one encoding of each clip, so augment would do nothing: "
                "give --no-augment with --cache-tokens, or neither."
            )
        check_stride(self.stride, sampling=self.sampling)
        if not self.augment:
            changed = _changed(self.augmentation, prefix="augmentation.")
            changed += ["min-crop-area"] if self.min_crop_area != type(self).min_crop_area else []
            _check_no_effect(changed, without="augment")
        if self.frame_cache is None:
            _check_no_effect(_changed(self.cache, prefix="cache."), without="frame-cache")
        if self.loop.batch_size == 1 and (self.augmentation.mixup_alpha or self.augmentation.cutmix_alpha):
            raise ValueError(
                "mixup and CutMix mix the clips of a batch with each other, and --loop.batch-size is 1; "
                "take a larger batch, or neither of them."
            )
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must be at least 0 and below 1; got {self.label_smoothing}.")
        if self.loop.evaluate_every and self.clips.test is None and self.clips.test_split is None:
            raise ValueError("--loop.evaluate-every does nothing without a test split; give one, or leave it out.")


def _changed(config: AugmentConfig | FrameCacheConfig, *, prefix: str) -> list[str]:
    """The options that are not at their defaults, as the command line has them."""
    names = [field.name for field in fields(config) if getattr(config, field.name) != field.default]
    return [prefix + name.replace("_", "-") for name in names]


def _check_no_effect(changed: list[str], *, without: str) -> None:
    if changed:
        raise ValueError(f"--{changed[0]} does nothing without --{without}; give both, or neither.")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Where the classifier is, its evaluation (None without a test split), and how many clips could not be read."""

    model_folder: Path
    evaluation: dict[str, Any] | None
    num_unreadable: int


def probe_step(
    model: VideoClassifier, tokens: Tensor, optimizer: torch.optim.Optimizer, *, labels: Tensor, config: ProbeConfig
) -> dict[str, Sum]:
    """One update of the head on tokens [batch, frames, tokens, dim] of frozen frames.

    labels: [batch] class numbers or [batch, classes] shares; `top1` then counts against the class of the larger share.
    """
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=config.loop.precision == "bf16"):
        logits = model.classify(tokens)
    loss = classification_loss(logits, labels=labels, label_smoothing=config.label_smoothing)
    norm = update(optimizer, loss=loss, gradient_clip=config.optim.gradient_clip)
    heaviest = labels.argmax(dim=1) if labels.is_floating_point() else labels
    correct = (logits.argmax(dim=1) == heaviest).sum()
    return {"loss": Sum(loss, 1), "top1": Sum(correct, len(labels)), "gradient_norm": Sum(norm, 1)}


def run_probe(config: ProbeConfig) -> ProbeResult:
    """Trains, evaluates on the test split, writes the classifier. Goes on where `out` stopped."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("A probe trains in one process for now, and torchrun started several; start it without.")
    device = pick_device(config.device)
    train, test = read_splits(config.clips)
    pretrained = load_pretrained(config.encoder)
    model = build_classifier(config, num_classes=len(train.classes), pretrained=pretrained).to(device)
    identity = {"encoder_fingerprint": fingerprint(model.encoder), "train_fingerprint": train.fingerprint()}
    if test is not None:
        identity["test_fingerprint"] = test.fingerprint()
    run = Run(config.out, config=config, identity=identity)
    result_file = run.folder / "test.json"  # and not in evaluation/, which belongs to whoever evaluates later
    if run.is_finished:
        evaluation = json.loads(result_file.read_text()) if result_file.is_file() else None
        return ProbeResult(model_folder=run.model_folder, evaluation=evaluation, num_unreadable=len(run.unreadable))
    training, test_evaluation = _training(model, train=train, test=test, config=config, run=run, device=device)
    run_loop(training, config=config.loop, optim=config.optim, run=run)
    model.eval()
    evaluation = None
    if test_evaluation is not None:
        # A run that was killed after its last checkpoint has no step left in which the loop would evaluate.
        result = test_evaluation.latest or test_evaluation.evaluate()
        run.note_unreadable(list(result.unreadable))
        facts = {
            "model": str(run.model_folder),
            "data": str((config.clips.test or config.clips.train).resolve()),
            "split": config.clips.test_split,
            "num_frames": config.num_frames,
            "sampling": config.sampling,
            "stride": config.stride,
            "frames": "videos" if config.frame_cache is None else "JPEG cache",
        }
        result_file.unlink(missing_ok=True)  # of a start that was killed before it had written its model
        path = write_result(run.folder, name="test", result=result, facts=facts)
        evaluation = json.loads(path.read_text())
    license, source = (None, None) if pretrained is None else (pretrained.license, pretrained.source)
    save(run.model_folder, model=model, classes=train.classes, license=license, source=source)
    return ProbeResult(model_folder=run.model_folder, evaluation=evaluation, num_unreadable=len(run.unreadable))


def read_splits(clips: ClipsConfig) -> tuple[Manifest, Manifest | None]:
    """The training and the test part; both in the order of the training manifest's classes, every file there."""
    train = read_manifest(clips.train)
    test = None
    if clips.test is not None or clips.test_split is not None:
        test = train if clips.test is None else read_manifest(clips.test, classes=train.classes)
        test = test if clips.test_split is None else test.select(split=clips.test_split)
    train = train if clips.train_split is None else train.select(split=clips.train_split)
    for manifest in (train, test):
        if manifest is not None:
            manifest.check_labels()
            manifest.check_files()
    return train, test


def load_pretrained(encoder: PretrainedEncoder | RandomEncoder) -> Saved | None:
    """The model that the encoder comes from; None for a random one."""
    match encoder:
        case PretrainedEncoder(model=source):
            return load(source)
        case RandomEncoder():
            return None


def build_classifier(config: ProbeConfig, *, num_classes: int, pretrained: Saved | None = None) -> VideoClassifier:
    """A classifier with a fresh head on the config's encoder, which is frozen and at the config's image size.

    `pretrained` is what `load_pretrained(config.encoder)` gives, where it is at hand.
    """
    pretrained = load_pretrained(config.encoder) if pretrained is None else pretrained
    if pretrained is not None:
        image = pretrained.encoder.config
    else:
        assert isinstance(config.encoder, RandomEncoder)
        image = config.encoder.image
    torch.manual_seed(config.loop.seed)
    model = VideoClassifier(VideoClassifierConfig(image=image, num_classes=num_classes, num_frames=config.num_frames))
    if pretrained is not None:
        model.encoder.load_state_dict(pretrained.encoder.state_dict())
    if config.image_size is not None and config.image_size != image.image_size:
        resize_encoder(model.encoder, image_size=config.image_size)
        model.config = replace(model.config, image=model.encoder.config)
    model.encoder.requires_grad_(False)
    return model


@dataclass(kw_only=True)
class _TestEvaluation:
    """What evaluates on the test split, and its latest result."""

    evaluate: Callable[[], ClassificationResult]
    latest: ClassificationResult | None = None

    def metrics(self) -> dict[str, float]:
        """Evaluates anew; the figures for the log."""
        self.latest = self.evaluate()
        metrics = self.latest.metrics
        return {"top1": metrics.top1, "top5": metrics.top5, "mean_class": metrics.mean_class}


def _training(
    model: VideoClassifier,
    *,
    train: Manifest,
    test: Manifest | None,
    config: ProbeConfig,
    run: Run,
    device: torch.device,
) -> tuple[Training, _TestEvaluation | None]:
    """What the loop needs, and what evaluates; both on cached tokens, or both on clips."""
    check_decoder(config.clips.decoder)
    optimizer = build_optimizer(model, config=config.optim)
    train_clips = _clips(train, config=config, model=model, augment=config.augment)
    dataset: VideoDataset | TokenDataset = train_clips
    if config.cache_tokens:
        dataset = _tokens(model, train_clips, what="training", config=config, run=run, device=device)
    evaluation = None
    if test is not None:
        evaluation = _test_evaluation(model, test=test, config=config, run=run, device=device)
    encode = _Encode(model=model, manifest=train, config=config, device=device)

    def step(batch: ClipBatch | TokenBatch) -> dict[str, Sum]:
        tokens, labels = encode(batch) if isinstance(batch, ClipBatch) else (batch.tokens, batch.labels)
        return probe_step(model, tokens, optimizer, labels=labels, config=config)

    training = Training(
        model=model,
        optimizer=optimizer,
        step=step,
        dataset=dataset,
        collate=collate_tokens if config.cache_tokens else collate_clips,
        evaluate=None if evaluation is None else evaluation.metrics,
        num_workers=0 if config.cache_tokens else config.loop.num_workers,
        device=None if config.cache_tokens else device,  # tokens are at hand, on the device
    )
    return training, evaluation


class _Encode:
    """Training clips to tokens of the frozen encoder and labels, augmented before if the config says so."""

    def __init__(
        self, *, model: VideoClassifier, manifest: Manifest, config: ProbeConfig, device: torch.device
    ) -> None:
        self._model, self._manifest, self._config, self._device = model, manifest, config, device
        self._flips_allowed = flips_allowed(manifest.classes)

    def __call__(self, batch: ClipBatch) -> tuple[Tensor, Tensor]:
        config, frames, labels = self._config, batch.frames, batch.labels
        if config.augment:
            # By the manifest: asking the labels on a GPU would wait for all the work that it has been given.
            rows = [self._manifest.rows[key.index] for key in batch.keys]
            classes = np.array([self._manifest.label_index(row) for row in rows])
            may_flip = self._flips_allowed[classes]
            frames, labels = augment_batch(
                batch, config=config.augmentation, seed=config.loop.seed, may_flip=may_flip, model=self._model
            )
        bf16 = config.loop.precision == "bf16"
        return encode_frames(self._model, frames, device=self._device, bf16=bf16), labels


def _test_evaluation(
    model: VideoClassifier, *, test: Manifest, config: ProbeConfig, run: Run, device: torch.device
) -> _TestEvaluation:
    clips = _clips(test, config=config, model=model, augment=False)
    if config.cache_tokens:
        tokens = _tokens(model, clips, what="test", config=config, run=run, device=device)
        return _TestEvaluation(evaluate=lambda: evaluate_tokens(model, dataset=tokens, classes=test.classes))

    def evaluate() -> ClassificationResult:
        with progress_bar("evaluating", total=len(clips)) as bar:
            return evaluate_clips(
                model,
                dataset=clips,
                classes=test.classes,
                device=device,
                num_workers=config.loop.num_workers,
                bf16=config.loop.precision == "bf16",
                on_batch=bar.update,
            )

    return _TestEvaluation(evaluate=evaluate)


def _clips(manifest: Manifest, *, config: ProbeConfig, model: VideoClassifier, augment: bool) -> VideoDataset:
    """The clips of the videos, or of their frame cache."""
    clip = ClipConfig(
        num_frames=config.num_frames,
        image_size=model.config.image.image_size,
        interpolation=model.config.image.interpolation,
        decoder=config.clips.decoder,
        timeout_seconds=config.clips.timeout_seconds,
        augment=augment,
        crop_scale=(config.min_crop_area, 1.0),
        sampling=config.sampling,
        stride=config.stride,
    )
    if config.frame_cache is None:
        return VideoDataset(manifest, config=clip, seed=config.loop.seed)
    return cached_clips(
        manifest,
        folder=config.frame_cache,
        kept=config.cache,
        config=clip,
        num_workers=config.loop.num_workers,
        seed=config.loop.seed,
    )


def _tokens(
    model: VideoClassifier, clips: VideoDataset, *, what: str, config: ProbeConfig, run: Run, device: torch.device
) -> TokenDataset:
    """The clips' tokens; what cannot be read is noted in the run."""
    tokens = cached_tokens(model, clips, what=what, loop=config.loop, device=device)
    run.note_unreadable(list(tokens.unreadable))
    return tokens
