"""Direction alone: the paper's probe sees a set of frames and cannot tell; a time embedding makes it tell (issue 6).

Each clip slides from one side to the other, and the clips of one class are drawn as those of the other and played
backwards: every single frame, and every set of frames, is as likely in both.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from coca_video.data.decode import write_video
from coca_video.data.manifest import VideoRow, write_manifest
from coca_video.models.head import HeadConfig
from coca_video.models.image import VitConfig
from coca_video.synthetic import clip_parameters, render_clip
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder

NUM_FRAMES, NUM_TRAIN, NUM_TEST, SIZE = 12, 6000, 400, 48
CLASSES = ("slide_left", "slide_right")


def draw_world(folder: Path) -> Path:
    rows = []
    for split, number in (("train", NUM_TRAIN), ("test", NUM_TEST)):
        for index in range(number):
            drawn = clip_parameters(5 * index + 1, seed=0, split=split, num_frames=NUM_FRAMES)
            rng = np.random.default_rng([index, split == "test"])
            way = np.linspace(rng.uniform(0.1, 0.2), rng.uniform(0.8, 0.9), NUM_FRAMES)
            drawn = replace(
                drawn,
                x=way if index % 2 else way[::-1].copy(),
                y=np.full(NUM_FRAMES, rng.uniform(0.25, 0.75)),
                angle_degrees=np.full(NUM_FRAMES, drawn.angle_degrees[0]),
            )
            path = folder / split / f"{index:04d}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_video(path, frames=render_clip(drawn, size=SIZE), frames_per_second=8.0)
            rows.append(VideoRow(path=path, label=CLASSES[index % 2], video_id=f"{split}{index}", split=split))
    write_manifest(folder / "manifest.csv", rows=rows, classes=CLASSES)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> ProbeConfig:
    """A probe on a random encoder, which passes on what is where; narrow heads let one query look at many moments."""
    folder = tmp_path_factory.mktemp("direction")
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=draw_world(folder / "clips")),
        out=folder / "probe",
        num_frames=4,  # of 12 the 1st, 4th, 7th and 10th (from 0), which are the same ones backwards
        token_cache=folder / "tokens",
        augment=False,
        head=HeadConfig(num_heads=12),
        optim=OptimConfig(learning_rate=1e-2, warmup_steps=50),
        loop=LoopConfig(steps=1000, batch_size=128, checkpoint_every=1000),
        device="cpu",
    )


def accuracy(config: ProbeConfig) -> float:
    evaluation = run_probe(config).evaluation
    assert evaluation is not None and evaluation["num_videos"] == NUM_TEST
    return float(evaluation["top1"])


@pytest.mark.drill
def test_the_papers_probe_stays_near_chance(probe: ProbeConfig) -> None:
    assert abs(accuracy(probe) - 0.5) < 0.075  # 3 standard errors of 400 clips


@pytest.mark.drill
def test_a_time_embedding_tells(probe: ProbeConfig) -> None:
    head = HeadConfig(num_heads=12, time_embedding="sincos")
    assert accuracy(replace(probe, head=head, out=probe.out.with_name("with_time"))) > 0.9
