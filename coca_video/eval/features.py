"""Tokens of a frozen encoder, computed once and kept in memory: what a probe trains on when clips are not augmented."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from coca_video.data.loader import SampleKey, Unreadable, in_order
from coca_video.data.transforms import normalize
from coca_video.data.video import ClipBatch, VideoDataset, collate_clips
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class TokenBatch:
    """Tokens of a batch of clips, their labels and names."""

    tokens: Float[Tensor, "batch tokens dim"]
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
def encode_batch(model: VideoClassifier, batch: ClipBatch, *, device: torch.device, bf16: bool = False) -> TokenBatch:
    """The tokens of a batch of clips, on `device`, without gradients; under bf16 autocast where asked."""
    image = model.config.image
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        tokens = model.encode(normalize(batch.frames.to(device), mean=image.mean, std=image.std))
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
    batches: list[TokenBatch] = []
    unreadable: list[Unreadable] = []
    stream = in_order(
        dataset, num_samples=len(dataset), batch_size=batch_size, workers=num_workers, collate=collate_clips
    )
    for batch, failed in stream:
        unreadable += failed
        if on_batch is not None:
            on_batch(len(failed) + (0 if batch is None else len(batch.video_ids)))
        if batch is not None:
            batches.append(encode_batch(model, batch, device=device, bf16=bf16))
    if not batches:
        raise ValueError(f"None of the {len(dataset)} videos could be read; the first: {unreadable[0].cause}")
    return TokenDataset(batch=collate_tokens(batches), unreadable=tuple(unreadable))
