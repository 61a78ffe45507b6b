"""What every tab of the demo has, and what a clip that is played needs."""

import asyncio
import html
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import gradio as gr
from player import PlayerValue, with_video
from waiting import Waiting

from coca_video.serve.answers import ReadClip, Refused
from coca_video.serve.fair_queue import Client
from coca_video.serve.service import Service
from coca_video.synthetic import ACTIONS, draw_clips

CONVERTING = "Your browser does not play this file as it is: a copy that it plays is being made. Meanwhile: the frames."


@dataclass(frozen=True, kw_only=True)
class Shared:
    """The service, the folder that all uploads and copies lie in, and clips that may be shown."""

    service: Service
    folder: Path
    examples: tuple[Path, ...]
    keep_minutes: float
    waiting: Waiting = field(default_factory=Waiting)


def draw_examples(folder: Path) -> tuple[Path, ...]:
    """One drawn clip of each action, in `folder`."""
    rows = draw_clips(folder, num_clips=len(ACTIONS), seed=7, split="example", size=192, num_frames=24)
    return tuple(Path(row.path).rename(folder / f"{row.label}.mp4") for row in rows)


def clip_input(shared: Shared, *, prefix: str) -> gr.Video:
    """Where a clip is chosen: a file, or the camera. Its preview is the browser's own; no file is converted for it."""
    size = f"{shared.service.limits.max_megabytes:g} MB, {shared.service.limits.max_seconds:g} s"
    return gr.Video(
        label=f"Clip (at most {size})",
        sources=["upload", "webcam"],
        elem_id=f"{prefix}-clip",
        elem_classes="clip-input",
    )


def model_choice(names: tuple[str, ...], *, prefix: str) -> gr.Dropdown:
    """Which model answers; hidden when there is no choice."""
    return gr.Dropdown(
        choices=list(names), value=names[0], label="Model", visible=len(names) > 1, elem_id=f"{prefix}-model"
    )


def example_row(shared: Shared, *, clip: gr.Video, prefix: str) -> None:
    """Clips to try, drawn by the package."""
    gr.Examples(
        [[str(path)] for path in shared.examples],
        inputs=[clip],
        label="Examples, drawn by this program",
        elem_id=f"{prefix}-examples",
        api_visibility="private",
        cache_examples=False,
    )


def run_buttons(name: str, *, prefix: str) -> tuple[gr.Button, gr.Button]:
    """What starts a job, and what ends it."""
    with gr.Row():
        run = gr.Button(name, variant="primary", min_width=120, elem_id=f"{prefix}-run")
        return run, gr.Button("Cancel", min_width=90, elem_id=f"{prefix}-cancel")


def connect(
    answer: Callable[..., object],
    *,
    run: gr.Button,
    cancel: gr.Button,
    clip: gr.Video,
    inputs: Sequence[gr.components.Component],
    outputs: Sequence[gr.components.Component],
) -> None:
    """The first output shows how far a job is; another clip empties all of them: answer, timing, player."""
    started = run.click(
        answer,
        inputs=[clip, *inputs],
        outputs=outputs,
        show_progress_on=outputs[0],
        concurrency_limit=None,
        api_visibility="private",
    )
    cancel.click(None, cancels=[started], api_visibility="private")
    clip.change(
        lambda: (None, "", None), outputs=outputs, queue=False, show_progress="hidden", api_visibility="private"
    )


def timing_html(seconds: dict[str, float]) -> str:
    """How long each part took, as one line."""
    words = {"wait": "waiting", "decode": "reading", "encode": "encoder", "pool": "pooling", "caption": "captions"}
    parts = [f"<span>{html.escape(words.get(name, name))} {spent:.2f} s</span>" for name, spent in seconds.items()]
    return f'<p class="timing">{"".join(parts)}</p>'


def start_of(clip: ReadClip, *, path: Path) -> tuple[Path | None, str]:
    """The video to play at once, and the note under it."""
    return (path, "") if clip.plays_in_browser else (None, CONVERTING)


async def converted(value: PlayerValue, *, path: Path, client: Client, shared: Shared) -> PlayerValue:
    """The player of an answer once its clip has been made into one that browsers play, or with the reason why not."""
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="display-", dir=shared.folder))
    out = folder / "clip.mp4"
    try:
        await shared.waiting.result_of(shared.service.display(path, out=out, client=client))
    except Refused as error:
        return with_video(value, video=None, note=f"Only the frames that were read can be shown. {error}")
    finally:
        if not out.exists():  # whoever writes may still be at it: what it leaves behind is swept later
            shutil.rmtree(folder, ignore_errors=True)
    return with_video(value, video=out)
