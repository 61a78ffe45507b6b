"""The tab that names the action in a clip."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from guard import uploaded_file
from player import classified_value, player
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

NUM_TOP = 5
NO_CLASSIFIER = (
    "No model that names actions is loaded: start the demo with `--model` and the run of a probe to recognise actions."
)


@dataclass(frozen=True, kw_only=True)
class Recognise:
    """The handler of the tab."""

    shared: Shared

    async def answer(
        self,
        clip: str | None,
        model: str,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (how Gradio knows that a handler reports)
    ) -> AsyncIterator[tuple[Any, Any, Any]]:
        """Label, timing and player; the player once more when its video had to be converted."""
        path, client = uploaded_file(clip, folder=self.shared.folder), client_of(request)
        try:
            job = self.shared.service.classify(path, model=model, client=client)
            answer = await self.shared.waiting.result_of(job, report=lambda done, words: progress(done, desc=words))
        except Refused as error:
            raise page_error(error) from error
        video, note = start_of(answer.clip, path=path)
        value = await classified_value(answer, video=video, note=note)
        yield dict(answer.scores[:NUM_TOP]), timing_html(answer.seconds), value
        if video is None:
            yield gr.skip(), gr.skip(), await converted(value, path=path, client=client, shared=self.shared)


def build_recognise(shared: Shared) -> None:
    """The components of the tab, and what their buttons do."""
    if not shared.service.classifiers:
        gr.Markdown(NO_CLASSIFIER, elem_id="recognise-empty")
        return
    with gr.Row():
        with gr.Column(min_width=300, scale=2):
            clip = clip_input(shared, prefix="recognise")
            model = model_choice(shared.service.classifiers, prefix="recognise")
            run, cancel = run_buttons("Recognise", prefix="recognise")
            example_row(shared, clip=clip, prefix="recognise")
        with gr.Column(min_width=300, scale=3):
            label = gr.Label(label="Actions", num_top_classes=NUM_TOP, elem_id="recognise-label")
            timing = gr.HTML(elem_id="recognise-timing", elem_classes="flush")
            shown = player(elem_id="recognise-player")
    connect(
        Recognise(shared=shared).answer,
        run=run,
        cancel=cancel,
        clip=clip,
        inputs=[model],
        outputs=[label, timing, shown],
    )
