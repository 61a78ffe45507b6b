"""Writes the manifest of UT-Interaction from the folder that holds its clips and clips.csv. See README.md here."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from coca_video.data.manifest import Manifest, read_classes, read_manifest, write_manifest

NUM_CLIPS, CLIPS_PER_CLASS, NUM_SEQUENCES = 120, 20, 20


def prepare(source: Path, *, out: Path) -> Path:
    """Checks the official counts and writes `out`/manifest.csv with classes.txt; returns the manifest's path."""
    classes = read_classes(Path(__file__).with_name("classes.txt"))
    manifest = read_manifest(source / "clips.csv", classes=classes)
    manifest.check_files()
    _check_counts(manifest)
    rows = [replace(row, extra={name: row.extra[name] for name in ("set", "sequence")}) for row in manifest.rows]
    path = out / "manifest.csv"
    write_manifest(path, rows=rows, classes=classes)
    return path


def _check_counts(manifest: Manifest) -> None:
    labels = [row.label for row in manifest.rows]
    counts = {name: labels.count(name) for name in manifest.classes}
    sequences = {row.extra.get("sequence") for row in manifest.rows}
    if len(labels) != NUM_CLIPS or set(counts.values()) != {CLIPS_PER_CLASS} or len(sequences) != NUM_SEQUENCES:
        raise ValueError(
            f"{manifest.source}: expected {NUM_CLIPS} clips, {CLIPS_PER_CLASS} a class, in {NUM_SEQUENCES} sequences; "
            f"got {len(labels)} clips ({counts}) in {len(sequences)} sequences."
        )


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="folder with clips/ and clips.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for manifest.csv and classes.txt")
    options = parser.parse_args()
    try:
        path = prepare(options.source, out=options.out)
    except ValueError as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
