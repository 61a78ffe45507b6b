"""The weights of the best evaluation: which they are, that their files outlive a kill, that a run ends with them."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from coca_video.models.image import VitConfig
from coca_video.train import classify
from coca_video.train.best import BestWeights
from coca_video.train.checkpoint import Checkpoints
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder


def filled(model: nn.Module, value: float) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_first_of_the_best_is_kept(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[0].bias.requires_grad_(False)
    best = BestWeights(tmp_path, metric="top1")
    for step, top1 in ((2, 0.25), (4, 0.5), (6, 0.5), (8, 0.375)):
        model[1].num_batches_tracked.fill_(step)
        best.offer(filled(model, float(step)), values={"loss": 9.0, "top1": top1}, step=step)
    assert (best.step, best.value) == (4, 0.5)
    best.load_into(filled(model, -1.0))
    assert model[0].weight.tolist() == [[4.0, 4.0], [4.0, 4.0]] and model[1].weight.tolist() == [4.0, 4.0]
    assert int(model[1].num_batches_tracked) == 4  # a buffer belongs to the weights
    assert model[0].bias.tolist() == [-1.0, -1.0]  # and a frozen one stays where it comes from
    with pytest.raises(ValueError, match="The best weights are chosen by top1; the evaluation has loss"):
        best.offer(model, values={"loss": 1.0}, step=9)
    (tmp_path / "step-00000004.pt").unlink()
    with pytest.raises(ValueError, match=r"step-00000004.pt, are gone; start another --out"):
        best.load_into(model)


def test_files_that_a_kept_checkpoint_names_stay(tmp_path: Path) -> None:
    """Two checkpoints are kept; a run may go on from either."""
    model, best = nn.Linear(1, 1), BestWeights(tmp_path, metric="top1")
    dumped: list[str] = []
    for step, top1 in ((1, 0.1), (2, 0.2), (3, 0.3), (4, 0.1)):
        best.offer(filled(model, float(step)), values={"top1": top1}, step=step)
        dumped.append(best.dump())
        best.after_checkpoint()
        kept = {json.loads(text)["step"] for text in dumped[-2:]}
        assert names(tmp_path) == sorted(f"step-{number:08d}.pt" for number in kept)
    again = BestWeights(tmp_path, metric="top1")
    again.load(dumped[-1])
    again.offer(filled(model, 5.0), values={"top1": 0.4}, step=5)
    again.after_checkpoint()
    assert names(tmp_path) == ["step-00000003.pt", "step-00000005.pt"]  # step 3 is what the checkpoint before names


def test_a_kill_while_it_writes_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = BestWeights(tmp_path, metric="top1")

    def dying(number: int) -> None:
        raise OSError("the lights went out")

    monkeypatch.setattr(os, "fsync", dying)
    with pytest.raises(OSError, match="the lights went out"):
        best.offer(nn.Linear(1, 1), values={"top1": 1.0}, step=1)
    assert names(tmp_path) == [".step-00000001.pt.partial"]


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips, holdout_share=0.25),
        out=tmp_path / "run",
        num_frames=2,
        token_cache=tmp_path / "tokens",
        augment=False,
        keep_best=True,
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=1),
        loop=LoopConfig(steps=8, batch_size=4, checkpoint_every=3, evaluate_every=2),
        device="cpu",
    )


HELD_OUT_TOP1 = {2: 0.25, 4: 0.5, 6: 0.5, 8: 0.375}


def with_given_figures(monkeypatch: pytest.MonkeyPatch, *, offered: dict[int, dict[str, torch.Tensor]]) -> None:
    """Held-out figures as in HELD_OUT_TOP1; `offered` gets the weights that were evaluated at each step."""
    real = BestWeights.offer

    def offer(self: BestWeights, model: nn.Module, *, values: dict[str, float], step: int) -> None:
        offered[step] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        real(self, model, values=values | {"top1": HELD_OUT_TOP1[step]}, step=step)

    monkeypatch.setattr(BestWeights, "offer", offer)


@pytest.mark.slow
@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_a_run_ends_with_the_best(
    config: ProbeConfig, monkeypatch: pytest.MonkeyPatch, ema_decay: float | None, tmp_path: Path
) -> None:
    """With averaged weights it is those that are evaluated, kept, tested and saved."""
    config = replace(config, optim=replace(config.optim, ema_decay=ema_decay))
    offered: dict[int, dict[str, torch.Tensor]] = {}
    tested: list[torch.Tensor] = []
    real = classify.write_test

    def write_test(result: Any, **options: Any) -> None:
        tested.append(torch.from_numpy(result.scores))
        real(result, **options)

    monkeypatch.setattr(classify, "write_test", write_test)
    with_given_figures(monkeypatch, offered=offered)
    evaluation = run_probe(config).evaluation
    saved = load_file(config.out / "model" / "model.safetensors")
    assert all(torch.equal(saved[name], offered[4][name]) for name in saved)
    assert not torch.equal(saved["head.classifier.weight"], offered[6]["head.classifier.weight"])
    assert evaluation is not None and evaluation["num_videos"] == 10  # of the test split, not the 5 held out
    monkeypatch.undo()
    last = run_probe(replace(config, keep_best=False, out=tmp_path / "last"))
    saved_last = load_file(last.model_folder / "model.safetensors")
    assert all(torch.equal(saved_last[name], offered[8][name]) for name in saved_last)


class Killed(BaseException):
    """Stands for the process ending without a chance to do anything."""


@pytest.mark.slow
def test_death_around_a_checkpoint(config: ProbeConfig, tmp_path: Path) -> None:
    """Before the checkpoint is begun, when it is whole but older files are not gone yet, and before the model is."""
    whole = replace(config, out=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        with_given_figures(patch, offered={})
        run_probe(whole)
    expected = (whole.out / "model" / "model.safetensors").read_bytes()
    places = [(Checkpoints, "save"), (BestWeights, "after_checkpoint"), (BestWeights, "load_into")]
    for owner, name in places:
        for number in (1, 2, 3) if name != "load_into" else (1,):
            dying = replace(config, out=tmp_path / f"{name}-{number}")
            with pytest.MonkeyPatch.context() as patch:
                with_given_figures(patch, offered={})
                with pytest.MonkeyPatch.context() as deadly:
                    kill_in(deadly, owner=owner, name=name, number=number)
                    with pytest.raises(Killed):
                        run_probe(dying)
                run_probe(dying)
            assert (dying.out / "model" / "model.safetensors").read_bytes() == expected, f"{name} {number}"


def kill_in(patch: pytest.MonkeyPatch, *, owner: type, name: str, number: int) -> None:
    real, calls = getattr(owner, name), iter(range(1, 100))

    def dying(*args: Any, **options: Any) -> Any:
        if next(calls) == number:
            raise Killed
        return real(*args, **options)

    patch.setattr(owner, name, dying)
