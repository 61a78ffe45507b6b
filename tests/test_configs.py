"""Every config that comes with the package: it loads, builds, says what it must, and goes through JSON."""

import json
import runpy
from pathlib import Path

import pytest
import torch

from coca_video.config import from_json, to_json
from coca_video.models.coca import CoCa
from coca_video.train.pretrain import PretrainConfig
from coca_video.train.probe_config import ProbeConfig
from coca_video.train.sweep_config import SweepConfig

REPOSITORY = Path(__file__).resolve().parents[1]
CONFIGS = sorted((REPOSITORY / "configs").rglob("*.py"))
TYPES = {"pretrain": PretrainConfig, "probe": ProbeConfig, "sweep": SweepConfig}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_config(path: Path) -> None:
    loaded = runpy.run_path(str(path))
    config = loaded["config"]
    verb = path.parent.name
    assert type(config) is TYPES[verb]
    assert f"coca-video {verb} {path.relative_to(REPOSITORY).as_posix()}" in loaded["__doc__"]
    assert from_json(type(config), json.loads(json.dumps(to_json(config)))) == config
    if isinstance(config, PretrainConfig):
        with torch.device("meta"):
            CoCa(config.model)


def test_there_are_configs_for_every_verb() -> None:
    assert {path.parent.name for path in CONFIGS} == set(TYPES)
