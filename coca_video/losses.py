"""The losses: contrastive and captioning (CoCa section 3.2), and classification. Each is exact and plain."""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor


def contrastive_loss(
    image: Float[Tensor, "batch dim"], *, text: Float[Tensor, "batch dim"], scale: Float[Tensor, ""]
) -> Float[Tensor, ""]:
    """CoCa Eq. 2: the SUM of image-to-text and text-to-image cross entropy, each a mean over the batch.

    `image` and `text` are unit-length, pairs in the same row; `scale` is 1 / temperature. (open_clip halves this.)
    """
    similarities = scale * image @ text.T
    targets = torch.arange(len(image), device=image.device)
    return F.cross_entropy(similarities, targets) + F.cross_entropy(similarities.T, targets)


def captioning_loss(
    logits: Float[Tensor, "batch length vocabulary"],
    *,
    tokens: Int[Tensor, "batch length"],
    mask: Bool[Tensor, "batch length"],
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """CoCa Eq. 3, as (sum of -log p over predicted tokens, their number): logits at position t predict token t + 1.

    `mask` is True for real tokens; padding is dropped by the mask and never by an id. A mean over several batches
    divides the sums by the counts, so that every token weighs the same.
    """
    predicted = mask[:, 1:]
    losses = F.cross_entropy(logits[:, :-1][predicted].float(), tokens[:, 1:][predicted], reduction="sum")
    return losses, predicted.sum()


def classification_loss(
    logits: Float[Tensor, "batch classes"], *, labels: Int[Tensor, "batch"], label_smoothing: float = 0.0
) -> Float[Tensor, ""]:
    """Softmax cross entropy, a mean over the batch; `label_smoothing` is the share spread evenly over all classes."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
