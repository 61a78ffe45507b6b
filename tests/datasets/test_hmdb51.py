"""HMDB51's recipe on split files written by hand in their true form: marks 0, 1, 2 and names with odd characters."""

import logging
import unicodedata
from pathlib import Path, PurePosixPath

import pytest
from tqdm import tqdm

from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes
from tests.datasets.samples import assert_sample_is_the_head

FOLDER = Path(__file__).resolve().parents[2] / "datasets" / "hmdb51"
RECIPE = load_recipe(FOLDER)
CLASSES = recipe_classes(RECIPE, folder=FOLDER, version="1")

# the files end each line in a blank
BRUSH_HAIR = """April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1 
Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!_brush_hair_h_cm_np1_le_goo_1.avi 2 
brush_hair_u_nm_np1_ba_goo_3.avi 0 
"""  # noqa: W291
PICK = """#122_Cleaning_Up; The Beach & Chiba_pick_f_nm_np1_fr_bad_0.avi 1 
Haarekämmen_pick_h_cm_np1_fr_goo_0.avi 2 
"""  # noqa: W291


def lay_out(folder: Path, *, version: str = "1", **classes: str) -> Path:
    """All 51 files; a class that is not given has one clip that is not used."""
    folder.mkdir(exist_ok=True)
    for label in CLASSES:
        text = classes.get(label, f"Film_{label}_f_nm_np1_fr_med_0.avi 0 \n")
        (folder / f"{label}_test_split{version}.txt").write_text(text, encoding="utf-8")
    return folder


def clips(*annotations: Path, version: str = "1") -> list[Entry]:
    request = Request(annotations=annotations, videos=Path("hmdb51_org"), version=version, classes=CLASSES)
    return RECIPE.list_clips(request)


def found(entries: list[Entry], file: str) -> list[str]:
    keys = set(RECIPE.file_keys(PurePosixPath(file)))
    return [entry.video_id for entry in entries if keys & set(entry.keys)]


def test_entries_and_the_count_of_what_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        entries = clips(lay_out(tmp_path, brush_hair=BRUSH_HAIR, pick=PICK))
    brushing = "Brushing_Her_Hair__[_NEW_AUDIO_]_UPDATED!!!!"
    assert [(entry.video_id, entry.label, entry.split, entry.source_id) for entry in entries] == [
        ("April_09_brush_hair_u_nm_np1_ba_goo_0", "brush_hair", "train", "April_09"),
        (f"{brushing}_brush_hair_h_cm_np1_le_goo_1", "brush_hair", "test", brushing),
        (
            "#122_Cleaning_Up; The Beach & Chiba_pick_f_nm_np1_fr_bad_0",
            "pick",
            "train",
            "#122_Cleaning_Up; The Beach & Chiba",
        ),
        ("Haarekämmen_pick_h_cm_np1_fr_goo_0", "pick", "test", "Haarekämmen"),
    ]
    # one of brush_hair, and one of each of the 49 other classes
    assert caplog.messages == ["HMDB51 split 1 does not use 50 of 54 clips (marked 0)."]


def test_source_is_what_stands_before_the_class(tmp_path: Path) -> None:
    """The last place of the class counts, and kick is not taken for a part of kick_ball."""
    smoke = "smoking_smoke_again_smoke_h_nm_np1_ba_goo_0.avi 1\nsmoke_h_nm_np1_ba_goo_2.avi 1\n"
    kick_ball = "Amelie_kick_ball_f_cm_np1_ba_med_0.avi 2\n"
    entries = clips(lay_out(tmp_path, smoke=smoke, kick_ball=kick_ball))
    assert {entry.video_id: entry.source_id for entry in entries} == {
        "smoking_smoke_again_smoke_h_nm_np1_ba_goo_0": "smoking_smoke_again",
        "smoke_h_nm_np1_ba_goo_2": None,
        "Amelie_kick_ball_f_cm_np1_ba_med_0": "Amelie",
    }


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("smoke/smoking_smoke_again_smoke_h_nm_np1_ba_goo_0.avi", "smoking_smoke_again"),
        ("smoke/smoke_h_nm_np1_ba_goo_2.avi", None),
        ("Amelie_kick_ball_f_cm_np1_ba_med_0.avi", "Amelie"),
        ("Film_draw_sword_f_cm_np1_ba_med_0.avi", "Film"),
        ("sword/Film_draw_sword_f_cm_np1_ba_med_0.avi", "Film_draw"),
        (unicodedata.normalize("NFD", "Haarek\u00e4mmen_pick_h_cm_np1_fr_goo_0.avi"), "Haarek\u00e4mmen"),
        ("pick/my_own.avi", None),
    ],
)
def test_source_of_a_path(path: str, source: str | None) -> None:
    assert RECIPE.source_id(PurePosixPath(path)) == source


def test_a_name_in_two_classes_is_told_apart_by_its_folder(tmp_path: Path) -> None:
    shared = "Film_sword_exercise_f_cm_np1_ba_med_0.avi"
    entries = clips(
        lay_out(
            tmp_path,
            sword=f"{shared} 1\nAlone_sword_f_cm_np1_ba_med_0.avi 1\n",
            sword_exercise=f"{shared} 2\n",
        )
    )
    assert found(entries, f"hmdb51/sword/{shared}") == ["sword/Film_sword_exercise_f_cm_np1_ba_med_0"]
    assert found(entries, f"sword_exercise/{shared}") == ["sword_exercise/Film_sword_exercise_f_cm_np1_ba_med_0"]
    assert found(entries, shared) == []
    assert found(entries, "Alone_sword_f_cm_np1_ba_med_0.mp4") == ["Alone_sword_f_cm_np1_ba_med_0"]


@pytest.mark.parametrize(
    "file",
    [
        "pick/Haarekämmen_pick_h_cm_np1_fr_goo_0.avi",
        unicodedata.normalize("NFD", "pick/Haarekämmen_pick_h_cm_np1_fr_goo_0.avi"),  # macOS
        "Pick/Haarekämmen_pick_h_cm_np1_fr_goo_0.MP4",
        "rawframes/pick/Haarekämmen_pick_h_cm_np1_fr_goo_0",  # a folder of frames
    ],
)
def test_odd_file_names_are_found(file: str, tmp_path: Path) -> None:
    entries = clips(lay_out(tmp_path, pick=PICK))
    assert found(entries, file) == ["Haarekämmen_pick_h_cm_np1_fr_goo_0"]


def test_the_version_is_the_split(tmp_path: Path) -> None:
    lay_out(tmp_path, pick="Film_pick_f_cm_np1_ba_med_0.avi 1\n")
    lay_out(tmp_path, version="2", pick="Film_pick_f_cm_np1_ba_med_0.avi 2\n")
    assert [entry.split for entry in clips(tmp_path, version="1")] == ["train"]
    assert [entry.split for entry in clips(*sorted(tmp_path.iterdir()), version="2")] == ["test"]


@pytest.mark.parametrize(
    ("pick", "sentence"),
    [
        ("a_pick_0.avi 3\n", r"pick_test_split1.txt, line 1: expected 'name.avi' and 0, 1 or 2, got 'a_pick_0.avi 3'"),
        ("\na_pick_0 1\n", "line 2: expected 'name.avi' and"),
    ],
)
def test_a_wrong_file_is_a_sentence(pick: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=sentence):
        clips(lay_out(tmp_path, pick=pick))


def test_missing_and_unreadable_files_are_sentences(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"split 2 needs 51 files, one a class, and 51 are not .*: brush_hair_test_spl"
    ):
        clips(lay_out(tmp_path), version="2")
    (tmp_path / "wave_test_split1.txt").unlink()
    with pytest.raises(
        ValueError, match=r"and 1 are not among --annotations: wave_test_split1.txt; give it the folder"
    ):
        clips(tmp_path)
    (tmp_path / "wave_test_split1.txt").write_bytes("Mädchen_wave_f_cm_np1_ba_med_0.avi 1\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"wave_test_split1.txt is not a text file in UTF-8"):
        clips(tmp_path)


def test_official_counts_and_classes() -> None:
    """70 and 30 clips of each of 51 classes (the lists' own read-me), in each split."""
    assert list(RECIPE.versions) == ["1", "2", "3"]
    for version in RECIPE.versions.values():
        assert version.official == {"train": 51 * 70, "test": 51 * 30}
    assert len(CLASSES) == 51
    assert list(CLASSES) == sorted(CLASSES)  # here the official order is that of names


def test_class_folders_need_the_lists_or_folders_of_splits(tmp_path: Path) -> None:
    def run(videos: Path) -> list[tuple[str, str | None, str]]:
        config = PrepareConfig(videos=videos, out=tmp_path / "out", check="none", num_workers=1)
        report = prepare(RECIPE, folder=FOLDER, config=config, progress=lambda what, **c: tqdm(disable=True, **c))
        return [(row.video_id, row.split, row.extra["source_id"]) for row in report.manifest_rows]

    name = "April_09_brush_hair_u_nm_np1_ba_goo_0"
    for above in ("flat", "split/Training"):
        (tmp_path / above / "brush_hair").mkdir(parents=True)
        (tmp_path / above / "brush_hair" / f"{name}.avi").write_text(name)
    with pytest.raises(
        ValueError, match=r"which clips are of which official split of HMDB51: .* takes: The folder testTrainMulti"
    ):
        run(tmp_path / "flat")
    assert run(tmp_path / "split") == [(name, "train", "April_09")]


def test_sample_is_the_head_of_the_manifest(tmp_path: Path) -> None:
    assert_sample_is_the_head(
        FOLDER,
        videos=tmp_path / "hmdb51_org",
        annotations=(lay_out(tmp_path / "lists", brush_hair=BRUSH_HAIR),),
        num_rows=1,
    )


@pytest.mark.parametrize(
    ("file", "label", "source"),
    [
        ("torchvision_SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi", "wave", "SchoolRulesHowTheyHelpUs"),
        (
            "torchvision_hmdb51_Turnk_r_Pippi_Michel_cartwheel_f_cm_np2_le_med_6.avi",
            "cartwheel",
            "Turnk_r_Pippi_Michel",
        ),
    ],
)
def test_real_file_names(file: str, label: str, source: str, tmp_path: Path, data_folder: Path) -> None:
    name = file.removeprefix("torchvision_").removeprefix("hmdb51_")
    assert (data_folder / "clips" / file).is_file()
    (entry,) = clips(lay_out(tmp_path, **{label: f"{name} 1 \n"}))
    assert (entry.label, entry.source_id) == (label, source)
    assert found([entry], f"{label}/{name}") == [entry.video_id]
