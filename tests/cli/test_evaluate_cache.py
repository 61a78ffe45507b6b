"""evaluate --frame-cache: the cached frames' numbers, next to those of the videos; what the cache lacks is refused."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from coca_video.cli.__main__ import main
from coca_video.data.frame_cache_build import build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.manifest import read_manifest
from coca_video.models.image import VitConfig
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig, progress_bar
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import cache_folder

pytestmark = pytest.mark.slow  # each cache is built by a process that imports torch


@pytest.fixture(scope="module")
def probe(drawn_clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips),
        out=tmp_path_factory.mktemp("probe") / "run",
        num_frames=3,
        token_cache=tmp_path_factory.mktemp("tokens"),
        augment=False,
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=4, batch_size=8),
        device="cpu",
    )
    run_probe(config)
    return config.out


def evaluate(drawn_clips: Path, probe: Path, out: Path, *options: str) -> tuple[np.ndarray, dict[str, object]]:
    """(scores of the 10 videos, the result) of one evaluation."""
    arguments = ["evaluate", str(drawn_clips), "--split", "test", "--model", str(probe), "--out", str(out), *options]
    assert main(arguments) == 0
    (table,), (result,) = out.glob("*_videos.csv"), out.glob("*.json")
    with table.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return np.array([[float(cell) for cell in row[3:]] for row in rows]), json.loads(result.read_text())


def test_scores_from_a_cache(drawn_clips: Path, probe: Path, tmp_path: Path) -> None:
    """All 16 frames of each clip are kept, so only JPEG is between the two; several views are cut from it too."""
    direct, result = evaluate(drawn_clips, probe, tmp_path / "direct")
    assert result["frames"] == "videos"
    for name, options in (("one", []), ("views", ["--protocol", "uniformerv2", "--num-frames", "3"])):
        from_videos = direct if name == "one" else evaluate(drawn_clips, probe, tmp_path / "v", *options)[0]
        cached, result = evaluate(
            drawn_clips, probe, tmp_path / name, *options, "--frame-cache", str(tmp_path / "cache")
        )
        assert result["frames"] == "JPEG cache"
        np.testing.assert_allclose(cached, from_videos, atol=0.01)
        assert not np.array_equal(cached, from_videos)


def test_frames_that_the_cache_lacks_are_refused(
    drawn_clips: Path, probe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(drawn_clips).select(split="test")
    build_frame_cache(
        manifest,
        folder=cache_folder(manifest, folder=tmp_path / "cache"),
        config=FrameCacheConfig(num_frames=5),
        decoder="auto",
        num_workers=1,
        timeout_seconds=60.0,
        progress=progress_bar,
        on_estimate=lambda estimate: None,
    )
    arguments = ["evaluate", str(drawn_clips), "--split", "test", "--model", str(probe), "--out", str(tmp_path / "out")]
    cache = ["--frame-cache", str(tmp_path / "cache")]
    assert main([*arguments, *cache, "--num-frames", "6"]) == 2
    assert "keeps 5 frames of a clip, and 6 are asked for" in capsys.readouterr().err
    assert main([*arguments, *cache, "--protocol", "videomae"]) == 2
    assert "is not one of them; read the videos themselves" in capsys.readouterr().err
    assert main([*arguments, *cache, "--num-frames", "5"]) == 0  # the settings are those of the cache that is there
