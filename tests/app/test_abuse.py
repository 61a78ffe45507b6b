"""What ill will gets from a demo: a sentence, and no file, address, trace or time of anybody else."""

import http.client
import re
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.app.client import API, Reply, ask, call, file_data, request, upload
from tests.app.server import REPOSITORY, Demo
from tests.data.numbered_videos import encode

pytestmark = pytest.mark.slow
SECRET = Path("/etc/passwd")


@dataclass(kw_only=True)
class Listener:
    """Something else on this machine, that nobody may be made to ask."""

    port: int
    num_calls: int = 0
    threads: list[threading.Thread] = field(default_factory=list)


@pytest.fixture(scope="module")
def listener() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        found = Listener(port=server.getsockname()[1])

        def count() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:  # it is closed
                    return
                found.num_calls += 1
                connection.close()

        thread = threading.Thread(target=count, daemon=True)
        thread.start()
        yield found
        server.shutdown(socket.SHUT_RDWR)
    thread.join()


def assert_discreet(text: str, *, demo: Demo) -> None:
    """Nothing of this machine, and no trace."""
    for word in (str(demo.temp), "/tmp", str(REPOSITORY), "site-packages", "Traceback", 'File "', "root:"):
        assert word not in text, text
    assert not re.search(rf"\b{re.escape(socket.gethostname())}\b", text), text


def raw(
    demo: Demo, path: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: Any = None
) -> Reply:
    """A request whose path goes out as it is written."""
    connection = http.client.HTTPConnection("127.0.0.1", demo.port, timeout=60)
    try:
        connection.putrequest(method, path, skip_accept_encoding=True)
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders(body)
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Reply(status=response.status, headers=found, body=response.read())
    finally:
        connection.close()


def foreign_paths(demo: Demo, uploaded: str, *, models: dict[str, Path]) -> dict[str, str]:
    """Paths of files that were not uploaded, in all the ways there are."""
    link = demo.folder / "link.mp4"
    if not link.is_symlink():
        link.symlink_to(SECRET)
    up = "../" * 12
    return {
        "absolute": str(SECRET),
        "upwards": f"{up}etc/passwd",
        "from the upload": f"{Path(uploaded).parent}/{up}etc/passwd",
        "a link": str(link),
        "NUL behind": f"{SECRET}\0.mp4",
        "NUL": f"{uploaded}\0",
        "folder": str(demo.folder),
        "own environment": "/proc/self/environ",
        "own descriptors": "/proc/self/fd/0",
        "weights": str(models["probe"] / "model.safetensors"),
        "source": str(REPOSITORY / "app" / "demo.py"),
        "file URL": f"file://{SECRET}",
        "not there": f"{demo.folder}/0/0.mp4",
        "long": "/" + "a" * 5000,
    }


@pytest.mark.parametrize("endpoint", ["classify", "caption"])
def test_only_uploads_are_opened(
    demo: Demo, clips: list[Path], models: dict[str, Path], listener: Listener, endpoint: str
) -> None:
    uploaded = upload(demo.url, clips[0]).json()[0]
    paths = foreign_paths(demo, uploaded, models=models)
    address = f"http://127.0.0.1:{listener.port}/clip.mp4"
    documents = [file_data(path) for path in (*paths.values(), address)]
    documents += [file_data("clip.mp4", url=address), file_data(str(SECRET), url=address), {"path": str(SECRET)}]
    documents += [{"url": address, "meta": {"_type": "gradio.FileData"}}, file_data(address, is_stream=True)]
    for document in documents:
        kind, event = call(demo.url, endpoint, [document, "", 1])
        assert kind == "error", document
        assert event["error"] in (
            "Send the clip as a file: neither an address nor a file that was not uploaded here is opened.",
            "Choose a clip first.",
        )
    assert listener.num_calls == 0
    assert call(demo.url, endpoint, [file_data(uploaded), "", 1])[0] == "complete"


def test_an_address_beside_an_upload_is_not_asked(demo: Demo, clips: list[Path], listener: Listener) -> None:
    uploaded = upload(demo.url, clips[0]).json()[0]
    document = file_data(uploaded, url=f"http://127.0.0.1:{listener.port}/clip.mp4")
    kind, answer = call(demo.url, "classify", [document, "", 1])
    assert kind in ("complete", "error") and listener.num_calls == 0
    assert kind == "error" or len(answer["top"]) == 1


def test_the_events_of_the_page_open_uploads_alone(demo: Demo, listener: Listener) -> None:
    events = request(f"{demo.url}/config").json()["dependencies"]
    address = f"http://127.0.0.1:{listener.port}/clip.mp4"
    asked = 0
    for event in events:
        for document in (file_data(str(SECRET)), file_data(address), file_data("x", url=address)):
            if event["api_name"] and event["inputs"]:
                kind, answer = call(demo.url, event["api_name"], [document] * len(event["inputs"]))
                assert kind in ("error", "refused"), (event["api_name"], answer)
                assert_discreet(str(answer), demo=demo)
                asked += 1
    assert asked >= 6 and listener.num_calls == 0


def test_no_other_file_is_given_out(demo: Demo, clips: list[Path], models: dict[str, Path], listener: Listener) -> None:
    uploaded = upload(demo.url, clips[0]).json()[0]
    assert request(f"{demo.url}/{API}/file={uploaded}").body == clips[0].read_bytes()
    paths = [path for path in foreign_paths(demo, uploaded, models=models).values() if "\0" not in path]
    paths += ["%2Fetc%2Fpasswd", "%252Fetc%252Fpasswd", "//etc/passwd", "/./etc/passwd", f"/etc/passwd%00{uploaded}"]
    paths += [f"http://127.0.0.1:{listener.port}/clip.mp4", f"{uploaded}/../../../../../../../../../etc/passwd"]
    for path in paths:
        for start in (f"/{API}/file=", "/file=", f"/{API}/file/", "/file/", "/static/", "/assets/", f"/{API}/stream/"):
            reply = raw(demo, start + path)
            assert reply.status >= 300, (start, path)
            assert_discreet(reply.text.replace(path, ""), demo=demo)
    for path in (f"/{API}/proxy=http://127.0.0.1:{listener.port}/x", f"/proxy=http://127.0.0.1:{listener.port}/x"):
        assert raw(demo, path).status >= 400
    assert listener.num_calls == 0


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"/{API}/runs"),
        ("GET", f"/{API}/dev/reload"),
        ("GET", "/monitoring"),
        ("GET", f"/{API}/deep_link"),
        ("GET", f"/{API}/custom_component/x/client/component/../../x"),
        ("POST", f"/{API}/component_server"),
        ("POST", f"/{API}/process_recording"),
        ("POST", f"/{API}/vibe-edit"),
        ("POST", "/anything"),
        ("PUT", f"/{API}/upload"),
        ("DELETE", "/"),
        ("PATCH", f"/{API}/call/classify"),
    ],
)
def test_what_else_gradio_does_is_closed(demo: Demo, method: str, path: str) -> None:
    reply = raw(demo, path, method=method, headers={"Content-Length": "2"}, body=b"{}")
    assert reply.status == 403 and "not part of the demo" in reply.text
    assert "default-src 'self'" in reply.headers["content-security-policy"]


def test_replies_carry_what_protects_the_page(demo: Demo) -> None:
    for path in ("/", "/config", f"/{API}/info"):
        reply = request(f"{demo.url}{path}")
        assert reply.status == 200
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["referrer-policy"] == "same-origin"
        assert "object-src 'none'" in reply.headers["content-security-policy"]


@pytest.mark.parametrize("name", ["page.html", "picture.svg", "script.js", "page.xhtml", "clip.mp4.html", "page"])
def test_an_uploaded_page_is_not_shown_as_one(demo: Demo, clips: list[Path], name: str) -> None:
    content = b"<html xmlns='http://www.w3.org/1999/xhtml'><script>window.fooled = 1</script></html>"
    reply = upload(demo.url, clips[0], name=name, content=content)
    if reply.status == 200:
        shown = request(f"{demo.url}/{API}/file={reply.json()[0]}")
        kind = shown.headers.get("content-type", "")
        assert (
            shown.status >= 400 or "attachment" in shown.headers.get("content-disposition", "") or kind == "text/plain"
        )


@pytest.mark.parametrize(
    "name",
    [
        "../../evil.mp4",
        "/etc/evil.mp4",
        "..",
        ".",
        "",
        "a/b/evil.mp4",
        "a" * 5000,
        "-rf.mp4",
        "http://evil.mp4",
        "é\r\n.mp4",
    ],
)
def test_a_name_leads_nowhere(demo: Demo, clips: list[Path], name: str) -> None:
    reply = upload(demo.url, clips[0], name=name)
    if reply.status == 200:
        for path in reply.json():
            assert Path(path).resolve().is_relative_to(demo.folder)
            assert ".." not in Path(path).parts
    else:
        assert_discreet(reply.text, demo=demo)
    assert [path.name for path in demo.temp.iterdir()] == [demo.folder.name]


def test_too_large_files_are_refused_and_leave_nothing(demo: Demo, clips: list[Path]) -> None:
    reply = upload(demo.url, clips[0], name="large.mp4", content=bytes(3_000_000))
    assert reply.status == 413
    assert_discreet(reply.text, demo=demo)
    assert [path for path in demo.folder.rglob("*") if path.is_file() and path.stat().st_size > 2_100_000] == []


def test_a_request_is_small_and_says_its_size(demo: Demo) -> None:
    path = f"/{API}/call/classify"
    reply = raw(demo, path, method="POST", headers={"Content-Length": str(10**9)})
    assert reply.status == 413
    assert raw(demo, path, method="POST", headers={"Transfer-Encoding": "chunked"}, body=b"0\r\n\r\n").status == 413
    deep = b'{"data": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    reply = raw(demo, path, method="POST", headers={"Content-Length": str(len(deep))}, body=deep)
    assert reply.status >= 400
    assert_discreet(reply.text, demo=demo)
    assert request(f"{demo.url}/config").status == 200


@pytest.mark.parametrize("disposition", ['name="files"; filename="large.mp4"', 'name="note"'])
def test_an_upload_says_its_size_and_is_bounded(demo: Demo, disposition: str) -> None:
    """A part without a file's name would go into memory. The limit is 2 MB, and another MB for the form."""
    path = f"/{API}/upload"
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    head = f"--x\r\nContent-Disposition: form-data; {disposition}\r\n\r\n"
    body = head.encode() + bytes(4_000_000) + b"\r\n--x--\r\n"
    reply = request(f"{demo.url}{path}", body=body, headers=form)
    assert (reply.status, reply.json()["detail"]) == (413, "A clip has at most 2 MB.")
    for length, status in ((10**9, 413), (2 * 2**20 + 1_000_001, 413), ("-1", 400), ("x", 400)):
        reply = raw(demo, path, method="POST", headers={**form, "Content-Length": str(length)})
        assert reply.status == status, length
    reply = raw(demo, path, method="POST", headers={**form, "Transfer-Encoding": "chunked"}, body=b"0\r\n\r\n")
    assert reply.status == 411 and "Content-Length" in reply.json()["detail"]
    assert [path for path in demo.folder.rglob("*") if path.is_file() and path.stat().st_size > 2_100_000] == []


def test_a_part_that_is_no_file_is_a_sentence(demo: Demo) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="files"\r\n\r\nabc\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x"}
    reply = request(f"{demo.url}/{API}/upload", body=body, headers=headers)
    assert reply.status == 400 and "expects" in reply.text
    assert_discreet(reply.text, demo=demo)


def upload_until(demo: Demo, clip: Path, *, status: int) -> Reply:
    """Uploads again and again, since the size of the folder is looked at from time to time."""
    deadline = time.monotonic() + 60
    reply = upload(demo.url, clip)
    while reply.status != status and time.monotonic() < deadline:
        time.sleep(0.2)
        reply = upload(demo.url, clip)
    return reply


def test_a_full_folder_takes_no_more(demo: Demo, clips: list[Path]) -> None:
    """50 files of the largest size, 2 MB, are its bound. The file here has holes: it needs no disk."""
    fill = demo.folder / "fill.bin"
    with fill.open("wb") as file:
        file.truncate(50 * 2 * 2**20)
    try:
        reply = upload_until(demo, clips[0], status=507)
        assert reply.status == 507 and reply.json()["detail"].startswith("The server has no room for more clips now.")
    finally:
        fill.unlink()
    assert upload_until(demo, clips[0], status=200).status == 200


def png(*, height: int, width: int) -> bytes:
    """A black picture, in few bytes."""
    rows = zlib.compressobj(9)
    packed = b"".join(rows.compress(bytes(1 + 3 * width)) for _ in range(height)) + rows.flush()
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)), (b"IDAT", packed), (b"IEND", b""))
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_bombs_are_told_by_their_header(demo: Demo, tmp_path: Path) -> None:
    black = lambda _: np.zeros((64, 64, 3), np.uint8)  # noqa: E731
    small: dict[str, Any] = {"height": 64, "width": 64, "draw": black}
    bombs = {
        "long.mp4": (encode(tmp_path / "long.mp4", num_frames=3, pts=[0, 1, 30 * 3600], **small), "s long"),
        "many.mp4": (encode(tmp_path / "many.mp4", num_frames=3100, b_frames=0, **small), "3100 frames"),
        "wide.mp4": (
            encode(
                tmp_path / "wide.mp4",
                num_frames=2,
                height=64,
                width=3040,
                draw=lambda _: np.zeros((64, 3040, 3), np.uint8),
            ),
            "3040 x 64 pixels",
        ),
    }
    picture = tmp_path / "picture.png"
    picture.write_bytes(png(height=8000, width=8000))
    bombs["picture.png"] = (picture, "8000 x 8000 pixels")
    for name, (path, says) in bombs.items():
        kind, event = ask(demo.url, path)
        assert kind == "error" and says in event["error"], (name, event)
        assert event["error"].startswith("The clip ") and "this demo takes up to" in event["error"]


def test_what_is_no_video_is_a_discreet_sentence(
    demo: Demo, clips: list[Path], tmp_path: Path, listener: Listener
) -> None:
    whole = clips[0].read_bytes()
    address = f"http://127.0.0.1:{listener.port}/a.ts"
    rng = np.random.default_rng(0)
    contents = {
        "empty.mp4": b"",
        "noise.mp4": rng.bytes(20_000),
        "half.mp4": whole[: len(whole) // 2],
        "head.mp4": whole[:40],
        "text.mp4": b"<html><script>alert(1)</script></html>",
        "list.m3u8": f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n".encode(),
        "list.mp4": f"#EXTM3U\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n".encode(),
        "local.m3u8": f"#EXTM3U\n#EXTINF:1,\n{clips[0]}\n#EXT-X-ENDLIST\n".encode(),
        "concat.mp4": f"ffconcat version 1.0\nfile {clips[0]}\n".encode(),
        "concat.ffconcat": f"ffconcat version 1.0\nfile {address}\n".encode(),
        "picture.svg": f"<svg xmlns='http://www.w3.org/2000/svg'><image href='{address}'/></svg>".encode(),
        "session.sdp": b"v=0\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
        "picture.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
        "http:||evil.mp4": b"x",
    }
    for name, content in contents.items():
        path = tmp_path / name
        path.write_bytes(content)
        kind, event = ask(demo.url, path)
        assert kind == "error", (name, event)
        assert event["error"].startswith("The clip cannot be read: ") and event["error"].endswith("."), (name, event)
        assert_discreet(str(event), demo=demo)
    assert listener.num_calls == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [("crash.mp4", "signal 11"), ("hang.mp4", "longer than 5 s"), ("bomb.mp4", "memory"), ("fail.mp4", "failed")],
)
def test_a_reader_that_dies_is_a_discreet_sentence(
    faulty_demo: Demo, named: Callable[[str], Path], name: str, says: str
) -> None:
    kind, event = ask(faulty_demo.url, named(name))
    assert kind == "error" and says in event["error"] and event["error"].startswith("The clip cannot be read: ")
    assert_discreet(str(event), demo=faulty_demo)
    assert name not in event["error"]
    assert faulty_demo.is_alive and ask(faulty_demo.url, named("good.mp4"))[0] == "complete"
