"""`coca-video pretrain CONFIG.py`: CoCa's image-text stage."""

import os
from collections.abc import Sequence

from coca_video.cli.arguments import load_config, print_config_help, say, wants_help

WHAT = "Trains CoCa on captioned images (tar shards in img2dataset's layout) and measures retrieval on test pairs."


def run(arguments: Sequence[str]) -> int:
    """Trains, prints retrieval, says what to do next. Status 1 when some pairs could not be read."""
    if wants_help(arguments):
        return print_config_help(verb="pretrain", what=WHAT) if arguments else _no_config()
    from coca_video.train.pretrain import PretrainConfig, run_pretraining

    config = load_config(PretrainConfig, verb="pretrain", arguments=arguments)
    result = run_pretraining(config)
    status = 1 if result.num_unreadable else 0
    if os.environ.get("RANK", "0") != "0":  # torchrun's other ranks have the same to say
        return status
    for name, value in result.metrics.items():
        print(f"{name:<28} {value:.4f}")
    if result.num_unreadable:
        say(f"{result.num_unreadable} pairs could not be read; they are listed in {config.out / 'unreadable.csv'}.")
    say(f"The model is in {result.model_folder}. A probe on it: --encoder.model {config.out}")
    return status


def _no_config() -> int:
    raise ValueError("expected a config file, such as configs/pretrain/flickr8k_small.py; none was given.")
