"""The demo: `python app/demo.py --model RUN_OR_NAME [--model ...]`, or `coca-video demo`.

A Hugging Face Space starts it without arguments: COCA_VIDEO_DEMO_MODEL names the models then, with commas between
them, COCA_VIDEO_DEMO_PASSWORD the password, and Gradio's GRADIO_SERVER_NAME and GRADIO_SERVER_PORT the address.
"""

import contextlib
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from coca_video.cli.arguments import parse_options
from coca_video.cli.demo import DemoOptions

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(arguments: Sequence[str]) -> int:
    """Serves until it is interrupted or ended. ValueError for what the person at the terminal can mend."""
    options = parse_options(DemoOptions, verb="demo", arguments=arguments)
    if not options.model:
        raise ValueError("expected --model with a finished run, a model folder or hf:ORG/NAME; none was given.")
    with (
        _ended_by_sigterm(),
        private_folder() as folder,
        contextlib.suppress(KeyboardInterrupt),
        served(options, folder=folder) as url,
    ):
        print(f"The demo is at {url} (Ctrl+C ends it).", flush=True)
        if options.server_name not in LOOPBACK and options.asked_password is None:
            print("Everyone who reaches this machine can use it: --password asks for one.", file=sys.stderr)
        threading.Event().wait()
    return 0


@contextlib.contextmanager
def private_folder() -> Iterator[Path]:
    """A folder that only this user reads, for uploads and all that is made of them; removed at the end.

    Gradio reads where it is when it is imported, so that comes after.
    """
    with tempfile.TemporaryDirectory(prefix="coca_video_demo_", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = str(folder)
        try:
            yield folder
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before


@contextlib.contextmanager
def served(options: DemoOptions, *, folder: Path) -> Iterator[str]:
    """The demo as it runs, at the address that is yielded. `folder` is that of `private_folder`."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from page import build, launch

    from coca_video.serve.models import load_models
    from coca_video.serve.service import Service
    from coca_video.train.loop import pick_device

    models = load_models(
        options.model,
        device=pick_device(options.device),
        decoder=options.decoder,
        num_frames=options.num_frames,
        timeout_seconds=options.limits.read_seconds,
    )
    with Service(
        models,
        limits=options.limits,
        num_workers=options.num_workers,
        max_waiting=options.max_waiting,
        max_batch=options.max_batch,
    ) as service:
        blocks = build(service, folder=folder, keep_minutes=options.keep_minutes)
        try:
            yield launch(
                blocks,
                server_name=options.server_name,
                server_port=options.server_port,
                password=options.asked_password,
                max_megabytes=options.limits.max_megabytes,
            )
        finally:
            blocks.close(verbose=False)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM, by which a container is stopped, ends the program as Ctrl+C does: what it wrote is removed."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may decide what signals do
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"demo.py: {error}")
