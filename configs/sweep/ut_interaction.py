r"""V-JEPA 2's grid of 20 probes (5 rates x 4 decays) on UT-Interaction, in one pass over the tokens.

    coca-video prepare datasets/ut_interaction --videos data/ut_interaction \
        --annotations data/ut_interaction/clips.csv --out runs/ut_interaction
    coca-video sweep configs/sweep/ut_interaction.py

A quarter of the 83 training clips is held out, and the probe that does best on it is tested once on the 37 test clips.
Both parts are far too few for a claim: on 20 clips many probes are equals, and the lower held-out loss decides.
"""

from pathlib import Path

from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig
from coca_video.train.sweep_config import SweepConfig

config = SweepConfig.vjepa2(
    ProbeConfig(
        encoder=PretrainedEncoder(model="runs/flickr8k_small"),
        clips=ClipsConfig(train=Path("runs/ut_interaction/manifest.csv"), holdout_share=0.25),
        out=Path("runs/ut_interaction/sweep"),
        num_frames=8,
        token_cache=Path("runs/ut_interaction/tokens"),
        augment=False,
        optim=OptimConfig(warmup_steps=20),
        loop=LoopConfig(steps=200, batch_size=54, log_every=10, checkpoint_every=100, evaluate_every=50),
    )
)
