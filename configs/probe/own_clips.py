"""A frozen single-query probe on your own clips.

Lay them out as clips/train/<class>/*.mp4 and clips/test/<class>/*.mp4, or write a manifest (README, "Your own clips"):

    coca-video probe configs/probe/own_clips.py --encoder.model runs/flickr8k_small --clips.train clips --out runs/mine

With few clips and no GPU this encodes every clip once and trains on the tokens. With many, draw other frames and crops
in every epoch instead: --no-cache-tokens --augment --loop.num-workers 2. There --frame-cache DIR decodes each video
only once, and --augmentation.mixup-alpha, --augmentation.rand-augment-num-ops and so on change the pixels more.
"""

from pathlib import Path

from coca_video.train.classify import ClipsConfig, PretrainedEncoder, ProbeConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig

config = ProbeConfig(
    encoder=PretrainedEncoder(model="runs/quickstart/pretrain"),
    clips=ClipsConfig(train=Path("clips")),
    out=Path("runs/own_clips"),
    num_frames=8,
    cache_tokens=True,
    augment=False,
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=50),
    loop=LoopConfig(steps=500, batch_size=32, log_every=10, checkpoint_every=100),
)
