"""`coca-video probe CONFIG.py`: a classifier of clips on an image encoder, frozen or fine-tuned."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from coca_video.cli.arguments import call, load_config, print_config_help, say, wants_help

if TYPE_CHECKING:
    from coca_video.train.classify import ProbeResult

WHAT = (
    "Trains ONE learned query over the tokens of all frames of a clip, on a frozen encoder or with it, and measures "
    "accuracy."
)


def run(arguments: Sequence[str]) -> int:
    """Trains, prints accuracy, says what to do next. Status 1 when some clips could not be read."""
    if wants_help(arguments):
        return print_config_help(verb="probe", what=WHAT) if arguments else _no_config()
    from coca_video.distributed import is_main, start_from_environment
    from coca_video.train.classify import run_probe
    from coca_video.train.loop import pick_device
    from coca_video.train.probe_config import ProbeConfig

    config = load_config(ProbeConfig, verb="probe", arguments=arguments)
    with start_from_environment(pick_device(config.device)):
        result = run_probe(config)
        return _report(result, out=config.out) if is_main() else 0  # torchrun kills all ranks for one that ends with 1


def _report(result: "ProbeResult", *, out: Path) -> int:
    from coca_video.cli.evaluate import print_accuracy

    if result.evaluation is not None:
        print_accuracy(result.evaluation)
    if result.num_unreadable:
        say(f"{result.num_unreadable} clips could not be read; they are listed in {out / 'unreadable.csv'}.")
    following = f"{quote(call())} predict CLIP.mp4 --model {quote(str(out))}"
    say(f"The classifier is in {result.model_folder}. Next: {following}")
    return 1 if result.num_unreadable else 0


def _no_config() -> int:
    raise ValueError("expected a config file, such as configs/probe/own_clips.py; none was given.")
