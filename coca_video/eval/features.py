"""Tokens of clips: what heads are trained and evaluated on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from coca_video.data.loader import Unreadable
from coca_video.data.transforms import normalize
from coca_video.data.video import ClipBatch, VideoDataset, collate_clips
from coca_video.eval.passes import one_pass
from coca_video.models.image import fold_normalization
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Tokens of a batch of clips, their labels and names.

    variance: of each token over its features, where the tokens have lost their means (token cache): heads begin with a
    layer norm, so that the mean changes no score, and need not compute what is given.
    """

    tokens: Float[Tensor, "batch frames tokens dim"]
    labels: Int64[Tensor, "batch"]
    video_ids: tuple[str, ...]
    variance: Float[Tensor, "batch frames tokens"] | None = None


@dataclass(frozen=True, kw_only=True)
class EncodedClips:
    """Tokens of every readable clip, in the order of the manifest, in memory; and what could not be read."""

    batch: TokenBatch
    unreadable: tuple[Unreadable, ...]


@torch.no_grad()
def encode_frames(
    model: VideoClassifier,
    frames: UInt8[Tensor, "batch frames 3 height width"],
    *,
    device: torch.device,
    bf16: bool = False,
) -> Float[Tensor, "batch frames tokens dim"]:
    """The tokens of clips, on `device`, without gradients; under bf16 autocast where asked."""
    image = model.config.image
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        return model.encode(normalize(frames.to(device), mean=image.mean, std=image.std))


Encode = Callable[[UInt8[Tensor, "batch frames 3 height width"]], Float[Tensor, "batch frames tokens dim"]]


def frozen_encode(model: VideoClassifier, *, device: torch.device, bf16: bool = False) -> Encode:
    """`encode_frames` of a model whose encoder is frozen, as a function that is made once for many batches.

    In fp32 the normalisation is folded into the patch embedding where there is a plain one (`fold_normalization`): the
    tokens are the same within 1e-5. Under bf16 it is not: what is saved there costs half a percent of exactness.
    """
    if not any(parameter.requires_grad for parameter in model.encoder.parameters()):
        model.encoder.eval()  # a batch norm in training would use, and change, other statistics than it was trained to
    folded = None if bf16 else _folded(model)
    if folded is None:
        return partial(encode_frames, model, device=device, bf16=bf16)
    return partial(_encode_pixels, folded, device=device)


def _folded(model: VideoClassifier) -> VideoClassifier | None:
    """`model` with an encoder that takes pixels as they are, all other weights shared; None where it cannot be had."""
    try:
        encoder = fold_normalization(model.encoder)
    except ValueError:  # it is not frozen, or its first layer is not such that folding is exact
        return None
    folded = copy.copy(model)
    folded._modules = {**model._modules, "encoder": encoder}
    return folded


@torch.no_grad()
def _encode_pixels(
    folded: VideoClassifier, frames: UInt8[Tensor, "batch frames 3 height width"], *, device: torch.device
) -> Float[Tensor, "batch frames tokens dim"]:
    return folded.encode(frames.to(device).float())


def encode_batch(model: VideoClassifier, batch: ClipBatch, *, device: torch.device, bf16: bool = False) -> TokenBatch:
    """`encode_frames` of a batch, with its labels and names."""
    tokens = encode_frames(model, batch.frames, device=device, bf16=bf16)
    return TokenBatch(tokens=tokens, labels=batch.labels.to(device), video_ids=batch.video_ids)


def encode_clips(
    model: VideoClassifier,
    *,
    dataset: VideoDataset,
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> EncodedClips:
    """Encodes every clip once, in order, for few clips: all tokens stay on `device`. ValueError if none can be read.

    `on_batch` is told how many clips each batch dealt with. For many clips there is `build_token_cache`.
    """
    unreadable: list[Unreadable] = []
    clips = one_pass(
        dataset,
        batch_size=batch_size,
        num_workers=num_workers,
        collate=collate_clips,
        device=device,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    batches = [encode_batch(model, batch, device=device, bf16=bf16) for batch in clips]
    if not batches:
        raise ValueError(f"None of the {len(dataset)} videos could be read; the first: {unreadable[0].cause}")
    batch = TokenBatch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        video_ids=tuple(name for batch in batches for name in batch.video_ids),
    )
    return EncodedClips(batch=batch, unreadable=tuple(unreadable))
