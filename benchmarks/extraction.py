"""From clips to cached tokens: end to end against its own decoder and encoder, and a cached epoch against the first.

    python benchmarks/extraction.py --clips runs/ut_interaction/manifest.csv --model runs/flickr8k_small \
        --json runs/benchmarks/extraction.json

In one run, wall time, `--num-workers` processes that decode beside one thread that encodes: reading all clips and
nothing else, encoding as many clips that lie in memory and nothing else, and building the token cache, which does both
and writes. Goal: at least .9 of the slower of the first two. Then an epoch of one probe on the tokens, read from the
disk's cache: goal, 50 times less time than the first epoch, which is the building and such an epoch.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import parser, report
from torch.nn import functional as F

from coca_video.data.loader import in_order
from coca_video.data.manifest import read_manifest
from coca_video.data.video import ClipBatch, ClipConfig, VideoDataset, collate_clips
from coca_video.eval.features import frozen_encode
from coca_video.eval.token_cache import TokenCache
from coca_video.eval.token_cache_build import build_token_cache
from coca_video.hub import load
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.loop import pick_device, progress_bar


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--clips", type=Path, required=True, help="a manifest")
    commands.add_argument(
        "--model", required=True, help="whose encoder: a run, a model folder, timm:..., open_clip:..."
    )
    commands.add_argument("--num-frames", type=int, default=16)
    commands.add_argument("--num-workers", type=int, default=1)
    commands.add_argument("--batch-size", type=int, default=16)
    commands.add_argument("--dtype", choices=["fp32", "bf16", "int8"], default="bf16")
    options = commands.parse_args()
    torch.set_num_threads(1)
    runs = [measure(options) for _ in range(options.repeats)]
    names = list(runs[0])
    medians = {name: sorted(run[name] for run in runs)[len(runs) // 2] for name in names}
    slower = max(medians["decode"], medians["encode"])
    first = medians["decode and encode, written"] + medians["an epoch of tokens"]
    report(
        [
            {
                "side": name,
                "ms a clip": 1e3 * medians[name],
                "of the slower of decode and encode": slower / medians[name],
                "first epoch over this": first / medians[name],
            }
            for name in names
        ],
        options=options,
    )
    return 0


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds a clip of each side, one after the other."""
    device = pick_device(options.device)
    manifest = read_manifest(options.clips)
    encoder = load(options.model).encoder
    config = VideoClassifierConfig(
        image=encoder.config, num_classes=len(manifest.classes), num_frames=options.num_frames
    )
    model = VideoClassifier(config)
    model.encoder.load_state_dict(encoder.state_dict())
    model.encoder.requires_grad_(requires_grad=False)
    model = model.to(device).eval()
    image = encoder.config
    clip = ClipConfig(num_frames=options.num_frames, image_size=image.image_size, interpolation=image.interpolation)
    clips = VideoDataset(manifest, config=clip, seed=0)
    batches: list[ClipBatch] = []
    seconds = {"decode": timed(lambda: batches.extend(read(clips, options=options)))}
    encode = frozen_encode(model, device=device, bf16=False)
    seconds["encode"] = timed(lambda: [encode(frames.unsqueeze(0)) for batch in batches for frames in batch.frames])
    with tempfile.TemporaryDirectory() as folder:
        caches: list[TokenCache] = []
        seconds["decode and encode, written"] = timed(
            lambda: caches.append(build(model, clips=clips, folder=Path(folder), device=device, options=options))
        )
        seconds["an epoch of tokens"] = timed(lambda: epoch(model, tokens=caches[0], options=options))
    return {name: value / len(clips) for name, value in seconds.items()}


def timed(action: Callable[[], Any]) -> float:
    """Wall time in seconds."""
    started = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def read(clips: VideoDataset, *, options: argparse.Namespace) -> list[ClipBatch]:
    """Every clip, decoded, cropped and resized."""
    stream = in_order(
        clips,
        num_samples=len(clips),
        batch_size=options.batch_size,
        workers=options.num_workers,
        collate=collate_clips,
    )
    return [batch for batch, _ in stream if batch is not None]


def build(
    model: VideoClassifier, *, clips: VideoDataset, folder: Path, device: torch.device, options: argparse.Namespace
) -> TokenCache:
    """The cache, new."""
    return build_token_cache(
        model,
        dataset=clips,
        folder=folder,
        dtype=options.dtype,
        device=device,
        progress=progress_bar,
        on_estimate=lambda estimate: None,
        batch_size=options.batch_size,
        num_workers=options.num_workers,
    )


def epoch(model: VideoClassifier, *, tokens: TokenCache, options: argparse.Namespace) -> None:
    """One pass of training the head, update by update."""
    optimizer = torch.optim.AdamW(model.head.parameters(), fused=True)
    stream = in_order(
        tokens, num_samples=len(tokens), batch_size=options.batch_size, workers=0, collate=TokenCache.collate
    )
    for packed, _ in stream:
        assert packed is not None
        batch = packed.to_tokens()
        logits = model.classify(batch.tokens, variance=batch.variance)
        F.cross_entropy(logits, batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    sys.exit(main())
