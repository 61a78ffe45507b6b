"""The page in Chromium: upload, answer, overlay, captions, files that are odd or broken, cancelling."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch

from coca_video.data.decode import open_video, write_video
from tests.app.browser import Visitor
from tests.app.conftest import MARKUP, Predict, Visit
from tests.app.server import Demo
from tests.data.numbered_videos import encode, numbered_frame, rotate

pytestmark = pytest.mark.drill


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, clips: list[Path]) -> Path:
    """The first clip, with as much again at its sides as a model does not see: 48 rows, 96 columns."""
    with open_video(clips[0]) as reader:
        frames = reader.frames(range(reader.num_frames))
    path = tmp_path_factory.mktemp("wide") / "wide.mp4"
    write_video(path, frames=torch.nn.functional.pad(frames, (24, 24), value=90), frames_per_second=8.0, crf=4)
    return path


@pytest.fixture(scope="module")
def attention(models: dict[str, Path], wide: Path) -> np.ndarray:
    """Of the probe for the wide clip [4 6 6]."""
    from coca_video.data.video import load_clip
    from coca_video.eval.predict import load_predictor

    predictor = load_predictor(
        str(models["probe"]), num_frames=None, decoder="auto", timeout_seconds=60.0, device=torch.device("cpu")
    )
    frames = load_clip(wide, config=predictor.clip).frames
    (prediction,) = predictor.predict_frames(frames.unsqueeze(0), attention=True)
    assert prediction.attention is not None
    return prediction.attention.numpy()


def heat(visitor: Visitor) -> Any:
    """The overlay over the wide clip."""
    return visitor.heat(box=(0, 24, 48, 48), height=48, width=96, rows=6, columns=6)


def test_a_clip_gets_its_classes_and_frames(visiting: Visit, clips: list[Path], predict: Predict) -> None:
    visitor = visiting()
    visitor.choose(clips[0])
    visitor.run()
    visitor.wait_for_video()
    expected = predict(clips[:1], "probe")[str(clips[0])][:5]
    assert visitor.labels() == [(label, f"{100 * share:.0f}%") for label, share in expected]
    assert MARKUP in [label for label, _ in visitor.labels()]
    assert visitor.page.evaluate("[window.fooled ?? null, document.querySelectorAll('img[src=x]').length]") == [None, 0]
    frames = visitor.page.locator("#recognise-player .strip button")
    assert frames.all_inner_texts() == ["0.25 s", "0.75 s", "1.25 s", "1.75 s"]
    assert (
        visitor.page.evaluate(
            "[...document.querySelectorAll('#recognise-player .strip img')].map((each) => each.naturalWidth)"
        )
        == [48] * 4
    )
    timing = visitor.page.locator("#recognise-timing").inner_text()
    assert re.findall(r"(\w+) \d+\.\d\d s", timing) == ["waiting", "reading", "encoder", "pooling"]
    visitor.save("desktop_light")


def test_the_overlay_follows_the_attention_while_the_video_plays(
    visiting: Visit, wide: Path, attention: np.ndarray
) -> None:
    visitor = visiting()
    visitor.choose(wide)
    visitor.run()
    visitor.wait_for_video()
    assert visitor.video("[video.videoHeight, video.videoWidth]") == [48, 96]
    levels = np.sqrt(attention / attention.max()).reshape(4, 36)
    seen = []
    for index, time in enumerate((0.25, 0.75, 1.25, 1.75)):
        visitor.seek(time)
        found = heat(visitor)
        assert found["outside"] == 0  # what the model did not see
        inside = np.array(found["inside"]) / 255 / 0.7  # the strength that a player has at first
        assert int(inside.argmax()) == int(levels[index].argmax())
        assert np.corrcoef(inside, levels[index])[0, 1] > 0.9
        assert inside.max() == pytest.approx(levels[index].max(), abs=0.25)  # blurred where it is made larger
        assert (
            visitor.page.locator("#recognise-player .strip button[aria-current=true]").inner_text() == f"{time:.2f} s"
        )
        seen.append(found["inside"])
    visitor.seek(0.0)
    visitor.video("video.play()")
    visitor.page.wait_for_function("document.querySelector('#recognise-player video').currentTime > 0.9")
    assert heat(visitor)["inside"] not in (seen[0], [0] * 36)  # it has moved on, by itself


def test_the_overlay_is_switched_off_and_made_weaker(visiting: Visit, wide: Path) -> None:
    visitor = visiting()
    visitor.choose(wide)
    visitor.run()
    visitor.wait_for_video()
    visitor.seek(0.75)
    strong = heat(visitor)
    visitor.page.fill("#recognise-player input.opacity", "35")
    weak = heat(visitor)
    assert max(weak["inside"]) == pytest.approx(max(strong["inside"]) / 2, abs=3)
    visitor.page.uncheck("#recognise-player input.show-heat")
    assert heat(visitor)["most"] == 0
    visitor.page.check("#recognise-player input.show-heat")
    assert heat(visitor) == weak
    # what a person has set outlives the answer
    visitor.page.uncheck("#recognise-player input.show-heat")
    visitor.page.click("#recognise-run")
    visitor.page.wait_for_timeout(500)
    visitor.wait_for_answer()
    assert not visitor.page.is_checked("#recognise-player input.show-heat") and heat(visitor)["most"] == 0


def test_captions_are_subtitles_of_the_player(visiting: Visit, clips: list[Path], demo: Demo) -> None:
    from tests.app.client import ask

    kind, expected = ask(demo.url, clips[1], endpoint="caption", options=("", 3))
    assert kind == "complete"
    visitor = visiting()
    visitor.open_tab("Describe")
    visitor.choose(clips[1], tab="describe")
    visitor.run(tab="describe")
    visitor.wait_for_video(tab="describe")
    shown = visitor.page.locator("#describe-caption textarea").input_value()
    assert shown.split() == expected["caption"].split()
    visitor.page.wait_for_function("document.querySelector('#describe-player video').textTracks[0].cues?.length === 3")
    cues = visitor.video(
        "[...video.textTracks[0].cues].map((cue) => [cue.startTime, cue.endTime, cue.text])", tab="describe"
    )
    assert visitor.video("video.textTracks[0].mode", tab="describe") == "showing"
    for cue, part in zip(cues, expected["segments"], strict=True):
        assert cue[:2] == pytest.approx([part["start_seconds"], part["end_seconds"]], abs=0.001)
        assert visitor.page.evaluate(
            "(text) => { const area = document.createElement('textarea'); area.innerHTML = text; return area.value; }",
            cue[2],
        ).split() == expected_line(part["caption"])
    visitor.page.locator("#describe-player .segments button").nth(1).click()
    visitor.page.wait_for_function("document.querySelector('#describe-player video').currentTime > 0.6")
    assert visitor.video("video.currentTime", tab="describe") == pytest.approx(2 / 3, abs=0.01)
    visitor.save("describe")


def expected_line(caption: str) -> list[str]:
    """The words of a caption as a subtitle shows them: control characters are spaces."""
    return "".join(" " if ord(letter) < 32 or 127 <= ord(letter) < 160 else letter for letter in caption).split()


def test_a_broken_file_is_a_sentence_and_no_old_answer_stays(
    visiting: Visit, clips: list[Path], broken: Path, demo: Demo
) -> None:
    visitor = visiting()
    visitor.choose(clips[0])
    visitor.run()
    visitor.clear()
    visitor.page.wait_for_selector("#recognise-player .strip", state="detached")
    assert visitor.labels() == []
    visitor.page.click("#recognise-run")
    assert visitor.error() == "Choose a clip first."
    visitor.choose(broken)
    visitor.page.click("#recognise-run")
    visitor.page.wait_for_selector("[data-testid=toast-body]")
    visitor.save("error")
    sentence = visitor.error()
    assert sentence.startswith("The clip cannot be read: ") and sentence.endswith(".")
    assert str(demo.temp) not in sentence and "broken.mp4" not in sentence and "\n" not in sentence
    assert visitor.labels() == []
    visitor.clear()
    visitor.choose(clips[0])
    visitor.run()
    assert len(visitor.labels()) == 5


def test_a_file_that_is_too_large_is_a_sentence(visiting: Visit, clips: list[Path], tmp_path: Path) -> None:
    large = tmp_path / "large.mp4"
    large.write_bytes(clips[0].read_bytes() + bytes(2_200_000))
    visitor = visiting()
    visitor.expected_fault = "^Response$"  # Gradio's script throws the reply to its upload
    visitor.page.set_input_files("#recognise-clip input[type=file]", large)
    assert re.search(r"maximum allowed size|at most|up to", visitor.error())
    visitor.choose(clips[0])
    visitor.run()
    assert len(visitor.labels()) == 5


def test_a_clip_of_too_many_pixels_is_a_sentence(visiting: Visit, tmp_path: Path) -> None:
    """Its file is small: the service refuses it, not the upload."""
    path = encode(
        tmp_path / "wide.mp4", num_frames=2, height=64, width=3040, draw=lambda _: np.zeros((64, 3040, 3), np.uint8)
    )
    visitor = visiting()
    visitor.choose(path)
    visitor.page.click("#recognise-run")
    assert "3040 x 64 pixels; this demo takes up to 3000 pixels on the longer side" in visitor.error()


@pytest.mark.parametrize(("name", "codec"), [("old.avi", "mpeg4"), ("phone.mp4", "libx265")])
def test_what_a_browser_does_not_play_is_played_all_the_same(
    visiting: Visit, tmp_path: Path, name: str, codec: str
) -> None:
    path = tmp_path / name
    if codec not in av.codecs_available:
        pytest.skip(f"PyAV has no {codec} here")
    encode(path, codec=codec, b_frames=0, options={"x265-params": "log-level=none"} if codec == "libx265" else {})
    with open_video(path) as reader:
        size, duration = [reader.height, reader.width], reader.duration_seconds
    visitor = visiting()
    visitor.choose(path)
    visitor.run()
    assert len(visitor.labels()) == 5
    visitor.wait_for_video()
    assert visitor.video("[video.videoHeight, video.videoWidth]") == size
    assert visitor.video("video.duration") == pytest.approx(duration, abs=0.1)
    visitor.video("video.play()")
    visitor.page.wait_for_function("document.querySelector('#recognise-player video').currentTime > 0.3")
    assert visitor.page.locator("#recognise-player .note").count() == 0  # no word of a conversion is left


def test_a_turned_clip_stands_upright(visiting: Visit, tmp_path: Path) -> None:
    path = tmp_path / "turned.mp4"
    shown = lambda number: numbered_frame(number, height=128, width=64)  # noqa: E731
    encode(path, height=64, width=128, draw=lambda number: np.ascontiguousarray(np.rot90(shown(number), -1)))
    rotate(path, a=0, b=-1, c=1, d=0)
    with open_video(path) as reader:
        assert (reader.height, reader.width) == (128, 64)
    visitor = visiting()
    visitor.choose(path)
    visitor.run()
    visitor.wait_for_video()
    assert visitor.video("[video.videoHeight, video.videoWidth]") == [128, 64]
    height, width = visitor.video("[video.clientHeight, video.clientWidth]")
    assert height / width == pytest.approx(2.0, abs=0.02)
    found = visitor.heat(box=(32, 0, 64, 64), height=128, width=64, rows=6, columns=6)
    assert found["outside"] == 0 and max(found["inside"]) > 0


def test_the_chosen_model_answers(visiting: Visit, clips: list[Path], predict: Predict) -> None:
    visitor = visiting()
    visitor.choose(clips[0])
    visitor.page.click("#recognise-model input")
    visitor.page.get_by_role("option", name="other").click()
    visitor.run()
    expected = predict(clips[:1], "other")[str(clips[0])][:5]
    assert visitor.labels() == [(label, f"{100 * share:.0f}%") for label, share in expected]


def test_an_example_is_one_click_and_an_answer_another(visiting: Visit) -> None:
    visitor = visiting()
    visitor.page.locator("#recognise-examples button").first.click()
    visitor.page.wait_for_selector("#recognise-clip video")
    visitor.run()
    visitor.wait_for_video()
    assert len(visitor.labels()) == 5
    visitor.seek(1.1)
    visitor.save("example")


def test_a_recording_of_the_camera_is_answered(visiting: Visit) -> None:
    """What a browser records is WebM without a duration."""
    visitor = visiting(permissions=["camera", "microphone"])
    visitor.page.locator("#recognise-clip .source-selection button").nth(1).click()
    visitor.page.locator("#recognise-clip [aria-label*=webcam i], #recognise-clip [title*=access i]").first.click()
    record = visitor.page.locator("#recognise-clip .button-wrap button").first
    record.click()
    visitor.page.wait_for_timeout(1500)
    record.click()
    visitor.page.wait_for_selector("#recognise-clip video[src*='/file=']")  # it is uploaded
    visitor.run()
    assert len(visitor.labels()) == 5
    visitor.wait_for_video()


def test_a_job_is_cancelled_and_the_next_is_answered(
    visiting: Visit, faulty_demo: Demo, named: Callable[[str], Path], clips: list[Path], predict: Predict
) -> None:
    visitor = visiting(url=faulty_demo.url)
    visitor.choose(named("hang.mp4"))
    visitor.page.click("#recognise-run")
    visitor.page.get_by_text("Reading the clip").wait_for()
    visitor.page.click("#recognise-cancel")
    visitor.page.get_by_text("Reading the clip").wait_for(state="detached")
    assert visitor.page.locator("#recognise-player .strip").count() == 0
    visitor.clear()
    visitor.choose(clips[0])
    visitor.run()
    expected = predict(clips[:1], "probe")[str(clips[0])][:5]
    assert [label for label, _ in visitor.labels()] == [label for label, _ in expected]
    assert visitor.page.locator("[data-testid=toast-body]").count() == 0  # whoever cancels is told of no error


@pytest.mark.parametrize(
    ("name", "says"), [("crash.mp4", "signal 11"), ("hang.mp4", "longer than 5 s"), ("bomb.mp4", "memory")]
)
def test_a_clip_that_kills_its_reader_is_a_sentence(
    visiting: Visit, faulty_demo: Demo, named: Callable[[str], Path], name: str, says: str
) -> None:
    visitor = visiting(url=faulty_demo.url)
    visitor.choose(named(name))
    visitor.page.click("#recognise-run")
    sentence = visitor.error()
    assert sentence.startswith("The clip cannot be read: ") and says in sentence


def test_without_a_captioner_the_page_says_what_is_missing(visiting: Visit, faulty_demo: Demo) -> None:
    visitor = visiting(url=faulty_demo.url)
    visitor.open_tab("Describe")
    assert "No model that writes captions is loaded" in visitor.page.locator("#describe-empty").inner_text()
