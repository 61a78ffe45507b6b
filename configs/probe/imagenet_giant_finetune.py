"""CoCa-Giant on ImageNet, fine-tuned: CoCa's own recipe (arXiv 2205.01917, Table 9).

A picture is a video of one frame. RandAugment(2, 20), label smoothing 0.5, batch 512, 200k updates without warm-up.

Expected: 91.0% top-1, the paper's figure for this encoder (section 4.2.1), pretrained on JFT-3B and ALIGN. Nobody has
released that, so what your own pretraining reaches is another number.
Cost: 151 hours of an H100, counted as four forward passes (one is for activation checkpointing) of each picture at
400 TFLOP/s; not measured.

    coca-video probe configs/probe/imagenet_giant_finetune.py --encoder.model runs/coca_giant

The encoder is a run of `coca-video pretrain` with CoCaConfig.giant(). data/imagenet holds train/<wnid>/*.JPEG and
val/<wnid>/*.JPEG; in the order of their wnids the classes have ImageNet's usual numbers.
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "imagenet",
    encoder="runs/coca_giant",
    clips=ClipsConfig(
        train=Path("data/imagenet"),
        test_split="val",
        classes_by_name=True,
        holdout_share=0.02,
    ),
    out=Path("runs/imagenet_giant_finetune"),
    finetune=True,
    micro_batch_size=32,
)
