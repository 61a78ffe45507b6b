"""Probes on two ranks: frozen or fine-tuned, their losses, figures and weights are those of one process."""

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coca_video.models.image import VitConfig
from coca_video.train import classify
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig, build_optimizer
from coca_video.train.probe_config import ClipsConfig, Finetune, Lora, ProbeConfig, RandomEncoder
from coca_video.train.probe_model import build_classifier
from tests.ranks import on_ranks

STEPS, FIRST_PART = 4, 2


def sgd(model: nn.Module, *, config: OptimConfig) -> torch.optim.Optimizer:
    """Of the same groups. AdamW would make whole steps of what is rounding: the gradients of the keys' biases."""
    groups = build_optimizer(model, config=config).param_groups
    kept = [{name: group[name] for name in ("params", "lr", "rate_factor", "weight_decay")} for group in groups]
    return torch.optim.SGD(kept, lr=config.learning_rate, momentum=0.9)


def run(config: ProbeConfig) -> Any:
    classify.build_optimizer = sgd
    return run_probe(config)


def run_whole_and_first_part(config: ProbeConfig, *, half: Path) -> tuple[Any, str]:
    """A whole run, and one in `half` that dies in the step after its first checkpoint."""
    return run(config), run_first_part(replace(config, out=half))


def run_first_part(config: ProbeConfig) -> str:
    step, calls = classify.probe_step, iter(range(100))

    def dying(*args: Any, **options: Any) -> Any:
        if next(calls) == FIRST_PART:
            raise OSError("the lights went out")
        return step(*args, **options)

    classify.probe_step = dying
    try:
        run(config)
    except OSError as error:
        return str(error)
    finally:
        classify.probe_step = step
    return "ended"


def records(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    measured = ("samples_per_second", "data_wait_share", "memory_mb")
    return [{name: value for name, value in line.items() if name not in measured} for line in lines]


def scores(out: Path) -> tuple[list[str], torch.Tensor]:
    with (out / "test_videos.csv").open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row[0] for row in rows], torch.tensor([[float(cell) for cell in row[3:]] for row in rows])


def assert_same_run(out: Path, *, expected: Path) -> None:
    ours, theirs = records(out), records(expected)
    assert [line.keys() for line in ours] == [line.keys() for line in theirs]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == {
            name: pytest.approx(value, rel=1e-4) if name != "kind" else value for name, value in other.items()
        }
    assert scores(out)[0] == scores(expected)[0]
    torch.testing.assert_close(scores(out)[1], scores(expected)[1], rtol=0, atol=1e-5)
    own, others = (load_file(folder / "model" / "model.safetensors") for folder in (out, expected))
    assert own.keys() == others.keys()
    for name in own:
        torch.testing.assert_close(own[name], others[name], rtol=0, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


BEST = {"keep_best": True, "clips": {"holdout_share": 0.25}}
KINDS: dict[str, dict[str, Any]] = {
    "frozen-ddp": {"augment": True},
    "frozen-ddp-cached": {"token_cache": True, "micro_batch_size": 3, **BEST},
    "frozen-fsdp2-cached": {"token_cache": True, "micro_batch_size": 1, "class_balanced": True},
    "finetune-ddp": {"tuning": Finetune(layer_decay=0.8), "micro_batch_size": 3},
    "finetune-fsdp2": {"tuning": Finetune(activation_checkpointing=True), "micro_batch_size": 1, "ema": 0.5, **BEST},
    "lora-ddp": {"tuning": Lora(rank=2), "ema": 0.5},
    "lora-fsdp2": {"tuning": Lora(rank=2), "micro_batch_size": 2},
}


def config_of(kind: str, *, clips: Path, folder: Path) -> ProbeConfig:
    """Batches of 7: ranks hold 3 and 4 clips."""
    options = dict(KINDS[kind])
    token_cache = folder / "tokens" if options.pop("token_cache", False) else None
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=clips, **options.pop("clips", {})),
        out=folder / "one",
        num_frames=2,
        token_cache=token_cache,
        augment=options.pop("augment", False),
        optim=OptimConfig(learning_rate=0.05, warmup_steps=1, ema_decay=options.pop("ema", None)),
        loop=LoopConfig(
            steps=STEPS,
            batch_size=7,
            log_every=1,
            checkpoint_every=FIRST_PART,
            evaluate_every=1,
            strategy="fsdp2" if "fsdp2" in kind else "ddp",
        ),
        device="cpu",
        **options,
    )


# Each starts processes that import torch: one for every run, the others with the drills.
MORE_KINDS = KINDS.keys() - {"finetune-fsdp2"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.drill if kind in MORE_KINDS else ()) for kind in KINDS]
)
def test_two_ranks_train_as_one(kind: str, drawn_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(kind, clips=drawn_clips, folder=tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(classify, "build_optimizer", sgd)
        evaluation = run_probe(config).evaluation
        found = on_ranks(run_whole_and_first_part, config=replace(config, out=tmp_path / "two"), half=tmp_path / "half")
        assert [death for _, death in found] == 2 * ["the lights went out"]
        assert evaluation is not None
        for result, _ in found:
            assert result.evaluation["num_videos"] == 10
            assert result.evaluation["per_class"] == evaluation["per_class"]
        assert_same_run(tmp_path / "two", expected=config.out)
        run_probe(replace(config, out=tmp_path / "half"))  # on one process: the number of ranks may change
        assert_same_run(tmp_path / "half", expected=config.out)
    before = build_classifier(config, num_classes=5).state_dict()
    after = load_file(config.out / "model" / "model.safetensors")
    changes = {name: float((after[name] - before[name]).abs().max()) for name in after}
    assert changes["head.classifier.weight"] > 1e-3  # so that the equality says something
    if not kind.startswith("frozen"):
        assert max(change for name, change in changes.items() if name.startswith("encoder.")) > 1e-4
