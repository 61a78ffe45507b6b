"""The log of a run: one JSON line a record, and the curves drawn from it."""

import json
from pathlib import Path

Record = dict[str, float | int | str]
KEYS = ("kind", "step")
KINDS = (("train", "tab:blue", ""), ("evaluation", "tab:orange", "o"))


class RunLog:
    """`metrics.jsonl`: records with "kind" (train, evaluation) and "step" = updates done. Every write is flushed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, kind: str, *, step: int, values: dict[str, float]) -> None:
        """Appends one record."""
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")

    def records(self) -> list[Record]:
        """All records in order; a last line cut by a kill is dropped."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def truncate_after(self, step: int) -> None:
        """Forgets what was logged past `step`: the steps that a resumed run will do again."""
        kept = [record for record in self.records() if int(record["step"]) <= step]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.replace(self.path)


def draw_curves(records: list[Record], *, path: Path) -> None:
    """One small plot for each logged value over steps, all in one PNG; training and evaluation in different colours."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    names = [name for name in dict.fromkeys(name for record in records for name in record) if name not in KEYS]
    if not names:
        return
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.8 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, name in zip(axes, names, strict=False):
        for kind, colour, marker in KINDS:
            points = [(record["step"], record[name]) for record in records if record["kind"] == kind and name in record]
            if points:
                axis.plot(*zip(*points, strict=True), color=colour, marker=marker, linewidth=1.2)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    handles = [Line2D([], [], color=colour, marker=marker, label=kind) for kind, colour, marker in KINDS]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(KINDS), fontsize=8)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
