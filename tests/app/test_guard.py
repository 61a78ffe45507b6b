"""Files of app/ without a server: what is counted, whose fault a fault is, turns, addresses, what is kept."""

import asyncio
import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest

from tests.app.client import API
from tests.app.server import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.fixture
def app_module(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A file of app/, by its name."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "app"))
    return importlib.import_module


@pytest.mark.parametrize(
    ("path", "sizes", "ends"),
    [
        (f"/{API}/upload", [2 * 2**20, 1_000_000], None),
        (f"/{API}/upload", [2 * 2**20, 1_000_000, 1], "maximum allowed size"),
        (f"/{API}/queue/join", [3_200_000], None),
    ],
)
def test_what_comes_is_counted(
    app_module: Callable[[str], Any], tmp_path: Path, path: str, sizes: list[int], ends: str | None
) -> None:
    """Whatever the length that a request tells."""
    messages = iter([{"type": "http.request", "body": bytes(size), "more_body": True} for size in sizes])

    async def receive() -> dict[str, Any]:
        return next(messages)

    async def read_all(_: Any, receive: Any, send: Any) -> None:
        for size in sizes:
            assert len((await receive())["body"]) == size

    guard = app_module("guard").Guard(read_all, folder=tmp_path, max_megabytes=2.0)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [(b"content-length", b"9")]}
    asked = guard(scope, receive, receive)
    if ends is None:
        asyncio.run(asked)
    else:
        with pytest.raises(Exception, match=ends):
            asyncio.run(asked)


@pytest.mark.parametrize(("path", "status"), [("call/x", 400), ("run/x", 400), ("queue/join", 400), ("cancel", None)])
def test_faults_of_the_server_are_not_called_the_clients(
    app_module: Callable[[str], Any], tmp_path: Path, path: str, status: int | None
) -> None:
    sent: list[dict[str, Any]] = []

    async def fail(*_: Any) -> None:
        raise KeyError("planted")

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    guard = app_module("guard").Guard(fail, folder=tmp_path, max_megabytes=2.0)
    scope = {"type": "http", "method": "POST", "path": f"/{API}/{path}", "headers": [(b"content-length", b"2")]}
    scope["app"] = SimpleNamespace(auth=None, cookie_id="x", tokens={})
    with contextlib.nullcontext() if status else pytest.raises(KeyError, match="planted"):
        asyncio.run(guard(scope, fail, send))
    assert [message["status"] for message in sent if "status" in message] == ([status] if status else [])


def test_programs_of_an_address_take_turns_as_one(app_module: Callable[[str], Any]) -> None:
    """Gradio names a session for each request that names none."""
    waiting = app_module("waiting")
    asked = [SimpleNamespace(client=SimpleNamespace(host="192.0.2.7"), session_hash=each) for each in ("a", "b")]
    assert len({waiting.program_of(request) for request in asked}) == 1
    assert [waiting.client_of(request).session for request in asked] == ["a", "b"]
    assert {waiting.program_of(request).host for request in asked} == {"192.0.2.7"}


def test_a_program_that_leaves_ends_its_own_jobs_alone(app_module: Callable[[str], Any]) -> None:
    waiting = app_module("waiting").Waiting()
    client = SimpleNamespace(session="192.0.2.7", host="192.0.2.7")

    async def leave_one() -> list[bool]:
        jobs = [Mock(future=Future(), client=client) for _ in range(2)]
        for job in jobs:
            job.cancel = job.future.cancel
        tasks = [
            asyncio.create_task(waiting.result_of(job, session=name)) for job, name in zip(jobs, "ab", strict=True)
        ]
        await asyncio.sleep(0)
        await waiting.leave(SimpleNamespace(session_hash="a"))
        jobs[1].future.set_result(7)
        with pytest.raises(Exception, match="cancelled"):
            await tasks[0]
        assert await tasks[1] == 7
        return [job.future.cancelled() for job in jobs]

    assert asyncio.run(leave_one()) == [True, False]


@pytest.mark.parametrize(
    ("name", "is_here"),
    [("127.0.0.1", True), ("localhost", True), ("0.0.0.0", True), ("192.0.2.1", False), ("a" * 70 + ".x", False)],
)
def test_an_address_of_another_machine_is_a_sentence(
    app_module: Callable[[str], Any], name: str, is_here: bool
) -> None:
    """192.0.2.0/24 is for documentation (RFC 5737)."""
    expected = pytest.raises(ValueError, match=f"^--server-name {name} is no address of this machine.$")
    with contextlib.nullcontext() if is_here else expected:
        app_module("page").check_address(name)


BUILD = """
import sys
from pathlib import Path
from types import SimpleNamespace
import page
from coca_video.serve.limits import Limits

service = SimpleNamespace(classifiers=(), captioners=(), names=(), limits=Limits())
held = page.build(service, folder=Path(sys.argv[1]))._queue.pending_messages_per_session
for number in range(page.MAX_SESSIONS + 5):
    held[str(number)] = number
print(len(held))
"""


def test_gradio_keeps_the_messages_of_few_sessions(tmp_path: Path) -> None:
    """In a process of its own: Gradio leaves event loops open."""
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "app"), "GRADIO_TEMP_DIR": str(tmp_path)}
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "200\n", done.stderr
