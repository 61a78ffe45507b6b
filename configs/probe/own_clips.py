"""A frozen single-query probe on your own clips: trained, evaluated and saved by one command.

    coca-video probe configs/probe/own_clips.py --encoder.model runs/flickr8k_small --clips.train clips --out runs/mine

Lay them out as clips/<class>/*.mp4: a fifth of each class is held out and tested on, the same one each time. Or say
yourself what to test on: clips/train/<class>/*.mp4 and clips/test/<class>/*.mp4, or a manifest with a column `split`
(README, "Your own clips"). Clips cut from one recording look alike; where a manifest names it in a column,
--clips.holdout-group COLUMN keeps them on one side. Classes are numbered by name, unless there is a classes.txt.

With few clips and no GPU this encodes every clip once and trains on the tokens. With many, draw other frames and crops
in every epoch instead: --token-cache None --augment --loop.num-workers 2. There --frame-cache DIR decodes each video
only once, and --augmentation.mixup-alpha, --augmentation.rand-augment-num-ops and so on change the pixels more.
The encoder too is trained with tuning:finetune or tuning:lora at the end of the command; see --help.
"""

from pathlib import Path

from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig

config = ProbeConfig(
    encoder=PretrainedEncoder(model="runs/quickstart/pretrain"),
    clips=ClipsConfig(train=Path("clips"), test_share=0.2, classes_by_name=True),
    out=Path("runs/own_clips"),
    num_frames=8,
    token_cache=Path("runs/own_clips/tokens"),
    augment=False,
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=50),
    loop=LoopConfig(steps=500, batch_size=32, log_every=10, checkpoint_every=100),
)
