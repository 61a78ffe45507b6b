"""The frame cache: which frames, how near to the decoded ones, the same bytes after any interruption, damage found."""

import io
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from coca_video.data import frame_cache, frame_cache_build, frame_cache_shards, video
from coca_video.data.decode import UnreadableVideo, open_video
from coca_video.data.frame_cache import CachedVideoDataset, FrameCache
from coca_video.data.frame_cache_build import FrameCacheReport, SizeEstimate, build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig, record_dtype
from coca_video.data.loader import SampleKey, Unreadable, in_order
from coca_video.data.manifest import Manifest, VideoRow
from coca_video.data.video import Clip, ClipConfig, VideoDataset, collate_clips
from coca_video.data.workers import WorkerFailure, parallel
from tests.data.numbered_videos import encode, numbers_shown

PATIENCE = 600.0
CONFIG = FrameCacheConfig(num_frames=24, short_side=64)
LONG, WINDOW, SHORT, TALL, CORRUPT, GONE = range(6)


class Bars:
    """Counts what a progress bar would show."""

    def __init__(self) -> None:
        self.made: list[tuple[str, int, int]] = []
        self.updates = 0

    @contextmanager
    def __call__(self, what: str, *, total: int, initial: int = 0) -> Iterator["Bars"]:
        self.made.append((what, initial, total))
        yield self

    def update(self, n: float | None = 1, /) -> None:
        self.updates += int(n or 0)


def serial(function: Any, items: Any, **_: Any) -> Iterator[Any]:
    """`parallel` without processes."""
    for item in items:
        yield item, function(item)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Numbered frames of 30 a second: 150 and a part of them, 20, 40 tall ones; a damaged file, and one not there."""
    folder = tmp_path_factory.mktemp("videos")
    long = encode(folder / "long.mp4", num_frames=150, height=96, width=128)
    short = encode(folder / "short.mp4", num_frames=20, first=200)
    tall = encode(folder / "tall.mp4", num_frames=40, first=300, height=192, width=108)
    (folder / "corrupt.mp4").write_bytes(long.read_bytes()[:3000])
    rows = (
        VideoRow(path=long, label="two", video_id="long"),
        VideoRow(path=long, label="one", video_id="window", start_seconds=1.01, end_seconds=3.0),
        VideoRow(path=short, label="one", video_id="short"),
        VideoRow(path=tall, label=None, video_id="tall"),
        VideoRow(path=folder / "corrupt.mp4", label="one", video_id="corrupt"),
        VideoRow(path=folder / "gone.mp4", label="two", video_id="gone"),
    )
    return Manifest(source=folder / "manifest.csv", rows=rows, classes=("one", "two"))


def build(manifest: Manifest, folder: Path, **changes: Any) -> tuple[FrameCacheReport, Bars, list[SizeEstimate]]:
    """In this process, unless `real` asks for workers."""
    bars, estimates = Bars(), list[SizeEstimate]()
    arguments = {"config": CONFIG, "decoder": "auto", "num_workers": 1, "timeout_seconds": PATIENCE}
    arguments |= {"progress": bars, "on_estimate": estimates.append} | changes
    with pytest.MonkeyPatch.context() as patch:
        if not arguments.pop("real", False):
            patch.setattr(frame_cache_build, "parallel", arguments.pop("parallel", serial))
        return build_frame_cache(manifest, folder=folder, **arguments), bars, estimates


@pytest.fixture(scope="module")
def folder(manifest: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cache of the manifest by CONFIG."""
    folder = tmp_path_factory.mktemp("cache") / "frames"
    build(manifest, folder)
    return folder


@pytest.fixture
def copied(folder: Path, tmp_path: Path) -> Path:
    """A cache to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copied"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def centres(first: int, last: int, *, count: int) -> list[int]:
    """The frame on which the centre of each of `count` equal parts of [first, last) falls."""
    return [first + (2 * part + 1) * (last - first) // (2 * count) for part in range(count)]


EXPECTED = {
    LONG: centres(0, 150, count=24),
    WINDOW: centres(30, 90, count=24),  # frame 30 is on the screen from 1.0 to 1.033 s, frame 90 begins at 3.0 s
    SHORT: list(range(20)),
    TALL: centres(0, 40, count=24),
}


@pytest.mark.parametrize(
    ("row", "shown_from", "size", "num_frames"),
    [(LONG, 0, (64, 85), 150), (WINDOW, 0, (64, 85), 150), (SHORT, 200, (48, 64), 20), (TALL, 300, (113, 64), 40)],
)
def test_the_frames_kept_are_the_centres_of_equal_parts_of_the_window(
    row: int, shown_from: int, size: tuple[int, int], num_frames: int, folder: Path
) -> None:
    clip = FrameCache(folder).clip(row)
    expected = EXPECTED[row]
    assert clip.numbers.tolist() == expected and len(clip) == len(expected)
    frames = clip.frames(range(len(clip)))
    assert frames.dtype == torch.uint8 and tuple(frames.shape) == (len(expected), 3, *size)
    assert [number - shown_from for number in numbers_shown(frames)] == expected
    np.testing.assert_allclose(clip.times_seconds, np.array(expected) / 30, rtol=0, atol=1e-9)
    assert (clip.num_frames, clip.height, clip.width) == (num_frames, *size)
    assert clip.frames_per_second == pytest.approx(30, abs=1e-6)
    assert (clip.first_frame, clip.last_frame) == ((30, 90) if row == WINDOW else (0, num_frames))


def test_a_read_decodes_only_the_frames_asked_for_and_each_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = FrameCache(folder).clip(LONG)
    whole, opened, open_image = clip.frames(range(24)), list[int](), frame_cache.Image.open

    def counting(file: Any) -> Any:
        opened.append(len(file.getvalue()))
        return open_image(file)

    monkeypatch.setattr(frame_cache.Image, "open", counting)
    assert torch.equal(clip.frames([20, 3, 3, 0, 20]), whole[[20, 3, 3, 0, 20]])
    assert opened == [int(clip.sizes[position]) for position in (0, 3, 20)]
    assert tuple(clip.frames([]).shape) == (0, 3, 64, 85)
    with pytest.raises(ValueError, match="position 24 was asked for, of 0 to 23"):
        clip.frames([24])


class Loss(NamedTuple):
    """In dB, and of 255."""

    psnr: float
    error: float
    num_bytes: int


def test_jpeg_loses_little_of_real_frames_and_less_at_a_higher_quality(data_folder: Path, tmp_path: Path) -> None:
    path = data_folder / "clips" / "mmaction2_demo_arm_wrestling.mp4"
    manifest = Manifest(source=tmp_path, rows=(VideoRow(path=path, label=None, video_id="real"),), classes=())
    with open_video(path, backend="pyav") as video:
        assert (video.num_frames, video.height, video.width) == (280, 256, 340)
        numbers = centres(0, 280, count=4)
        decoded = video.frames(numbers)
    smaller = torch.nn.functional.interpolate(decoded.float(), size=(128, 170), mode="bilinear", antialias=True)
    found: dict[tuple[int, int], Loss] = {}
    for quality, short_side, reference in ((90, 256, decoded), (50, 256, decoded), (90, 128, smaller)):
        cache = tmp_path / f"{quality} {short_side}"
        config = FrameCacheConfig(num_frames=4, short_side=short_side, quality=quality)
        report, *_ = build(manifest, cache, config=config)
        clip = FrameCache(cache).clip(0)
        assert clip.numbers.tolist() == numbers
        difference = clip.frames(range(4)).double() - reference.double()
        found[quality, short_side] = Loss(
            psnr=10 * math.log10(255**2 / float(difference.square().mean())),
            error=float(difference.abs().mean()),
            num_bytes=report.num_bytes,
        )
    assert 39.0 < found[90, 256].psnr < 42.0 and found[90, 256].error < 1.8  # measured 39.8 dB and 1.63 of 255
    assert 33.0 < found[50, 256].psnr < 36.0 and found[50, 256].error > 2.5  # 34.6 dB, 3.05
    assert found[90, 128].psnr > 36.5 and found[90, 128].error < 2.5  # 37.4 dB, 2.23: more detail in a pixel
    assert found[50, 256].num_bytes < 0.5 * found[90, 256].num_bytes  # 38 and 85 kB


def test_files_that_cannot_be_read_are_kept_with_the_cause_that_a_decoder_gives(
    manifest: Manifest, folder: Path
) -> None:
    cached = CachedVideoDataset(
        manifest, cache=FrameCache(folder), config=ClipConfig(num_frames=4, image_size=48), seed=0
    )
    direct = VideoDataset(manifest, config=ClipConfig(num_frames=4, image_size=48), seed=0)
    for row in (CORRUPT, GONE):
        expected = direct[SampleKey(0, row)]
        assert isinstance(expected, Unreadable) and cached[SampleKey(0, row)] == expected
    assert cached[SampleKey(0, GONE)].cause == f"{manifest.rows[GONE].path}: there is no such file"
    with pytest.raises(UnreadableVideo, match="clip 5: there is no such file"):
        FrameCache(folder).clip(GONE)
    report, bars, _ = build(manifest, folder)
    assert set(report.unreadable) == {"corrupt", "gone"} and list(FrameCache(folder).unreadable()) == [CORRUPT, GONE]
    assert report.unreadable["gone"] == f"{manifest.rows[GONE].path}: there is no such file"
    assert (report.num_clips, report.num_kept, bars.made) == (6, 6, [])


def test_a_worker_that_hangs_or_dies_is_the_cause(manifest: Manifest, tmp_path: Path) -> None:
    def failing(function: Any, items: Any, **options: Any) -> Iterator[Any]:
        assert (options["num_workers"], options["timeout_seconds"]) == (3, 7.0)
        for item in items:
            failed = item.number == LONG
            yield item, WorkerFailure(cause="took longer than 7 s", timed_out=True) if failed else function(item)

    report, *_ = build(manifest, tmp_path / "c", parallel=failing, num_workers=3, timeout_seconds=7.0)
    assert report.unreadable["long"] == f"{manifest.rows[LONG].path}: took longer than 7 s"
    assert len(report.unreadable) == 3 and FrameCache(tmp_path / "c").cause(SHORT) is None


def test_the_decoder_asked_for_decodes(manifest: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noting(path: Any, *, backend: Any) -> Any:
        asked.append(backend)
        return open_video(path, backend=backend)

    monkeypatch.setattr(video, "open_video", noting)
    build(manifest, tmp_path / "c", decoder="pyav")
    assert asked == ["pyav"] * 6


@pytest.mark.parametrize(
    ("change", "numbers", "size"),
    [
        ({"num_frames": 3}, centres(0, 150, count=3), (64, 85)),
        ({"short_side": 32}, EXPECTED[LONG], (32, 42)),
        ({"short_side": 96}, EXPECTED[LONG], (96, 128)),
        ({"short_side": 500}, EXPECTED[LONG], (96, 128)),  # never enlarged
    ],
)
def test_number_and_size_of_the_frames(
    change: dict[str, int], numbers: list[int], size: tuple[int, int], manifest: Manifest, tmp_path: Path
) -> None:
    build(manifest, tmp_path / "c", config=replace(CONFIG, **change))
    clip = FrameCache(tmp_path / "c").clip(LONG)
    assert (clip.numbers.tolist(), (clip.height, clip.width)) == (numbers, size)
    assert numbers_shown(clip.frames(range(len(clip)))) == numbers


def test_large_videos_are_decoded_in_parts(
    manifest: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_cache_build, "_DECODED_BYTES", 5 * 3 * 96 * 128 + 1)
    asked: list[int] = []
    decode = frame_cache_build.VideoReader.frames

    def counting(reader: Any, indices: Any) -> Any:
        asked.append(len(indices))
        return decode(reader, indices)

    monkeypatch.setattr(frame_cache_build.VideoReader, "frames", counting)
    build(replace(manifest, rows=manifest.rows[:1]), tmp_path / "c", decoder="pyav")
    assert asked == [5, 5, 5, 5, 4]
    found = (tmp_path / "c" / "frames-00000.bin").read_bytes()
    assert len(found) > 0 and (folder / "frames-00000.bin").read_bytes().startswith(found)


def test_shards_hold_whole_clips_in_order_and_no_more_than_their_bytes(manifest: Manifest, tmp_path: Path) -> None:
    build(manifest, tmp_path / "one")
    whole = (tmp_path / "one" / "frames-00000.bin").read_bytes()
    records = np.fromfile(tmp_path / "one" / "index.bin", dtype=record_dtype(24))
    sizes = records["num_bytes"].tolist()
    assert len(sizes) == 6 and sum(sizes) == len(whole)
    limit = sizes[0] + sizes[1]  # filled to the byte by the first two
    expected, groups = list[int](), list[int]()
    for size in sizes:
        if groups and groups[-1] + size <= limit:
            groups[-1] += size
        else:
            groups.append(size)
    for number, size in enumerate(groups):
        expected.append(size)
        assert size <= limit, number
    build(manifest, tmp_path / "many", config=replace(CONFIG, shard_bytes=limit))
    shards = sorted((tmp_path / "many").glob("frames-*.bin"))
    assert [path.stat().st_size for path in shards] == expected and len(expected) > 1
    assert b"".join(path.read_bytes() for path in shards) == whole
    one, many = FrameCache(tmp_path / "one"), FrameCache(tmp_path / "many")
    for row in EXPECTED:
        assert torch.equal(one.clip(row).frames([1, 17]), many.clip(row).frames([1, 17]))
    build(manifest, tmp_path / "each", config=replace(CONFIG, shard_bytes=1))
    assert [path.stat().st_size for path in sorted((tmp_path / "each").glob("frames-*"))] == sizes


def test_the_size_is_estimated_once_from_the_clips_done_first(manifest: Manifest, tmp_path: Path) -> None:
    rows = tuple(
        replace(manifest.rows[row], video_id=f"{row} {copy}") for row in (LONG, SHORT, TALL) for copy in range(8)
    )
    many = replace(manifest, rows=rows)
    order: list[int] = []

    def noting(function: Any, items: Any, **_: Any) -> Iterator[Any]:
        for item in items:
            order.append(item.number)
            yield item, function(item)

    _, bars, estimates = build(many, tmp_path / "c", parallel=noting)
    assert order[:8] == centres(0, 24, count=8) and sorted(order) == list(range(24))
    sizes = np.fromfile(tmp_path / "c" / "index.bin", dtype=record_dtype(24))["num_bytes"].astype(np.int64)
    assert len(estimates) == 1
    written = int(sizes[order[:8]].sum())
    assert estimates[0].total_bytes == written * 3 and estimates[0].left_bytes == written * 2
    assert estimates[0].free_bytes == pytest.approx(shutil.disk_usage(tmp_path).free, rel=0.05)
    assert (bars.made, bars.updates) == ([("caching frames", 0, 24)], 24)
    _, _, estimates = build(manifest, tmp_path / "few")
    whole = (tmp_path / "few" / "frames-00000.bin").stat().st_size
    assert [(estimate.total_bytes, estimate.left_bytes) for estimate in estimates] == [(whole, 0)]


class TooLarge(Exception):
    """What a caller may raise at the estimate."""


def interrupted_after(count: int, manifest: Manifest, folder: Path, **changes: Any) -> None:
    """A build that ends by an exception, as by Ctrl-C, when `count` clips are done."""

    def interrupted(function: Any, items: Any, **_: Any) -> Iterator[Any]:
        for done, item in enumerate(items):
            if done == count:
                raise KeyboardInterrupt
            yield item, function(item)

    with pytest.raises(KeyboardInterrupt):
        build(manifest, folder, parallel=interrupted, **changes)


def test_what_the_caller_raises_at_the_estimate_ends_the_building(manifest: Manifest, tmp_path: Path) -> None:
    def refuse(estimate: SizeEstimate) -> None:
        raise TooLarge

    with pytest.raises(TooLarge):
        build(manifest, tmp_path / "c", on_estimate=refuse)
    with pytest.raises(ValueError, match="is not finished; run its building again"):
        FrameCache(tmp_path / "c")


def appended_garbage(folder: Path) -> None:
    with (folder / "frames-00000.bin").open("ab") as file:
        file.write(b"\xff\xd8 half a clip")
    (folder / "frames-00001.bin").write_bytes(b"of a record that is not there")


def half_a_record(folder: Path) -> None:
    with (folder / "index.bin").open("ab") as file:
        file.write((folder / "index.bin").read_bytes()[:300])


def a_lost_record(folder: Path) -> None:
    os.truncate(folder / "index.bin", (folder / "index.bin").stat().st_size - 1)


def lost_frames(folder: Path) -> None:
    os.truncate(folder / "frames-00000.bin", (folder / "frames-00000.bin").stat().st_size - 1)


def a_record_of_zeros(folder: Path) -> None:
    with (folder / "index.bin").open("ab") as file:
        file.write(bytes(record_dtype(24).itemsize))


def halves(folder: Path) -> None:
    (folder / ".partial-1-cache.json").write_text("{")
    (folder / "clips" / ".partial-7-00000004").write_bytes(b"half")


def a_clip_already_appended(folder: Path) -> None:
    (folder / "clips" / "00000000").write_bytes(b"what was killed before this was deleted")


def a_waiting_clip_cut(folder: Path) -> None:
    os.truncate(folder / "clips" / "00000003", 4000)
    (folder / "clips" / "00000005").write_bytes(b"")


def untouched(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("damage", "num_redone"),
    [
        (untouched, 2),
        (appended_garbage, 2),
        (half_a_record, 2),
        (a_record_of_zeros, 2),
        (halves, 2),
        (a_clip_already_appended, 2),
        (a_lost_record, 3),
        (lost_frames, 3),
        (a_waiting_clip_cut, 3),
    ],
)
def test_whatever_an_interruption_leaves_the_end_is_the_same(
    damage: Any, num_redone: int, manifest: Manifest, folder: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"

    def out_of_order(function: Any, items: Any, **_: Any) -> Iterator[Any]:
        by_number = {item.number: item for item in items}
        for number in (0, 1, 3, 4):  # 3 and 4 wait for 2
            yield by_number[number], function(by_number[number])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(manifest, half, parallel=out_of_order)
    assert (half / "index.bin").stat().st_size == 2 * record_dtype(24).itemsize
    assert sorted(path.name for path in (half / "clips").iterdir()) == ["00000003", "00000004"]
    damage(half)
    report, bars, _ = build(manifest, half)
    assert (bars.made, bars.updates) == ([("caching frames", 6 - num_redone, 6)], num_redone)
    assert contents(half) == contents(folder) and report.num_kept == 6 - num_redone


def test_clips_whose_files_come_before_their_results(manifest: Manifest, folder: Path, tmp_path: Path) -> None:
    """A worker writes its file, then says so: the clip may be appended in between, with the one before it."""

    def late(function: Any, items: Any, **_: Any) -> Iterator[Any]:
        done = [(item, function(item)) for item in items]
        for item, result in done:
            died = item.number == GONE  # after it wrote the file
            yield item, WorkerFailure(cause="died", timed_out=False) if died else result

    report, bars, _ = build(manifest, tmp_path / "c", parallel=late)
    assert contents(tmp_path / "c") == contents(folder) and bars.updates == 6
    assert report.unreadable["gone"].endswith("there is no such file")


def test_an_interruption_between_two_shards(manifest: Manifest, tmp_path: Path) -> None:
    config = replace(CONFIG, shard_bytes=1)
    build(manifest, tmp_path / "whole", config=config)
    for count in range(7):
        half = tmp_path / f"half {count}"
        if count < 6:
            interrupted_after(count, manifest, half, config=config)
        _, bars, _ = build(manifest, half, config=config)
        assert bars.updates == 6 - count % 6 and contents(half) == contents(tmp_path / "whole")


class Full(io.FileIO):
    """A file on a disk that is full after five bytes."""

    def write(self, data: Any) -> int:
        return super().write(data[:5])


def test_a_full_disk_is_an_error_and_the_building_goes_on_later(
    manifest: Manifest, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, cache = frame_cache_shards.Shards._append, tmp_path / "c"

    def onto_a_full_disk(shards: Any, clip: Any) -> None:
        if shards._num_rows < 3:
            append(shards, clip)
            return
        with Full(cache / "index.bin", "ab") as shards._index:
            append(shards, clip)

    with monkeypatch.context() as patch:
        patch.setattr(frame_cache_shards.Shards, "_append", onto_a_full_disk)
        with pytest.raises(OSError, match=r"index.bin: only 5 of \d+ bytes could be written; is the disk full"):
            build(manifest, cache)
    _, bars, _ = build(manifest, cache)
    assert bars.updates == 2 and contents(cache) == contents(folder)


BUILD_SCRIPT = """
import pickle, sys
from contextlib import contextmanager
from pathlib import Path

from coca_video.data.frame_cache_build import build_frame_cache

class Bar:
    def update(self, n=1, /): pass

@contextmanager
def progress(what, *, total, initial=0):
    yield Bar()

if __name__ == "__main__":
    manifest, config = pickle.loads(Path(sys.argv[1]).read_bytes())
    build_frame_cache(manifest, folder=Path(sys.argv[2]), config=config, decoder="auto", num_workers=2,
                      timeout_seconds=600.0, progress=progress, on_estimate=lambda estimate: None)
"""


@pytest.mark.drill
def test_a_build_killed_with_two_workers_ends_with_the_same_bytes(manifest: Manifest, tmp_path: Path) -> None:
    rows = tuple(replace(manifest.rows[number % 6], video_id=str(number)) for number in range(60))
    many, config = replace(manifest, rows=rows), replace(CONFIG, shard_bytes=150_000)
    build(many, tmp_path / "whole", config=config)
    assert len(list((tmp_path / "whole").glob("frames-*"))) > 3
    script, arguments, killed = tmp_path / "build.py", tmp_path / "arguments", tmp_path / "killed"
    script.write_text(BUILD_SCRIPT)
    arguments.write_bytes(pickle.dumps((many, config)))

    def num_done() -> int:
        waiting = [path for path in (killed / "clips").glob("*") if not path.name.startswith(".")]
        index = killed / "index.bin"
        return len(waiting) + (index.stat().st_size // record_dtype(24).itemsize if index.is_file() else 0)

    process = subprocess.Popen([sys.executable, str(script), str(arguments), str(killed)])
    end = time.monotonic() + PATIENCE
    while num_done() < 20 and process.poll() is None and time.monotonic() < end:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    time.sleep(0.5)  # the killed one's workers end when they see that it is gone
    with pytest.raises(ValueError, match="not finished"):
        FrameCache(killed)
    found = num_done()
    report, bars, _ = build(many, killed, config=config, num_workers=2, real=True)
    assert 19 <= report.num_kept <= found and bars.updates == 60 - report.num_kept > 0  # 19: one may be in both places
    assert contents(killed) == contents(tmp_path / "whole")


def test_another_key_in_the_same_folder_is_refused(manifest: Manifest, folder: Path, copied: Path) -> None:
    fewer = replace(manifest, rows=manifest.rows[:5])
    with pytest.raises(ValueError, match="holds a frame cache of another manifest"):
        build(fewer, folder)
    for change in ({"num_frames": 25}, {"short_side": 65}, {"quality": 91}, {"shard_bytes": 5}):
        with pytest.raises(ValueError, match=r"holds a frame cache of .*, not of .*choose another folder"):
            build(manifest, folder, config=replace(CONFIG, **change))
    facts = json.loads((copied / "cache.json").read_text())
    (copied / "cache.json").write_text(json.dumps(facts | {"format_version": 2}))
    for refused in (lambda: build(manifest, copied), lambda: FrameCache(copied)):
        with pytest.raises(ValueError, match="a frame cache of format 2, and this program reads 1"):
            refused()


def test_a_half_built_cache_is_kept_for_its_own_key(manifest: Manifest, tmp_path: Path) -> None:
    interrupted_after(2, manifest, tmp_path / "half")
    with pytest.raises(ValueError, match=r"not of .*quality=91"):
        build(manifest, tmp_path / "half", config=replace(CONFIG, quality=91))
    with pytest.raises(ValueError, match="is not finished"):
        FrameCache(tmp_path / "half")


def test_folders_of_other_things_are_refused(manifest: Manifest, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds other files \(thesis.txt\)"):
        build(manifest, tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"mine"}
    for nothing in (tmp_path, tmp_path / "gone", tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds no frame cache"):
            FrameCache(nothing)


def test_two_builders_of_one_folder(manifest: Manifest, tmp_path: Path) -> None:
    with frame_cache_shards.locked_index(tmp_path), pytest.raises(ValueError, match="another process is building"):
        build(manifest, tmp_path)
    build(manifest, tmp_path)
    assert len(FrameCache(tmp_path)) == 6


@pytest.mark.parametrize("change", [{"num_frames": 0}, {"short_side": 0}, {"quality": 0}, {"quality": 101}])
def test_configs_that_cannot_be(change: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"at least 1|from 1 to 100"):
        FrameCacheConfig(**change)


def flip_byte(path: Path, *, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_flipped_byte_is_found_in_the_clip_it_belongs_to(manifest: Manifest, copied: Path) -> None:
    clip = FrameCache(copied).clip(WINDOW)
    flip_byte(copied / "frames-00000.bin", at=int(clip.offsets[5] + clip.sizes[5] // 2))
    clip = FrameCache(copied).clip(WINDOW)
    with pytest.raises(UnreadableVideo, match=r"clip 1: .*frames-00000.bin is damaged at byte \d+; delete the folder"):
        clip.frames([4, 5])
    assert numbers_shown(clip.frames([4, 6])) == [EXPECTED[WINDOW][4], EXPECTED[WINDOW][6]]
    config = ClipConfig(num_frames=24, image_size=48)
    dataset = CachedVideoDataset(manifest, cache=FrameCache(copied), config=config, seed=0)
    found = dataset[SampleKey(0, WINDOW)]
    assert isinstance(found, Unreadable) and found.key == "window" and "is damaged at byte" in found.cause
    assert isinstance(dataset[SampleKey(0, LONG)], Clip)


def test_a_flipped_byte_of_the_index_or_of_a_cause_is_found(copied: Path) -> None:
    record_bytes = record_dtype(24).itemsize
    for at in (0, 5, 100, record_bytes - 1):
        path = copied / "index.bin"
        flip_byte(path, at=SHORT * record_bytes + at)
        with pytest.raises(UnreadableVideo, match=r"clip 2: index.bin is damaged"):
            FrameCache(copied).clip(SHORT)
        assert len(FrameCache(copied).clip(TALL)) == 24
        flip_byte(path, at=SHORT * record_bytes + at)
    assert len(FrameCache(copied).clip(SHORT)) == 20
    flip_byte(copied / "frames-00000.bin", at=(copied / "frames-00000.bin").stat().st_size - 1)  # of the last cause
    with pytest.raises(UnreadableVideo, match=r"clip 5: .* is damaged"):
        FrameCache(copied).cause(GONE)


@pytest.mark.parametrize("name", ["frames-00000.bin", "index.bin"])
def test_files_that_are_cut_or_gone_are_found_at_opening_and_later(name: str, manifest: Manifest, copied: Path) -> None:
    opened = FrameCache(copied)
    size = (copied / name).stat().st_size
    os.truncate(copied / name, size - 1)
    with pytest.raises(ValueError, match=rf"{name} has {size - 1} bytes where {size} bytes were written; delete"):
        FrameCache(copied)
    (copied / name).unlink()
    with pytest.raises(ValueError, match=rf"{name} is missing where {size} bytes"):
        FrameCache(copied)
    if name == "frames-00000.bin":
        with pytest.raises(UnreadableVideo, match=r"clip 0 cannot be read \(.*No such file"):
            opened.clip(LONG).frames([0])
        with pytest.raises(UnreadableVideo, match=r"clip 5 cannot be read \(.*No such file"):
            opened.cause(GONE)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', '{"format_version": 1, "config": {"a": 1}}'])
def test_damaged_facts(text: str, copied: Path) -> None:
    (copied / "cache.json").write_text(text)
    with pytest.raises(ValueError, match=r"cache.json is damaged; delete the folder"):
        FrameCache(copied)


def test_rows_that_are_not_there(folder: Path) -> None:
    for row in (-1, 6):
        with pytest.raises(ValueError, match=f"has clips 0 to 5, got {row}"):
            FrameCache(folder).clip(row)


def test_frames_of_a_protocol_by_their_numbers_in_the_video(folder: Path) -> None:
    clip = FrameCache(folder).clip(WINDOW)
    wanted = [EXPECTED[WINDOW][place] for place in (7, 0, 23, 7)]
    assert clip.positions_of(wanted) == [7, 0, 23, 7]
    assert numbers_shown(clip.frames(clip.positions_of(wanted))) == wanted
    for missing in (0, 32, 89, 149):
        assert missing not in EXPECTED[WINDOW]
        with pytest.raises(ValueError, match=rf"keeps 24 of the 60 frames of its clip, and frame {missing} is not one"):
            clip.positions_of([wanted[0], missing])
    whole = FrameCache(folder).clip(SHORT)
    assert whole.positions_of(range(20)) == list(range(20))


def datasets(manifest: Manifest, folder: Path, **config: Any) -> tuple[CachedVideoDataset, VideoDataset]:
    chosen = ClipConfig(**({"num_frames": 8, "image_size": 48} | config))
    return (
        CachedVideoDataset(manifest, cache=FrameCache(folder), config=chosen, seed=3),
        VideoDataset(manifest, config=chosen, seed=3),
    )


@pytest.mark.parametrize("augment", [False, True])
def test_a_clip_that_is_kept_whole_is_that_of_the_video_itself(augment: bool, manifest: Manifest, folder: Path) -> None:
    """20 frames of 48x64, neither chosen among nor resized: what differs is JPEG's loss alone."""
    cached, direct = datasets(manifest, folder, augment=augment)
    assert len(cached) == 6
    for epoch in range(6):
        key = SampleKey(epoch, SHORT)
        found, expected = cached[key], direct[key]
        assert isinstance(found, Clip) and isinstance(expected, Clip)
        assert (found.label, found.video_id) == (0, "short")
        np.testing.assert_array_equal(found.times_seconds, expected.times_seconds)
        assert (found.frames.double() - expected.frames.double()).abs().mean() < 3.0  # measured 2.3
        other = expected.frames.flip(-1) if augment else expected.frames.flip(0)
        assert (found.frames.double() - other.double()).abs().mean() > 10.0


def test_test_clips_take_the_centres_of_the_frames_kept(manifest: Manifest, folder: Path) -> None:
    cached, _ = datasets(manifest, folder, num_frames=5)
    for row in (LONG, WINDOW):
        clip = cached[SampleKey(4, row)]
        assert isinstance(clip, Clip)
        expected = [EXPECTED[row][position] for position in centres(0, 24, count=5)]
        assert numbers_shown(clip.frames) != [] and clip.frames.shape == (5, 3, 48, 48)
        np.testing.assert_allclose(clip.times_seconds, np.array(expected) / 30, rtol=0, atol=1e-9)
    unlabelled = cached[SampleKey(0, TALL)]
    assert isinstance(unlabelled, Clip) and unlabelled.label == -1


def test_training_draws_one_of_the_frames_kept_from_each_segment(manifest: Manifest, folder: Path) -> None:
    cached, _ = datasets(manifest, folder, num_frames=6, augment=True)
    drawn = set()
    for epoch in range(60):
        clip = cached[SampleKey(epoch, LONG)]
        assert isinstance(clip, Clip)
        numbers = np.round(clip.times_seconds * 30).astype(int).tolist()
        positions = [EXPECTED[LONG].index(number) for number in numbers]
        assert [position // 4 for position in positions] == [0, 1, 2, 3, 4, 5]  # segments of 24 / 6 frames
        drawn.update(positions)
        again = cached[SampleKey(epoch, LONG)]
        assert isinstance(again, Clip) and torch.equal(again.frames, clip.frames)
    assert drawn == set(range(24))


def test_options_of_the_clip_change_its_pixels(manifest: Manifest, folder: Path) -> None:
    plain = datasets(manifest, folder)[0][SampleKey(0, LONG)]
    assert isinstance(plain, Clip)
    changes: list[dict[str, Any]] = [{"interpolation": "bicubic"}, {"augment": True}, {"num_frames": 5}]
    for change in changes:
        other = datasets(manifest, folder, **change)[0][SampleKey(0, LONG)]
        assert isinstance(other, Clip) and not torch.equal(other.frames[0], plain.frames[0])
    assert datasets(manifest, folder, image_size=32)[0][SampleKey(0, LONG)].frames.shape == (8, 3, 32, 32)
    small = datasets(manifest, folder, augment=True, crop_scale=(0.1, 0.1))[0][SampleKey(0, LONG)]
    large = datasets(manifest, folder, augment=True, crop_scale=(1.0, 1.0))[0][SampleKey(0, LONG)]
    assert isinstance(small, Clip) and isinstance(large, Clip) and not torch.equal(small.frames, large.frames)
    with pytest.raises(ValueError, match="keeps 24 frames spread evenly over a clip, and dense sampling needs frames"):
        datasets(manifest, folder, sampling="dense", stride=2)


def test_a_read_that_hangs_is_given_up(manifest: Manifest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release, read = threading.Event(), frame_cache.read_checked

    def hanging(*arguments: Any, **options: Any) -> bytes:
        release.wait(PATIENCE)
        return read(*arguments, **options)

    monkeypatch.setattr(frame_cache, "read_checked", hanging)
    late = datasets(manifest, folder, timeout_seconds=0.05)[0][SampleKey(0, LONG)]
    release.set()
    assert isinstance(late, Unreadable) and "clip 0: reading it takes longer than 0.05 s" in late.cause


def test_clips_that_the_cache_cannot_give_are_refused(manifest: Manifest, folder: Path) -> None:
    assert datasets(manifest, folder, num_frames=24, image_size=64)
    with pytest.raises(ValueError, match="keeps 24 frames of a clip, and 25 are asked for"):
        datasets(manifest, folder, num_frames=25)
    with pytest.raises(ValueError, match="keeps frames of 64 pixels, and images of 65 are asked for"):
        datasets(manifest, folder, image_size=65)
    with pytest.raises(ValueError, match='The decoder "pyav" has no effect on a frame cache'):
        datasets(manifest, folder, decoder="pyav")
    with pytest.raises(ValueError, match="was built of another manifest"):
        datasets(replace(manifest, classes=("two", "one")), folder)


def test_two_workers_give_what_none_give(manifest: Manifest, folder: Path) -> None:
    cached, _ = datasets(manifest, folder, augment=True)
    cached[SampleKey(0, 0)]  # the index is mapped before the workers are forked

    def load(workers: int) -> list[Any]:
        return list(in_order(cached, num_samples=6, batch_size=2, workers=workers, collate=collate_clips))

    alone, together = load(0), load(2)
    assert [bad for _, bad in alone] == [bad for _, bad in together] and len(alone[2][1]) == 2
    for (one, _), (other, _) in zip(alone[:2], together[:2], strict=True):
        assert torch.equal(one.frames, other.frames) and one.video_ids == other.video_ids
        assert torch.equal(one.labels, other.labels)


def read_sum(cache: FrameCache) -> int:
    return int(cache.clip(LONG).frames([0, 9]).sum())


@pytest.mark.slow
def test_a_cache_travels_to_spawned_processes_without_its_index(folder: Path) -> None:
    cache = FrameCache(folder)
    expected = read_sum(cache)
    assert pickle.dumps(cache) == pickle.dumps(FrameCache(folder))
    ((_, found),) = parallel(read_sum, [cache], num_workers=1, timeout_seconds=PATIENCE)
    assert found == expected
