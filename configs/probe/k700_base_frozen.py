"""CoCa-Base on Kinetics-700, frozen: CoCa's own recipe (arXiv 2205.01917, Table 9).

The encoder stays as it is: one learned query over the tokens of 16 frames, and a linear layer.
The paper leaves frames and views open: `table9` in coca_video/train/table9.py says what is chosen here, and why.

Expected: the paper gives no figure for this size; its 2B model has 81.1% top-1 (Table 2).
Cost: 7.9 hours of an H100, counted as one forward pass of each frame at 400 TFLOP/s; not measured.

    coca-video probe configs/probe/k700_base_frozen.py --encoder.model runs/coca_base

The encoder is a run of `coca-video pretrain` with CoCaConfig.base(); the manifests are made by `coca-video prepare
datasets/kinetics --version 700` (its README).
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "kinetics",
    encoder="runs/coca_base",
    clips=ClipsConfig(
        train=Path("runs/k700_train/manifest.csv"),
        test=Path("runs/k700_val/manifest.csv"),
        test_split="val",
    ),
    out=Path("runs/k700_base_frozen"),
    finetune=False,
)
