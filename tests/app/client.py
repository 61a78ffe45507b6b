"""Requests to a demo by HTTP alone, with nothing of Gradio's on this side."""

import json
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

API = "gradio_api"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The status, the headers in lower case and the body of a response."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode(errors="replace")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


def request(
    url: str, *, body: bytes | None = None, headers: dict[str, str] | None = None, method: str | None = None
) -> Reply:
    """GET, or POST where there is a body, whatever the status; redirects are not followed."""
    asked = urllib.request.Request(url, data=body, headers=headers or {}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect())
    try:
        with opener.open(asked, timeout=120) as response:
            return _reply(response)
    except urllib.error.HTTPError as error:
        with error:
            return _reply(error)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


def _reply(response: Any) -> Reply:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return Reply(status=response.status, headers=headers, body=response.read())


def post_json(url: str, document: Any, *, headers: dict[str, str] | None = None) -> Reply:
    """POST of a JSON document."""
    given = {"Content-Type": "application/json", **(headers or {})}
    return request(url, body=json.dumps(document).encode(), headers=given)


def upload(
    url: str,
    path: Path,
    *,
    name: str | None = None,
    content: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Uploads a file as a form does. name, content: instead of the file's own."""
    boundary = uuid.uuid4().hex
    named = (name if name is not None else path.name).encode()
    head = b'--%s\r\nContent-Disposition: form-data; name="files"; filename="%s"\r\n\r\n' % (boundary.encode(), named)
    body = head + (path.read_bytes() if content is None else content) + b"\r\n--%s--\r\n" % boundary.encode()
    given = {"Content-Type": f"multipart/form-data; boundary={boundary}", **(headers or {})}
    return request(f"{url}/{API}/upload", body=body, headers=given)


def file_data(path: str, **more: Any) -> dict[str, Any]:
    """An uploaded file as endpoints take it."""
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def call(url: str, endpoint: str, data: list[Any], *, headers: dict[str, str] | None = None) -> tuple[str, Any]:
    """Asks an endpoint, and waits; ("complete", its answer) or ("error", what the event says).

    A request that is refused at once is ("refused", its body).
    """
    asked = post_json(f"{url}/{API}/call/{endpoint}", {"data": data}, headers=headers)
    if asked.status != 200:
        return "refused", asked.text
    answer = request(f"{url}/{API}/call/{endpoint}/{asked.json()['event_id']}", headers=headers)
    last = answer.text.strip().split("\n\n")[-1]
    kind, _, document = last.partition("\n")
    value = json.loads(document.removeprefix("data: "))
    return kind.removeprefix("event: "), value[0] if isinstance(value, list) else value


def ask(url: str, path: Path, *, endpoint: str = "classify", options: tuple[Any, ...] = ("", 100)) -> tuple[str, Any]:
    """Uploads a clip and asks an endpoint about it."""
    uploaded = upload(url, path)
    if uploaded.status != 200:
        return "refused", uploaded.text
    return call(url, endpoint, [file_data(uploaded.json()[0]), *options])
