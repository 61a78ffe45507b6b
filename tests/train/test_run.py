"""The folder of a run: what belongs to other settings goes, what could not be read is kept once, whole files only."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from torch import nn

from coca_video.data.loader import Unreadable
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig, build_optimizer
from coca_video.train.run import Run, read_unreadable

CONFIG = LoopConfig(steps=5)


def test_settings_may_change_until_there_is_a_checkpoint(tmp_path: Path) -> None:
    """A tokenizer of other settings must not slip into the run that takes the folder over."""
    run = Run(tmp_path, config=CONFIG)
    (tmp_path / "tokenizer.json").write_text("{}")
    run.log.write("train", step=1, values={"loss": 1.0})
    run.note_unreadable([Unreadable("a", "broken")])
    Run(tmp_path, config=replace(CONFIG, num_workers=3))
    assert (tmp_path / "tokenizer.json").exists() and run.log.records()
    other = Run(tmp_path, config=replace(CONFIG, steps=6))
    assert not (tmp_path / "tokenizer.json").exists() and not other.log.records() and other.unreadable == {}
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
