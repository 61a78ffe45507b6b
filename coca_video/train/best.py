"""The weights of the best evaluation so far, as files beside the checkpoints, which say which of them is meant."""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from coca_video.distributed import on_main


class BestWeights:
    """Keeps in `folder` the weights of the evaluation with the highest `metric`, the first among equals.

    The file of a better evaluation is written whole before the checkpoint that names it, and the files that a kept
    checkpoint names stay: what a run goes on from, after a kill at any moment, is there. Frozen weights are not in it.
    """

    def __init__(self, folder: Path, *, metric: str) -> None:
        self.folder = folder
        self.metric = metric
        self.step: int | None = None
        self.value = -float("inf")
        self._named_before: int | None = None  # by the newest checkpoint

    def offer(self, model: nn.Module, *, values: dict[str, float], step: int) -> None:
        """Keeps the weights inside `model` if the evaluation `values` after update `step` is the best. All ranks call.

        ValueError when the metric is not among the values.
        """
        if self.metric not in values:
            raise ValueError(f"The best weights are chosen by {self.metric}; the evaluation has {', '.join(values)}.")
        if values[self.metric] <= self.value:
            return
        self.step, self.value = step, values[self.metric]
        state = {name: _whole(tensor) for name, tensor in _trained(model).items()}
        on_main(lambda: self._write(state, path=self._path(step)))

    def load_into(self, model: nn.Module) -> None:
        """Leaves the best weights in `model`; ValueError where their file is gone."""
        assert self.step is not None, "there was no evaluation"
        path = self._path(self.step)
        if not path.is_file():
            raise ValueError(f"The best weights, {path}, are gone; start another --out.")
        kept = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for name, tensor in _trained(model).items():
                tensor.copy_(_like(kept[name], tensor=tensor))

    def dump(self) -> str:
        """Which file is meant, for a checkpoint."""
        return json.dumps({"step": self.step, "value": self.value})

    def load(self, dumped: str) -> None:
        """Takes up what a checkpoint says."""
        said = json.loads(dumped)
        self.step, self.value = said["step"], said["value"]
        self._named_before = self.step

    def after_checkpoint(self) -> None:
        """Removes the files that neither the checkpoint just written nor the one before it names."""
        on_main(self._clean)
        self._named_before = self.step

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}.pt"

    def _write(self, state: dict[str, Tensor], *, path: Path) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def _clean(self) -> None:
        named = [self._path(step).name for step in (self.step, self._named_before) if step is not None]
        for path in self.folder.glob("*.pt"):
            if path.name not in named:
                path.unlink()


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trainable weights and buffers by name, the tensors themselves."""
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    state: dict[str, Tensor] = model.state_dict()
    return {name: tensor for name, tensor in state.items() if name not in frozen}


def _whole(tensor: Tensor) -> Tensor:
    # A copy of its own: a view would be saved with all that it is a view of.
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().cpu().clone()


def _like(value: Tensor, *, tensor: Tensor) -> Tensor:
    """`value` sharded as `tensor` is."""
    if not isinstance(tensor, DTensor):
        return value
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements)
