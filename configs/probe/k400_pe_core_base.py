"""Perception Encoder (core) ViT-B/16 on Kinetics-400, frozen: a public encoder under CoCa's probe.

One learned query over the tokens of 16 frames, trained by the recipe of CoCa's Table 9 (coca_video/train/table9.py),
for 37,500 updates in place of 120,000: 20 epochs of 240,000 clips, as long as V-JEPA 2 trains its probes.

Expected: not measured by us; no paper has this probe on this encoder. Near it: CLIP ViT-B 75.2% and CoCa-B 73.1%
top-1, frozen under a pooler of one layer (VideoGLUE, as quoted by arXiv 2402.13217).
Cost: 1.9 hours of an H100, counted as one forward pass of each frame at 400 TFLOP/s; not measured. Reading the videos
takes longer than that without --frame-cache DIR.

    coca-video probe configs/probe/k400_pe_core_base.py

The weights are downloaded; the manifests are made by `coca-video prepare datasets/kinetics --version 400`.
"""

from dataclasses import replace
from pathlib import Path

from coca_video.train.probe_config import ClipsConfig
from coca_video.train.table9 import table9

paper = table9(
    "kinetics",
    encoder="timm:vit_pe_core_base_patch16_224.fb",
    clips=ClipsConfig(
        train=Path("runs/k400_train/manifest.csv"),
        test=Path("runs/k400_val/manifest.csv"),
        test_split="val",
    ),
    out=Path("runs/k400_pe_core_base"),
    finetune=False,
)
config = replace(paper, loop=replace(paper.loop, steps=37_500))
