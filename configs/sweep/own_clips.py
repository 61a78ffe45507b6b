r"""Twelve probes on your own clips in one pass; the best on a held-out fifth of the training clips is kept and tested.

Clips are laid out, or listed in a manifest, as for `coca-video probe configs/probe/own_clips.py`:

    coca-video sweep configs/sweep/own_clips.py --probe.encoder.model runs/flickr8k_small --probe.clips.train clips \
        --probe.out runs/mine_swept

Where several clips come from one recording or show one person, name the manifest's column that says so:
--probe.clips.holdout-group COLUMN. Training costs little more than that of one probe: they share one read of the
tokens.
"""

from pathlib import Path

from coca_video.models.head import HeadConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig
from coca_video.train.sweep_config import SweepConfig

config = SweepConfig(
    probe=ProbeConfig(
        encoder=PretrainedEncoder(model="runs/quickstart/pretrain"),
        clips=ClipsConfig(train=Path("clips"), holdout_share=0.2),
        out=Path("runs/own_clips_swept"),
        num_frames=8,
        token_cache=Path("runs/own_clips/tokens"),
        augment=False,
        optim=OptimConfig(warmup_steps=50),
        loop=LoopConfig(steps=500, batch_size=32, log_every=10, checkpoint_every=100),
    ),
    learning_rates=(3e-3, 1e-3, 3e-4),
    weight_decays=(0.05, 0.4),
    heads=(HeadConfig(), HeadConfig(time_embedding="sincos")),
)
