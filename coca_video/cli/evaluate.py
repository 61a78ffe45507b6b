"""`coca-video evaluate DATA --model RUN`: accuracy of a classifier, or retrieval of a CoCa."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from coca_video.cli.arguments import parse_options, say

if TYPE_CHECKING:
    from coca_video.data.frame_cache import FrameCache
    from coca_video.data.manifest import Manifest
    from coca_video.data.video import ClipConfig, VideoDataset
    from coca_video.data.views import Protocol
    from coca_video.eval.classification import ClassificationResult
    from coca_video.hub import Saved
    from coca_video.models.video import VideoClassifier

MAX_CLASSES_SHOWN = 20


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Accuracy of a trained probe on clips, or retrieval of a pretrained CoCa on captioned images."""

    data: tyro.conf.Positional[Path]
    """A manifest (CSV) or a folder of clips; for a CoCa, tar shards of captioned images."""
    model: str
    """A finished run or a model folder, hf:ORG/NAME, open_clip:NAME/TAG or open_clip:FILE."""
    split: str | None = None
    """The manifest's rows with this split; all rows when not given."""
    protocol: (
        Literal[
            "uniform",
            "mmaction2_tsn",
            "mmaction2_dense",
            "slowfast",
            "pytorchvideo",
            "uniformerv2",
            "videomae",
            "videomae_ssv2",
            "vjepa2",
        ]
        | None
    ) = None
    """Clips and crops of each video as this peer tests, their scores averaged; when not given one clip, its centre:
    of the whole video, or of such a part of it as the model was trained with."""
    num_frames: int | None = None
    """Frames a clip; when not given the protocol's, or what the model was trained with for none and for uniform."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""
    frame_cache: Path | None = None
    """Read frames from this frame cache, as `probe --frame-cache` does; built first if it is not there."""
    batch_size: int = 16
    """Clips (views of a video, images) at a time."""
    num_workers: int = 0
    """Processes that read data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder."""
    out: Path | None = None
    """Folder for the result; the evaluation/ of the model's folder when not given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(arguments: Sequence[str]) -> int:
    """Evaluates, prints, writes the result. Status 1 when some of the data could not be read."""
    options = parse_options(EvaluateOptions, verb="evaluate", arguments=arguments)
    from coca_video.distributed import is_main, start_from_environment
    from coca_video.hub import load
    from coca_video.models.coca import CoCa
    from coca_video.models.image import ImageEncoder
    from coca_video.train.loop import pick_device

    if options.out is None and ":" in options.model and not Path(options.model).is_dir():
        raise ValueError(f"{options.model} is no folder that could take the result; say where with --out DIR.")
    saved = load(options.model)
    if isinstance(saved.model, ImageEncoder):
        raise ValueError(f"{options.model} is an image encoder alone, which names nothing; train a probe on it first.")
    if isinstance(saved.model, CoCa):
        return _evaluate_retrieval(saved, options=options)
    with start_from_environment(pick_device(options.device)):
        path = evaluate_manifest(saved, options=options)
        return _report(path, options=options) if is_main() else 0  # torchrun kills all ranks for one that ends with 1


def evaluate_manifest(saved: "Saved", *, options: EvaluateOptions) -> Path:
    """Scores every video of `options.data` and writes the result; returns its file. Ranks share the videos."""
    from coca_video.data.manifest import read_manifest
    from coca_video.distributed import gather_objects, on_main
    from coca_video.eval.classification import write_result
    from coca_video.models.video import VideoClassifier

    model = saved.model
    assert isinstance(model, VideoClassifier)
    manifest = read_manifest(options.data, classes=saved.classes)
    manifest = manifest if options.split is None else manifest.select(split=options.split)
    manifest.check_labels()
    manifest.check_files()
    rule = _protocol(options, trained_frames=model.config.num_frames)
    result = _scores(model, manifest, rule=rule, options=options)
    part = _trained_part(model) if options.protocol is None else {}
    facts = {
        "model": options.model,
        "data": str(options.data.resolve()),
        "split": options.split,
        "num_frames": rule.frames_per_clip,
        "protocol": None if part else asdict(rule),
        "stride": part.get("stride"),
        "clip_seconds": part.get("clip_seconds"),
        "frames": "videos" if options.frame_cache is None else "JPEG cache",
        "precision": options.precision,
    }
    written: list[Path] = []
    name = _result_name(options)
    on_main(lambda: written.append(write_result(_result_folder(options), name=name, result=result, facts=facts)))
    path: Path = gather_objects(written)[0][0]
    return path


def _protocol(options: EvaluateOptions, *, trained_frames: int) -> "Protocol":
    """The protocol asked for; without one a clip of the whole video, its centre, which is "uniform"."""
    from coca_video.data.views import protocol

    if options.num_frames is not None and options.num_frames < 1:
        raise ValueError(f"--num-frames must be at least 1; got {options.num_frames}.")
    name = "uniform" if options.protocol is None else options.protocol
    num_frames = trained_frames if name == "uniform" and options.num_frames is None else options.num_frames
    try:
        return protocol(name, frames_per_clip=num_frames)
    except ValueError as error:
        raise ValueError(f"--num-frames {num_frames} does not go with the protocol {name}: {error}.") from error


def _trained_part(model: "VideoClassifier") -> dict[str, Any]:
    """How a model that saw a part of each video in training took it, as ClipConfig has it; empty for the whole."""
    from coca_video.data.video import sampling_of

    stride, clip_seconds = model.config.stride, model.config.clip_seconds
    sampling = sampling_of(stride=stride, clip_seconds=clip_seconds)
    return {} if sampling == "uniform" else {"sampling": sampling, "stride": stride, "clip_seconds": clip_seconds}


def _scores(
    model: "VideoClassifier", manifest: "Manifest", *, rule: "Protocol", options: EvaluateOptions
) -> "ClassificationResult":
    """One clip a video without --protocol, else its views."""
    from coca_video.data.video import ClipConfig
    from coca_video.eval.classification import evaluate_clips
    from coca_video.eval.multiview import CachedMultiViewDataset, MultiViewDataset, evaluate_views
    from coca_video.eval.passes import share_of_rank
    from coca_video.train.loop import pick_device, progress_bar

    device = pick_device(options.device)  # in a process group "cuda" is this rank's own: it was made the current one
    reading: dict[str, Any] = {
        "image_size": model.config.image.image_size,
        "interpolation": model.config.image.interpolation,
        "decoder": options.decoder,
        "timeout_seconds": options.timeout_seconds,
    }
    settings: dict[str, Any] = {
        "classes": manifest.classes,
        "device": device,
        "batch_size": options.batch_size,
        "num_workers": options.num_workers,
        "bf16": options.precision == "bf16",
    }
    if options.protocol is None:
        reading |= _trained_part(model)
        clips = _clips(manifest, config=ClipConfig(num_frames=rule.frames_per_clip, **reading), options=options)
        with progress_bar("evaluating", total=len(share_of_rank(clips))) as bar:
            return evaluate_clips(model.to(device), dataset=clips, on_batch=bar.update, **settings)
    views = MultiViewDataset(manifest, protocol=rule, **reading)
    if options.frame_cache is not None:
        views = CachedMultiViewDataset(manifest, protocol=rule, cache=_frame_cache(manifest, options), **reading)
    with progress_bar("evaluating", total=len(share_of_rank(views))) as bar:
        return evaluate_views(model.to(device), dataset=views, on_batch=bar.update, **settings)


def _clips(manifest: "Manifest", *, config: "ClipConfig", options: EvaluateOptions) -> "VideoDataset":
    from coca_video.data.frame_cache import CachedVideoDataset
    from coca_video.data.video import VideoDataset

    if options.frame_cache is None:
        return VideoDataset(manifest, config=config, seed=0)
    config = replace(config, decoder="auto")  # what was asked for has built the cache
    return CachedVideoDataset(manifest, cache=_frame_cache(manifest, options), config=config, seed=0)


def _frame_cache(manifest: "Manifest", options: EvaluateOptions) -> "FrameCache":
    """The cache that is there, whatever it keeps, or a new one of the usual 64 frames."""
    from coca_video.data.frame_cache_format import FrameCacheConfig, read_facts
    from coca_video.train.probe_data import cache_folder, open_frame_cache

    assert options.frame_cache is not None
    there = read_facts(cache_folder(manifest, folder=options.frame_cache))
    return open_frame_cache(
        manifest,
        folder=options.frame_cache,
        kept=FrameCacheConfig() if there is None else there.config,
        decoder=options.decoder,
        timeout_seconds=options.timeout_seconds,
        num_workers=options.num_workers,
    )


def _report(path: Path, *, options: EvaluateOptions) -> int:
    """Prints a written result; the exit status."""
    evaluation = json.loads(path.read_text())
    if options.protocol is not None:
        rule = evaluation["protocol"]
        clips = f"{rule['num_clips']} clips of {rule['frames_per_clip']} frames"
        print(f"protocol    {rule['name']}: {clips}, crops: {rule['crops']}, scores: {rule['aggregate']}")
    print_accuracy(evaluation)
    say(f"Scores of every video and all figures: {path}")
    total = evaluation["num_videos"] + evaluation["num_unreadable"]
    return _report_unreadable(list(evaluation["unreadable"].values()), total=total)


def _evaluate_retrieval(saved: "Saved", *, options: EvaluateOptions) -> int:
    from coca_video.data.image_text import PairDataset, open_shards
    from coca_video.eval.classification import free_name
    from coca_video.eval.retrieval import evaluate_retrieval
    from coca_video.models.coca import CoCa
    from coca_video.train.loop import pick_device, progress_bar

    model = saved.model
    assert isinstance(model, CoCa)
    for name in ("split", "protocol", "num_frames", "decoder", "timeout_seconds", "frame_cache"):
        if getattr(options, name) != EvaluateOptions.__dataclass_fields__[name].default:
            raise ValueError(f"--{name.replace('_', '-')} is for clips, and {options.model} is a CoCa: leave it out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Retrieval is evaluated in one process, and torchrun started several; start it without.")
    if saved.tokenizer is None:
        raise ValueError(f"{options.model} has no tokenizer.json, which retrieval needs.")
    device = pick_device(options.device)
    image = model.config.image
    dataset = PairDataset(
        open_shards(options.data),
        image_size=image.image_size,
        interpolation=image.interpolation,
        seed=0,
        augment=False,
    )
    with progress_bar("evaluating", total=len(dataset)) as bar:
        result = evaluate_retrieval(
            model.to(device),
            dataset=dataset,
            tokenizer=saved.tokenizer,
            device=device,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            bf16=options.precision == "bf16",
            on_batch=bar.update,
        )
    folder = _result_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    facts = {"model": options.model, "data": str(options.data.resolve()), "precision": options.precision}
    document = {
        **facts,
        "num_images": result.num_images,
        "num_captions": result.num_captions,
        **result.metrics,
        "unreadable": {sample.key: sample.cause for sample in result.unreadable},
    }
    path = folder / f"{free_name(folder, name=_result_name(options), facts=facts)}.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    print(f"{result.num_images} images, {result.num_captions} captions")
    for name, value in result.metrics.items():
        print(f"{name:<28} {value:.4f}")
    say(f"All figures: {path}")
    return _report_unreadable([sample.cause for sample in result.unreadable], total=len(dataset))


def _result_folder(options: EvaluateOptions) -> Path:
    return options.out if options.out is not None else Path(options.model) / "evaluation"


def _result_name(options: EvaluateOptions) -> str:
    data = re.sub(r"[^\w-]+", "_", options.data.resolve().name.removesuffix(".csv").removesuffix(".tar"))
    frames = None if options.num_frames is None else f"{options.num_frames}frames"
    return "_".join(part for part in (data, options.split, options.protocol, frames) if part is not None)


def _report_unreadable(causes: list[str], *, total: int) -> int:
    if not causes:
        return 0
    say(f"{len(causes)} of {total} could not be read; the figures above leave them out unless they say otherwise:")
    for cause in causes:
        say(f"  {cause}")
    return 1


def print_accuracy(evaluation: dict[str, Any]) -> None:
    """The figures of a written result, with the classes from worst to best where there are few."""
    num_read, num_unreadable = evaluation["num_videos"], evaluation["num_unreadable"]
    num_right = round(evaluation["top1"] * num_read)
    print(f"videos      {num_read} read, {num_unreadable} unreadable")
    print(f"top-1       {evaluation['top1']:.4f} ({num_right} of the {num_read} read)")
    if num_unreadable:
        total = num_read + num_unreadable
        as_wrong = evaluation["top1_unreadable_wrong"]
        print(f"            {as_wrong:.4f} ({num_right} of all {total}, unreadable as wrong)")
    print(f"top-5       {evaluation['top5']:.4f}")
    print(f"mean class  {evaluation['mean_class']:.4f}")
    seen = {name: row for name, row in evaluation["per_class"].items() if row["videos"]}
    worst_first = sorted(seen.items(), key=lambda item: item[1]["top1"])
    for name, row in worst_first[:MAX_CLASSES_SHOWN]:
        print(f"  {row['top1']:.4f}  {name} ({row['videos']})")
    if len(seen) > MAX_CLASSES_SHOWN:
        print(f"  ... the {MAX_CLASSES_SHOWN} worst of {len(seen)} classes", file=sys.stderr)
