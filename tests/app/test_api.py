"""What programs get: the answers of predict and caption, by gradio_client and by curl, with the types that are told."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.app.client import API, ask, call, file_data, post_json, request, upload
from tests.app.conftest import Predict
from tests.app.server import REPOSITORY, Demo

pytestmark = pytest.mark.slow
README = REPOSITORY / "README.md"
README_URL, README_CLIP = "http://127.0.0.1:7860", "my_clip.mp4"
KINDS = {"string": str, "integer": int, "number": float, "object": dict, "array": list}


@pytest.fixture(scope="module")
def client(demo: Demo) -> Iterator[Any]:
    from gradio_client import Client

    client = Client(demo.url, verbose=False)
    yield client
    client.close()


def send(client: Any, path: Path, *, api_name: str = "/classify", **options: Any) -> Any:
    from gradio_client import handle_file

    return client.predict(handle_file(str(path)), api_name=api_name, **options)


def scores(answer: dict[str, Any]) -> list[tuple[str, float]]:
    return [(each["label"], each["probability"]) for each in answer["top"]]


def assert_equal_scores(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    assert [label for label, _ in found] == [label for label, _ in expected]
    assert [share for _, share in found] == pytest.approx([share for _, share in expected], abs=1e-6)


@pytest.mark.parametrize("model", ["probe", "other"])
def test_classify_says_what_predict_says(client: Any, clips: list[Path], predict: Predict, model: str) -> None:
    expected = predict(clips[:5], model)
    for clip in clips[:5]:
        answer = send(client, clip, model=model, top=100)
        assert answer["model"] == model
        assert_equal_scores(scores(answer), expected[str(clip)])
        assert sum(share for _, share in scores(answer)) == pytest.approx(1.0, abs=1e-6)
        # 16 frames at 8 a second, in four parts of four frames, each seen in its middle
        assert answer["frame_times_seconds"] == pytest.approx([0.25, 0.75, 1.25, 1.75], abs=0.001)
        assert answer["seconds"].keys() == {"wait", "decode", "encode", "pool"}


def test_each_option_of_classify_changes_the_answer(client: Any, clips: list[Path], predict: Predict) -> None:
    by_default = send(client, clips[0])
    assert by_default["model"] == "probe" and len(by_default["top"]) == 5
    assert scores(send(client, clips[0], top=2)) == scores(by_default)[:2]
    other = send(client, clips[0], model="other", top=1)
    assert other["model"] == "other"
    assert_equal_scores(scores(other), predict(clips[:1], "other")[str(clips[0])][:1])


def test_caption_says_what_the_captioner_says(client: Any, clips: list[Path], models: dict[str, Path]) -> None:
    from coca_video.eval.captioning import load_captioner
    from coca_video.models.generate import GenerateConfig

    captioner = load_captioner(
        str(models["coca"]),
        num_frames=8,
        config=GenerateConfig(),
        shorten=True,
        decoder="auto",
        timeout_seconds=60.0,
        device=torch.device("cpu"),
    )
    whole = captioner(clips[1]).text
    one = send(client, clips[1], api_name="/caption")
    assert one["model"] == "coca" and one["caption"] == whole
    assert one["segments"] == [{"start_seconds": 0.0, "end_seconds": pytest.approx(2.0), "caption": whole}]
    three = send(client, clips[1], api_name="/caption", model="coca", num_segments=3)
    assert three["caption"] == whole and len(three["segments"]) == 3
    spans = [(part["start_seconds"], part["end_seconds"]) for part in three["segments"]]
    assert spans == [pytest.approx((2 * k / 3, 2 * (k + 1) / 3)) for k in range(3)]
    assert three["seconds"].keys() == {"wait", "decode", "caption"}


@pytest.mark.parametrize(
    ("endpoint", "options", "sentence"),
    [
        ("classify", ["", 0], "Expected top as a whole number from 1; got 0."),
        ("classify", ["", 1.5], "Expected top as a whole number from 1; got 1.5."),
        ("classify", ["", "two"], "Expected top as a whole number from 1; got two."),
        ("classify", ["coca", 1], "There is no model 'coca' that names actions here; expected one of probe, other."),
        ("caption", ["probe", 1], "There is no model 'probe' that writes captions here; expected one of coca."),
        ("caption", ["", 0], "Expected num_segments from 1 to 8, as a whole number; got 0."),
        ("caption", ["", 9], "Expected num_segments from 1 to 8, as a whole number; got 9."),
    ],
)
def test_options_that_make_no_sense_are_refused_in_a_sentence(
    demo: Demo, clips: list[Path], endpoint: str, options: list[Any], sentence: str
) -> None:
    kind, event = ask(demo.url, clips[0], endpoint=endpoint, options=tuple(options))
    assert kind == "error" and event["error"] == sentence


def info(demo: Demo) -> dict[str, Any]:
    found: dict[str, Any] = request(f"{demo.url}/{API}/info").json()
    return found


def faults_of(value: Any, schema: dict[str, Any], *, place: str = "answer") -> list[str]:
    """Where a value is not of the schema (of JSON Schema what the endpoints use: type, properties, items)."""
    kind = KINDS[schema["type"]]
    if not isinstance(value, kind) or isinstance(value, bool):
        return [f"{place} is {value!r}, no {schema['type']}"]
    if kind is dict:
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        faults = [f"{place} lacks {name}" for name in set(schema.get("required", ())) - set(value)]
        for name, each in value.items():
            inner = known.get(name, others)
            faults += [f"{place}.{name} is not told"] if inner is None else faults_of(each, inner, place=name)
        return faults
    if kind is list:
        return [fault for each in value for fault in faults_of(each, schema["items"], place=f"{place}[]")]
    return []


@pytest.mark.parametrize(
    ("endpoint", "third"), [("/classify", ("top", "integer", 5)), ("/caption", ("num_segments", "integer", 1))]
)
def test_answers_have_the_types_that_are_told(
    demo: Demo, clips: list[Path], endpoint: str, third: tuple[str, str, int]
) -> None:
    told = info(demo)["named_endpoints"][endpoint]
    parameters = [
        (each["parameter_name"], each["type"]["type"], each["parameter_default"]) for each in told["parameters"]
    ]
    assert parameters == [("video", "object", None), ("model", "string", ""), third]
    assert [each["parameter_has_default"] for each in told["parameters"]] == [False, True, True]
    (result,) = told["returns"]
    kind, answer = ask(demo.url, clips[0], endpoint=endpoint.strip("/"), options=("", 3))
    assert kind == "complete"
    assert faults_of(answer, result["type"]) == []
    assert len(told["description"].split()) > 8  # says what it does


def test_a_planted_wrong_type_is_found() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}, "required": ["a"]}
    assert faults_of({"a": [0.5]}, schema) == []
    assert faults_of({}, schema) == ["answer lacks a"]
    assert faults_of({"a": ["x"], "b": 1}, schema) == ["a[] is 'x', no number", "answer.b is not told"]


def test_programs_see_two_endpoints_and_no_more(demo: Demo) -> None:
    told = info(demo)
    assert told["named_endpoints"].keys() == {"/classify", "/caption"}
    assert told["unnamed_endpoints"] == {}
    events = request(f"{demo.url}/config").json()["dependencies"]
    public = [event["api_name"] for event in events if event["api_visibility"] == "public"]
    assert public == ["classify", "caption"]
    others = [event["api_name"] for event in events if event["api_visibility"] != "public" and event["api_name"]]
    assert others  # those of the page
    paths = request(f"{demo.url}/{API}/openapi.json").json()["paths"]
    assert [path for path in paths if path.endswith(("/classify", "/caption"))]
    assert [path for path in paths if path.endswith(tuple(others))] == []


def test_what_does_not_stand_in_line_is_not_answered(demo: Demo, clips: list[Path]) -> None:
    """Gradio's way of asking in one request would wait without a place in the line."""
    path = upload(demo.url, clips[2]).json()[0]
    reply = post_json(f"{demo.url}/{API}/run/classify", {"data": [file_data(path), "", 100]})
    assert reply.status == 404 and "join the queue" in reply.text


@pytest.mark.parametrize(
    "data", [[], [None], ["x", "", 5], [{"path": None}], [[]], [{"path": 7}, "", 5, 6, 7, 8]], ids=str
)
def test_a_request_of_another_form_is_an_error(demo: Demo, data: list[Any]) -> None:
    kind, event = call(demo.url, "classify", data)
    assert kind in ("error", "refused")
    sentence = event["error"] if kind == "error" else event
    assert sentence and "Traceback" not in sentence and str(demo.temp) not in sentence


def example(name: str, *, demo: Demo) -> str:
    """An example of README, which stands behind its mark, with this demo's address."""
    mark = f"<!-- api example: {name} -->"
    parts = README.read_text(encoding="utf-8").split(mark)
    assert len(parts) == 2, f"expected {mark} once in README.md"
    block = re.match(r"\s*^```\w+\n(.*?)^```", parts[1], flags=re.MULTILINE | re.DOTALL)
    assert block is not None, f"expected a block of code behind {mark}"
    assert README_URL in block[1] and README_CLIP in block[1]
    return block[1].replace(README_URL, demo.url)


def run_example(command: list[str], *, clip: Path, folder: Path) -> str:
    (folder / README_CLIP).write_bytes(clip.read_bytes())
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return done.stdout


def test_the_python_of_readme(demo: Demo, clips: list[Path], predict: Predict, tmp_path: Path) -> None:
    out = run_example([sys.executable, "-c", example("python", demo=demo)], clip=clips[3], folder=tmp_path)
    expected = predict(clips[3:4], "probe")[str(clips[3])][:3]
    assert_equal_scores(scores({"top": ast.literal_eval(out.splitlines()[-1])}), expected)


def test_the_shell_commands_of_readme(demo: Demo, clips: list[Path], predict: Predict, tmp_path: Path) -> None:
    out = run_example(["sh", "-eu", "-c", example("curl", demo=demo)], clip=clips[4], folder=tmp_path)
    event, data = out.strip().split("\n")[-2:]
    assert event == "event: complete"
    answer = json.loads(data.removeprefix("data: "))
    answer = answer[0] if isinstance(answer, list) else answer
    assert_equal_scores(scores(answer), predict(clips[4:5], "probe")[str(clips[4])][:3])
