"""The folder of a run: what it was asked for, log and curves, checkpoints, what it could not read, its model."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from coca_video.config import differing_fields, to_json
from coca_video.data.loader import Unreadable
from coca_video.distributed import is_main, on_main
from coca_video.hub import TOKENIZER
from coca_video.train.checkpoint import Checkpoints
from coca_video.train.log import RunLog, draw_curves

UNREADABLE = "unreadable.csv"
# These say how fast and where a run goes. (Another device rounds otherwise; a run may still move to it.)
FREE_TO_CHANGE = frozenset({"out", "device", "num_workers", "strategy"})


class Run:
    """Opens `folder` for `config`: a new one, or one to go on with, which must have been started with the same config.

    `identity` adds facts that must be the same again: fingerprints of the data and of a frozen encoder. All ranks open
    it together; rank 0 alone writes, and what is wrong is raised on every one.
    """

    def __init__(self, folder: Path, *, config: object, identity: dict[str, str] | None = None) -> None:
        self.folder = folder
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.log = RunLog(folder / "metrics.jsonl")
        on_main(lambda: self._open({**to_json(config), **(identity or {})}))
        self.unreadable = read_unreadable(folder / UNREADABLE)

    def _open(self, resolved: dict[str, Any]) -> None:
        """Makes the folder and writes the config; ValueError if it is of a run with another one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "config.json"
        before = json.loads(path.read_text()) if path.is_file() else resolved
        differing = differing_fields(before, resolved, ignored=FREE_TO_CHANGE)
        if differing and (self.checkpoints.newest() is not None or self.is_finished):
            raise ValueError(
                f"The run {self.folder} was started with other settings ({'; '.join(differing)}). "
                "Give the same ones to go on with it, or another --out for a new run."
            )
        if differing:  # it never came to a checkpoint: what it left belongs to the other settings
            for name in (TOKENIZER, UNREADABLE):
                (self.folder / name).unlink(missing_ok=True)
            self.log.remove()
        write_atomically(path, json.dumps(resolved, indent=2) + "\n")

    @property
    def model_folder(self) -> Path:
        """Where the trained model goes when the run is finished."""
        return self.folder / "model"

    @property
    def is_finished(self) -> bool:
        """Whether the model has been written."""
        return (self.model_folder / "model.safetensors").is_file()

    def note_unreadable(self, samples: list[Unreadable]) -> None:
        """Keeps each sample that could not be read once, with its cause, in `unreadable.csv`."""
        new = {sample.key: sample.cause for sample in samples if sample.key not in self.unreadable}
        if new:
            self.unreadable.update(new)
        if new and is_main():
            write_unreadable(self.folder / UNREADABLE, samples=self.unreadable)

    def draw_curves(self) -> None:
        """Draws `curves.png` from the log."""
        if is_main():
            draw_curves(self.log.records(), path=self.folder / "curves.png")


def read_unreadable(path: Path) -> dict[str, str]:
    """What `write_unreadable` wrote; empty where there is no file."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        return dict(list(csv.reader(file))[1:])


def write_unreadable(path: Path, *, samples: dict[str, str]) -> None:
    """A CSV of what could not be read and why."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["sample", "cause"])
    writer.writerows(samples.items())
    write_atomically(path, text.getvalue())


def write_atomically(path: Path, text: str) -> None:
    """Writes under another name and renames: a kill leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)
