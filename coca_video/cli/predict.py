"""`coca-video predict FILE... --model RUN`: the most probable classes of video files."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from coca_video.cli.arguments import parse_options, say


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Names the action in video files, most probable first."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Video files."""
    model: str
    """A finished probe run, a model folder, or hf:ORG/NAME."""
    top: int = 5
    """How many classes to name."""
    num_frames: int | None = None
    """Frames a clip; what the model was trained with when not given."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""
    json: bool = False
    """One JSON line a file instead of text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(arguments: Sequence[str]) -> int:
    """Predicts file by file, in their order. Status 1 when some file could not be read."""
    options = parse_options(PredictOptions, verb="predict", arguments=arguments)
    if not options.files:
        raise ValueError("expected one or more video files; none was given.")
    if options.top < 1:
        raise ValueError(f"--top must be at least 1; got {options.top}.")
    from coca_video.data.decode import UnreadableVideo
    from coca_video.eval.predict import load_predictor
    from coca_video.train.loop import pick_device

    predictor = load_predictor(
        options.model,
        num_frames=options.num_frames,
        decoder=options.decoder,
        timeout_seconds=options.timeout_seconds,
        device=pick_device(options.device),
    )
    status = 0
    for path in options.files:
        try:
            best = predictor(path)[: options.top]
        except UnreadableVideo as error:
            say(f"coca-video predict: {error}")
            status = 1
            if options.json:
                print(json.dumps({"file": str(path), "error": str(error)}), flush=True)
            continue
        _print(path, best, as_json=options.json)
    return status


def _print(path: Path, best: list[tuple[str, float]], *, as_json: bool) -> None:
    if as_json:
        top = [{"label": label, "probability": probability} for label, probability in best]
        print(json.dumps({"file": str(path), "top": top}), flush=True)
        return
    print(path)
    for label, probability in best:
        print(f"  {probability:.4f}  {label}")
