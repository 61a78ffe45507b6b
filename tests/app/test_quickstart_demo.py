"""The last command that the quickstart prints: a demo of what it has just trained."""

import shlex
from pathlib import Path

import pytest

from coca_video.cli.__main__ import main
from coca_video.synthetic import ACTIONS
from tests.app.client import ask
from tests.app.server import VERB, running

pytestmark = pytest.mark.drill
SMALL = ("--num-pictures", "48", "--num-train-clips", "20", "--num-test-clips", "10", "--pretrain-steps", "3")


def test_it_works_on_what_the_quickstart_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "quickstart"
    assert main(["quickstart", "--out", str(out), "--device", "cpu", *SMALL, "--probe-steps", "3"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    words = shlex.split(last)
    models = [Path(word) for word in words[words.index("--model") :] if word != "--model"]
    assert words[-2 * len(models) - 1] == "demo"
    clip = next((out / "world" / "clips" / "test" / "spin").glob("*.mp4"))
    with running(models, root=tmp_path / "demo", program=VERB) as demo:
        kind, answer = ask(demo.url, clip)
        assert kind == "complete" and {each["label"] for each in answer["top"]} == set(ACTIONS)
        assert answer["model"] == "probe"
        assert sum(each["probability"] for each in answer["top"]) == pytest.approx(1.0, abs=1e-6)
        kind, answer = ask(demo.url, clip, endpoint="caption", options=("", 2))
        assert kind == "complete" and answer["model"] == "pretrain" and len(answer["segments"]) == 2
