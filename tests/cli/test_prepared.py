"""What prepare writes of true Kinetics clips trains a probe of 400 classes, and evaluates it."""

from pathlib import Path

import pytest

from coca_video.cli.__main__ import main
from coca_video.hub import load
from coca_video.models.image import VitConfig
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder


@pytest.mark.slow
def test_the_manifest_of_kinetics_trains_and_evaluates(
    data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    for video_id in ("R6llTwEh07w_000000_000010", "SOX5yA1l24A_000299_000309"):
        clip = data_folder / "clips" / f"torchvision_{video_id[:11]}.mp4"
        (tmp_path / "videos" / f"{video_id}.mp4").symlink_to(clip)
    annotations = data_folder / "kinetics" / "kinetics-400_val.csv"
    prepare = ["prepare", "datasets/kinetics", "--videos", str(tmp_path / "videos"), "--annotations", str(annotations)]
    assert main([*prepare, "--out", str(tmp_path / "k400"), "--num-workers", "1"]) == 0
    manifest = tmp_path / "k400" / "manifest.csv"
    config = ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=manifest, train_split="val", test_split="val"),
        out=tmp_path / "probe",
        num_frames=4,
        token_cache=tmp_path / "tokens",
        augment=False,
        optim=OptimConfig(learning_rate=0.01, warmup_steps=1),
        loop=LoopConfig(steps=10, batch_size=2, log_every=1),
        device="cpu",
    )
    run_probe(config)
    classes = load(config.out).classes
    assert (len(classes), classes[375]) == (400, "using segway")
    capsys.readouterr()
    assert main(["evaluate", str(manifest), "--split", "val", "--model", str(config.out)]) == 0
    out = capsys.readouterr().out
    assert "videos      2 read, 0 unreadable" in out
    assert "top-1       1.0000 (2 of the 2 read)" in out  # both are of the one class it has seen; chance is .0025
