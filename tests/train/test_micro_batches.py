"""Parts of a batch, one after the other: their gradients add up to those of the whole batch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.classify import parts_of, probe_step
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import ProbeBatch

NUM_CLIPS, NUM_CLASSES, SMOOTHING, BOUND = 5, 3, 0.1, 0.05


def config_of(micro_batch_size: int | None) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=Path()),
        out=Path(),
        micro_batch_size=micro_batch_size,
        label_smoothing=SMOOTHING,
        optim=OptimConfig(gradient_clip=BOUND),
        loop=LoopConfig(batch_size=NUM_CLIPS + 1),
    )


def make_model() -> VideoClassifier:
    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=NUM_CLASSES, num_frames=2)
    return VideoClassifier(config).double()


def make_batch(*, soft: bool) -> ProbeBatch:
    generator = torch.Generator().manual_seed(1)
    frames = torch.randint(0, 256, (NUM_CLIPS, 2, 3, 48, 48), dtype=torch.uint8, generator=generator)
    shares = torch.rand(NUM_CLIPS, NUM_CLASSES, dtype=torch.float64, generator=generator)
    labels = shares / shares.sum(dim=1, keepdim=True) if soft else torch.tensor([2, 0, 1, 1, 0])
    return ProbeBatch(inputs=frames, labels=labels)


@pytest.mark.parametrize("soft", [False, True], ids=["numbers", "shares"])
@pytest.mark.parametrize("size", [None, 1, 2, 3, 4])
def test_gradients_and_log_values_are_those_of_the_whole_batch(size: int | None, soft: bool) -> None:
    """To 1e-12 in float64, against one backward through torch's own loss."""
    model, batch = make_model(), make_batch(soft=soft)
    seen: list[int] = []

    def scores(part: ProbeBatch) -> torch.Tensor:
        seen.append(len(part))
        return model(part.inputs.double() / 255)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    sums = probe_step(model, batch, optimizer, scores=scores, config=config_of(size))
    assert seen == {None: [5], 1: [1] * 5, 2: [1, 2, 2], 3: [2, 3], 4: [2, 3]}[size]
    expected = make_model()
    logits = expected(batch.inputs.double() / 255)
    loss = F.cross_entropy(logits, batch.labels, label_smoothing=SMOOTHING)
    loss.backward()
    gradients = [parameter.grad for parameter in expected.parameters() if parameter.grad is not None]
    norm = float(np.sqrt(sum(float(gradient.square().sum()) for gradient in gradients)))
    assert norm > 2 * BOUND  # so that the bound is seen to act once, on the sum
    for ours, theirs in zip(model.parameters(), gradients, strict=True):
        assert ours.grad is not None
        torch.testing.assert_close(ours.grad, theirs * (BOUND / (norm + 1e-6)), rtol=0, atol=1e-12)
    values = {name: float(value.total) / float(value.count) for name, value in sums.items()}
    numbers = batch.labels.argmax(dim=1) if soft else batch.labels
    top1 = float((logits.argmax(dim=1) == numbers).double().mean())
    assert values == pytest.approx({"loss": float(loss.detach()), "top1": top1, "gradient_norm": norm}, rel=1e-9)


@pytest.mark.parametrize(
    ("most", "size", "expected"),
    [
        (4, None, [([0, 1, 2], 1)]),
        (4, 2, [([0], 1), ([1, 2], 1)]),  # two parts, as on the rank with four
        (4, 1, [([0], 0), ([0], 1), ([1], 1), ([2], 1)]),  # as many forwards as there; the first counts for nothing
        (3, 1, [([0], 1), ([1], 1), ([2], 1)]),
    ],
)
def test_ranks_go_through_as_many_parts(most: int, size: int | None, expected: list[tuple[list[int], int]]) -> None:
    batch = ProbeBatch(inputs=torch.zeros(3, 1, 3, 2, 2, dtype=torch.uint8), labels=torch.arange(3))
    assert [(part.labels.tolist(), weight) for part, weight in parts_of(batch, most=most, size=size)] == expected


def test_a_part_without_weight_moves_nothing() -> None:
    model, batch = make_model(), make_batch(soft=False)

    def step(parts: Callable[..., list[tuple[ProbeBatch, int]]]) -> list[torch.Tensor]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("coca_video.train.classify.parts_of", parts)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            sums = probe_step(
                model, batch, optimizer, scores=lambda part: model(part.inputs.double() / 255), config=config_of(None)
            )
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        return [*gradients, torch.as_tensor(sums["loss"].total), torch.as_tensor(sums["top1"].total)]

    plain = step(lambda batch, **_: [(batch, 1)])
    padded = step(lambda batch, **_: [(batch.part(0, 1), 0), (batch, 1)])
    for one, other in zip(plain, padded, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)
