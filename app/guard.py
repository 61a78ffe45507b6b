"""What of Gradio is open to clients: uploads, the events of this demo, and files in its own folder; nothing else."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.route_utils import FnIndexInferError
from starlette.formparsers import MultiPartException
from starlette.requests import Request
from sweep import MAX_UPLOADS, Room

# ASGI's, as https://asgi.readthedocs.io names them
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY_BYTES = 1_000_000  # of anything but an upload: a request names files and options, and no more
MAX_FORM_BYTES = 1_000_000  # of an upload, beside the file
MAX_LOGINS = 10  # that fail, of a host within LOGIN_SECONDS
LOGIN_SECONDS = 60.0
DRAIN_SECONDS = 60.0
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
LOGIN, UPLOAD = "/login", f"{API}/upload"
POSTS = (LOGIN, UPLOAD, f"{API}/queue/join", f"{API}/call/", f"{API}/run/", f"{API}/cancel", f"{API}/reset")
CLOSED_OF_API: tuple[str, ...] = (
    *("custom_component", "deep_link", "dev/", "file/", "profiling", "proxy="),
    *("run-history", "runs", "stream/", "undo-vibe", "vibe"),
)
# What Gradio answers to those who have not logged in, too, though it is about the sessions of those who have.
OF_SESSIONS = tuple(f"{API}/{name}" for name in ("heartbeat", "cancel", "reset"))
CLOSED = ("/monitoring", "/custom_component", *(f"{API}/{name}" for name in CLOSED_OF_API))
# 30 MB that Gradio's page loads in order to cut a chosen clip, which this page does not offer.
CUTTER = "/static/ffmpeg"

NOT_UPLOADED = "Send the clip as a file: neither an address nor a file that was not uploaded here is opened."
# What Gradio raises for endpoints it does not know, and for a form whose file is none; elsewhere they are our faults.
BAD_NAMES = (TypeError, ValueError, KeyError, FnIndexInferError)
NAMING = (UPLOAD, f"{API}/call/", f"{API}/run/", f"{API}/queue/join")
BAD_REQUEST = "The request has not the form that this demo expects; its API page shows it."
FULL = "The server has no room for more clips now. Try again later: clips are deleted after a while."


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


class Logins:
    """Who failed to log in, and when. Used in the one thread of the server's event loop."""

    def __init__(self) -> None:
        self._tries: dict[str, list[float]] = {}

    def start(self, host: str) -> bool:
        """False for a host that has to wait. Else its try counts as failed until `succeed`: many may go on at once."""
        now = time.monotonic()
        recent = {name: [at for at in tries if now - at < LOGIN_SECONDS] for name, tries in self._tries.items()}
        self._tries = {name: tries for name, tries in recent.items() if tries}
        if len(self._tries.get(host, ())) >= MAX_LOGINS:
            return False
        self._tries.setdefault(host, []).append(now)
        return True

    def succeed(self, host: str) -> None:
        """One of the host's tries did not fail."""
        if self._tries.get(host):
            self._tries[host].pop()


def is_let_in(scope: Scope) -> bool:
    """Whether no password is asked for, or a request carries a cookie that Gradio gave for it."""
    app = scope["app"]
    cookies = Request(scope).cookies
    names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
    return app.auth is None or any(cookies.get(name) in app.tokens for name in names)


def length_of(scope: Scope) -> int | None:
    """How many bytes a request says that it has."""
    length = dict(scope["headers"]).get(b"content-length", b"")
    return int(length) if length.isdigit() and len(length) < 20 else None


class Guard:
    """ASGI middleware: refuses what is not of this demo, and adds headers to what is. max_megabytes: of a clip."""

    def __init__(self, app: ASGIApp, *, folder: Path, max_megabytes: float) -> None:
        self.app = app
        self.folder = folder
        self.max_megabytes = max_megabytes
        max_bytes = int(max_megabytes * 2**20)
        self.max_upload_bytes = max_bytes + MAX_FORM_BYTES
        self.room = Room(folder, max_bytes=MAX_UPLOADS * max_bytes)
        self.logins = Logins()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path, has_started = scope["path"], False

        async def send_with_headers(message: Any) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
                if path.startswith(LOGIN) and message["status"] < 400:
                    self.logins.succeed(host_of(scope))
            await send(message)

        if path.startswith(UPLOAD):
            await self.room.measure()
        refusal = self._refusal(scope)
        if refusal is not None:
            await self._refuse(refusal, send=send_with_headers, rest=receive if path.startswith(UPLOAD) else None)
            return
        try:
            counted = self._counting(receive) if path.startswith(UPLOAD) else receive
            await self.app(scope, counted, send_with_headers)
        except BAD_NAMES as error:
            if has_started or not path.startswith(NAMING):
                raise
            print(f"A request failed: {error!r}", file=sys.stderr, flush=True)
            await self._refuse((400, BAD_REQUEST), send=send_with_headers, rest=None)

    async def _refuse(self, refusal: tuple[int, str], *, send: Send, rest: Receive | None) -> None:
        """Answers. rest: of the request, to be read: a browser that sends a file reads no answer before its end."""
        status, sentence = refusal
        body = json.dumps({"detail": sentence}).encode() if sentence else b""
        headers = [(b"content-type", b"application/json")]
        if status != 204:  # which has no body
            headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        if rest is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(_drain(rest, max_bytes=4 * self.max_upload_bytes), DRAIN_SECONDS)
        await send({"type": "http.response.body", "body": b""})

    def _counting(self, receive: Receive) -> Receive:
        """`receive` of an upload, which ends it when it is too large. Gradio deletes what it has, and answers."""
        num_bytes = 0

        async def receive_some() -> MutableMapping[str, Any]:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            if num_bytes > self.max_upload_bytes:
                raise MultiPartException(f"{self._too_large()} That is the maximum allowed size.")
            if not self.room.has(size):
                raise MultiPartException(FULL)
            self.room.take(size)
            return message

        return receive_some

    def _too_large(self) -> str:
        return f"A clip has at most {self.max_megabytes:g} MB."

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        """Status and sentence, or None for a request that may pass."""
        path = scope["path"]
        if path.startswith(OF_SESSIONS) and not is_let_in(scope):
            return 401, "Log in first."
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
        length = length_of(scope)
        if path.startswith(UPLOAD):
            return self._upload_refusal(length)
        if length is None or length > MAX_BODY_BYTES:
            return 413, f"A request has at most {MAX_BODY_BYTES} bytes, and says how many; clips are uploaded first."
        if path.startswith(LOGIN) and not self.logins.start(host_of(scope)):
            return 429, "Too many wrong passwords came from this address. Wait a minute, and try again."
        return None

    def _upload_refusal(self, length: int | None) -> tuple[int, str] | None:
        if length is None:
            return 411, f"An upload says how many bytes it has (Content-Length). {self._too_large()}"
        if length > self.max_upload_bytes:
            return 413, self._too_large()
        if not self.room.has(length):
            return 507, FULL
        return None


def host_of(scope: Scope) -> str:
    """The address that a request comes from."""
    client = scope.get("client")
    return str(client[0]) if client else "unknown"


async def _drain(receive: Receive, *, max_bytes: int) -> None:
    """Reads the rest of a request, and keeps nothing of it."""
    num_bytes = 0
    while num_bytes <= max_bytes:
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if message["type"] != "http.request" or not message.get("more_body", False):
            return
