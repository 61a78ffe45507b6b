"""Evaluating a manifest: the same for any batches and workers, files that say what was measured, predict's scores."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from coca_video.cli.__main__ import main
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.classification import ClassificationResult, evaluate_clips, softmax_scores, write_result
from coca_video.eval.features import encode_clips
from coca_video.eval.predict import load_predictor
from coca_video.hub import save
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def manifest(drawn_clips: Path) -> Manifest:
    return read_manifest(drawn_clips)


@pytest.fixture(scope="module")
def model(manifest: Manifest) -> VideoClassifier:
    """Random weights, far enough from zero that scores differ, and logits as small as a trained model's."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=len(manifest.classes), num_frames=3)
    model = VideoClassifier(config)
    with torch.no_grad():
        model.head.classifier.weight.normal_(std=0.2)
    return model.eval()


def dataset(manifest: Manifest) -> VideoDataset:
    return VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=48), seed=0)


def evaluate(
    model: VideoClassifier, manifest: Manifest, *, batch_size: int, num_workers: int = 0
) -> ClassificationResult:
    return evaluate_clips(
        model,
        dataset=dataset(manifest),
        classes=manifest.classes,
        device=CPU,
        batch_size=batch_size,
        num_workers=num_workers,
    )


def test_batches_and_workers_change_nothing(model: VideoClassifier, manifest: Manifest) -> None:
    one = evaluate(model, manifest, batch_size=1)
    assert len(one.video_ids) == 30 and list(one.video_ids) == sorted(one.video_ids)
    assert one.scores.sum(axis=1) == pytest.approx(1.0) and one.scores.std() > 0.05
    for other in (evaluate(model, manifest, batch_size=7), evaluate(model, manifest, batch_size=16, num_workers=2)):
        assert other.video_ids == one.video_ids and other.metrics == one.metrics
        np.testing.assert_allclose(other.scores, one.scores, atol=1e-6)


@torch.no_grad()
def test_clips_in_memory_are_in_order(model: VideoClassifier, manifest: Manifest) -> None:
    told: list[int] = []
    clips = dataset(manifest)
    encoded = encode_clips(model, dataset=clips, device=CPU, batch_size=7, on_batch=told.append)
    assert encoded.batch.video_ids == tuple(row.video_id for row in manifest.rows) and told == [7, 7, 7, 7, 2]
    result = evaluate(model, manifest, batch_size=16)
    for tokens, name in zip(encoded.batch.tokens, encoded.batch.video_ids, strict=True):
        (scores,) = softmax_scores(model, tokens.unsqueeze(0))
        np.testing.assert_allclose(scores, result.scores[result.video_ids.index(name)], atol=1e-6)


@torch.no_grad()
def test_scores_of_tokens_without_means_are_the_same(model: VideoClassifier, manifest: Manifest) -> None:
    """With their variances they need no statistics; with other variances the scores are others."""
    tokens = encode_clips(model, dataset=dataset(manifest), device=CPU).batch.tokens + 3.0
    free, variance = tokens - tokens.mean(-1, keepdim=True), tokens.var(-1, correction=0)
    expected = softmax_scores(model, tokens)
    np.testing.assert_allclose(softmax_scores(model, free, variance=variance), expected, atol=1e-5)
    assert np.abs(softmax_scores(model, free, variance=4 * variance) - expected).max() > 1e-3


def test_bf16_is_bf16(model: VideoClassifier, manifest: Manifest) -> None:
    tokens = encode_clips(model, dataset=dataset(manifest), device=CPU, bf16=True)
    exact = encode_clips(model, dataset=dataset(manifest), device=CPU)
    error = (tokens.batch.tokens.float() - exact.batch.tokens).norm() / exact.batch.tokens.norm()
    assert 1e-4 < float(error) < 0.02


def test_files_tell_every_video_and_class(model: VideoClassifier, manifest: Manifest, tmp_path: Path) -> None:
    result = evaluate(model, manifest, batch_size=8)
    path = write_result(tmp_path, name="test", result=result, facts={"num_frames": 3})
    document = json.loads(path.read_text())
    with (tmp_path / "test_videos.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert document["num_frames"] == 3 and document["num_videos"] == len(rows) == 30
    right = [row for row in rows if row["label"] == row["predicted"]]
    assert document["top1"] == len(right) / 30
    for name in manifest.classes:
        of_class = [row for row in rows if row["label"] == name]
        assert document["per_class"][name]["videos"] == len(of_class) == 6
        assert document["per_class"][name]["top1"] == sum(row["predicted"] == name for row in of_class) / 6
    labels = {row.video_id: row.label for row in manifest.rows}
    for row, scores in zip(rows, result.scores, strict=True):
        assert labels[row["video_id"]] == row["label"]
        assert max(manifest.classes, key=lambda name, row=row: float(row[name])) == row["predicted"]
        assert [float(row[name]) for name in manifest.classes] == pytest.approx(scores, rel=1e-8)


def test_results_of_other_facts_are_not_overwritten(model: VideoClassifier, manifest: Manifest, tmp_path: Path) -> None:
    result = evaluate(model, manifest, batch_size=8)
    written = [
        write_result(tmp_path, name="test", result=result, facts={"data": data}).name
        for data in ("a", "b", "a", "b", "c")
    ]
    assert written == ["test.json", "test-2.json", "test.json", "test-2.json", "test-3.json"]
    assert json.loads((tmp_path / "test-2.json").read_text())["data"] == "b"
    assert (tmp_path / "test-3_videos.csv").is_file()


def test_predict_and_evaluate_agree(model: VideoClassifier, manifest: Manifest, tmp_path: Path) -> None:
    save(tmp_path / "model", model=model, classes=manifest.classes)
    options = {"num_frames": None, "decoder": "auto", "timeout_seconds": 60.0, "device": CPU}
    predictor = load_predictor(str(tmp_path / "model"), **options)
    result = evaluate(model, manifest, batch_size=16)
    for row in manifest.rows[:5]:
        scores = result.scores[result.video_ids.index(row.video_id)]
        predicted = predictor(row.path)
        assert [name for name, _ in predicted] == [manifest.classes[i] for i in np.argsort(-scores)]
        assert [p for _, p in predicted] == pytest.approx(sorted(scores, reverse=True), abs=1e-6)


@pytest.mark.parametrize(
    "option", [["--num-frames", "9"], ["--split", "train"], ["--precision", "bf16"], ["--out", "elsewhere"]]
)
def test_every_option_of_evaluate_does_something(
    model: VideoClassifier, manifest: Manifest, tmp_path: Path, option: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "model", model=model, classes=manifest.classes)
    plain = ["evaluate", str(manifest.source), "--model", "model", "--device", "cpu"]

    def scores(arguments: list[str]) -> tuple[Path, str]:
        before = set(tmp_path.rglob("*_videos.csv"))
        assert main(arguments) == 0
        (path,) = set(tmp_path.rglob("*_videos.csv")) - before
        text = path.read_text()
        for written in path.parent.glob("*"):
            written.unlink()
        return path, text

    assert scores(plain) == scores([*plain, "--batch-size", "16", "--decoder", "pyav"])
    index = int(option[0] == "--out")  # that one changes the place, the others what is there
    assert scores([*plain, *option])[index - 1] != scores(plain)[index - 1]


def test_a_decoder_asked_for_is_the_one_that_reads(
    model: VideoClassifier, manifest: Manifest, tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """AV1 is read by PyAV and refused by decord: so the option reaches the reader."""
    save(tmp_path / "model", model=model, classes=manifest.classes)
    clip = str(data_folder / "clips" / "torchcodec_av1_video.mkv")
    arguments = ["predict", clip, "--model", str(tmp_path / "model"), "--device", "cpu"]
    assert main([*arguments, "--decoder", "pyav"]) == 0
    assert main([*arguments, "--decoder", "decord"]) == 1
    assert "decord" in capsys.readouterr().err
