"""CoCa-Giant on Kinetics-400, frozen: CoCa's own recipe (arXiv 2205.01917, Table 9).

The encoder stays as it is: one learned query over the tokens of 16 frames, and a linear layer.
The paper leaves frames and views open: `table9` in coca_video/train/table9.py says what is chosen here, and why.

Expected: 88.0% top-1, the paper's figure for this encoder (its Table 2), pretrained on JFT-3B and ALIGN. Nobody has
released that, so what your own pretraining reaches is another number.
Cost: 91 hours of an H100, counted as one forward pass of each frame at 400 TFLOP/s; not measured.

    coca-video probe configs/probe/k400_giant_frozen.py --encoder.model runs/coca_giant

The encoder is a run of `coca-video pretrain` with CoCaConfig.giant(); the manifests are made by `coca-video prepare
datasets/kinetics --version 400` (its README).
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "kinetics",
    encoder="runs/coca_giant",
    clips=ClipsConfig(
        train=Path("runs/k400_train/manifest.csv"),
        test=Path("runs/k400_val/manifest.csv"),
        test_split="val",
    ),
    out=Path("runs/k400_giant_frozen"),
    finetune=False,
)
