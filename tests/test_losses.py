"""The losses against double loops in plain Python, in chunks against whole, and over two ranks against one process."""

import math
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from coca_video import losses
from coca_video.distributed import rank, world_size
from coca_video.losses import classification_loss, contrastive_loss, global_mean
from tests.ranks import on_ranks

SCALE = 14.0


def negative_log_softmax(scores: list[float], *, right: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[right]


def embeddings(num_pairs: int, *, dim: int = 8, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Image, text and scale, all leaves that want a gradient."""
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(num_pairs, dim, dtype=torch.float64, generator=generator), dim=1).to(dtype)
        for _ in range(2)
    )
    return image.requires_grad_(), text.requires_grad_(), torch.tensor(SCALE, dtype=dtype, requires_grad=True)


def contrastive_by_loops(image: Tensor, text: Tensor) -> float:
    """Eq. 2, the sum of both directions, at SCALE."""
    similarity = [
        [SCALE * sum(a * b for a, b in zip(i, t, strict=True)) for t in text.tolist()] for i in image.tolist()
    ]
    pairs = range(len(similarity))
    image_to_text = sum(negative_log_softmax(similarity[i], right=i) for i in pairs) / len(pairs)
    text_to_image = sum(negative_log_softmax([row[t] for row in similarity], right=t) for t in pairs) / len(pairs)
    return image_to_text + text_to_image


@pytest.mark.parametrize("chunk_rows", [None, 2])
@pytest.mark.parametrize(("reduction", "factor"), [("sum", 1.0), ("mean", 0.5)])
def test_contrastive_is_both_directions(
    reduction: Literal["sum", "mean"], factor: float, chunk_rows: int | None
) -> None:
    image, text, scale = embeddings(5)
    loss = contrastive_loss(image, text=text, scale=scale, reduction=reduction, chunk_rows=chunk_rows)
    assert loss.item() == pytest.approx(factor * contrastive_by_loops(image, text), rel=1e-12)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, 100])
def test_chunked_equals_whole_in_value_and_gradients(chunk_rows: int) -> None:
    leaves = embeddings(7)
    image, text, scale = leaves
    # The factor shows whether the gradient from above is heeded.
    whole = 3.0 * contrastive_loss(image, text=text, scale=scale)
    chunked = 3.0 * contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-12)
    for ours, reference in zip(torch.autograd.grad(chunked, leaves), torch.autograd.grad(whole, leaves), strict=True):
        assert reference.abs().max() > 1e-3
        torch.testing.assert_close(ours, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_gradients_equal_finite_differences(chunk_rows: int | None) -> None:
    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        return contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows)

    assert torch.autograd.gradcheck(loss, embeddings(3, dim=4))


class LargestTensor(TorchDispatchMode):
    """Remembers how many elements the largest tensor had that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_a_large_batch_never_has_all_its_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    image, text, scale = embeddings(40, dim=2)
    monkeypatch.setattr(losses, "MAX_LOGITS", 40 * 40)
    with LargestTensor() as largest:
        whole = contrastive_loss(image, text=text, scale=scale)
        whole.backward()
    assert largest.numel == 40 * 40
    monkeypatch.setattr(losses, "MAX_LOGITS", 6 * 40)
    with LargestTensor() as largest:
        chunked = contrastive_loss(image, text=text, scale=scale)
        chunked.backward()
    assert largest.numel == 6 * 40
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-12)


def test_a_chunk_has_rows() -> None:
    image, text, scale = embeddings(2)
    with pytest.raises(ValueError, match="at least 1 row; got chunk_rows=0"):
        contrastive_loss(image, text=text, scale=scale, chunk_rows=0)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_autocast_does_not_round_the_similarities(chunk_rows: int | None) -> None:
    image, text, scale = embeddings(5, dtype=torch.float32)
    plain = contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows)
        rounded = (image @ text.T).float()
    assert torch.equal(under_autocast, plain)
    assert not torch.allclose(rounded, image @ text.T, atol=1e-4)  # autocast was on


def test_bf16_embeddings_are_compared_in_fp32() -> None:
    image, text, scale = embeddings(5, dtype=torch.bfloat16)
    loss = contrastive_loss(image, text=text, scale=scale)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(contrastive_by_loops(image.double(), text.double()), rel=1e-6)


@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_no_pairs_are_no_loss(chunk_rows: int | None) -> None:
    image, text, scale = embeddings(0)
    loss = contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows)
    loss.backward()
    assert loss.item() == 0.0 and scale.grad == 0.0 and image.grad is not None and image.grad.shape == (0, 8)


def test_a_mean_in_one_process() -> None:
    total = torch.tensor(6.0, dtype=torch.float64, requires_grad=True)
    mean = global_mean(total, count=torch.tensor(7))
    mean.backward()
    assert mean.item() == pytest.approx(6 / 7, rel=1e-15)
    assert float(total.grad) == pytest.approx(1 / 7, rel=1e-15)  # type: ignore[arg-type]
    assert float(global_mean(torch.tensor(0.0), count=torch.tensor(0))) == 0.0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_classification_with_smoothing(label_smoothing: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    labels = torch.tensor([1, 2])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        scores = [negative_log_softmax(row, right=c) for c in range(3)]
        expected += ((1 - label_smoothing) * scores[label] + label_smoothing * sum(scores) / 3) / 2
    loss = classification_loss(logits, labels=labels, label_smoothing=label_smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_classification_of_soft_labels(label_smoothing: float) -> None:
    """Cross entropy against smoothed shares, in float64; and a share of 1 is the class itself."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 4, dtype=torch.float64, generator=generator)
    shares = torch.rand(5, 4, dtype=torch.float64, generator=generator).softmax(dim=1)
    expected = 0.0
    for row, own in zip(logits.tolist(), shares.tolist(), strict=True):
        smoothed = [(1 - label_smoothing) * share + label_smoothing / 4 for share in own]
        expected += sum(share * negative_log_softmax(row, right=c) for c, share in enumerate(smoothed)) / 5
    loss = classification_loss(logits, labels=shares, label_smoothing=label_smoothing)
    assert loss.dtype == torch.float64 and loss.item() == pytest.approx(expected, rel=1e-14)
    numbers = torch.tensor([3, 0, 1, 1, 2])
    of_numbers = classification_loss(logits, labels=numbers, label_smoothing=label_smoothing)
    of_shares = classification_loss(logits, labels=F.one_hot(numbers, 4).float(), label_smoothing=label_smoothing)
    assert of_shares.item() == pytest.approx(of_numbers.item(), rel=1e-14)
    halves = classification_loss(logits.to(torch.bfloat16), labels=shares)
    assert halves.dtype == torch.float32  # bf16 would round the loss to 2 or 3 decimals


# Rows of two ranks: equal, unequal, and none at all on one of them.
SPLITS = ((3, 3), (3, 2), (5, 0), (0, 5))
CHUNKS = (None, 2)
CAPTION_LENGTHS = (9, 4, 1, 6, 2, 7)  # of each row; a length of 1 has nothing to predict


def losses_of_rows(rows: slice, *, chunk_rows: int | None) -> dict[str, tuple[Tensor, list[Tensor]]]:
    """Each loss of those rows of a made-up batch, with its gradients by the weights of a small linear model."""
    generator = torch.Generator().manual_seed(3)
    features, labels = torch.randn(6, 5, dtype=torch.float64, generator=generator), torch.tensor([0, 3, 1, 1, 2, 0])
    shares = torch.rand(6, 4, dtype=torch.float64, generator=generator).softmax(dim=1)
    weights = [torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)]
    scale = torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    image, text = (F.normalize(features[rows] @ weight, dim=1) for weight in weights)
    counts = torch.tensor(CAPTION_LENGTHS[rows], dtype=torch.int64) - 1
    caption_total = (counts * (features[rows] @ weights[0]).square().sum(dim=1)).sum()
    values = {
        "contrastive": contrastive_loss(image, text=text, scale=scale, chunk_rows=chunk_rows),
        "caption": global_mean(caption_total, count=counts.sum()),
        "classification": classification_loss(features[rows] @ weights[1], labels=labels[rows], label_smoothing=0.1),
        "soft classification": classification_loss(features[rows] @ weights[1], labels=shares[rows]),
    }
    leaves = [*weights, scale]
    return {
        name: (
            value.detach(),
            list(torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)),
        )
        for name, value in values.items()
    }


def losses_of_splits() -> list[dict[str, tuple[Tensor, list[Tensor]]]]:
    """`losses_of_rows` for this rank's part of each split, whole and in chunks; runs on ranks."""
    assert world_size() == 2
    parts = [slice(0, split[0]) if rank() == 0 else slice(split[0], sum(split)) for split in SPLITS]
    return [losses_of_rows(part, chunk_rows=chunk_rows) for part in parts for chunk_rows in CHUNKS]


@pytest.mark.slow
def test_the_mean_over_ranks_is_the_global_loss_and_gradient() -> None:
    ranks = on_ranks(losses_of_splits)
    cases = [(split, chunk_rows) for split in SPLITS for chunk_rows in CHUNKS]
    for (split, chunk_rows), *of_ranks in zip(cases, *ranks, strict=True):
        for name, (value, gradients) in losses_of_rows(slice(0, sum(split)), chunk_rows=None).items():
            case = f"{name} of {split} rows, chunks of {chunk_rows}"
            mean = sum(losses_of_rank[name][0] for losses_of_rank in of_ranks) / 2
            assert float(mean) == pytest.approx(float(value), rel=1e-12), case
            assert max(float(gradient.abs().max()) for gradient in gradients) > 1e-2, case
            for index, gradient in enumerate(gradients):
                mean_gradient = sum(losses_of_rank[name][1][index] for losses_of_rank in of_ranks) / 2
                torch.testing.assert_close(mean_gradient, gradient, rtol=0, atol=1e-12, msg=case)
