"""A recipe: what `coca-video prepare` must know of one data set. datasets/<name>/prepare.py holds one as `recipe`.

A recipe reads the data set's own annotation files into entries, and says by which keys a file may be known. Walking,
decoding, matching and writing are the same for all of them and live elsewhere.
"""

import runpy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from coca_video.data.manifest import read_classes

RECIPE_FILE = "prepare.py"


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One clip of a data set's own list, before a file was looked for.

    `video_id` is unique within the list and becomes the manifest's. `label` is the class NAME as in the classes file.
    `keys` are what its file may be known by, best first; they are compared with `Recipe.file_keys`. `source_id` is
    what clips of one source share (a YouTube id, a UCF101 group); None stands for the video_id. `nominal_seconds` is
    how long the clip should be by the list (Kinetics: end - start). `extra` are further columns of the manifest.
    """

    video_id: str
    label: str | None
    split: str
    keys: tuple[str, ...]
    source_id: str | None = None
    nominal_seconds: float | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Version:
    """One version of a data set: its file of classes in the recipe's folder, and the official clips of each split."""

    classes: str
    official: dict[str, int]
    nominal_seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Request:
    """What `Recipe.list_clips` is asked: the files or folders of --annotations in order, and the version's classes."""

    annotations: tuple[Path, ...]
    videos: Path
    version: str
    classes: tuple[str, ...]


def no_source(path: PurePosixPath) -> str | None:
    """For data sets whose names do not tell which clips share a source."""
    return None


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is particular to one data set. The first of `versions` is the default; its keys are what --version takes.

    `list_clips` reads the data set's own annotation files. `file_keys` takes a path relative to --videos and gives the
    keys that `Entry.keys` may hold, best first. `annotations_help` is one sentence: which files --annotations takes.
    `source_id` reads a clip's source from its path, for lists that do not give it; None where the name does not tell.
    `versions_are_splits`: the versions are official splits of the same clips, so that no folder of classes tells them.
    """

    name: str
    versions: dict[str, Version]
    list_clips: Callable[[Request], list[Entry]]
    file_keys: Callable[[PurePosixPath], tuple[str, ...]]
    annotations_help: str
    source_id: Callable[[PurePosixPath], str | None] = no_source
    versions_are_splits: bool = False


def load_recipe(folder: Path) -> Recipe:
    """The `recipe` of `folder`/prepare.py, which is run by its path: data sets are folders and no packages.

    Raises:
        ValueError: there is no such file, it has no `recipe`, or the recipe has no versions.
    """
    path = folder / RECIPE_FILE
    if not path.is_file():
        raise ValueError(f"There is no recipe {path}: expected a folder like datasets/kinetics, with a {RECIPE_FILE}.")
    recipe = runpy.run_path(str(path)).get("recipe")
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"{path} must hold `recipe = Recipe(...)` at module level, got "
            f"{'none' if recipe is None else type(recipe).__name__}; its README says how it is used instead."
        )
    if not recipe.versions:
        raise ValueError(f"{path}: the recipe {recipe.name!r} has no versions; give it at least one.")
    return recipe


def recipe_classes(recipe: Recipe, *, folder: Path, version: str) -> tuple[str, ...]:
    """The classes of a version in their official order; empty if its `classes` is the empty name.

    Raises:
        ValueError: the recipe has no such version, or its file of classes is missing or faulty.
    """
    if version not in recipe.versions:
        names = ", ".join(recipe.versions)
        raise ValueError(f"{recipe.name} has no version {version!r}; the versions there are: {names}.")
    name = recipe.versions[version].classes
    return read_classes(folder / name) if name else ()


def recipe_lines(recipe: Recipe) -> list[str]:
    """What a person must know to give the options: versions with their official counts, what --annotations takes."""
    lines = [f"{recipe.name}: --version (the first is the default) and official clips"]
    for name, version in recipe.versions.items():
        counts = ", ".join(f"{count:,} {split}" for split, count in version.official.items())
        lines.append(f"  {name:<6}{counts or 'no official count'}")
    return [*lines, f"--annotations: {recipe.annotations_help}"]
