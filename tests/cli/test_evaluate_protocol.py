"""`evaluate --protocol NAME`: other numbers, told in the result; the same from several processes by torchrun."""

import csv
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch

from coca_video.cli.__main__ import main
from coca_video.cli.evaluate import EvaluateOptions
from coca_video.data import video
from coca_video.data.decode import Backend, VideoReader, open_video, write_video
from coca_video.data.manifest import VideoRow, write_manifest
from coca_video.data.views import ProtocolName
from coca_video.hub import save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.synthetic import ACTIONS, clip_parameters, render_clip
from coca_video.tokenizer import train_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Five clips of 48 x 32, and a file that is no video."""
    rows = []
    for index, action in enumerate(ACTIONS):
        path = tmp_path / "clips" / f"{action}.mp4"
        path.parent.mkdir(exist_ok=True)
        frames = render_clip(clip_parameters(index, seed=5, split="views", num_frames=20), size=48)
        write_video(path, frames=frames[:, :, 8:40], frames_per_second=8.0, crf=12)
        rows.append(VideoRow(path=path, label=action, video_id=action, split="whole"))
    (tmp_path / "clips" / "broken.mp4").write_bytes(b"no video")
    rows.append(VideoRow(path=tmp_path / "clips" / "broken.mp4", label="spin", video_id="broken", split="broken"))
    write_manifest(tmp_path / "clips" / "manifest.csv", rows=rows, classes=ACTIONS)
    return tmp_path / "clips" / "manifest.csv"


@pytest.fixture
def arguments(clips: Path, tmp_path: Path) -> list[str]:
    """`evaluate` of a model with random weights."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=len(ACTIONS), num_frames=3)
    model = VideoClassifier(config)
    with torch.no_grad():
        model.head.classifier.weight.normal_(std=0.2)
    save(tmp_path / "model", model=model, classes=ACTIONS)
    return ["evaluate", str(clips), "--model", str(tmp_path / "model"), "--device", "cpu"]


def scores(path: Path) -> np.ndarray:
    """Of every video in the file beside a result."""
    with path.with_name(f"{path.stem}_videos.csv").open(newline="") as file:
        return np.array([[float(row[name]) for name in ACTIONS] for row in csv.DictReader(file)])


def test_the_names_are_those_of_the_protocols() -> None:
    """Written twice, since the module of the protocols loads torch and --help must not."""
    hint = get_args(get_type_hints(EvaluateOptions)["protocol"])
    assert {name for part in hint for name in get_args(part)} == set(get_args(ProtocolName))


@pytest.mark.slow
def test_each_protocol_gives_other_scores_and_a_result_of_its_own(arguments: list[str], tmp_path: Path) -> None:
    options: dict[str, list[str]] = {
        "manifest_whole": [],
        "manifest_whole_4frames": ["--num-frames", "4"],
        "manifest_whole_uniform": ["--protocol", "uniform"],
        "manifest_whole_uniform_4frames": ["--protocol", "uniform", "--num-frames", "4"],
        "manifest_whole_mmaction2_tsn": ["--protocol", "mmaction2_tsn"],
        "manifest_whole_uniformerv2_2frames": ["--protocol", "uniformerv2", "--num-frames", "2"],
        "manifest_whole_videomae_ssv2_2frames": ["--protocol", "videomae_ssv2", "--num-frames", "2"],
        "manifest_whole_videomae_2frames": ["--protocol", "videomae", "--num-frames", "2"],
        "manifest_whole_slowfast_2frames": ["--protocol", "slowfast", "--num-frames", "2"],
        "manifest_whole_pytorchvideo_2frames": ["--protocol", "pytorchvideo", "--num-frames", "2"],
        "manifest_whole_mmaction2_dense_2frames": ["--protocol", "mmaction2_dense", "--num-frames", "2"],
        "manifest_whole_vjepa2_1frames": ["--protocol", "vjepa2", "--num-frames", "1"],
        "manifest_whole_vjepa2_2frames": ["--protocol", "vjepa2", "--num-frames", "2"],
    }
    found: dict[str, np.ndarray] = {}
    for name, extra in options.items():
        assert main([*arguments, "--split", "whole", *extra]) == 0
        found[name] = scores(tmp_path / "model" / "evaluation" / f"{name}.json")
        assert found[name].shape == (5, 5)
        assert found[name].sum(axis=1) == pytest.approx(1.0)
    # "uniform" is what an evaluation without a protocol does; each other pair differs.
    for name in ("manifest_whole", "manifest_whole_4frames"):
        same = found.pop(name)
        np.testing.assert_allclose(found[name.replace("whole", "whole_uniform")], same, atol=1e-6, rtol=0)
    names = list(found)
    for first in range(len(names)):
        for second in range(first):
            assert np.abs(found[names[first]] - found[names[second]]).max() > 1e-5, (names[first], names[second])


def test_the_result_says_by_which_protocol(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--protocol", "vjepa2", "--num-frames", "2"]) == 1
    out, error = capsys.readouterr()
    assert "protocol    vjepa2: 8 clips of 2 frames, crops: three, scores: concatenate_clips\n" in out
    assert "videos      5 read, 1 unreadable" in out and "1 of 6 could not be read" in error
    document = json.loads((tmp_path / "model" / "evaluation" / "manifest_vjepa2_2frames.json").read_text())
    assert document["protocol"] == {
        "name": "vjepa2",
        "num_clips": 8,
        "frames_per_clip": 2,
        "stride": 4,
        "clip_seconds": None,
        "crops": "three",
        "short_side": 256,
        "crop_size": 256,
        "aggregate": "concatenate_clips",
    }
    assert document["num_frames"] == 2 and list(document["unreadable"]) == ["broken"]
    assert main([*arguments, "--split", "whole"]) == 0
    plain = json.loads((tmp_path / "model" / "evaluation" / "manifest_whole.json").read_text())
    assert "protocol" not in capsys.readouterr().out
    told = {name: plain["protocol"][name] for name in ("name", "num_clips", "frames_per_clip", "crops", "aggregate")}
    assert told == {
        "name": "uniform",
        "num_clips": 1,
        "frames_per_clip": 3,
        "crops": "centre",
        "aggregate": "mean_softmax",
    }


@pytest.mark.parametrize(
    ("extra", "sentence"),
    [
        (
            ["--protocol", "mmaction2_tsn", "--num-frames", "8"],
            "--num-frames 8 does not go with the protocol mmaction2_tsn: expected clips of 1 frame",
        ),
        (["--protocol", "videomae", "--num-frames", "0"], "--num-frames must be at least 1; got 0."),
        (["--num-frames", "0"], "--num-frames must be at least 1; got 0."),
    ],
)
def test_frames_that_a_protocol_cannot_take_are_a_sentence(
    arguments: list[str], extra: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, *extra]) == 2
    assert sentence in capsys.readouterr().err


def test_a_coca_takes_no_protocol_and_one_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = train_tokenizer(["a b c"], vocab_size=512, max_length=32)
    save(tmp_path / "coca", model=CoCa(CoCaConfig.tiny()), tokenizer=tokenizer)
    arguments = ["evaluate", str(tmp_path / "none.tar"), "--model", str(tmp_path / "coca"), "--device", "cpu"]
    assert main([*arguments, "--protocol", "uniform"]) == 2
    assert "--protocol is for clips" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(arguments) == 2
    assert "Retrieval is evaluated in one process, and torchrun started several" in capsys.readouterr().err


def test_decoder_and_time_limit_reach_the_reader(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With 1.5 s for each video, one hangs."""
    asked: list[str] = []
    hung = threading.Event()
    arguments = [*arguments, "--split", "whole", "--protocol", "mmaction2_tsn"]

    def noting(path: Path, *, backend: Backend) -> VideoReader:
        asked.append(backend)
        if path.name == "spin.mp4" and backend == "auto":
            hung.wait(60)
        return open_video(path, backend=backend)

    monkeypatch.setattr(video, "open_video", noting)
    assert main([*arguments, "--decoder", "pyav", "--out", str(tmp_path / "patient")]) == 0
    assert asked == ["pyav"] * 5
    assert main([*arguments, "--timeout-seconds", "1.5", "--out", str(tmp_path / "hasty")]) == 1
    hung.set()
    assert asked[5:] == ["auto"] * 5
    (path,) = (tmp_path / "hasty").glob("*.json")
    assert list(json.loads(path.read_text())["unreadable"]) == ["spin"]


def torchrun(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command line on two processes, as a user would start it."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "coca_video.cli"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, *start, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.drill
@pytest.mark.parametrize("extra", [[], ["--protocol", "uniformerv2", "--num-frames", "2"]], ids=["clip", "views"])
def test_torchrun_gives_the_same(
    arguments: list[str], extra: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Figures printed once and written once; the status tells of the broken video, as it does in one process."""
    results: dict[str, tuple[dict[str, Any], np.ndarray]] = {}
    assert main([*arguments, *extra, "--out", str(tmp_path / "alone")]) == 1
    out = capsys.readouterr().out
    done = torchrun([*arguments, *extra, "--out", str(tmp_path / "two"), "--batch-size", "5"])
    assert done.returncode == 1, done.stderr
    assert done.stdout == out
    assert done.stderr.count("1 of 6 could not be read") == 1
    for name in ("alone", "two"):
        (path,) = (tmp_path / name).glob("*.json")
        results[name] = json.loads(path.read_text()), scores(path)
    assert results["two"][0] == results["alone"][0]
    np.testing.assert_allclose(results["two"][1], results["alone"][1], atol=1e-6, rtol=0)
