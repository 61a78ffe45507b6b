"""The model card and its upload: figures equal to the result files, a licence always, nothing private."""

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, create_autospec

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, ModelCard

import coca_video.hub.upload
from coca_video.eval.classification import ClassificationResult, write_result
from coca_video.eval.metrics import classification_metrics
from coca_video.hub import Saved, fingerprint, load, push, save
from coca_video.hub.card import (
    Measurement,
    measured_table,
    measurements_of,
    model_card,
    model_facts,
    model_limits,
    read_measurement,
    trained_on,
)
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.head import HeadConfig
from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.tokenizer import train_tokenizer

CLASSES = ("push|pull", "wave", "kick")
RETRIEVAL = {"image_to_text_recall@1": 0.123456789012, "text_to_image_recall@10": 0.25}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    """HfApi with its real signatures, which uploads nothing."""
    fake: MagicMock = create_autospec(HfApi, instance=True)
    fake.create_repo.return_value = "https://hub/org/name"
    monkeypatch.setattr(coca_video.hub.upload, "HfApi", lambda library_name: fake)
    return fake


def classification_result() -> ClassificationResult:
    scores = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.6, 0.3, 0.1]])
    labels = np.array([0, 2, 1])
    return ClassificationResult(
        classes=CLASSES,
        video_ids=("a", "b", "c"),
        labels=labels,
        scores=scores,
        metrics=classification_metrics(scores, labels=labels, num_unreadable=1),
        unreadable=(),
    )


def finished_run(folder: Path, *, license: str | None = None, source: str | None = None) -> VideoClassifier:
    """A probe's run: a model, the test's result as the trainer writes it, and an evaluation on other data."""
    model = VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=3, num_frames=4))
    save(folder / "model", model=model, classes=CLASSES, license=license, source=source)
    facts: dict[str, Any] = {"model": str(folder / "model"), "split": "test", "num_frames": 4}
    write_result(folder, name="test", result=classification_result(), facts=facts)
    (folder / "evaluation").mkdir()
    other = {
        "data": "/home/someone/other/manifest.csv",
        "split": None,
        "num_videos": 9,
        "num_unreadable": 0,
        "top1": 0.1,
    }
    (folder / "evaluation" / "other.json").write_text(json.dumps(other))
    for path in (folder / "test.json", folder / "evaluation" / "other.json"):
        os.utime(path, (1_700_000_000, 1_700_000_000))  # 14 November 2023
    return model


def uploaded(api: MagicMock) -> dict[str, bytes]:
    """The one commit's files."""
    (repo, operations), _ = api.create_commit.call_args
    assert api.create_commit.call_count == 1 and repo == "org/name"
    files = {}
    for operation in operations:
        with operation.as_file() as file:
            files[operation.path_in_repo] = file.read()
    return files


def test_figures_of_the_card_equal_the_result_files(tmp_path: Path, api: MagicMock) -> None:
    finished_run(tmp_path, source="timm:vit_tiny_patch16_224.augreg_in21k", license="apache-2.0")
    assert push(tmp_path, repo="org/name", license="cc-by-4.0", datasets=["org/clips"]) == "https://hub/org/name"
    card = ModelCard(uploaded(api)["README.md"].decode())
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "cc-by-4.0",
        "coca_video",
        "video-classification",
    )
    assert card.data.datasets == ["org/clips"] and "coca" in card.data.tags
    test = json.loads((tmp_path / "test.json").read_text())
    figures = {(r.dataset_config, r.dataset_split, r.metric_name): r.metric_value for r in card.data.eval_results}
    names = ("top1", "top5", "mean_class", "top1_unreadable_wrong")
    assert figures == {("test", "test", name): test[name] for name in names} | {("other", None, "top1"): 0.1}
    assert test["top1"] == 2 / 3 and test["top1_unreadable_wrong"] == 0.5
    assert (
        "| test data of the run | test | 3 videos, 1 unreadable | 4 frames a clip | top1 | 0.6667 | 2023-11-14 |"
        in (card.text)
    )
    assert "| other/manifest.csv | all | 9 videos |  | top1 | 0.1000 | 2023-11-14 |" in card.text
    assert (
        "These weights: cc-by-4.0. They were built on `timm:vit_tiny_patch16_224.augreg_in21k`, whose licence is "
        in (card.text)
    )


def test_what_is_uploaded_loads_again(tmp_path: Path, api: MagicMock) -> None:
    """And it is no more than the model: neither logs nor results nor anybody's folders."""
    model = finished_run(tmp_path / "run", source=f"timm:local-dir:{tmp_path}")
    before = sorted(path for path in tmp_path.rglob("*"))
    push(tmp_path / "run", repo="org/name", license="mit", private=True)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    api.create_repo.assert_called_once_with("org/name", private=True, exist_ok=True)
    files = uploaded(api)
    assert sorted(files) == ["README.md", "classes.txt", "config.json", "model.safetensors"]
    assert not [name for name, content in files.items() if str(tmp_path).encode() in content or b"someone" in content]
    assert b"They were built on local files, whose licence is not recorded." in files["README.md"]
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name, content in files.items():
        (downloaded / name).write_bytes(content)
    saved = load(downloaded)
    assert fingerprint(saved.model) == fingerprint(model)
    assert (saved.classes, saved.license, saved.source) == (CLASSES, "mit", None)


def test_results_may_be_named(tmp_path: Path, api: MagicMock) -> None:
    finished_run(tmp_path / "run", license="mit")
    push(tmp_path / "run" / "model", repo="org/name", results=[tmp_path / "run" / "evaluation" / "other.json"])
    card = ModelCard(uploaded(api)["README.md"].decode())
    assert [(result.metric_name, result.metric_value) for result in card.data.eval_results] == [("top1", 0.1)]
    assert card.data.license == "mit"


def test_the_model_folder_of_a_run_finds_the_same_results(tmp_path: Path, api: MagicMock) -> None:
    finished_run(tmp_path, license="mit")
    push(tmp_path, repo="org/name")
    first = uploaded(api)
    api.create_commit.reset_mock()
    push(tmp_path / "model", repo="org/name")
    assert uploaded(api) == first


def test_without_a_licence_nothing_is_uploaded(tmp_path: Path, api: MagicMock) -> None:
    finished_run(tmp_path)
    with pytest.raises(ValueError, match="does not say under which licence its weights are: give one"):
        push(tmp_path, repo="org/name")
    with pytest.raises(ValueError, match="Expected the short name of a licence"):
        push(tmp_path, repo="org/name", license="none at all!")
    assert not api.method_calls


def test_no_way_to_the_hub_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing listens at port 9."""
    save(tmp_path, model=ImageEncoder(VitConfig.tiny()), license="mit")
    monkeypatch.setattr(
        coca_video.hub.upload, "HfApi", lambda library_name: HfApi(endpoint="http://127.0.0.1:9", token="none")
    )
    with pytest.raises(ValueError, match=r"hf:org/name is neither in the local cache nor to be had now: .*refused"):
        push(tmp_path, repo="org/name")


def test_a_model_that_only_this_machine_can_build_is_a_sentence(tmp_path: Path, api: MagicMock) -> None:
    encoder = ImageEncoder(TimmConfig(name="test_vit", image_size=160))
    encoder.config = TimmConfig(name=f"local-dir:{tmp_path}", image_size=160)
    save(tmp_path / "ours", model=encoder, license="mit")
    with pytest.raises(ValueError, match="local-dir:"):
        push(tmp_path / "ours", repo="org/name")
    assert not api.method_calls


def test_nothing_measured_is_said(tmp_path: Path, api: MagicMock) -> None:
    save(tmp_path, model=ImageEncoder(VitConfig.tiny()), license="dinov3-license")
    push(tmp_path, repo="org/name")
    card = ModelCard(uploaded(api)["README.md"].decode())
    assert card.data.eval_results is None and "Nothing was measured with these weights" in card.text
    assert (card.data.license, card.data.license_name) == (
        "other",
        "dinov3-license",
    )  # the Hub knows no such identifier


def test_sizes_are_the_models() -> None:
    """48 px in patches of 8: 6 x 6 tokens of width 96; parameters summed from the shapes."""
    encoder = ImageEncoder(VitConfig.tiny())
    block = 4 * 96 + (96 * 288 + 288) + (96 * 96 + 96) + (96 * 384 + 384) + (384 * 96 + 96)
    total = (3 * 8 * 8 * 96 + 96) + 36 * 96 + 3 * block + 2 * 96
    card = model_card(Saved(model=encoder), repo="org/name", license="mit")
    assert f"Parameters: {total:,}, of which {total:,} in the image encoder." in card
    assert (
        "a VisionTransformer of width 96, 3 layers of 3 heads, patches of 8 px; 48 px images, resized bilinear" in card
    )
    assert 'coca_video.load("hf:org/name")' in card


def test_retrieval_of_a_coca(tmp_path: Path) -> None:
    path = tmp_path / "flickr8k.json"
    facts = {"data": "/shards/flickr8k", "precision": "bf16", "num_images": 1000, "num_captions": 5000}
    path.write_text(json.dumps({**facts, **RETRIEVAL, "unreadable": {"x": "cut"}}))
    tokenizer = train_tokenizer(["a dog"], vocab_size=300, max_length=32)
    saved = Saved(model=CoCa(CoCaConfig.tiny()), tokenizer=tokenizer)
    text = model_card(saved, repo="org/name", license="mit", measurements=[read_measurement(path)])
    card = ModelCard(text)
    assert {result.metric_name: result.metric_value for result in card.data.eval_results} == RETRIEVAL
    assert {result.metric_type for result in card.data.eval_results} == {"recall"}
    assert (
        "| flickr8k | all | 1000 images, 5000 captions, 1 unreadable | bf16 | image_to_text_recall@1 | 0.1235 |" in text
    )
    assert (
        "| flickr8k | all | 1000 images, 5000 captions, 1 unreadable | bf16 | text_to_image_recall@10 | 0.2500 |"
        in text
    )


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "cannot be read as the result of an evaluation"),
        ("[1.5]", "cannot be read as the result of an evaluation"),
        ('{"num_videos": 3}', "Expected the result of an evaluation, with its figures"),
    ],
)
def test_what_is_no_result_is_a_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "test.json"
    with pytest.raises(ValueError, match="cannot be read as the result of an evaluation"):
        read_measurement(path)
    path.write_text(content)
    with pytest.raises(ValueError, match=sentence):
        read_measurement(path)


HEADS: dict[str, dict[str, Any]] = {
    "query": {},
    "queries": {"num_queries": 2},
    "mean": {"pooling": "mean"},
    "sincos": {"time_embedding": "sincos"},
    "blocks": {"num_blocks": 2},
    "blocks-sincos": {"num_blocks": 2, "time_embedding": "sincos"},
    "one-block-learned": {"num_blocks": 1, "time_embedding": "learned"},
}


def classifier(*, classes: tuple[str, ...] = CLASSES, stride: int | None = None, **head: Any) -> Saved:
    torch.manual_seed(0)
    config = VideoClassifierConfig(
        image=VitConfig.tiny(), num_classes=len(classes), num_frames=4, stride=stride, head=HeadConfig(**head)
    )
    return Saved(model=VideoClassifier(config).eval(), classes=classes)


@pytest.mark.parametrize("name", HEADS)
def test_order_is_a_limit_of_just_those_models_that_do_not_see_it(name: str) -> None:
    """Asked of the model itself: whether a clip and its reverse get equal scores, and frames side by side too."""
    saved = classifier(**HEADS[name])
    model = saved.model
    assert isinstance(model, VideoClassifier)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        frames = torch.randn(1, 4, 3, 48, 48)
        is_blind = torch.allclose(model(frames), model(frames.flip(1)), atol=1e-4)
    limits = model_limits(saved)
    assert ("a clip and its reverse get equal scores" in limits) == is_blind == ("time_embedding" not in HEADS[name])
    assert ("compared with the others in time" in limits) == (name == "blocks-sincos")
    assert ("not compared with one another" in limits) == (name in ("sincos", "one-block-learned"))
    assert limits.splitlines()[1:] == [
        "- What happens between the frames that it is shown.",
        "- Sound: it sees pictures only.",
        "- Actions outside its classes: scores sum to 1 over them, for a clip that shows none of them too.",
    ]


@pytest.mark.parametrize(
    ("head", "described"),
    [
        ({}, "ONE learned query pools the tokens of all frames (CoCa, "),
        ({"num_queries": 3}, "3 learned queries pool the tokens of all frames (CoCa, "),
        ({"pooling": "mean"}, "the mean of the tokens of all frames is normalised and classified."),
        ({"num_blocks": 4}, "an attentive pooler of depth 4, with ONE learned query, pools the tokens of all frames ("),
        ({"time_embedding": "learned"}, "the tokens of all frames, to which a time embedding was added (CoCa, "),
        ({"encoder_layers": (0, -1)}, "; the tokens are those of the encoder's layers 0, -1."),
    ],
)
def test_the_head_is_told(head: dict[str, Any], described: str) -> None:
    facts = model_facts(classifier(**head))
    assert described in facts
    assert (described in model_facts(classifier())) == (not head)
    assert "- Frames a clip in training: 4, spread over the whole video; any number goes." in facts
    assert "- Frames a clip in training: 4, one in 8 of a part of the video; any" in model_facts(classifier(stride=8))


def test_class_names_do_nothing_in_markdown() -> None:
    """A code span ends at as many backticks as began it, so these have more than any name has in a row."""
    classes = ("plain", "a`<img src=x>", "b``c", "`")
    facts = model_facts(classifier(classes=classes))
    assert "- Classes (4): `plain`, `` a`<img src=x> ``, ``` b``c ```, `` ` ``." in facts


def test_many_classes_are_cut_short() -> None:
    facts = model_facts(classifier(classes=tuple(f"c{number}" for number in range(103))))
    assert "`c99` and 3 more in classes.txt." in facts and "`c100`" not in facts


def test_cells_of_the_table_hold_no_borders_and_no_html() -> None:
    measurement = Measurement(
        name="test",
        data="a|b<script>&",
        split=None,
        date="2026-01-02",
        samples="7 videos",
        setting="<i>",
        figures={"top1": 0.25, "to|p5": 0.5},
    )
    assert measured_table([measurement]).splitlines() == [
        "| Data | Split | Samples | Setting | Figure | Value | Date |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        r"| a\|b&lt;script&gt;&amp; | all | 7 videos | &lt;i&gt; | top1 | 0.2500 | 2026-01-02 |",
        r"| a\|b&lt;script&gt;&amp; | all | 7 videos | &lt;i&gt; | to\|p5 | 0.5000 | 2026-01-02 |",
    ]
    assert measured_table([]).startswith("Nothing was measured with these weights")


def test_measurements_of_a_run_and_of_its_model_folder(tmp_path: Path) -> None:
    finished_run(tmp_path / "run")
    test = json.loads((tmp_path / "run" / "test.json").read_text())
    for source in (tmp_path / "run", tmp_path / "run" / "model"):
        first, second = measurements_of(source)
        assert first.figures == {name: value for name, value in test.items() if isinstance(value, float)}
        assert (second.name, second.data, second.figures) == ("other", "other/manifest.csv", {"top1": 0.1})
    save(tmp_path / "bare", model=ImageEncoder(VitConfig.tiny()))
    assert measurements_of(tmp_path / "bare") == []
    assert measurements_of(Path("hf:org/name")) == []
    with pytest.raises(ValueError, match="Expected a finished run or a model folder"):
        measurements_of(tmp_path)


@pytest.mark.parametrize(
    ("config", "data"),
    [
        ({"clips": {"train": "/home/someone/ucf101/manifest.csv"}}, "ucf101/manifest.csv"),
        ({"probe": {"clips": {"train": "/home/someone/clips"}}}, "clips"),
        ({"pairs": {"train": "shards/train-{00..05}.tar"}}, "shards/train-{00..05}.tar"),
        ({"model": "CoCa"}, None),
        (None, None),
    ],
    ids=["probe", "sweep", "pretrain", "other", "nothing"],
)
def test_what_a_run_was_trained_on(tmp_path: Path, config: dict[str, Any] | None, data: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert trained_on(tmp_path) == data
    assert trained_on(tmp_path / "model") == data
