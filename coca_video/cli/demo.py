"""`coca-video demo --model SOURCE`: a page in the browser, and an API, that answer about uploaded clips."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, Literal

import tyro

from coca_video.cli.arguments import shipped
from coca_video.serve.limits import Limits


def _models_of_environment() -> tuple[str, ...]:
    names = os.environ.get("COCA_VIDEO_DEMO_MODEL", "").split(",")
    return tuple(name.strip() for name in names if name.strip())


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Shows in a browser what the models say of a clip."""

    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = field(default_factory=_models_of_environment)
    """A finished run, a model folder, or hf:ORG/NAME; give it again for more. COCA_VIDEO_DEMO_MODEL when not given."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    num_frames: int | None = None
    """Frames a clip for classifiers; what the model was trained with when not given."""
    limits: Annotated[Limits, tyro.conf.arg(name="")] = field(default_factory=Limits)
    """What a clip may be."""
    num_workers: int = 2
    """Processes that read clips."""
    max_waiting: int = 20
    """Clips that may wait; whoever sends one more is told that the server is busy."""
    max_batch: int = 8
    """Clips that a model takes at once, of all who wait."""
    keep_minutes: float = 60.0
    """Uploads, and what was made of them, are deleted after this time; all of them when the demo ends."""
    server_name: str = field(default_factory=lambda: os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"))
    """Address to listen at; 0.0.0.0 lets other machines in. GRADIO_SERVER_NAME when not given."""
    server_port: int | None = None
    """Port; the first free one from 7860 when not given."""
    password: str | None = None
    """Asked of everyone, with any user name. Others on this machine can read arguments: better give it in the
    environment, as COCA_VIDEO_DEMO_PASSWORD."""

    def __post_init__(self) -> None:
        if not 0 < self.keep_minutes < float("inf"):
            raise ValueError(f"expected --keep-minutes above 0 and finite, got {self.keep_minutes:g}")
        if self.password == "":
            raise ValueError("expected a password that is not empty with --password")

    @property
    def asked_password(self) -> str | None:
        """That of the arguments, else that of the environment (not a default, which --help would print)."""
        return self.password or os.environ.get("COCA_VIDEO_DEMO_PASSWORD") or None


def run(arguments: Sequence[str]) -> int:
    """Loads the models and serves until Ctrl-C: what `python app/demo.py` does."""
    # Its files import each other, as when it is run as a script. An app/demo.py of the working directory is not meant.
    sys.path.insert(0, str(shipped() / "app"))
    return int(import_module("demo").main(arguments))
