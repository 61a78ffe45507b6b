"""Who is let in, and what stays of a visit: addresses, the password, uploads, the end of the demo."""

import http.client
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlencode

import pytest

from tests.app.client import API, Reply, ask, call, file_data, post_json, request, upload
from tests.app.server import PRIVATE, REPOSITORY, VERB, Demo, children, running

pytestmark = pytest.mark.drill
PASSWORD = "open sésame"


def listening(port: int) -> set[str]:
    """The local addresses, as Linux writes them, at which someone listens at a port."""
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            if state == "0A" and int(local.split(":")[1], 16) == port:
                found.add(local.split(":")[0])
    return found


def test_other_machines_are_not_let_in_unless_asked(demo: Demo) -> None:
    assert listening(demo.port) == {"0100007F"}  # 127.0.0.1


def written_at_home(demo: Demo) -> list[Path]:
    """Files in the home folder, but for the list of fonts that matplotlib makes when Gradio imports it."""
    return [path for path in demo.home.rglob("*") if path.is_file() and not path.match(".cache/matplotlib/fontlist*")]


def test_nothing_is_written_outside_of_its_folder(demo: Demo, clips: list[Path]) -> None:
    assert ask(demo.url, clips[0])[0] == "complete"
    assert [path.match(PRIVATE) for path in demo.temp.iterdir()] == [True]
    assert demo.folder.stat().st_mode & 0o077 == 0  # nobody else reads it
    assert written_at_home(demo) == [] and [*demo.work.rglob("*")] == []
    written = {path.suffix for path in (REPOSITORY / "app").rglob("*") if path.is_file() and "cache" not in str(path)}
    assert written <= {".py", ".js", ".css", ".md", ".txt"}


@pytest.fixture(scope="module")
def closed_demo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """With a password, and uploads that are kept for three seconds."""
    with running(
        [models["probe"]],
        root=tmp_path_factory.mktemp("closed"),
        options=("--keep-minutes", "0.05", "--num-workers", "1"),
        environment={"COCA_VIDEO_DEMO_PASSWORD": PASSWORD},
    ) as demo:
        yield demo


def login(demo: Demo, password: str) -> Reply:
    return request(f"{demo.url}/login", body=urlencode({"username": "any", "password": password}).encode())


def test_a_password_is_asked_for(closed_demo: Demo, clips: list[Path]) -> None:
    url = closed_demo.url
    assert request(f"{url}/config").status == 401
    assert request(f"{url}/{API}/info").status == 401
    assert upload(url, clips[0]).status == 401
    example = next((closed_demo.folder / "examples").glob("*.mp4"))
    assert request(f"{url}/{API}/file={example}").status == 401
    assert post_json(f"{url}/{API}/call/classify", {"data": [file_data(str(example)), "", 1]}).status == 401
    for wrong in ("", "open", PASSWORD + " ", PASSWORD.upper(), "' or 1=1"):
        reply = login(closed_demo, wrong)
        assert reply.status >= 400 and "set-cookie" not in reply.headers
    page = request(url)
    assert PASSWORD not in page.text and "probe" not in page.text
    assert PASSWORD not in closed_demo.output()


def login_from(host: str, demo: Demo, password: str) -> Reply:
    """From another of the addresses that this machine has, 127.0.0.0/8."""
    connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=60, source_address=(host, 0))
    try:
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        connection.request("POST", "/login", urlencode({"username": "any", "password": password}), headers)
        response = connection.getresponse()
        return Reply(status=response.status, headers=dict(response.getheaders()), body=response.read())
    finally:
        connection.close()


def test_passwords_cannot_be_guessed_one_after_another(closed_demo: Demo) -> None:
    """Ten that fail, within a minute and from an address; one that succeeds is not counted."""
    host = "127.0.0.2"
    tries = [*(f"guess {number}" for number in range(5)), PASSWORD, *(f"other {number}" for number in range(5))]
    assert [login_from(host, closed_demo, word).status for word in tries] == [400] * 5 + [200] + [400] * 5
    for password in ("one more", PASSWORD):
        reply = login_from(host, closed_demo, password)
        assert reply.status == 429 and "Wait a minute" in reply.json()["detail"]
    assert login_from("127.0.0.3", closed_demo, PASSWORD).status == 200


def test_sessions_are_for_those_who_logged_in(closed_demo: Demo) -> None:
    url = f"{closed_demo.url}/{API}"
    cancel = {"session_hash": "s", "fn_index": 0, "event_id": "e"}
    for headers in ({}, {"Cookie": "access-token-x=1; access-token-unsecure-x=2"}):
        assert request(f"{url}/heartbeat/s", headers=headers).status == 401
        assert post_json(f"{url}/cancel", cancel, headers=headers).status == 401
        assert post_json(f"{url}/reset", {"event_id": "e"}, headers=headers).status == 401
    cookie = {"Cookie": login(closed_demo, PASSWORD).headers["set-cookie"].split(";")[0]}
    assert post_json(f"{url}/cancel", cancel, headers=cookie).status == 200
    assert post_json(f"{url}/reset", {"event_id": "e"}, headers=cookie).status == 200
    connection = http.client.HTTPConnection("127.0.0.1", closed_demo.port, timeout=60)
    connection.request("GET", f"/{API}/heartbeat/s", headers=cookie)
    response = connection.getresponse()
    assert response.status == 200 and response.readline() == b"data: ALIVE\n"
    response.close()
    connection.close()


def test_with_the_password_it_answers_and_forgets_in_time(closed_demo: Demo, clips: list[Path]) -> None:
    reply = login(closed_demo, PASSWORD)
    assert reply.status == 200
    cookie = {"Cookie": reply.headers["set-cookie"].split(";")[0]}
    uploaded = upload(closed_demo.url, clips[0], headers=cookie).json()[0]
    kind, answer = call(closed_demo.url, "classify", [file_data(uploaded), "", 1], headers=cookie)
    assert kind == "complete" and len(answer["top"]) == 1
    deadline = time.monotonic() + 60
    while Path(uploaded).exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not Path(uploaded).exists()
    # examples stay, and a later clip is answered
    assert len([*(closed_demo.folder / "examples").glob("*.mp4")]) == 5
    uploaded = upload(closed_demo.url, clips[1], headers=cookie).json()[0]
    assert call(closed_demo.url, "classify", [file_data(uploaded), "", 1], headers=cookie)[0] == "complete"


def assert_gone(demo: Demo, processes: set[int]) -> None:
    """The demo has ended, its processes with it, and left no file."""
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{number}").exists() for number in processes) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [number for number in processes if Path(f"/proc/{number}").exists()] == []
    assert [*demo.temp.iterdir()] == [] and [*demo.work.rglob("*")] == [] and written_at_home(demo) == []
    assert "Traceback" not in demo.output()


def test_sigterm_ends_it_and_all_it_wrote(closed_demo: Demo) -> None:
    """The last of its tests. 128 + 15, as programs end that a signal ended."""
    processes = children(closed_demo.process.pid)
    assert len(processes) >= 1
    assert closed_demo.end(signal.SIGTERM) == 143
    assert_gone(closed_demo, processes)


def test_ctrl_c_ends_the_verb_and_all_it_wrote(models: dict[str, Path], clips: list[Path], tmp_path: Path) -> None:
    with running([models["probe"]], root=tmp_path, options=("--num-workers", "1"), program=VERB) as demo:
        assert ask(demo.url, clips[0])[0] == "complete"
        processes = children(demo.process.pid)
        assert len(processes) >= 1
        assert demo.end(signal.SIGINT) in (0, 130)
        assert_gone(demo, processes)
