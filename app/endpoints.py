"""What programs call: /classify and /caption, with typed results."""

from dataclasses import dataclass
from typing import Any, TypedDict

import gradio as gr
from describe import checked_segments, is_whole
from gradio.events import api
from guard import uploaded_file
from shared import Shared
from waiting import program_error, program_of

from coca_video.serve.answers import Refused


class Upload(TypedDict):
    """A file that was uploaded, as gradio_client's handle_file makes it: meta is {"_type": "gradio.FileData"}."""

    path: str
    meta: dict[str, str]


class Scored(TypedDict):
    """A class and its probability."""

    label: str
    probability: float


class ClassifyResult(TypedDict):
    """The most probable classes, first the best, and the times of the frames that were seen.

    seconds: how long "wait", "decode", "encode" and "pool" took.
    """

    model: str
    top: list[Scored]
    frame_times_seconds: list[float]
    seconds: dict[str, float]


class CaptionedPart(TypedDict):
    """A part of the clip."""

    start_seconds: float
    end_seconds: float
    caption: str


class CaptionResult(TypedDict):
    """The caption of the whole clip, and those of its parts. seconds: how long "wait", "decode" and "caption" took."""

    model: str
    caption: str
    segments: list[CaptionedPart]
    seconds: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Endpoints:
    """The handlers."""

    shared: Shared

    async def classify(self, video: Upload, request: gr.Request, model: str = "", top: int = 5) -> ClassifyResult:
        """Names the action in a clip: the `top` most probable classes, by `model` or, where it is empty, the first."""
        path = uploaded_file(_path(video), folder=self.shared.folder)
        service = self.shared.service
        try:
            if not is_whole(top) or top < 1:
                raise Refused(f"Expected top as a whole number from 1; got {str(top)[:80]}.")
            name = _chosen(model, names=service.classifiers, does="names actions")
            job = service.classify(path, model=name, client=program_of(request))
            answer = await self.shared.waiting.result_of(job, session=request.session_hash)
        except Refused as error:
            raise program_error(error) from error
        return {
            "model": answer.model,
            "top": [{"label": label, "probability": share} for label, share in answer.scores[: int(top)]],
            "frame_times_seconds": [float(time) for time in answer.clip.times_seconds.reshape(-1)],
            "seconds": answer.seconds,
        }

    async def caption(
        self, video: Upload, request: gr.Request, model: str = "", num_segments: int = 1
    ) -> CaptionResult:
        """Captions of a clip and of its `num_segments` equal parts, by `model` or, where it is empty, the first."""
        path = uploaded_file(_path(video), folder=self.shared.folder)
        service = self.shared.service
        try:
            segments = checked_segments(num_segments)
            name = _chosen(model, names=service.captioners, does="writes captions")
            job = service.caption(path, model=name, num_segments=segments, client=program_of(request))
            answer = await self.shared.waiting.result_of(job, session=request.session_hash)
        except Refused as error:
            raise program_error(error) from error
        return {
            "model": answer.model,
            "caption": answer.caption,
            "segments": [
                {"start_seconds": part.start_seconds, "end_seconds": part.end_seconds, "caption": part.caption}
                for part in answer.segments
            ],
            "seconds": answer.seconds,
        }


def _path(video: Any) -> str | None:
    """The path that a program sent; types are only told to it, not asked of it."""
    path = video.get("path") if isinstance(video, dict) else None
    return path if isinstance(path, str) else None


def _chosen(model: Any, *, names: tuple[str, ...], does: str) -> str:
    if not names:
        raise Refused(f"No model that {does} is loaded here.")
    if model and model not in names:
        raise Refused(f"There is no model {str(model)[:80]!r} that {does} here; expected one of {', '.join(names)}.")
    return model or names[0]


def build_endpoints(shared: Shared) -> None:
    """The two endpoints; Gradio reads their types off the handlers."""
    handlers = Endpoints(shared=shared)
    api(handlers.classify, api_name="classify", concurrency_limit=None)
    api(handlers.caption, api_name="caption", concurrency_limit=None)
