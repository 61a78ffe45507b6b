"""Rows of a manifest as a few arrays, so that a list of 240,000 clips costs little and worker processes share it.

Reading a Python object writes its reference count, which makes a forked process copy the page that it lies on: each
worker that goes through a list of VideoRows ends with a copy of it. Arrays have one count for all rows. (issue 5)
"""

import itertools
import json
import math
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsIndex, overload

import numpy as np
from jaxtyping import Bool, Float64, Int64

# File names need not be text: Python stands in for their odd bytes with lone surrogates, which plain UTF-8 refuses.
_SURROGATES = "surrogatepass"
_ROWS_A_PIECE = 1024  # all rows at once would be 240,000 lists


@dataclass(frozen=True, kw_only=True)
class VideoRow:
    """One clip: a file, or the part of it in [start_seconds, end_seconds); None is the file's own start or end.

    path: of a video file or of a folder of images; a str is a URL that fsspec knows, s3://bucket/clip.mp4.
    """

    path: Path | str
    label: str | None
    video_id: str
    start_seconds: float | None = None
    end_seconds: float | None = None
    split: str | None = None
    extra: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextColumn(Sequence[str | None]):
    """Texts, or None where there is none, as one run of UTF-8: text i is data[offsets[i]:offsets[i + 1]]."""

    data: bytes
    offsets: Int64[np.ndarray, "rows_and_end"]
    present: Bool[np.ndarray, "rows"]

    def __len__(self) -> int:
        return len(self.present)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> str | None: ...

    @overload
    def __getitem__(self, index: slice, /) -> "TextColumn": ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> "str | TextColumn | None":
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        row = range(len(self))[index]
        if not self.present[row]:
            return None
        return self.data[self.offsets[row] : self.offsets[row + 1]].decode("utf-8", _SURROGATES)

    def __iter__(self) -> Iterator[str | None]:
        """The same as by index, four times faster: numpy's numbers are slow one by one."""
        start, present = 0, self.present.tolist()
        for end, there in zip(self.offsets[1:].tolist(), present, strict=True):
            yield self.data[start:end].decode("utf-8", _SURROGATES) if there else None
            start = end

    def take(self, indices: Int64[np.ndarray, "chosen"]) -> "TextColumn":
        """The texts at `indices`, in that order."""
        starts, ends = self.offsets[indices], self.offsets[indices + 1]
        data = b"".join([self.data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)])
        return TextColumn(data=data, offsets=_offsets(ends - starts), present=self.present[indices])


@dataclass(frozen=True, kw_only=True, eq=False)
class VideoRows(Sequence[VideoRow]):
    """A Sequence of VideoRow that keeps columns and makes a row when it is asked for; equal to a tuple of equal rows.

    A row is a new object each time. Seconds are NaN where a row has None.
    """

    paths: TextColumn
    is_url: Bool[np.ndarray, "rows"]
    labels: TextColumn
    video_ids: TextColumn
    start_seconds: Float64[np.ndarray, "rows"]
    end_seconds: Float64[np.ndarray, "rows"]
    splits: TextColumn
    extra: dict[str, TextColumn]

    @classmethod
    def of(cls, rows: Iterable[VideoRow]) -> "VideoRows":
        """The columns of `rows`, of which no more than one is in memory where they come from a generator."""
        columns = _Columns()
        for row in rows:
            columns.append(row)
        return columns.finish()

    def __len__(self) -> int:
        return len(self.is_url)

    @overload
    def __getitem__(self, index: SupportsIndex, /) -> VideoRow: ...

    @overload
    def __getitem__(self, index: slice, /) -> "VideoRows": ...

    def __getitem__(self, index: SupportsIndex | slice, /) -> "VideoRow | VideoRows":
        if isinstance(index, slice):
            return self.take(np.arange(len(self), dtype=np.int64)[index])
        row = range(len(self))[index]
        path, video_id = self.paths[row], self.video_ids[row]
        assert path is not None and video_id is not None
        return VideoRow(
            path=path if self.is_url[row] else Path(path),
            label=self.labels[row],
            video_id=video_id,
            start_seconds=_none_or_seconds(self.start_seconds[row]),
            end_seconds=_none_or_seconds(self.end_seconds[row]),
            split=self.splits[row],
            extra={name: text for name, column in self.extra.items() if (text := column[row]) is not None},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, VideoRows | tuple | list):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # rows hold dicts

    def take(self, indices: Int64[np.ndarray, "chosen"]) -> "VideoRows":
        """The rows at `indices`, in that order."""
        return VideoRows(
            paths=self.paths.take(indices),
            is_url=self.is_url[indices],
            labels=self.labels.take(indices),
            video_ids=self.video_ids.take(indices),
            start_seconds=self.start_seconds[indices],
            end_seconds=self.end_seconds[indices],
            splits=self.splits.take(indices),
            extra={name: column.take(indices) for name, column in self.extra.items()},
        )

    def json_pieces(self) -> Iterator[str]:
        """The JSON of [video_id, label, start_seconds, end_seconds, split] of every row, joined by ", "; in pieces."""
        seconds = [[_none_or_seconds(s) for s in c.tolist()] for c in (self.start_seconds, self.end_seconds)]
        told = zip(self.video_ids, self.labels, *seconds, self.splits, strict=True)
        separator = ""
        while some := list(itertools.islice(told, _ROWS_A_PIECE)):
            yield separator + json.dumps(some)[1:-1]
            separator = ", "


def _none_or_seconds(seconds: float) -> float | None:
    return None if math.isnan(seconds) else float(seconds)


class _TextBuilder:
    """A TextColumn in the making."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._lengths = array("q")  # arrays all through: a list of numbers is a list of objects

    def append(self, text: str | None) -> None:
        encoded = b"" if text is None else text.encode("utf-8", _SURROGATES)
        self._data += encoded
        self._lengths.append(-1 if text is None else len(encoded))

    def pad(self, num_rows: int) -> None:
        """Appends None until there are `num_rows`."""
        self._lengths.extend([-1] * (num_rows - len(self._lengths)))

    def finish(self) -> TextColumn:
        lengths = np.array(self._lengths, dtype=np.int64)
        return TextColumn(data=bytes(self._data), offsets=_offsets(lengths.clip(min=0)), present=lengths >= 0)


def _offsets(lengths: Int64[np.ndarray, "rows"]) -> Int64[np.ndarray, "rows_and_end"]:
    return np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])


class _Columns:
    """VideoRows in the making."""

    def __init__(self) -> None:
        self._paths, self._labels, self._video_ids, self._splits = (_TextBuilder() for _ in range(4))
        self._is_url, self._start_seconds, self._end_seconds = bytearray(), array("d"), array("d")
        self._extra: dict[str, _TextBuilder] = {}

    def append(self, row: VideoRow) -> None:
        for name, text in row.extra.items():
            column = self._extra.setdefault(name, _TextBuilder())
            column.pad(len(self._is_url))
            column.append(text)
        self._paths.append(os.fspath(row.path))
        self._is_url.append(isinstance(row.path, str))
        self._labels.append(row.label)
        self._video_ids.append(row.video_id)
        self._splits.append(row.split)
        for seconds, values in ((row.start_seconds, self._start_seconds), (row.end_seconds, self._end_seconds)):
            assert seconds is None or not math.isnan(seconds), f"NaN seconds stand for None: {row}"
            values.append(float("nan") if seconds is None else seconds)

    def finish(self) -> VideoRows:
        for column in self._extra.values():
            column.pad(len(self._is_url))
        return VideoRows(
            paths=self._paths.finish(),
            is_url=np.array(self._is_url).astype(np.bool_),
            labels=self._labels.finish(),
            video_ids=self._video_ids.finish(),
            start_seconds=np.array(self._start_seconds, dtype=np.float64),
            end_seconds=np.array(self._end_seconds, dtype=np.float64),
            splits=self._splits.finish(),
            extra={name: column.finish() for name, column in self._extra.items()},
        )
