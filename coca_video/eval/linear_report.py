"""The table of a linear evaluation, as text and as JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from coca_video.eval.classification import free_name
from coca_video.eval.linear import EvaluatedRow


def table_lines(rows: Sequence[EvaluatedRow]) -> list[str]:
    """Lines of text; the last column is there if some test video could not be read."""
    some_unread = any(row.metrics.num_unreadable for row in rows)
    cells = [["method", "features", "chosen", "held-out", "top-1", "95% interval", "top-5"]]
    cells[0] += ["top-1 of all"] if some_unread else []
    for row in rows:
        metrics, (low, high) = row.metrics, row.interval
        cells.append(
            [
                row.method + ("" if row.has_converged else " *"),
                row.features,
                f"{row.parameter} {row.chosen:g}",
                f"{row.held_out_top1[row.chosen]:.4f}",
                f"{metrics.top1:.4f}",
                f"{low:.4f} to {high:.4f}",
                f"{metrics.top5:.4f}",
                *([f"{metrics.top1_unreadable_wrong:.4f}"] if some_unread else []),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    if not all(row.has_converged for row in rows):
        lines.append("* the solver stopped at --max-iterations before it converged")
    if some_unread:
        lines.append("top-1 of all counts test videos that could not be read as wrong; the others leave them out")
    return lines


def write_rows(
    folder: Path,
    *,
    rows: Sequence[EvaluatedRow],
    facts: dict[str, Any],
    num_held_out: int,
    unreadable: dict[str, str],
) -> Path:
    """Writes linear.json, or linear-2.json where that is of other `facts`; returns its path.

    Metrics are in [0, 1]; top1_interval is the 95% interval; unreadable: causes by name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plain = json.loads(json.dumps(facts, default=str))
    path = folder / f"{free_name(folder, name='linear', facts=plain)}.json"
    table = [
        {
            "method": row.method,
            "features": row.features,
            "parameter": row.parameter,
            "chosen": row.chosen,
            "held_out_top1": [[value, top1] for value, top1 in row.held_out_top1.items()],
            "iterations": row.iterations,
            "has_converged": row.has_converged,
            "top1_interval": row.interval,
            **{name: value for name, value in asdict(row.metrics).items() if not name.startswith("per_class")},
        }
        for row in rows
    ]
    document = {**plain, "num_held_out": num_held_out, "rows": table, "unreadable": unreadable}
    path.write_text(json.dumps(document, indent=2) + "\n")
    return path
