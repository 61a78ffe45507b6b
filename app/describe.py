"""The tab that describes a clip in words."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from guard import uploaded_file
from player import captioned_value, player
from shared import (
    Shared,
    clip_input,
    connect,
    converted,
    example_row,
    model_choice,
    run_buttons,
    start_of,
    timing_html,
)
from waiting import client_of, page_error

from coca_video.serve.answers import Refused

MAX_SEGMENTS = 8
NO_CAPTIONER = (
    "No model that writes captions is loaded: start the demo with `--model` and a CoCa that has its decoder "
    "(the run of a pretraining) to describe clips."
)


@dataclass(frozen=True, kw_only=True)
class Describe:
    """The handler of the tab."""

    shared: Shared

    async def answer(
        self,
        clip: str | None,
        model: str,
        num_segments: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio knows that a handler reports)
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Caption, timing and player; the player once more when its video had to be converted."""
        path, client = uploaded_file(clip, folder=self.shared.folder), client_of(request)
        try:
            segments = checked_segments(num_segments)
            job = self.shared.service.caption(path, model=model, num_segments=segments, client=client)
            answer = await self.shared.waiting.result_of(job, report=lambda done, words: progress(done, desc=words))
        except Refused as error:
            raise page_error(error) from error
        video, note = start_of(answer.clip, path=path)
        value = await captioned_value(answer, video=video, note=note)
        yield answer.caption, timing_html(answer.seconds), value
        if video is None:
            yield gr.skip(), gr.skip(), await converted(value, path=path, client=client, shared=self.shared)


def is_whole(number: Any) -> bool:
    """Whether a number that a client sent is a whole one."""
    return isinstance(number, int | float) and not isinstance(number, bool) and number == number // 1


def checked_segments(num_segments: Any) -> int:
    """A whole number from 1 to MAX_SEGMENTS, or Refused."""
    if not is_whole(num_segments) or not 1 <= num_segments <= MAX_SEGMENTS:
        got = str(num_segments)[:80]
        raise Refused(f"Expected num_segments from 1 to {MAX_SEGMENTS}, as a whole number; got {got}.")
    return int(num_segments)


def build_describe(shared: Shared) -> None:
    """The components of the tab, and what their buttons do."""
    if not shared.service.captioners:
        gr.Markdown(NO_CAPTIONER, elem_id="describe-empty")
        return
    with gr.Row():
        with gr.Column(min_width=300, scale=2):
            clip = clip_input(shared, prefix="describe")
            model = model_choice(shared.service.captioners, prefix="describe")
            segments = gr.Slider(1, MAX_SEGMENTS, value=3, step=1, label="Segments", elem_id="describe-segments")
            run, cancel = run_buttons("Describe", prefix="describe")
            example_row(shared, clip=clip, prefix="describe")
        with gr.Column(min_width=300, scale=3):
            caption = gr.Textbox(label="Caption", interactive=False, lines=2, elem_id="describe-caption")
            timing = gr.HTML(elem_id="describe-timing", elem_classes="flush")
            shown = player(elem_id="describe-player")
    connect(
        Describe(shared=shared).answer,
        run=run,
        cancel=cancel,
        clip=clip,
        inputs=[model, segments],
        outputs=[caption, timing, shown],
    )
