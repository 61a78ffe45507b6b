"""What a service answers with: models from folders, their names, frames and facts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from coca_video.hub import save
from coca_video.models.coca import CoCaConfig
from coca_video.models.image import ImageEncoder
from coca_video.serve.models import ServedModel, load_models, short_names
from tests.serve.models import CLASSES, classifier, coca


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A probe's run with its results, a CoCa's folder, and an encoder's."""
    folder = tmp_path_factory.mktemp("runs")
    classifier().saved.save(folder / "probe" / "model")
    (folder / "probe" / "config.json").write_text(json.dumps({"clips": {"train": "/secret/k400/manifest.csv"}}))
    result = {"data": "/secret/k400/manifest.csv", "split": "test", "num_videos": 10, "top1": 0.5}
    (folder / "probe" / "test.json").write_text(json.dumps(result))
    coca().saved.save(folder / "coca")
    save(folder / "encoder", model=ImageEncoder(CoCaConfig.tiny().image))
    return folder


def loaded(*sources: Path, **options: Any) -> list[ServedModel]:
    given: dict[str, Any] = {"decoder": "auto", "num_frames": None, "timeout_seconds": 60.0} | options
    return load_models([str(source) for source in sources], device=torch.device("cpu"), **given)


def test_each_kind_for_what_it_can(runs: Path) -> None:
    probe, describer = loaded(runs / "probe", runs / "coca")
    assert (probe.name, describer.name) == ("probe", "coca")
    assert probe.predictor is not None and probe.captioner is None
    assert probe.predictor.classes == CLASSES and probe.predictor.clip.num_frames == 4
    assert describer.predictor is None and describer.captioner is not None
    assert describer.captioner.clip.num_frames == 8


def test_what_is_known_of_a_run_without_where_it_lies(runs: Path) -> None:
    probe, describer = loaded(runs / "probe", runs / "coca")
    (measured,) = probe.measurements
    assert measured.figures == {"top1": 0.5} and measured.data == probe.trained_on == "k400/manifest.csv"
    assert describer.measurements == () and describer.trained_on is None


def test_options_reach_the_readers(runs: Path) -> None:
    (probe,) = loaded(runs / "probe", num_frames=7, decoder="pyav", timeout_seconds=3.0)
    assert probe.predictor is not None
    clip = probe.predictor.clip
    assert (clip.num_frames, clip.decoder, clip.timeout_seconds) == (7, "pyav", 3.0)


def test_what_cannot_be_served_is_a_sentence(runs: Path) -> None:
    with pytest.raises(
        ValueError, match="encoder holds a ImageEncoder, which neither names actions nor writes captions"
    ):
        loaded(runs / "encoder")
    with pytest.raises(ValueError, match="probe is given twice; give each model once"):
        loaded(runs / "probe", runs / "coca", runs / "probe")
    with pytest.raises(ValueError, match="model is given twice"):
        loaded(runs / "probe", runs / "probe" / "model")
    with pytest.raises(ValueError, match="Expected at least one model"):
        loaded()


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["runs/a/probe", "runs/b/coca"], ["probe", "coca"]),
        (["runs/a/probe", "runs/b/probe"], ["a/probe", "b/probe"]),
        (["/x/runs/a/model", "hf:org/name"], ["a", "name"]),
        (["open_clip:coca_ViT-B-32/laion2b"], ["laion2b"]),
        (["a/probe", "probe"], ["a/probe", "probe"]),
        (["probe", "./probe/model"], ["probe (1)", "probe (2)"]),
        (["/home/a/x/runs/probe", "/home/b/x/runs/probe"], ["probe (1)", "probe (2)"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(sources: list[str], names: list[str]) -> None:
    assert short_names(sources) == names
