"""UT-Interaction by its published protocol: leave one sequence out, ten folds in each of two sets, several seeds.

    python benchmarks/ut_interaction.py --manifest runs/ut_interaction/manifest.csv --encoder runs/flickr8k_small \
        --json runs/ut_interaction/protocol.json

Probes with one recipe, fixed beforehand: the paper's single query on a pretrained encoder, on random ones (another for
each seed), and on the middle frame alone; the same encoder under a mean in place of the query, under a query that is
told when each frame is, and under scikit-learn's logistic regression on the mean token (C by 5-fold cross-validation
within the training clips). Every clip is tested once in a seed; a figure is the accuracy over all 120, its interval the
95% of a bootstrap over clips, each with all its seeds. A run that is stopped goes on with the folds that --json does
not hold yet.

With --frame-cache DIR the clips come from a frame cache of the usual settings, built there first. --against JSON then
compares with a run of the videos themselves, clip by clip: how many predictions changed, and by how much the mean
token did.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler

from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.features import TokenBatch, encode_clips
from coca_video.hub import Saved, load
from coca_video.models.head import HeadConfig
from coca_video.models.video import VideoClassifier
from coca_video.train.classify import probe_step
from coca_video.train.loop import LoopConfig, pick_device, progress_bar
from coca_video.train.optim import OptimConfig, build_optimizer, learning_rate, set_learning_rate
from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import ProbeBatch, cached_clips
from coca_video.train.probe_model import build_classifier
from coca_video.train.run import write_atomically

VIDEOS, JPEG_CACHE = "videos", "JPEG cache"
NUM_FRAMES = 8
RECIPE = ProbeConfig(
    encoder=PretrainedEncoder(model=""),
    clips=ClipsConfig(train=Path()),
    out=Path(),
    num_frames=NUM_FRAMES,
    augment=False,
    optim=OptimConfig(learning_rate=1e-3, weight_decay=0.05, warmup_steps=20),
    loop=LoopConfig(steps=200, batch_size=54),
)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A row of the table: which encoder, how many frames it sees, and what is trained on its tokens (None: linear)."""

    name: str
    pretrained: bool = True
    num_frames: int = NUM_FRAMES
    head: HeadConfig | None = field(default_factory=HeadConfig)


VARIANTS = (
    Variant(name=f"pretrained encoder, {NUM_FRAMES} frames"),
    Variant(name=f"random encoder, {NUM_FRAMES} frames", pretrained=False),
    Variant(name="pretrained encoder, middle frame", num_frames=1),
    Variant(name="mean pooling", head=HeadConfig(pooling="mean")),
    Variant(name="time embedding, sincos", head=HeadConfig(time_embedding="sincos")),
    Variant(name="time embedding, learned", head=HeadConfig(time_embedding="learned")),
    Variant(name="logistic regression", head=None),
)
BOOTSTRAPS = 10_000


@dataclass(frozen=True, kw_only=True)
class Results:
    """Which frames were read ("videos" or "JPEG cache"), and each fold's predictions for its test clips, by its key."""

    encoder: str
    frames: str
    predicted: dict[str, list[str]]


def main() -> int:
    """The command line."""
    options = _options()
    manifest = read_manifest(options.manifest)
    manifest.check_files()
    results = _read(options.json, encoder=options.encoder, frames=VIDEOS if options.frame_cache is None else JPEG_CACHE)
    variants = _variants(options.variant)
    jobs = [(variant, seed) for variant in variants for seed in range(options.seeds)]
    started = time.monotonic()
    with progress_bar("folds", total=len(jobs) * len(_folds(manifest))) as bar:
        for variant, seed in jobs:
            for key, predicted in _run_folds(variant, seed=seed, manifest=manifest, done=results, options=options):
                results.predicted[key] = predicted
                bar.update()
                _write(options, results=results, manifest=manifest)
            bar.n = sum(key in results.predicted for job in jobs for key in _keys(*job, manifest=manifest))
    _print_table(results, variants=variants, manifest=manifest, num_seeds=options.seeds)
    if options.against is not None:
        _print_comparison(results, variants=variants, manifest=manifest, options=options)
    print(f"{time.monotonic() - started:.0f} s in this call", file=sys.stderr)
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manifest", type=Path, required=True)
    parser.add_argument("--encoder", required=True, help="a pretrained run or model folder, open_clip:..., timm:...")
    parser.add_argument("--json", type=Path, required=True, help="file for the results, and to go on from")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--variant", action="append", help="a row's number, from 1, or part of its name; may be repeated"
    )
    parser.add_argument("--frame-cache", type=Path, help="read the clips from a frame cache below this folder")
    parser.add_argument("--against", type=Path, help="compare with the results in this file, of the videos themselves")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    options = parser.parse_args()
    if options.against is not None and options.frame_cache is None:
        parser.error("--against compares a frame cache with the videos; give --frame-cache too")
    return options


def _variants(chosen: list[str] | None) -> tuple[Variant, ...]:
    """The rows asked for, all of them for None; ends with a sentence where one is none, or not one alone."""
    if chosen is None:
        return VARIANTS
    rows = set()
    for text in chosen:
        found = [row for row, variant in enumerate(VARIANTS) if text == str(row + 1) or text in variant.name]
        if len(found) != 1:
            names = "; ".join(f"{row} {variant.name}" for row, variant in enumerate(VARIANTS, start=1))
            sys.exit(f"--variant {text} must name one of the rows, and names {len(found)}; there are: {names}.")
        rows.add(found[0])
    return tuple(VARIANTS[row] for row in sorted(rows))


def _read(path: Path, *, encoder: str, frames: str) -> Results:
    """What an earlier call has written, or nothing yet; ends with a sentence where that was something else."""
    if not path.is_file():
        return Results(encoder=encoder, frames=frames, predicted={})
    document = json.loads(path.read_text())
    if "predicted" not in document:
        sys.exit(f"{path} holds no predictions, which an older version did not keep; give another file.")
    for name, asked in (("encoder", encoder), ("frames", frames)):
        if document[name] != asked:
            sys.exit(f"{path} was made with the {name} {document[name]!r}, not {asked!r}; give another file.")
    return Results(encoder=encoder, frames=frames, predicted=document["predicted"])


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


def _keys(variant: Variant, seed: int, *, manifest: Manifest) -> list[str]:
    """The name of each fold."""
    return [f"{variant.name} | seed {seed} | fold {number}" for number in range(len(_folds(manifest)))]


def _run_folds(
    variant: Variant, *, seed: int, manifest: Manifest, done: Results, options: argparse.Namespace
) -> Iterator[tuple[str, list[str]]]:
    """Encodes all clips once, then yields (key, class named for each test clip) for each fold that is not done."""
    keys = _keys(variant, seed, manifest=manifest)
    if all(key in done.predicted for key in keys):
        return
    device = pick_device(options.device)
    saved = load(options.encoder)
    config, fresh = _recipe(variant, seed=seed, saved=saved, manifest=manifest, options=options)
    clips = _clips(manifest, saved=saved, num_frames=variant.num_frames, frame_cache=options.frame_cache)
    batch = _encoded(fresh().to(device), clips=clips, device=device)
    for key, (train, test) in zip(keys, _folds(manifest), strict=True):
        if key not in done.predicted:
            if variant.head is None:
                predicted = _logistic_regression(batch, train=train, test=test)
            else:
                head = fresh().to(device)
                predicted = _train_and_test(head.train(), config=config, batch=batch, train=train, test=test)
            yield key, [manifest.classes[number] for number in predicted]


def _recipe(
    variant: Variant, *, seed: int, saved: Saved, manifest: Manifest, options: argparse.Namespace
) -> tuple[ProbeConfig, Callable[[], VideoClassifier]]:
    """The recipe of a row and seed, and what makes its classifier, whose head is fresh each time."""
    encoder = (
        PretrainedEncoder(model=options.encoder) if variant.pretrained else RandomEncoder(image=saved.encoder.config)
    )
    loop, head = replace(RECIPE.loop, seed=seed), variant.head or HeadConfig()
    config = replace(RECIPE, encoder=encoder, num_frames=variant.num_frames, head=head, loop=loop)
    pretrained = saved if variant.pretrained else None
    return config, partial(build_classifier, config, num_classes=len(manifest.classes), pretrained=pretrained)


def _clips(manifest: Manifest, *, saved: Saved, num_frames: int, frame_cache: Path | None) -> VideoDataset:
    """The clips as the encoder sees them, of the videos or of a frame cache."""
    image = saved.encoder.config
    config = ClipConfig(num_frames=num_frames, image_size=image.image_size, interpolation=image.interpolation)
    if frame_cache is None:
        return VideoDataset(manifest, config=config, seed=0)
    return cached_clips(manifest, folder=frame_cache, kept=FrameCacheConfig(), config=config, num_workers=1, seed=0)


def _encoded(model: VideoClassifier, *, clips: VideoDataset, device: torch.device) -> TokenBatch:
    """The tokens of every clip, in the order of the manifest."""
    tokens = encode_clips(model, dataset=clips, device=device)
    if tokens.unreadable:
        raise ValueError(f"The protocol needs every clip; {tokens.unreadable[0].cause}")
    return tokens.batch


def _train_and_test(
    model: VideoClassifier, *, config: ProbeConfig, batch: TokenBatch, train: list[int], test: list[int]
) -> list[int]:
    """Trains the fresh head on all training clips at once (one batch); returns the class it gives each test clip."""
    optimizer = build_optimizer(model, config=config.optim)
    clips = ProbeBatch(inputs=batch.tokens[train], labels=batch.labels[train])
    for step in range(config.loop.steps):
        set_learning_rate(optimizer, rate=learning_rate(step, config=config.optim, total_steps=config.loop.steps))
        probe_step(model, clips, optimizer, scores=lambda part: model.classify(part.inputs), config=config)
    with torch.no_grad():
        predicted: list[int] = model.eval().classify(batch.tokens[test]).argmax(dim=1).tolist()
    return predicted


def _logistic_regression(batch: TokenBatch, *, train: list[int], test: list[int]) -> list[int]:
    """What the mean tokens, standardised, say of each test clip; nothing in it depends on a seed."""
    features, labels = batch.tokens.flatten(1, 2).mean(dim=1).cpu().numpy(), batch.labels.cpu().numpy()
    scaler = StandardScaler().fit(features[train])
    grid = {"C": [10.0**power for power in range(-4, 3)]}
    search = GridSearchCV(LogisticRegression(max_iter=5000), grid, cv=5)
    search.fit(scaler.transform(features[train]), labels[train])
    predicted: list[int] = search.predict(scaler.transform(features[test])).tolist()
    return predicted


def _right(results: Results, *, variant: Variant, seed: int, manifest: Manifest) -> list[bool]:
    """Whether each clip is named rightly, in the order of the folds; only of those that are done."""
    keys = _keys(variant, seed, manifest=manifest)
    return [
        predicted == manifest.rows[row].label
        for key, (_, test) in zip(keys, _folds(manifest), strict=True)
        if key in results.predicted
        for predicted, row in zip(results.predicted[key], test, strict=True)
    ]


def _accuracies(results: Results, *, variant: Variant, num_seeds: int, manifest: Manifest) -> list[float]:
    """Of each seed, over all clips: those of folds that are not done count as wrong."""
    rights = [_right(results, variant=variant, seed=seed, manifest=manifest) for seed in range(num_seeds)]
    return [sum(right) / len(manifest.rows) for right in rights]


def _write(options: argparse.Namespace, *, results: Results, manifest: Manifest) -> None:
    accuracy = {
        variant.name: _accuracies(results, variant=variant, num_seeds=options.seeds, manifest=manifest)
        for variant in VARIANTS
        if any(key.startswith(variant.name) for key in results.predicted)
    }
    document = {
        "encoder": results.encoder,
        "frames": results.frames,
        "torch": torch.__version__,
        "accuracy": accuracy,
        "predicted": results.predicted,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(options.json, json.dumps(document, indent=2) + "\n")


def _print_table(results: Results, *, variants: tuple[Variant, ...], manifest: Manifest, num_seeds: int) -> None:
    title = f"UT-Interaction, 20 folds, {results.frames}"
    width = max(len(title), *(len(variant.name) for variant in variants))
    print(f"{title:<{width}}  {'mean':>6}  {'95% interval':>12}  {'deviation':>9}  seeds")
    for variant in variants:
        values = _accuracies(results, variant=variant, num_seeds=num_seeds, manifest=manifest)
        deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
        seeds = "  ".join(f"{value:.3f}" for value in values)
        low, high = _interval(results, variant=variant, num_seeds=num_seeds, manifest=manifest)
        interval = f"{low:.3f}, {high:.3f}"
        print(f"{variant.name:<{width}}  {statistics.mean(values):6.3f}  {interval:>12}  {deviation:9.3f}  {seeds}")


def _interval(results: Results, *, variant: Variant, num_seeds: int, manifest: Manifest) -> tuple[float, float]:
    """95% of the means of as many clips drawn from the clips, each with what all seeds say of it."""
    rights = [_right(results, variant=variant, seed=seed, manifest=manifest) for seed in range(num_seeds)]
    by_clip = np.mean(rights, axis=0)
    draws = np.random.default_rng(0).integers(len(by_clip), size=(BOOTSTRAPS, len(by_clip)))
    low, high = np.quantile(by_clip[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def _print_comparison(
    results: Results, *, variants: tuple[Variant, ...], manifest: Manifest, options: argparse.Namespace
) -> None:
    """The predictions and mean tokens of the frame cache against those of the videos."""
    videos = _read(options.against, encoder=options.encoder, frames=VIDEOS)
    for variant in variants:
        pairs = []
        for seed in range(options.seeds):
            keys = _keys(variant, seed, manifest=manifest)
            if missing := [key for key in keys if key not in videos.predicted]:
                sys.exit(f"{options.against} has no results for {missing[0]}; run it to its end first.")
            sides = [_right(side, variant=variant, seed=seed, manifest=manifest) for side in (videos, results)]
            pairs += list(zip(*sides, strict=True))
        to_wrong, to_right = pairs.count((True, False)), pairs.count((False, True))
        print(f"{variant.name}: of {len(pairs)} predictions {to_wrong} became wrong and {to_right} right", end="")
        print(f"; mean token changed by {_token_change(variant, manifest=manifest, options=options):.4f} of its length")


def _token_change(variant: Variant, *, manifest: Manifest, options: argparse.Namespace) -> float:
    """|c - v| / |v|, averaged over the clips: v is the mean of a clip's tokens from the video, c from the cache."""
    device = pick_device(options.device)
    saved = load(options.encoder)
    model = _recipe(variant, seed=0, saved=saved, manifest=manifest, options=options)[1]().to(device)
    videos, cache = (
        _encoded(
            model,
            clips=_clips(manifest, saved=saved, num_frames=variant.num_frames, frame_cache=frame_cache),
            device=device,
        )
        .tokens.flatten(1, -2)
        .mean(dim=1)
        for frame_cache in (None, options.frame_cache)
    )
    return float(((cache - videos).norm(dim=1) / videos.norm(dim=1)).mean())


if __name__ == "__main__":
    sys.exit(main())
