"""`coca-video transcode` from its command line, with real worker processes, and after a kill."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coca_video.cli.transcode import _sizes, run
from coca_video.data.decode import open_video
from coca_video.data.transcode import JOURNAL, TranscodeReport
from tests.data.numbered_videos import encode, numbers_shown

PROGRAM = "import sys; from coca_video.cli.transcode import run; sys.exit(run(sys.argv[1:]))"


def entries(out: Path) -> list[dict[str, object]]:
    """The whole lines of the journal."""
    journal = out / JOURNAL
    text = journal.read_text() if journal.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def numbers_in(path: Path) -> list[int]:
    with open_video(path, backend="pyav") as reader:
        return numbers_shown(reader.frames(range(reader.num_frames)))


@pytest.mark.slow
def test_a_folder_in_two_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "small"
    (videos / "deep" / "er").mkdir(parents=True)
    sources = [encode(videos / "deep" / "er" / f"{number}.mp4", num_frames=40 + number) for number in range(4)]
    (videos / "broken.avi").write_text("no video")
    options = ["--short-side", "16", "--gop", "7", "--crf", "20", "--preset", "fast", "--num-workers", "2"]
    assert run([str(videos), "--out", str(out), *options]) == 1
    printed = capsys.readouterr()
    num_in = sum(path.stat().st_size for path in sources)
    num_out = sum(path.stat().st_size for path in out.rglob("*.mp4"))
    assert printed.out.splitlines() == [
        f"transcoded  4 files: {num_in / 1e6:.3f} MB in, {num_out / 1e6:.3f} MB out",
        "kept        0 files that were there",
        "unreadable  1 files",
    ]
    assert printed.err.count("broken.avi") == 1
    assert "5/5" in printed.err  # the bar
    settings = {"short_side": 16, "gop": 7, "crf": 20, "preset": "fast"}
    assert [entry["settings"] for entry in entries(out)] == [settings] * 4
    assert {entry["target"]: entry["num_frames"] for entry in entries(out)} == {
        f"deep/er/{number}.mp4": 40 + number for number in range(4)
    }
    (videos / "broken.avi").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")}
    assert run([str(videos), "--out", str(out), *options]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "kept        4 files that were there"
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.mp4")} == before


@pytest.mark.drill
def test_a_video_over_its_time_is_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = tmp_path / "videos"
    videos.mkdir()
    encode(videos / "long.mp4", num_frames=300, height=240, width=320)
    options = ["--preset", "veryslow", "--timeout-seconds", "0.05", "--num-workers", "1"]
    assert run([str(videos), "--out", str(tmp_path / "small"), *options]) == 1
    assert "long.mp4: took longer than 0.05 s" in capsys.readouterr().err
    assert not list((tmp_path / "small").rglob("*.mp4"))


@pytest.mark.drill
@pytest.mark.skipif(sys.platform == "win32", reason="no kill -9 there")
def test_after_a_kill_the_same_command_goes_on(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "small"
    videos.mkdir()
    for number in range(4):
        encode(videos / f"{number}.mp4", num_frames=100, height=240, width=320)
    originals = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in videos.iterdir()}
    options = [str(videos), "--out", str(out), "--preset", "slow", "--num-workers", "2"]
    command = [sys.executable, "-c", PROGRAM, *options]
    started = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not entries(out) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    done = entries(out)
    assert 1 <= len(done) < 4
    for path in out.glob("[!.]*.mp4"):  # whole or not at all
        assert numbers_in(path) == list(range(100))
    again = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert f"transcoded  {4 - len(done)} files" in again.stdout
    assert f"kept        {len(done)} files" in again.stdout
    assert sorted(path.name for path in out.iterdir()) == [*(f"{number}.mp4" for number in range(4)), JOURNAL]
    for number in range(4):
        assert numbers_in(out / f"{number}.mp4") == list(range(100))
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in videos.iterdir()} == originals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-workers", "0"], "--num-workers must be at least 1; got 0"),
        (["--timeout-seconds", "0"], "--timeout-seconds must be above 0; got 0"),
        (["--short-side", "33"], "--short-side must be an even number"),
        (["--gop", "0"], "--gop must be at least 1"),
        (["--crf", "60"], "--crf must lie between 0 and 51"),
    ],
)
def test_a_wrong_option_is_a_sentence(tmp_path: Path, options: list[str], message: str) -> None:
    encode(tmp_path / "one.mp4", num_frames=1)
    with pytest.raises(ValueError, match=message):
        run([str(tmp_path), "--out", str(tmp_path.parent / "small"), *options])


def test_a_source_that_is_not_there_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no folder or manifest .*nothing, and no video of that name\."):
        run([str(tmp_path / "nothing"), "--out", str(tmp_path / "small")])


@pytest.mark.parametrize(
    ("num_bytes", "told"),
    [(0, "0.000 MB"), (1_234_567, "1.235 MB"), (999_999_000, "999.999 MB"), (1_000_000_000, "1.000 GB")],
)
def test_megabytes_below_a_gigabyte(num_bytes: int, told: str) -> None:
    assert _sizes(TranscodeReport(bytes_in=num_bytes, bytes_out=0)) == f"{told} in, 0.000 MB out"


def test_a_stop_says_that_the_same_command_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stopped(_: object, items: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("coca_video.data.transcode.parallel", stopped)
    (tmp_path / "videos").mkdir()
    encode(tmp_path / "videos" / "one.mp4", num_frames=1)
    told = re.escape(f"Interrupted; what was transcoded is kept in {tmp_path / 'small'}: the same command goes on")
    with pytest.raises(KeyboardInterrupt, match=told):
        run([str(tmp_path / "videos"), "--out", str(tmp_path / "small")])


@pytest.mark.parametrize("readable", [True, False])
def test_a_manifest_without_its_unreadable_clips(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, readable: bool
) -> None:
    monkeypatch.setattr(
        "coca_video.data.transcode.parallel", lambda function, items, **_: ((item, function(item)) for item in items)
    )
    lists, out = tmp_path / "lists", tmp_path / "small"
    lists.mkdir()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "bad.mp4").write_text("no video")
    if readable:
        encode(tmp_path / "videos" / "good.mp4", num_frames=3)
    (lists / "m.csv").write_text("path,video_id\n../videos/bad.mp4,b1\n../videos/good.mp4,g1\n../videos/bad.mp4,b2\n")
    assert run([str(lists / "m.csv"), "--out", str(out), "--num-workers", "1"]) == 1
    err = capsys.readouterr().err
    if readable:
        assert f"{out / 'manifest.csv'} names the new files, without the 2 clips of unreadable files." in err
        assert (out / "manifest.csv").read_text().splitlines()[1:] == ["good.mp4,,g1,,,"]
    else:
        assert "No manifest.csv was written" in err
        assert not (out / "manifest.csv").exists()
