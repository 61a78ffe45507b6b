"""The losses over the global batch: contrastive (CoCa section 3.2), means over what all ranks hold, classification.

Each rank's loss is scaled so that the MEAN over ranks of the loss is the loss of the global batch, and the mean over
ranks of its gradient that loss' gradient, whatever the number of rows a rank holds. DDP and FSDP2 take that mean.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from coca_video.distributed import counts_of_ranks, gather_with_gradient, rank, sum_over_ranks, world_size

# Logits that exist at a time. In one piece 2**24 of them (4,096 pairs) take 256 MiB beside the embeddings, and the loss
# is a small share of a step; chunks of so many take 128 MiB however large the batch, in 0.9 times the plain loss' time
# on a CPU (4,096 pairs of width 512, chunks of 64 to 4,096 rows).
MAX_LOGITS = 2**24


def contrastive_loss(
    image: Float[Tensor, "batch dim"],
    *,
    text: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    reduction: Literal["sum", "mean"] = "sum",
    chunk_rows: int | None = None,
) -> Float[Tensor, ""]:
    """CoCa Eq. 2 over the global batch: cross entropy of each image over all texts and of each text over all images.

    Args:
        image: unit-length embeddings of this rank's images; the pairs of all ranks are the global batch.
        text: those of their texts, pairs in the same row.
        scale: 1 / temperature.
        reduction: "sum" adds both directions, each a mean over pairs, as in the paper; "mean" halves that (open_clip).
        chunk_rows: rows of logits at a time; gradients are then computed in the forward, so that memory is
            O(chunk_rows x global batch), and there is no second derivative. None takes all rows at once where that
            makes at most `MAX_LOGITS` logits, and chunks of so many above.

    Computed in fp32 (float64 for float64) under autocast too: at a scale of 100, bf16 rounds similarities to 0.4.
    A global batch without pairs has the loss 0.
    """
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"A chunk of the contrastive loss needs at least 1 row; got chunk_rows={chunk_rows}.")
    with torch.autocast(image.device.type, enabled=False):
        counts = counts_of_ranks(len(image))
        dtype = torch.promote_types(image.dtype, torch.float32)
        pairs = torch.cat([image, text], dim=1).to(dtype)  # one gather instead of two
        image, text = pairs.chunk(2, dim=1)
        all_images, all_texts = gather_with_gradient(pairs, counts=counts).chunk(2, dim=1)
        first, total = sum(counts[: rank()]), sum(counts)
        if chunk_rows is None and len(image) * total > MAX_LOGITS:
            chunk_rows = max(1, MAX_LOGITS // total)
        summed = torch.zeros((), dtype=dtype, device=image.device)
        for rows, columns in ((image, all_texts), (text, all_images)):
            if chunk_rows is None:
                summed = summed + _cross_entropy(rows, columns=columns, scale=scale.to(dtype), first=first)
            else:
                summed = summed + _ChunkedCrossEntropy.apply(rows, columns, scale.to(dtype), first, chunk_rows)
    directions = 1.0 if reduction == "sum" else 0.5
    return summed * (directions * world_size() / max(1, total))


def _cross_entropy(
    rows: Float[Tensor, "rows dim"], *, columns: Float[Tensor, "columns dim"], scale: Float[Tensor, ""], first: int
) -> Float[Tensor, ""]:
    """Sum over rows of the cross entropy over columns; row i belongs to column `first` + i."""
    targets = torch.arange(first, first + len(rows), device=rows.device)
    return F.cross_entropy((scale * rows) @ columns.T, targets, reduction="sum")


class _ChunkedCrossEntropy(torch.autograd.Function):
    """`_cross_entropy`, `chunk_rows` rows at a time: the gradients are taken while a chunk's logits are at hand."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, columns: Tensor, scale: Tensor, first: int, chunk_rows: int) -> Tensor:
        loss, scale_gradient = torch.zeros_like(scale), torch.zeros_like(scale)
        row_gradients, column_gradients = torch.empty_like(rows), torch.zeros_like(columns)
        for start in range(0, len(rows), chunk_rows):
            chunk = rows[start : start + chunk_rows]
            index = torch.arange(len(chunk), device=rows.device)
            targets = index + (first + start)
            logits = (scale * chunk) @ columns.T
            log_normalizer = logits.logsumexp(dim=1)
            loss += (log_normalizer - logits[index, targets]).sum()
            # The gradient by the logits: softmax less the one-hot target.
            residuals = logits.sub_(log_normalizer.unsqueeze(1)).exp_()
            residuals[index, targets] -= 1
            pull = residuals @ columns
            row_gradients[start : start + chunk_rows] = scale * pull
            scale_gradient += (chunk * pull).sum()
            column_gradients.addmm_(residuals.T, scale * chunk)
        ctx.save_for_backward(row_gradients, column_gradients, scale_gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        by_rows, by_columns, by_scale = ctx.saved_tensors
        return gradient * by_rows, gradient * by_columns, gradient * by_scale, None, None


def global_mean(total: Float[Tensor, ""], *, count: Int[Tensor, ""]) -> Float[Tensor, ""]:
    """The mean over all things of all ranks: `total` sums over the `count` things of this rank, which may be 0.

    Every thing weighs the same, wherever it is: a caption's token on a rank with few tokens too. As said above, it is
    the mean of the result over ranks that is the mean over things. A mean of nothing at all is 0.
    """
    return total * world_size() / sum_over_ranks(count).clamp(min=1)


def classification_loss(
    logits: Float[Tensor, "batch classes"],
    *,
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Softmax cross entropy, a mean over the global batch; see `classification_loss_sum`."""
    total = classification_loss_sum(logits, labels=labels, label_smoothing=label_smoothing)
    return global_mean(total, count=labels.new_full((), len(labels), dtype=torch.int64))


def classification_loss_sum(
    logits: Float[Tensor, "batch classes"],
    *,
    labels: Int[Tensor, "batch"] | Float[Tensor, "batch classes"],
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Softmax cross entropy, summed over the rows; `label_smoothing` is the share spread over all classes.

    `labels` are class numbers, or soft: the share of each class, as mixup and CutMix give them, 1 in all in each row.
    Computed in fp32 (float64 for float64).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = labels.to(logits.dtype) if labels.is_floating_point() else labels
    return F.cross_entropy(logits, labels, label_smoothing=label_smoothing, reduction="sum")
