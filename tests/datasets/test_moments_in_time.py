"""Moments in Time's recipe: a made-up copy of its lists, both versions' classes, and a sentence for each fault."""

from pathlib import Path, PurePosixPath

import pytest

from coca_video.data.manifest import read_classes, read_manifest
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes

RECIPE = Path(__file__).resolve().parents[2] / "datasets" / "moments_in_time"
recipe = load_recipe(RECIPE)
V1, V2 = (recipe_classes(recipe, folder=RECIPE, version=version) for version in ("v1", "v2"))


def list_clips(*annotations: Path, version: str = "v1") -> list[Entry]:
    classes = {"v1": V1, "v2": V2}[version]
    return recipe.list_clips(Request(annotations=annotations, videos=Path(), version=version, classes=classes))


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def write_copy(folder: Path) -> Path:
    """What comes from the authors, without the videos."""
    write(
        folder / "trainingSet.csv",
        "blocking/getty_4.mp4,blocking,3,1",
        "playing+music/yt-a%20b_1.mp4,playing+music,4,0",
    )
    write(folder / "validationSet.csv", "clapping/getty_4.mp4,clapping,2,0")
    write(folder / "moments_categories.txt", *(f"{name},{index}" for index, name in enumerate(V1)))
    write(folder / "license.txt", "terms, 3")
    return folder


def test_classes_are_the_official_ones_in_the_official_order(data_folder: Path) -> None:
    labels = data_folder / "labels"
    assert read_classes(labels / "mit_v1_339.txt") == V1 and len(V1) == 339
    assert read_classes(labels / "mit_v2_305.txt") == V2 and len(V2) == 305
    assert set(V2) < set(V1)
    assert V1[0] == "clapping" and list(V1) != sorted(V1) and list(V2) != sorted(V2)
    shared = [name for name in V2 if V1.index(name) == V2.index(name)]
    assert len(shared) < len(V2)  # so the same index means another class
    assert [name for name in V1 if "+" in name] == [name for name in V1 if not name.isalpha()]
    assert sum("+" in name for name in V1) == 10


def test_entries_of_a_made_up_copy(tmp_path: Path) -> None:
    entries = list_clips(write_copy(tmp_path))
    assert entries == [
        Entry(
            video_id="blocking/getty_4.mp4",
            label="blocking",
            split="train",
            keys=("blocking/getty_4.mp4",),  # the bare name is another clip's too
            nominal_seconds=3.0,
            extra={"positive_votes": "3", "negative_votes": "1"},
        ),
        Entry(
            video_id="playing+music/yt-a%20b_1.mp4",
            label="playing+music",
            split="train",
            keys=("playing+music/yt-a%20b_1.mp4", "yt-a%20b_1.mp4"),
            nominal_seconds=3.0,
            extra={"positive_votes": "4", "negative_votes": "0"},
        ),
        Entry(
            video_id="clapping/getty_4.mp4",
            label="clapping",
            split="val",
            keys=("clapping/getty_4.mp4",),
            nominal_seconds=3.0,
            extra={"positive_votes": "2", "negative_votes": "0"},
        ),
    ]
    lists = [tmp_path / "trainingSet.csv", tmp_path / "validationSet.csv"]
    assert list_clips(*lists) == entries
    assert list_clips(lists[1]) == [
        Entry(
            video_id="clapping/getty_4.mp4",
            label="clapping",
            split="val",
            keys=("clapping/getty_4.mp4", "getty_4.mp4"),
            nominal_seconds=3.0,
            extra={"positive_votes": "2", "negative_votes": "0"},
        )
    ]


def test_keys_of_files_are_their_last_two_parts() -> None:
    assert recipe.file_keys(PurePosixPath("training/playing+music/a_1.mp4")) == ("playing+music/a_1.mp4",)
    assert recipe.file_keys(PurePosixPath("playing+music/a_1.mp4")) == ("playing+music/a_1.mp4",)
    assert recipe.file_keys(PurePosixPath("a_1.mp4")) == ("a_1.mp4",)


def test_the_label_map_is_checked(tmp_path: Path) -> None:
    copy = write_copy(tmp_path)
    with pytest.raises(ValueError, match=r"moments_categories\.txt: '\S+' is not one of the 305 classes \(34 names"):
        list_clips(copy, version="v2")
    write(copy / "moments_categories.txt", *(f"{name},{index}" for index, name in enumerate(sorted(V1))))
    num_wrong = sum(a != b for a, b in zip(V1, sorted(V1), strict=True))
    with pytest.raises(ValueError, match=rf"expected 'clapping'; {num_wrong} of the 339 classes differ"):
        list_clips(copy)


def test_a_clip_listed_twice_is_kept_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = "blocking/a.mp4,blocking,3,1"
    path = write(tmp_path / "trainingSet.csv", row, row)
    assert [e.keys for e in list_clips(path)] == [("blocking/a.mp4", "a.mp4")]
    assert "1 rows list a clip again, first blocking/a.mp4; each is kept once." in caplog.text
    with pytest.raises(ValueError, match=r"line 2: blocking/a\.mp4 is 'clapping' in train, but .*line 1 has it as 'bl"):
        list_clips(write(path, row, "blocking/a.mp4,clapping,3,1"))
    with pytest.raises(ValueError, match=r"is 'blocking' in val, but .*trainingSet\.csv, line 1 .* in train"):
        list_clips(write(path, row), write(tmp_path / "validationSet.csv", row))


@pytest.mark.parametrize(
    ("row", "version", "sentence"),
    [
        (
            "blocking/a.mp4,bloking,3,1",
            "v1",
            r"line 1: 'bloking' is not one of the 339 classes .* 'blocking'; v2 has no",
        ),
        ("praying/a.mp4,praying,3,1", "v2", r"'praying' is not one of the 305 classes .* v1 \(--version v1\)\?"),
        ("filename,label,positive,negative", "v1", r"line 1: expected filename,label,positive,negative .* no header"),
        ("a.mp4,12,44", "v1", r"expected filename,label,positive,negative .* got 'a\.mp4,12,44'"),
        ("", "v1", r"Moments in Time needs trainingSet\.csv or validationSet\.csv"),
        ('"a.mp4,clapping,1,2', "v1", r"is not a CSV file"),
    ],
)
def test_faults_of_a_list_are_sentences(tmp_path: Path, row: str, version: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list_clips(write(tmp_path / "trainingSet.csv", row), version=version)


def test_the_split_is_the_name_of_the_list(tmp_path: Path) -> None:
    row = "blocking/a.mp4,blocking,3,1"
    assert [e.split for e in list_clips(write(tmp_path / "val_v1.csv", row))] == ["val"]
    with pytest.raises(ValueError, match=r"list\.csv: the lists .* carry their split in their names alone"):
        list_clips(write(tmp_path / "list.csv", row))
    with pytest.raises(ValueError, match=r"needs trainingSet\.csv or validationSet\.csv by --annotations"):
        list_clips(write(tmp_path / "empty" / "license.txt", "terms").parent)
    with pytest.raises(ValueError, match=r"There is no annotation file .*trainingSet\.csv"):
        list_clips(tmp_path / "trainingSet.csv")


def test_the_sample_is_a_manifest_of_the_recipe() -> None:
    sample = read_manifest(RECIPE / "sample.csv", classes=V1)
    assert [row.label for row in sample.rows] == ["blocking", "playing+music"]
    for row in sample.rows:
        assert recipe.file_keys(PurePosixPath(row.path)) == (row.video_id,)
        assert row.extra.keys() == {"source_id", "positive_votes", "negative_votes"}
