"""The page of the demo: its tabs, its look, and how Gradio serves it."""

import hmac
import socket
from collections.abc import Callable
from pathlib import Path

import gradio as gr
from about import build_about
from describe import build_describe
from endpoints import build_endpoints
from gradio.http_server import INITIAL_PORT_VALUE, TRY_NUM_PORTS
from gradio.utils import LRUCache
from guard import Guard, GuardedBlocks
from recognise import build_recognise
from shared import Shared, draw_examples
from sweep import sweeping

from coca_video.serve.service import Service

HERE = Path(__file__).parent
# A tab more is a row more.
TABS: tuple[tuple[str, Callable[[Shared], None]], ...] = (
    ("Recognise", build_recognise),
    ("Describe", build_describe),
    ("About", build_about),
)
STYLE = """
.timing { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 0; font-size: var(--text-sm);
  font-variant-numeric: tabular-nums; }
.dark { --color-accent: var(--primary-400); }
footer, footer a, footer button, .clip-input .or { color: var(--body-text-color-subdued) !important; }
.flush .html-container { padding: 0; }
#recognise-label h2 { overflow-wrap: anywhere; }
.about { overflow-x: auto; overflow-wrap: anywhere; }
.about th, .about td { white-space: nowrap; }
.clip-input video { max-height: 260px; }
.clip-input button[aria-label^="Trim"] { display: none; }
.clip-input.without-preview:has(video)::after {
  content: "This browser has no preview of the file.";
  position: absolute; top: 45%; left: 10%; right: 10%; text-align: center;
}
"""
EXAMPLES = "examples"  # a folder of the upload folder, whose clips stay
# Of these Gradio holds the state and the messages, which are answers with their frames: some hundred kB each.
MAX_SESSIONS = 200


def build(service: Service, *, folder: Path, keep_minutes: float = 60.0) -> GuardedBlocks:
    """The demo of the service's models.

    folder: what GRADIO_TEMP_DIR names; uploads lie in it, and nothing else is read for a client. keep_minutes: how long
    they stay.
    """
    examples = draw_examples(folder / EXAMPLES)
    shared = Shared(service=service, folder=folder, examples=examples, keep_minutes=keep_minutes)
    keep_seconds = max(1, round(60 * keep_minutes))
    blocks = GuardedBlocks(
        folder=folder,
        title="coca_video",
        analytics_enabled=False,
        delete_cache=(_check_seconds(keep_seconds), keep_seconds),
    )
    with blocks:
        gr.Markdown("# What happens in this clip?", elem_id="title")
        with gr.Tabs(elem_id="tabs"):
            for name, build_tab in TABS:
                with gr.Tab(name, id=name.lower(), elem_id=f"tab-{name.lower()}"):
                    build_tab(shared)
        build_endpoints(shared)
        blocks.unload(shared.waiting.leave)
    # The service has a bounded, fair queue of its own: Gradio's lets everything through to it.
    blocks.queue(default_concurrency_limit=None, max_size=None, api_open=False)
    messages = getattr(blocks._queue, "pending_messages_per_session", None)
    if isinstance(messages, LRUCache):  # Gradio has no option for it: 2000, of which each API request may be one
        messages.max_size = MAX_SESSIONS
    return blocks


def theme() -> gr.themes.Base:
    """Gradio's, in colours whose text has a contrast of 4.5 and more (WCAG AA), in light and dark.

    The fonts come with Gradio: a page loads nothing from elsewhere.
    """
    return gr.themes.Default(primary_hue="blue").set(
        color_accent="*primary_600",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_700",
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_400",
    )


def _check_seconds(keep_seconds: int) -> int:
    """How often to look for what is too old."""
    return max(1, min(60, keep_seconds // 4))


def check_address(server_name: str) -> None:
    """ValueError for what is no address of this machine, for which Gradio would try port after port."""
    try:
        found = socket.getaddrinfo(server_name.strip("[]"), 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as one:
            one.bind(address)
    except (OSError, UnicodeError) as error:  # UnicodeError: what can be no host's name
        raise ValueError(f"--server-name {server_name} is no address of this machine.") from error


def launch(
    blocks: GuardedBlocks, *, server_name: str, server_port: int | None, password: str | None, max_megabytes: float
) -> str:
    """Starts serving, in threads of Gradio's; the address.

    `blocks.close()` ends it. ValueError: no port is free, or no such address.
    """
    check_address(server_name)

    def is_right(_: str, given: str) -> bool:
        return password is not None and hmac.compare_digest(given.encode(), password.encode())

    every, keep = blocks.delete_cache or (60, 3600)
    folder = blocks.upload_folder
    lifespan = sweeping(folder, keep_seconds=keep + 2 * every, every_seconds=every, kept=folder / EXAMPLES)
    options = {"folder": folder, "max_megabytes": max_megabytes}
    guard = (Guard, (), options)  # a class, its arguments and keywords, as Starlette unpacks them
    try:
        _, url, _ = blocks.launch(
            server_name=server_name,
            server_port=server_port,
            auth=None if password is None else is_right,
            auth_message="Any name, and the password of this demo.",
            max_file_size=int(max_megabytes * 2**20),  # what Gradio calls MB
            show_error=False,
            prevent_thread_lock=True,
            inbrowser=False,
            share=False,
            quiet=True,
            ssr_mode=False,
            num_workers=0,
            mcp_server=False,
            pwa=False,
            enable_monitoring=False,
            run_history=False,
            state_session_capacity=MAX_SESSIONS,
            footer_links=["api", "settings"],
            theme=theme(),
            css=STYLE,
            js=(HERE / "preview.js").read_text(),
            app_kwargs={"middleware": [guard], "lifespan": lifespan},
        )
    except OSError as error:
        first, last = INITIAL_PORT_VALUE, INITIAL_PORT_VALUE + TRY_NUM_PORTS - 1  # GRADIO_SERVER_PORT, else 7860
        where = f"{first} to {last}" if server_port is None else server_port
        raise ValueError(f"No port of {where} is free at {server_name}; choose another by --server-port.") from error
    return str(url)
