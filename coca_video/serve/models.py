"""The models that a service answers with, under names that tell nothing of where their files lie."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from coca_video.data.decode import Backend
from coca_video.eval.captioning import Captioner, load_captioner
from coca_video.eval.predict import Predictor, predictor_of
from coca_video.hub import Saved, find_model, load
from coca_video.hub.card import Measurement, measurements_of, trained_on
from coca_video.models.coca import CoCa
from coca_video.models.generate import GenerateConfig
from coca_video.models.video import VideoClassifier

CAPTION_FRAMES = 8  # as the verb `caption` takes


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model by its name: a classifier has a predictor, a CoCa a captioner.

    measurements: of its result files. trained_on: the name of its training data; None where nothing tells it.
    """

    name: str
    saved: Saved
    predictor: Predictor | None
    captioner: Captioner | None
    measurements: tuple[Measurement, ...] = ()
    trained_on: str | None = None


def load_models(
    sources: Sequence[str], *, device: torch.device, decoder: Backend, num_frames: int | None, timeout_seconds: float
) -> list[ServedModel]:
    """Runs, model folders or names with a source, as `coca_video.load` takes them, each loaded once.

    `num_frames` is for classifiers, as in training when None; captions are made of the captioner's own number.

    Raises:
        ValueError: none is given, one is given twice or cannot be loaded, or is no classifier and writes no captions.
    """
    if not sources:
        raise ValueError("Expected at least one model: a finished run, a model folder, or hf:ORG/NAME.")
    places = [_place(source) for source in sources]
    if twice := [source for index, source in enumerate(sources) if places[index] in places[:index]]:
        raise ValueError(f"{twice[0]} is given twice; give each model once.")
    names = short_names(sources)
    return [
        served_model(
            load(source),
            name=name,
            measurements=measurements_of(Path(source)),
            trained_on=trained_on(Path(source)),
            device=device,
            decoder=decoder,
            num_frames=num_frames,
            timeout_seconds=timeout_seconds,
        )
        for name, source in zip(names, sources, strict=True)
    ]


def served_model(
    saved: Saved,
    *,
    name: str,
    measurements: Sequence[Measurement] = (),
    trained_on: str | None = None,
    device: torch.device,
    decoder: Backend,
    num_frames: int | None,
    timeout_seconds: float,
) -> ServedModel:
    """A loaded model, for what it can do. ValueError for one that neither names actions nor writes captions."""
    options: dict[str, Any] = {"decoder": decoder, "timeout_seconds": timeout_seconds, "device": device}
    predictor, captioner = None, None
    if isinstance(saved.model, VideoClassifier):
        predictor = predictor_of(saved, num_frames=num_frames, **options)
    elif isinstance(saved.model, CoCa):
        captioner = load_captioner(saved, num_frames=CAPTION_FRAMES, config=GenerateConfig(), shorten=True, **options)
    else:
        raise ValueError(
            f"{name} holds a {type(saved.model).__name__}, which neither names actions nor writes captions; "
            "expected the run of a probe or of a pretraining."
        )
    return ServedModel(
        name=name,
        saved=saved,
        predictor=predictor,
        captioner=captioner,
        measurements=tuple(measurements),
        trained_on=trained_on,
    )


def _place(source: str) -> str:
    """The same for all ways to name a folder."""
    path = Path(source)
    return str(find_model(path).resolve()) if path.is_dir() else source


def short_names(sources: Sequence[str]) -> list[str]:
    """The last part of each path or name, or the last two, as few as tell them apart; else with a number."""
    parts = [[part for part in PurePath(source).parts if part not in ("/", "model")] or [source] for source in sources]
    for count in (1, 2):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{part[-1]} ({number})" for number, part in enumerate(parts, start=1)]
