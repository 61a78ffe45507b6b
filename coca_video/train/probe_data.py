"""What a probe trains and tests on: clips of videos or of a frame cache, augmented, or tokens from a token cache."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from coca_video.data.augment import AugmentConfig, apply, draw, flips_allowed
from coca_video.data.balance import class_balanced
from coca_video.data.decode import Backend, prove
from coca_video.data.frame_cache import CachedVideoDataset, FrameCache, check_kept
from coca_video.data.frame_cache_build import SizeEstimate, build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.holdout import split_holdout
from coca_video.data.loader import Order, Unreadable
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.mixing import mix
from coca_video.data.table import VideoRows
from coca_video.data.video import ClipBatch, ClipConfig, VideoDataset, collate_clips
from coca_video.data.workers import num_usable_cpus
from coca_video.distributed import is_main, on_main
from coca_video.eval.classification import ClassificationResult, evaluate_clips, evaluate_tokens
from coca_video.eval.features import Encode
from coca_video.eval.passes import Rows, SizedSamples
from coca_video.eval.token_cache import PackedTokens, TokenCache
from coca_video.eval.token_cache_build import build_token_cache
from coca_video.models.video import VideoClassifier
from coca_video.train.loop import progress_bar
from coca_video.train.probe_config import ClipsConfig, ProbeConfig

SampleT = TypeVar("SampleT")

MEGABYTE = 10**6
KEEP_LESS = "choose another --frame-cache, or keep less (--cache.num-frames, --cache.short-side, --cache.quality)"


@dataclass(frozen=True, kw_only=True)
class Part:
    """Some clips of a manifest: `rows` of `whole`, all of them when None.

    Caches are of `whole`, so that another share held out does not encode them again.
    """

    manifest: Manifest
    whole: Manifest
    rows: Int64[np.ndarray, "rows"] | None = None

    @classmethod
    def of(cls, whole: Manifest, *, manifest: Manifest) -> "Part":
        """The part of `whole` that `manifest` has."""
        numbers = {row.video_id: number for number, row in enumerate(whole.rows)}
        rows = np.array([numbers[row.video_id] for row in manifest.rows], dtype=np.int64)
        return cls(manifest=manifest, whole=whole, rows=rows)

    def samples(self, dataset: SizedSamples[SampleT]) -> SizedSamples[SampleT]:
        """This part of a data set of `whole`."""
        return dataset if self.rows is None else Rows(dataset, rows=self.rows)


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What is trained on, what is looked at meanwhile, and what is tested on; all with the same classes."""

    train: Part
    holdout: Part | None
    test: Part | None


def read_splits(clips: ClipsConfig, *, seed: int) -> Splits:
    """The parts, in the order of the training manifest's classes; every clip has a label and every file is there.

    ValueError where a part is empty.
    """
    source = read_manifest(clips.train, classes_by_name=clips.classes_by_name)
    test: Part | None = None
    if clips.test is None and clips.test_split is not None and not _has_splits(source):
        whole = source
        train, test_manifest = _hold_out_test(source, clips=clips, seed=seed)
        test = Part.of(whole, manifest=test_manifest)
    else:
        train = whole = source if clips.train_split is None else source.select(split=clips.train_split)
        test = _test_part(source, clips=clips)
    holdout = None
    if clips.holdout_share:
        train, holdout = split_holdout(train, share=clips.holdout_share, group=clips.holdout_group, seed=seed)
    for manifest in (whole,) if test is None else (whole, test.manifest):
        manifest.check_labels()
        manifest.check_files()
    return Splits(
        train=Part(manifest=train, whole=whole) if train is whole else Part.of(whole, manifest=train),
        holdout=None if holdout is None else Part.of(whole, manifest=holdout),
        test=test,
    )


def _test_part(source: Manifest, *, clips: ClipsConfig) -> Part | None:
    """What splits and `clips.test` say to test on."""
    if clips.test is None and clips.test_split is None:
        return None
    test = source if clips.test is None else read_manifest(clips.test, classes=source.classes)
    test = test if clips.test_split is None else test.select(split=clips.test_split)
    return Part(manifest=test, whole=test)


def _has_splits(manifest: Manifest) -> bool:
    assert isinstance(manifest.rows, VideoRows)
    return any(split is not None for split in manifest.rows.splits)


def _hold_out_test(manifest: Manifest, *, clips: ClipsConfig, seed: int) -> tuple[Manifest, Manifest]:
    """Training and test part of clips that have no splits."""
    if not clips.test_share:
        raise ValueError(
            f"{manifest.source} does not say what to test on, for no clip has a split; give --clips.test-share 0.2, "
            "or --clips.test, or, for no test, --clips.train-split None --clips.test-split None."
        )
    return split_holdout(manifest, share=clips.test_share, group=clips.holdout_group, seed=seed)


@dataclass(frozen=True, kw_only=True)
class ProbeBatch:
    """What a step learns from: frames (uint8) that are still to be encoded, or a frozen encoder's tokens of them.

    labels: class numbers, or the share of each class. variance: see `VideoHead.forward`.
    """

    inputs: UInt8[Tensor, "batch frames 3 height width"] | Float[Tensor, "batch frames tokens dim"]
    labels: Int64[Tensor, "batch"] | Float[Tensor, "batch classes"]
    variance: Float[Tensor, "batch frames tokens"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, first: int, last: int) -> "ProbeBatch":
        """Rows `first` to `last`, last excluded."""
        rows = slice(first, last)
        variance = None if self.variance is None else self.variance[rows]
        return ProbeBatch(inputs=self.inputs[rows], labels=self.labels[rows], variance=variance)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Training clips for the loop: data set, order and so on as `Training` has them.

    prepare: a collated batch, on the device, to what is learned from; it augments. unreadable: what is known beforehand
    to be, from a token cache.
    """

    dataset: Any
    collate: Callable[[Any], Any]
    order: Order
    num_workers: int
    prepare: Callable[[Any], ProbeBatch]
    unreadable: tuple[Unreadable, ...] = ()


def training_data(part: Part, *, model: VideoClassifier, config: ProbeConfig, device: torch.device) -> TrainingData:
    """The training clips, or the tokens that `model` makes of them; a cache that is not there is built first."""
    options: dict[str, Any] = {
        "order": _order(part.manifest, config=config),
        "num_workers": config.loop.num_workers,
    }
    if config.token_cache is None:
        clips = probe_clips(part.whole, model=model, config=config, augment=config.augment)
        prepare = _Augment(model=model, manifest=part.whole, config=config)
        return TrainingData(dataset=part.samples(clips), collate=collate_clips, prepare=prepare, **options)
    tokens = token_cache(part.whole, model=model, config=config, device=device)
    prepare_tokens = partial(_of_tokens, dtype=token_dtype(config))
    names = {row.video_id for row in part.manifest.rows} if tokens.unreadable else set()
    return TrainingData(
        dataset=part.samples(tokens),
        collate=TokenCache.collate,
        prepare=prepare_tokens,
        unreadable=tuple(sample for sample in tokens.unreadable if sample.key in names),
        **options,
    )


def token_dtype(config: ProbeConfig) -> torch.dtype:
    """What the head takes cached tokens in."""
    return torch.bfloat16 if config.loop.precision == "bf16" else torch.float32


def _of_tokens(batch: PackedTokens, *, dtype: torch.dtype) -> ProbeBatch:
    tokens = batch.to_tokens(dtype)
    return ProbeBatch(inputs=tokens.tokens, labels=tokens.labels, variance=tokens.variance)


def _order(manifest: Manifest, *, config: ProbeConfig) -> Order:
    loop = config.loop
    if config.class_balanced:
        return class_balanced(manifest, batch_size=loop.batch_size, seed=loop.seed)
    return Order(num_samples=len(manifest.rows), batch_size=loop.batch_size, seed=loop.seed)


class _Augment:
    """Training clips to frames and labels, augmented if the config says so. `manifest` is what the keys are rows of."""

    def __init__(self, *, model: VideoClassifier, manifest: Manifest, config: ProbeConfig) -> None:
        self._model, self._manifest, self._config = model, manifest, config
        self._flips_allowed = flips_allowed(manifest.classes)

    def __call__(self, batch: ClipBatch) -> ProbeBatch:
        config = self._config
        if not config.augment:
            return ProbeBatch(inputs=batch.frames, labels=batch.labels)
        # By the manifest: asking the labels on a GPU would wait for all the work that it has been given.
        rows = [self._manifest.rows[key.index] for key in batch.keys]
        may_flip = self._flips_allowed[np.array([self._manifest.label_index(row) for row in rows])]
        frames, labels = augment_batch(
            batch, config=config.augmentation, seed=config.loop.seed, may_flip=may_flip, model=self._model
        )
        return ProbeBatch(inputs=frames, labels=labels)


def encoded(batch: ProbeBatch, *, encode: Encode) -> ProbeBatch:
    """The batch with tokens in place of frames; tokens stay as they are. `encode` is `features.frozen_encode`'s."""
    if batch.inputs.dtype != torch.uint8:
        return batch
    return ProbeBatch(inputs=encode(batch.inputs), labels=batch.labels)


def evaluation(
    part: Part, *, what: str, model: VideoClassifier, config: ProbeConfig, device: torch.device
) -> Callable[[], ClassificationResult]:
    """What evaluates `model` on a part, one clip a video and not augmented; over ranks, each gets the result."""
    options: dict[str, Any] = {
        "classes": part.manifest.classes,
        "device": device,
        "num_workers": config.loop.num_workers,
    }
    if config.token_cache is not None:
        tokens = part.samples(token_cache(part.whole, model=model, config=config, device=device))
        return lambda: evaluate_tokens(model, dataset=tokens, **options)
    clips = part.samples(probe_clips(part.whole, model=model, config=config, augment=False))

    def evaluate() -> ClassificationResult:
        with progress_bar(f"evaluating {what} clips", total=len(clips)) as bar:
            bf16 = config.loop.precision == "bf16"
            return evaluate_clips(model, dataset=clips, bf16=bf16, on_batch=bar.update, **options)

    return evaluate


def probe_clips(manifest: Manifest, *, model: VideoClassifier, config: ProbeConfig, augment: bool) -> VideoDataset:
    """The clips of the videos, or of their frame cache, as `model` takes them."""
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
        clip_seconds=config.clip_seconds,
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


def token_cache(manifest: Manifest, *, model: VideoClassifier, config: ProbeConfig, device: torch.device) -> TokenCache:
    """The tokens that `model` makes of a manifest's clips, from `config.token_cache`, where they are built if missing.

    ValueError where the disk is too small.
    """
    assert config.token_cache is not None
    cache = build_token_cache(
        model,
        dataset=probe_clips(manifest, model=model, config=config, augment=False),
        folder=config.token_cache,
        dtype=config.token_dtype,
        device=device,
        progress=progress_bar,
        on_estimate=lambda estimate: _say_size(
            estimate,
            what=f"token cache {config.token_cache}",
            advice="choose another --token-cache, or a smaller --token-dtype",
        ),
        num_workers=config.loop.num_workers,
        bf16=config.loop.precision == "bf16",
    )
    if is_main():
        say = f"Tokens of {len(cache):,} clips as {config.token_dtype}: {cache.num_bytes / MEGABYTE:,.0f} MB"
        tqdm.write(f"{say}, each within {cache.relative_error:.2%} of what was computed.", file=sys.stderr)
    return cache


def check_decoder(decoder: Backend) -> None:
    """ValueError where the decoder that was named does not work here: before a run and not at its first clip."""
    if decoder != "auto" and (cause := prove(decoder)) is not None:
        raise ValueError(f"{cause}; install or mend it, or take --clips.decoder auto.")


def open_frame_cache(
    manifest: Manifest,
    *,
    folder: Path,
    kept: FrameCacheConfig,
    decoder: Backend,
    timeout_seconds: float,
    num_workers: int,
) -> FrameCache:
    """The frame cache of this manifest below `folder`; rank 0 builds it first if it is not there.

    It is built by `num_workers` processes, or one a CPU where that is 0. ValueError where the disk is too small.
    """
    place = cache_folder(manifest, folder=folder)
    on_main(
        lambda: build_frame_cache(
            manifest,
            folder=place,
            config=kept,
            decoder=decoder,
            num_workers=num_workers or num_usable_cpus(),
            timeout_seconds=timeout_seconds,
            progress=progress_bar,
            on_estimate=lambda estimate: _say_size(estimate, what=f"frame cache {place}", advice=KEEP_LESS),
        )
    )
    return FrameCache(place)


def cache_folder(manifest: Manifest, *, folder: Path) -> Path:
    """Where the frame cache of a manifest lies below `folder`."""
    return folder / manifest.fingerprint()[:12]


def cached_clips(
    manifest: Manifest, *, folder: Path, kept: FrameCacheConfig, config: ClipConfig, num_workers: int, seed: int
) -> CachedVideoDataset:
    """The clips from a frame cache; `config.decoder` is for building it. See `open_frame_cache`.

    ValueError, before anything is built, for clips that such a cache cannot give.
    """
    check_kept(kept, config=config, folder=cache_folder(manifest, folder=folder))
    cache = open_frame_cache(
        manifest,
        folder=folder,
        kept=kept,
        decoder=config.decoder,
        timeout_seconds=config.timeout_seconds,
        num_workers=num_workers,
    )
    return CachedVideoDataset(manifest, cache=cache, config=replace(config, decoder="auto"), seed=seed)


def _say_size(estimate: SizeEstimate, *, what: str, advice: str) -> None:
    total, left, free = (
        number / MEGABYTE for number in (estimate.total_bytes, estimate.left_bytes, estimate.free_bytes)
    )
    text = f"The {what} will take about {total:,.0f} MB, {left:,.0f} of them still to be written"
    if left > free:
        raise ValueError(f"{text}, and {free:,.0f} MB are free; {advice}.")
    tqdm.write(f"{text}; {free:,.0f} MB are free.", file=sys.stderr)  # above the bar that is being drawn


def augment_batch(
    batch: ClipBatch, *, config: AugmentConfig, seed: int, may_flip: Bool[np.ndarray, "batch"], model: VideoClassifier
) -> tuple[UInt8[Tensor, "batch frames 3 height width"], Int64[Tensor, "batch"] | Float[Tensor, "batch classes"]]:
    """(frames, labels) of a batch, changed on the device that it is on; labels are soft where clips are mixed."""
    height, width = batch.frames.shape[-2:]
    parameters = draw(
        config,
        keys=batch.keys,
        seed=seed,
        height=height,
        width=width,
        mean=model.encoder.config.mean,
        may_flip=may_flip,
    )
    frames = apply(batch.frames, parameters=parameters)
    if parameters.mix is None:
        return frames, batch.labels
    onehot = F.one_hot(batch.labels, model.config.num_classes).float()
    return mix(frames, labels_onehot=onehot, parameters=parameters.mix)
