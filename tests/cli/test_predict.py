"""`coca-video predict`: which files names stand for, their answers in order, status, progress, and workers that die."""

import io
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_video.cli import predict as verb
from coca_video.cli.__main__ import main
from coca_video.cli.predict import find_files
from coca_video.data.decode import UnreadableVideo
from coca_video.data.manifest import read_manifest
from coca_video.data.video import ClipConfig

# What imports timm is imported where it is used: the processes that read import this file, and need none of it.

CLASSES = ("wave", "push", "kick")
GIVEN = ClipConfig(num_frames=3, image_size=48)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    from coca_video.hub import save
    from coca_video.models.image import VitConfig
    from coca_video.models.video import VideoClassifier, VideoClassifierConfig

    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=3, num_frames=3)
    classifier = VideoClassifier(config)
    with torch.no_grad():
        classifier.head.classifier.weight.normal_(std=0.2)
    folder = tmp_path_factory.mktemp("predict") / "model"
    save(folder, model=classifier, classes=CLASSES)
    return str(folder)


@pytest.fixture
def clips(drawn_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five clips in two folders, with what is no clip beside them; the working directory is above."""
    names = ("clips/b.mp4", "clips/a.mp4", "clips/deep/c.mp4", "clips/deep/d[1].mp4", "clips/e.MP4")
    for name, row in zip(names, read_manifest(drawn_clips).rows[::4], strict=False):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(row.path, tmp_path / name)
    (tmp_path / "clips" / "notes.txt").write_text("no clip")
    (tmp_path / "clips" / "._a.mp4").write_text("no clip")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "clips"


def type_in(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))


def expected(model: str, name: str, *, num_frames: int | None = None) -> list[dict[str, Any]]:
    """All classes of a file as JSON has them, asked of the predictor in Python."""
    from coca_video.eval.predict import load_predictor

    options = {"decoder": "auto", "timeout_seconds": 60.0, "device": torch.device("cpu")}
    best = load_predictor(model, num_frames=num_frames, **options)(Path(name))
    return [{"label": label, "probability": probability} for label, probability in best]


def ask(*arguments: str, model: str) -> int:
    return main(["predict", *arguments, "--model", model, "--device", "cpu"])


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["clips/b.mp4", "clips/a.mp4", "clips/b.mp4"], ["clips/b.mp4", "clips/a.mp4", "clips/b.mp4"]),
        (["clips"], ["clips/a.mp4", "clips/b.mp4", "clips/deep/c.mp4", "clips/deep/d[1].mp4", "clips/e.MP4"]),
        (["clips/deep/", "clips/a.mp4"], ["clips/deep/c.mp4", "clips/deep/d[1].mp4", "clips/a.mp4"]),
        (["clips/*.mp4"], ["clips/a.mp4", "clips/b.mp4"]),
        (["clips/[b-z].*", "clips/a.mp4"], ["clips/b.mp4", "clips/e.MP4", "clips/a.mp4"]),
        (["clips/**/*.mp4"], ["clips/a.mp4", "clips/b.mp4", "clips/deep/c.mp4", "clips/deep/d[1].mp4"]),
        (["clips/n*"], ["clips/notes.txt"]),
        (["clips/deep/d[1].mp4"], ["clips/deep/d[1].mp4"]),
        (["missing.mp4", "s3://bucket/what?.mp4"], ["missing.mp4", "s3://bucket/what?.mp4"]),
        (["x" * 5000], ["x" * 5000]),
    ],
    ids=["files", "folder", "two", "glob", "set", "recursive", "any-file", "brackets", "not-looked-at", "too-long"],
)
def test_names_stand_for_files_in_their_order(names: list[str], files: list[str]) -> None:
    assert find_files(names) == files


def test_an_absolute_glob(clips: Path) -> None:
    assert find_files([f"{clips}/*.mp4"]) == [f"{clips}/a.mp4", f"{clips}/b.mp4"]


def test_a_folder_of_pictures_alone_stands_for_its_pictures(tmp_path: Path) -> None:
    for name in ("2.png", "1.JPG", "notes.txt"):
        (tmp_path / name).touch()
    assert find_files([str(tmp_path)]) == [str(tmp_path / "1.JPG"), str(tmp_path / "2.png")]
    (tmp_path / "clip.mkv").touch()  # the pictures are its thumbnails then
    assert find_files([str(tmp_path)]) == [str(tmp_path / "clip.mkv")]


@pytest.mark.usefixtures("clips")
def test_standard_input_names_files_line_by_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a line acts but that it may be a folder; names before and after it keep their places."""
    type_in(b"clips/e.MP4\r\n\nclips/deep\n*.mp4\n a b\n-\ncaf\xe9.mp4", monkeypatch)
    latin = os.fsdecode(b"caf\xe9.mp4")
    listed = ["clips/e.MP4", "clips/deep/c.mp4", "clips/deep/d[1].mp4", "*.mp4", " a b", "-", latin]
    assert find_files(["clips/b.mp4", "-", "clips/a.mp4"]) == ["clips/b.mp4", *listed, "clips/a.mp4"]


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["clips", "empty"], "The folder empty holds no videos or pictures, neither itself nor in folders below it."),
        (["clips/*.avi"], "No file matches clips/*.avi; ** stands for any number of folders."),
        (["dee*"], "No file matches dee*;"),
        (["-"], "expected names of video files on standard input, one a line; there was none."),
        ([""], "expected the name of a video file; got an empty one."),
        ([], "expected one or more video files; none was given."),
        (["clips", "--top", "0"], "--top must be at least 1; got 0."),
        (["clips", "--num-frames", "0"], "--num-frames must be at least 1; got 0."),
        (["clips", "--num-workers", "-1"], "--num-workers must be at least 0; got -1."),
        (["clips", "--timeout-seconds", "0"], "--timeout-seconds must be above 0; got 0."),
        (["clips", "--timeout-seconds", "nan"], "--timeout-seconds must be above 0; got nan."),
    ],
)
def test_a_mistake_is_a_sentence(
    arguments: list[str],
    sentence: str,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    type_in(b"\n", monkeypatch)
    assert ask(*arguments, model=model) == 2
    out, error = capsys.readouterr()
    assert error.startswith(f"coca-video: predict: {sentence}") and error.count("\n") == 1 and not out


@pytest.mark.usefixtures("clips")
def test_answers_in_the_order_given(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, standard input and a glob in one call; a broken file in between costs its own answer alone."""
    Path("broken.mp4").write_text("no video")
    type_in(b"clips/e.MP4\nbroken.mp4\n", monkeypatch)
    assert ask("clips/deep", "-", "clips/[ab].mp4", "--json", "--top", "3", model=model) == 1
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    good = ["clips/deep/c.mp4", "clips/deep/d[1].mp4", "clips/e.MP4", "clips/a.mp4", "clips/b.mp4"]
    answers = [{"file": name, "top": expected(model, name)} for name in good]
    assert len({str(answer["top"]) for answer in answers}) == 5
    cause = lines[3].pop("error")
    assert lines == [*answers[:3], {"file": "broken.mp4"}, *answers[3:]]
    assert cause.startswith("broken.mp4: ") and error == f"coca-video predict: {cause}\n"
    assert ask("clips", model=model) == 0


@pytest.mark.usefixtures("clips")
def test_text_says_what_json_says(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask("clips/a.mp4", "clips/b.mp4", "--top", "2", model=model) == 0
    out, error = capsys.readouterr()
    assert out.splitlines() == [
        line
        for name in ("clips/a.mp4", "clips/b.mp4")
        for line in [name, *(f"  {e['probability']:.4f}  {e['label']}" for e in expected(model, name)[:2])]
    ]
    assert error == ""  # no bar for few files where nobody watches


def test_a_name_that_is_no_text_is_shown_all_the_same(
    clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9.mp4")
    try:
        (clips / "a.mp4").rename(name)
    except OSError:
        pytest.skip("this file system takes no such name")
    assert ask(name, model=model) == 0
    assert capsys.readouterr().out.splitlines()[0] == r"caf\xe9.mp4"
    assert ask(name, "--json", model=model) == 0
    assert os.fsencode(json.loads(capsys.readouterr().out)["file"]) == b"caf\xe9.mp4"


@pytest.mark.usefixtures("clips")
def test_every_option_changes_what_is_printed(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*options: str, status: int = 0) -> str:
        assert ask("clips/a.mp4", *options, model=model) == status
        out, error = capsys.readouterr()
        return out + error

    plain = printed()
    assert printed("--top", "1").splitlines() == plain.splitlines()[:2]
    assert printed("--top", "99") == plain
    more = json.loads(printed("--num-frames", "7", "--json"))["top"]
    assert more == expected(model, "clips/a.mp4", num_frames=7) != expected(model, "clips/a.mp4")
    assert "takes longer than 1e-07 s; it was given up" in printed("--timeout-seconds", "1e-7", status=1)


def test_files_that_may_not_be_read(
    clips: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the system says of a file, it is that file's error."""

    def refuse(name: str, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", name)

    monkeypatch.setattr("coca_video.data.video.load_clip", refuse)
    assert ask(str(clips / "a.mp4"), str(clips / "b.mp4"), model=model) == 1
    assert capsys.readouterr().err.splitlines() == [
        f"coca-video predict: {clips / name}: it cannot be read (Permission denied)" for name in ("a.mp4", "b.mp4")
    ]


@pytest.mark.usefixtures("clips")
@pytest.mark.parametrize(("is_terminal", "many"), [(True, 100), (False, 3), (True, 3)], ids=["watched", "log", "both"])
def test_progress_is_told_beside_the_results(
    is_terminal: bool,
    many: int,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With the time left, on standard error; standard output is what it is without."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal)
    monkeypatch.setattr(verb, "MANY_FILES", many)
    assert ask("clips/a.mp4", "clips/none.mp4", "clips/b.mp4", "--json", model=model) == 1
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == ["clips/a.mp4", "clips/none.mp4", "clips/b.mp4"]
    assert "predicting" in error and re.search(r"3/3 \[\d\d:\d\d<", error)
    assert "coca-video predict: clips/none.mp4: there is no such file\n" in error
    assert ask("clips/a.mp4", "--json", model=model) == 0
    assert capsys.readouterr().err == ""  # one file: nothing to wait for


def read_with_traps(name: str, *, config: ClipConfig) -> object:
    """In place of `_read_or_error`: a decoder that hangs, and one that crashes, by the file's name."""
    match Path(name).stem:
        case "hangs":
            time.sleep(600)
        case "crashes":
            os.kill(os.getpid(), signal.SIGSEGV)
    return verb.read_frames(name, config=config)


@pytest.mark.drill
@pytest.mark.usefixtures("clips")
def test_processes_that_die_cost_their_own_files(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each good file gets what one process gives it, to the last bit, in the order given."""
    monkeypatch.setattr(verb, "_read_or_error", read_with_traps)
    names = ["clips/b.mp4", "crashes", "none.mp4", *find_files(["clips"]), "hangs"]
    options = ["--json", "--top", "3", "--num-workers", "2", "--timeout-seconds", "2"]
    assert ask(*names, *options, model=model) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["file"] for line in lines] == names
    assert [line.get("error") for line in lines] == [
        None,
        "crashes: the process that read it died (signal 11)",
        "none.mp4: there is no such file",
        *[None] * 5,
        "hangs: took longer than 2 s",
    ]
    for line in lines:
        assert "error" in line or line["top"] == expected(model, line["file"])


def test_what_a_process_is_asked_is_what_one_process_reads(clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one thread here: its result is that of `read_frames`, or the error itself, without being raised."""
    name = str(clips / "a.mp4")
    frames = verb._read_or_error(name, config=GIVEN)
    assert isinstance(frames, np.ndarray) and frames.shape == (3, 3, 48, 48) and frames.dtype == np.uint8
    assert np.array_equal(frames, verb.read_frames(name, config=GIVEN))
    assert verb._read_or_error("none.mp4", config=GIVEN) == "none.mp4: there is no such file"
    for raised, found in [
        (UnreadableVideo("x: damaged"), "x: damaged"),
        (OSError(5, "Input/output error"), "x: it cannot be read (Input/output error)"),
        (OSError("timed out"), "x: it cannot be read (timed out)"),
    ]:
        monkeypatch.setattr("coca_video.data.video.load_clip", lambda *_, error=raised, **__: _raise(error))
        assert verb.read_frames("x", config=GIVEN) == found
    monkeypatch.setattr("coca_video.data.video.load_clip", lambda *_, **__: _raise(ValueError("no decoder")))
    error = verb._read_or_error("x", config=GIVEN)
    assert isinstance(error, ValueError) and str(error) == "no decoder"


def _raise(error: BaseException) -> None:
    raise error


def test_reading_ahead_keeps_few_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a thousand, four at most are read before the first is taken; those that are not taken are not read at all."""
    asked: list[str] = []

    class Pool:
        def __init__(self, read: Any, *, num_workers: int, timeout_seconds: float, warm_up: Any) -> None:
            assert (num_workers, timeout_seconds) == (2, 7.0)
            assert read.keywords["config"].timeout_seconds == float("inf")

        def __enter__(self) -> "Pool":
            return self

        def __exit__(self, *_: object) -> None: ...

        def call(self, name: str, *, cancelled: Any) -> str:
            asked.append(name)
            return f"{name}: no"

    monkeypatch.setattr("coca_video.data.worker_pool.WorkerPool", Pool)
    config = ClipConfig(timeout_seconds=7.0)
    names = [f"{number}.mp4" for number in range(1000)]
    clips = verb._clips_ahead(names, config=config, num_workers=2)
    first = [next(clips) for _ in range(10)]
    clips.close()
    assert first == [(name, f"{name}: no") for name in names[:10]]
    assert len(asked) <= 13
    asked.clear()
    assert list(verb._clips_ahead(names, config=config, num_workers=2)) == [(name, f"{name}: no") for name in names]
    assert sorted(asked) == sorted(names)
    monkeypatch.setattr(Pool, "call", lambda *_, **__: ValueError("the decoder does not work here"))
    with pytest.raises(ValueError, match="the decoder does not work here"):
        next(verb._clips_ahead(names, config=config, num_workers=2))
