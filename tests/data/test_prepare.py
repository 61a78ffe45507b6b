"""From files and a list to a manifest: matching, faults, duplicates, leaks, against sets and counts made by hand."""

import csv
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import av
import pytest
import torch
from PIL import Image

from coca_video.data.decode import write_video
from coca_video.data.layout import VideoFiles, find_videos, match_files
from coca_video.data.leaks import read_other
from coca_video.data.manifest import VideoRow, read_manifest, write_manifest
from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.prepare_report import PrepareReport, summary_lines
from coca_video.data.recipe import Entry, Recipe, Request, Version
from coca_video.data.scan import check_file
from tests.data.numbered_videos import encode

CLASSES = ("swim (fast)", "run", "jump")


def serial(function: Callable[[Any], Any], items: Iterable[Any], **_: object) -> Iterator[tuple[Any, Any]]:
    """`parallel` in this process: what processes do has its own tests, and each takes seconds to start."""
    return ((item, function(item)) for item in items)


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coca_video.data.scan.parallel", serial)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four clips of different bytes: a, b, c of 2 s, and one of 1 s."""
    folder = tmp_path_factory.mktemp("clips")
    random = torch.Generator().manual_seed(2)
    for name, num_frames in (("a", 20), ("b", 20), ("c", 20), ("short", 10)):
        frames = torch.randint(0, 255, (num_frames, 3, 32, 32), dtype=torch.uint8, generator=random)
        write_video(folder / f"{name}.mp4", frames=frames, frames_per_second=10.0)
    return {path.stem: path for path in folder.iterdir()}


def an_entry(video_id: str, label: str | None = "run", split: str = "val", **changes: Any) -> Entry:
    return Entry(**{"video_id": video_id, "label": label, "split": split, "keys": (video_id,), **changes})


class World:
    """A made-up data set in tmp_path: a list, a folder of videos, and a run of prepare."""

    def __init__(self, root: Path, clips: dict[str, Path]) -> None:
        self.root, self.clips = root, clips
        self.videos, self.out, self.recipe_folder = root / "videos", root / "out", root / "recipe"
        self.videos.mkdir()
        self.recipe_folder.mkdir()
        (self.recipe_folder / "classes.txt").write_text("".join(f"{name}\n" for name in CLASSES))
        self.entries = [an_entry("a"), an_entry("b", "jump"), an_entry("c", "swim (fast)", "train")]
        self.requests: list[Request] = []
        self.bars: list[tuple[str, int, int]] = []
        self.list_file = root / "list.txt"
        self.list_file.write_text("the data set's own list\n")

    def put(self, name: str, clip: str) -> Path:
        path = self.videos / name
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self.clips[clip], path)
        return path

    def recipe(self, **changes: Any) -> Recipe:
        def list_clips(request: Request) -> list[Entry]:
            self.requests.append(request)
            return self.entries

        versions = {"1": Version(classes="classes.txt", official={"val": 5}, nominal_seconds=2.0)}
        return Recipe(
            **{
                "name": "Made Up",
                "versions": versions,
                "list_clips": list_clips,
                "file_keys": lambda path: (path.stem,),
                "annotations_help": "Its list.",
                **changes,
            }
        )

    def progress(self, what: str, *, total: int, initial: int = 0) -> Any:
        self.bars.append((what, initial, total))
        return nullcontext(SimpleNamespace(update=lambda n=1, /: None))

    def prepare(self, *, recipe: Recipe | None = None, **options: Any) -> PrepareReport:
        config = PrepareConfig(
            **{"videos": self.videos, "out": self.out, "annotations": (self.list_file,), "num_workers": 1, **options}
        )
        return prepare(recipe or self.recipe(), folder=self.recipe_folder, config=config, progress=self.progress)

    def table(self, name: str = "scan.csv") -> list[dict[str, str]]:
        with (self.out / name).open(newline="") as file:
            return list(csv.DictReader(file))


@pytest.fixture
def world(tmp_path: Path, clips: dict[str, Path]) -> World:
    return World(tmp_path, clips)


def statuses(world: World) -> dict[str, str]:
    return {row["video_id"] or row["path"]: row["status"] for row in world.table() if row["status"] != "duplicate_id"}


def test_a_whole_run_by_hand(world: World) -> None:
    world.put("x/a.mp4", "a")
    world.put("b.mkv.mp4", "b")
    world.put("b.MP4", "b")
    world.put("stranger.mp4", "c")
    report = world.prepare()
    size = str(world.clips["a"].stat().st_size)
    assert world.table()[0] == {
        "video_id": "a", "label": "run", "split": "val", "status": "ok", "cause": "", "path": "x/a.mp4",
        "num_frames": "20", "duration_seconds": "2.0", "frames_per_second": "10.0", "height": "32", "width": "32",
        "backend": world.table()[0]["backend"], "num_bytes": size, "content_hash": "", "same_content_as": "",
    }  # fmt: skip
    assert statuses(world) == {"a": "ok", "b": "ok", "c": "missing", "b.mkv.mp4": "extra", "stranger.mp4": "extra"}
    summary = json.loads((world.out / "summary.json").read_text())
    assert summary["splits"] == {
        "val": {"official": 5, "listed": 2, "found": 2, "in_manifest": 2},
        "train": {"official": None, "listed": 1, "found": 0, "in_manifest": 0},
    }
    assert [summary[name] for name in ("listed", "found", "ok", "missing", "extra", "in_manifest")] == [
        3,
        2,
        2,
        1,
        2,
        2,
    ]
    assert (summary["leaks"], (world.out / "leaks.csv").exists()) == (None, False)
    manifest = read_manifest(report.manifest)
    assert manifest.classes == CLASSES
    assert [(row.path, row.label, row.video_id, row.split, row.extra) for row in manifest.rows] == [
        (world.videos / "x/a.mp4", "run", "a", "val", {"source_id": "a"}),
        (world.videos / "b.MP4", "jump", "b", "val", {"source_id": "b"}),
    ]
    manifest.check_files()
    assert world.bars == [("checking files", 0, 2)]
    assert summary_lines(report) == [
        "Made Up: 2 of 3 listed clips found",
        "  val: 2 listed of 5 official, 2 found, 2 in the manifest",
        "  train: 1 listed, 0 found, 0 in the manifest",
        "missing: 1: c",
        "file of no clip: 2: b.mkv.mp4, stranger.mp4",
        f"manifest: {world.out / 'manifest.csv'}",
    ]


def test_a_second_run_reads_nothing_again_and_writes_the_same(world: World) -> None:
    for name in ("a", "b"):
        world.put(f"{name}.mp4", "a")
    names = ("scan.csv", "summary.json", "manifest.csv", "classes.txt", "scan.jsonl")
    world.prepare()
    first = {name: (world.out / name).read_bytes() for name in names}
    world.prepare()
    assert {name: (world.out / name).read_bytes() for name in names} == first
    new, old = ("checking files", 0, 2), ("checking files", 2, 2)
    assert world.bars == [new, ("comparing contents", 0, 2), old, ("comparing contents", 2, 2)]
    assert not [path for path in world.out.iterdir() if path.suffix == ".partial"]


def test_thirty_percent_of_bad_files_are_named_each_with_its_cause(world: World) -> None:
    world.entries = [an_entry(f"clip{number}") for number in range(10)]
    for number in range(10):
        world.put(f"clip{number}.mp4", "a")
    whole = world.clips["a"].read_bytes()
    (world.videos / "clip2.mp4").write_bytes(whole[: len(whole) // 2])
    (world.videos / "clip5.mp4").write_bytes(b"")
    (world.videos / "clip8.mp4").write_text("Video unavailable. This video is private.\n" * 30)
    report = world.prepare()
    bad = {"clip2", "clip5", "clip8"}
    assert {name for name, status in statuses(world).items() if status == "corrupt"} == bad
    assert {row.video_id for row in read_manifest(report.manifest).rows} == {f"clip{n}" for n in range(10)} - bad
    assert report.num_unreadable() == 3
    causes = {row["video_id"]: row["cause"] for row in world.table() if row["status"] == "corrupt"}
    assert causes["clip5"] == "the file is empty (0 bytes)"
    assert "not a video file" in causes["clip8"] and str(world.root) not in "".join(causes.values())
    assert sum(report.summary()["causes"].values()) == 3
    line = next(line for line in summary_lines(report) if line.startswith("corrupt"))
    assert line.startswith("corrupt: 3: clip2 (") and "clip5 (the file is empty (0 bytes))" in line


def test_of_several_files_the_first_that_reads_is_taken(world: World) -> None:
    world.put("1/a.mp4", "a").write_bytes(b"no video")
    world.put("2/a.mp4", "a")
    world.put("3/a.mp4", "b")
    report = world.prepare()
    rows = [(row["path"], row["status"], row["cause"]) for row in world.table() if row["video_id"] == "a"]
    assert [(path, status) for path, status, _ in rows] == [
        ("2/a.mp4", "ok"),
        ("1/a.mp4", "duplicate_id"),
        ("3/a.mp4", "duplicate_id"),
    ]
    assert "not a video" in rows[1][2] and rows[2][2] == "2/a.mp4 was taken"
    assert report.num_unreadable() == 1
    assert [row.path.parent.name for row in report.manifest_rows] == ["2"]
    assert report.summary()["duplicate_id"] == 2


def test_files_of_one_clip_by_several_keys_are_all_candidates_the_best_key_first(world: World) -> None:
    """As Kinetics' ID_START_END.mp4 and ID.mp4: the first by its times, unless it cannot be read."""
    world.entries = [an_entry("id_0_10", keys=("id_0_10", "id"))]
    world.put("x/id_0_10.mp4", "a")
    world.put("id.mp4", "b")
    report = world.prepare()
    assert [(row["path"], row["status"], row["cause"]) for row in world.table()] == [
        ("x/id_0_10.mp4", "ok", ""),
        ("id.mp4", "duplicate_id", "x/id_0_10.mp4 was taken"),
    ]
    assert not [line for line in summary_lines(report) if line.startswith("file of no clip")]
    (world.videos / "x/id_0_10.mp4").write_bytes(b"")
    report = world.prepare()
    assert [(row["path"], row["status"], row["cause"]) for row in world.table()] == [
        ("id.mp4", "ok", ""),
        ("x/id_0_10.mp4", "duplicate_id", "the file is empty (0 bytes)"),
    ]
    assert [row.path for row in report.manifest_rows] == [world.videos / "id.mp4"] and report.num_unreadable() == 1


def test_a_file_in_another_class_is_no_second_file_of_a_list_of_other_projects(world: World) -> None:
    (world.root / "val.txt").write_text("run/1.mp4 1\n")
    for name, clip in (("run/1.mp4", "a"), ("jump/1.mp4", "b"), ("1.mp4", "c")):
        world.put(name, clip)
    options = {"annotations": (world.root / "val.txt",), "split": "val"}
    world.prepare(**options)
    assert [(row["path"], row["status"]) for row in world.table()] == [
        ("run/1.mp4", "ok"), ("1.mp4", "duplicate_id"), ("jump/1.mp4", "extra"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "nominal", "short", "in_manifest"),
    [
        ({}, {}, {"b"}, {"a", "b"}),  # 1 s of 0.9 x the version's 2 s
        ({"drop_short": True}, {}, {"b"}, {"a"}),
        ({"min_seconds": 0.9}, {}, set(), {"a", "b"}),
        ({"min_seconds": 2.5}, {}, {"a", "b"}, {"a", "b"}),
        ({}, {"nominal_seconds": 1.1}, set(), {"a", "b"}),  # the list's own length counts before the version's
        ({}, {"nominal_seconds": 10.0}, {"a", "b"}, {"a", "b"}),
        ({"check": "none"}, {}, set(), {"a", "b"}),  # of a file that was not opened the length is not known
    ],
)
def test_short_clips(
    options: dict[str, Any], nominal: dict[str, float], short: set[str], in_manifest: set[str], world: World
) -> None:
    world.entries = [an_entry("a", **nominal), an_entry("b", **nominal)]
    world.put("a.mp4", "a")
    world.put("b.mp4", "short")
    report = world.prepare(**options)
    assert {name for name, status in statuses(world).items() if status == "short"} == short
    assert {row.video_id for row in report.manifest_rows} == in_manifest
    if short == {"b"}:
        assert world.table()[1]["cause"] == "1.00 s of at least 1.8 s"
        assert "too short: 1: b (1.00 s of at least 1.8 s)" in summary_lines(report)


def test_equal_bytes_are_told_and_equal_sizes_are_not(world: World) -> None:
    world.entries = [an_entry(name) for name in ("p", "q", "r", "s")]
    for name, clip in (("p", "a"), ("q", "b"), ("r", "a")):
        world.put(f"{name}.mp4", clip)
    data = bytearray(world.clips["a"].read_bytes())
    at = data.index(b"isom")
    data[at : at + 4] = b"iso5"  # another brand of the same length: another file of equal size that decodes
    (world.videos / "s.mp4").write_bytes(bytes(data))
    report = world.prepare()
    rows = {row["video_id"]: row for row in world.table()}
    assert {name: row["same_content_as"] for name, row in rows.items()} == {"p": "", "q": "", "r": "p", "s": ""}
    assert rows["p"]["content_hash"] == rows["r"]["content_hash"] != rows["s"]["content_hash"] != ""
    assert rows["q"]["content_hash"] == ""  # nothing has its size, so it was not read
    assert report.summary()["duplicate_content"] == 1 and len(report.manifest_rows) == 4
    assert "same content: 1: r (as p)" in summary_lines(report)


def test_leaks_by_source_and_by_content(world: World) -> None:
    world.entries = [an_entry("a", source_id="S"), an_entry("b", source_id="T"), an_entry("c", source_id="U")]
    for name in ("a", "b", "c"):
        world.put(f"{name}.mp4", name)
    other = world.root / "other"
    other.mkdir()
    shutil.copyfile(world.clips["b"], other / "copy.mp4")
    rows = [
        VideoRow(path=other / "gone.mp4", label=None, video_id="x", split="train", extra={"source_id": "S"}),
        VideoRow(path=other / "gone.mp4", label=None, video_id="y", split="test", extra={"source_id": "S"}),
        VideoRow(path=other / "copy.mp4", label=None, video_id="z", split="train", extra={"source_id": "Z"}),
    ]
    write_manifest(other / "manifest.csv", rows=rows, classes=())
    report = world.prepare(against=other / "manifest.csv")
    assert [tuple(row.values()) for row in world.table("leaks.csv")] == [
        ("a", "val", "x", "train", "source"),
        ("a", "val", "y", "test", "source"),
        ("b", "val", "z", "train", "content"),
    ]
    assert report.summary()["leaks"] == {"clips": 2, "source": 1, "content": 1}
    line = f"also in {other / 'manifest.csv'}: 2: a (source: x), a (source: y), b (content: z)"
    assert line in summary_lines(report)
    world.prepare()
    assert not (world.out / "leaks.csv").exists()  # of a run that is no more


def test_leaks_against_an_official_csv(world: World, tmp_path: Path) -> None:
    world.entries = [an_entry("abcdefghijk_000003_000013", source_id="abcdefghijk"), an_entry("b")]
    world.put("abcdefghijk_000003_000013.mp4", "a")
    world.put("b.mp4", "b")
    official = tmp_path / "train.csv"
    official.write_text(
        'label,youtube_id,time_start,time_end,split\n"run, far",abcdefghijk,40,50,train\nrun,-bcdefghijk,0,10,train\n'
    )
    report = world.prepare(against=official)
    assert [tuple(row.values()) for row in world.table("leaks.csv")] == [
        ("abcdefghijk_000003_000013", "val", "abcdefghijk_000040_000050", "train", "source")
    ]
    official.write_text("youtube_id,time_start,time_end,split\n-bcdefghijk,0,10,test\n")
    assert f"also in {official}: none" in summary_lines(world.prepare(against=official))
    assert report.leaks is not None and len(report.leaks) == 1
    with pytest.raises(ValueError, match="There is no file"):
        read_other(tmp_path / "gone.csv")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\xff\xfe no text", "not a text file in UTF-8"),
        (b"youtube_id,split\n" + b"x" * 200_000, "not a CSV file"),
        (b"no manifest\n", "needs a column 'path'"),
        (b"label,youtube_id,split\n", "lists no clip to compare with: expected rows below its header, got none"),
        (b"youtube_id,split\nabcdefghijk,val\n,val\n ,val\n", r"line 3: the youtube_id is empty \(in 2 of 3 rows\)"),
    ],
)
def test_what_cannot_be_compared_with_is_a_sentence(data: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_other(tmp_path / "other.csv")


def test_a_manifest_with_youtube_ids_is_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "other.csv").write_text("path,video_id,youtube_id\na.mp4,clip,abcdefghijk\n")
    (other,) = read_other(tmp_path / "other.csv")
    assert (other.video_id, other.source_id, other.path) == ("clip", "clip", tmp_path / "a.mp4")


def test_folders_of_frames_leak_by_content_too(world: World) -> None:
    for folder in (world.videos / "a", world.root / "other" / "copy"):
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "0.png")
    rows = [VideoRow(path=world.root / "other" / "copy", label=None, video_id="z")]
    write_manifest(world.root / "other" / "manifest.csv", rows=rows, classes=())
    world.prepare(against=world.root / "other" / "manifest.csv")
    assert [tuple(row.values()) for row in world.table("leaks.csv")] == [("a", "val", "z", "", "content")]


def test_files_that_could_not_be_compared_are_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        world.put(f"{name}.mp4", "a")
    assert world.prepare().notices == ()
    shutil.rmtree(world.out)
    monkeypatch.setattr("coca_video.data.scan.hash_file", lambda path: "")
    (notice,) = world.prepare().notices
    assert notice.startswith(f"2 files could not be compared by content, the first is {world.videos / 'a.mp4'}")


def test_a_split_is_chosen_and_must_be_there(world: World) -> None:
    for name in ("a", "b", "c"):
        world.put(f"{name}.mp4", name)
    assert [row.video_id for row in world.prepare(split="train").manifest_rows] == ["c"]
    assert statuses(world) == {"c": "ok", "a.mp4": "extra", "b.mp4": "extra"}
    with pytest.raises(ValueError, match=r"No clip of the list has the split 'test'.*'train', 'val'"):
        world.prepare(split="test")


def test_the_version_is_the_recipes_first_unless_given(world: World) -> None:
    (world.recipe_folder / "two.txt").write_text("jump\nrun\nswim (fast)\n")
    versions = {
        "v1": Version(classes="classes.txt", official={"val": 7}),
        "v2": Version(classes="two.txt", official={"val": 8}),
    }
    world.put("a.mp4", "a")
    first, second = (world.prepare(recipe=world.recipe(versions=versions), version=version) for version in (None, "v2"))
    assert (first.name, first.classes, first.official) == ("Made Up v1", CLASSES, {"val": 7})
    assert (second.name, second.classes, second.official) == ("Made Up v2", ("jump", "run", "swim (fast)"), {"val": 8})
    assert [request.version for request in world.requests] == ["v1", "v2"]
    with pytest.raises(ValueError, match=r"'v3'.*v1, v2"):
        world.prepare(recipe=world.recipe(versions=versions), version="v3")


def test_lists_of_other_projects(world: World) -> None:
    (world.root / "val.txt").write_text("data/val/jump/a.mp4 2\ndata/val/run/b.mp4 1\ndata/val/run/gone.mp4 1\n")
    world.put("jump/a.mp4", "a")
    world.put("run/b.mp4", "b")
    options = {"annotations": (world.root / "val.txt",), "split": "val"}
    report = world.prepare(**options)
    assert world.requests == []
    assert [(row.path.name, row.label, row.split) for row in report.manifest_rows] == [
        ("a.mp4", "jump", "val"),
        ("b.mp4", "run", "val"),
    ]
    assert statuses(world) == {"a": "ok", "b": "ok", "gone": "missing"} and report.notices == ()
    with pytest.raises(ValueError, match="name it with --split"):
        world.prepare(annotations=options["annotations"])
    with pytest.raises(ValueError, match="is no list of lines 'path label'"):
        world.prepare(annotations=(world.root / "val.txt", world.list_file), split="val")
    (world.root / "train.txt").write_text("data/train/jump/a.mp4 2\n")
    with pytest.raises(ValueError, match="1 clips are listed more than once, the first is 'a'"):
        world.prepare(annotations=(world.root / "val.txt", world.root / "train.txt"), split="val")


def test_a_list_whose_order_cannot_be_checked_says_so_and_a_label_map_checks_it(world: World) -> None:
    (world.root / "val.txt").write_text("a.mp4 2\n")
    world.put("a.mp4", "a")
    options = {"annotations": (world.root / "val.txt",), "split": "val"}
    (notice,) = world.prepare(**options).notices
    assert "order of classes could not be checked" in notice
    label_map = world.root / "map.txt"
    label_map.write_text("swim (fast)\nrun\njump\n")
    report = world.prepare(**options, classes=label_map)
    assert (report.manifest_rows[0].label, report.notices) == ("jump", ())
    label_map.write_text("jump\nrun\nswim (fast)\n")
    with pytest.raises(ValueError, match="2 of the 3 classes differ"):
        world.prepare(**options, classes=label_map)


def test_class_folders_without_any_list(world: World) -> None:
    world.put("swim_fast/a.mp4", "a")
    world.put("run/b.mp4", "b")
    report = world.prepare(annotations=())
    assert {(row.video_id, row.label, row.split) for row in report.manifest_rows} == {
        ("a", "swim (fast)", None),
        ("b", "run", None),
    }
    (notice,) = report.notices
    told = "without --annotations the clips are those found in class folders, so missing ones cannot be told."
    assert notice == f"{world.videos}: {told}"
    assert summary_lines(report)[:2] == ["Made Up: 2 files found", "  no split: 2 found, 2 in the manifest"]
    summary = json.loads((world.out / "summary.json").read_text())
    assert (summary["listed"], summary["found"], summary["splits"][""]["listed"]) == (None, 2, None)
    report = world.prepare(annotations=(), split="val")
    assert {row.split for row in report.manifest_rows} == {"val"}
    assert summary_lines(report)[1] == "  val: 2 found of 5 official, 2 in the manifest"
    with pytest.raises(
        ValueError, match=r"of which official split of Made Up: .* --annotations of Made Up takes: Its l"
    ):
        world.prepare(recipe=world.recipe(versions_are_splits=True), annotations=(), split="val")


def test_entries_without_a_source_have_the_recipes(world: World) -> None:
    def source_id(path: PurePosixPath) -> str | None:
        return None if path.stem == "c" else f"of {path}"

    recipe = world.recipe(source_id=source_id)
    for name in ("run/a.mp4", "run/b.mp4", "run/c.mp4"):
        world.put(name, name[4])
    world.entries = [an_entry("a", source_id="own"), an_entry("b"), an_entry("c")]
    (world.root / "val.txt").write_text("d/run/a.mp4 1\nd/run/b.mp4 1\nd/run/c.mp4 1\n")
    sources = [
        [row.extra["source_id"] for row in world.prepare(recipe=recipe, **options).manifest_rows]
        for options in ({}, {"annotations": ()}, {"annotations": (world.root / "val.txt",), "split": "val"})
    ]
    assert sources == [
        ["own", "of b", "c"],
        ["of run/a.mp4", "of run/b.mp4", "c"],
        ["of d/run/a.mp4", "of d/run/b.mp4", "c"],
    ]


def test_what_annotations_takes_is_told_where_they_are_wrong(world: World) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*gone\.csv; --annotations of Made Up takes: Its list\.$"):
        world.prepare(annotations=(world.root / "gone.csv",))
    world.put("one/two/three/a.mp4", "a")
    with pytest.raises(ValueError, match=r"give the lists of clips by --annotations \(Its list\)\.$"):
        world.prepare(annotations=())


def test_own_clips_take_their_classes_from_beside_them_or_from_a_file(world: World) -> None:
    world.entries = [an_entry("a", "zeta"), an_entry("b", "beta")]
    world.put("a.mp4", "a")
    recipe = world.recipe(versions={"1": Version(classes="", official={})})
    assert world.prepare(recipe=recipe, annotations=()).classes == ("beta", "zeta")
    (world.videos / "classes.txt").write_text("zeta\nbeta\nalpha\n")
    assert world.prepare(recipe=recipe, annotations=()).classes == ("zeta", "beta", "alpha")
    given = world.root / "given.txt"
    given.write_text("alpha\nzeta\nbeta\n")
    assert world.prepare(recipe=recipe, annotations=(), classes=given).classes == ("alpha", "zeta", "beta")
    assert [request.classes for request in world.requests] == [(), (), ("alpha", "zeta", "beta")]


def test_folders_of_frames_are_clips_where_the_list_asks_for_them(world: World) -> None:
    for folder in ("frames/a", "thumbnails"):
        (world.videos / folder).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 0)).save(world.videos / folder / f"{number}.png")
    world.put("b.mp4", "b")
    (world.videos / "b").mkdir()
    Image.new("RGB", (8, 8)).save(world.videos / "b" / "0.png")  # frames of b, which has a video
    report = world.prepare()
    assert statuses(world) == {"a": "ok", "b": "ok", "c": "missing"}
    assert (world.table()[0]["num_frames"], world.table()[0]["backend"]) == ("4", "images")
    assert [row.path for row in report.manifest_rows] == [world.videos / "frames/a", world.videos / "b.mp4"]


def test_the_check_that_is_asked_for_is_made(world: World) -> None:
    """A file whose damage lies between the first, the middle and the last frame: only the full check meets it."""
    path = encode(world.videos / "a.mp4", b_frames=0, faststart=True)  # 60 frames, a key frame every 12
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size > 0][13]
    damaged = bytearray(path.read_bytes())
    damaged[packet.pos : packet.pos + 4] = b"\xff\xff\xff\xff"  # the length of its first unit
    path.write_bytes(damaged)
    world.put("b.mp4", "b")
    found = {check: (world.prepare(check=check), world.table()[0]["status"])[1] for check in ("none", "quick", "full")}
    assert found == {"none": "ok", "quick": "ok", "full": "corrupt"}
    assert json.loads((world.out / "summary.json").read_text())["check"] == "full"


def test_processes_and_their_time_are_passed_on(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, object]] = []

    def noting(*arguments: Any, **options: Any) -> Any:
        seen.append((options["num_workers"], options["timeout_seconds"]))
        return serial(*arguments)

    monkeypatch.setattr("coca_video.data.scan.parallel", noting)
    for name in ("a", "b"):
        world.put(f"{name}.mp4", "a")
    world.prepare(num_workers=3, timeout_seconds=7.0)
    world.prepare(num_workers=None)
    assert seen == [(3, 7.0)] * 2 + [(len(os.sched_getaffinity(0)), 60.0)] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": 0}, "--num-workers must be at least 1; got 0"),
        ({"timeout_seconds": 0.0}, "--timeout-seconds must be above 0; got 0"),
        ({"min_seconds": -1.0}, "--min-seconds must be above 0; got -1"),
        ({"check": "none", "min_seconds": 1.0}, "leave out --check none"),
        ({"check": "none", "drop_short": True}, "leave out --check none"),
        ({"videos": Path("/gone")}, "There is no folder /gone"),
        ({"against": Path("/gone.csv")}, "There is no file /gone.csv"),
    ],
)
def test_wrong_options_are_sentences(options: dict[str, Any], message: str, world: World) -> None:
    world.put("a.mp4", "a")
    with pytest.raises(ValueError, match=message):
        world.prepare(**options)
    assert not (world.out / "manifest.csv").exists()


def test_nothing_found_says_what_names_look_like(world: World) -> None:
    for number in range(4):
        world.put(f"v{number}.mp4", "a")
    with pytest.raises(ValueError, match=r"None of the 3 .*names like 'a', and the 4 video .*v0.mp4, v1.mp4, v2.mp4, "):
        world.prepare()
    world.entries = [an_entry("a", keys=()), an_entry("b")]
    with pytest.raises(ValueError, match=r"None of the 2 .*names like 'b', and"):
        world.prepare()
    world.entries = [an_entry("a", keys=())]
    with pytest.raises(ValueError, match=r"names like none, since the list tells no clip from the others, and"):
        world.prepare()


def test_nothing_fit_for_a_manifest_is_an_error_that_leaves_the_table(world: World) -> None:
    world.put("a.mp4", "a")
    world.prepare()
    (world.videos / "a.mp4").write_bytes(b"")
    with pytest.raises(ValueError, match=r"None of the 1 files found is fit .*a.mp4 \(the file is empty"):
        world.prepare()
    assert statuses(world) == {"a": "corrupt", "b": "missing", "c": "missing"}
    assert not (world.out / "manifest.csv").exists()


def test_a_run_that_stops_half_way_leaves_what_it_did(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b", "c"):
        world.put(f"{name}.mp4", name)

    def two_then_stop(function: Callable[[Any], Any], items: Any, **_: object) -> Iterator[tuple[Any, Any]]:
        for item in items[:2]:
            yield item, function(item)
        raise KeyboardInterrupt

    monkeypatch.setattr("coca_video.data.scan.parallel", two_then_stop)
    with pytest.raises(KeyboardInterrupt):
        world.prepare()
    assert [path.name for path in world.out.iterdir()] == ["scan.jsonl"]
    monkeypatch.setattr("coca_video.data.scan.parallel", serial)
    world.prepare()
    assert world.bars == [("checking files", 0, 3), ("checking files", 2, 3)]


def test_walking_follows_links_once_and_passes_over_what_is_hidden(tmp_path: Path) -> None:
    for name in ("v/a.mp4", "v/sub/B.AVI", "v/.hidden/c.mp4", "v/._a.mp4", "v/notes.txt", "far/d.webm", "v/i/0.JPG"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "v" / "link").symlink_to(tmp_path / "far")
    (tmp_path / "v" / "sub" / "up").symlink_to(tmp_path / "v")
    found = find_videos(tmp_path / "v")
    assert found.videos == tuple(map(PurePosixPath, ("a.mp4", "link/d.webm", "sub/B.AVI")))
    assert found.image_folders == (PurePosixPath("i"),)


def test_a_key_that_two_clips_hold_tells_neither() -> None:
    found = VideoFiles(videos=(PurePosixPath("id.mp4"), PurePosixPath("id_7.mp4")), image_folders=())
    entries = [an_entry("id_0", keys=("id_0", "id")), an_entry("id_7", keys=("id_7", "id"))]
    matches = match_files(entries, found=found, file_keys=lambda path: (path.stem,))
    assert matches.files == {"id_7": (PurePosixPath("id_7.mp4"),)}
    assert matches.causes == {"id_0": "id.mp4 may be this clip or another of the list: its name does not tell"}
    assert matches.extra == (PurePosixPath("id.mp4"),)
    keyless = match_files([an_entry("x", keys=())], found=found, file_keys=lambda path: (path.stem,))
    assert (keyless.files, "ends like another's" in keyless.causes["x"]) == ({}, True)
    timed = VideoFiles(videos=(PurePosixPath("id.mp4"), PurePosixPath("z/id_0.mp4")), image_folders=())
    both = match_files(entries[:1], found=timed, file_keys=lambda path: (path.stem,))
    assert (both.files, both.extra) == ({"id_0": (PurePosixPath("z/id_0.mp4"), PurePosixPath("id.mp4"))}, ())
    alone = match_files(entries[:1], found=found, file_keys=lambda path: (path.stem,))
    assert alone.files == {"id_0": (PurePosixPath("id.mp4"),)}


def test_the_clip_of_one_second_is_one(clips: dict[str, Path]) -> None:
    assert check_file(clips["short"], check="full").duration_seconds == 1.0
