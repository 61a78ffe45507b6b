"""Something-Something v2's recipe on JSON lists written by hand in their true form, under both of their names."""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes
from tests.datasets.samples import assert_sample_is_the_head

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "something_something_v2"
RECIPE = load_recipe(FOLDER)
CLASSES = recipe_classes(RECIPE, folder=FOLDER, version="v2")
OLD = "something-something-v2-"

TRAIN: list[dict[str, Any]] = [
    {
        "id": "78687",
        "label": "holding potato next to vicks vaporub bottle",
        "template": "Holding [something] next to [something]",
        "placeholders": ["potato", "vicks vaporub bottle"],
    },
    {
        "id": "42326",
        "label": "spreading margarine onto bread",
        "template": "Spreading [something] onto [something]",
        "placeholders": ["margarine", "bread"],
    },
]
# templates whose brackets hold more than the word "something", one that begins with a bracket, one with parentheses
VALIDATION: list[dict[str, Any]] = [
    {"id": "74225", "template": "Putting [number of] [something] onto [something]"},
    {"id": "116154", "template": "[Something] falling like a feather or paper"},
    {"id": "117478", "template": "Twisting (wringing) [something] wet until water comes out"},
    {"id": "36585", "template": "Putting [something that can't roll] onto a slanted surface, so it stays where it is"},
]
TEST: list[dict[str, Any]] = [{"id": "1420"}, {"id": "166429"}]


def lay_out(folder: Path, *, prefix: str = "", train: object = TRAIN) -> Path:
    folder.mkdir(exist_ok=True)
    lists = {"train": train, "validation": VALIDATION, "test": TEST}
    for name, items in lists.items():
        (folder / f"{prefix}{name}.json").write_text(json.dumps(items))
    labels = {name: str(index) for index, name in enumerate(CLASSES)}
    (folder / f"{prefix}labels.json").write_text(json.dumps(labels, indent=0))
    return folder


def clips(*annotations: Path) -> list[Entry]:
    request = Request(annotations=annotations, videos=Path("videos"), version="v2", classes=CLASSES)
    return RECIPE.list_clips(request)


@pytest.mark.parametrize("prefix", ["", OLD])
def test_entries_of_the_three_lists(prefix: str, tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path, prefix=prefix))
    assert [(entry.video_id, entry.label, entry.split) for entry in entries] == [
        ("78687", "Holding something next to something", "train"),
        ("42326", "Spreading something onto something", "train"),
        ("74225", "Putting number of something onto something", "val"),
        ("116154", "Something falling like a feather or paper", "val"),
        ("117478", "Twisting (wringing) something wet until water comes out", "val"),
        ("36585", "Putting something that can't roll onto a slanted surface, so it stays where it is", "val"),
        ("1420", None, "test"),
        ("166429", None, "test"),
    ]
    assert {entry.source_id for entry in entries} == {None}


def test_answers_label_the_test_clips_they_name(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "test-answers.csv").write_text(
        "1420;Throwing something\n50058;Stacking number of something\n", encoding="utf-8"
    )
    assert {entry.video_id: entry.label for entry in clips(tmp_path) if entry.split == "test"} == {
        "1420": "Throwing something",
        "166429": None,
    }
    (tmp_path / "test-answers.csv").write_text("1420,Throwing something\n")
    with pytest.raises(ValueError, match=r"test-answers.csv: expected lines 'id;class', got '1420,Throwing something'"):
        clips(tmp_path)


def test_one_list_is_enough_and_none_is_a_sentence(tmp_path: Path) -> None:
    lay_out(tmp_path, prefix=OLD)
    assert [entry.split for entry in clips(tmp_path / f"{OLD}validation.json")] == ["val"] * 4
    with pytest.raises(ValueError, match=r"needs train.json, validation.json or test.json, .*, got nothing"):
        clips()
    with pytest.raises(ValueError, match=r"got .*other.json"):
        clips(tmp_path / "other.json")


@pytest.mark.parametrize("file", ["78687.webm", "videos/7/78687.mp4", "frames/78687"])
def test_files_are_known_by_their_number(file: str, tmp_path: Path) -> None:
    keys = set(RECIPE.file_keys(PurePosixPath(file)))
    assert [entry.video_id for entry in clips(lay_out(tmp_path)) if keys & set(entry.keys)] == ["78687"]


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        (
            [{"id": "1", "template": "Eating [something]"}],
            "train.json, clip 1: 'Eating something' is none of the 174 cla",
        ),
        ([{"id": "1", "label": "holding a cup"}], r"clip 1: id 1 has no template, .*keys \['id', 'label'\]"),
        ({"78687": "Holding something"}, 'train.json: expected a JSON list of objects with "id"'),
        ([{"template": "Holding [something]"}], 'expected a JSON list of objects with "id"'),
    ],
)
def test_a_wrong_list_is_a_sentence(train: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        clips(lay_out(tmp_path, train=train))


def test_labels_json_must_have_our_order(tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    lay_out(tmp_path)
    numbers = {name: str(index) for index, name in enumerate(CLASSES)}
    numbers["Holding something"], numbers["Closing something"] = (
        numbers["Closing something"],
        numbers["Holding something"],
    )
    labels.write_text(json.dumps(numbers))
    with pytest.raises(ValueError, match=r"got 174, and 2 of ours have another number .*first is 'Closing something'"):
        clips(tmp_path)
    labels.write_text(json.dumps({**{name: index for index, name in enumerate(CLASSES)}, "Eating something": 174}))
    with pytest.raises(ValueError, match="expected 174 names, numbered from 0, got 175, and 0 of ours"):
        clips(tmp_path)
    labels.write_text("{")
    with pytest.raises(ValueError, match=r"labels.json is not a JSON file: Expecting property name"):
        clips(tmp_path)


def test_official_counts_and_classes() -> None:
    """220,847 videos by the publisher."""
    assert RECIPE.versions["v2"].official == {"train": 168913, "val": 24777, "test": 27157}
    assert sum(RECIPE.versions["v2"].official.values()) == 220847
    # from labels.json
    official = {
        0: "Approaching something with your camera",
        1: "Attaching something to something",
        2: "Bending something so that it deforms",
        173: "Wiping something off of something",
    }
    assert {number: CLASSES[number] for number in official} == official
    assert len(CLASSES) == 174


def test_sample_is_the_head_of_the_manifest(tmp_path: Path) -> None:
    assert_sample_is_the_head(
        FOLDER, videos=tmp_path / "20bn-something-something-v2", annotations=(lay_out(tmp_path / "lists"),), num_rows=2
    )
