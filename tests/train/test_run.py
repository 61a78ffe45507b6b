"""The folder of a run: what belongs to other settings goes, what could not be read is kept once, whole files only.

And what a log line holds, with its times by a clock that the test turns.
"""

import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coca_video.data.loader import SampleKey, Unreadable
from coca_video.models.coca import CoCaConfig
from coca_video.models.image import VitConfig
from coca_video.train import window
from coca_video.train.classify import run_probe
from coca_video.train.log import RunLog
from coca_video.train.loop import LoopConfig, Training, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer
from coca_video.train.pretrain import PairsConfig, PretrainConfig, run_pretraining
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.run import Run, read_unreadable
from coca_video.train.window import Sum, peak_memory

CONFIG = LoopConfig(steps=5)


def test_settings_may_change_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    """A tokenizer of other settings must not slip into the run that takes the folder over."""
    run = Run(tmp_path, config=CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    run.log.write("train", step=1, values={"loss": 1.0})
    run.note_unreadable([Unreadable("a", "broken")])
    run.log.close()
    Run(tmp_path, config=replace(CONFIG, num_workers=3))
    assert (tmp_path / "tokenizer.json").exists() and run.log.records()
    other = Run(tmp_path, config=replace(CONFIG, steps=6))
    assert not (tmp_path / "tokenizer.json").exists() and not other.log.records() and other.unreadable == {}
    assert not list((tmp_path / "tensorboard").iterdir())
    model = nn.Linear(2, 2)
    other.checkpoints.save(1, model=model, optimizer=build_optimizer(model, config=OptimConfig()), extra={})
    with pytest.raises(ValueError, match=r"started with other settings \(steps: 6 -> 7\)"):
        Run(tmp_path, config=replace(CONFIG, steps=7))
    Run(tmp_path, config=replace(CONFIG, steps=6))


def test_unreadable_samples_are_kept_once_over_starts(tmp_path: Path) -> None:
    run = Run(tmp_path, config=CONFIG)
    run.note_unreadable([Unreadable("a", "x.mp4: cut, at\nthe end"), Unreadable("b", 'y "z".mp4: empty')])
    run.note_unreadable([Unreadable("a", "said again")])
    again = Run(tmp_path, config=CONFIG)
    assert again.unreadable == {"a": "x.mp4: cut, at\nthe end", "b": 'y "z".mp4: empty'}
    assert read_unreadable(tmp_path / "none.csv") == {}
    assert not list(tmp_path.glob(".*partial"))


def test_a_damaged_checkpoint_names_itself_and_the_one_before_is_used(tmp_path: Path) -> None:
    run = Run(tmp_path, config=CONFIG)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, config=OptimConfig())
    for step in (2, 4):
        run.checkpoints.save(step, model=model, optimizer=optimizer, extra={})
    newest = run.checkpoints.newest()
    assert newest is not None
    (shard,) = newest.glob("*.distcp")
    shard.write_bytes(b"")
    with pytest.raises(ValueError, match=r"step-00000004 is damaged .*; delete that folder to go on"):
        run.checkpoints.restore(model=model, optimizer=optimizer, extra={})
    shard.unlink()
    with pytest.raises(ValueError, match=r"step-00000004 is damaged .*; delete that folder to go on"):
        run.checkpoints.restore(model=model, optimizer=optimizer, extra={})
    shutil.rmtree(newest)
    assert run.checkpoints.restore(model=model, optimizer=optimizer, extra={}) == 2


def test_only_the_two_newest_checkpoints_are_kept_and_a_partial_one_is_none(tmp_path: Path) -> None:
    run = Run(tmp_path, config=CONFIG)
    model = nn.Linear(2, 2)
    optimizer = build_optimizer(model, config=OptimConfig())
    for step in (2, 4, 6):
        run.checkpoints.save(step, model=model, optimizer=optimizer, extra={})
    (tmp_path / "checkpoints" / "step-00000008").mkdir()  # no .metadata: killed before its commit mark
    names = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*") if (path / ".metadata").exists())
    assert names == ["step-00000004", "step-00000006"]
    assert run.checkpoints.newest() == tmp_path / "checkpoints" / "step-00000006"


def train_lines(folder: Path) -> list[dict[str, Any]]:
    return [record for record in RunLog(folder / "metrics.jsonl").records() if record["kind"] == "train"]


def test_what_a_line_of_each_verb_holds(pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    common = {"kind", "step", "loss", "learning_rate", "gradient_norm"}
    measured = {"samples_per_second", "data_wait_share", "memory_mb"}
    short = LoopConfig(steps=2, batch_size=4, log_every=1)
    pairs, pretraining = PairsConfig(train=pictures), tmp_path / "pretrain"
    run_pretraining(PretrainConfig(model=CoCaConfig.tiny(), pairs=pairs, out=pretraining, loop=short, device="cpu"))
    clips, encoder = ClipsConfig(train=drawn_clips, test_split=None), RandomEncoder(image=VitConfig.tiny())
    probe = tmp_path / "probe"
    run_probe(ProbeConfig(encoder=encoder, clips=clips, num_frames=1, out=probe, loop=short, device="cpu"))
    for folder, own in ((pretraining, {"contrastive_loss", "caption_loss", "temperature"}), (probe, {"top1"})):
        assert [line.keys() for line in train_lines(folder)] == [common | measured | own] * 2


@dataclass
class Clock:
    """Stands for the module `time` in the loop; what takes time turns it."""

    now: float = 1000.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class SlowPoints:
    """Samples that take 0.25 s each to read."""

    clock: Clock

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: SampleKey) -> Tensor:
        self.clock.now += 0.25
        return torch.tensor([float(key.index)])


def test_times_are_those_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 4 take 1 s to wait for and updates 3 s; 100 s of evaluating and 1,000 s of saving do not count.

    Nor do the 10,000 s of restoring. The first line is over 2 updates, the last over one.
    """
    clock = Clock()
    monkeypatch.setattr(window, "time", clock)
    model = nn.Linear(1, 1)
    optim = OptimConfig(warmup_steps=0)
    optimizer = build_optimizer(model, config=optim)

    def takes(seconds: float, result: Any) -> Any:
        clock.now += seconds
        return result

    training = Training(
        model=model,
        optimizer=optimizer,
        step=lambda _: takes(3.0, {"loss": Sum(1.0, 1)}),
        dataset=SlowPoints(clock),
        collate=torch.stack,
        evaluate=lambda: takes(100.0, {"top1": 0.5}),
    )
    config = LoopConfig(steps=3, batch_size=4, log_every=2, checkpoint_every=1, evaluate_every=1)
    run = Run(tmp_path, config=config)
    for name, seconds in (("save", 1000.0), ("restore", 10_000.0)):
        real = getattr(run.checkpoints, name)
        monkeypatch.setattr(
            run.checkpoints, name, lambda *a, _real=real, _seconds=seconds, **o: takes(_seconds, _real(*a, **o))
        )
    run_loop(training, config=config, optim=optim, run=run)
    lines = train_lines(tmp_path)
    assert [line["step"] for line in lines] == [2, 3]
    assert [line["samples_per_second"] for line in lines] == [8 / 8, 4 / 4]
    assert [line["data_wait_share"] for line in lines] == [2 / 8, 1 / 4]


def test_memory_is_the_peak_of_the_process_in_megabytes() -> None:
    resource = pytest.importorskip("resource", reason="Windows has no getrusage")
    unit = 1 if sys.platform == "darwin" else 1024
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    block = torch.ones(before // 4 + 50_000_000 // 4)  # as much as the peak and 50 MB more
    peak = peak_memory(torch.device("cpu"))
    assert peak >= (block.nbytes) / 1e6 >= before / 1e6
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    assert peak <= after / 1e6
    del block
    assert peak_memory(torch.device("cpu")) >= peak
