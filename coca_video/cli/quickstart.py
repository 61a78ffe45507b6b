"""`coca-video quickstart`: the whole line on a drawn world, in minutes: pretrain, probe, evaluate, compare, go on."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any, Literal

from coca_video.cli.arguments import call, parse_options, say

if TYPE_CHECKING:
    from coca_video.train.probe_config import ProbeConfig

NUM_FRAMES = 8
NAMES = {
    "pretrained": "probe on the pretrained encoder",
    "random": "probe on a random encoder",
    "middle_frame": "probe on the middle frame alone",
    "image_probe_on_video": "that one, shown 8 frames",
    "chance": "chance",
}


@dataclass(frozen=True, kw_only=True)
class QuickstartOptions:
    """Draws captioned pictures and clips of five actions, pretrains a tiny CoCa on the pictures, trains a frozen
    single-query probe on the clips, and compares it with a random encoder, with the middle frame, and with chance."""

    out: Path = Path("runs/quickstart")
    """Folder for all of it; the same command goes on where it stopped."""
    seed: int = 0
    """Of the drawings, of the initial weights and of the order of training."""
    num_pictures: int = 8000
    """Captioned pictures to pretrain on."""
    num_train_clips: int = 1000
    """Clips to train the probe on."""
    num_test_clips: int = 500
    """Clips to evaluate on."""
    pretrain_steps: int = 1000
    """Updates of 96 pictures."""
    probe_steps: int = 600
    """Updates of 64 clips."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(arguments: Sequence[str]) -> int:
    """Goes through the stages, prints the comparison and the commands to go on with."""
    options = parse_options(QuickstartOptions, verb="quickstart", arguments=arguments)
    started = time.monotonic()
    _check_options(options)
    say(
        "[1/4] Drawing the world: captioned pictures, and clips of shapes that slide, spin, pulse, blink, change colour"
    )
    manifest = _draw_world(options)
    say(f"[2/4] Pretraining a tiny CoCa on {options.num_pictures} pictures: contrastive + captioning loss")
    _pretrain(options)
    say("[3/4] Training single-query probes on frozen encoders")
    accuracies, per_class = _probe_actions(options, manifest)
    say("[4/4] Does a probe trained on still pictures work on video? Naming the colour, from one frame and from eight")
    colours = _probe_colours(options, manifest)
    report = {
        "options": {**asdict(options), "out": str(options.out)},
        "accuracy": accuracies,
        "per_class_accuracy": per_class,
        "colour_accuracy": colours,
        "seconds": round(time.monotonic() - started, 1),
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print_report(report)
    _print_next(options)
    return 0


def _check_options(options: QuickstartOptions) -> None:
    """The folder keeps what it was started with; other options would mix two worlds."""
    limits = {"num_pictures": 2, "num_train_clips": 5, "num_test_clips": 5, "pretrain_steps": 1, "probe_steps": 1}
    for name, least in limits.items():
        if getattr(options, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {getattr(options, name)}.")
    path = options.out / "options.json"
    wanted = {name: value for name, value in asdict(options).items() if name not in ("out", "device")}
    if path.is_file() and (there := json.loads(path.read_text())) != wanted:
        differing = ", ".join(f"{name} was {there.get(name)}" for name in wanted if there.get(name) != wanted[name])
        raise ValueError(f"{options.out} was started with other options ({differing}); give another --out.")
    options.out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(wanted, indent=2) + "\n")


def _draw_world(options: QuickstartOptions) -> Path:
    """Pictures as tar shards and clips as H.264 files, drawn once; returns the manifest of the clips."""
    from coca_video.synthetic import draw_clip_set, draw_pictures

    world = options.out / "world"
    manifest = world / "clips" / "manifest.csv"
    if not manifest.is_file():  # written last
        draw_pictures(world / "pictures", num_pictures=options.num_pictures, seed=options.seed)
        drawn = draw_clip_set(
            world / "clips", num_train=options.num_train_clips, num_test=options.num_test_clips, seed=options.seed
        )
        assert drawn == manifest
    return manifest


def _pretrain(options: QuickstartOptions) -> None:
    from coca_video.models.coca import CoCaConfig
    from coca_video.train.loop import LoopConfig
    from coca_video.train.optim import OptimConfig
    from coca_video.train.pretrain import PairsConfig, PretrainConfig, run_pretraining

    config = PretrainConfig(
        model=CoCaConfig.tiny(),
        pairs=PairsConfig(train=options.out / "world" / "pictures", min_crop_area=1.0),
        out=options.out / "pretrain",
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=min(50, options.pretrain_steps)),
        loop=LoopConfig(steps=options.pretrain_steps, batch_size=96, seed=options.seed, checkpoint_every=200),
        device=options.device,
    )
    run_pretraining(config)


def _probe_config(options: QuickstartOptions, *, name: str, manifest: Path, num_frames: int) -> "ProbeConfig":
    """The recipe of every probe here: nothing differs but the encoder, the frames and the labels."""
    from coca_video.train.loop import LoopConfig
    from coca_video.train.optim import OptimConfig
    from coca_video.train.probe_config import ClipsConfig, PretrainedEncoder, ProbeConfig

    return ProbeConfig(
        encoder=PretrainedEncoder(model=str(options.out / "pretrain")),
        clips=ClipsConfig(train=manifest),
        out=options.out / name,
        num_frames=num_frames,
        token_cache=options.out / "tokens",
        augment=False,
        label_smoothing=0.1,
        optim=OptimConfig(learning_rate=2e-3, warmup_steps=min(50, options.probe_steps)),
        loop=LoopConfig(steps=options.probe_steps, batch_size=64, seed=options.seed, checkpoint_every=200),
        device=options.device,
    )


def _probe_actions(options: QuickstartOptions, manifest: Path) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """Accuracy by probe, and by class and probe."""
    from coca_video.data.manifest import read_manifest
    from coca_video.models.coca import CoCaConfig
    from coca_video.train.classify import run_probe
    from coca_video.train.probe_config import RandomEncoder

    probe = _probe_config(options, name="probe", manifest=manifest, num_frames=NUM_FRAMES)
    fresh = RandomEncoder(image=CoCaConfig.tiny().image)
    configs = {
        "pretrained": probe,
        "random": replace(probe, encoder=fresh, out=options.out / "probe_random"),
        "middle_frame": replace(probe, num_frames=1, out=options.out / "probe_middle_frame"),
    }
    evaluations: dict[str, Any] = {name: run_probe(config).evaluation for name, config in configs.items()}
    evaluations["image_probe_on_video"] = _on_video(configs["middle_frame"].out, manifest=manifest, options=options)
    classes = read_manifest(manifest).classes
    accuracies = {name: float(evaluation["top1"]) for name, evaluation in evaluations.items()}
    per_class = {
        class_name: {name: evaluation["per_class"][class_name]["top1"] for name, evaluation in evaluations.items()}
        for class_name in classes
    }
    return {**accuracies, "chance": 1 / len(classes)}, per_class


def _probe_colours(options: QuickstartOptions, manifest: Path) -> dict[str, float]:
    """A probe that learns colours from middle frames (pictures), then names them from one frame and from eight."""
    from coca_video.data.manifest import read_manifest, write_manifest
    from coca_video.train.classify import run_probe

    clips = [row for row in read_manifest(manifest).rows if row.label != "change_colour"]
    rows = [replace(row, label=row.extra["colour"]) for row in clips]
    colours = sorted({row.extra["colour"] for row in clips})
    colour_manifest = options.out / "world" / "colours" / "manifest.csv"
    write_manifest(colour_manifest, rows=rows, classes=colours)
    config = _probe_config(options, name="probe_colour", manifest=colour_manifest, num_frames=1)
    on_picture = run_probe(config).evaluation
    on_video = _on_video(config.out, manifest=colour_manifest, options=options)
    assert on_picture is not None
    return {"one_frame": on_picture["top1"], "eight_frames": on_video["top1"], "chance": 1 / len(colours)}


def _on_video(run: Path, *, manifest: Path, options: QuickstartOptions) -> dict[str, Any]:
    """The evaluation of a trained image probe on NUM_FRAMES frames of the test clips."""
    from coca_video.cli.evaluate import EvaluateOptions, evaluate_manifest
    from coca_video.hub import load

    evaluation = EvaluateOptions(
        data=manifest, model=str(run), split="test", num_frames=NUM_FRAMES, batch_size=64, device=options.device
    )
    document: dict[str, Any] = json.loads(evaluate_manifest(load(run), options=evaluation).read_text())
    return document


def _print_report(report: dict[str, Any]) -> None:
    """The comparison: a row for each probe, a column for all classes and for each."""
    classes = list(report["per_class_accuracy"])
    width = max(map(len, NAMES.values()))
    print(f"\n{'accuracy on held-out clips':<{width}}  {'all':>6}  " + "  ".join(f"{name:>13}" for name in classes))
    for key, name in NAMES.items():
        cells = [report["per_class_accuracy"][class_name].get(key) for class_name in classes]
        columns = "  ".join(" " * 13 if cell is None else f"{cell:13.3f}" for cell in cells)
        print(f"{name:<{width}}  {report['accuracy'][key]:6.3f}  {columns}".rstrip())
    colours = report["colour_accuracy"]
    print(
        f"\nA probe trained on still pictures to name the colour: {colours['one_frame']:.3f} from one frame, "
        f"{colours['eight_frames']:.3f} from eight frames of video (chance {colours['chance']:.3f})."
    )
    print(f"Took {report['seconds']:.0f} s.")


def _print_next(options: QuickstartOptions) -> None:
    out, program = quote(str(options.out)), quote(call())
    clip = quote(str(next((options.out / "world" / "clips" / "test" / "spin").glob("*.mp4"))))
    print(
        f"\nIn {options.out}: pretrain/ and probe/ (model/, metrics.jsonl, curves.png; test.json), report.json\n"
        f"Ask it:          {program} predict {clip} --model {out}/probe\n"
        f"Evaluate again:  {program} evaluate {out}/world/clips/manifest.csv --split test --model {out}/probe "
        "--num-frames 16\n"
        "Your own clips, laid out as clips/train/<class>/*.mp4 and clips/test/<class>/*.mp4:\n"
        f"                 {program} probe configs/probe/own_clips.py --encoder.model {out}/pretrain "
        "--clips.train clips --out runs/my_probe\n"
        f"                 {program} predict my_clip.mp4 --model runs/my_probe\n"
        f"In a browser:    {program} demo --model {out}/probe --model {out}/pretrain"
    )
