"""Kinetics' recipe: the official CSVs counted by hand, files in every naming, and a sentence for each fault."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pytest
from tqdm import tqdm

from coca_video.data.manifest import read_classes, read_manifest
from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes

RECIPE = Path(__file__).resolve().parents[2] / "datasets" / "kinetics"
recipe = load_recipe(RECIPE)
HEADER = "label,youtube_id,time_start,time_end,split,is_cc"


def list_clips(*annotations: Path, version: str = "400") -> list[Entry]:
    classes = recipe_classes(recipe, folder=RECIPE, version=version)
    return recipe.list_clips(Request(annotations=annotations, videos=Path(), version=version, classes=classes))


def write(path: Path, *lines: str, beginning: str = "") -> Path:
    path.write_text(beginning + "\n".join(lines) + "\n")
    return path


def test_classes_are_the_official_ones_in_the_official_order(data_folder: Path) -> None:
    for version in ("400", "600", "700"):
        classes = recipe_classes(recipe, folder=RECIPE, version=version)
        assert classes == read_classes(data_folder / "labels" / f"kinetics{version}.txt")
        assert len(classes) == int(version)
        assert list(classes) == sorted(classes)  # with spaces, parentheses and capitals
    assert list(recipe.versions) == ["400", "600", "700"]


@pytest.mark.parametrize(
    ("version", "num_rows", "num_videos"),
    [("400", 19_906, 19_906), ("600", 30_000, 29_994)],
)
def test_the_official_validation_lists(data_folder: Path, version: str, num_rows: int, num_videos: int) -> None:
    path = data_folder / "kinetics" / f"kinetics-{version}_val.csv"
    with path.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    entries = list_clips(path, version=version)
    assert len(entries) == len(rows) == num_rows == recipe.versions[version].official["val"]
    assert len({e.source_id for e in entries}) == len({row[1] for row in rows}) == num_videos
    assert len({e.video_id for e in entries}) == num_rows
    assert [e.label for e in entries] == [row[0] for row in rows]
    assert [e.keys for e in entries] == [
        (f"{row[1]}_{'0' * (6 - len(row[2]))}{row[2]}_{'0' * (6 - len(row[3]))}{row[3]}", row[1]) for row in rows
    ]
    assert {(e.split, e.nominal_seconds) for e in entries} == {("val", 10.0)}
    assert Counter(e.extra.get("is_cc", "none") for e in entries) == Counter(
        row[5] if version == "400" else "none" for row in rows
    )


def test_the_whole_entry_of_a_row(tmp_path: Path) -> None:
    path = write(tmp_path / "val.csv", HEADER, '"using segway",-_llTwEh07w,7,16,val,1')
    assert list_clips(path) == [
        Entry(
            video_id="-_llTwEh07w_000007_000016",
            label="using segway",
            split="val",
            keys=("-_llTwEh07w_000007_000016", "-_llTwEh07w"),
            source_id="-_llTwEh07w",
            nominal_seconds=9.0,
            extra={"is_cc": "1"},
        )
    ]


def test_test_lists_old_splits_column_order_and_a_byte_order_mark(tmp_path: Path) -> None:
    folder = tmp_path / "annotations"
    folder.mkdir()
    test = write(folder / "test.csv", "youtube_id,time_start,time_end,split", "0wR5jVB-WPk,417,427,test")
    write(
        folder / "validate.csv",
        "split, time_end, time_start, youtube_id, label",
        'validate, 46.0, 36, 3caPS4FHFF8, "massaging person\'s head"',
        "",
        beginning="\ufeff",
    )
    (folder / "test.json").write_text("{}")
    expected: list[tuple[str | None, str, str, dict[str, str]]] = [
        (None, "test", "0wR5jVB-WPk_000417_000427", {}),
        ("massaging person's head", "val", "3caPS4FHFF8_000036_000046", {}),
    ]
    assert [(e.label, e.split, e.video_id, e.extra) for e in list_clips(folder)] == expected
    assert [(e.label, e.split, e.video_id, e.extra) for e in list_clips(test, folder / "validate.csv")] == expected


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        ("R6llTwEh07w_000000_000010.mp4", ("R6llTwEh07w_000000_000010",)),
        ("val/using segway/R6llTwEh07w_000000_000010.mp4", ("R6llTwEh07w_000000_000010",)),
        ("using_segway/R6llTwEh07w_0_10.webm", ("R6llTwEh07w_000000_000010",)),
        ("-a_0000_001_000123_000133.mkv", ("-a_0000_001_000123_000133",)),
        ("__________a.mp4", ("__________a",)),
        ("-a_0000_001.mp4", ("-a_0000_001",)),
        ("R6llTwEh07w.f137.mp4", ("R6llTwEh07w",)),
        ("A ride-R6llTwEh07w.mp4", ("R6llTwEh07w",)),
        ("A ride--a_0000_001.mp4", ("-a_0000_001",)),
        ("A ride [-a_0000_001].mp4", ("-a_0000_001",)),
        ("R6llTwEh07w_000000.mp4", ()),
        ("R6llTwEh07.mp4", ()),
        ("holiday.mp4", ()),
    ],
)
def test_keys_of_files(path: str, keys: Sequence[str]) -> None:
    assert recipe.file_keys(PurePosixPath(path)) == keys


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("using segway/R6llTwEh07w_000000_000010.mp4", "R6llTwEh07w"),
        ("-a_0000_001_000123_000133.mkv", "-a_0000_001"),
        ("A ride [-a_0000_001].mp4", "-a_0000_001"),
        ("holiday.mp4", None),
    ],
)
def test_the_source_is_the_video_at_youtube(path: str, source: str | None) -> None:
    assert recipe.source_id(PurePosixPath(path)) == source


def test_class_folders_against_the_official_list_find_what_they_share(data_folder: Path, tmp_path: Path) -> None:
    """Two clips of K400's validation list, and one of another video; by folders and by a list of another project."""
    names = [
        "using segway/R6llTwEh07w_000000_000010.mp4",
        "using_segway/SOX5yA1l24A.mp4",
        "abseiling/-----------_000000_000010.mp4",
    ]
    for name in names:
        (tmp_path / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "videos" / name).write_text(name)
    other = data_folder / "kinetics" / "kinetics-400_val.csv"
    (tmp_path / "list.txt").write_text(f"{names[0]} 375\n{names[1]} 375\n{names[2]} 0\n")
    for options in ({}, {"annotations": (tmp_path / "list.txt",), "split": "train"}):
        out = tmp_path / f"out{len(options)}"
        config = PrepareConfig(
            videos=tmp_path / "videos", out=out, check="none", num_workers=1, against=other, **options
        )
        report = prepare(recipe, folder=RECIPE, config=config, progress=lambda what, **c: tqdm(disable=True, **c))
        assert report.leaks is not None
        assert {(leak.video_id, leak.other_video_id, leak.by) for leak in report.leaks} == {
            ("R6llTwEh07w_000000_000010", "R6llTwEh07w_000000_000010", "source"),
            ("SOX5yA1l24A", "SOX5yA1l24A_000299_000309", "source"),
        }
        sources = {row.extra["source_id"] for row in read_manifest(out / "manifest.csv").rows}
        assert sources == {"R6llTwEh07w", "SOX5yA1l24A", "-----------"}


def test_every_listed_clip_is_found_by_its_name_in_cvdf_s_archives_and_by_its_bare_id(data_folder: Path) -> None:
    entries = list_clips(data_folder / "kinetics" / "kinetics-400_val.csv")
    assert all(recipe.file_keys(PurePosixPath(f"{e.video_id}.mp4")) == e.keys[:1] for e in entries)
    assert all(recipe.file_keys(PurePosixPath(f"{e.source_id}.mp4")) == e.keys[1:] for e in entries)
    assert sum(e.keys[1].startswith("-") for e in entries) > 100 and sum("_" in e.keys[1] for e in entries) > 1000


def test_a_clip_listed_twice_is_kept_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    row = "abseiling,0wR5jVB-WPk,417,427,val,0"
    path = write(tmp_path / "val.csv", HEADER, row, "abseiling,0wR5jVB-WPk,400,410,val,0", row, row)
    assert [e.video_id for e in list_clips(path)] == ["0wR5jVB-WPk_000417_000427", "0wR5jVB-WPk_000400_000410"]
    assert "2 rows list a clip again, first 0wR5jVB-WPk_000417_000427; each is kept once." in caplog.text
    other = write(tmp_path / "train.csv", HEADER, "zumba,0wR5jVB-WPk,417,427,val,0")
    with pytest.raises(ValueError, match=r"train\.csv, line 2: clip 0wR5.* is 'zumba' in val, but .*val\.csv, line 2"):
        list_clips(path, other)
    moved = write(tmp_path / "train.csv", HEADER, "abseiling,0wR5jVB-WPk,417,427,train,0")
    with pytest.raises(ValueError, match=r"is 'abseiling' in train, but .* has it as 'abseiling' in val"):
        list_clips(path, moved)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        (
            "abseilng,0wR5jVB-WPk,1,2,val,0",
            r"line 2: 'abseilng' is not one of the 400 classes of Kinetics-400; the near",
        ),
        ("abseilng,0wR5jVB-WPk,1,2,val,0", r"nearest is 'abseiling'\.$"),
        ("yarn spinning,0wR5jVB-WPk,1,2,val,0", r"version 600: use --version 600\.$"),
        ("abseiling,wR5jVB-WPk,1,2,val,0", r"youtube_id must have 11 letters.* got 'wR5jVB-WPk'; a spreadsheet"),
        ("abseiling,0wR5jVB-WPk,10,2,val,0", r"time_start 10 must be less than time_end 2"),
        ("abseiling,0wR5jVB-WPk,x,2,val,0", r"time_start must be whole seconds, got 'x'"),
        ("abseiling,0wR5jVB-WPk,1,2.5,val,0", r"time_end must be whole seconds, got '2\.5'"),
        ("abseiling,0wR5jVB-WPk,1,2,dev,0", r"the split must be train, val \(or validate\) or test, got 'dev'"),
        ("abseiling,0wR5jVB-WPk,1,2,val", r"line 2 has not 6 cells like the header"),
        ("abseiling,0wR5jVB-WPk,1,2,val,0,1", r"line 2 has not 6 cells like the header"),
        (",0wR5jVB-WPk,1,2,val,0", r"line 2: a clip of val has no label; only the test lists come without"),
        ('"abseiling,0wR5jVB-WPk,1,2,val,0', r"is not a CSV file"),
    ],
)
def test_faults_of_a_row_are_sentences(tmp_path: Path, row: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        list_clips(write(tmp_path / "val.csv", HEADER, row))


def test_faults_of_a_file_are_sentences(tmp_path: Path) -> None:
    archives = write(tmp_path / "k400_val_path.txt", "https://s3.amazonaws.com/kinetics/400/val/part_0.tar.gz")
    with pytest.raises(
        ValueError, match=r"k400_val_path\.txt needs the columns .* has no youtube_id; .*part_0\.tar\.gz"
    ):
        list_clips(archives)
    with pytest.raises(ValueError, match=r"Kinetics needs its official CSVs .*, got .* without any"):
        list_clips(tmp_path)
    with pytest.raises(ValueError, match=r"There is no annotation file .*none\.csv"):
        list_clips(tmp_path / "none.csv")


def test_a_list_of_another_version_names_that_version(data_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"is not one of the 400 classes .* of version 600: use --version 600\.$"):
        list_clips(data_folder / "kinetics" / "kinetics-600_val.csv", version="400")
    with pytest.raises(ValueError, match=r"is not one of the 700 classes .* of version 400: use --version 400\.$"):
        list_clips(data_folder / "kinetics" / "kinetics-400_val.csv", version="700")


def test_the_sample_is_what_the_recipe_lists(data_folder: Path, tmp_path: Path) -> None:
    entries = {e.video_id: e for e in list_clips(data_folder / "kinetics" / "kinetics-400_val.csv")}
    sample = read_manifest(RECIPE / "sample.csv", classes=recipe_classes(recipe, folder=RECIPE, version="400"))
    assert len(sample.rows) == 3
    for row in sample.rows:
        entry = entries[row.video_id]
        assert (row.label, row.split) == (entry.label, entry.split)
        assert row.extra == {"source_id": entry.source_id, **entry.extra}
        assert recipe.file_keys(PurePosixPath(row.path)) == entry.keys[:1]
