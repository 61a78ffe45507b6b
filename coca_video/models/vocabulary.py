"""The vocabulary projection together with its loss (CoCa section 3.2, Eq. 3): a batch's logits never exist as a whole.

The loss of a token needs its own row of logits only, and the gradient of that row is softmax minus one-hot. So each
chunk of tokens gets its logits, its share of the loss and its share of both gradients before the next one starts, all
in the forward; the backward multiplies by the gradient that comes in. The products are those of the plain way, 6 N d V.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

# Bytes of a chunk's logits in fp32. A chunk rewrites the whole gradient of the weight: the larger, the less often. On a
# CPU (736 tokens, 49,408 words, width 768, fp32, one thread) chunks of 42 rows take 1.09 times the time of all at
# once, 64 rows 1.05, 84 rows (16 MiB) 1.00, 128 rows 0.94, and each row costs 0.2 MB. A GPU multiplies some 20 times
# faster against its memory, so its chunks are larger: 1,358 rows here. That follows from the ratio; it is not measured.
CHUNK_BYTES_CPU = 16 * 2**20
CHUNK_BYTES = 256 * 2**20

# Elements of the weight's gradient whose bf16 product exists at a time, before it is added in fp32: for all of them
# the product and its conversion would take as much as 1.5 times the gradient (measured on a CPU, 49,408 words).
BLOCK_ELEMENTS = 2**22


class TokenLoss(NamedTuple):
    """Sums over the predicted tokens of a batch; a mean over several batches or ranks divides sums by counts."""

    loss_sum: Tensor
    """Cross entropy plus weighted z-loss, [], fp32 or float64: what is minimised."""
    cross_entropy_sum: Tensor
    """Cross entropy alone, [], without gradient: what is logged."""
    count: Tensor  # type: ignore[assignment]  # a field, although tuples have a method of this name
    """The number of tokens, [], int64."""


class VocabularyProjection(nn.Module):
    """A linear layer without bias from the decoder's width to the vocabulary, whose forward is the loss."""

    def __init__(self, width: int, *, vocab_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(
        self, hidden: Float[Tensor, "tokens dim"], *, targets: Int[Tensor, " tokens"], z_loss_weight: float = 0.0
    ) -> TokenLoss:
        """The loss of predicting `targets` from `hidden`, from which padding has been dropped; see `token_loss`."""
        loss: TokenLoss = token_loss(hidden, weight=self.weight, targets=targets, z_loss_weight=z_loss_weight)
        return loss

    def logits(self, hidden: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch vocabulary"]:
        """The scores of all words, for generation and evaluation."""
        return nn.functional.linear(hidden, self.weight)


# With tokens selected by a mask their number is known at run time only, and a compiler would unroll the loop for each.
@torch.compiler.disable  # type: ignore[untyped-decorator]
def token_loss(
    hidden: Float[Tensor, "tokens dim"],
    *,
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, " tokens"],
    z_loss_weight: float = 0.0,
    chunk_rows: int | None = None,
) -> TokenLoss:
    """Sum over tokens of -log softmax(hidden @ weight.T)[target] + z_loss_weight * logsumexp(hidden @ weight.T)^2.

    The second term is the z-loss, which keeps logits from drifting (PaLM, arXiv 2204.02311, section 5). Under autocast
    the matrix products have autocast's precision, as nn.Linear's would; softmax, sums and the weight's gradient are
    fp32, or float64 where the inputs are. Gradients have the inputs' dtypes. No tokens: a loss of 0, zero gradients.
    `chunk_rows` is the number of tokens at a time: None chooses it by memory; the result is the same to rounding.
    """
    product_dtype = _product_dtype(hidden, weight=weight)
    if chunk_rows is None:
        chunk_bytes = CHUNK_BYTES_CPU if hidden.device.type == "cpu" else CHUNK_BYTES
        chunk_rows = max(1, chunk_bytes // (4 * len(weight)))
    if chunk_rows < 1:
        raise ValueError(f"A chunk of the token loss needs at least 1 row; got chunk_rows={chunk_rows}.")
    loss, cross_entropy = _ChunkedLoss.apply(
        hidden, weight, targets, z_loss_weight, product_dtype, chunk_rows, torch.is_grad_enabled()
    )
    count = torch.full((), len(targets), dtype=torch.int64, device=hidden.device)
    return TokenLoss(loss_sum=loss, cross_entropy_sum=cross_entropy, count=count)


def _product_dtype(hidden: Float[Tensor, "tokens dim"], *, weight: Float[Tensor, "vocabulary dim"]) -> torch.dtype:
    """The dtype in which nn.Linear would multiply here: autocast's, which leaves float64 alone, or that of both."""
    device_type = hidden.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(device_type)
    if hidden.dtype != weight.dtype:
        raise ValueError(
            f"Expected hidden states in the vocabulary's dtype {weight.dtype}, got {hidden.dtype}: convert one of them "
            "or use autocast."
        )
    return hidden.dtype


class _ChunkedLoss(torch.autograd.Function):
    """(loss, cross entropy) of `token_loss`; the forward leaves both gradients, the backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_loss_weight: float,
        product_dtype: torch.dtype,
        chunk_rows: int,
        grad_enabled: bool,  # noqa: FBT001  Function.apply takes no keywords
    ) -> tuple[Tensor, Tensor]:
        needs_grad = tuple(grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        ctx.options = {"z_loss_weight": z_loss_weight, "product_dtype": product_dtype, "chunk_rows": chunk_rows}
        loss, cross_entropy, *ctx.grads = _loss_and_grads(
            hidden, weight=weight, targets=targets, needs_grad=needs_grad, **ctx.options
        )
        if any(needs_grad):
            ctx.save_for_backward(hidden, weight, targets)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scales the gradients in place, since a second copy of the weight's is as large as the weight (152 MB).

        So they serve once; where the graph is kept and gone through again, they are computed anew.
        """
        if torch.is_grad_enabled():  # create_graph: the gradients here are numbers, and a second one would lack a term
            raise ValueError("Expected a first derivative of the token loss, got create_graph=True: use whole logits.")
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            hidden, weight, targets = ctx.saved_tensors
            _, _, *grads = _loss_and_grads(
                hidden, weight=weight, targets=targets, needs_grad=ctx.needs_input_grad[:2], **ctx.options
            )
        grad_hidden, grad_weight = (None if grad is None else grad.mul_(grad_loss) for grad in grads)
        return grad_hidden, grad_weight, None, None, None, None, None


def _loss_and_grads(
    hidden: Float[Tensor, "tokens dim"],
    *,
    weight: Float[Tensor, "vocabulary dim"],
    targets: Int[Tensor, " tokens"],
    z_loss_weight: float,
    product_dtype: torch.dtype,
    chunk_rows: int,
    needs_grad: tuple[bool, ...],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Loss sum, cross entropy sum, and the gradients of `hidden` and `weight` that are needed, chunk by chunk."""
    # The dtypes below are chosen: an autocast around this must not change them, nor one around the backward.
    with torch.autocast(device_type=hidden.device.type, enabled=False):
        sum_dtype = torch.promote_types(product_dtype, torch.float32)
        loss = torch.zeros((), dtype=sum_dtype, device=hidden.device)
        cross_entropy = torch.zeros_like(loss)
        grad_hidden = torch.empty_like(hidden) if needs_grad[0] else None
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if needs_grad[1] else None
        product_weight = weight.to(product_dtype)
        # Logits, probabilities and their gradient take turns in one buffer: three would be half of all extra memory.
        buffer = loss.new_empty(min(chunk_rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), chunk_rows):
            rows = slice(start, start + chunk_rows)
            chunk, target = hidden[rows].to(product_dtype), targets[rows].long().unsqueeze(1)
            logits = _multiply_into(buffer[: len(chunk)], chunk, product_weight.T)
            chunk_loss, logsumexp, denominator = _cross_entropy_in_place(logits, target=target)
            cross_entropy += chunk_loss.sum()
            loss += chunk_loss.sum() + z_loss_weight * logsumexp.square().sum()
            if not any(needs_grad):
                continue
            # The gradient by the logits: softmax, the more of it with the z-loss, less the one-hot target.
            grad_logits = logits.mul_((1 + 2 * z_loss_weight * logsumexp) / denominator)
            grad_logits.scatter_add_(1, target, torch.full_like(denominator, -1.0))
            product_grad = grad_logits.to(product_dtype)
            if grad_hidden is not None:
                grad_hidden[rows] = product_grad @ product_weight
            if grad_weight is not None:
                _add_product(grad_weight, product_grad.T, chunk)
        return loss, cross_entropy, grad_hidden, None if grad_weight is None else grad_weight.to(weight.dtype)


def _cross_entropy_in_place(
    logits: Float[Tensor, "rows vocabulary"], *, target: Int[Tensor, "rows 1"]
) -> tuple[Float[Tensor, "rows 1"], Float[Tensor, "rows 1"], Float[Tensor, "rows 1"]]:
    """Each row's cross entropy, logsumexp, and softmax's denominator; `logits` become softmax's numerators."""
    largest = logits.amax(dim=1, keepdim=True)
    target_logit = logits.gather(1, target)
    denominator = logits.sub_(largest).exp_().sum(dim=1, keepdim=True)
    log_denominator = denominator.log()
    return log_denominator - (target_logit - largest), log_denominator + largest, denominator


def _multiply_into(
    out: Float[Tensor, "rows columns"], left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> Float[Tensor, "rows columns"]:
    """The product of both, in `out`, which may be of higher precision than the factors."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return out.copy_(left @ right)


def _add_product(
    total: Float[Tensor, "rows columns"], left: Float[Tensor, "rows inner"], right: Float[Tensor, "inner columns"]
) -> None:
    """Adds in place: total += left @ right, where `total` may be of higher precision than the factors."""
    if total.dtype == left.dtype:
        torch.addmm(total, left, right, out=total)
    else:
        num_rows = max(1, BLOCK_ELEMENTS // total.shape[1])
        for block, factor in zip(torch.split(total, num_rows), torch.split(left, num_rows), strict=True):
            block += factor @ right
