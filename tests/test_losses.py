"""The losses against double loops in plain Python."""

import math

import pytest
import torch
import torch.nn.functional as F

from coca_video.losses import captioning_loss, classification_loss, contrastive_loss


def negative_log_softmax(scores: list[float], *, right: int) -> float:
    return math.log(sum(math.exp(score) for score in scores)) - scores[right]


def test_contrastive_is_the_sum_of_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(5, 8, dtype=torch.float64, generator=generator), dim=1) for _ in range(2))
    scale = torch.tensor(14.0, dtype=torch.float64)
    similarity = [[14.0 * sum(a * b for a, b in zip(i, t, strict=True)) for t in text.tolist()] for i in image.tolist()]
    image_to_text = sum(negative_log_softmax(similarity[i], right=i) for i in range(5)) / 5
    text_to_image = sum(negative_log_softmax([row[t] for row in similarity], right=t) for t in range(5)) / 5
    loss = contrastive_loss(image, text=text, scale=scale)
    assert float(loss) == pytest.approx(image_to_text + text_to_image, rel=1e-12)


def test_captioning_is_a_sum_over_predicted_real_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 6, 9, generator=generator)
    tokens = torch.randint(0, 9, (3, 6), generator=generator)
    lengths = [6, 2, 4]
    mask = torch.arange(6).expand(3, -1) < torch.tensor(lengths)[:, None]
    expected = sum(
        negative_log_softmax(logits[row, t].tolist(), right=int(tokens[row, t + 1]))
        for row, length in enumerate(lengths)
        for t in range(length - 1)
    )
    total, count = captioning_loss(logits, tokens=tokens, mask=mask)
    assert int(count) == 5 + 1 + 3
    assert float(total) == pytest.approx(expected, rel=1e-6)


def test_a_token_with_the_id_of_padding_counts() -> None:
    """open_clip's CoCa ignores id 0, which its vocabulary uses for '!': here only the mask decides."""
    logits, tokens = torch.zeros(1, 3, 4), torch.tensor([[1, 0, 0]])
    total, count = captioning_loss(logits, tokens=tokens, mask=torch.ones(1, 3, dtype=torch.bool))
    assert int(count) == 2 and float(total) == pytest.approx(2 * math.log(4))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_classification_with_smoothing(label_smoothing: float) -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 0.0, 3.0]])
    labels = torch.tensor([1, 2])
    expected = 0.0
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        losses = [negative_log_softmax(row, right=c) for c in range(3)]
        expected += ((1 - label_smoothing) * losses[label] + label_smoothing * sum(losses) / 3) / 2
    loss = classification_loss(logits, labels=labels, label_smoothing=label_smoothing)
    assert float(loss) == pytest.approx(expected, rel=1e-6)
