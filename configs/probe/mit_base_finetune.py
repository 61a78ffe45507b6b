"""CoCa-Base on Moments in Time, fine-tuned: CoCa's own recipe (arXiv 2205.01917, Table 9).

The encoder is trained too, at 1e-4 (section 4.2.1; Table 9 has 5e-4: --tuning.rate-factor 1.0).
The paper leaves frames and views open: `table9` in coca_video/train/table9.py says what is chosen here, and why.

Expected: the paper gives no figure for this size; its 2B model has 49.0% top-1 (Table 2).
Cost: 32 hours of an H100, counted as four forward passes (one is for activation checkpointing) of each frame at 400
TFLOP/s; not measured.

    coca-video probe configs/probe/mit_base_finetune.py --encoder.model runs/coca_base

The encoder is a run of `coca-video pretrain` with CoCaConfig.base(); the manifests are made by `coca-video prepare
datasets/moments_in_time --version v1` (its README).
"""

from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

config = table9(
    "moments_in_time",
    encoder="runs/coca_base",
    clips=ClipsConfig(
        train=Path("runs/mit_train/manifest.csv"),
        test=Path("runs/mit_val/manifest.csv"),
        test_split="val",
        holdout_share=0.02,
    ),
    out=Path("runs/mit_base_finetune"),
    finetune=True,
    micro_batch_size=32,
)
