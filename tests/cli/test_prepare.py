"""`coca-video prepare` as a person runs it: Kinetics in every layout, bad files, a stop in the middle."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coca_video.cli.prepare import PrepareOptions, run
from coca_video.data.manifest import read_manifest

R6, SOX = "R6llTwEh07w_000000_000010", "SOX5yA1l24A_000299_000309"
LAYOUTS = {
    "flat, as CVDF's archives": "{id}.mp4",
    "class folders with spaces": "using segway/{id}.mp4",
    "class folders with underscores": "using_segway/{id}.mp4",
    "as torchvision writes them": "val/using_segway/{id}.mp4",
    "as MMAction2 does": "using_segway/{youtube_id}.mp4",
}
PROJECT = Path(__file__).resolve().parents[2]
# in the drills: each starts two processes that import torch
MORE_LAYOUTS = [pytest.param(layout, marks=pytest.mark.drill) for layout in list(LAYOUTS.values())[1:]]
COMMAND = (sys.executable, "-c", "import sys; from coca_video.cli.prepare import run; sys.exit(run(sys.argv[1:]))")


@pytest.fixture
def true_clips(data_folder: Path) -> dict[str, Path]:
    """The two clips of Kinetics that are at hand, by their ids; both are of K400's validation split."""
    clips = data_folder / "clips"
    return {R6: clips / "torchvision_R6llTwEh07w.mp4", SOX: clips / "torchvision_SOX5yA1l24A.mp4"}


@pytest.mark.slow
@pytest.mark.parametrize("layout", [next(iter(LAYOUTS.values())), *MORE_LAYOUTS])
def test_the_two_true_clips_of_kinetics_are_found_in_every_layout(
    layout: str, true_clips: dict[str, Path], data_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for video_id, clip in true_clips.items():
        path = tmp_path / "videos" / layout.format(id=video_id, youtube_id=video_id[:11])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(clip)
    annotations = data_folder / "kinetics" / "kinetics-400_val.csv"
    status = run(
        ["datasets/kinetics", "--version", "400", "--videos", str(tmp_path / "videos"), "--annotations",
         str(annotations), "--out", str(tmp_path / "out"), "--num-workers", "1"]
    )  # fmt: skip
    assert status == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "Kinetics 400: 2 of 19,906 listed clips found"
    assert out[1] == "  val: 19,906 listed of 19,906 official, 2 found, 2 in the manifest"
    assert out[2].startswith("missing: 19,904: ") and out[3:] == [f"manifest: {tmp_path / 'out' / 'manifest.csv'}"]
    manifest = read_manifest(tmp_path / "out" / "manifest.csv")
    manifest.check_files()
    assert [(row.video_id, row.label, row.split, row.extra["source_id"]) for row in manifest.rows] == [
        (R6, "using segway", "val", R6[:11]),
        (SOX, "using segway", "val", SOX[:11]),
    ]
    assert len(manifest.classes) == 400
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary[name] for name in ("listed", "found", "missing", "corrupt", "short")] == [19_906, 2, 19_904, 0, 0]


@pytest.fixture
def own_clips(drawn_clips: Path, tmp_path: Path) -> Path:
    """Nine drawn clips below two class folders, and the command's folder for results beside them."""
    paths = sorted(drawn_clips.parent.rglob("*.mp4"))[:9]
    assert len(paths) == 9
    for number, path in enumerate(paths):
        folder = tmp_path / "videos" / ("left" if number < 5 else "right")
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"clip{number}.mp4")
    return tmp_path / "videos"


def options(videos: Path, *more: str) -> list[str]:
    return ["datasets/folder", "--videos", str(videos), "--out", str(videos.parent / "out"), *more]


@pytest.mark.slow
def test_bad_files_give_status_1_and_are_named(own_clips: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = (own_clips / "left" / "clip0.mp4").read_bytes()
    (own_clips / "left" / "clip0.mp4").write_bytes(whole[: len(whole) // 2])
    (own_clips / "left" / "clip1.mp4").write_bytes(b"")
    (own_clips / "right" / "clip8.mp4").write_text("text")
    _only_sound(own_clips / "right" / "clip9.mp4")
    assert run(options(own_clips, "--num-workers", "2")) == 1
    out, err = capfd.readouterr()
    assert "own clips: 10 files found\n  no split: 10 found, 6 in the manifest\n" in out
    assert "corrupt: 4: clip0 (" in out and "clip1 (the file is empty (0 bytes))" in out
    assert "checking files: 100%" in err and "10/10" in err
    manifest = read_manifest(own_clips.parent / "out" / "manifest.csv")
    assert {row.video_id for row in manifest.rows} == {f"clip{number}" for number in range(2, 8)}
    assert manifest.classes == ("left", "right")
    scan = (own_clips.parent / "out" / "scan.csv").read_text()
    assert "the file has no video stream" in scan.splitlines()[10]


def _only_sound(path: Path) -> None:
    """An MP4 of a second of silence, by the ffmpeg program."""
    if shutil.which("ffmpeg") is None:
        from tests.conftest import skip_or_fail

        skip_or_fail("ffmpeg", reason="there is no ffmpeg program")
    source = ["-f", "lavfi", "-i", "anullsrc", "-t", "1", "-c:a", "aac"]
    subprocess.run(["ffmpeg", "-loglevel", "error", *source, str(path)], check=True)


@pytest.mark.drill
def test_interrupted_in_the_middle_the_same_command_goes_on(own_clips: Path) -> None:
    for number in range(120):
        shutil.copyfile(own_clips / "left" / "clip0.mp4", own_clips / "left" / f"copy{number}.mp4")
    journal = own_clips.parent / "out" / "scan.jsonl"
    arguments = options(own_clips, "--num-workers", "2")
    started = subprocess.Popen(
        [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True
    )
    assert _wait(lambda: journal.exists() and journal.read_bytes().count(b"\n") >= 10)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    _, err = started.communicate(timeout=60)
    done = journal.read_bytes().count(b"\n")
    assert 10 <= done < 129 and not (journal.parent / "manifest.csv").exists()
    assert f"KeyboardInterrupt: Interrupted; what was checked is kept in {journal}: the same command goes on" in err
    assert "SpawnProcess" not in err  # no traceback of any worker
    again = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300)
    assert (again.returncode, again.stdout.splitlines()[0]) == (0, "own clips: 129 files found")
    assert f"{done}/129" in again.stderr  # the bar starts at what was done
    checks = [line for line in map(json.loads, journal.read_text().splitlines()) if "status" in line]
    assert len(checks) == len({line["path"] for line in checks}) == 129


def _wait(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while time.monotonic() < end and not condition():
        time.sleep(0.01)
    return condition()


def test_options_reach_what_prepares(own_clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PrepareOptions] = []

    def noting(*_: object, config: PrepareOptions, **__: object) -> None:
        seen.append(config)
        raise ValueError("enough")

    monkeypatch.setattr("coca_video.cli.prepare.prepare", noting)
    with pytest.raises(ValueError, match="enough"):
        run(
            options(
                own_clips, "--annotations", "a.csv", "b.csv", "--version", "1", "--split", "val", "--classes", "c.txt",
                "--check", "full", "--num-workers", "3", "--timeout-seconds", "7", "--min-seconds", "2.5",
                "--drop-short", "--against", "o.csv",
            )
        )  # fmt: skip
    assert seen == [
        PrepareOptions(
            recipe=Path("datasets/folder"), videos=own_clips, out=own_clips.parent / "out", version="1", split="val",
            annotations=(Path("a.csv"), Path("b.csv")), classes=Path("c.txt"), check="full", num_workers=3,
            timeout_seconds=7.0, min_seconds=2.5, drop_short=True, against=Path("o.csv"),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["kinetics", "datasets/kinetiks", "./kinetics/"])
def test_a_recipe_that_is_not_there_is_a_sentence_with_the_nearest(name: str) -> None:
    with pytest.raises(ValueError, match=r"no recipe \S*kineti.s, .* did you mean datasets/kinetics\?$"):
        run([name])


def test_only_folders_with_a_recipe_are_offered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets" / "zzz").mkdir(parents=True)
    (tmp_path / "datasets" / "kinetics").mkdir()  # of the videos themselves: the recipe is the one that is shipped
    shipped = sorted(path.parent.name for path in (PROJECT / "datasets").glob("*/prepare.py"))
    names = ", ".join(f"datasets/{name}" for name in shipped)
    with pytest.raises(ValueError, match=f"; the recipes there are: {names}\\.$"):
        run(["zzzz", "--videos", "v", "--out", "o"])
    with pytest.raises(ValueError, match="There is no folder v;"):
        run(["datasets/kinetics", "--videos", "v", "--out", "o"])


def test_help_of_a_recipe_tells_of_it_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    program = "import sys; from coca_video.cli.prepare import run\ntry: run(sys.argv[1:])\nfinally: print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, "datasets/ucf101", "--help"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(
        "UCF101: --version (the first is the default) and official clips\n"
        "  1     9,537 train, 3,783 test\n"
        "  2     9,586 train, 3,734 test\n"
        "  3     9,624 train, 3,696 test\n"
        "--annotations: The folder ucfTrainTestlist, "
    )
    assert "--annotations [PATH" in done.stdout
    modules = done.stdout.splitlines()[-1].split()
    assert "coca_video.data.recipe" in modules and not {"torch", "av", "decord", "torchcodec"} & set(modules)


def test_a_wrong_option_is_a_sentence_and_status_2(own_clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(options(own_clips, "--num-workers", "0"))
    assert stopped.value.code == 2
    assert "--num-workers must be at least 1; got 0." in capsys.readouterr().err


def test_the_recipe_is_found_from_another_folder(own_clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own_clips.parent)
    assert run(options(own_clips, "--check", "none", "--num-workers", "1")) == 0
    rows = read_manifest(own_clips.parent / "out" / "manifest.csv").rows
    assert [row.label for row in rows] == ["left"] * 5 + ["right"] * 4
