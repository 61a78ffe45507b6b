r"""A frozen single-query probe on UT-Interaction: 6 actions, 83 clips to train on, 37 to test on (its fixed split).

    coca-video prepare datasets/ut_interaction --videos data/ut_interaction \
        --annotations data/ut_interaction/clips.csv --out runs/ut_interaction
    coca-video probe configs/probe/ut_interaction.py

37 clips are too few for a claim (one is 2.7 points): benchmarks/ut_interaction.py runs the published protocol. What
both reach is in LOG.md.
"""

from pathlib import Path

from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig

config = ProbeConfig(
    encoder=PretrainedEncoder(model="runs/flickr8k_small"),
    clips=ClipsConfig(train=Path("runs/ut_interaction/manifest.csv")),
    out=Path("runs/ut_interaction/probe"),
    num_frames=8,
    token_cache=Path("runs/ut_interaction/tokens"),
    augment=False,
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=20),
    loop=LoopConfig(steps=200, batch_size=54, log_every=10, checkpoint_every=100),
)
