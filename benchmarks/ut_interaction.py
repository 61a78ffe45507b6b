"""UT-Interaction by its published protocol: leave one sequence out, ten folds in each of two sets, several seeds.

    python benchmarks/ut_interaction.py --manifest runs/ut_interaction/manifest.csv --encoder runs/flickr8k_small \
        --json runs/ut_interaction/protocol.json

Probes with one recipe, fixed beforehand, on a pretrained encoder, on random ones (another for each seed), and on the
middle frame alone. Every clip is tested once in a seed; a figure is the accuracy over all 120. A run that is stopped
goes on with the folds that --json does not hold yet.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.features import TokenBatch, encode_clips
from coca_video.hub import load
from coca_video.models.video import VideoClassifier
from coca_video.train.classify import (
    ClipsConfig,
    PretrainedEncoder,
    ProbeConfig,
    RandomEncoder,
    build_classifier,
    probe_step,
)
from coca_video.train.loop import LoopConfig, pick_device, progress_bar
from coca_video.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from coca_video.train.run import write_atomically

NUM_FRAMES = 8
RECIPE = ProbeConfig(
    encoder=PretrainedEncoder(model=""),
    clips=ClipsConfig(train=Path()),
    out=Path(),
    num_frames=NUM_FRAMES,
    cache_tokens=True,
    augment=False,
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=20),
    loop=LoopConfig(steps=200, batch_size=54),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table: which encoder, and how many frames it sees."""

    name: str
    pretrained: bool
    num_frames: int


VARIANTS = (
    Variant(name=f"pretrained encoder, {NUM_FRAMES} frames", pretrained=True, num_frames=NUM_FRAMES),
    Variant(name=f"random encoder, {NUM_FRAMES} frames", pretrained=False, num_frames=NUM_FRAMES),
    Variant(name="pretrained encoder, middle frame", pretrained=True, num_frames=1),
)


def main() -> int:
    """The command line."""
    options = _options()
    manifest = read_manifest(options.manifest)
    manifest.check_files()
    results: dict[str, int] = json.loads(options.json.read_text())["correct"] if options.json.is_file() else {}
    jobs = [(variant, seed) for variant in VARIANTS for seed in range(options.seeds)]
    started = time.monotonic()
    with progress_bar("folds", total=len(jobs) * len(_folds(manifest))) as bar:
        for variant, seed in jobs:
            for key, correct in _run_folds(variant, seed=seed, manifest=manifest, done=results, options=options):
                results[key] = correct
                bar.update()
                _write(options, results=results, manifest=manifest)
            bar.n = sum(1 for key in results)
    _print_table(results, manifest=manifest, num_seeds=options.seeds)
    print(f"{time.monotonic() - started:.0f} s in this call", file=sys.stderr)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--encoder", required=True, help="a pretrained run or model folder, open_clip:..., timm:...")
    parser.add_argument("--json", type=Path, required=True, help="file for the results, and to go on from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    return parser.parse_args()


def _folds(manifest: Manifest) -> list[tuple[list[int], list[int]]]:
    """(train rows, test rows) for each sequence left out, within its own set."""
    sets = [row.extra["set"] for row in manifest.rows]
    sequences = [row.extra["sequence"] for row in manifest.rows]
    folds = []
    for left_out in sorted(set(sequences), key=int):
        own_set = sets[sequences.index(left_out)]
        rows = range(len(manifest.rows))
        test = [row for row in rows if sequences[row] == left_out]
        folds.append(([row for row in rows if sets[row] == own_set and row not in test], test))
    return folds


def _run_folds(
    variant: Variant, *, seed: int, manifest: Manifest, done: dict[str, int], options: argparse.Namespace
) -> Iterator[tuple[str, int]]:
    """Encodes all clips once, then yields (key, clips named rightly) for each fold that is not done."""
    keys = [f"{variant.name} | seed {seed} | fold {number}" for number in range(len(_folds(manifest)))]
    if all(key in done for key in keys):
        return
    device = pick_device(options.device)
    saved = load(options.encoder)
    image = saved.encoder.config
    encoder = PretrainedEncoder(model=options.encoder) if variant.pretrained else RandomEncoder(image=image)
    config = replace(RECIPE, encoder=encoder, num_frames=variant.num_frames, loop=replace(RECIPE.loop, seed=seed))
    pretrained = saved if variant.pretrained else None
    model = build_classifier(config, num_classes=len(manifest.classes), pretrained=pretrained).to(device)
    clip = ClipConfig(num_frames=variant.num_frames, image_size=image.image_size, interpolation=image.interpolation)
    tokens = encode_clips(model, dataset=VideoDataset(manifest, config=clip, seed=seed), device=device)
    if tokens.unreadable:
        raise ValueError(f"The protocol needs every clip; {tokens.unreadable[0].cause}")
    for key, (train, test) in zip(keys, _folds(manifest), strict=True):
        if key not in done:
            head = build_classifier(config, num_classes=len(manifest.classes), pretrained=pretrained).to(device)
            yield key, _train_and_test(head.train(), config=config, batch=tokens.batch, train=train, test=test)


def _train_and_test(
    model: VideoClassifier, *, config: ProbeConfig, batch: TokenBatch, train: list[int], test: list[int]
) -> int:
    """Trains the fresh head on all training clips at once (one batch); returns how many test clips it names."""
    optimizer = build_optimizer(model, config=config.optim)
    for step in range(config.loop.steps):
        set_learning_rate(optimizer, rate=learning_rate(step, config=config.optim, total_steps=config.loop.steps))
        probe_step(model, batch.tokens[train], optimizer, labels=batch.labels[train], config=config)
    with torch.no_grad():
        predicted = model.eval().classify(batch.tokens[test]).argmax(dim=1)
    return int((predicted == batch.labels[test]).sum())


def _accuracies(results: dict[str, int], *, variant: Variant, num_seeds: int, num_clips: int) -> list[float]:
    sums = [
        sum(correct for key, correct in results.items() if key.startswith(f"{variant.name} | seed {seed} |"))
        for seed in range(num_seeds)
    ]
    return [total / num_clips for total in sums]


def _write(options: argparse.Namespace, *, results: dict[str, int], manifest: Manifest) -> None:
    summary = {
        variant.name: _accuracies(results, variant=variant, num_seeds=options.seeds, num_clips=len(manifest.rows))
        for variant in VARIANTS
    }
    document = {"encoder": options.encoder, "torch": torch.__version__, "accuracy": summary, "correct": results}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.json, json.dumps(document, indent=2) + "\n")


def _print_table(results: dict[str, int], *, manifest: Manifest, num_seeds: int) -> None:
    width = max(len(variant.name) for variant in VARIANTS)
    print(f"{'UT-Interaction, 20 folds':<{width}}  {'mean':>6}  {'deviation':>9}  seeds")
    for variant in VARIANTS:
        values = _accuracies(results, variant=variant, num_seeds=num_seeds, num_clips=len(manifest.rows))
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        seeds = "  ".join(f"{value:.3f}" for value in values)
        print(f"{variant.name:<{width}}  {statistics.mean(values):6.3f}  {deviation:9.3f}  {seeds}")


if __name__ == "__main__":
    sys.exit(main())
