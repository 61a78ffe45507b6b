"""What of Gradio is open to clients: uploads, the events of this demo, and files in its own folder; nothing else."""

import json
import sys
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.route_utils import FnIndexInferError

# ASGI's, as https://asgi.readthedocs.io names them
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1_000_000  # of anything but an upload: a request names files and options, and no more
# Everything that is loaded comes from this server, whatever a page or an answer says. Gradio evaluates templates.
CONTENT_SECURITY_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; object-src 'none'; base-uri 'self'; form-action 'self'"
)
HEADERS = {
    b"content-security-policy": CONTENT_SECURITY_POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"same-origin",
}
API = "/gradio_api"
# Gradio's server does more than this demo needs: it fetches addresses, cuts recordings with ffmpeg (without a limit),
# edits apps and keeps statistics. What is sent to it goes to these, and what is asked of it to none of the others.
POSTS = ("/login", f"{API}/upload", f"{API}/queue/join", f"{API}/call/", f"{API}/run/", f"{API}/cancel", f"{API}/reset")
CLOSED_OF_API: tuple[str, ...] = (
    *("custom_component", "deep_link", "dev/", "file/", "profiling", "proxy="),
    *("run-history", "runs", "stream/", "undo-vibe", "vibe"),
)
CLOSED = ("/monitoring", "/custom_component", *(f"{API}/{name}" for name in CLOSED_OF_API))
# 30 MB that Gradio's page loads in order to cut a chosen clip, which this page does not offer.
CUTTER = "/static/ffmpeg"

NOT_UPLOADED = "Send the clip as a file: neither an address nor a file that was not uploaded here is opened."
BAD_NAMES = (TypeError, ValueError, KeyError, FnIndexInferError)  # what Gradio raises for endpoints it does not know
BAD_REQUEST = "The request has not the form that this demo expects; its API page shows it."


def uploaded_file(path: str | None, *, folder: Path) -> Path:
    """`path` as a file within the upload folder, links followed. gr.Error, without the path, for any other."""
    if not path:
        raise gr.Error("Choose a clip first.", print_exception=False)
    try:
        resolved = Path(path).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as error:  # not there; a NUL in it; a circle of links
        raise gr.Error(NOT_UPLOADED, print_exception=False) from error
    if not resolved.is_file() or not resolved.is_relative_to(folder.resolve()):
        raise gr.Error(NOT_UPLOADED, print_exception=False)
    return resolved


def check_files(value: Any, *, folder: Path) -> None:
    """Checks every file that a client names anywhere in `value`, before Gradio touches it: it would fetch addresses."""
    match value:
        case Mapping():
            if "path" in value:
                uploaded_file(value["path"] if isinstance(value["path"], str) else "/", folder=folder)
            for each in value.values():
                check_files(each, folder=folder)
        case list() | tuple():
            for each in value:
                check_files(each, folder=folder)


class GuardedBlocks(gr.Blocks):
    """Blocks whose events take no files but those of the upload folder, and say so in a sentence."""

    def __init__(self, *, folder: Path, **options: Any) -> None:
        self.upload_folder = folder
        super().__init__(**options)

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *arguments: Any, **options: Any) -> list[Any]:
        """Gradio's, after a check of ours."""
        check_files(inputs, folder=self.upload_folder)
        try:
            processed: list[Any] = await super().preprocess_data(block_fn, inputs, *arguments, **options)
        except gr.Error:
            raise
        except (ValueError, TypeError, AttributeError) as error:  # too few values, or of another kind
            raise gr.Error(BAD_REQUEST, print_exception=False) from error
        return processed


class Guard:
    """ASGI middleware: refuses what is not of this demo, and adds headers to what is."""

    def __init__(self, app: ASGIApp, *, folder: Path) -> None:
        self.app = app
        self.folder = folder

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        refusal = self._refusal(scope)

        has_started = False

        async def send_with_headers(message: Any) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        if refusal is None:
            try:
                await self.app(scope, receive, send_with_headers)
                return
            except BAD_NAMES as error:
                if has_started:
                    raise
                print(f"A request failed: {error!r}", file=sys.stderr, flush=True)
                refusal = 400, BAD_REQUEST
        status, sentence = refusal
        headers = [(b"content-type", b"application/json")]
        body = json.dumps({"detail": sentence}).encode() if sentence else b""
        await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence, or None for a request that may pass."""
        path = scope["path"]
        if scope["method"] not in ("GET", "HEAD"):
            return self._post_refusal(scope, path)
        if path.startswith(CUTTER):
            return 204, ""
        if path.startswith(CLOSED):
            return 403, "This page is not part of the demo."
        if path.startswith(f"{API}/file="):
            try:
                uploaded_file(path.removeprefix(f"{API}/file="), folder=self.folder)
            except gr.Error:
                return 403, "There is no such file."
        return None

    def _post_refusal(self, scope: Scope, path: str) -> tuple[int, str] | None:
        if scope["method"] == "OPTIONS":
            return None
        if scope["method"] != "POST" or not path.startswith(POSTS):
            return 403, "This request is not part of the demo."
        if path.startswith(f"{API}/upload"):
            return None
        length = dict(scope["headers"]).get(b"content-length", b"")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            return 413, f"A request has at most {MAX_BODY_BYTES} bytes, and says how many; clips are uploaded first."
        return None
