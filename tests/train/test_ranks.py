"""Pretraining on two ranks: the same losses and weights as in one process, and checkpoints for either."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from coca_video.hub import load
from coca_video.models.coca import CoCaConfig
from coca_video.train import pretrain
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.pretrain import PairsConfig, PretrainConfig, run_pretraining
from tests.ranks import on_ranks

Strategy = Literal["ddp", "fsdp2"]
STEPS, FIRST_PART = 6, 3


def config_of(pictures: Path, out: Path, *, strategy: Strategy, optim: OptimConfig) -> PretrainConfig:
    """Batches of 7: ranks hold 3 and 4 pairs, with captions of different lengths."""
    return PretrainConfig(
        model=CoCaConfig.tiny(),
        pairs=PairsConfig(train=pictures, test=pictures),
        out=out,
        optim=optim,
        loop=LoopConfig(
            steps=STEPS, batch_size=7, log_every=2, checkpoint_every=FIRST_PART, evaluate_every=4, strategy=strategy
        ),
        device="cpu",
    )


def run_whole_and_first_part(config: PretrainConfig, *, half: Path) -> tuple[dict[str, float], str]:
    """A whole run, and one in `half` that dies in the step after its first checkpoint."""
    return run_pretraining(config).metrics, run_first_part(replace(config, out=half))


def run_first_part(config: PretrainConfig) -> str:
    step, calls = pretrain.coca_step, []

    def dying(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        if len(calls) > FIRST_PART:
            raise OSError("the lights went out")
        return step(*args, **kwargs)

    pretrain.coca_step = dying
    try:
        run_pretraining(config)
    except OSError as error:
        return str(error)
    finally:
        pretrain.coca_step = step
    return "ended"


def records(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("samples_per_second", "data_wait_share", "memory_mb")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def assert_same_run(out: Path, *, expected: Path) -> None:
    """Rounding differs between one process and two; key biases, whose gradients are only that, AdamW makes steps of."""
    ours, theirs = records(out), records(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        numbers = {name: value for name, value in mine.items() if name != "kind" and "recall" not in name}
        assert numbers == pytest.approx({name: other[name] for name in numbers}, rel=2e-4)
    own, others = (load(folder).model.state_dict() for folder in (out, expected))
    assert own.keys() == others.keys()
    for name in own:
        if not name.endswith("k_proj.bias"):
            torch.testing.assert_close(
                own[name], others[name], rtol=0, atol=2e-3, msg=lambda m, name=name: f"{name}: {m}"
            )


@pytest.mark.drill
@pytest.mark.parametrize(
    ("strategy", "optim"),
    [
        ("ddp", OptimConfig(learning_rate=1e-3, warmup_steps=2)),
        ("ddp", OptimConfig(learning_rate=1e-3, warmup_steps=2, rate_factors={"encoder": 0.0, "log_scale": 0.0})),
        ("fsdp2", OptimConfig(learning_rate=1e-3, warmup_steps=2)),
        (
            "fsdp2",
            OptimConfig(
                algorithm="adafactor",
                learning_rate=1e-3,
                warmup_steps=2,
                beta2=0.999,
                ema_decay=0.9,
                rate_factors={"encoder": 0.5},
            ),
        ),
    ],
    ids=["ddp", "ddp frozen", "fsdp2", "fsdp2 adafactor"],
)
def test_two_ranks_train_as_one(pictures: Path, tmp_path: Path, strategy: Strategy, optim: OptimConfig) -> None:
    config = config_of(pictures, tmp_path / "one", strategy=strategy, optim=optim)
    run_pretraining(config)
    (metrics, death), others = on_ranks(
        run_whole_and_first_part, config=replace(config, out=tmp_path / "two"), half=tmp_path / "half"
    )
    assert others == (metrics, "the lights went out") == (metrics, death)
    assert_same_run(tmp_path / "two", expected=tmp_path / "one")
    run_pretraining(replace(config, out=tmp_path / "half"))  # on one process: the number of ranks may change
    assert_same_run(tmp_path / "half", expected=tmp_path / "one")
