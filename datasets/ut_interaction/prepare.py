"""The recipe of UT-Interaction: the clips.csv beside its clips, to entries. See README.md here."""

from pathlib import PurePosixPath

from coca_video.data.annotations import path_keys
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.recipe import Entry, Recipe, Request, Version

CLIP_LIST = "clips.csv"
NUM_CLIPS, CLIPS_PER_CLASS, NUM_SEQUENCES = 120, 20, 20


def list_clips(request: Request) -> list[Entry]:
    """The 120 official clips, in the order of the list, with set and sequence as further columns.

    Raises:
        ValueError: clips.csv was not given, it is no manifest with set, sequence and split, or its counts differ.
    """
    if len(request.annotations) != 1:
        given = ", ".join(map(str, request.annotations)) or "nothing"
        raise ValueError(f"UT-Interaction needs --annotations with one file, its {CLIP_LIST}, got {given}.")
    source = request.annotations[0]
    manifest = read_manifest(source / CLIP_LIST if source.is_dir() else source, classes=request.classes)
    _check_counts(manifest)
    return [
        Entry(
            video_id=row.video_id,
            label=row.label,
            split=row.split or "",
            keys=(row.path.stem,),
            source_id=f"sequence {row.extra['sequence']}",  # every sequence has other actors and clothes
            extra={name: row.extra[name] for name in ("set", "sequence")},
        )
        for row in manifest.rows
    ]


def file_keys(path: PurePosixPath) -> tuple[str, ...]:
    """The name without suffix, which is set, sequence and a number that no other clip has."""
    return (path_keys(path)[-1],)


def _check_counts(manifest: Manifest) -> None:
    incomplete = [row for row in manifest.rows if not {"set", "sequence"} <= set(row.extra) or row.split is None]
    if incomplete:
        raise ValueError(
            f"{manifest.source}: clip {incomplete[0].video_id!r} needs set, sequence and split, got the further "
            f"columns {', '.join(incomplete[0].extra) or 'none'}."
        )
    labels = [row.label for row in manifest.rows]
    counts = {name: labels.count(name) for name in manifest.classes}
    sequences = {row.extra["sequence"] for row in manifest.rows}
    if len(labels) != NUM_CLIPS or set(counts.values()) != {CLIPS_PER_CLASS} or len(sequences) != NUM_SEQUENCES:
        raise ValueError(
            f"{manifest.source}: expected {NUM_CLIPS} clips, {CLIPS_PER_CLASS} a class, in {NUM_SEQUENCES} sequences; "
            f"got {len(labels)} clips ({counts}) in {len(sequences)} sequences."
        )


recipe = Recipe(
    name="UT-Interaction",
    versions={"1": Version(classes="classes.txt", official={"train": 83, "test": 37})},
    list_clips=list_clips,
    file_keys=file_keys,
    annotations_help="The file clips.csv of the copy: path, label, set, sequence, split.",
)
