"""A probe on a frame cache: built once from the videos, and then they are not read again."""

import csv
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coca_video.data import frame_cache_build
from coca_video.data.frame_cache import FrameCache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.manifest import read_manifest
from coca_video.models.image import VitConfig
from coca_video.train import probe_data
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder

KEPT = FrameCacheConfig(num_frames=16, short_side=48, quality=95)  # all that the drawn clips have


@pytest.fixture(scope="module")
def clips(drawn_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The drawn clips, one to train on and one to test on cut off; the manifest."""
    folder = tmp_path_factory.mktemp("cached") / "clips"
    shutil.copytree(drawn_clips.parent, folder)
    manifest = read_manifest(folder / "manifest.csv")
    for split in ("train", "test"):
        path = Path(manifest.select(split=split).rows[0].path)
        path.write_bytes(path.read_bytes()[:300])
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def config(clips: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=clips),
        out=clips.parent.parent / "run",
        num_frames=3,
        frame_cache=clips.parent.parent / "cache",
        cache=KEPT,
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=4, batch_size=8, log_every=1, num_workers=1),
        device="cpu",
    )


@pytest.fixture(scope="module")
def built(config: ProbeConfig) -> ProbeConfig:
    """The config of a run that has built the cache."""
    run_probe(replace(config, clips=replace(config.clips, decoder="pyav")))
    return config


@pytest.fixture
def without_videos(clips: Path) -> Iterator[None]:
    """Files that are there, and that no decoder can read."""
    kept = {path: path.read_bytes() for path in clips.parent.rglob("*.mp4")}
    for path in kept:
        path.write_bytes(b"no video")
    yield
    for path, data in kept.items():
        path.write_bytes(data)


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_there_is_one_cache_a_manifest_and_the_result_says_so(built: ProbeConfig) -> None:
    assert built.frame_cache is not None
    manifest = read_manifest(built.clips.train)
    expected = {manifest.select(split=split).fingerprint()[:12]: rows for split, rows in (("train", 20), ("test", 10))}
    assert {folder.name: len(FrameCache(folder)) for folder in built.frame_cache.iterdir()} == expected
    assert all(FrameCache(folder).config == KEPT for folder in built.frame_cache.iterdir())
    document = json.loads((built.out / "test.json").read_text())
    assert document["frames"] == "JPEG cache" and (document["num_videos"], document["num_unreadable"]) == (9, 1)
    assert json.loads((built.out / "config.json").read_text())["cache"]["quality"] == 95


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [False, True])
def test_losses_are_those_of_the_videos_but_for_jpeg(built: ProbeConfig, tmp_path: Path, tokens: bool) -> None:
    """All frames are kept at their size, so frames, crops and flips are the same."""
    cached = replace(
        built, augment=not tokens, token_cache=tmp_path / "tokens" if tokens else None, out=tmp_path / "cached"
    )
    run_probe(cached)
    run_probe(replace(cached, frame_cache=None, cache=FrameCacheConfig(), out=tmp_path / "videos"))
    found, expected = losses(tmp_path / "cached"), losses(tmp_path / "videos")
    assert found != expected
    assert found == pytest.approx(expected, rel=3e-3)  # measured 1.3e-3
    run_probe(replace(cached, loop=replace(built.loop, seed=1), out=tmp_path / "seed"))
    assert losses(tmp_path / "seed") != pytest.approx(expected, rel=3e-3)


@pytest.mark.drill
@pytest.mark.usefixtures("without_videos")
@pytest.mark.parametrize("tokens", [False, True])
def test_videos_are_not_read_again(built: ProbeConfig, tmp_path: Path, tokens: bool) -> None:
    again = replace(
        built, augment=not tokens, token_cache=tmp_path / "tokens" if tokens else None, out=tmp_path / "again"
    )
    result = run_probe(again)
    assert result.num_unreadable == 2
    if not tokens:
        assert losses(again.out) == losses(built.out)
    manifest = read_manifest(built.clips.train)
    broken = [manifest.select(split=split).rows[0] for split in ("train", "test")]
    with (again.out / "unreadable.csv").open() as file:
        listed = dict(list(csv.reader(file))[1:])
    assert set(listed) == {row.video_id for row in broken}
    assert all(listed[row.video_id].startswith(f"{row.path}: ") for row in broken)


@pytest.mark.drill
@pytest.mark.parametrize("changed", [{"num_frames": 3}, {"short_side": 48, "quality": 20}], ids=str)
def test_what_is_kept_changes_the_losses(built: ProbeConfig, tmp_path: Path, changed: dict[str, int]) -> None:
    kept = replace(KEPT, **changed)
    clips = replace(built.clips, test_split=None)
    run_probe(replace(built, clips=clips, cache=kept, frame_cache=tmp_path / "cache", out=tmp_path / "run"))
    assert losses(tmp_path / "run") != losses(built.out)


@pytest.mark.drill
def test_the_size_is_said_first_and_must_fit(
    config: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = replace(config.clips, test_split=None)
    config = replace(config, clips=clips, frame_cache=tmp_path / "cache", out=tmp_path / "run")
    disk = SimpleNamespace(free=1_000)
    monkeypatch.setattr(frame_cache_build.shutil, "disk_usage", lambda folder: disk)
    with pytest.raises(ValueError, match=r"will take about \d+ MB, .* and 0 MB are free; choose another --frame-cache"):
        run_probe(config)
    assert not config.out.joinpath("test.json").exists()
    disk.free = 5_000_000_000
    capsys.readouterr()
    run_probe(config)
    said = capsys.readouterr().err
    assert "still to be written; 5,000 MB are free." in said
    assert said.index("MB are free") < said.index("training:")


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"sampling": "dense", "stride": 2}, r"keeps 16 frames spread evenly over a clip, and dense sampling needs"),
        ({"num_frames": 17}, r"keeps 16 frames of a clip, and 17 are asked for"),
        ({"image_size": 56}, r"keeps frames of 48 pixels, and images of 56 are asked for"),
    ],
    ids=("dense", "frames", "size"),
)
def test_clips_that_the_cache_cannot_give_are_refused_before_it_is_built(
    config: ProbeConfig, tmp_path: Path, changed: dict[str, int], sentence: str
) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match=sentence):
        run_probe(replace(config, **changed, frame_cache=cache, out=tmp_path / "run"))
    assert not cache.exists()


def test_a_decoder_that_does_not_work_is_told_before_anything_is_read(
    config: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_data, "prove", lambda name: f"{name} does not work here: no libraries")
    cache = tmp_path / "cache"
    for frame_cache, kept in ((cache, KEPT), (None, FrameCacheConfig())):
        clips = replace(config.clips, decoder="pyav")
        with pytest.raises(ValueError, match="pyav does not work here: no libraries; install or mend it, or take"):
            run_probe(replace(config, clips=clips, frame_cache=frame_cache, cache=kept, out=tmp_path / "run"))
    assert not cache.exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_what_to_keep_needs_a_cache(config: ProbeConfig) -> None:
    for changed, option in (({"quality": 80}, "quality"), ({"num_frames": 32}, "num-frames")):
        with pytest.raises(ValueError, match=rf"--cache\.{option} does nothing without --frame-cache; give both"):
            replace(config, frame_cache=None, cache=FrameCacheConfig(**changed))
