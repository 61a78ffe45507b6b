"""Predictions of frames against a computation by hand in float64; maps of attention; order; one clip in any batch."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from coca_video.data.manifest import read_manifest
from coca_video.data.video import load_clip
from coca_video.eval.predict import Prediction, Predictor, load_predictor, predictor_of
from coca_video.hub import Saved, save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.head import HeadConfig
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.models.pooler import AttentionalPooler
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

CPU = torch.device("cpu")
CLASSES = ("wave", "push", "kick", "fall")
OPTIONS: dict[str, Any] = {"num_frames": None, "decoder": "auto", "timeout_seconds": 60.0, "device": CPU}
HEADS: dict[str, dict[str, Any]] = {
    "paper": {},
    "queries": {"num_queries": 2, "time_embedding": "sincos"},
    "layers": {"encoder_layers": (0, 2)},
    "blocks": {"num_blocks": 2},
    "mean": {"pooling": "mean"},
}


def make_saved(**head: Any) -> Saved:
    """A classifier whose scores and attention are far from equal."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(
        image=VitConfig.tiny(), num_classes=len(CLASSES), num_frames=3, head=HeadConfig(**head)
    )
    model = VideoClassifier(config).eval()
    with torch.no_grad():
        for name, parameter in model.head.named_parameters():
            parameter.add_(torch.randn_like(parameter) * (0.5 if "k_proj" in name or "query" in name else 0.1))
    return Saved(model=model, classes=CLASSES)


def make_predictor(**head: Any) -> Predictor:
    return predictor_of(make_saved(**head), **OPTIONS)


def make_frames(batch: int = 2, num_frames: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(batch + num_frames)
    return torch.randint(0, 256, (batch, num_frames, 3, 48, 48), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("name", HEADS)
def test_probabilities_equal_those_by_hand(name: str) -> None:
    """Pixels to [0, 1], normalised, through encoder, pooler and linear layer one after the other, all in float64."""
    predictor, frames = make_predictor(**HEADS[name]), make_frames()
    model = copy.deepcopy(predictor.model).double()
    image, head = model.config.image, model.head
    with torch.no_grad():
        for clip, prediction in zip(frames, predictor.predict_frames(frames), strict=True):
            mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (image.mean, image.std))
            tokens = model.encoder((clip / 255.0).double().sub(mean).div(std), layers=head.config.encoder_layers)
            if head.time_embedding is not None:
                tokens = tokens + head.time_embedding(tokens[None], mask=None)[0].unsqueeze(1)
            pooled = head.pooler(tokens.flatten(0, 1)[None]).flatten()
            scores = (head.classifier.weight @ pooled + head.classifier.bias).exp()
            expected = scores / scores.sum()
            assert float(expected.max() - expected.min()) > 0.05
            assert prediction.probabilities.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("num_frames", [1, 3, 5])
def test_attention_is_a_share_of_each_place_of_each_frame(name: str, num_frames: int) -> None:
    """48 px in patches of 8: a grid of 6 x 6."""
    predictor, frames = make_predictor(**HEADS[name]), make_frames(num_frames=num_frames)
    for prediction in predictor.predict_frames(frames, attention=True):
        if name == "mean":
            assert prediction.attention is None
            continue
        assert prediction.attention is not None and prediction.attention.shape == (num_frames, 6, 6)
        assert float(prediction.attention.min()) > 0
        assert float(prediction.attention.sum()) == pytest.approx(1.0, abs=1e-5)
    assert predictor.predict_frames(frames)[0].attention is None


def test_the_map_lies_as_the_picture_does() -> None:
    """Where the one bright patch goes, there the largest share goes: row by row, frame by frame."""
    predictor = make_predictor()
    model = predictor.model
    with torch.no_grad():
        tokens = model.encode(torch.zeros(1, 1, 3, 48, 48))
        lit = torch.zeros(1, 1, 3, 48, 48)
        lit[..., :8, :8] = 3.0
        difference = (model.encode(lit) - tokens)[0, 0, 0]
        pooler = model.head.pooler
        assert isinstance(pooler, AttentionalPooler)
        for parameter in (pooler.attention.q_proj.weight, pooler.attention.q_proj.bias):
            parameter.zero_()  # the query is then the bias alone, set to the key of a bright patch
        pooler.attention.q_proj.bias.copy_(20 * pooler.attention.k_proj(difference / difference.std()))
    for frame, row, column in [(0, 0, 0), (1, 2, 5), (2, 4, 1)]:
        frames = torch.full((1, 3, 3, 48, 48), 127, dtype=torch.uint8)
        frames[0, frame, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = 255
        (prediction,) = predictor.predict_frames(frames, attention=True)
        assert prediction.attention is not None
        assert prediction.attention.flatten().argmax() == frame * 36 + row * 6 + column


def test_shares_of_encoder_layers_are_added_up() -> None:
    predictor, frames = make_predictor(encoder_layers=(0, 2)), make_frames()
    model = predictor.model
    with torch.no_grad():
        image = model.config.image
        mean, std = (torch.tensor(values)[:, None, None] for values in (image.mean, image.std))
        shares = model.head.attention(model.encode((frames / 255.0 - mean) / std))
    assert shares is not None and shares.shape == (2, 3, 72)
    for clip, prediction in zip(shares, predictor.predict_frames(frames, attention=True), strict=True):
        assert prediction.attention is not None
        for frame in range(3):
            for place in range(36):
                expected = float(clip[frame, place] + clip[frame, 36 + place])
                found = prediction.attention[frame, place // 6, place % 6]
                assert float(found) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", HEADS)
def test_a_clip_gets_the_same_alone_and_in_a_batch(name: str) -> None:
    predictor, frames = make_predictor(**HEADS[name]), make_frames(batch=3)
    together = predictor.predict_frames(frames, attention=True)
    assert len(together) == 3
    for index, prediction in enumerate(together):
        (alone,) = predictor.predict_frames(frames[index : index + 1], attention=True)
        assert prediction.probabilities.tolist() == pytest.approx(alone.probabilities.tolist(), abs=1e-6)
        if alone.attention is None:
            assert prediction.attention is None
        else:
            torch.testing.assert_close(prediction.attention, alone.attention, rtol=0, atol=1e-6)


def test_seconds_are_of_the_batch_and_after_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that gives 10, 12 and 17."""
    ticks = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("coca_video.eval.predict.time.perf_counter", lambda: next(ticks))
    predictions = make_predictor().predict_frames(make_frames(), attention=True)
    assert [(p.encode_seconds, p.pool_seconds) for p in predictions] == [(2.0, 5.0)] * 2


def test_an_encoder_without_a_square_grid_has_no_map(monkeypatch: pytest.MonkeyPatch) -> None:
    predictor, frames = make_predictor(), make_frames()
    whole = predictor.model.encode
    monkeypatch.setattr(predictor.model, "encode", lambda images: whole(images)[:, :, :35])
    predictions = predictor.predict_frames(frames, attention=True)
    assert [prediction.attention for prediction in predictions] == [None, None]
    assert float(predictions[0].probabilities.sum()) == pytest.approx(1.0)


def test_class_and_register_tokens_are_no_places() -> None:
    """160 px in patches of 16, beside a class token: 10 x 10."""
    config = VideoClassifierConfig(image=TimmConfig(name="test_vit", image_size=160), num_classes=4, num_frames=2)
    predictor = predictor_of(Saved(model=VideoClassifier(config).eval(), classes=CLASSES), **OPTIONS)
    frames = torch.zeros(1, 2, 3, 160, 160, dtype=torch.uint8)
    (prediction,) = predictor.predict_frames(frames, attention=True)
    assert prediction.attention is not None and prediction.attention.shape == (2, 10, 10)


def test_ranked_is_sorted_and_equal_ones_keep_the_order_of_the_classes() -> None:
    predictor = make_predictor()
    prediction = Prediction(
        probabilities=torch.tensor([0.2, 0.3, 0.2, 0.3], dtype=torch.float64),
        attention=None,
        encode_seconds=0.0,
        pool_seconds=0.0,
    )
    assert predictor.ranked(prediction) == [("push", 0.3), ("fall", 0.3), ("wave", 0.2), ("kick", 0.2)]


def test_a_file_gets_what_its_frames_get(drawn_clips: Path, tmp_path: Path) -> None:
    """By path, by name, and by its bytes; more frames change the scores."""
    saved = make_saved()
    saved.save(tmp_path)
    path = read_manifest(drawn_clips).rows[0].path
    predictor = load_predictor(str(tmp_path), **OPTIONS)
    assert (predictor.clip.num_frames, predictor.clip.image_size, predictor.classes) == (3, 48, CLASSES)
    (prediction,) = predictor.predict_frames(load_clip(path, config=predictor.clip).frames.unsqueeze(0))
    expected = predictor.ranked(prediction)
    assert [probability for _, probability in expected] == sorted(prediction.probabilities.tolist(), reverse=True)
    for source in (path, str(path), path.read_bytes()):
        assert predictor(source) == expected
    assert predictor_of(saved, **OPTIONS)(path) == expected
    assert load_predictor(str(tmp_path), **{**OPTIONS, "num_frames": 8})(path) != expected


def test_a_model_of_another_kind_is_a_sentence(tmp_path: Path) -> None:
    save(tmp_path, model=CoCa(CoCaConfig.tiny()))
    with pytest.raises(ValueError, match="holds a CoCa, which names no actions; expected a probe's run"):
        load_predictor(str(tmp_path), **OPTIONS)
