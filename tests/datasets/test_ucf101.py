"""UCF101's recipe on split lists written by hand in their true form, faults included."""

from pathlib import Path, PurePosixPath

import pytest
from tqdm import tqdm

from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes
from tests.datasets.samples import assert_sample_is_the_head

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "ucf101"
RECIPE = load_recipe(FOLDER)
CLASSES = recipe_classes(RECIPE, folder=FOLDER, version="1")

TRAIN = """ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c02.avi 1
HammerThrow/v_HammerThrow_g25_c07.avi 36
HandstandPushups/v_HandStandPushups_g08_c01.avi 37
YoYo/v_YoYo_g25_c05.avi 101
"""
TEST = "ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi\r\nHandstandPushups/v_HandStandPushups_g01_c01.avi\r\n"


def lay_out(folder: Path, *, train: str = TRAIN, test: str = TEST, version: str = "1") -> Path:
    folder.mkdir(exist_ok=True)
    lines = [f"{number} {name}\r\n" for number, name in enumerate(CLASSES, start=1)]
    (folder / "classInd.txt").write_bytes("".join(lines).encode())
    (folder / f"trainlist0{version}.txt").write_text(train)
    (folder / f"testlist0{version}.txt").write_bytes(test.encode())
    return folder


def clips(*annotations: Path, version: str = "1") -> list[Entry]:
    request = Request(annotations=annotations, videos=Path("UCF-101"), version=version, classes=CLASSES)
    return RECIPE.list_clips(request)


def test_entries_of_both_lists(tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path))
    assert [(entry.video_id, entry.label, entry.split, entry.source_id) for entry in entries] == [
        ("v_ApplyEyeMakeup_g08_c01", "ApplyEyeMakeup", "train", "v_ApplyEyeMakeup_g08"),
        ("v_ApplyEyeMakeup_g08_c02", "ApplyEyeMakeup", "train", "v_ApplyEyeMakeup_g08"),
        ("v_HammerThrow_g25_c07", "HammerThrow", "train", "v_HammerThrow_g25"),
        ("v_HandStandPushups_g08_c01", "HandstandPushups", "train", "v_HandStandPushups_g08"),
        ("v_YoYo_g25_c05", "YoYo", "train", "v_YoYo_g25"),
        ("v_ApplyEyeMakeup_g01_c01", "ApplyEyeMakeup", "test", "v_ApplyEyeMakeup_g01"),
        ("v_HandStandPushups_g01_c01", "HandstandPushups", "test", "v_HandStandPushups_g01"),
    ]


def test_the_version_is_the_split_and_files_may_be_given_alone(tmp_path: Path) -> None:
    lay_out(tmp_path)
    lay_out(tmp_path, train="YoYo/v_YoYo_g01_c01.avi 101\n", test="YoYo/v_YoYo_g02_c01.avi\n", version="3")
    assert [entry.video_id for entry in clips(tmp_path, version="3")] == ["v_YoYo_g01_c01", "v_YoYo_g02_c01"]
    assert [entry.split for entry in clips(tmp_path / "testlist03.txt", version="3")] == ["test"]
    with pytest.raises(ValueError, match=r"split 2 needs trainlist02.txt or testlist02.txt: .*, got .*trainlist01.txt"):
        clips(tmp_path / "trainlist01.txt", version="2")


@pytest.mark.parametrize(
    "file",
    [
        "HandstandPushups/v_HandStandPushups_g01_c01.avi",
        "HandstandPushups/v_HandstandPushups_g01_c01.avi",  # renamed, as some tools do
        "HandStandPushups/v_HandStandPushups_g01_c01.mp4",
        "v_HandStandPushups_g01_c01.AVI",
        "rawframes/HandstandPushups/v_HandStandPushups_g01_c01",  # a folder of frames
    ],
)
def test_every_spelling_of_handstand_pushups_is_found(file: str, tmp_path: Path) -> None:
    keys = set(RECIPE.file_keys(PurePosixPath(file)))
    assert [entry.video_id for entry in clips(lay_out(tmp_path)) if keys & set(entry.keys)] == [
        "v_HandStandPushups_g01_c01"
    ]


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ("YoYo/v_YoYo_g01_c01.avi 100\n", "line 1: YoYo is class 101, .*got 100, which looks like .*counts from 0"),
        ("Hammering/v_Hammering_g01_c01.avi 36\n", r"line 1: Hammering is class 35, counted from 1 .*, got 36; take"),
        ("\nJuggling/v_Juggling_g01_c01.avi 1\n", "line 2: the folder 'Juggling' is none of the 101 classes"),
        ("YoYo/clip.avi 101\n", r"line 1: expected 'ApplyEyeMakeup/v_.*, got 'YoYo/clip.avi 101'"),
        (
            "YoYo/v_YoYo_g09_c01.avi 101\nApplyEyeMakeup/v_ApplyEyeMakeup_g01_c02.avi 1\n",
            "1 groups have clips in train and in test, the first is v_ApplyEyeMakeup_g01;",
        ),
    ],
)
def test_a_wrong_list_is_a_sentence(train: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        clips(lay_out(tmp_path, train=train))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("YoYo/v_YoYo_g25_c05.avi", "v_YoYo_g25"),
        ("rawframes/YoYo/v_YoYo_g25_c05", "v_YoYo_g25"),
        ("HandstandPushups/v_HandstandPushups_g01_c01.mp4", "v_HandStandPushups_g01"),  # as the lists spell it
        ("YoYo/clip.avi", None),
    ],
)
def test_the_source_is_the_group(path: str, source: str | None) -> None:
    assert RECIPE.source_id(PurePosixPath(path)) == source


def test_another_order_of_classes_is_refused(tmp_path: Path) -> None:
    lay_out(tmp_path)
    lines = [f"{number} {name}\n" for number, name in enumerate(sorted(CLASSES), start=1)]
    (tmp_path / "classInd.txt").write_text("".join(lines))
    with pytest.raises(
        ValueError, match=r"classInd.txt is not .*first other line is '35 HammerThrow' for '35 Hammering"
    ):
        clips(tmp_path)
    (tmp_path / "classInd.txt").write_text("1 ApplyEyeMakeup\n")
    with pytest.raises(ValueError, match="expected 101 lines, got 1, and their lines agree so far"):
        clips(tmp_path)


def test_official_counts_and_classes() -> None:
    """Three splits of the same 13,320 clips (UCF101's page)."""
    assert {name: version.official for name, version in RECIPE.versions.items()} == {
        "1": {"train": 9537, "test": 3783},
        "2": {"train": 9586, "test": 3734},
        "3": {"train": 9624, "test": 3696},
    }
    assert {sum(version.official.values()) for version in RECIPE.versions.values()} == {13320}
    assert next(iter(RECIPE.versions)) == "1"
    # from classInd.txt: the places where the official order is not that of sorted names
    official = {1: "ApplyEyeMakeup", 35: "Hammering", 36: "HammerThrow", 37: "HandstandPushups", 101: "YoYo"}
    assert {number: CLASSES[number - 1] for number in official} == official
    assert len(CLASSES) == 101


def test_class_folders_need_the_lists_or_folders_of_splits(tmp_path: Path) -> None:
    def run(videos: Path) -> list[tuple[str, str | None, str]]:
        config = PrepareConfig(videos=videos, out=tmp_path / "out", check="none", num_workers=1)
        report = prepare(RECIPE, folder=FOLDER, config=config, progress=lambda what, **c: tqdm(disable=True, **c))
        return [(row.video_id, row.split, row.extra["source_id"]) for row in report.manifest_rows]

    name = "v_YoYo_g25_c05"
    for above in ("flat", "split/Training"):
        (tmp_path / above / "YoYo").mkdir(parents=True)
        (tmp_path / above / "YoYo" / f"{name}.avi").write_text(name)
    with pytest.raises(
        ValueError, match=r"which clips are of which official split of UCF101: .* takes: The folder ucfTrain"
    ):
        run(tmp_path / "flat")
    assert run(tmp_path / "split") == [(name, "train", "v_YoYo_g25")]


def test_sample_is_the_head_of_the_manifest(tmp_path: Path) -> None:
    train = "".join(f"ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c0{n}.avi 1\n" for n in range(1, 6))
    assert_sample_is_the_head(
        FOLDER, videos=tmp_path / "UCF-101", annotations=(lay_out(tmp_path / "lists", train=train),), num_rows=5
    )
