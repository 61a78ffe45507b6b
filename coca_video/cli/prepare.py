"""`coca-video prepare RECIPE --videos DIR --out DIR`: from a data set as it lies on disk to a manifest."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from coca_video.cli.arguments import find_recipe, parse_options, say
from coca_video.data.prepare import JOURNAL_FILE, PrepareConfig, prepare
from coca_video.data.recipe import load_recipe, recipe_lines


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(PrepareConfig):
    """Finds and checks the video files of a data set, and writes its manifest.

    Every file is really decoded. What was checked is kept at once: a stopped run goes on with the same command.
    """

    recipe: tyro.conf.Positional[Path]
    """Folder of the data set's recipe: datasets/kinetics, datasets/ucf101, ... (datasets/folder for your own clips);
    RECIPE --help tells its versions and which files --annotations takes."""


def run(arguments: Sequence[str]) -> int:
    """Prepares, prints the summary; `RECIPE --help` tells of the recipe first. Status 1 when a file is unreadable."""
    if arguments and not arguments[0].startswith("-"):
        named = load_recipe(find_recipe(Path(arguments[0])))  # a wrong name is told before options that are missing
        if {"-h", "--help"} & set(arguments):
            print("\n".join(recipe_lines(named)), end="\n\n", flush=True)
    options = parse_options(PrepareOptions, verb="prepare", arguments=arguments)
    from coca_video.data.prepare_report import summary_lines
    from coca_video.train.loop import progress_bar

    folder = find_recipe(options.recipe)
    recipe = load_recipe(folder)
    try:
        report = prepare(recipe, folder=folder, config=options, progress=progress_bar)
    except KeyboardInterrupt as stopped:
        kept = options.out / JOURNAL_FILE
        if not kept.is_file():
            raise
        raise KeyboardInterrupt(
            f"Interrupted; what was checked is kept in {kept}: the same command goes on from there."
        ) from stopped
    for notice in report.notices:
        say(notice)
    print("\n".join(summary_lines(report)))
    return 1 if report.num_unreadable() else 0
