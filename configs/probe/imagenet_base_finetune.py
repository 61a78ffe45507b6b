"""CoCa-Base on ImageNet, fine-tuned: CoCa's own recipe (arXiv 2205.01917, Table 9).

A picture is a video of one frame. RandAugment(2, 20), label smoothing 0.5, batch 512, 200k updates without warm-up.

Expected: the paper gives no figure for this size; its 2B model has 91.0% top-1 (section 4.2.1).
Cost: 13 hours of an H100, counted as four forward passes (one is for activation checkpointing) of each picture at 400
TFLOP/s; not measured.

    coca-video probe configs/probe/imagenet_base_finetune.py --encoder.model runs/coca_base

The encoder is a run of `coca-video pretrain` with CoCaConfig.base(). data/imagenet holds train/<wnid>/*.JPEG and
val/<wnid>/*.JPEG; in the order of their wnids the classes have ImageNet's usual numbers.
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "imagenet",
    encoder="runs/coca_base",
    clips=ClipsConfig(
        train=Path("data/imagenet"),
        test_split="val",
        classes_by_name=True,
        holdout_share=0.02,
    ),
    out=Path("runs/imagenet_base_finetune"),
    finetune=True,
    micro_batch_size=256,
)
