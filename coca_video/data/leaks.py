"""Clips that two lists share: of one source (a YouTube video), or with the same bytes.

Kinetics-400's validation clips lie largely inside Kinetics-700's training list, as its distributors warn.
"""

import csv
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coca_video.data.annotations import read_text
from coca_video.data.manifest import VideoRow, read_manifest


@dataclass(frozen=True, kw_only=True)
class OtherClip:
    """A clip of the list compared with. `path` is None if that list names no files."""

    video_id: str
    source_id: str
    split: str
    path: Path | None


@dataclass(frozen=True, kw_only=True)
class Leak:
    """One of our clips and the clip of the other list that it shares its source or its bytes with."""

    video_id: str
    split: str
    other_video_id: str
    other_split: str
    by: Literal["source", "content"]


def read_other(path: Path) -> tuple[OtherClip, ...]:
    """A manifest of ours (column source_id, else video_id), or an official CSV of Kinetics (youtube_id).

    Raises:
        ValueError: neither of the two, no row, or a row without its id.
    """
    if not path.is_file():
        raise ValueError(f"There is no file {path} to compare with: expected a manifest or an official Kinetics CSV.")
    text = read_text(path)
    header = [name.strip(' "') for name in text.partition("\n")[0].strip().split(",")]
    if "youtube_id" in header and "path" not in header:
        return tuple(_read_kinetics(text, path=path))
    return tuple(
        OtherClip(
            video_id=row.video_id,
            source_id=row.extra.get("source_id", row.video_id),
            split=row.split or "",
            path=row.path if isinstance(row.path, Path) else None,  # not a URL
        )
        for row in read_manifest(path).rows
    )


def _read_kinetics(text: str, *, path: Path) -> list[OtherClip]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True, restval="")
    try:
        reader.fieldnames = [name.strip() for name in reader.fieldnames or []]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ValueError(f"{path} is not a CSV file: {error}.") from error
    if not rows:
        raise ValueError(f"{path} lists no clip to compare with: expected rows below its header, got none.")
    nameless = [number for number, row in rows if not row["youtube_id"].strip()]
    if nameless:
        raise ValueError(
            f"{path}, line {nameless[0]}: the youtube_id is empty (in {len(nameless)} of {len(rows)} rows); take the "
            "list as it was published."
        )
    return [
        OtherClip(video_id=_kinetics_id(row), source_id=row["youtube_id"], split=row.get("split", ""), path=None)
        for _, row in rows
    ]


def _kinetics_id(row: Mapping[str, str]) -> str:
    times = (row.get("time_start", ""), row.get("time_end", ""))
    return "_".join([row["youtube_id"], *(time.zfill(6) for time in times if time)])


def find_leaks(
    rows: Sequence[VideoRow],
    *,
    others: Sequence[OtherClip],
    hashes: Mapping[Path, str],
) -> list[Leak]:
    """Every pair of one of `rows` and one of `others` with the same source, then every pair with the same content hash.

    An id of theirs is compared with our source_id and with our video_id: other lists have but one column of ids.
    """
    by_source, by_hash = defaultdict[str, list[OtherClip]](list), defaultdict[str, list[OtherClip]](list)
    for other in others:
        by_source[other.source_id].append(other)
        if other.path is not None and other.path in hashes:
            by_hash[hashes[other.path]].append(other)
    leaks = []
    for row in rows:
        for source in dict.fromkeys((row.extra.get("source_id", row.video_id), row.video_id)):
            leaks += [_leak(row, other, by="source") for other in by_source.get(source, ())]
    for row in rows:
        leaks += [_leak(row, other, by="content") for other in by_hash.get(hashes.get(Path(row.path), ""), ())]
    return leaks


def _leak(row: VideoRow, other: OtherClip, *, by: Literal["source", "content"]) -> Leak:
    return Leak(
        video_id=row.video_id,
        split=row.split or "",
        other_video_id=other.video_id,
        other_split=other.split,
        by=by,
    )
