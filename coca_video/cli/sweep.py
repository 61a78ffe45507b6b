"""`coca-video sweep CONFIG.py`: many probes on a frozen encoder in one pass; the best on held-out clips is kept."""

from collections.abc import Sequence
from shlex import quote
from typing import TYPE_CHECKING

from coca_video.cli.arguments import call, load_config, print_config_help, say, wants_help

if TYPE_CHECKING:
    from coca_video.train.sweep import SweepResult
    from coca_video.train.sweep_figures import SweptProbe

WHAT = (
    "Trains many probes (learning rates x weight decays x ...) in one pass over a frozen encoder, keeps the one that\n"
    "does best on a held-out part of the training clips, and tests that one."
)


def run(arguments: Sequence[str]) -> int:
    """Trains, prints all probes and the accuracy of the chosen one. Status 1 when some clips could not be read."""
    if wants_help(arguments):
        return print_config_help(verb="sweep", what=WHAT) if arguments else _no_config()
    from coca_video.cli.evaluate import print_accuracy
    from coca_video.train.sweep import run_sweep
    from coca_video.train.sweep_config import SweepConfig

    config = load_config(SweepConfig, verb="sweep", arguments=arguments)
    swept, out = run_sweep(config), config.probe.out
    print("\n".join(table_lines(swept)))
    evaluation = swept.result.evaluation
    if evaluation is not None:
        print("The test clips were looked at once, with the chosen probe:")
        print_accuracy(evaluation)
    if swept.result.num_unreadable:
        say(f"{swept.result.num_unreadable} clips could not be read; they are listed in {out / 'unreadable.csv'}.")
    following = f"{quote(call())} predict CLIP.mp4 --model {quote(str(out))}"
    say(f"The classifier is in {swept.result.model_folder}, all probes in {out / 'probes.json'}. Next: {following}")
    return 1 if swept.result.num_unreadable else 0


def table_lines(swept: "SweepResult") -> list[str]:
    """All probes, the best on the held-out clips first, with the options in which they differ; and the choice."""
    ranked = sorted(swept.probes, key=lambda probe: probe.merit, reverse=True)
    columns = {name: values for name, values in _options(ranked).items() if len(set(values)) > 1}
    header = ["probe", *columns, "top1", "top5", "loss"]
    rows = [
        [f"{probe.number:02d}", *(values[place] for values in columns.values()), *_figures(probe)]
        for place, probe in enumerate(ranked)
    ]
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    table = ["  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True)) for row in (header, *rows)]
    choice = (
        f"Chosen of {len(ranked)} probes: {swept.chosen.number:02d}, by top1 on {swept.num_held_out} training clips "
        "that were held out."
    )
    return [*table, choice]


def _options(probes: "Sequence[SweptProbe]") -> dict[str, list[str]]:
    configs = [probe.config for probe in probes]
    return {
        "learning rate": [f"{config.optim.learning_rate:g}" for config in configs],
        "weight decay": [f"{config.optim.weight_decay:g}" for config in configs],
        "label smoothing": [f"{config.label_smoothing:g}" for config in configs],
        "head": [_head(probe) for probe in probes],
    }


def _head(probe: "SweptProbe") -> str:
    """What of the head is not as it is by default."""
    head = probe.config.head
    changed = [
        f"{name.replace('_', ' ')} {getattr(head, name)}"
        for name in type(head).__dataclass_fields__
        if getattr(head, name) != getattr(type(head), name)
    ]
    return ", ".join(changed) or "one query"


def _figures(probe: "SweptProbe") -> list[str]:
    figures = probe.held_out
    return [f"{figures.top1:.4f}", f"{figures.top5:.4f}", f"{figures.loss:.4f}"]


def _no_config() -> int:
    raise ValueError("expected a config file, such as configs/sweep/own_clips.py; none was given.")
