"""Arguments of a verb: a config file with overrides, or plain options; both through tyro."""

import difflib
import runpy
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from coca_video.data.recipe import RECIPE_FILE

PACKAGE = Path(__file__).resolve().parents[1]
Options = TypeVar("Options")


def parse_options(options_type: type[Options], *, verb: str, arguments: Sequence[str]) -> Options:
    """The options of a verb without a config file. Prints help or what is wrong, and exits, where tyro would."""
    return tyro.cli(options_type, prog=f"coca-video {verb}", args=list(arguments))


def wants_help(arguments: Sequence[str]) -> bool:
    """Whether the verb was called with no config at all, or with --help in its place."""
    return not arguments or arguments[0] in ("-h", "--help")


def print_config_help(*, verb: str, what: str) -> int:
    """Help of a verb that takes a config file, without loading one; status 0."""
    found = sorted(path for root in _roots() for path in (root / "configs").glob(f"{verb}/*.py"))
    names = dict.fromkeys(f"configs/{verb}/{path.name}" for path in found)
    print(f"usage: coca-video {verb} CONFIG.py [--option VALUE ...]\n\n{what}\n\nConfigs here:")
    print("\n".join(f"  {name}" for name in names) or "  none")
    print(f"\ncoca-video {verb} CONFIG.py --help lists the options of that config.")
    return 0


def load_config(config_type: type[Options], *, verb: str, arguments: Sequence[str]) -> Options:
    """The config of the file that stands first in `arguments`, with the overrides that follow it."""
    path = find_file(arguments[0])
    try:
        config = runpy.run_path(str(path)).get("config")
    except (SyntaxError, ImportError) as error:
        raise ValueError(f"{path} is no config that Python can run: {error}.") from error
    if not isinstance(config, config_type):
        raise ValueError(
            f"{path}: expected a line `config = {config_type.__name__}(...)`, which `coca-video {verb}` takes; "
            f"got {'no `config`' if config is None else type(config).__name__}."
        )
    flags: tuple[Any, ...] = (tyro.conf.CascadeSubcommandArgs,)
    prog = f"coca-video {verb} {arguments[0]}"
    return tyro.cli(config_type, default=config, config=flags, prog=prog, args=list(arguments[1:]))


def find_file(name: str) -> Path:
    """`name` in the working directory, else the copy that the package carries."""
    for root in _roots():
        if (root / name).is_file():
            return root / name
    raise ValueError(f"There is no file {name}, neither here nor among those that come with coca_video.")


def find_recipe(name: Path) -> Path:
    """The folder `name` with a recipe in the working directory, else the copy that the package carries."""
    for root in _roots():
        if (root / name / RECIPE_FILE).is_file():
            return root / name
    recipes = {path.parent.name for root in _roots() for path in root.glob(f"datasets/*/{RECIPE_FILE}")}
    near = difflib.get_close_matches(name.name, sorted(recipes), n=1)
    names = ", ".join(f"datasets/{recipe}" for recipe in sorted(recipes)) or "none"
    hint = f"did you mean datasets/{near[0]}?" if near else f"the recipes there are: {names}."
    raise ValueError(f"There is no recipe {name}, neither here nor among those that come with coca_video; {hint}")


def shipped() -> Path:
    """What holds configs/, datasets/ and app/: the installed package, or the checkout it is run from."""
    return PACKAGE / "_shipped" if (PACKAGE / "_shipped").is_dir() else PACKAGE.parent


def _roots() -> tuple[Path, ...]:
    """Where configs and recipes are looked for: here first."""
    return (Path.cwd(), shipped())


def call() -> str:
    """How to call coca-video from here: its name where the shell finds this one, else its path."""
    script = Path(sys.argv[0])
    if script.name != "coca-video":
        return "coca-video"
    found = shutil.which("coca-video")
    return "coca-video" if found is not None and Path(found).samefile(script) else str(script)


def say(text: str) -> None:
    """A line for the person at the terminal, on standard error: standard output is for results."""
    print(text, file=sys.stderr, flush=True)
