"""The probe: a frozen image encoder, ONE learned query over the tokens of all frames, softmax (CoCa section 3.3)."""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipConfig, VideoDataset, collate_clips
from coca_video.eval.classification import ClassificationResult, evaluate_clips, evaluate_tokens, write_result
from coca_video.eval.features import TokenDataset, collate_tokens, encode_batch, encode_clips
from coca_video.hub import Saved, fingerprint, load, save
from coca_video.losses import classification_loss
from coca_video.models.image import ImageConfig, resize_encoder
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.loop import Device, LoopConfig, Training, pick_device, progress_bar, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer, update
from coca_video.train.run import Run
from coca_video.train.window import Sum

MEBIBYTE = 2**20


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
    """Frames a clip, uniformly spread; one is the middle frame: an image probe."""
    image_size: int | None = None
    """In px; the encoder's own when None."""
    cache_tokens: bool = False
    """Encode each clip once and keep its tokens in memory: many times faster, without augmentation."""
    augment: bool = True
    """Draw frames within their segments, crop and flip anew in each epoch."""
    min_crop_area: float = 0.5
    """Smallest share of the frame that an augmenting crop keeps."""
    flip_probability: float = 0.5
    """Of an augmenting flip; 0 for actions that tell left from right."""
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
        defaults = {field.name: field.default for field in fields(self)}
        for name in ("min_crop_area", "flip_probability"):
            if not self.augment and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name.replace('_', '-')} does nothing without --augment; give both, or neither.")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"--label-smoothing must be at least 0 and below 1; got {self.label_smoothing}.")
        if self.loop.evaluate_every and self.clips.test is None and self.clips.test_split is None:
            raise ValueError("--loop.evaluate-every does nothing without a test split; give one, or leave it out.")


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Where the classifier is, its evaluation (None without a test split), and how many clips could not be read."""

    model_folder: Path
    evaluation: dict[str, Any] | None
    num_unreadable: int


def probe_step(
    model: VideoClassifier, tokens: Tensor, optimizer: torch.optim.Optimizer, *, labels: Tensor, config: ProbeConfig
) -> dict[str, Sum]:
    """One update of the head on tokens [batch, tokens, dim] of frozen frames."""
    with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=config.loop.precision == "bf16"):
        logits = model.classify(tokens)
    loss = classification_loss(logits, labels=labels, label_smoothing=config.label_smoothing)
    norm = update(optimizer, loss=loss, gradient_clip=config.optim.gradient_clip)
    correct = (logits.argmax(dim=1) == labels).sum()
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
    optimizer = build_optimizer(model, config=config.optim)
    bf16 = config.loop.precision == "bf16"
    train_clips = _clips(train, config=config, model=model, augment=config.augment)
    dataset: VideoDataset | TokenDataset = train_clips
    if config.cache_tokens:
        dataset = _cached(model, train_clips, what="training", config=config, run=run, device=device)
    evaluation = None
    if test is not None:
        evaluation = _test_evaluation(model, test=test, config=config, run=run, device=device)

    def step(batch: Any) -> dict[str, Sum]:
        batch = batch if config.cache_tokens else encode_batch(model, batch, device=device, bf16=bf16)
        return probe_step(model, batch.tokens, optimizer, labels=batch.labels, config=config)

    training = Training(
        model=model,
        optimizer=optimizer,
        step=step,
        dataset=dataset,
        collate=collate_tokens if config.cache_tokens else collate_clips,
        evaluate=None if evaluation is None else evaluation.metrics,
        num_workers=0 if config.cache_tokens else config.loop.num_workers,  # tokens are at hand, on the device
    )
    return training, evaluation


def _test_evaluation(
    model: VideoClassifier, *, test: Manifest, config: ProbeConfig, run: Run, device: torch.device
) -> _TestEvaluation:
    clips = _clips(test, config=config, model=model, augment=False)
    if config.cache_tokens:
        tokens = _cached(model, clips, what="test", config=config, run=run, device=device)
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
    clip = ClipConfig(
        num_frames=config.num_frames,
        image_size=model.config.image.image_size,
        interpolation=model.config.image.interpolation,
        decoder=config.clips.decoder,
        timeout_seconds=config.clips.timeout_seconds,
        augment=augment,
        crop_scale=(config.min_crop_area, 1.0),
        flip_probability=config.flip_probability,
    )
    return VideoDataset(manifest, config=clip, seed=config.loop.seed)


def _cached(
    model: VideoClassifier, clips: VideoDataset, *, what: str, config: ProbeConfig, run: Run, device: torch.device
) -> TokenDataset:
    """Encodes `clips` with a bar, and says what they take in memory; what cannot be read is noted in the run."""
    with progress_bar(f"encoding {what} clips", total=len(clips)) as bar:
        tokens = encode_clips(
            model,
            dataset=clips,
            device=device,
            num_workers=config.loop.num_workers,
            bf16=config.loop.precision == "bf16",
            on_batch=bar.update,
        )
    print(f"Tokens of {len(tokens)} {what} clips: {tokens.batch.tokens.nbytes / MEBIBYTE:.0f} MiB.", file=sys.stderr)
    run.note_unreadable(list(tokens.unreadable))
    return tokens
