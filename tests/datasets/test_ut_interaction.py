"""UT-Interaction's recipe: on a made-up copy of the layout against entries written by hand, and on the real one."""

from pathlib import Path

import pytest
from tqdm import tqdm

from coca_video.data.manifest import read_manifest
from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "ut_interaction"
RECIPE = load_recipe(FOLDER)
CLASSES = recipe_classes(RECIPE, folder=FOLDER, version="1")


def lay_out(folder: Path, *, num_clips: int = 120, columns: str = "path,label,label_id,set,sequence,split") -> Path:
    """clips.csv as the dataset's copy has it: clip n is of class n % 6, in sequence 1 + n // 6."""
    folder.mkdir()
    lines = [columns]
    for n in range(num_clips):
        label, sequence = CLASSES[n % 6], 1 + n // 6
        name = f"clips/{label}/set{1 + (sequence > 10)}_seq{sequence:02d}_{n:02d}.mp4"
        split = "test" if (sequence - 1) % 10 >= 7 else "train"
        lines.append(f"{name},{label},{n % 6},{1 + (sequence > 10)},{sequence},{split}")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    return folder


def clips(*annotations: Path, videos: Path = Path("ut_interaction")) -> list[Entry]:
    return RECIPE.list_clips(Request(annotations=annotations, videos=videos, version="1", classes=CLASSES))


def test_entries_of_a_made_up_copy(tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path / "raw") / "clips.csv")
    assert len(entries) == 120
    assert entries[64] == Entry(
        video_id="set2_seq11_64",
        label="punching",
        split="train",
        keys=("set2_seq11_64",),
        source_id="sequence 11",
        extra={"set": "2", "sequence": "11"},
    )
    assert CLASSES == ("shaking_hands", "hugging", "kicking", "pointing", "punching", "pushing")
    assert clips(tmp_path / "raw") == entries  # its folder will do


def test_wrong_counts_and_columns_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected 120 clips, 20 a class, in 20 sequences; got 119 clips"):
        clips(lay_out(tmp_path / "short", num_clips=119))
    with pytest.raises(
        ValueError, match=r"clip 'set1_seq01_00' needs set, sequence and split, got .* label_id, set, row"
    ):
        clips(lay_out(tmp_path / "unnamed", columns="path,label,label_id,set,row,split"))
    with pytest.raises(ValueError, match=r"needs --annotations with one file, its clips.csv, got nothing"):
        clips()
    with pytest.raises(ValueError, match="There is no manifest"):
        clips(tmp_path / "none.csv")


def test_entries_of_the_real_one(data_folder: Path) -> None:
    videos = data_folder / "ut_interaction"
    entries = clips(videos / "clips.csv", videos=videos)
    splits = [entry.split for entry in entries]
    assert (
        {split: splits.count(split) for split in splits} == RECIPE.versions["1"].official == {"train": 83, "test": 37}
    )


@pytest.mark.slow
def test_manifest_of_the_real_one(data_folder: Path, tmp_path: Path) -> None:
    videos = data_folder / "ut_interaction"
    config = PrepareConfig(videos=videos, out=tmp_path, annotations=(videos / "clips.csv",), num_workers=1)
    report = prepare(RECIPE, folder=FOLDER, config=config, progress=lambda what, **counts: tqdm(disable=True, **counts))
    assert report.num_unreadable() == 0
    manifest = read_manifest(tmp_path / "manifest.csv")
    assert (len(manifest.select(split="train").rows), len(manifest.select(split="test").rows)) == (83, 37)
    assert manifest.classes == CLASSES
    assert len({row.extra["sequence"] for row in manifest.rows}) == 20
    sample = (FOLDER / "sample.csv").read_text().splitlines()
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert len(sample) == 6
    assert [ours.endswith(theirs) for ours, theirs in zip(lines, sample, strict=False)] == [True] * 6
