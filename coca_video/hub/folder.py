"""Model folders in the Hub's layout: model.safetensors, config.json, and classes.txt or tokenizer.json."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coca_video.config import from_json, to_json
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import ImageConfig, ImageEncoder
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.tokenizer import Tokenizer

WEIGHTS, CONFIG, CLASSES, TOKENIZER = "model.safetensors", "config.json", "classes.txt", "tokenizer.json"

Model = CoCa | VideoClassifier | ImageEncoder


@dataclass(frozen=True, kw_only=True)
class Saved:
    """A model and what belongs to it: `classes` of a classifier, in the order of its scores; the `tokenizer` of a CoCa.

    `source` is where the weights were taken from, or what they were trained on top of (`timm:...`), and `license` the
    licence that they came with; None where nothing is known.
    """

    model: Model
    classes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None
    license: str | None = None
    source: str | None = None

    @property
    def encoder(self) -> ImageEncoder:
        """The model's image encoder: the model itself where it is one."""
        return self.model if isinstance(self.model, ImageEncoder) else self.model.encoder

    def save(self, folder: Path) -> None:
        """Writes the model folder, as the function `save` does."""
        save(
            folder,
            model=self.model,
            classes=self.classes,
            tokenizer=self.tokenizer,
            license=self.license,
            source=self.source,
        )


def save(
    folder: Path,
    *,
    model: Model,
    classes: Sequence[str] = (),
    tokenizer: Tokenizer | None = None,
    license: str | None = None,
    source: str | None = None,
) -> None:
    """Writes the model folder. The weights come last and by renaming, so a folder that has them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    origin = {name: value for name, value in (("license", license), ("source", source)) if value is not None}
    document = {"model": type(model).__name__, "config": to_json(model.config), **origin}
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    if classes:
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / f".{WEIGHTS}.partial"
    save_file(state, partial)
    partial.chmod((folder / CONFIG).stat().st_mode)  # safetensors leaves it readable to its owner alone
    partial.replace(folder / WEIGHTS)


def find_model(path: Path) -> Path:
    """The model folder meant by `path`: itself, or the `model/` of a run. ValueError when neither is one."""
    for folder in (path, path / "model"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ValueError(f"The run {path} is not finished, so it has no model yet; run its command again to go on.")
    raise ValueError(f"Expected a finished run or a model folder ({CONFIG} and {WEIGHTS}) at {path}; there is none.")


def load_folder(path: Path) -> Saved:
    """Rebuilds the model of a run or a model folder, on the CPU, in evaluation mode; no code of the folder is run."""
    folder = find_model(path)
    document = _read_config(folder / CONFIG)
    model = _build(document, path=folder / CONFIG)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{folder / WEIGHTS} is damaged, or not of the model in {CONFIG} ({reason}).") from error
    tokenizer_file = folder / TOKENIZER
    return Saved(
        model=model.eval(),
        classes=_read_classes(folder / CLASSES, model=model),
        tokenizer=Tokenizer.load(tokenizer_file) if tokenizer_file.is_file() else None,
        license=document.get("license"),
        source=document.get("source"),
    )


def _read_config(path: Path) -> dict[str, Any]:
    """What config.json holds: a model's name, its config, and where the weights came from."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
        if "architecture" not in document and not (
            isinstance(document["model"], str) and isinstance(document["config"], dict)
        ):
            raise TypeError("the model's name, or its config, is of another type")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: expected JSON with a model and its config ({error}).") from error
    if "architecture" in document:
        raise ValueError(
            f"{path.parent} is of timm's layout: load timm:local-dir:{path.parent}, or timm:hf-hub:ORG/NAME."
        )
    return document


@dataclass(frozen=True, kw_only=True)
class _EncoderFile:
    """An encoder's config is one of a union, which only a field of a dataclass can say."""

    image: ImageConfig


def _build(document: dict[str, Any], *, path: Path) -> Model:
    """The model that config.json describes, with fresh weights."""
    config = document["config"]
    match document["model"]:
        case "CoCa":
            return CoCa(from_json(CoCaConfig, config))
        case "VideoClassifier":
            return VideoClassifier(from_json(VideoClassifierConfig, config))
        case "ImageEncoder":
            return ImageEncoder(from_json(_EncoderFile, {"image": config}).image)
        case other:
            raise ValueError(f"{path}: expected the model to be CoCa, VideoClassifier or ImageEncoder; got {other!r}.")


def _read_classes(path: Path, *, model: Model) -> tuple[str, ...]:
    """A classifier's classes, one for each score; other models have none."""
    if not isinstance(model, VideoClassifier):
        return ()
    names = tuple(path.read_text().removesuffix("\n").split("\n")) if path.is_file() else ()
    if len(names) != model.config.num_classes:
        raise ValueError(f"Expected {model.config.num_classes} lines in {path}, one a class; got {len(names)}.")
    return names


def fingerprint(module: nn.Module) -> str:
    """A hash of names and values of a module's weights: equal exactly when they are bit-equal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
