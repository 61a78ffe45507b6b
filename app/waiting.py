"""Waiting for a job of the service, inside Gradio's event loop."""

import asyncio
import html
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import gradio as gr

from coca_video.serve.answers import Refused
from coca_video.serve.fair_queue import Client
from coca_video.serve.service import Job

Answer = TypeVar("Answer")
POLL_SECONDS = 0.1
LAST_RESORT = "Something went wrong on the server. Try again; if it stays so, tell whoever runs this demo."
STOPPED = "The request was cancelled."


class Waiting:
    """Who waits for which jobs. Used in the one thread of Gradio's event loop."""

    def __init__(self) -> None:
        self._jobs: dict[str, set[Job[Any]]] = {}

    async def result_of(
        self, job: Job[Answer], *, report: Callable[[float, str], object] | None = None, session: str | None = None
    ) -> Answer:
        """The job's answer. Whoever stops waiting (cancels, or closes the page) ends the job.

        session: Gradio's, as `leave` is told it; that of the job's client when not given.
        `report` is told the part that is done and a few words, again and again. Raises Refused, also for whatever no
        person can do anything about; that goes to the server's own log.
        """
        future = asyncio.wrap_future(job.future)
        session = job.client.session if session is None else session
        jobs = self._jobs.setdefault(session, set())
        jobs.add(job)
        try:
            while not future.done():
                if report is not None:
                    report(*progress_of(job))
                await asyncio.wait({future}, timeout=POLL_SECONDS)
        finally:
            if not future.done():
                job.cancel()
            jobs.discard(job)
            if not jobs and self._jobs.get(session) is jobs:
                del self._jobs[session]
        if future.cancelled():
            raise Refused(STOPPED)
        error = future.exception()
        if error is not None and not isinstance(error, Refused):
            traceback.print_exception(error)
            raise Refused(LAST_RESORT) from error
        return future.result()

    async def leave(self, request: gr.Request) -> None:
        """Ends the jobs of a page that was closed, which Gradio lets run on."""
        for job in list(self._jobs.get(request.session_hash or "", ())):
            job.cancel()


def progress_of(job: Job[Answer]) -> tuple[float, str]:
    """How far a job is, roughly, and the words for it."""
    position = job.position
    match job.stage:
        case "waiting" if position:
            return 0.05, f"Waiting: {position} {'clip goes' if position == 1 else 'clips go'} first"
        case "waiting":
            return 0.1, "Waiting: next"
        case "reading":
            return 0.3, "Reading the clip"
        case "computing":
            return 0.7, "Asking the model"
        case "done":
            return 1.0, "Done"


def client_of(request: gr.Request) -> Client:
    """The page that asks."""
    host = _host_of(request)
    return Client(session=request.session_hash or host, host=host)


def program_of(request: gr.Request) -> Client:
    """The program that asks. All programs of an address take their turns as one.

    Gradio gives a request that names no session a new one, and a program may name a new one each time.
    """
    host = _host_of(request)
    return Client(session=host, host=host)


def _host_of(request: gr.Request) -> str:
    return request.client.host if request.client is not None else "unknown"


def page_error(error: Refused) -> gr.Error:
    """What the page shows until it is closed. Gradio reads the message as HTML, so it is escaped."""
    return gr.Error(html.escape(str(error), quote=False), duration=None, print_exception=False)


def program_error(error: Refused) -> gr.Error:
    """The same sentence for a program, as it is."""
    return gr.Error(str(error), print_exception=False)
