"""The options of the demo reach the answers: frames, and how many may wait."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.app.client import ask
from tests.app.conftest import Predict
from tests.app.server import FAULTY, Demo, running

pytestmark = pytest.mark.drill
OPTIONS = ["--num-frames", "2", "--num-workers", "1", "--max-waiting", "1", "--read-seconds", "10"]


@pytest.fixture(scope="module")
def small_demo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """One reader, and one place to wait for it."""
    with running([models["probe"]], root=tmp_path_factory.mktemp("small"), options=OPTIONS, program=FAULTY) as demo:
        yield demo


def test_frames_are_those_asked_for(small_demo: Demo, clips: list[Path], predict: Predict) -> None:
    kind, answer = ask(small_demo.url, clips[1])
    assert kind == "complete", answer
    assert answer["frame_times_seconds"] == pytest.approx([0.5, 1.5], abs=0.001)  # the middles of the halves of 2 s
    expected = dict(predict([clips[1]], "probe", "--num-frames", "2")[str(clips[1])])
    assert {each["label"]: each["probability"] for each in answer["top"]} == pytest.approx(
        {each["label"]: expected[each["label"]] for each in answer["top"]}, abs=1e-6
    )
    four = dict(predict([clips[1]], "probe")[str(clips[1])])
    assert expected != pytest.approx(four, abs=1e-4)


def test_who_comes_when_all_places_are_taken_is_told_so(
    small_demo: Demo, clips: list[Path], named: Callable[[str], Path]
) -> None:
    with ThreadPoolExecutor(2) as threads:
        hanging = []
        for number in range(2):  # the first is read, the second waits
            hanging.append(threads.submit(ask, small_demo.url, named(f"hang_{number}.mp4")))
            time.sleep(2)
        kind, event = ask(small_demo.url, clips[0])
        assert kind == "error"
        assert event["error"] == "The server is busy: 1 clip waits already. Try again in a minute."
        assert ["longer than 10 s" in each.result()[1]["error"] for each in hanging] == [True, True]
    assert ask(small_demo.url, clips[0])[0] == "complete"
