"""Models on disk, in the Hub's layout: model.safetensors, config.json, and classes.txt or tokenizer.json."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
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
    document = json.loads((folder / CONFIG).read_text())
    model: CoCa | VideoClassifier
    match document["model"]:
        case "CoCa":
            model = CoCa(from_json(CoCaConfig, document["config"]))
        case "VideoClassifier":
            model = VideoClassifier(from_json(VideoClassifierConfig, document["config"]))
        case other:
            raise ValueError(f"{folder / CONFIG}: expected the model to be CoCa or VideoClassifier; got {other!r}.")
    model.load_state_dict(load_file(folder / WEIGHTS))
    classes_file, tokenizer_file = folder / CLASSES, folder / TOKENIZER
    return Saved(
        model=model.eval(),
        classes=tuple(classes_file.read_text().removesuffix("\n").split("\n")) if classes_file.is_file() else (),
        tokenizer=Tokenizer.load(tokenizer_file) if tokenizer_file.is_file() else None,
    )


def fingerprint(module: nn.Module) -> str:
    """A hash of names and values of a module's weights: equal exactly when they are bit-equal."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
