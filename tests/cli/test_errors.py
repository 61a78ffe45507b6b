"""What a person can get wrong: one clear sentence each on standard error, no traceback, a status that is not 0."""

import json
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from coca_video.cli.__main__ import main
from coca_video.data.image_text import encode_jpeg, write_shard
from coca_video.data.manifest import read_manifest
from coca_video.hub import save
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

PROBE = """
from pathlib import Path
from coca_video.models.image import VitConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.loop import LoopConfig
config = ProbeConfig(
    encoder=RandomEncoder(image=VitConfig.tiny()), clips=ClipsConfig(train=Path({train!r})), out=Path({out!r}),
    num_frames=2, token_cache=Path({out!r}) / "tokens", augment=False,
    loop=LoopConfig(steps=2, batch_size=4), device="cpu",
)
"""


PRETRAIN = """
from pathlib import Path
from coca_video.models.coca import CoCaConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.pretrain import PairsConfig, PretrainConfig
folder = Path({folder!r})
config = PretrainConfig(
    model=CoCaConfig.tiny(), out=folder / "run",
    pairs=PairsConfig(train=folder / "train.tar", test=folder / "test.tar"),
    loop=LoopConfig(steps=3, batch_size=4), device="cpu",
)
"""


@pytest.fixture
def clips(drawn_clips: Path, tmp_path: Path) -> Path:
    """A copy of the drawn clips that a test may break."""
    shutil.copytree(drawn_clips.parent, tmp_path / "clips")
    return tmp_path / "clips" / "manifest.csv"


@pytest.fixture
def probe(clips: Path, tmp_path: Path) -> list[str]:
    """The arguments of a small probe run on those clips."""
    config = tmp_path / "probe.py"
    config.write_text(PROBE.format(train=str(clips), out=str(tmp_path / "run")))
    return ["probe", str(config)]


@pytest.fixture
def model(clips: Path, tmp_path: Path) -> Path:
    """A model folder with the drawn clips' classes."""
    classes = read_manifest(clips).classes
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=len(classes), num_frames=2)
    save(tmp_path / "model", model=VideoClassifier(config), classes=classes)
    return tmp_path / "model"


def fails(arguments: list[str], capsys: pytest.CaptureFixture[str], *, status: int = 2) -> str:
    """Runs, checks the status and that the last thing said is one sentence; returns it."""
    assert main(arguments) == status
    error = capsys.readouterr().err
    assert "Traceback" not in error
    last = error.strip().splitlines()[-1]
    assert last.startswith("coca-video: ")
    return last


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_a_wrong_label(probe: list[str], clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(clips, ",spin,", ",spinn,")
    sentence = fails(probe, capsys)
    assert "label 'spinn' is not one of the 5 classes" in sentence and "'spin'" in sentence


def test_an_empty_manifest(probe: list[str], clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips.write_text(clips.read_text().splitlines()[0] + "\n")
    assert "is an empty manifest" in fails(probe, capsys)


def test_a_missing_file(probe: list[str], clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gone = read_manifest(clips).rows[3].path
    gone.unlink()
    sentence = fails(probe, capsys)
    assert "names 1 of 20 files that are not on disk" in sentence and str(gone) in sentence


def test_a_missing_split(probe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    sentence = fails([*probe, "--clips.test-split", "val"], capsys)
    assert "has no clips of split 'val'; the splits there are: 'test', 'train'" in sentence


def test_no_order_of_classes(probe: list[str], clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clips.with_name("classes.txt").unlink()
    assert "printf '%s\\n' 'blink' 'change_colour'" in fails(probe, capsys)


def test_corrupt_clips_in_evaluation(model: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The figures are printed and written all the same, with and without the video, and the status is 1."""
    broken = read_manifest(clips).select(split="test").rows[0]
    broken.path.write_bytes(b"no video")
    arguments = ["evaluate", str(clips), "--model", str(model), "--split", "test", "--device", "cpu"]
    assert main(arguments) == 1
    out, error = capsys.readouterr()
    assert "videos      9 read, 1 unreadable" in out and "of all 10, unreadable as wrong)" in out
    assert "1 of 10 could not be read" in error and f"{broken.path}: " in error and "Traceback" not in error
    document = json.loads((model / "evaluation" / "manifest_test.json").read_text())
    assert (document["num_videos"], document["num_unreadable"]) == (9, 1)
    assert list(document["unreadable"]) == [broken.video_id]
    assert document["top1_unreadable_wrong"] == pytest.approx(0.9 * document["top1"])


def test_corrupt_clips_in_training(probe: list[str], clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The probe is trained, evaluated and kept all the same; the status is 1."""
    broken = read_manifest(clips).select(split="train").rows[0]
    broken.path.write_bytes(b"no video")
    assert main(probe) == 1
    out, error = capsys.readouterr()
    assert "videos      10 read, 0 unreadable" in out
    assert "1 clips could not be read; they are listed in" in error and "Traceback" not in error
    run = clips.parent.parent / "run"
    assert broken.video_id in (run / "unreadable.csv").read_text() and (run / "model" / "model.safetensors").is_file()


def test_corrupt_pairs_in_pretraining(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One in training, one in the test pairs: both are listed, the figures are over the others, the status is 1."""
    for name, first in (("train", 0), ("test", 10)):
        shard = tmp_path / f"{name}.tar"
        pictures = {f"{n:03d}": torch.full((3, 48, 48), n, dtype=torch.uint8) for n in range(first, first + 5)}
        write_shard(shard, pairs=[(key, encode_jpeg(picture), ["a b"]) for key, picture in pictures.items()])
        with tarfile.open(shard) as tar:
            member = tar.getmember(f"{first + 2:03d}.jpg")
        with shard.open("r+b") as file:
            file.seek(member.offset_data)
            file.write(bytes(member.size))
    config = tmp_path / "pretrain.py"
    config.write_text(PRETRAIN.format(folder=str(tmp_path)))
    assert main(["pretrain", str(config)]) == 1
    assert "2 pairs could not be read; they are listed in" in capsys.readouterr().err
    listed = (tmp_path / "run" / "unreadable.csv").read_text()
    assert "002," in listed and "012," in listed


@pytest.mark.parametrize("content", [b"", b"this is a text", None], ids=["empty", "text", "missing"])
def test_files_that_are_no_video_in_prediction(
    model: Path, clips: Path, capsys: pytest.CaptureFixture[str], content: bytes | None
) -> None:
    """The good files before and after are answered."""
    good = [row.path for row in read_manifest(clips).rows[:2]]
    bad = clips.parent / "bad.mp4"
    if content is not None:
        bad.write_bytes(content)
    arguments = ["predict", str(good[0]), str(bad), str(good[1]), "--model", str(model), "--json", "--top", "2"]
    assert main([*arguments, "--device", "cpu"]) == 1
    out, error = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["file"] for line in lines] == [str(good[0]), str(bad), str(good[1])]
    assert len(lines[0]["top"]) == len(lines[2]["top"]) == 2 and "top" not in lines[1]
    assert lines[1]["error"].startswith(f"{bad}: ")
    assert error.strip() == f"coca-video predict: {lines[1]['error']}"


def test_predictions_are_probabilities_in_order(model: Path, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = read_manifest(clips).rows[0].path
    assert main(["predict", str(path), "--model", str(model), "--top", "9", "--json", "--device", "cpu"]) == 0
    top = json.loads(capsys.readouterr().out)["top"]
    probabilities = [entry["probability"] for entry in top]
    assert len(top) == 5 and sum(probabilities) == pytest.approx(1.0) and probabilities == sorted(probabilities)[::-1]
    assert (
        main(["predict", str(path), "--model", str(model), "--top", "1", "--num-frames", "7", "--device", "cpu"]) == 0
    )
    text = capsys.readouterr().out
    assert text.splitlines()[0] == str(path) and f"{probabilities[0]:.4f}" not in text


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["probee"],
            "there is no verb 'probee'; expected one of quickstart, doctor, prepare, transcode, tokenizer,",
        ),
        (["probe"], "expected a config file, such as configs/probe/own_clips.py; none was given."),
        (["pretrain"], "expected a config file, such as configs/pretrain/flickr8k_small.py; none was given."),
        (["probe", "configs/none.py"], "There is no file configs/none.py, neither here nor among those that come with"),
        (["pretrain", "configs/probe/own_clips.py"], "got ProbeConfig."),
        (["evaluate", "x.csv", "--model", "none"], "Expected a finished run or a model folder"),
        (["predict", "x.mp4", "--model", "none"], "Expected a finished run or a model folder"),
        (["predict", "--model", "none"], "expected one or more video files; none was given."),
        (["predict", "x.mp4", "--model", "none", "--top", "0"], "--top must be at least 1; got 0."),
    ],
)
def test_arguments_that_cannot_be(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert sentence in fails(arguments, capsys)


@pytest.mark.parametrize(
    ("option", "near"), [("--num-framse", "--num-frames"), ("--optim.learnig-rate", "--optim.learning-rate")]
)
def test_a_misspelt_option(probe: list[str], option: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([*probe, option, "3"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert f"Unrecognized options: {option}" in error and near in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("config = (", "is no config that Python can run"),
        ("import nothing_of_that_name", "is no config that Python can run: No module named 'nothing_of_that_name'"),
        ("x = 1", "expected a line `config = ProbeConfig(...)`, which `coca-video probe` takes; got no `config`."),
    ],
)
def test_broken_configs(content: str, sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.py").write_text(content)
    assert sentence in fails(["probe", str(tmp_path / "config.py")], capsys)


def test_a_value_out_of_range(probe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected num_frames and image_size of at least 1, got 0" in fails([*probe, "--num-frames", "0"], capsys)
    assert "multiple of the patch size 8 px; got 0 px" in fails([*probe, "--image-size", "0"], capsys)
    with pytest.raises(SystemExit) as stopped:  # a config that refuses its values does so while they are parsed
        main([*probe, "--loop.batch-size", "0"])
    assert stopped.value.code == 2
    assert "--loop.batch-size must be at least 1; got 0." in capsys.readouterr().err


def test_a_device_that_is_not_there(probe: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "--device mps was asked for, and torch finds none" in fails([*probe, "--device", "mps"], capsys)


def test_a_model_that_names_no_actions(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from coca_video.models.coca import CoCa, CoCaConfig

    save(tmp_path / "coca", model=CoCa(CoCaConfig.tiny()))
    assert "holds a CoCa, which names no actions" in fails(
        ["predict", "x.mp4", "--model", str(tmp_path / "coca")], capsys
    )
    arguments = ["evaluate", str(pictures), "--model", str(tmp_path / "coca"), "--decoder", "decord"]
    assert "--decoder is for clips" in fails(arguments, capsys)
    assert "has no tokenizer.json" in fails(["evaluate", str(pictures), "--model", str(tmp_path / "coca")], capsys)


def test_an_interrupt_without_words_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("coca_video.cli.predict.run", interrupted)
    assert main(["predict", "x.mp4"]) == 130
    assert capsys.readouterr().err == "coca-video predict: Interrupted.\n"
