"""One vector for each clip, of a frozen encoder: what linear evaluation and nearest neighbours look at."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from coca_video.data.loader import Unreadable
from coca_video.data.transforms import normalize
from coca_video.data.video import VideoDataset, collate_clips
from coca_video.eval.features import TokenBatch
from coca_video.eval.passes import one_pass
from coca_video.eval.token_cache import TokenCache
from coca_video.models.coca import CoCa
from coca_video.models.image import ImageEncoder

FeatureName = Literal["mean", "embedding", "frames"]


@dataclass(frozen=True, kw_only=True)
class ClipFeatures:
    """Features of every readable clip, in the order of the manifest, and what could not be read.

    mean: the mean of all patch tokens of all frames. frames: each frame's mean token, one after the other. embedding:
    CoCa's contrastive embedding, of unit length, averaged over the frames.
    """

    features: dict[FeatureName, Float32[np.ndarray, "clips dim"]]
    labels: Int64[np.ndarray, "clips"]
    video_ids: tuple[str, ...]
    unreadable: tuple[Unreadable, ...]

    def among(self, video_ids: Iterable[str]) -> Bool[np.ndarray, "clips"]:
        """Which of the clips these are."""
        wanted = frozenset(video_ids)
        return np.array([name in wanted for name in self.video_ids], dtype=np.bool_)


def features_of_clips(
    encoder: ImageEncoder,
    *,
    dataset: VideoDataset,
    names: Sequence[FeatureName],
    coca: CoCa | None,
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> ClipFeatures:
    """Decodes and encodes every clip once; the tokens of a batch are all that is kept of them.

    coca: whose encoder it is, for its embedding. Modules are on `device`, in evaluation mode. `on_batch` is told how
    many clips each batch dealt with. ValueError for an embedding without a CoCa, and if no clip can be read.
    """
    num_prefix = _num_prefix(encoder) if _pools_prefix(coca, names=names) else 0
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

    @torch.no_grad()
    def encode(frames: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            pixels = normalize(frames, mean=encoder.config.mean, std=encoder.config.std).flatten(0, 1)
            tokens: Tensor = encoder(pixels, prefix_tokens=num_prefix > 0)
        return tokens.reshape(*frames.shape[:2], *tokens.shape[1:])

    batches = (TokenBatch(tokens=encode(b.frames), labels=b.labels, video_ids=b.video_ids) for b in clips)
    return _gather(batches, names=names, coca=coca, num_prefix=num_prefix, size=len(dataset), unreadable=unreadable)


def features_of_tokens(
    cache: TokenCache,
    *,
    names: Sequence[FeatureName],
    coca: CoCa | None,
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    on_batch: Callable[[int], object] | None = None,
) -> ClipFeatures:
    """The same from a token cache, without decoding anything; see `needs_prefix_tokens` for what it cannot give."""
    if needs_prefix_tokens(coca, names=names):
        raise ValueError("This CoCa's embedding also attends over the class token, which a token cache does not keep.")
    unreadable: list[Unreadable] = []
    packed = one_pass(
        cache,
        batch_size=batch_size,
        num_workers=num_workers,
        collate=TokenCache.collate,
        device=device,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    batches = (batch.to_whole_tokens() for batch in packed)
    return _gather(batches, names=names, coca=coca, num_prefix=0, size=len(cache), unreadable=unreadable)


def needs_prefix_tokens(coca: CoCa | None, *, names: Sequence[FeatureName]) -> bool:
    """Whether these features are of more tokens than an encoder's patches: the embedding of open_clip's wiring."""
    return _pools_prefix(coca, names=names) and coca is not None and _num_prefix(coca.encoder) > 0


def _pools_prefix(coca: CoCa | None, *, names: Sequence[FeatureName]) -> bool:
    return "embedding" in names and coca is not None and coca.config.poolers == "open_clip"


def _num_prefix(encoder: ImageEncoder) -> int:
    return int(getattr(encoder.model, "num_prefix_tokens", 0))


def _gather(
    batches: Iterable[TokenBatch],
    *,
    names: Sequence[FeatureName],
    coca: CoCa | None,
    num_prefix: int,
    size: int,
    unreadable: list[Unreadable],
) -> ClipFeatures:
    """`size`: of the data set. The arrays are made once: those of 240,000 clips must not be in memory twice."""
    if "embedding" in names and coca is None:
        raise ValueError("The contrastive embedding is a CoCa's, and this model is none; leave it out of the features.")
    arrays: dict[FeatureName, np.ndarray] = {}
    labels: list[int] = []
    video_ids: list[str] = []
    for batch in batches:
        done = len(labels)
        labels += batch.labels.tolist()
        video_ids += batch.video_ids
        for name in names:
            values = _features(batch.tokens, name=name, coca=coca, num_prefix=num_prefix).cpu().numpy()
            if name not in arrays:
                arrays[name] = np.empty((size, values.shape[1]), dtype=np.float32)
            arrays[name][done : len(labels)] = values
    if not labels:
        raise ValueError(f"None of the {size} clips could be read; the first: {unreadable[0].cause}")
    return ClipFeatures(
        features={name: array[: len(labels)] for name, array in arrays.items()},
        labels=np.array(labels, dtype=np.int64),
        video_ids=tuple(video_ids),
        unreadable=tuple(unreadable),
    )


@torch.no_grad()
def _features(
    tokens: Float[Tensor, "batch frames tokens dim"], *, name: FeatureName, coca: CoCa | None, num_prefix: int
) -> Float32[Tensor, "batch features"]:
    tokens = tokens.float()
    match name:
        case "mean":
            return tokens[:, :, num_prefix:].mean(dim=(1, 2))
        case "frames":
            return tokens[:, :, num_prefix:].mean(dim=2).flatten(1)
        case "embedding":
            assert coca is not None
            embedding, _ = coca.pool(tokens.flatten(0, 1))
            return embedding.reshape(*tokens.shape[:2], -1).mean(dim=1)
