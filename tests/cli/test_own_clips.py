"""From a folder of one's own clips to a trained, evaluated, saved classifier, by one command."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch

from coca_video.cli.__main__ import main
from coca_video.data.manifest import read_manifest
from coca_video.hub import load, save
from coca_video.models.image import ImageEncoder, VitConfig

OWN_CLIPS = str(Path(__file__).resolve().parents[2] / "configs" / "probe" / "own_clips.py")


@pytest.fixture
def clips(drawn_clips: Path, tmp_path: Path) -> Path:
    """The 30 drawn clips of 5 classes as clips/<class>/*.mp4, and nothing else."""
    for row in read_manifest(drawn_clips).rows:
        folder = tmp_path / "clips" / str(row.label)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, folder / f"{row.video_id}.mp4")
    return tmp_path / "clips"


@pytest.fixture
def command(clips: Path, tmp_path: Path) -> list[str]:
    torch.manual_seed(0)
    save(tmp_path / "encoder", model=ImageEncoder(VitConfig.tiny()))
    options = {
        "--encoder.model": tmp_path / "encoder",
        "--clips.train": clips,
        "--out": tmp_path / "mine",
        "--token-cache": tmp_path / "tokens",
        "--loop.steps": 3,
        "--device": "cpu",
    }
    return ["probe", OWN_CLIPS, *(str(word) for option in options.items() for word in option)]


def test_class_folders_are_all_it_takes(
    command: list[str], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the 6 clips of each class one, the nearest to a fifth, is tested on and not trained on."""
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "videos      5 read, 0 unreadable" in out
    with (tmp_path / "mine" / "test_videos.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][3:] == sorted(path.name for path in clips.iterdir())  # the order of classes is that of their names
    assert sorted(row[1] for row in rows[1:]) == rows[0][3:]
    saved = load(tmp_path / "mine")
    assert list(saved.classes) == rows[0][3:]
    written = json.loads((tmp_path / "mine" / "test.json").read_text())
    assert (written["num_videos"], written["split"], written["test_share"]) == (5, None, 0.2)
    assert main(["predict", str(next(clips.rglob("*.mp4"))), "--model", str(tmp_path / "mine")]) == 0
    assert capsys.readouterr().out.count("\n") == 1 + 5


@pytest.mark.slow
def test_what_is_tested_on_is_asked_for(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command, "--clips.test-share", "0.5"]) == 0
    assert "videos      15 read, 0 unreadable" in capsys.readouterr().out
    assert main([*command, "--clips.test-share", "0.0", "--out", "unused"]) == 2
    assert "no clip has a split; give --clips.test-share 0.2, or --clips.test, or" in capsys.readouterr().err


@pytest.mark.slow
def test_a_classes_file_decides_the_order(
    command: list[str], clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = sorted((path.name for path in clips.iterdir()), reverse=True)
    (clips / "classes.txt").write_text("".join(f"{name}\n" for name in names))
    assert main(command) == 0
    assert list(load(tmp_path / "mine").classes) == names
    (clips / "classes.txt").unlink()
    assert main([*command, "--clips.no-classes-by-name", "--out", str(tmp_path / "other")]) == 2
    assert "which gives the order of classes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("tuning", ["tuning:finetune", "tuning:lora"])
def test_the_encoder_too(command: list[str], tmp_path: Path, tuning: str) -> None:
    train = [*command, "--token-cache", "None", "--micro-batch-size", "8", "--loop.batch-size", "16"]
    assert main([*train, tuning, "--tuning.rate-factor", "0.5"]) == 0
    found = json.loads((tmp_path / "mine" / "config.json").read_text())["tuning"]
    assert (found["type"].lower(), found["rate_factor"]) == (tuning.removeprefix("tuning:"), 0.5)
    before, after = (load(folder).encoder.state_dict() for folder in (tmp_path / "encoder", tmp_path / "mine"))
    assert any(not torch.equal(before[name], after[name]) for name in before)
