"""The video classifier: any number of frames in any order, one query over all tokens, a frozen encoder."""

import pytest
import torch

from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig


@pytest.fixture(scope="module")
def model() -> VideoClassifier:
    torch.manual_seed(0)
    model = VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=7, num_frames=4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.double().eval()


def clips(*, num_frames: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.randn(2, num_frames, 3, 48, 48, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("num_frames", [1, 3, 8])
def test_equals_frame_by_frame_encoding_and_the_ordinary_pooler(model: VideoClassifier, num_frames: int) -> None:
    frames = clips(num_frames=num_frames)
    tokens = torch.cat([model.encoder(frames[:, t]) for t in range(num_frames)], dim=1)
    pooled = model.head.pooler.norm_out(model.head.pooler.attend(tokens)).squeeze(1)
    expected = pooled @ model.head.classifier.weight.T + model.head.classifier.bias
    torch.testing.assert_close(model(frames), expected, rtol=1e-9, atol=1e-10)


def test_order_of_frames_does_not_matter(model: VideoClassifier) -> None:
    frames = clips(num_frames=5)
    torch.testing.assert_close(model(frames), model(frames[:, [3, 0, 4, 1, 2]]), rtol=1e-9, atol=1e-10)


def test_repeating_every_frame_changes_nothing(model: VideoClassifier) -> None:
    """A set counted twice pools to the same: what lets a probe trained with T frames take any T."""
    frames = clips(num_frames=3)
    torch.testing.assert_close(model(frames), model(frames.repeat(1, 4, 1, 1, 1)), rtol=1e-9, atol=1e-10)


def test_masked_frames_count_for_nothing(model: VideoClassifier) -> None:
    tokens = model.encode(clips(num_frames=4))
    mask = torch.ones(tokens.shape[:2], dtype=torch.bool)
    mask[0, 2:] = False
    short = model.classify(tokens[:1, :2])
    torch.testing.assert_close(model.classify(tokens, mask=mask)[:1], short, rtol=1e-9, atol=1e-10)


def test_a_frozen_encoder_stays_in_evaluation_mode() -> None:
    model = VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=2, num_frames=1))
    assert model.train().encoder.training
    model.encoder.requires_grad_(requires_grad=False)
    assert not model.train().encoder.training and model.head.pooler.training
