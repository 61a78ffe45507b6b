"""The recipe of one's own clips, on folders laid out by hand."""

from pathlib import Path, PurePosixPath

import pytest
from tqdm import tqdm

from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes
from tests.datasets.samples import assert_sample_is_the_head

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "folder"
RECIPE = load_recipe(FOLDER)


def lay_out(folder: Path, *files: str) -> Path:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


def clips(videos: Path, *annotations: Path) -> list[Entry]:
    return RECIPE.list_clips(Request(annotations=annotations, videos=videos, version="1", classes=()))


def test_one_folder_per_class_has_no_split(tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path, "b/2.mp4", "b/1.MOV", "a b/3.avi", "a b/._3.avi", "a b/notes.txt", ".c/4.mp4"))
    assert [(entry.video_id, entry.label, entry.split, entry.keys, entry.source_id) for entry in entries] == [
        ("3", "a b", "", ("a b/3.avi",), None),
        ("1", "b", "", ("b/1.MOV",), None),
        ("2", "b", "", ("b/2.mp4",), None),
    ]


def test_folders_of_splits(tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path, "train/a/1.mp4", "val/a/1.mp4", "test/b/2.mp4"))
    assert [(entry.video_id, entry.label, entry.split) for entry in entries] == [
        ("test/b/2.mp4", "b", "test"),
        ("train/a/1.mp4", "a", "train"),
        ("val/a/1.mp4", "a", "val"),
    ]


def test_every_file_finds_its_entry_and_no_other(tmp_path: Path) -> None:
    files = ["train/a/1.mp4", "train/b/1.mp4", "test/a/1.mp4"]
    entries = clips(lay_out(tmp_path, *files))
    for file in files:
        keys = set(RECIPE.file_keys(PurePosixPath(file)))
        assert [entry.keys for entry in entries if keys & set(entry.keys)] == [(file,)]


def test_classes_txt_names_the_classes_that_folders_mean(tmp_path: Path) -> None:
    lay_out(tmp_path, "washing_up/1.mp4", "pouring_tea/2.mp4")
    (tmp_path / "classes.txt").write_text("washing up\npouring tea\nsitting\n")
    assert [entry.label for entry in clips(tmp_path)] == ["pouring tea", "washing up"]
    (tmp_path / "classes.txt").write_text("washing up\npouring coffee\n")
    with pytest.raises(ValueError, match=r"the folder 'pouring_tea' is not one of the 2 classes; .*'pouring coffee'"):
        clips(tmp_path)


def test_wrong_input_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no video files; expected <class>/clip.mp4"):
        clips(lay_out(tmp_path / "empty", "a/notes.txt"))
    with pytest.raises(ValueError, match=r"laid out as .* throughout, got a/1.mp4 and train/a/2.mp4"):
        clips(lay_out(tmp_path / "mixed", "a/1.mp4", "train/a/2.mp4"))
    with pytest.raises(ValueError, match=r"val.csv is no list of lines 'path label', .* leave it out"):
        clips(lay_out(tmp_path / "good", "a/1.mp4"), Path("val.csv"))


def test_a_list_is_taken_with_classes_and_a_split(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "1.mp4").write_text("one")
    (tmp_path / "list.txt").write_text("1.mp4 1\n")
    (tmp_path / "classes.txt").write_text("washing up\npouring tea\n")
    options = {"videos": tmp_path / "clips", "out": tmp_path / "out", "annotations": (tmp_path / "list.txt",)}

    def run(**more: Path | str) -> list[tuple[str | None, str | None]]:
        config = PrepareConfig(**options, check="none", num_workers=1, **more)
        report = prepare(RECIPE, folder=FOLDER, config=config, progress=lambda what, **c: tqdm(disable=True, **c))
        return [(row.label, row.split) for row in report.manifest_rows]

    assert run(classes=tmp_path / "classes.txt", split="train") == [("pouring tea", "train")]
    with pytest.raises(ValueError, match="give the classes with --classes FILE"):
        run(split="train")
    with pytest.raises(ValueError, match="name it with --split"):
        run(classes=tmp_path / "classes.txt")


def test_no_classes_and_no_counts_of_ours() -> None:
    assert not (FOLDER / "classes.txt").exists()
    assert recipe_classes(RECIPE, folder=FOLDER, version="1") == ()
    assert [version.official for version in RECIPE.versions.values()] == [{}]


def test_sample_is_the_head_of_the_manifest(tmp_path: Path) -> None:
    assert_sample_is_the_head(FOLDER, videos=tmp_path / "clips", annotations=(), num_rows=3)
