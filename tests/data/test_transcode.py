"""Transcoding many files: layout, what is done again, what is refused; the originals stay as they are."""

import csv
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coca_video.data.decode.write import TranscodeConfig
from coca_video.data.manifest import read_manifest
from coca_video.data.transcode import JOURNAL, TranscodeReport, plan_transcode, run_transcode
from coca_video.data.workers import WorkerFailure
from tests.data.numbered_videos import encode, numbers_shown, sequential, stack

SMALL = TranscodeConfig(short_side=32, crf=10)


@pytest.fixture
def serial(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The work done in this process, since others take seconds to start; the list gets the sources done."""
    done = list[str]()

    def one_after_the_other(
        function: Callable[[Any], Any], items: Iterable[Any], **_: object
    ) -> Iterator[tuple[Any, Any]]:
        for item in items:
            done.append(item.source.name)
            yield item, function(item)

    monkeypatch.setattr("coca_video.data.transcode.parallel", one_after_the_other)
    return done


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos in two folders, with a text beside them and a hidden file."""
    folder = tmp_path / "videos"
    for name in ("a/one.avi", "a/two.MP4", "b/three.mkv"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        lower = folder / name.lower()
        codec = "mpeg4" if lower.suffix == ".avi" else "libx264"
        encode(lower, codec=codec, num_frames=20, b_frames=0).rename(folder / name)
    (folder / "notes.txt").write_text("no video")
    (folder / "a" / "._one.avi").write_text("left by macOS")
    return folder


def transcode(source: Path, *, out: Path, config: TranscodeConfig = SMALL) -> TranscodeReport:
    plan = plan_transcode(source, out=out)
    calls = list[int]()

    def on_done(report: TranscodeReport) -> None:
        calls.append(report.num_done + report.num_kept + len(report.unreadable))

    report = run_transcode(plan, config=config, num_workers=1, timeout_seconds=60.0, on_done=on_done)
    assert calls == list(range(1, len(plan.jobs) + 1))
    return report


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Name to bytes and mtime of every file."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_layout_is_kept_and_the_originals_are_not_touched(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    before, out = tree(videos), tmp_path / "small"
    report = transcode(videos, out=out)
    assert tree(videos) == before
    assert sorted(tree(out)) == ["a/one.mp4", "a/two.mp4", "b/three.mp4", JOURNAL]
    for path in out.rglob("*.mp4"):
        assert numbers_shown(stack(sequential(path), range(20))) == list(range(20))
    sources = [videos / name for name in ("a/one.avi", "a/two.MP4", "b/three.mkv")]
    assert (report.num_done, report.num_kept, report.unreadable) == (3, 0, {})
    assert report.bytes_in == sum(path.stat().st_size for path in sources)
    assert report.bytes_out == sum(path.stat().st_size for path in out.rglob("*.mp4"))


def test_again_only_what_is_missing_or_changed_is_done(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    out = tmp_path / "small"
    transcode(videos, out=out)
    first = tree(out)

    def again(config: TranscodeConfig = SMALL) -> list[str]:
        serial.clear()
        report = transcode(videos, out=out, config=config)
        assert (report.num_done, report.num_kept) == (len(serial), 3 - len(serial))
        return list(serial)

    assert again() == []
    assert tree(out) == first
    (out / "a" / "two.mp4").unlink()
    assert again() == ["two.MP4"]
    (out / "b" / "three.mp4").write_bytes(b"cut off")
    assert again() == ["three.mkv"]
    os.utime(videos / "a" / "one.avi", ns=(1, 1))
    assert again() == ["one.avi"]
    status = (videos / "b" / "three.mkv").stat()
    encode(videos / "b" / "three.mkv", num_frames=5)
    os.utime(videos / "b" / "three.mkv", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert again() == ["three.mkv"]  # other bytes at the same time
    assert len(sequential(out / "b" / "three.mp4")) == 5
    assert again(replace(SMALL, crf=30)) == ["one.avi", "two.MP4", "three.mkv"]
    assert again(replace(SMALL, crf=30)) == []


def test_a_line_cut_off_in_the_journal_costs_one_file(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    out = tmp_path / "small"
    transcode(videos, out=out)
    journal = out / JOURNAL
    journal.write_bytes(journal.read_bytes()[:-30])
    with journal.open("a") as file:
        file.write('\n[]\n{"target": "a/one.mp4"}\n')  # lines that say too little count for nothing
    leftover = out / "a" / ".partial-1-one.mp4"
    leftover.write_bytes(b"half")
    serial.clear()
    transcode(videos, out=out)
    assert serial == ["three.mkv"]
    assert not leftover.exists()
    serial.clear()
    transcode(videos, out=out)
    assert serial == []


def test_unreadable_files_are_listed_once_and_tried_again(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    out = tmp_path / "small"
    transcode(videos, out=out)
    good = (videos / "a" / "two.MP4").read_bytes()
    (videos / "a" / "two.MP4").write_bytes(b"")
    report = transcode(videos, out=out)
    assert list(report.unreadable) == [videos / "a" / "two.MP4"]
    assert report.unreadable[videos / "a" / "two.MP4"].count("two.MP4: the file is empty") == 1
    assert not (out / "a" / "two.mp4").exists()  # it would be of the earlier source
    (videos / "a" / "two.MP4").write_bytes(good)
    assert transcode(videos, out=out).unreadable == {}
    assert len(sequential(out / "a" / "two.mp4")) == 20


def test_a_worker_that_fails_is_a_cause(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = WorkerFailure(cause="took longer than 60 s", timed_out=True)
    monkeypatch.setattr(
        "coca_video.data.transcode.parallel", lambda _, items, **__: ((item, failure) for item in items)
    )
    report = transcode(videos, out=tmp_path / "small")
    assert report.unreadable[videos / "b" / "three.mkv"] == f"{videos / 'b' / 'three.mkv'}: took longer than 60 s"
    assert (len(report.unreadable), report.num_done) == (3, 0)


def write_csv(path: Path, rows: list[list[str]]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    (path.parent / "classes.txt").write_text("wave\nrun\n")
    return path


def test_a_manifest_gives_one_with_the_new_paths(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    (videos / "b" / "broken.mp4").write_text("no video")
    header = ["path", "label", "video_id", "start_seconds", "end_seconds", "split", "source_id"]
    manifest = write_csv(
        tmp_path / "lists" / "val.csv",
        [
            header,
            ["../videos/a/one.avi", "wave", "w1", "", "", "val", "s1"],
            ["../videos/b/three.mkv", "run", "r1", "0.1", "0.5", "val", "s2"],
            ["../videos/b/three.mkv", "run", "r2", "0.5", "0.6", "train", "s2"],
            ["../videos/b/broken.mp4", "run", "r3", "", "", "val", "s3"],
            ["../videos/b/missing.mp4", "run", "r4", "", "", "val", "s4"],
        ],
    )
    out = tmp_path / "small"
    report = transcode(manifest, out=out)
    assert serial == ["one.avi", "three.mkv", "broken.mp4", "missing.mp4"]
    assert [path.name for path in report.unreadable] == ["broken.mp4", "missing.mp4"]
    with (out / "manifest.csv").open(newline="") as file:
        assert list(csv.reader(file)) == [
            header,
            ["a/one.mp4", "wave", "w1", "", "", "val", "s1"],
            ["b/three.mp4", "run", "r1", "0.1", "0.5", "val", "s2"],
            ["b/three.mp4", "run", "r2", "0.5", "0.6", "train", "s2"],
        ]
    new = read_manifest(out / "manifest.csv")
    new.check_files()
    assert new.classes == ("wave", "run")


def test_a_url_is_a_sentence_and_a_folder_of_images_a_cause(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    (tmp_path / "images").mkdir()
    manifest = write_csv(tmp_path / "lists" / "m.csv", [["path"], ["../images"], ["../videos/a/one.avi"]])
    report = transcode(manifest, out=tmp_path.parent / f"{tmp_path.name}-small")
    assert list(report.unreadable.values()) == [f"{tmp_path / 'images'}: a folder of images, which is not transcoded"]
    assert report.num_done == 1
    write_csv(manifest, [["path"], ["s3://bucket/one.mp4"]])
    with pytest.raises(ValueError, match=r"names s3://bucket/one\.mp4, a URL"):
        plan_transcode(manifest, out=tmp_path / "small")


def test_a_folder_with_classes_stays_a_manifest(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    (videos / "classes.txt").write_text("b\na\n")
    transcode(videos, out=tmp_path / "small")
    assert (tmp_path / "small" / "classes.txt").read_text() == "b\na\n"
    old, new = read_manifest(videos), read_manifest(tmp_path / "small")
    assert [(row.label, row.video_id) for row in new.rows] == [(row.label, row.video_id) for row in old.rows]
    assert new.classes == old.classes == ("b", "a")


def test_two_sources_of_one_name_are_a_sentence_up_front(tmp_path: Path, videos: Path) -> None:
    encode(videos / "a" / "one.mp4", num_frames=1)
    with pytest.raises(ValueError, match=r"one\.avi and .*one\.mp4 would both become .*a/one\.mp4"):
        plan_transcode(videos, out=tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_out_among_the_originals_is_refused(tmp_path: Path, videos: Path) -> None:
    before = tree(tmp_path)
    manifest = write_csv(tmp_path / "lists" / "m.csv", [["path"], ["../videos/a/one.avi"], ["../videos/b/three.mkv"]])
    link = tmp_path / "link"
    link.symlink_to(videos)
    for source, out in [
        (videos, videos),
        (videos, videos / "small"),
        (videos, tmp_path / "lists" / ".." / "videos" / "a"),
        (videos, link / "small"),
        (link, videos / "small"),
        (manifest, videos),
        (manifest, videos / "small"),
    ]:
        with pytest.raises(ValueError, match="among the originals"):
            plan_transcode(source, out=out)
    with pytest.raises(ValueError, match="is the folder of"):
        plan_transcode(manifest, out=tmp_path / "lists")
    assert {name: state for name, state in tree(tmp_path).items() if name in before} == before


def test_out_beside_folders_that_share_little_is_taken(tmp_path: Path) -> None:
    """Above the clips lies the folder of the whole project, or only "/": --out may lie there too."""
    manifest = write_csv(tmp_path / "m.csv", [["path"], ["one/a.mp4"], ["two/b.mp4"], ["/elsewhere/c.mp4"]])
    plan = plan_transcode(manifest, out=tmp_path / "small")
    names = [tmp_path / "one/a.mp4", tmp_path / "two/b.mp4", Path("/elsewhere/c.mp4")]
    assert [job.source for job in plan.jobs] == names
    assert [job.target for job in plan.jobs] == [tmp_path / "small" / path.relative_to("/") for path in names]
    with pytest.raises(ValueError, match="among the originals"):
        plan_transcode(manifest, out=tmp_path / "two" / "small")


def test_links_to_originals_are_not_followed_into_them(tmp_path: Path, videos: Path) -> None:
    """A folder of links, with the folder that they point to as --out: a.mp4 would be written over a.mp4."""
    links = tmp_path / "links"
    links.mkdir()
    (links / "two.mp4").symlink_to(videos / "a" / "two.MP4")
    with pytest.raises(ValueError, match="among the originals"):
        plan_transcode(links, out=videos / "a")


def test_files_of_somebody_else_are_not_overwritten(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    out = tmp_path / "small"
    (out / "b").mkdir(parents=True)
    (out / "b" / "three.mp4").write_text("mine")
    with pytest.raises(ValueError, match=r"b/three\.mp4 is there, and not by this command"):
        plan_transcode(videos, out=out)
    assert (out / "b" / "three.mp4").read_text() == "mine"


def test_one_video_becomes_one_file(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    """--out may lie beside it, and the classes there are no matter of it; over itself it is not written."""
    (videos / "classes.txt").write_text("a\n")
    (videos / "a" / "classes.txt").write_text("a\n")
    out = videos / "a" / "small"
    report = transcode(videos / "a" / "two.MP4", out=out)
    assert (serial, report.num_done, sorted(tree(out))) == (["two.MP4"], 1, [JOURNAL, "two.mp4"])
    assert len(sequential(out / "two.mp4")) == 20
    assert transcode(videos / "a" / "two.MP4", out=out).num_kept == 1
    with pytest.raises(ValueError, match="among the originals"):
        plan_transcode(videos / "a" / "two.MP4", out=videos / "a")


def test_a_folder_without_videos_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no video files"):
        plan_transcode(tmp_path, out=tmp_path / "small")


@pytest.mark.skipif(sys.platform == "win32", reason="no lock there")
def test_two_at_once_are_refused(tmp_path: Path, videos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    out = tmp_path / "small"
    out.mkdir()
    with (out / JOURNAL).open("a") as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process is transcoding into it"):
            transcode(videos, out=out)


def test_the_journal_tells_what_was_done(tmp_path: Path, videos: Path, serial: list[str]) -> None:
    out = tmp_path / "small"
    transcode(videos, out=out)
    entries = [json.loads(line) for line in (out / JOURNAL).read_text().splitlines()]
    status = (videos / "a" / "one.avi").stat()
    assert entries[0] == {
        "source": "a/one.avi",
        "target": "a/one.mp4",
        "source_bytes": status.st_size,
        "source_mtime_ns": status.st_mtime_ns,
        "settings": {"short_side": 32, "gop": 16, "crf": 10, "preset": "medium"},
        "num_frames": 20,
        "height": 32,
        "width": 42,
        "duration_seconds": pytest.approx(20 / 30),
        "num_bytes": (out / "a" / "one.mp4").stat().st_size,
    }
    assert [entry["target"] for entry in entries] == ["a/one.mp4", "a/two.mp4", "b/three.mp4"]
