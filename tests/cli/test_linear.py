"""`linear`: one table from one command, on drawn videos and on pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from coca_video.cli.linear import run
from coca_video.data import video
from coca_video.data.manifest import read_manifest, write_manifest
from coca_video.hub import save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import ImageEncoder, VitConfig
from coca_video.tokenizer import train_tokenizer

TINY = ["--steps", "6", "--rates", "1e-3", "1e-2", "--regularizations", "0.01", "1", "--neighbors", "1", "5"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(0)
    save(folder, model=ImageEncoder(VitConfig.tiny()))
    return str(folder)


@pytest.fixture(scope="module")
def coca(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("coca")
    torch.manual_seed(0)
    save(folder, model=CoCa(CoCaConfig.tiny()), tokenizer=train_tokenizer(["a b c"], vocab_size=512, max_length=32))
    return str(folder)


def result(folder: Path, *, name: str = "linear") -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return document


def lines(output: str) -> list[list[str]]:
    return [line.split() for line in output.splitlines()]


@pytest.mark.slow
def test_every_method_and_feature_is_a_line(
    drawn_clips: Path,
    coca: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert run([str(drawn_clips), "--model", coca, "--out", str(tmp_path), "--num-frames", "2", *TINY]) == 0
    document = result(tmp_path)
    kinds = [(row["method"], row["features"]) for row in document["rows"]]
    assert kinds == [
        *(("linear", name) for name in ("mean", "embedding", "frames")),
        *(("k-NN", name) for name in ("mean", "embedding", "frames")),
        ("attention", "all tokens"),
    ]
    assert document["num_held_out"] == 5  # of 4 training clips in each of 5 classes, 0.8 is nearest to 1
    table = lines(capsys.readouterr().out)
    assert table[0][:3] == ["20", "training", "clips,"]
    for row, line in zip(document["rows"], table[3:], strict=True):
        assert line[0] == row["method"]
        assert f"{row['top1']:.4f}" in line
        assert row["num_videos"] == 10
        assert row["top1_interval"][0] <= row["top1"] <= row["top1_interval"][1]
        assert row["chosen"] in [value for value, _ in row["held_out_top1"]]
    again = [str(drawn_clips), "--model", coca, "--out", str(tmp_path), "--num-frames", "2", *TINY]
    monkeypatch.setattr(video, "open_video", None)  # the tokens are on disk now
    assert run(again) == 0
    assert result(tmp_path) == document


@pytest.mark.slow
def test_test_labels_choose_nothing(drawn_clips: Path, encoder: str, tmp_path: Path) -> None:
    manifest = read_manifest(drawn_clips)
    rows = list(manifest.rows)
    test = [index for index, row in enumerate(rows) if row.split == "test"]
    labels = [rows[index].label for index in test]
    for index, label in zip(test, labels[3:] + labels[:3], strict=True):
        rows[index] = type(rows[index])(path=rows[index].path, label=label, video_id=rows[index].video_id, split="test")
    write_manifest(tmp_path / "shuffled.csv", rows=rows, classes=manifest.classes)
    for name, data in (("a", drawn_clips), ("b", tmp_path / "shuffled.csv")):
        assert run([str(data), "--model", encoder, "--out", str(tmp_path / name), "--num-frames", "2", *TINY]) == 0
    a, b = (result(tmp_path / name)["rows"] for name in "ab")
    for mine, theirs in zip(a, b, strict=True):
        assert (mine["chosen"], mine["held_out_top1"]) == (theirs["chosen"], theirs["held_out_top1"])
    assert [row["top1"] for row in a] != [row["top1"] for row in b]


def test_pictures_are_one_frame_each(tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Red and blue pictures in class folders, which even random features tell apart; one file is none."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for name, channel in (("blue", 2), ("red", 0)):
            folder = tmp_path / "data" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = rng.integers(0, 40, (48, 60, 3), dtype=np.uint8)
                pixels[:, :, channel] += 180
                Image.fromarray(pixels).save(folder / f"{split}{name}{number}.png")
    (tmp_path / "data" / "classes.txt").write_text("red\nblue\n")
    (tmp_path / "data" / "test" / "red" / "testred0.png").write_bytes(b"none")
    arguments = [str(tmp_path / "data"), "--model", encoder, "--out", str(tmp_path / "out"), *TINY]
    assert run(arguments) == 1
    document = result(tmp_path / "out")
    assert document["num_frames"] == 1
    assert [(row["method"], row["features"]) for row in document["rows"]] == [
        ("linear", "mean"),
        ("k-NN", "mean"),
        ("attention", "all tokens"),
    ]
    for row in document["rows"][:2]:
        assert (row["top1"], row["num_videos"], row["num_unreadable"]) == (1.0, 7, 1)
        assert row["top1_unreadable_wrong"] == 7 / 8
    assert list(document["unreadable"]) == ["testred0"]
    captured = capsys.readouterr()
    assert "top-1 of all" in captured.out
    assert "0.8750" in captured.out
    assert "testred0.png: the picture cannot be decoded" in captured.err


@pytest.mark.slow
def test_every_option_changes_a_number(drawn_clips: Path, encoder: str, tmp_path: Path) -> None:
    plain = ["--num-frames", "2", "--methods", "linear", "knn"]

    def rows(name: str, *options: str, methods: list[str] = plain) -> list[dict[str, Any]]:
        out = tmp_path / name
        arguments = [str(drawn_clips), "--model", encoder, "--out", str(out), *methods, *options]
        assert run(arguments) == 0
        assert (out / "tokens").is_dir() == ("attention" in methods)
        return [dict(row) for row in result(out)["rows"]]

    base = rows("base")
    assert rows("again") == base
    for name, *options in (
        ("frames", "--num-frames", "3"),
        ("features", "--features", "mean"),
        ("regularizations", "--regularizations", "1e-9", "1e-8"),
        ("iterations", "--max-iterations", "2"),
        ("neighbors", "--neighbors", "2"),
        ("share", "--holdout-share", "0.5"),
        ("group", "--holdout-group", "shape"),
        ("seed", "--seed", "5"),
        ("splits", "--train-split", "test", "--test-split", "train", "--holdout-share", "0.4"),
    ):
        assert rows(name, *options) != base, name
    attention = ["--num-frames", "2", "--methods", "attention"]
    first = rows("attention", "--steps", "6", "--rates", "1e-2", methods=attention)
    for name, *options in (
        ("steps", "--steps", "5", "--rates", "1e-2"),
        ("rates", "--steps", "6", "--rates", "2e-2"),
    ):
        assert rows(name, *options, methods=attention) != first, name


def test_where_the_tokens_lie_and_how(drawn_clips: Path, encoder: str, tmp_path: Path) -> None:
    sizes = {}
    for dtype in ("fp32", "int8"):
        cache = tmp_path / dtype
        arguments = [str(drawn_clips), "--model", encoder, "--out", str(tmp_path / f"out {dtype}"), "--num-frames", "2"]
        options = ["--token-cache", str(cache), "--token-dtype", dtype, "--methods", "attention", "--steps", "2"]
        assert run([*arguments, *options]) == 0
        sizes[dtype] = sum(file.stat().st_size for file in cache.rglob("*.bin"))
    assert 2.5 < sizes["fp32"] / sizes["int8"] < 4
    assert not (tmp_path / "out fp32" / "tokens").exists()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--features", "embedding"], "is no CoCa and has no embedding"),
        (["--features", "frames", "--num-frames", "1"], "With one frame a clip"),
        (["--methods", "linear", "--neighbors", "3"], "--neighbors does nothing without the method knn"),
        (["--methods", "knn", "--max-iterations", "3"], "--max-iterations does nothing without the method linear"),
        (["--methods", "knn", "--token-dtype", "int8"], "--token-dtype does nothing without the method attention"),
        (["--methods", "attention", "--features", "mean"], "--features does nothing with attention alone"),
        (["--methods", "knn", "knn"], "--methods takes one or more different values"),
        (["--rates", "0"], "--rates must be above 0"),
        (["--steps", "0"], "--steps must be at least 1; got 0"),
        (["--holdout-share", "1"], "must lie between 0 and 1"),
        (["--holdout-group", "actor"], "has no column 'actor' to group clips by; it has path, video_id, shape, colour"),
        (["--test-split", "val"], "no clips of split 'val'"),
    ],
)
def test_mistakes_are_sentences(
    drawn_clips: Path, encoder: str, tmp_path: Path, options: list[str], sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        run([str(drawn_clips), "--model", encoder, "--out", str(tmp_path), *options])


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="runs in one process, and torchrun started several"):
        run([str(tmp_path), "--model", "none", "--out", str(tmp_path)])


def test_a_solver_that_did_not_converge_is_marked(
    drawn_clips: Path, encoder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(drawn_clips), "--model", encoder, "--out", str(tmp_path), "--num-frames", "1"]
    assert run([*arguments, "--methods", "linear", "--max-iterations", "1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("* the solver stopped at --max-iterations")
    assert not result(tmp_path)["rows"][0]["has_converged"]
