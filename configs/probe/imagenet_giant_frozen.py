"""CoCa-Giant on ImageNet, frozen: CoCa's own recipe (arXiv 2205.01917, Table 9).

A picture is a video of one frame. RandAugment(2, 20), label smoothing 0.2, batch 512, 200k updates without warm-up.

Expected: 90.6% top-1, the paper's figure for this encoder (section 4.2.1), pretrained on JFT-3B and ALIGN. Nobody has
released that, so what your own pretraining reaches is another number.
Cost: 38 hours of an H100, counted as one forward pass of each picture at 400 TFLOP/s; not measured.

    coca-video probe configs/probe/imagenet_giant_frozen.py --encoder.model runs/coca_giant

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
    ),
    out=Path("runs/imagenet_giant_frozen"),
    finetune=False,
)
