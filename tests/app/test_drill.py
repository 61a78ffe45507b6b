"""The demo under load: many clients with a fifth of broken files, every odd clip twice, readers that die meanwhile."""

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coca_video.data.clip_files import clip_files
from tests.app.client import ask, request
from tests.app.conftest import Predict
from tests.app.server import Demo, children, resident_bytes, running

pytestmark = pytest.mark.drill
NUM_CLIENTS = 5
# What a second pass over the same clips may add: allocators and caches of decoders fill up a little more.
GROWTH_BYTES = 60e6


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One request: its file, what came back, and the wall time from the upload to the answer."""

    path: Path
    kind: str
    answer: Any
    seconds: float


@pytest.fixture(scope="module")
def open_demo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """With the limits that a demo has when none are given."""
    with running([models["probe"]], root=tmp_path_factory.mktemp("open")) as demo:
        yield demo


@pytest.fixture(scope="module")
def real_clips(data_folder: Path) -> list[Path]:
    """Every clip of the data folder's clips/."""
    folder = data_folder / "clips"
    found = [folder / path for path in clip_files(folder)]
    assert len(found) > 20
    return found


def ask_timed(demo: Demo, path: Path) -> Asked:
    started = time.monotonic()
    kind, answer = ask(demo.url, path)
    return Asked(path=path, kind=kind, answer=answer, seconds=time.monotonic() - started)


def ask_at_once(demo: Demo, shares: Sequence[Sequence[Path]]) -> list[Asked]:
    """Each client asks for its share, one after another; all clients at once."""
    with ThreadPoolExecutor(len(shares)) as threads:
        return [*itertools.chain(*threads.map(lambda share: [ask_timed(demo, path) for path in share], shares))]


def assert_as_predicted(asked: Asked, *, expected: Sequence[tuple[str, float]]) -> None:
    assert asked.kind == "complete", asked
    top = asked.answer["top"]
    assert [each["label"] for each in top] == [label for label, _ in expected]
    assert [each["probability"] for each in top] == pytest.approx([share for _, share in expected], abs=1e-6)


def assert_sentence(asked: Asked) -> None:
    assert asked.kind == "error", asked
    sentence = asked.answer["error"]
    assert sentence.startswith("The clip ") and sentence.endswith(".") and "\n" not in sentence
    assert str(asked.path) not in sentence and "/tmp" not in sentence


def report(text: str, *, capsys: pytest.CaptureFixture[str]) -> None:
    with capsys.disabled():
        print(f"\n{text}")


def times(asked: Sequence[Asked]) -> str:
    p50, p95 = np.percentile([each.seconds for each in asked], [50, 95])
    return f"{len(asked)} requests: p50 {p50:.3f} s, p95 {p95:.3f} s"


def test_twenty_uploads_by_five_clients_a_fifth_broken(
    open_demo: Demo, real_clips: list[Path], predict: Predict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = predict(real_clips, "probe")
    good = [path for path in real_clips if expected[str(path)]][:16]
    assert len(good) == 16
    broken = []
    for path in good[:4]:
        broken.append(tmp_path / path.name)
        broken[-1].write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert all(not scores for scores in predict(broken, "probe").values())
    ask_timed(open_demo, good[0])  # the processes are warm
    uploads = [each for start in range(4) for each in (*good[4 * start : 4 * start + 4], broken[start])]
    shares = [uploads[client::NUM_CLIENTS] for client in range(NUM_CLIENTS)]
    asked = ask_at_once(open_demo, shares)
    assert len(asked) == 20
    for each in asked:
        if each.path in broken:
            assert_sentence(each)
        else:
            assert_as_predicted(each, expected=expected[str(each.path)])
    assert open_demo.is_alive and request(open_demo.url).status == 200
    report(f"five clients at once, a fifth broken, {times(asked)}", capsys=capsys)


def test_every_clip_twice_and_memory_stays(
    open_demo: Demo, real_clips: list[Path], predict: Predict, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = predict(real_clips, "probe")
    processes = children(open_demo.process.pid)
    resident = []
    for _ in range(2):
        for path in real_clips:
            asked = ask_timed(open_demo, path)
            if expected[str(path)]:
                assert_as_predicted(asked, expected=expected[str(path)])
            else:
                assert_sentence(asked)
        resident.append(resident_bytes(open_demo))
    assert open_demo.is_alive and children(open_demo.process.pid) == processes  # no clip ended its reader
    first, second = resident
    for process, held in second.items():
        assert held <= first[process] + GROWTH_BYTES
    growth = sum(second.values()) - sum(first.values())
    report(
        f"{len(real_clips)} clips twice: {sum(first.values()) / 1e6:.0f} MB after the first pass, "
        f"{growth / 1e6:+.1f} MB after the second",
        capsys=capsys,
    )


def test_readers_that_die_disturb_nobody_else(
    faulty_demo: Demo,
    clips: list[Path],
    named: Callable[[str], Path],
    predict: Predict,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = predict(clips, "probe")
    says = {"crash": "signal 11", "hang": "longer than 5 s", "bomb": "memory", "fail": "failed"}
    bad = [named(f"{fault}_{number}.mp4") for number in range(2) for fault in says]
    shares = [bad[:4], bad[4:], clips[:4], clips[4:7], clips[7:]]
    asked = ask_at_once(faulty_demo, shares)
    for each in asked:
        if each.path in bad:
            assert_sentence(each)
            assert says[each.path.stem.split("_")[0]] in each.answer["error"]
        else:
            assert_as_predicted(each, expected=expected[str(each.path)])
    assert faulty_demo.is_alive
    again = ask_at_once(faulty_demo, [clips[:5], clips[5:]])
    for each in again:
        assert_as_predicted(each, expected=expected[str(each.path)])
    report(f"while readers die, {times([each for each in asked if each.path not in bad])}", capsys=capsys)
