"""`coca-video probe CONFIG.py`: a single-query probe on a frozen encoder."""

from collections.abc import Sequence
from shlex import quote

from coca_video.cli.arguments import call, load_config, print_config_help, say, wants_help

WHAT = "Trains ONE learned query over the tokens of all frames of a clip, on a frozen encoder, and measures accuracy."


def run(arguments: Sequence[str]) -> int:
    """Trains, prints accuracy, says what to do next. Status 1 when some clips could not be read."""
    if wants_help(arguments):
        return print_config_help(verb="probe", what=WHAT) if arguments else _no_config()
    from coca_video.cli.evaluate import print_accuracy
    from coca_video.train.classify import ProbeConfig, run_probe

    config = load_config(ProbeConfig, verb="probe", arguments=arguments)
    result = run_probe(config)
    if result.evaluation is not None:
        print_accuracy(result.evaluation)
    if result.num_unreadable:
        say(f"{result.num_unreadable} clips could not be read; they are listed in {config.out / 'unreadable.csv'}.")
    following = f"{quote(call())} predict CLIP.mp4 --model {quote(str(config.out))}"
    say(f"The classifier is in {result.model_folder}. Next: {following}")
    return 1 if result.num_unreadable else 0


def _no_config() -> int:
    raise ValueError("expected a config file, such as configs/probe/own_clips.py; none was given.")
