"""Diving48's recipe on JSON lists written by hand in their true form, of both versions."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes
from tests.datasets.samples import assert_sample_is_the_head

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "diving48"
RECIPE = load_recipe(FOLDER)
CLASSES = recipe_classes(RECIPE, folder=FOLDER, version="v2")

TRAIN: list[dict[str, Any]] = [
    {"vid_name": "-mmq0PT-u8k_00155", "label": 0, "start_frame": 0, "end_frame": 48},
    {"vid_name": "-mmq0PT-u8k_00156", "label": 0, "start_frame": 0, "end_frame": 70},
    {"vid_name": "_8Vy3dlHg2w_00000", "label": 47, "start_frame": 0, "end_frame": 101},
]
TEST: list[dict[str, Any]] = [{"vid_name": "2x00lRzlTVQ_00000", "label": 29, "start_frame": 0, "end_frame": 55}]


def lay_out(folder: Path, *, train: object = TRAIN, mark: str = "_V2") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"Diving48{mark}_train.json").write_text(json.dumps(train))
    (folder / f"Diving48{mark}_test.json").write_text(json.dumps(TEST))
    (folder / "Diving48_vocab.json").write_text(json.dumps([name.split("+") for name in CLASSES]))
    return folder


def clips(*annotations: Path, version: str = "v2") -> list[Entry]:
    request = Request(annotations=annotations, videos=Path("rgb"), version=version, classes=CLASSES)
    return RECIPE.list_clips(request)


def test_entries_of_both_lists(tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path))
    assert [(entry.video_id, entry.label, entry.split, entry.source_id) for entry in entries] == [
        ("-mmq0PT-u8k_00155", "Back+15som+05Twis+FREE", "train", "-mmq0PT-u8k"),
        ("-mmq0PT-u8k_00156", "Back+15som+05Twis+FREE", "train", "-mmq0PT-u8k"),
        ("_8Vy3dlHg2w_00000", "Reverse+Dive+NoTwis+TUCK", "train", "_8Vy3dlHg2w"),
        ("2x00lRzlTVQ_00000", "Forward+Dive+NoTwis+PIKE", "test", "2x00lRzlTVQ"),
    ]


def test_versions_read_their_own_files(tmp_path: Path) -> None:
    lay_out(tmp_path)
    lay_out(tmp_path, train=[{"vid_name": "-mmq0PT-u8k_00155", "label": 3}], mark="")
    assert [entry.label for entry in clips(tmp_path, version="v1")] == [CLASSES[3], CLASSES[29]]
    assert [entry.split for entry in clips(tmp_path / "Diving48_test.json", version="v1")] == ["test"]
    with pytest.raises(ValueError, match=r"v2 needs Diving48_V2_train.json or .*, got .*Diving48_train.json"):
        clips(tmp_path / "Diving48_train.json", version="v2")


@pytest.mark.parametrize("file", ["rgb/_8Vy3dlHg2w_00000.mp4", "_8Vy3dlHg2w_00000.webm", "frames/_8Vy3dlHg2w_00000"])
def test_files_are_known_by_their_name(file: str, tmp_path: Path) -> None:
    keys = set(RECIPE.file_keys(PurePosixPath(file)))
    assert [entry.video_id for entry in clips(lay_out(tmp_path)) if keys & set(entry.keys)] == ["_8Vy3dlHg2w_00000"]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rgb/-mmq0PT-u8k_00155.mp4", "-mmq0PT-u8k"),
        ("_8Vy3dlHg2w_00000", "_8Vy3dlHg2w"),  # a folder of frames
        ("clip.mp4", None),
    ],
)
def test_the_source_is_the_long_video(path: str, source: str | None) -> None:
    assert RECIPE.source_id(PurePosixPath(path)) == source


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ([{"vid_name": "a_0", "label": 48}], r"train.json, clip 1: the label of a_0 must be .* from 0 to 47, got 48"),
        ([*TRAIN, {"vid_name": "a_0", "label": "3"}], "clip 4: the label of a_0 must be a whole number .*, got '3'"),
        ([{"vid_name": "a_0", "label": True}], "got True"),
        ([{"vid_name": "a_0"}], 'expected a JSON list of objects with "vid_name" and "label"'),
        ({"a_0": 1}, 'expected a JSON list of objects with "vid_name" and "label"'),
    ],
)
def test_a_wrong_list_is_a_sentence(train: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        clips(lay_out(tmp_path, train=train))


def test_the_vocabulary_must_have_our_order(tmp_path: Path) -> None:
    lay_out(tmp_path)
    vocabulary = tmp_path / "Diving48_vocab.json"
    rows = [name.split("+") for name in CLASSES]
    rows[0], rows[1] = rows[1], rows[0]
    vocabulary.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"got 48, and number 0 is 'Back\+15som\+15Twis\+FREE' for 'Back\+15som\+05Tw"):
        clips(tmp_path)
    vocabulary.write_text(json.dumps(rows[2:3]))
    with pytest.raises(ValueError, match="expected 48 classes, got 1, and number 0 is"):
        clips(tmp_path)
    vocabulary.write_text("48")
    with pytest.raises(ValueError, match="expected 48 classes, got 0, and they agree so far"):
        clips(tmp_path)
    vocabulary.write_text("[")
    with pytest.raises(ValueError, match=r"Diving48_vocab.json is not a JSON file"):
        clips(tmp_path)


def test_official_counts_and_classes() -> None:
    """The lengths of the lists on the dataset's page; the default is v2, whose labels were corrected."""
    assert {name: version.official for name, version in RECIPE.versions.items()} == {
        "v2": {"train": 15027, "test": 1970},
        "v1": {"train": 15943, "test": 2096},
    }
    assert next(iter(RECIPE.versions)) == "v2"
    assert [name.split("+") for name in CLASSES[:3]] == [  # from Diving48_vocab.json
        ["Back", "15som", "05Twis", "FREE"],
        ["Back", "15som", "15Twis", "FREE"],
        ["Back", "15som", "25Twis", "FREE"],
    ]
    assert len(CLASSES) == 48
    assert {name.count("+") for name in CLASSES} == {3}


def test_sample_is_the_head_of_the_manifest(tmp_path: Path) -> None:
    assert_sample_is_the_head(FOLDER, videos=tmp_path / "rgb", annotations=(lay_out(tmp_path / "lists"),), num_rows=2)
