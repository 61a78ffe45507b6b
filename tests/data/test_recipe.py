"""Recipes: loaded by path, versions and their classes, and one sentence for each thing that may be wrong."""

from pathlib import Path, PurePosixPath

import pytest

from coca_video.data.recipe import Entry, Request, load_recipe, recipe_classes, recipe_lines

RECIPE = """
from coca_video.data.recipe import Entry, Recipe, Request, Version

def list_clips(request):
    return [Entry(video_id=f"v{n}", label=name, split="val", keys=(f"{n}",)) for n, name in enumerate(request.classes)]

recipe = Recipe(
    name="Two",
    versions={"b": Version(classes="classes_b.txt", official={"val": 2}), "a": Version(classes="", official={})},
    list_clips=list_clips, file_keys=lambda path: (path.stem,), annotations_help="a list.",
)
"""

WITHOUT_VERSIONS = "recipe = dataclasses.replace(recipe, versions={})"


def write_recipe(folder: Path, *, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "prepare.py").write_text(text)
    (folder / "classes_b.txt").write_text("second\nfirst\n")
    return folder


def test_a_recipe_is_loaded_by_its_path_and_gives_its_classes_in_their_order(tmp_path: Path) -> None:
    folder = write_recipe(tmp_path / "two", text=RECIPE)
    recipe = load_recipe(folder)
    assert list(recipe.versions) == ["b", "a"] and recipe.versions["b"].official == {"val": 2}
    classes = recipe_classes(recipe, folder=folder, version="b")
    assert classes == ("second", "first")
    assert recipe_classes(recipe, folder=folder, version="a") == ()
    request = Request(annotations=(), videos=tmp_path, version="b", classes=classes)
    assert recipe.list_clips(request) == [
        Entry(video_id="v0", label="second", split="val", keys=("0",), source_id=None, nominal_seconds=None, extra={}),
        Entry(video_id="v1", label="first", split="val", keys=("1",), source_id=None, nominal_seconds=None, extra={}),
    ]
    assert recipe.file_keys(PurePosixPath("a/0.mp4")) == ("0",)
    assert (recipe.source_id(PurePosixPath("a/0.mp4")), recipe.versions_are_splits) == (None, False)


def test_what_a_recipe_tells_of_itself(tmp_path: Path) -> None:
    assert recipe_lines(load_recipe(write_recipe(tmp_path / "two", text=RECIPE))) == [
        "Two: --version (the first is the default) and official clips",
        "  b     2 val",
        "  a     no official count",
        "--annotations: a list.",
    ]


def test_an_unknown_version_names_those_there_are(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, text=RECIPE))
    with pytest.raises(ValueError, match=r"^Two has no version '400'; the versions there are: b, a\.$"):
        recipe_classes(recipe, folder=tmp_path, version="400")


def test_what_is_no_recipe_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no recipe .*nowhere.prepare\.py: expected a folder like"):
        load_recipe(tmp_path / "nowhere")
    for text, got in (("x = 1", "got none"), ("recipe = 'Two'", "got str")):
        with pytest.raises(ValueError, match=f"must hold `recipe = Recipe.*{got}"):
            load_recipe(write_recipe(tmp_path, text=text))
    with pytest.raises(ValueError, match=r"the recipe 'Two' has no versions"):
        load_recipe(write_recipe(tmp_path, text=f"{RECIPE}\nimport dataclasses\n{WITHOUT_VERSIONS}\n"))
