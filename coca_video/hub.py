"""Models on disk, in the Hub's layout: model.safetensors, config.json, and classes.txt or tokenizer.json."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from coca_video.config import from_json, to_json
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.tokenizer import Tokenizer

WEIGHTS, CONFIG, CLASSES, TOKENIZER = "model.safetensors", "config.json", "classes.txt", "tokenizer.json"


@dataclass(frozen=True, kw_only=True)
class Saved:
    """What a model folder holds. A classifier has `classes`, in the order of its scores; a CoCa has its `tokenizer`."""

    model: CoCa | VideoClassifier
    classes: tuple[str, ...] = ()
    tokenizer: Tokenizer | None = None


def save(
    folder: Path, *, model: CoCa | VideoClassifier, classes: Sequence[str] = (), tokenizer: Tokenizer | None = None
) -> None:
    """Writes the model folder. The weights come last and by renaming, so a folder that has them is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"model": type(model).__name__, "config": to_json(model.config)}
    (folder / CONFIG).write_text(json.dumps(document, indent=2) + "\n")
    if classes:
        (folder / CLASSES).write_text("".join(f"{name}\n" for name in classes))
    if tokenizer is not None:
        tokenizer.save(folder / TOKENIZER)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    partial = folder / f".{WEIGHTS}.partial"
    save_file(state, partial)
    partial.replace(folder / WEIGHTS)


def find_model(path: Path) -> Path:
    """The model folder meant by `path`: itself, or the `model/` of a run. ValueError when neither is one."""
    for folder in (path, path / "model"):
        if (folder / WEIGHTS).is_file() and (folder / CONFIG).is_file():
            return folder
    if (path / "checkpoints").is_dir():
        raise ValueError(f"The run {path} is not finished, so it has no model yet; run its command again to go on.")
    raise ValueError(f"Expected a finished run or a model folder ({CONFIG} and {WEIGHTS}) at {path}; there is none.")


def load(path: Path) -> Saved:
    """Rebuilds the model of a run or a model folder, on the CPU, in evaluation mode; no code of the folder is run."""
    folder = find_model(path)
    model = _build(folder / CONFIG)
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
    )


def _build(path: Path) -> CoCa | VideoClassifier:
    """The model that config.json describes, with fresh weights."""
    try:
        document = json.loads(path.read_text())
        name, config = document["model"], document["config"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: expected JSON with a model and its config ({error}).") from error
    match name:
        case "CoCa":
            return CoCa(from_json(CoCaConfig, config))
        case "VideoClassifier":
            return VideoClassifier(from_json(VideoClassifierConfig, config))
        case other:
            raise ValueError(f"{path}: expected the model to be CoCa or VideoClassifier; got {other!r}.")


def _read_classes(path: Path, *, model: CoCa | VideoClassifier) -> tuple[str, ...]:
    """A classifier's classes, one for each score; a CoCa has none."""
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
