"""The log: flushed lines, a line cut by a kill, forgetting what will be done again, TensorBoard's copy, curves."""

import json
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
from matplotlib import colormaps
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from coca_video.train.log import Record, RunLog, draw_curves


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
    log.close()


Curves = dict[str, list[tuple[int, float]]]


def written(path: Path) -> Curves:
    """The curves of metrics.jsonl, in float32, which is what TensorBoard keeps."""
    curves: Curves = defaultdict(list)
    for record in map(json.loads, path.read_text().splitlines()):
        for name in record.keys() - {"kind", "step"}:
            curves[f"{record['kind']}/{name}"].append((record["step"], float(np.float32(record[name]))))
    return curves


def shown(viewer: EventAccumulator) -> Curves:
    """The curves that a viewer of the event files shows by now."""
    viewer.Reload()
    return {
        tag: [(point.step, point.value) for point in viewer.Scalars(tag)]
        for tag in viewer.Tags()["scalars"]
        if viewer.Scalars(tag)
    }


def viewer_of(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})


def write_steps(log: RunLog, *, steps: range, factor: float) -> None:
    for step in steps:
        log.write("train", step=step, values={"loss": factor / (step + 1), "learning_rate": 1e-3 * step})
        if step % 4 == 0:
            log.write("evaluation", step=step, values={"image_to_text_recall@1": 0.1 * step * factor})


def test_tensorboard_shows_the_lines_at_once(tmp_path: Path) -> None:
    """After every write, with the event file still open."""
    log = RunLog(tmp_path / "metrics.jsonl")
    viewer = viewer_of(tmp_path)
    for step in range(1, 6):
        write_steps(log, steps=range(step, step + 1), factor=1 / 3)
        assert shown(viewer) == written(log.path)
    assert list(shown(viewer)) == ["train/loss", "train/learning_rate", "evaluation/image_to_text_recall@1"]
    log.close()


@pytest.mark.slow
def test_tensorboard_shows_a_repeated_step_once(tmp_path: Path) -> None:
    """A run killed at step 10 goes on from step 6: for a new viewer, and for one that has watched all along."""
    first = RunLog(tmp_path / "metrics.jsonl")
    watching = viewer_of(tmp_path)
    write_steps(first, steps=range(1, 11), factor=1.0)
    assert shown(watching) == written(first.path)
    time.sleep(1.0)  # event files are read in the order of the second they were opened in
    second = RunLog(tmp_path / "metrics.jsonl")  # the first is not closed: it was killed
    second.truncate_after(6)
    for last in (7, 12):
        write_steps(second, steps=range(7 if last == 7 else 8, last + 1), factor=2.0)
        for viewer in (watching, viewer_of(tmp_path)):
            assert shown(viewer) == written(second.path)
            assert [step for step, _ in shown(viewer)["train/loss"]] == list(range(1, last + 1))
    second.close()
    time.sleep(1.0)
    write_steps(second, steps=range(13, 15), factor=3.0)  # a file opened later in the same start drops nothing
    for viewer in (watching, viewer_of(tmp_path)):
        assert shown(viewer) == written(second.path)
    first.close()
    second.remove()
    assert not second.records() and not list((tmp_path / "tensorboard").iterdir())


def test_tensorboard_is_not_imported_before_something_is_logged() -> None:
    program = "import sys, coca_video.train.log; print('tensorboard' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


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


def test_curves_of_many_probes_share_a_plot(tmp_path: Path) -> None:
    """Six values a line make three plots; each has the two ends of the colour map, and none the other kind's."""
    records: list[Record] = []
    for step in (2, 4, 6):
        losses: Record = {f"loss/{number:02d}": 1 / (number + step) for number in range(6)}
        for kind in ("train", "evaluation"):
            own: Record = {"kind": kind, "step": step}
            records.append(own | losses)
        records[-1]["best_top1"] = 0.5
    draw_curves(records, path=tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.size == (round(4.2 * 3 * 110), round(2.8 * 110))
        columns = np.array_split(np.asarray(picture.convert("RGB")), 3, axis=1)  # losses, losses held out, best_top1
    columns = [part[:-60] for part in columns]  # above the legend
    first, last = ([round(255 * share) for share in colormaps["viridis"](place)[:3]] for place in (0.0, 0.95))
    counts = [[int((part == colour).all(axis=2).sum()) for part in columns] for colour in (first, last, [255, 127, 14])]
    assert min(counts[0][:2] + counts[1][:2]) > 30 and counts[0][2] == counts[1][2] == 0
    assert counts[2][:2] == [0, 0] and counts[2][2] > 10
