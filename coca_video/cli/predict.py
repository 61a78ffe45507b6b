"""`coca-video predict FILE... --model RUN`: the most probable classes of video files."""

import glob
import json
import math
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from coca_video.cli.arguments import parse_options, say
from coca_video.data.clip_files import clip_files

if TYPE_CHECKING:
    from numpy import ndarray
    from tqdm import tqdm

    from coca_video.data.video import ClipConfig

STANDARD_INPUT = "-"
MANY_FILES = 100  # from here on progress is told in log files too, a line every ten seconds
READ_AHEAD = 2  # clips a process: one that it is at, and one that waits for the model


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Names the action in video files, most probable first.

    Results go to standard output in the order of the files, progress and errors to standard error. The exit status is
    0 when every file got its answer, 1 when some could not be read, and 2 when nothing could be done.
    """

    files: tyro.conf.Positional[tuple[str, ...]]
    """Video files and URLs; folders, for the videos below them, or the pictures where there are no videos; globs, also
    quoted ones ("clips/**/*.mp4"); - for names on standard input, one a line."""
    model: str
    """A finished probe run, a model folder, or hf:ORG/NAME."""
    top: int = 5
    """How many classes to name."""
    num_frames: int | None = None
    """Frames a clip; what the model was trained with when not given."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""
    num_workers: int = 0
    """Processes that read ahead; changes no number. A decoder that crashes or hangs there costs its own file only."""
    json: bool = False
    """One JSON line a file instead of text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(arguments: Sequence[str]) -> int:
    """Predicts file by file, in their order. Status 1 when some file could not be read."""
    options = parse_options(PredictOptions, verb="predict", arguments=arguments)
    _check(options)
    files = find_files(options.files)
    import torch

    from coca_video.eval.predict import load_predictor
    from coca_video.train.loop import pick_device

    predictor = load_predictor(
        options.model,
        num_frames=options.num_frames,
        decoder=options.decoder,
        timeout_seconds=options.timeout_seconds,
        device=pick_device(options.device),
    )
    num_failed = 0
    with _progress(len(files)) as bar, closing(_clips(files, config=predictor.clip, options=options)) as clips:
        for name, frames in clips:
            if isinstance(frames, str):
                num_failed += 1
                _tell_failure(name, cause=frames, as_json=options.json, bar=bar)
            else:
                (prediction,) = predictor.predict_frames(torch.from_numpy(frames).unsqueeze(0))
                _write(_answer(name, predictor.ranked(prediction)[: options.top], as_json=options.json), bar=bar)
            if bar is not None:
                bar.update()
    return 1 if num_failed else 0


def _check(options: PredictOptions) -> None:
    if not options.files:
        raise ValueError(
            "expected one or more video files; none was given. Name files, folders or globs, or - for names on "
            "standard input."
        )
    for name, least in (("top", 1), ("num_frames", 1), ("num_workers", 0)):
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}; got {value}.")
    if not options.timeout_seconds > 0:
        raise ValueError(f"--timeout-seconds must be above 0; got {options.timeout_seconds:g}.")


def find_files(names: Sequence[str]) -> list[str]:
    """The files that `names` stand for, in their order; one that is named twice comes twice.

    A name that is no folder, no glob and not "-" is kept as it is, whether there is such a file or not.

    Raises ValueError for a folder without clips, a glob that matches no file, and standard input without a name.
    """
    return [file for name in names for file in _expand(name)]


def _expand(name: str) -> list[str]:
    if name == STANDARD_INPUT:
        return _names_on_standard_input()
    if not name:
        raise ValueError("expected the name of a video file; got an empty one.")
    if "://" in name or _exists(Path.is_file, name):  # a URL may have a ? in it, and a file's name [ ]
        return [name]
    if _exists(Path.is_dir, name):
        found = [str(Path(name) / path) for path in clip_files(Path(name))]
        if not found:
            raise ValueError(f"The folder {name} holds no videos or pictures, neither itself nor in folders below it.")
        return found
    if not glob.has_magic(name):
        return [name]
    found = glob.glob(name, recursive=True)  # noqa: PTH207  # Path.glob takes no absolute pattern
    matching = sorted(path for path in found if _exists(Path.is_file, path))
    if not matching:
        raise ValueError(f"No file matches {name}; ** stands for any number of folders.")
    return matching


def _exists(test: Callable[[Path], bool], name: str) -> bool:
    """Whether there is such a thing; what may not be looked at is told when it is read."""
    try:
        return test(Path(name))
    except OSError:  # no permission, or a name that is too long
        return False


def _names_on_standard_input() -> list[str]:
    """By bytes: a name need not be text in the encoding of the terminal. A folder stands for its clips here too."""
    lines = os.fsdecode(sys.stdin.buffer.read()).split("\n")
    names = [name for line in lines if (name := line.removesuffix("\r"))]
    if not names:
        raise ValueError("expected names of video files on standard input, one a line; there was none.")
    return [file for name in names for file in (_expand(name) if _exists(Path.is_dir, name) else [name])]


def read_frames(name: str, *, config: "ClipConfig") -> "ndarray | str":
    """The frames [frames 3 size size] of a clip, u8; or why it cannot be read, a sentence that names it."""
    from coca_video.data.decode import UnreadableVideo
    from coca_video.data.video import load_clip

    try:
        return load_clip(name, config=config).frames.numpy()
    except UnreadableVideo as error:
        return str(error)
    except OSError as error:
        return f"{name}: it cannot be read ({error.strerror or error})"


def _clips(
    names: Sequence[str], *, config: "ClipConfig", options: PredictOptions
) -> "Generator[tuple[str, ndarray | str], None, None]":
    """Each name with what `read_frames` gives, in order."""
    if options.num_workers > 0:
        yield from _clips_ahead(names, config=config, num_workers=options.num_workers)
    else:
        for name in names:
            yield name, read_frames(name, config=config)


def _clips_ahead(
    names: Sequence[str], *, config: "ClipConfig", num_workers: int
) -> "Generator[tuple[str, ndarray | str], None, None]":
    """The same by processes, a few clips ahead of whoever takes them."""
    from coca_video.data.worker_pool import WorkerPool

    # The pool ends a process at the time limit. One of its own would leave the decoder running inside it.
    read = partial(_read_or_error, config=replace(config, timeout_seconds=math.inf))
    waiting: deque[tuple[str, Future[Any]]] = deque()
    given_up = threading.Event()
    with (
        WorkerPool(read, num_workers=num_workers, timeout_seconds=config.timeout_seconds, warm_up=_warm_up) as pool,
        ThreadPoolExecutor(num_workers) as threads,
    ):
        try:
            for name in names:
                waiting.append((name, threads.submit(pool.call, name, cancelled=given_up)))
                if len(waiting) == READ_AHEAD * num_workers:
                    yield _finished(*waiting.popleft())
            while waiting:
                yield _finished(*waiting.popleft())
        finally:
            given_up.set()
            threads.shutdown(wait=False, cancel_futures=True)


def _read_or_error(name: str, *, config: "ClipConfig") -> "ndarray | str | ValueError":
    """`read_frames` in a process of its own, where what ends the run is handed over: raised, it would print a trace."""
    try:
        return read_frames(name, config=config)
    except ValueError as error:
        return error


def _finished(name: str, future: "Future[Any]") -> "tuple[str, ndarray | str]":
    from coca_video.data.workers import WorkerFailure

    result = future.result()
    if isinstance(result, ValueError):
        raise result
    return name, f"{name}: {result.cause}" if isinstance(result, WorkerFailure) else result


def _warm_up() -> None:
    """What a process does before its first clip, so that it takes none of that clip's time."""
    import torch

    from coca_video.data.decode import BACKENDS, prove

    torch.set_num_threads(1)  # there are several processes
    for backend in BACKENDS:
        prove(backend)


@contextmanager
def _progress(num_files: int) -> "Iterator[tqdm[Any] | None]":
    """A bar with the time left where somebody watches, or waits long; none for a few files in a script."""
    from coca_video.train.loop import progress_bar

    if num_files < (2 if sys.stderr.isatty() else MANY_FILES):
        yield None
        return
    with progress_bar("predicting", total=num_files) as bar:
        yield bar


def _tell_failure(name: str, *, cause: str, as_json: bool, bar: "tqdm[Any] | None") -> None:
    sentence = f"coca-video predict: {cause}"
    if bar is None:
        say(sentence)
    else:
        bar.write(sentence, file=sys.stderr)
    if as_json:
        _write(json.dumps({"file": name, "error": cause}), bar=bar)


def _answer(name: str, best: list[tuple[str, float]], *, as_json: bool) -> str:
    if as_json:
        top = [{"label": label, "probability": probability} for label, probability in best]
        return json.dumps({"file": name, "top": top})
    shown = os.fsencode(name).decode(errors="backslashreplace")  # a name need not be text
    return "\n".join([shown, *(f"  {probability:.4f}  {label}" for label, probability in best)])


def _write(text: str, *, bar: "tqdm[Any] | None") -> None:
    """Onto standard output at once. On a terminal the bar makes room, and comes back below."""
    if bar is None or not sys.stderr.isatty():
        print(text, flush=True)
    else:
        bar.write(text, file=sys.stdout)
        sys.stdout.flush()
