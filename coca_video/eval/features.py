"""Tokens of a frozen encoder, computed once and kept in memory: what a probe trains on when clips are not augmented."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.transforms import normalize
from coca_video.data.video import ClipBatch, VideoDataset, collate_clips
from coca_video.eval.passes import one_pass
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Tokens of a batch of clips, their labels and names."""

    tokens: Float[Tensor, "batch frames tokens dim"]
    labels: Int64[Tensor, "batch"]
    video_ids: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """Tokens of every readable clip, in the order of the manifest; indexed like the clips they came from."""

    batch: TokenBatch
    unreadable: tuple[Unreadable, ...]

    def __len__(self) -> int:
        return len(self.batch.video_ids)

    def __getitem__(self, key: SampleKey) -> TokenBatch:
        row = slice(key.index, key.index + 1)
        return TokenBatch(
            tokens=self.batch.tokens[row], labels=self.batch.labels[row], video_ids=self.batch.video_ids[row]
        )


def collate_tokens(batches: Sequence[TokenBatch]) -> TokenBatch:
    """One batch out of several."""
    return TokenBatch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        labels=torch.cat([batch.labels for batch in batches]),
        video_ids=tuple(name for batch in batches for name in batch.video_ids),
    )


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
) -> TokenDataset:
    """Encodes every clip once, in order; ValueError if none can be read. `on_batch` gets each batch's number."""
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
    return TokenDataset(batch=collate_tokens(batches), unreadable=tuple(unreadable))
