"""The player: a clip with what the model looked at drawn over it, or with its captions as subtitles."""

import asyncio
import base64
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import gradio as gr
import numpy as np
from jaxtyping import Float
from torch import Tensor

from coca_video.data.image_text import encode_jpeg
from coca_video.serve.answers import Captioned, Classified, ReadClip, Segment
from coca_video.serve.subtitles import web_vtt

HERE = Path(__file__).parent
MAX_FRAMES_SHOWN = 64  # of a clip in many segments, evenly chosen


class Attention(TypedDict):
    """levels: for each frame 0 to 255 by place, row by row; 255 is the most of the clip. shares: sums of each frame."""

    rows: int
    columns: int
    levels: list[list[int]]
    shares: list[float]


class PlayerValue(TypedDict):
    """What player.js draws. Times are seconds, `box` is (top, left, height, width) in pixels of the upright video.

    id: the same for all that is shown of one answer, so that the place in the clip is kept. video: a file that the
    browser can play; None while there is none, and the frames stand in. frames: JPEG as data URIs.
    """

    id: str
    video: dict[str, Any] | None
    note: str
    height: int
    width: int
    box: list[int]
    duration: float
    times: list[float]
    frames: list[str]
    attention: Attention | None
    vtt: str | None
    segments: list[dict[str, Any]]


def player(*, elem_id: str) -> gr.HTML:
    """A component whose value is a PlayerValue, or None for nothing.

    (Not a subclass: Gradio writes a .pyi file beside the source of each class that derives from a component.)
    """
    return gr.HTML(
        html_template='<div class="player"></div>',
        css_template=(HERE / "player.css").read_text(),
        js_on_load=(HERE / "player.js").read_text(),
        apply_default_css=False,
        elem_classes="flush",
        elem_id=elem_id,
    )


async def classified_value(answer: Classified, *, video: Path | None, note: str = "") -> PlayerValue:
    """The player of a recognised clip."""
    value = await asyncio.to_thread(_value, answer.clip, video=video, note=note)
    value["attention"] = None if answer.attention is None else attention_value(answer.attention)
    return value


async def captioned_value(answer: Captioned, *, video: Path | None, note: str = "") -> PlayerValue:
    """The player of a described clip."""
    value = await asyncio.to_thread(_value, answer.clip, video=video, note=note)
    value["vtt"], value["segments"] = web_vtt(answer.segments), segment_values(answer.segments)
    return value


def with_video(value: PlayerValue, *, video: Path | None, note: str = "") -> PlayerValue:
    """The same answer, now with a video, or with the reason why it has none."""
    return {**value, "video": _file(video), "note": note}


def attention_value(attention: Float[Tensor, "frames rows columns"]) -> Attention:
    """Levels relative to the largest of the clip; by the square root, since one place often has most of it."""
    shares = attention.cpu().double().numpy()
    frames, rows, columns = shares.shape
    levels = np.rint(255 * np.sqrt(shares / max(float(shares.max()), 1e-12))).astype(int)
    return {
        "rows": rows,
        "columns": columns,
        "levels": levels.reshape(frames, -1).tolist(),
        "shares": [float(share) for share in shares.sum(axis=(1, 2))],
    }


def segment_values(segments: Sequence[Segment]) -> list[dict[str, Any]]:
    """Start, end and text of each."""
    return [{"start": each.start_seconds, "end": each.end_seconds, "text": each.caption} for each in segments]


def _value(clip: ReadClip, *, video: Path | None, note: str) -> PlayerValue:
    first = 1 if len(clip.frames) > 1 else 0  # of several clips the first is the whole video, the others are its parts
    frames, times = clip.frames[first:].flatten(0, 1), clip.times_seconds[first:].reshape(-1)
    num_shown = min(len(times), MAX_FRAMES_SHOWN) if first else len(times)
    chosen = np.linspace(0, len(times) - 1, num_shown).round().astype(int)
    return {
        "id": uuid.uuid4().hex,
        "video": _file(video),
        "note": note,
        "height": clip.height,
        "width": clip.width,
        "box": [int(side) for side in clip.box],
        "duration": max(clip.duration_seconds, 0.001),
        "times": [float(times[index]) for index in chosen],
        "frames": [_data_uri(frames[int(index)]) for index in chosen],
        "attention": None,
        "vtt": None,
        "segments": [],
    }


def _data_uri(image: Tensor) -> str:
    encoded = base64.b64encode(encode_jpeg(image, quality=85)).decode()
    return f"data:image/jpeg;base64,{encoded}"


def _file(path: Path | None) -> dict[str, Any] | None:
    """What Gradio turns into an address from which the page may load the file."""
    return None if path is None else gr.FileData(path=str(path)).model_dump()
