"""Image-text retrieval: recall@K both ways, each caption of an image a right answer (the protocol of Flickr30k)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from coca_video.data.image_text import Pair, PairDataset
from coca_video.data.loader import Unreadable, in_order
from coca_video.data.transforms import normalize
from coca_video.models.coca import CoCa
from coca_video.tokenizer import Tokenizer

RANKS = (1, 5, 10)


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Recall@1, 5, 10 by name, the sizes of both sides, and what could not be read."""

    metrics: dict[str, float]
    num_images: int
    num_captions: int
    unreadable: tuple[Unreadable, ...]


def recall_at(
    image: Float[Tensor, "images dim"], *, text: Float[Tensor, "captions dim"], owners: Int[Tensor, "captions"]
) -> dict[str, float]:
    """Recall@K of unit-length embeddings; `owners` gives each caption's image.

    Image to text: the share of images with a caption of theirs among the K nearest. Text to image: the share of
    captions whose image is among the K nearest. Ties go against us: a wrong answer as similar as the right one wins.
    """
    similarities = image @ text.T
    if not similarities.isfinite().all():
        raise ValueError("Some similarities are not finite, so the model's weights or inputs are broken.")
    right = owners == torch.arange(len(image), device=owners.device).unsqueeze(1)
    best_own = similarities.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
    image_ranks = ((similarities >= best_own) & ~right).sum(dim=1)
    own = similarities.gather(0, owners.unsqueeze(0))
    text_ranks = ((similarities >= own) & ~right).sum(dim=0)
    recalls = {}
    for name, ranks in (("image_to_text", image_ranks), ("text_to_image", text_ranks)):
        for k in RANKS:
            recalls[f"{name}_recall@{k}"] = float((ranks < k).double().mean())
    return recalls


@torch.no_grad()
def evaluate_retrieval(
    model: CoCa,
    *,
    dataset: PairDataset,
    tokenizer: Tokenizer,
    device: torch.device,
    num_workers: int = 0,
    batch_size: int = 64,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> RetrievalResult:
    """Encodes every image once and all of its captions, then ranks all against all."""
    images, texts, owners, unreadable, done = [], [], [], [], 0
    stream = in_order(dataset, num_samples=len(dataset), batch_size=batch_size, workers=num_workers, collate=_as_list)
    for pairs, failed in stream:
        unreadable += failed
        if on_batch is not None:
            on_batch(len(failed) + len(pairs or ()))
        if pairs is None:
            continue
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
            image, text = _embed(model, pairs, tokenizer=tokenizer, device=device)
        images.append(image)
        texts.append(text)
        owners += [done + row for row, pair in enumerate(pairs) for _ in pair.captions]
        done += len(pairs)
    if not images:
        raise ValueError(f"None of the {len(dataset)} images could be read; the first is {unreadable[0]}.")
    owner_ids = torch.tensor(owners, device=device)
    metrics = recall_at(torch.cat(images), text=torch.cat(texts), owners=owner_ids)
    return RetrievalResult(metrics=metrics, num_images=done, num_captions=len(owners), unreadable=tuple(unreadable))


def _embed(
    model: CoCa, pairs: list[Pair], *, tokenizer: Tokenizer, device: torch.device
) -> tuple[Float[Tensor, "images dim"], Float[Tensor, "captions dim"]]:
    """Embeddings of the images, and of all their captions, image by image."""
    pixels = torch.stack([pair.image for pair in pairs]).to(device)
    config = model.config.image
    tokens, mask = tokenizer.encode([caption for pair in pairs for caption in pair.captions])
    image = model.encode_image(normalize(pixels, mean=config.mean, std=config.std))[0]
    return image, model.encode_text(tokens.to(device), mask=mask.to(device))[0]


def _as_list(pairs: Sequence[Pair]) -> list[Pair]:
    return list(pairs)
