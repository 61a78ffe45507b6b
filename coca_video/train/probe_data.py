"""What a probe trains and tests on: clips of videos or of a frame cache, augmented, or tokens kept in memory."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from coca_video.data.augment import AugmentConfig, apply, draw
from coca_video.data.decode import Backend, prove
from coca_video.data.frame_cache import CachedVideoDataset, FrameCache, check_kept
from coca_video.data.frame_cache_build import SizeEstimate, build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.manifest import Manifest
from coca_video.data.mixing import mix
from coca_video.data.video import ClipBatch, ClipConfig, VideoDataset
from coca_video.data.workers import num_usable_cpus
from coca_video.distributed import on_main
from coca_video.eval.features import TokenDataset, encode_clips
from coca_video.models.video import VideoClassifier
from coca_video.train.loop import LoopConfig, progress_bar

MEGABYTE = 10**6
MEBIBYTE = 2**20


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
            on_estimate=lambda estimate: _say_size(estimate, folder=place),
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


def _say_size(estimate: SizeEstimate, *, folder: Path) -> None:
    total, left, free = (
        number / MEGABYTE for number in (estimate.total_bytes, estimate.left_bytes, estimate.free_bytes)
    )
    text = f"The frame cache {folder} will take about {total:,.0f} MB, {left:,.0f} of them still to be written"
    if left > free:
        raise ValueError(
            f"{text}, and {free:,.0f} MB are free; choose another --frame-cache, or keep less "
            "(--cache.num-frames, --cache.short-side, --cache.quality)."
        )
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


def cached_tokens(
    model: VideoClassifier, clips: VideoDataset, *, what: str, loop: LoopConfig, device: torch.device
) -> TokenDataset:
    """Encodes `clips` with a bar, and says what they take in memory."""
    with progress_bar(f"encoding {what} clips", total=len(clips)) as bar:
        tokens = encode_clips(
            model,
            dataset=clips,
            device=device,
            num_workers=loop.num_workers,
            bf16=loop.precision == "bf16",
            on_batch=bar.update,
        )
    print(f"Tokens of {len(tokens)} {what} clips: {tokens.batch.tokens.nbytes / MEBIBYTE:.0f} MiB.", file=sys.stderr)
    return tokens
