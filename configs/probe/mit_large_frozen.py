"""CoCa-Large on Moments in Time, frozen: CoCa's own recipe (arXiv 2205.01917, Table 9).

The encoder stays as it is: one learned query over the tokens of 16 frames, and a linear layer.
The paper leaves frames and views open: `table9` in coca_video/train/table9.py says what is chosen here, and why.

Expected: the paper gives no figure for this size; its 2B model has 47.4% top-1 (Table 2).
Cost: 27 hours of an H100, counted as one forward pass of each frame at 400 TFLOP/s; not measured.

    coca-video probe configs/probe/mit_large_frozen.py --encoder.model runs/coca_large

The encoder is a run of `coca-video pretrain` with CoCaConfig.large(); the manifests are made by `coca-video prepare
datasets/moments_in_time --version v1` (its README).
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "moments_in_time",
    encoder="runs/coca_large",
    clips=ClipsConfig(
        train=Path("runs/mit_train/manifest.csv"),
        test=Path("runs/mit_val/manifest.csv"),
        test_split="val",
    ),
    out=Path("runs/mit_large_frozen"),
    finetune=False,
)
