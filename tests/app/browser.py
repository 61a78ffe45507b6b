"""A visitor with a real browser: what the page says, what the player draws, and what went wrong meanwhile."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, ConsoleMessage, Page

SCREENSHOTS = os.environ.get("COCA_VIDEO_SCREENSHOTS")
PATIENCE = 60_000  # milliseconds that no step here comes near
HEADER = {"light": "?__theme=light", "dark": "?__theme=dark"}

# How opaque the overlay is at the middle of each place, row by row, in the box that the model saw; and the largest
# outside of that box.
HEAT = """([tab, box, height, width, rows, columns]) => {
  const canvas = document.querySelector(`#${tab}-player canvas`);
  const pixels = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  const alpha = (x, y) => pixels[4 * (Math.floor(y) * canvas.width + Math.floor(x)) + 3];
  const [top, left, boxHeight, boxWidth] = box;
  const [scaleX, scaleY] = [canvas.width / width, canvas.height / height];
  const inside = [];
  for (let row = 0; row < rows; row++) for (let column = 0; column < columns; column++) inside.push(
    alpha((left + boxWidth * (column + 0.5) / columns) * scaleX, (top + boxHeight * (row + 0.5) / rows) * scaleY));
  let outside = 0, most = 0;
  for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
    most = Math.max(most, alpha(x, y));
    const isInside = x >= left * scaleX - 1 && x <= (left + boxWidth) * scaleX + 1
      && y >= top * scaleY - 1 && y <= (top + boxHeight) * scaleY + 1;
    if (!isInside) outside = Math.max(outside, alpha(x, y));
  }
  return { inside, outside, most };
}"""
# The contrast (WCAG 2: relative luminance) of every text that is seen, worst first.
CONTRASTS = """() => {
  const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
  const rgba = (text) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = text; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data; return [r, g, b, a / 255];
  };
  const over = (top, low) => low.map((value, channel) => top[3] * top[channel] + (1 - top[3]) * value);
  const luminance = (colour) => colour.map((value) => value / 255)
    .map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, channel) => sum + value * [0.2126, 0.7152, 0.0722][channel], 0);
  const found = [];
  for (const element of document.body.querySelectorAll("*")) {
    const text = [...element.childNodes].filter((node) => node.nodeType === 3).map((node) => node.data.trim()).join("");
    if (!text || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    const area = element.getBoundingClientRect();
    if (area.width < 2 || area.height < 2) continue;
    const parents = [];
    for (let each = element; each; each = each.parentElement) parents.unshift(getComputedStyle(each));
    let back = [255, 255, 255], opacity = 1;
    for (const style of parents) { back = over(rgba(style.backgroundColor), back); opacity *= Number(style.opacity); }
    const [r, g, b, a] = rgba(parents.at(-1).color);
    const [one, other] = [luminance(over([r, g, b, a * opacity], back)), luminance(back)];
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([contrast, text.slice(0, 60), luminance(back)]);
  }
  return found.sort((one, other) => one[0] - other[0]);
}"""
# Texts of the tabs that stick out of the window, or of what hides overflow, and not of what scrolls sideways.
CUT_OFF = """() => [...document.querySelectorAll("[role=tabpanel] *")].filter((element) => {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) return false;
  const range = document.createRange();
  range.selectNodeContents(element);
  const area = range.getBoundingClientRect();
  if (area.width < 2 || element.getBoundingClientRect().width < 2) return false;
  for (let each = element; each; each = each.parentElement) {
    const overflow = getComputedStyle(each).overflowX;
    const frame = each.getBoundingClientRect();
    if (["auto", "scroll"].includes(overflow) && each.scrollWidth > each.clientWidth)
      return area.left + each.scrollLeft < frame.left - 1;  // nothing scrolls to the left of its start
    if (overflow !== "visible" && (area.left < frame.left - 1 || area.right > frame.right + 1)) return true;
  }
  return area.left < -1 || area.right > window.innerWidth + 1;
}).map((element) => element.textContent.trim().slice(0, 60))"""


@dataclass(kw_only=True)
class Visitor:
    """One page of a demo. faults: console errors, errors of scripts, and requests to anything but the demo."""

    page: Page
    url: str
    faults: list[str] = field(default_factory=list)
    expected_fault: str | None = None  # what a test provokes

    def choose(self, clip: Path, *, tab: str = "recognise") -> None:
        """Chooses a file for a tab that has none, and waits until it is uploaded."""
        self.page.set_input_files(f"#{tab}-clip input[type=file]", clip)
        self.page.wait_for_selector(f"#{tab}-clip video")

    def clear(self, *, tab: str = "recognise") -> None:
        """Takes the chosen file away."""
        self.page.click(f"#{tab}-clip button[aria-label=Clear]")
        self.page.wait_for_selector(f"#{tab}-clip input[type=file]", state="attached")

    def open_tab(self, name: str) -> None:
        """Shows a tab."""
        self.page.get_by_role("tab", name=name, exact=True).click()

    def run(self, *, tab: str = "recognise") -> None:
        """Starts, and waits for the answer."""
        self.page.click(f"#{tab}-run")
        self.wait_for_answer(tab=tab)

    def wait_for_answer(self, *, tab: str = "recognise") -> None:
        """Until the frames of an answer are there."""
        self.page.wait_for_selector(f"#{tab}-player .strip")

    def wait_for_video(self, *, tab: str = "recognise") -> None:
        """Until the player has a video of which pictures can be shown."""
        self.page.wait_for_function(f"(document.querySelector('#{tab}-player video')?.readyState ?? 0) >= 2")

    def video(self, expression: str, *, tab: str = "recognise") -> Any:
        """A JavaScript expression of the player's video, `video`."""
        return self.page.evaluate(
            f"() => {{ const video = document.querySelector('#{tab}-player video'); return {expression}; }}"
        )

    def seek(self, seconds: float, *, tab: str = "recognise") -> None:
        """Shows another time, and waits until it is drawn."""
        self.video(
            f"new Promise((done) => {{ video.addEventListener('seeked', () => requestAnimationFrame(() => "
            f"requestAnimationFrame(done)), {{ once: true }}); video.currentTime = {seconds}; }})",
            tab=tab,
        )

    def heat(self, *, box: tuple[int, int, int, int], height: int, width: int, rows: int, columns: int) -> Any:
        """What the overlay shows, see HEAT."""
        return self.page.evaluate(HEAT, ["recognise", list(box), height, width, rows, columns])

    def error(self) -> str:
        """The sentence of an error in the page, which is closed then."""
        toast = self.page.wait_for_selector("[data-testid=toast-body]")
        assert toast is not None
        sentence = self.page.locator("[data-testid=toast-text]").first.inner_text()
        self.page.locator("[data-testid=toast-close]").first.click()
        toast.wait_for_element_state("hidden")
        return sentence

    def labels(self) -> list[tuple[str, str]]:
        """The classes that are shown, with their percentages."""
        names = self.page.locator("#recognise-label dt, #recognise-label .label .text").all_inner_texts()
        shares = self.page.locator("#recognise-label dd, #recognise-label .label .confidence").all_inner_texts()
        return list(zip(names, shares, strict=False))

    def contrasts(self) -> list[tuple[float, str, float]]:
        """Contrast and text of all that is seen, worst first, and the luminance behind it, from 0 to 1."""
        return [(float(contrast), text, float(behind)) for contrast, text, behind in self.page.evaluate(CONTRASTS)]

    def is_as_wide_as_the_window(self) -> bool:
        """Whether nothing has to be scrolled sideways."""
        return bool(self.page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))

    def cut_off(self) -> list[str]:
        """Texts that cannot be read whole, since they stick out of the window."""
        return list(self.page.evaluate(CUT_OFF))

    def save(self, name: str) -> None:
        """A screenshot, where somebody wants them."""
        if SCREENSHOTS:
            self.page.wait_for_timeout(500)  # for what fades in
            self.page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


def visit(
    browser: Browser, *, url: str, size: tuple[int, int] = (1280, 900), theme: str = "light", **options: Any
) -> Visitor:
    """Opens a demo's page in a fresh browser profile."""
    context = browser.new_context(viewport={"width": size[0], "height": size[1]}, **options)
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    visitor = Visitor(page=page, url=url)

    def note(text: str) -> None:
        if visitor.expected_fault is None or not re.search(visitor.expected_fault, text):
            visitor.faults.append(text)

    def read_console(message: ConsoleMessage) -> None:
        # Gradio asks for the progress of an upload that has ended already, when it was quick, and is answered 404.
        if message.type == "error" and "/upload_progress?" not in message.location.get("url", ""):
            note(message.text)

    page.on("console", read_console)
    page.on("pageerror", lambda error: note(str(error)))
    own = (f"{url}/", "data:", f"blob:{url}/")
    page.on("request", lambda request: None if request.url.startswith(own) else note(f"asks {request.url}"))
    page.on("websocket", lambda socket: note(f"asks {socket.url}"))
    page.goto(f"{url}/{HEADER[theme]}")
    page.wait_for_selector("#tabs")
    return visitor
