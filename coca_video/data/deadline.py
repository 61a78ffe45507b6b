"""A time limit for one clip: a file on which a decoder hangs must not stop a run."""

import threading
from collections.abc import Callable
from typing import TypeVar

from coca_video.data.decode import UnreadableVideo

Result = TypeVar("Result")


def within(seconds: float, function: Callable[[], Result], *, name: str) -> Result:
    """What `function` returns, or UnreadableVideo "<name>: ..." if it takes longer than `seconds`.

    It runs in a thread of its own. One that hangs inside a decoder cannot be stopped, only left behind: it ends with
    the process. Decoders let other threads run meanwhile, so the caller goes on.
    """
    outcome: list[Result] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(function())
        except BaseException as raised:  # noqa: BLE001, it is raised again in the caller's thread
            error.append(raised)

    thread = threading.Thread(target=run, name=f"decode {name}", daemon=True)
    thread.start()
    thread.join(min(seconds, threading.TIMEOUT_MAX))  # which infinity is above
    if thread.is_alive():
        raise UnreadableVideo(f"{name}: reading it takes longer than {seconds:g} s; it was given up")
    if error:
        raise error[0]
    return outcome[0]
