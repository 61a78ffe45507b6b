"""Models on disk and on the Hub: `load` from a folder, the Hub, timm or open_clip; `save` into a folder; `push`."""

from coca_video.hub.folder import (
    CLASSES,
    CONFIG,
    TOKENIZER,
    WEIGHTS,
    Model,
    Saved,
    find_model,
    fingerprint,
    load_folder,
    save,
)
from coca_video.hub.sources import load
from coca_video.hub.upload import push

__all__ = [
    "CLASSES",
    "CONFIG",
    "TOKENIZER",
    "WEIGHTS",
    "Model",
    "Saved",
    "find_model",
    "fingerprint",
    "load",
    "load_folder",
    "push",
    "save",
]
