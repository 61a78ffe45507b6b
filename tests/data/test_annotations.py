"""Peers' lists and class folders: what is understood, and that a wrong order of classes is refused with its reason."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath

import pytest

from coca_video.data.annotations import (
    ClassNames,
    check_class_order,
    class_key,
    is_peer_list,
    path_keys,
    read_class_folders,
    read_peer_list,
)
from coca_video.data.manifest import read_classes

LABEL_FILES = {
    "kinetics400": 400,
    "kinetics600": 600,
    "kinetics700": 700,
    "mit_v1_339": 339,
    "mit_v2_305": 305,
    "ucf101": 101,
    "hmdb51": 51,
    "something_something_v2": 174,
    "diving48": 48,
}
CLASSES = ("jumping", "riding a bike", "skiing (not slalom)", "massaging person's head")


def torchvision_folder(name: str) -> str:
    """As torchvision.datasets.Kinetics replaces, written out again."""
    return name.replace(" ", "_").replace("'", "").replace("(", "").replace(")", "")


NAMINGS: dict[str, Callable[[str], str]] = {
    "spaces": lambda name: name,
    "mmaction2": lambda name: name.replace(" ", "_").replace('"', ""),
    "torchvision": torchvision_folder,
    "lower": lambda name: torchvision_folder(name).lower(),
}


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def write_list(path: Path, *, classes: Sequence[str], folder: Callable[[str], str]) -> Path:
    """One clip a class, numbered by the order of `classes`."""
    return write(path, "".join(f"val/{folder(name)}/clip{n}.mp4 {n}\n" for n, name in enumerate(classes)))


@pytest.mark.parametrize("name", LABEL_FILES)
def test_class_keys_are_unique_and_equal_in_every_naming(data_folder: Path, name: str) -> None:
    classes = read_classes(data_folder / "labels" / f"{name}.txt")
    assert len(classes) == LABEL_FILES[name]
    assert len({class_key(each) for each in classes}) == LABEL_FILES[name]
    names = ClassNames(classes)
    for naming in NAMINGS.values():
        assert [names.find(naming(each)) for each in classes] == list(classes)


def test_class_key_keeps_plus_and_commas_and_composes_accents() -> None:
    assert class_key("Massaging_person's (head)") == "massagingpersonshead"
    assert class_key("playing+music") == "playing+music" != class_key("playing music")
    assert class_key("a, b") != class_key("a b")
    assert class_key("cafe\u0301") == class_key("caf\u00e9")


def test_class_names_prefer_the_exact_name_and_never_guess() -> None:
    names = ClassNames(["left turn", "left_turn", "Stop"])
    assert names.find("left_turn") == "left_turn"
    assert names.find("LEFT TURN") is None  # which of the two?
    assert names.find("stop") == "Stop"
    assert names.nearest("stopp") == "Stop"


def test_path_keys_go_from_the_whole_path_to_the_stem() -> None:
    assert path_keys(PurePosixPath("/d/val/a b/x.y.mp4")) == (
        "/d/val/a b/x.y.mp4",
        "d/val/a b/x.y.mp4",
        "val/a b/x.y.mp4",
        "a b/x.y.mp4",
        "x.y.mp4",
        "x.y",
    )
    assert path_keys(PurePosixPath("../frames/v.1")) == ("../frames/v.1", "frames/v.1", "v.1")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("D32_1gwq35E.mp4 0\nb.MKV 1\n", True),
        ("/data/riding a bike/a.mp4 1\n\n", True),
        ("a.mp4,0\n", True),
        ("a.mp4::0\n", True),
        ("a.mp4\t0\n", True),
        ("D32_1gwq35E 299 66\n", True),
        ("a.mp4 0\nb.mp4\n", False),
        ("a.mp4 1 3\n", False),  # several labels
        ("folder 0 299 66\n", False),  # an offset
        ("blocking/a.mp4,blocking,3,1\n", False),  # Moments in Time
        ("label,youtube_id,time_start,time_end,split\nabseiling,0wR5jVB-WPk,417,427,val\n", False),
        ("0wR5jVB-WPk,417,427\n", True),  # a folder of frames by its form; its label will be out of range
        ("clapping,0\n", False),  # a label map
        ("1 ApplyEyeMakeup\n", False),
        ("path,label\na.mp4,jumping\n", False),
        ("", False),
    ],
)
def test_a_peer_list_is_known_by_its_content(tmp_path: Path, text: str, expected: bool) -> None:
    assert is_peer_list(write(tmp_path / "list.txt", text)) is expected


def test_official_split_files_of_ucf101_and_hmdb51_are_no_peer_lists(tmp_path: Path) -> None:
    text = "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1\n"
    for name, expected in (("trainlist01.txt", False), ("brush_hair_test_split1.txt", False), ("ucf_train.txt", True)):
        assert is_peer_list(write(tmp_path / name, text)) is expected
    assert is_peer_list(tmp_path) is False


def test_a_long_list_is_judged_by_its_first_lines(tmp_path: Path) -> None:
    long = "".join(f"{'x' * 300}{n}.mp4 {n}\n" for n in range(500))
    assert is_peer_list(write(tmp_path / "long.txt", long))


def test_forms_of_lines_give_the_same_clips(tmp_path: Path) -> None:
    for number, separator in enumerate((" ", ",", "::", "\t", ", ")):
        path = write(tmp_path / f"{number}.txt", f"\ufeffa/x.mp4{separator}1\r\na/y.webm{separator}3\r\n")
        entries = read_peer_list(path, classes=CLASSES, split="val").entries
        assert [(e.video_id, e.label, e.split, e.keys, e.extra) for e in entries] == [
            ("x", "riding a bike", "val", ("a/x.mp4", "x.mp4", "x"), {}),
            ("y", "massaging person's head", "val", ("a/y.webm", "y.webm", "y"), {}),
        ]
    frames = read_peer_list(write(tmp_path / "raw.txt", "a/x 299 0\n"), classes=CLASSES, split="train").entries
    assert [(e.video_id, e.label, e.split, e.keys, e.extra) for e in frames] == [
        ("x", "jumping", "train", ("a/x", "x"), {"listed_frames": "299"})
    ]


def test_clips_of_one_name_keep_only_the_keys_that_tell_them_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "list.txt", "d/jumping/1.mp4 0\nd/riding_a_bike/1.mp4 1\nd/jumping/2.mp4 0\n")
    entries = read_peer_list(path, classes=CLASSES, split="val").entries
    assert [(e.video_id, e.keys) for e in entries] == [
        ("d/jumping/1.mp4", ("d/jumping/1.mp4", "jumping/1.mp4")),
        ("d/riding_a_bike/1.mp4", ("d/riding_a_bike/1.mp4", "riding_a_bike/1.mp4")),
        ("d/jumping/2.mp4", ("d/jumping/2.mp4", "jumping/2.mp4", "2.mp4", "2")),
    ]


def test_repeated_lines_are_kept_once_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "list.txt", "a.mp4 0\nb.mp4 1\na.mp4 0\n")
    assert [e.video_id for e in read_peer_list(path, classes=CLASSES, split="val").entries] == ["a", "b"]
    assert "lists 1 clips more than once, first a.mp4" in caplog.text
    with pytest.raises(ValueError, match=r"a\.mp4 has the label 0 on line 1 and 2 on line 2; keep one of them"):
        read_peer_list(write(path, "a.mp4 0\na.mp4 2\n"), classes=CLASSES, split="val")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a.mp4 0\nb.mp4 1 2\n", r"list\.txt, line 2: expected 'video label' .* got 'b\.mp4 1 2'"),
        ("a.mp4 0\nb.mp4 4\n", r"line 2: 4 is not the number of a class; expected 0 to 3 for the 4 classes"),
        ("a.mp4 -1\n", r"line 1: -1 is not the number of a class"),
        ("\n", r"list\.txt is an empty list"),
    ],
)
def test_faults_of_a_list_are_sentences(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_peer_list(write(tmp_path / "list.txt", text), classes=CLASSES, split="val")


@pytest.mark.parametrize("naming", NAMINGS)
@pytest.mark.parametrize("name", ["kinetics400", "kinetics600", "kinetics700", "ucf101", "mit_v1_339"])
def test_the_right_order_passes_in_every_naming(data_folder: Path, tmp_path: Path, name: str, naming: str) -> None:
    classes = read_classes(data_folder / "labels" / f"{name}.txt")
    listed = read_peer_list(
        write_list(tmp_path / "l.txt", classes=classes, folder=NAMINGS[naming]), classes=classes, split="val"
    )
    assert [entry.label for entry in listed.entries] == list(classes)
    assert listed.num_checked == len(classes) and listed.notice is None


@pytest.mark.parametrize(
    ("name", "num_differing", "first_line", "first_folder"),
    [
        ("kinetics400", 2, 309, "skiing_crosscountry"),
        ("kinetics600", 4, 123, "curling_hair"),
        ("kinetics700", 5, 138, "curling_eyelashes"),
    ],
)
def test_sorted_torchvision_folders_are_refused(
    data_folder: Path, tmp_path: Path, name: str, num_differing: int, first_line: int, first_folder: str
) -> None:
    classes = read_classes(data_folder / "labels" / f"{name}.txt")
    path = write_list(tmp_path / "l.txt", classes=sorted(map(torchvision_folder, classes)), folder=lambda name: name)
    with pytest.raises(ValueError, match=rf"{num_differing} of the {len(classes)} classes differ") as error:
        read_peer_list(path, classes=classes, split="val")
    assert f"line {first_line}: the folder '{first_folder}' has the number {first_line - 1}" in str(error.value)
    assert "because the list numbers sorted folder names as torchvision writes them" in str(error.value)


def test_python_sorted_ucf101_is_refused(data_folder: Path, tmp_path: Path) -> None:
    classes = read_classes(data_folder / "labels" / "ucf101.txt")
    path = write_list(tmp_path / "l.txt", classes=sorted(classes), folder=lambda name: name)
    with pytest.raises(ValueError, match=r"4 of the 101 classes differ, because the list numbers sorted folder") as e:
        read_peer_list(path, classes=classes, split="val")
    first = next(n for n, name in enumerate(sorted(classes)) if name != classes[n])
    assert f"the folder 'HammerThrow' has the number {first}, which is 'Hammering' in the classes file" in str(e.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("jumping/a.mp4 1\nriding a bike/b.mp4 2\n", "2 of the 4 classes differ, because the list counts from 1;"),
        (
            "skiing (not slalom)/a.mp4 1\njumping/b.mp4 0\n",
            "1 of the 4 classes differ, because the list numbers its own",
        ),
        ("jumping/a.mp4 0\njumping/b.mp4 2\njumping/c.mp4 3\n", "line 2: .* 1 of the 4 classes differ; write the list"),
        ("massaging_persons_head/a.mp4 4\n", "has the number 4, which is no class in the classes file, where"),
    ],
)
def test_other_wrong_orders_and_their_reasons(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_peer_list(write(tmp_path / "l.txt", text), classes=CLASSES, split="val")


def test_an_order_that_cannot_be_checked_is_said(tmp_path: Path) -> None:
    flat = read_peer_list(write(tmp_path / "l.txt", "videos/a.mp4 3\n"), classes=CLASSES, split="val")
    assert flat.num_checked == 0
    assert flat.notice is not None and "the order of classes could not be checked" in flat.notice
    part = read_peer_list(write(tmp_path / "l.txt", "videos/a.mp4 3\njumping/b.mp4 0\n"), classes=CLASSES, split="val")
    assert (part.num_checked, part.num_lines) == (1, 2)
    assert (
        part.notice is not None and "1 of 2 lines could not be checked; first line 1, folder 'videos';" in part.notice
    )


def test_a_folder_that_is_no_class_among_those_that_are_is_refused(tmp_path: Path) -> None:
    """Half of the lines: the level may be no level of classes; more than half: one of them is misspelt."""
    text = "riding a bkie/a.mp4 1\njumping/b.mp4 0\n"
    half = read_peer_list(write(tmp_path / "l.txt", text), classes=CLASSES, split="val")
    assert half.notice is not None and "1 of 2 lines could not be checked; first line 1, folder 'riding a bkie';" in (
        half.notice
    )
    with pytest.raises(
        ValueError, match=r"line 1: the folder 'riding a bkie' is not one of the 4 classes, .* 2 lines"
    ) as e:
        read_peer_list(write(tmp_path / "l.txt", f"{text}jumping/c.mp4 0\n"), classes=CLASSES, split="val")
    assert "(1 are not); the nearest is 'riding a bike'" in str(e.value)
    flat = read_peer_list(
        write(tmp_path / "l.txt", "jumping/a.mp4 0\njumping/b.mp4 0\nc.mp4 1\n"), classes=CLASSES, split="val"
    )
    assert flat.notice is not None and "1 of 3 lines could not be checked; first line 3, folder '';" in flat.notice


@pytest.mark.parametrize(
    "lines",
    [
        [*CLASSES],
        ["jumping,0", "riding_a_bike,1", "skiing_not_slalom,2", "massaging_persons_head,3"],
        ["2 riding a bike", "1 jumping", "4 massaging person's head", "3 skiing (not slalom)"],
        ["id,name", '0,"jumping"', "1,riding a bike", "2,skiing (not slalom)", "3,massaging person's head", ""],
    ],
)
def test_label_maps_in_the_right_order_pass(lines: list[str]) -> None:
    check_class_order(lines, ours=CLASSES, source="map.txt")
    swapped = [line.translate(str.maketrans("01234", "10243")) for line in lines]
    if swapped != lines:  # the same names under other numbers
        with pytest.raises(ValueError, match=r"map\.txt"):
            check_class_order(swapped, ours=CLASSES, source="map.txt")


@pytest.mark.parametrize(
    ("lines", "sentence"),
    [
        (["riding a bike", "jumping", *CLASSES[2:]], "class 0 is 'riding a bike', expected 'jumping'; 2 of the 4"),
        (["jumping,1", "riding a bike,0", "skiing not slalom,2", "massaging persons head,3"], "2 of the 4 classes dif"),
        (sorted(CLASSES), "3 of the 4 classes differ, because these are sorted folder names;"),
        (CLASSES[:3], "has 3 classes; expected 4"),
        ([*CLASSES[:3], "skying"], r"'skying' is not one of the 4 classes \(1 names are not\)"),
        (["jumping,0", "riding a bike,2", "skiing not slalom,3", "massaging persons head,4"], "indices must be 0, 1"),
    ],
)
def test_label_maps_in_a_wrong_order_are_refused(lines: Sequence[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=rf"^map\.txt.*{sentence}"):
        check_class_order(lines, ours=CLASSES, source="map.txt")


def test_the_sorted_kinetics_map_is_refused_with_its_count(data_folder: Path) -> None:
    classes = read_classes(data_folder / "labels" / "kinetics700.txt")
    check_class_order(sorted(classes), ours=classes, source="spaces")  # sorting with spaces is the official order
    with pytest.raises(ValueError, match=r"5 of the 700 classes differ, because these are sorted folder names"):
        check_class_order(sorted(map(torchvision_folder, classes)), ours=classes, source="folders")


def lay_out(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()
    return folder


def test_class_folders_in_any_naming(tmp_path: Path) -> None:
    names = ("riding_a_bike/b.MP4", "massaging_persons_head/a.mp4", "jumping/.hidden.mp4", "jumping/note.txt")
    entries = read_class_folders(lay_out(tmp_path, *names, ".trash/jumping/z.mp4"), classes=CLASSES)
    assert [(e.video_id, e.label, e.split, e.keys) for e in entries] == [
        ("a", "massaging person's head", "", ("massaging_persons_head/a.mp4",)),
        ("b", "riding a bike", "", ("riding_a_bike/b.MP4",)),
    ]


def test_class_folders_below_splits_and_names_that_repeat(tmp_path: Path) -> None:
    folder = lay_out(tmp_path, "train/jumping/1.mp4", "val/jumping/1.mp4", "val/Riding A Bike/2.avi")
    entries = read_class_folders(folder, classes=CLASSES)
    assert [(e.video_id, e.label, e.split) for e in entries] == [
        ("train/jumping/1.mp4", "jumping", "train"),
        ("val/Riding A Bike/2.avi", "riding a bike", "val"),
        ("val/jumping/1.mp4", "jumping", "val"),
    ]
    labels = [e.label for e in read_class_folders(folder, classes=())]
    assert labels == ["jumping", "Riding A Bike", "jumping"]


def test_split_folders_by_their_usual_names(tmp_path: Path) -> None:
    names = {
        "train": "train", "training": "train", "Train": "train", "val": "val", "valid": "val", "validate": "val",
        "validation": "val", "test": "test", "testing": "test",
    }  # fmt: skip
    folder = lay_out(tmp_path, *(f"{name}/jumping/{name}.mp4" for name in names))
    assert {e.video_id: e.split for e in read_class_folders(folder, classes=CLASSES)} == names


@pytest.mark.parametrize(
    ("paths", "sentence"),
    [
        (["jumpng/1.mp4"], "the folder 'jumpng' is not one of the 4 classes; the nearest is 'jumping'"),
        (["1.mp4"], "must be laid out as <class>/clip.mp4 .*, got 1.mp4;"),
        (["jumping/1.mp4", "val/jumping/2.mp4"], "throughout, got jumping/1.mp4 and val/jumping/2.mp4"),
        (["jumping/1.txt"], "holds no video files"),
        (["UCF-101/jumping/1.mp4"], r"upper folder 'UCF-101' is no split; give --videos \S+/UCF-101\.$"),
        (["val/jumping/1.mp4", "more/jumping/2.mp4"], "upper folder 'more' is no split; rename it train, val or test"),
    ],
)
def test_faults_of_class_folders_are_sentences(tmp_path: Path, paths: list[str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        read_class_folders(lay_out(tmp_path, *paths), classes=CLASSES)


def test_a_list_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"l\.txt numbers classes, and none are given; give the names in their order"):
        read_peer_list(write(tmp_path / "l.txt", "a.mp4 0\n"), classes=(), split="val")


def test_an_annotation_file_that_is_missing_or_no_text_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no annotation file .*none\.txt"):
        read_peer_list(tmp_path / "none.txt", classes=CLASSES, split="val")
    (tmp_path / "latin.txt").write_bytes("é.mp4 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=re.escape("latin.txt is not a text file in UTF-8")):
        read_peer_list(tmp_path / "latin.txt", classes=CLASSES, split="val")
