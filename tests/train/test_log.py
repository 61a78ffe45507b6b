"""The log: flushed lines, a line cut by a kill, forgetting what will be done again, curves."""

from pathlib import Path

import numpy as np
from PIL import Image

from coca_video.train.log import RunLog, draw_curves


def test_records_survive_a_cut_line_and_are_forgotten_past_a_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "metrics.jsonl")
    assert log.records() == []
    for step in (2, 4, 6):
        log.write("train", step=step, values={"loss": 0.1 * step})
    with log.path.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in log.records()] == [2, 4, 6]
    log.truncate_after(4)
    assert log.records() == [
        {"kind": "train", "step": 2, "loss": 0.2},
        {"kind": "train", "step": 4, "loss": 0.4},
    ]


def test_curves_draw_each_value_in_the_colour_of_its_kind(tmp_path: Path) -> None:
    records = [{"kind": "train", "step": step, "loss": 1 / (step + 1), "rate": 2.0 + step} for step in range(5)]
    records.append({"kind": "evaluation", "step": 4, "top1": 0.5})
    draw_curves(records, path=tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        columns = np.array_split(np.asarray(picture.convert("RGB")), 3, axis=1)  # loss, rate, top1 from left to right
    blue, orange = (31, 119, 180), (255, 127, 14)
    columns = [part[:-30] for part in columns]  # above the legend
    counts = [[int((part == colour).all(axis=2).sum()) for part in columns] for colour in (blue, orange)]
    assert counts[0][0] > 50 and counts[0][1] > 50 and counts[0][2] == 0
    assert counts[1][0] == counts[1][1] == 0 and counts[1][2] > 10
    draw_curves([], path=tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
