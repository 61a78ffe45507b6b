"""How the page looks and is used: About, a phone, light and dark colours, the keyboard alone."""

import re
from pathlib import Path

import numpy as np
import pytest

from tests.app.browser import Visitor
from tests.app.conftest import Visit

pytestmark = pytest.mark.drill
ENOUGH_CONTRAST = 4.5  # WCAG 2.2, 1.4.3


def words(text: str) -> str:
    """Letters and digits, without what Markdown adds."""
    return " ".join(re.findall(r"\w+", text))


def test_about_says_what_the_models_cannot_know(visiting: Visit, models: dict[str, Path]) -> None:
    from coca_video.hub import load
    from coca_video.hub.card import model_limits

    visitor = visiting()
    visitor.open_tab("About")
    for index, name in enumerate(("probe", "other", "coca")):
        text = visitor.page.locator(f"#about-model-{index}").inner_text()
        assert text.startswith(name)
        for line in model_limits(load(str(models[name]))).splitlines():
            assert words(line) in words(text)
    assert "at most 2 MB, 110 seconds, 3,000 frames and 3000 pixels" in visitor.page.locator("#about-demo").inner_text()
    assert visitor.page.evaluate("document.querySelectorAll('img[src=x]').length") == 0
    visitor.save("about")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone(visiting: Visit, clips: list[Path], theme: str) -> None:
    visitor = visiting(size=(360, 740), theme=theme, device_scale_factor=2, is_mobile=True, has_touch=True)
    for tab in ("recognise", "describe", "about"):
        visitor.open_tab(tab.capitalize())
        if tab != "about":
            visitor.choose(clips[1], tab=tab)
            visitor.run(tab=tab)
            visitor.wait_for_video(tab=tab)
            for part in (f"#{tab}-run", f"#{tab}-cancel", f"#{tab}-player canvas", f"#{tab}-player .strip"):
                area = visitor.page.locator(part).bounding_box()
                assert area is not None and area["x"] >= 0 and area["x"] + area["width"] <= 360 and area["width"] > 90
        assert visitor.is_as_wide_as_the_window() and visitor.cut_off() == []
        visitor.save(f"phone_{theme}_{tab}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_can_be_read_on_light_and_dark(visiting: Visit, clips: list[Path], theme: str) -> None:
    visitor = visiting(theme=theme)
    for tab in ("recognise", "describe", "about"):
        visitor.open_tab(tab.capitalize())
        if tab != "about":
            visitor.choose(clips[1], tab=tab)
            visitor.run(tab=tab)
            visitor.wait_for_video(tab=tab)
        visitor.page.wait_for_timeout(500)  # for what fades in
        visitor.save(f"desktop_{theme}_{tab}")
        texts = visitor.contrasts()
        behind = [level for _, _, level in texts]
        assert np.median(behind) < 0.05 if theme == "dark" else np.median(behind) > 0.9
        assert len(texts) > 10
        assert [(round(contrast, 2), text) for contrast, text, _ in texts if contrast < ENOUGH_CONTRAST] == []


def focused(visitor: Visitor) -> str:
    return str(visitor.page.evaluate("document.activeElement.closest('[id^=recognise]')?.id ?? ''"))


def test_the_keyboard_is_enough(visiting: Visit, clips: list[Path]) -> None:
    visitor = visiting()
    keyboard = visitor.page.keyboard
    visitor.choose(clips[0])
    visitor.page.locator("h1").click()
    for _ in range(40):
        keyboard.press("Tab")
        if focused(visitor) == "recognise-run":
            break
    assert focused(visitor) == "recognise-run"
    keyboard.press("Enter")
    visitor.wait_for_answer()
    visitor.wait_for_video()
    visitor.page.focus("#recognise-player input.show-heat")
    before = visitor.page.input_value("#recognise-player input.opacity")
    keyboard.press("Space")
    assert not visitor.page.is_checked("#recognise-player input.show-heat")
    keyboard.press("Tab")
    keyboard.press("ArrowRight")
    assert float(visitor.page.input_value("#recognise-player input.opacity")) == float(before) + 1
    keyboard.press("Tab")
    label = visitor.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("Frame 1 of 4, at 0.25 s, attention ")
    for _ in range(2):
        keyboard.press("Tab")
    keyboard.press("Enter")
    visitor.page.wait_for_function("document.querySelector('#recognise-player video').currentTime > 1")
    assert visitor.video("video.currentTime") == pytest.approx(1.25, abs=0.01)
    outline = visitor.page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # where the focus is, is seen


def test_tabs_are_changed_by_keyboard(visiting: Visit) -> None:
    visitor = visiting()
    visitor.page.get_by_role("tab", name="Recognise", exact=True).focus()
    for _ in range(3):
        if visitor.page.evaluate("document.activeElement.textContent.trim()") == "About":
            break
        visitor.page.keyboard.press("Tab")
    visitor.page.keyboard.press("Enter")
    visitor.page.locator("#about-demo").wait_for(state="visible")
