"""The page that says what the models can and cannot know, and what the demo does with clips."""

import re

import gradio as gr
from shared import Shared

from coca_video.hub.card import measured_table, model_facts, model_limits
from coca_video.serve.models import ServedModel


def build_about(shared: Shared) -> None:
    """A section for each model, then one for the demo."""
    for index, name in enumerate(shared.service.names):
        gr.Markdown(model_text(shared.service.model(name)), elem_id=f"about-model-{index}", elem_classes="about")
    gr.Markdown(demo_text(shared), elem_id="about-demo", elem_classes="about")


def model_text(model: ServedModel) -> str:
    """What a model is, what was measured, and what it cannot know, as Markdown."""
    data = "unknown: no run lies beside it" if model.trained_on is None else plain(model.trained_on)
    return (
        f"## {plain(model.name)}\n\n{model_facts(model.saved)}\n- Trained on: {data}.\n\n"
        f"### Measured\n\n{measured_table(model.measurements)}\n\n"
        f"### What it cannot know\n\n{model_limits(model.saved)}"
    )


def demo_text(shared: Shared) -> str:
    """What a clip may be, and what happens to it."""
    limits = shared.service.limits
    return (
        "## This demo\n\n"
        f"- A clip has at most {limits.max_megabytes:g} MB, {limits.max_seconds:g} seconds, {limits.max_frames:,} "
        f"frames and {limits.max_side} pixels on its longer side. Programs may send pictures, as clips of one frame.\n"
        f"- Reading it may take {limits.read_seconds:g} seconds and {limits.read_megabytes:g} MB of memory.\n"
        f"- Clips are not kept: they are deleted {shared.keep_minutes:g} minutes after they came, and when the demo "
        "ends.\n"
        "- The heat map shows the weights with which the model's one query reads each place of each frame. It tells "
        "what was read, not why an action was named.\n"
        "- Programs use the endpoints `/classify` and `/caption`: see *Use via API* at the foot of the page."
    )


def plain(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return re.sub(r"([^\w\s/-])", r"\\\1", text)
