"""Fixtures of the demo's tests: models on disk, a demo that runs, one whose readers may die, and what predict says."""

import contextlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from coca_video.data.manifest import read_manifest
from tests.app.browser import Visitor, visit
from tests.app.server import FAULTY, Demo, running
from tests.conftest import skip_or_fail

MARKUP = '<img src=x onerror="window.fooled=1">'
CLASSES = (MARKUP, "spin & <b>turn</b>", "pulse", "blink", "change_colour", "none")
# Small, so that a file of a few MB is too large.
LIMITS = ("--max-megabytes", "2", "--max-seconds", "110", "--max-side", "3000", "--max-frames", "3000")

FAKE_CAMERA = ("--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream")

Visit = Callable[..., Visitor]
Predict = Callable[[Sequence[Path], str], dict[str, list[tuple[str, float]]]]


@pytest.fixture(scope="package")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of two classifiers and of a CoCa, by name. The first has markup in its classes, and a sharp look."""
    from tests.serve.models import classifier, coca

    root = tmp_path_factory.mktemp("models")
    probe = classifier(classes=CLASSES).saved
    with torch.no_grad():
        probe.model.get_parameter("head.pooler.query").mul_(5)
    saved = {
        "probe": probe,
        "other": classifier(seed=1, classes=tuple(f"class {letter}" for letter in "abcdefg")).saved,
        "coca": coca().saved,
    }
    for name, model in saved.items():
        model.save(root / name)
    return {name: root / name for name in saved}


@pytest.fixture(scope="package")
def demo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """`python app/demo.py` with all three models and LIMITS."""
    with running(list(models.values()), root=tmp_path_factory.mktemp("demo"), options=LIMITS) as demo:
        yield demo


@pytest.fixture(scope="package")
def faulty_demo(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    """A demo with one classifier whose readers crash, hang for 5 s, eat memory or are slow, by the name of the clip."""
    limits = ("--read-seconds", "5", "--read-megabytes", "300")
    root = tmp_path_factory.mktemp("faulty")
    with running([models["probe"]], root=root, options=limits, program=FAULTY) as demo:
        yield demo


@pytest.fixture(scope="package")
def clips(drawn_clips: Path) -> list[Path]:
    """Ten drawn clips."""
    return [Path(row.path) for row in read_manifest(drawn_clips).rows if row.split == "test"]


@pytest.fixture
def named(clips: list[Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of the first clip under another name."""

    def copy(name: str) -> Path:
        return Path(shutil.copy(clips[0], tmp_path / name))

    return copy


@pytest.fixture(scope="package")
def broken(tmp_path_factory: pytest.TempPathFactory, clips: list[Path]) -> Path:
    """A clip whose second half is missing."""
    path = tmp_path_factory.mktemp("broken") / "broken.mp4"
    content = clips[0].read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.fixture(scope="package")
def predict(models: dict[str, Path]) -> Predict:
    """What `coca-video predict --json` says of clips by a model; an empty list where it says that one is broken."""
    from coca_video.cli.__main__ import main

    def run(paths: Sequence[Path], model: str, *options: str) -> dict[str, list[tuple[str, float]]]:
        out = io.StringIO()
        arguments = [*map(str, paths), "--model", str(models[model]), "--top", "100", "--json", *options]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            main(["predict", *arguments])
        lines: list[dict[str, Any]] = [json.loads(line) for line in out.getvalue().splitlines()]
        return {line["file"]: [(each["label"], each["probability"]) for each in line.get("top", ())] for line in lines}

    return run


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        skip_or_fail("chromium", reason="there is no chromium on the path")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", *FAKE_CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def visiting(browser: Any, demo: Demo) -> Iterator[Visit]:
    """Opens pages, and holds at the end that nothing went wrong on any, and nothing came from another host."""
    visitors: list[Visitor] = []

    def open_page(url: str = demo.url, **options: Any) -> Visitor:
        visitors.append(visit(browser, url=url, **options))
        return visitors[-1]

    yield open_page
    faults = [fault for visitor in visitors for fault in visitor.faults]
    for visitor in visitors:
        visitor.page.context.close()
    assert faults == []
