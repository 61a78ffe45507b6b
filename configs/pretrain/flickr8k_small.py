"""A small CoCa on Flickr8k (6,000 photos with 5 captions each), to see the whole of pretraining on a CPU.

Encoder: width 192, 6 layers, 128 px in patches of 16; decoder 2 + 2 layers; a BPE vocabulary of 4,096 trained on the
captions. What it reaches, and in how long, is in LOG.md. It is no encoder to build on: 30,000 captions teach little.

    coca-video pretrain configs/pretrain/flickr8k_small.py --out runs/flickr8k
"""

from pathlib import Path

from coca_video.models.coca import CoCaConfig
from coca_video.models.image import VitConfig
from coca_video.models.text import TextConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.pretrain import PairsConfig, PretrainConfig

config = PretrainConfig(
    model=CoCaConfig(
        image=VitConfig(width=192, depth=6, num_heads=6, mlp_width=768, image_size=128, patch_size=16),
        text=TextConfig(
            width=192,
            num_heads=6,
            mlp_width=768,
            num_unimodal_layers=2,
            num_multimodal_layers=2,
            vocab_size=4096,
            max_length=32,
        ),
        num_queries=32,
    ),
    pairs=PairsConfig(
        train=Path("data/flickr8k/train-{00000..00005}.tar"),
        test=Path("data/flickr8k/test-00000.tar"),
        min_crop_area=0.6,
        flip_probability=0.5,
    ),
    out=Path("runs/flickr8k_small"),
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.1, warmup_steps=100),
    loop=LoopConfig(
        steps=1500,
        batch_size=128,
        precision="bf16",
        log_every=20,
        checkpoint_every=100,
        evaluate_every=300,
        num_workers=1,
    ),
)
