"""`coca-video sweep` as a person calls it: a table of all probes, the one chosen, and a run like any probe's."""

import json
from pathlib import Path

import pytest

from coca_video.cli.__main__ import main
from coca_video.data.manifest import read_manifest

SWEEP = """
from pathlib import Path
from coca_video.models.head import HeadConfig
from coca_video.models.image import VitConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.sweep_config import SweepConfig
config = SweepConfig(
    probe=ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()), clips=ClipsConfig(train=Path({train!r}), holdout_share=0.25),
        out=Path({out!r}), num_frames=2, token_cache=Path({out!r}) / "tokens", augment=False,
        loop=LoopConfig(steps=2, batch_size=4), device="cpu",
    ),
    learning_rates=(1e-3, 1e-4),
    heads=(HeadConfig(), HeadConfig(pooling="mean")),
)
"""


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> Path:
    path = tmp_path / "sweep.py"
    path.write_text(SWEEP.format(train=str(drawn_clips), out=str(tmp_path / "run")))
    return path


@pytest.mark.slow
def test_the_table_and_the_run(
    config: Path, drawn_clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table has the probes of probes.json, the best first; the run evaluates as it was tested."""
    assert main(["sweep", str(config), "--learning-rates", "3e-2", "1e-4"]) == 0
    out, error = capsys.readouterr()
    written = json.loads((tmp_path / "run" / "probes.json").read_text())
    header, *lines = out.splitlines()
    assert header.split() == ["probe", "learning", "rate", "head", "top1", "top5", "loss"]
    ranked = sorted(
        written["probes"], key=lambda row: (-row["held_out"]["top1"], row["held_out"]["loss"], row["number"])
    )
    heads = {"query": "one query", "mean": "pooling mean"}
    for line, row in zip(lines[:4], ranked, strict=True):
        held_out = row["held_out"]
        assert line.split() == [
            f"{row['number']:02d}",
            f"{row['learning_rate']:g}",
            *heads[row["head"]["pooling"]].split(),
            *(f"{held_out[name]:.4f}" for name in ("top1", "top5", "loss")),
        ]
    assert {row["learning_rate"] for row in ranked} == {0.03, 0.0001}
    assert lines[4] == (f"Chosen of 4 probes: {written['chosen']:02d}, by top1 on 5 training clips that were held out.")
    assert written["chosen"] == ranked[0]["number"]
    assert lines[5] == "The test clips were looked at once, with the chosen probe:"
    tested = json.loads((tmp_path / "run" / "test.json").read_text())
    assert lines[7].startswith(f"top-1       {tested['top1']:.4f}")
    assert f"The classifier is in {tmp_path / 'run' / 'model'}" in error
    assert main(["evaluate", str(drawn_clips), "--model", str(tmp_path / "run"), "--split", "test"]) == 0
    (found,) = (tmp_path / "run" / "evaluation").glob("*.json")
    evaluated = json.loads(found.read_text())
    assert evaluated["per_class"] == tested["per_class"]
    clip = read_manifest(drawn_clips).rows[0].path
    assert main(["predict", str(clip), "--model", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--probe.clips.holdout-share", "0"], "never on the test clips; give --probe.clips.holdout-share"),
        (["--probe.optim.learning-rate", "0.5"], "--probe.optim.learning-rate does nothing where --learning-rates"),
        (["--learning-rates", "nan", "1e-3"], "--optim.learning-rate must be above 0 and finite; got nan"),
        (["--probe.token-cache", "None", "probe.tuning:finetune"], "take frozen"),
    ],
    ids=["no held-out part", "said twice", "not a rate", "fine-tuning"],
)
def test_mistakes_are_sentences(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    try:
        status = main(["sweep", str(config), *arguments])
    except SystemExit as exit:
        status = int(exit.code or 0)
    error = capsys.readouterr().err
    assert status == 2
    assert sentence.lower() in " ".join(error.lower().split())
    assert "Traceback" not in error


def test_no_config_and_a_probe_in_its_place(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep"]) == 2
    assert "expected a config file, such as configs/sweep/own_clips.py" in capsys.readouterr().err
    assert main(["probe", str(config)]) == 2
    assert "expected a line `config = ProbeConfig(...)`" in capsys.readouterr().err
