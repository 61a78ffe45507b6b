"""An answer of the demo against decoding and encoding alone: what serving costs on top.

    python benchmarks/demo.py --json runs/benchmarks/demo.json

A server of its own with a ViT-B/16 of random weights, 16 frames of 224 px, and a client on the same machine that
uploads a clip of 10 s and asks /classify, one at a time; in turn with it this process reads the same file and asks the
same model without a server. Wall time, medians. Goal: at most 1.2 times decoding and encoding (issue 7). Then the same
requests from `--num-clients` clients at once: how long each waits, and how many are answered a second.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from gradio_client import Client, handle_file
from timing import parser, report

from coca_video.data.video import load_clip
from coca_video.eval.predict import Predictor, load_predictor
from coca_video.hub import save
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.synthetic import draw_clips
from coca_video.train.loop import pick_device

APP = Path(__file__).resolve().parents[1] / "app" / "demo.py"
CLIP_SECONDS, CLIP_SIDE = 10, 320


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--clip", type=Path, help="a video to ask about; drawn, 10 s of 320 px, when not given")
    commands.add_argument("--num-frames", type=int, default=16)
    commands.add_argument("--num-clients", type=int, default=4)
    commands.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = commands.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        clip = draw_clip(folder) if options.clip is None else options.clip
        model = save_model(folder / "model", num_frames=options.num_frames)
        predictor = load_predictor(
            str(model), num_frames=None, decoder="auto", timeout_seconds=600.0, device=pick_device(options.device)
        )
        with server(model, options=options) as url:
            report(measure(clip, predictor=predictor, url=url, options=options), options=options)
    return 0


def draw_clip(folder: Path) -> Path:
    """A spinning shape for 10 s."""
    (row,) = draw_clips(
        folder, num_clips=1, seed=0, split="demo", size=CLIP_SIDE, num_frames=25 * CLIP_SECONDS, frames_per_second=25.0
    )
    return Path(row.path)


def save_model(folder: Path, *, num_frames: int) -> Path:
    """A classifier of 400 classes with random weights: its time is that of any other."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.base(), num_classes=400, num_frames=num_frames)
    save(folder, model=VideoClassifier(config), classes=[f"class {number}" for number in range(400)])
    return folder


@contextmanager
def server(model: Path, *, options: argparse.Namespace) -> Iterator[str]:
    """The address of a demo, in a process of its own, once it answers."""
    command = [sys.executable, str(APP), "--model", str(model), "--device", options.device]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if "http" in line), None)
        if line is None:
            sys.exit("The demo ended before it served; it says why above.")
        yield next(word for word in line.split() if word.startswith("http"))
    finally:
        process.terminate()
        process.wait()


def measure(clip: Path, *, predictor: Predictor, url: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Medians of each part, alone and through the server, taking turns; then many clients."""
    client = Client(url, verbose=False)
    alone: list[dict[str, float]] = []
    served: list[dict[str, float]] = []
    for turn in range(options.repeats + 1):
        mine, theirs = ask_here(clip, predictor=predictor), ask_server(clip, client=client)
        if turn > 0:
            alone.append(mine)
            served.append(theirs)
    base = median(alone, "decode") + median(alone, "encode") + median(alone, "pool")
    rows = [row(f"alone: {part}", median(alone, part), base=base) for part in ("decode", "encode", "pool")]
    rows += [row("alone: all", base, base=base)]
    rows += [row(f"server: {part}", median(served, part), base=base) for part in ("decode", "encode", "pool")]
    rows += [row("an answer, upload included", median(served, "answer"), base=base)]
    return rows + crowd(clip, url=url, base=base, options=options)


def ask_here(clip: Path, *, predictor: Predictor) -> dict[str, float]:
    """Seconds of reading and of the model in this process, the attention included, which the demo shows."""
    started = time.perf_counter()
    frames = load_clip(clip, config=predictor.clip).frames.unsqueeze(0)
    read = time.perf_counter() - started
    (prediction,) = predictor.predict_frames(frames, attention=True)
    return {"decode": read, "encode": prediction.encode_seconds, "pool": prediction.pool_seconds}


def ask_server(clip: Path, *, client: Client) -> dict[str, float]:
    """Seconds from the first byte of the upload to the answer, and what the server says that it spent."""
    started = time.perf_counter()
    answer = client.predict(handle_file(str(clip)), api_name="/classify")
    return {"answer": time.perf_counter() - started, **answer["seconds"]}


def crowd(clip: Path, *, url: str, base: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each client asks `--repeats` times, all at once: medians and throughput."""
    clients = [Client(url, verbose=False) for _ in range(options.num_clients)]
    together = threading.Barrier(len(clients))

    def ask(client: Client) -> list[float]:
        together.wait()
        return [ask_server(clip, client=client)["answer"] for _ in range(options.repeats)]

    started = time.perf_counter()
    with ThreadPoolExecutor(len(clients)) as threads:
        taken = sorted(seconds for waits in threads.map(ask, clients) for seconds in waits)
    each = (time.perf_counter() - started) / len(taken)
    return [
        row(f"{len(clients)} clients: median answer", statistics.median(taken), base=base),
        row(f"{len(clients)} clients: 95th of 100", taken[int(0.95 * (len(taken) - 1))], base=base),
        row(f"{len(clients)} clients: time by number of answers", each, base=base),
    ]


def median(runs: list[dict[str, float]], part: str) -> float:
    """Of one part."""
    return statistics.median(run[part] for run in runs)


def row(name: str, seconds: float, *, base: float) -> dict[str, Any]:
    """A line of the table."""
    return {"side": name, "ms": 1e3 * seconds, "of decode and encode alone": seconds / base}


if __name__ == "__main__":
    sys.exit(main())
