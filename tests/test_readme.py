"""Every coca-video command in README.md, the recipes' pages and the docstrings of configs parses: its options exist."""

import ast
import shlex
from pathlib import Path

import pytest

from coca_video.cli.arguments import load_config, parse_options
from coca_video.cli.caption import CaptionOptions
from coca_video.cli.demo import DemoOptions
from coca_video.cli.doctor import DoctorOptions
from coca_video.cli.evaluate import EvaluateOptions
from coca_video.cli.linear import LinearOptions
from coca_video.cli.predict import PredictOptions
from coca_video.cli.prepare import PrepareOptions
from coca_video.cli.quickstart import QuickstartOptions
from coca_video.cli.tokenizer import TokenizerOptions
from coca_video.cli.transcode import TranscodeOptions
from coca_video.train.pretrain import PretrainConfig
from coca_video.train.probe_config import ProbeConfig
from coca_video.train.sweep_config import SweepConfig

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = {"pretrain": PretrainConfig, "probe": ProbeConfig, "sweep": SweepConfig}
OPTIONS = {
    "caption": CaptionOptions,
    "demo": DemoOptions,
    "doctor": DoctorOptions,
    "evaluate": EvaluateOptions,
    "linear": LinearOptions,
    "predict": PredictOptions,
    "prepare": PrepareOptions,
    "quickstart": QuickstartOptions,
    "tokenizer": TokenizerOptions,
    "transcode": TranscodeOptions,
}


def commands() -> list[str]:
    """Indented lines that start with coca-video."""
    docstrings = [ast.get_docstring(ast.parse(path.read_text())) or "" for path in REPOSITORY.glob("configs/*/*.py")]
    pages = [path.read_text() for path in (REPOSITORY / "README.md", *REPOSITORY.glob("datasets/*/README.md"))]
    text = "\n".join([*pages, *docstrings])
    lines = text.replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if line.startswith("    coca-video ")]


@pytest.mark.parametrize("command", commands())
def test_command_parses(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    _, verb, *arguments = shlex.split(command)
    if verb in CONFIGS:
        config = load_config(CONFIGS[verb], verb=verb, arguments=arguments)
        assert type(config) is CONFIGS[verb]
    else:
        options = parse_options(OPTIONS[verb], verb=verb, arguments=arguments)
        assert type(options) is OPTIONS[verb]


def test_there_are_commands_for_every_verb_but_quickstart() -> None:
    assert {shlex.split(command)[1] for command in commands()} >= (CONFIGS.keys() | OPTIONS.keys()) - {"quickstart"}
