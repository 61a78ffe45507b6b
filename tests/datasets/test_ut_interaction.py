"""UT-Interaction's recipe: on a made-up copy of the layout against a manifest written by hand, and on the real one."""

import csv
import runpy
from pathlib import Path

import pytest

from coca_video.data.manifest import read_classes, read_manifest

RECIPE = Path(__file__).resolve().parents[2] / "datasets" / "ut_interaction"
prepare = runpy.run_path(str(RECIPE / "prepare.py"))["prepare"]
CLASSES = read_classes(RECIPE / "classes.txt")


def lay_out(folder: Path, *, num_clips: int = 120) -> Path:
    """Files and clips.csv as the dataset's copy has them: clip n is of class n % 6, in sequence 1 + n // 6."""
    lines = ["path,label,label_id,set,sequence,split"]
    for n in range(num_clips):
        label, sequence = CLASSES[n % 6], 1 + n // 6
        name = f"clips/{label}/set{1 + (sequence > 10)}_seq{sequence:02d}_{n:02d}.mp4"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
        split = "test" if (sequence - 1) % 10 >= 7 else "train"
        lines.append(f"{name},{label},{n % 6},{1 + (sequence > 10)},{sequence},{split}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_manifest_of_a_made_up_copy(tmp_path: Path) -> None:
    path = prepare(lay_out(tmp_path / "raw"), out=tmp_path / "out")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 120
    assert rows[64] == {
        "path": "../raw/clips/punching/set2_seq11_64.mp4",
        "label": "punching",
        "video_id": "set2_seq11_64",
        "start_seconds": "",
        "end_seconds": "",
        "split": "train",
        "set": "2",
        "sequence": "11",
    }
    assert path.with_name("classes.txt").read_text().splitlines() == [
        "shaking_hands",
        "hugging",
        "kicking",
        "pointing",
        "punching",
        "pushing",
    ]


def test_wrong_counts_and_missing_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 120 clips, 20 a class, in 20 sequences; got 119 clips"):
        prepare(lay_out(tmp_path / "short", num_clips=119), out=tmp_path / "out")
    whole = lay_out(tmp_path / "whole")
    next((whole / "clips" / "hugging").iterdir()).unlink()
    with pytest.raises(ValueError, match="names 1 of 120 files that are not on disk"):
        prepare(whole, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_real_one(data_folder: Path, tmp_path: Path) -> None:
    manifest = read_manifest(prepare(data_folder / "ut_interaction", out=tmp_path))
    assert (len(manifest.select(split="train").rows), len(manifest.select(split="test").rows)) == (83, 37)
    assert manifest.classes == CLASSES
    sample = (RECIPE / "sample.csv").read_text().splitlines()
    with (tmp_path / "manifest.csv").open() as file:
        for ours, theirs in zip(sample, file, strict=False):
            assert theirs.strip().endswith(ours)
