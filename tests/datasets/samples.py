"""The sample.csv of a recipe, against what the recipe makes of files laid out as the sample says."""

import csv
from pathlib import Path

from tqdm import tqdm

from coca_video.data.prepare import PrepareConfig, prepare
from coca_video.data.recipe import load_recipe


def assert_sample_is_the_head(
    recipe_folder: Path, *, videos: Path, annotations: tuple[Path, ...], num_rows: int
) -> None:
    """Lays out the sample's files beside `videos` (none may be there yet), prepares, and compares line by line."""
    out = videos.parent
    sample = (recipe_folder / "sample.csv").read_text().splitlines()
    for row in csv.DictReader(sample):
        path = out / row["path"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(row["path"])  # an empty file would not do
    config = PrepareConfig(videos=videos, out=out, annotations=annotations, check="none", num_workers=1)
    recipe = load_recipe(recipe_folder)
    prepare(recipe, folder=recipe_folder, config=config, progress=lambda what, **counts: tqdm(disable=True, **counts))
    assert (out / "manifest.csv").read_text().splitlines()[: len(sample)] == sample
    assert len(sample) == 1 + num_rows
