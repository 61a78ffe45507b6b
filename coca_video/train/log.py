"""The log of a run: one JSON line a record, the same for TensorBoard, and the curves drawn from it."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coca_video.distributed import is_main

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, float | int | str]
KEYS = ("kind", "step")
KINDS = (("train", "tab:blue", ""), ("evaluation", "tab:orange", "o"))


class RunLog:
    """`metrics.jsonl`: records with "kind" (train, evaluation) and "step" = updates done. Every write is flushed.

    The folder `tensorboard/` beside it shows the same records as "train/loss", "evaluation/top1". Each start of a run
    adds an event file there, which tells viewers to forget the steps that are done again.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensorboard = path.parent / "tensorboard"
        self._events: SummaryWriter | None = None
        self._purge_step: int | None = None

    def write(self, kind: str, *, step: int, values: dict[str, float]) -> None:
        """Appends one record, on rank 0; the others write nothing."""
        if not is_main():
            return
        record: Record = {"kind": kind, "step": step, **values}
        with self.path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._events is None:
            self._events = _event_writer(self.tensorboard, purge_step=self._purge_step)
        for name, value in values.items():
            self._events.add_scalar(f"{kind}/{name}", value, global_step=step)
        self._events.flush()

    def records(self) -> list[Record]:
        """All records in order; a last line cut by a kill is dropped."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate_after(self, step: int) -> None:
        """Forgets what was logged past `step`: the steps that a resumed run will do again. Rank 0 does it."""
        if not is_main():
            return
        kept = [record for record in self.records() if int(record["step"]) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.path)
        self.close()
        self._purge_step = step + 1

    def remove(self) -> None:
        """Removes all records."""
        self.close()
        self.path.unlink(missing_ok=True)
        for path in self.tensorboard.glob("events.out.tfevents.*"):
            path.unlink()

    def close(self) -> None:
        """Closes the event file; a later write opens another."""
        if self._events is not None:
            self._events.close()
            self._events, self._purge_step = None, None


def _event_writer(folder: Path, *, purge_step: int | None) -> "SummaryWriter":
    """A new event file; viewers drop what older files show from `purge_step` on."""
    from torch.utils.tensorboard import SummaryWriter  # here: nothing else needs TensorBoard

    return SummaryWriter(str(folder), purge_step=purge_step)


@dataclass(frozen=True, kw_only=True)
class _Line:
    """A value over steps; `number` says of which probe it is, where there are many."""

    points: list[tuple[float, float]]
    colour: Any
    marker: str
    number: str | None = None


def draw_curves(records: list[Record], *, path: Path) -> None:
    """One small plot for each logged value over steps, all in one PNG; training and evaluation in different colours.

    The values of many probes ("loss/00", "loss/01" and so on) share a plot for training and one for evaluation, in
    colours that go from dark to light by number.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = _panels(records)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (title, lines) in zip(axes, panels.items(), strict=False):
        for line in lines:
            size = 6 if line.number is None else 3
            axis.plot(
                *zip(*line.points, strict=True), color=line.colour, marker=line.marker, markersize=size, linewidth=1.2
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=colour, marker=marker, label=kind) for kind, colour, marker in KINDS]
    numbered = {line.number: line.colour for lines in panels.values() for line in lines if line.number is not None}
    handles += [Line2D([], [], color=colour, label=number) for number, colour in numbered.items()]
    figure.legend(handles=handles, loc="outside lower right", ncols=min(len(handles), 4 * columns), fontsize=8)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _panels(records: list[Record]) -> dict[str, list[_Line]]:
    """The lines of each small plot by its title, in the order in which values were first logged."""
    from matplotlib import colormaps

    names = [name for name in dict.fromkeys(name for record in records for name in record) if name not in KEYS]
    numbers = sorted({number for name in names if (number := _split(name)[1]) is not None}, key=int)
    shades = colormaps["viridis"](np.linspace(0, 0.95, len(numbers)))
    panels: dict[str, list[_Line]] = {}
    for name, (kind, colour, marker) in itertools.product(names, KINDS):
        points = [
            (float(record["step"]), float(record[name]))
            for record in records
            if record["kind"] == kind and name in record
        ]
        if points:
            base, number = _split(name)
            title = base if number is None else f"{base} ({kind})"
            shade = colour if number is None else shades[numbers.index(number)]
            panels.setdefault(title, []).append(_Line(points=points, colour=shade, marker=marker, number=number))
    return panels


def _split(name: str) -> tuple[str, str | None]:
    """("loss", "03") of "loss/03", and ("loss", None) of "loss"."""
    base, _, number = name.rpartition("/")
    return (base, number) if base and number.isdigit() else (name, None)
