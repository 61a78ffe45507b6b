"""A manifest with 30% of its files corrupt: training ends, names each failure once, and both accuracies are printed."""

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from coca_video.cli.__main__ import main
from coca_video.data.manifest import Manifest, read_manifest, write_manifest
from coca_video.models.image import VitConfig
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("<html>404 Not Found</html>\n")


def audio_only(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


DAMAGES = {truncate: "cut off", empty: "empty", text: "not a video file", audio_only: "no video stream"}


@pytest.fixture
def corrupt(drawn_clips: Path, tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A manifest of 20 clips to train on and 10 to test on, of which 6 and 3 are damaged: id to cause."""
    whole, causes, rows = read_manifest(drawn_clips), dict[str, str](), []
    for split, num_damaged in (("train", 6), ("test", 3)):
        for number, row in enumerate(whole.select(split=split).rows):
            copy = tmp_path / "clips" / f"{row.video_id}.mp4"
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(row.path, copy)
            rows.append(replace(row, path=copy))
            if number % 3 == 1 and number // 3 < num_damaged:
                damage, causes[row.video_id] = list(DAMAGES.items())[len(causes) % len(DAMAGES)]
                damage(copy)
    path = tmp_path / "clips" / "manifest.csv"
    write_manifest(path, rows=rows, classes=whole.classes)
    assert len(causes) == 9
    return path, causes


def in_split(manifest: Manifest, causes: dict[str, str], *, split: str) -> dict[str, str]:
    return {row.video_id: causes[row.video_id] for row in manifest.select(split=split).rows if row.video_id in causes}


@pytest.mark.parametrize("cached", [True, False])
def test_training_ends_and_names_every_failure_once(
    corrupt: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str], cached: bool
) -> None:
    path, causes = corrupt
    config = ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=path),
        out=tmp_path / "probe",
        num_frames=2,
        token_cache=tmp_path / "tokens" if cached else None,
        augment=not cached,
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=12, batch_size=5, log_every=1),  # three passes over the 20 clips
        device="cpu",
    )
    run_probe(config)
    with (config.out / "unreadable.csv").open(newline="") as file:
        listed = list(csv.reader(file))[1:]
    assert sorted(name for name, _ in listed) == sorted(causes)
    assert all(causes[name] in cause for name, cause in listed)
    records = map(json.loads, (config.out / "metrics.jsonl").read_text().splitlines())
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) >= 12 and np.isfinite(losses).all()
    capsys.readouterr()

    assert main(["evaluate", str(path), "--split", "test", "--model", str(config.out)]) == 1
    out, err = capsys.readouterr()
    assert "videos      7 read, 3 unreadable" in out
    left_out = re.search(r"^top-1 +([\d.]+) \((\d+) of the 7 read\)$", out, flags=re.MULTILINE)
    as_wrong = re.search(r"^ +([\d.]+) \((\d+) of all 10, unreadable as wrong\)$", out, flags=re.MULTILINE)
    assert left_out and as_wrong and left_out[2] == as_wrong[2]
    right = int(left_out[2])
    assert (left_out[1], as_wrong[1]) == (f"{right / 7:.4f}", f"{right / 10:.4f}")
    expected = in_split(read_manifest(path), causes, split="test")
    assert {name: err.count(f"{name}.mp4: ") for name in expected} == dict.fromkeys(expected, 1)
