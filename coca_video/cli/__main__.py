"""`coca-video VERB ...`: finds the verb's file, and turns what a user can mend into one sentence and an exit status."""

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from coca_video import __version__

VERBS = {
    "quickstart": "the whole line on a drawn world, in minutes: pretrain, probe, evaluate",
    "doctor": "what works on this machine; with a file, what that video is",
    "prepare": "from a data set as it lies on disk to a manifest, with every file checked",
    "transcode": "make videos small and quick to sample",
    "tokenizer": "learn a vocabulary from captions",
    "pretrain": "train CoCa on captioned images: contrastive + captioning loss",
    "probe": "train a single-query probe on the frames of a frozen image encoder",
    "sweep": "train many probes in one pass, and keep the best on held-out clips",
    "linear": "linear evaluation and k-NN of frozen features, beside the attentional pooler",
    "evaluate": "accuracy of a probe on clips, or retrieval of a CoCa on captioned images",
    "predict": "name the action in video files",
    "caption": "describe images and videos with a CoCa",
    "demo": "a page in the browser, and an API, for uploaded clips",
}
USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one verb. Exit status: 0 done, 1 done but for some inputs, 2 bad usage or input, 130 stopped."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        return _dispatch(arguments)
    except BrokenPipeError:  # whoever read our output has seen enough: `coca-video predict ... | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_overview(), flush=True)
        return 0 if arguments else USAGE_ERROR
    if arguments[0] == "--version":
        print(f"coca-video {__version__}")
        return 0
    verb, *rest = arguments
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return _fail(f"there is no verb {verb!r}; expected one of {', '.join(VERBS)}.{hint}")
    return _run(verb, rest)


def _run(verb: str, arguments: list[str]) -> int:
    if os.environ.get("COCA_VIDEO_TRACEBACK"):
        return int(import_module(f"coca_video.cli.{verb}").run(arguments))
    try:
        return int(import_module(f"coca_video.cli.{verb}").run(arguments))
    except KeyboardInterrupt as stopped:
        print(f"coca-video {verb}: {str(stopped) or 'Interrupted.'}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        return _fail(f"{verb}: {error}")


def _fail(sentence: str) -> int:
    print(f"coca-video: {sentence}", file=sys.stderr)
    return USAGE_ERROR


def _overview() -> str:
    width = max(map(len, VERBS))
    lines = [f"  {verb:<{width}}  {what}" for verb, what in VERBS.items()]
    return "\n".join(
        [
            "usage: coca-video VERB ...",
            "",
            "CoCa for video action recognition.",
            "",
            *lines,
            "",
            "coca-video VERB --help tells more. COCA_VIDEO_TRACEBACK=1 shows where an error came from.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
