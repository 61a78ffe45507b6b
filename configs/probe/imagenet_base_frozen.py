"""CoCa-Base on ImageNet, frozen: CoCa's own recipe (arXiv 2205.01917, Table 9).

A picture is a video of one frame. RandAugment(2, 20), label smoothing 0.2, batch 512, 200k updates without warm-up.

Expected: the paper gives no figure for this size; its 2B model has 90.6% top-1 (section 4.2.1).
Cost: 3.3 hours of an H100, counted as one forward pass of each picture at 400 TFLOP/s; not measured.

    coca-video probe configs/probe/imagenet_base_frozen.py --encoder.model runs/coca_base

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
    ),
    out=Path("runs/imagenet_base_frozen"),
    finetune=False,
)
