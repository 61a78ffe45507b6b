"""Checkpoints to resume from: torch.distributed.checkpoint folders, written under another name, renamed when whole."""

import pickle
import re
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from coca_video.distributed import on_main, world_size

# Frozen weights come from where the run took them (and are compared by fingerprint), so they are not written again.
TRAINABLE = StateDictOptions(ignore_frozen_params=True, strict=False)
NUM_KEPT = 2  # the newest, and the one before it in case a disk fails


class Checkpoints:
    """The folder `checkpoints/` of a run: `step-00000500/` holds the state after 500 updates."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def newest(self) -> Path | None:
        """The folder of the newest whole checkpoint, or None."""
        found = self._whole()
        return found[-1] if found else None

    def _whole(self) -> list[Path]:
        names = [path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name)]
        return sorted(path for path in names if (path / ".metadata").is_file())

    def save(
        self,
        step: int,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, str],
        averages: dict[str, Tensor] | None = None,
    ) -> None:
        """Writes the state after `step` updates, then removes all but the newest `NUM_KEPT`.

        `averages` are averaged weights by name, where the run keeps them. Every rank writes its part of sharded
        weights, into a folder that all of them see; rank 0 renames it when all are done.
        """
        partial, final = self.folder / ".partial", self.folder / f"step-{step:08d}"
        on_main(lambda: self._begin(partial))
        model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINABLE)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "step": step, "extra": extra}
        if averages is not None:
            state["averages"] = averages
        with _one_process():
            state_dict_saver.save(state, checkpoint_id=partial, no_dist=world_size() == 1)
        on_main(lambda: self._finish(partial, final=final))

    def _begin(self, partial: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)

    def _finish(self, partial: Path, *, final: Path) -> None:
        if final.exists():
            shutil.rmtree(final)
        partial.rename(final)
        for old in self._whole()[:-NUM_KEPT]:
            shutil.rmtree(old)

    def restore(
        self,
        *,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        extra: dict[str, str],
        averages: dict[str, Tensor] | None = None,
    ) -> int:
        """Brings all that it is given to the newest checkpoint, in place; returns its step, 0 if there is none.

        The number of ranks may be another than when it was written.
        """
        path = self.newest()
        if path is None:
            return 0
        model_state, optimizer_state = get_state_dict(model, optimizer, options=TRAINABLE)
        state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state, "step": 0, "extra": extra}
        if averages is not None:
            state["averages"] = averages
        try:
            with _one_process():
                state_dict_loader.load(state, checkpoint_id=path, no_dist=world_size() == 1)
        except (CheckpointException, OSError, EOFError, AssertionError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"The checkpoint {path} is damaged ({type(error).__name__}); delete that folder to go on from the one "
                "before it, or from the start if there is none."
            ) from error
        set_state_dict(
            model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=TRAINABLE
        )
        extra.update(state["extra"])
        return int(state["step"])


@contextmanager
def _one_process() -> Iterator[None]:
    """Silences DCP's remark that it runs in one process: here it is meant to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield
