"""Building a frame cache: once, in parallel, and from where it was when something ended the process.

Each worker writes the frames of one clip to a file of its own, whole or not at all; this process appends these files,
in the order of the manifest, to the files of frames and their records to the index. So the same videos, library
versions and kind of CPU give the same bytes, with any number of workers and of interruptions. Files that could not be
read are part of the cache, with their cause: a cache of mended files is built in another folder.
"""

import io
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from coca_video.data.decode import Backend, UnreadableVideo, VideoReader
from coca_video.data.frame_cache import FrameCache
from coca_video.data.frame_cache_format import (
    FACTS_FILE,
    INDEX_FILE,
    CacheFacts,
    FrameCacheConfig,
    read_facts,
    record_dtype,
)
from coca_video.data.frame_cache_shards import (
    CLIPS_FOLDER,
    PARTIAL_PREFIX,
    EncodedClip,
    Shards,
    failed_clip,
    locked_index,
    write_clip,
    write_whole,
)
from coca_video.data.manifest import Manifest
from coca_video.data.sampling import uniform_indices
from coca_video.data.scan import Progress, load_decoders
from coca_video.data.video import open_window
from coca_video.data.workers import WorkerFailure, parallel

ESTIMATE_CLIPS = 8  # spread over the manifest and cached first: neighbours are often of one class, or one video
_DECODED_BYTES = 2**28  # decoded frames held at a time: 64 of 1920x1080 are 398 MB


@dataclass(frozen=True, kw_only=True)
class SizeEstimate:
    """Bytes of the whole cache, of what is still to be written, and free on the disk."""

    total_bytes: int
    left_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class FrameCacheReport:
    """What is in the cache. num_kept: clips that an earlier run had done; unreadable: video_id -> path and cause."""

    num_clips: int
    num_kept: int
    num_bytes: int
    unreadable: dict[str, str]


class _Job(NamedTuple):
    """A row of the manifest, as it goes to a worker."""

    number: int
    path: Path | str
    start_seconds: float | None
    end_seconds: float | None


def build_frame_cache(
    manifest: Manifest,
    *,
    folder: Path,
    config: FrameCacheConfig,
    decoder: Backend,
    num_workers: int,
    timeout_seconds: float,
    progress: Progress,
    on_estimate: Callable[[SizeEstimate], object],
) -> FrameCacheReport:
    """Caches every clip of the manifest in `folder`; goes on where an earlier run was ended, at any byte, by anything.

    `on_estimate` is called once, when some clips are done: what it raises ends the building. A clip that takes longer
    than `timeout_seconds`, or kills the process that reads it, is unreadable. A finished cache is only reported.

    Raises:
        ValueError: the folder holds a cache of another manifest or config, or other files; or another process is
            writing to it; or the decoder does not work here.
        OSError: the disk is full, or what else keeps files from being written.
    """
    facts = CacheFacts(fingerprint=manifest.fingerprint(), num_clips=len(manifest.rows), config=config)
    if _is_finished(folder, facts=facts):
        return _report(manifest, folder=folder, num_kept=len(manifest.rows))
    folder.mkdir(parents=True, exist_ok=True)
    with locked_index(folder) as index:
        if _is_finished(folder, facts=facts):  # by another process, since the question above
            return _report(manifest, folder=folder, num_kept=len(manifest.rows))
        write_whole(folder / FACTS_FILE, data=facts.to_json().encode())
        shards = Shards(folder, index=index, config=config)
        left = shards.recover(num_clips=facts.num_clips)
        num_kept = facts.num_clips - len(left)
        work = parallel(
            partial(_cache_clip, clips=folder / CLIPS_FOLDER, config=config, decoder=decoder),
            _jobs(manifest, rows=left),
            num_workers=num_workers,
            timeout_seconds=timeout_seconds,
            warm_up=_warm_up,
        )
        num_done, told = num_kept, False
        with progress("caching frames", total=facts.num_clips, initial=num_kept) as bar, closing(work):
            for job, result in work:
                if isinstance(result, WorkerFailure):
                    failed = failed_clip(result.cause, config=config)
                    result = write_clip(folder / CLIPS_FOLDER, number=job.number, clip=failed)
                shards.take(num_bytes=result)
                bar.update(1)
                num_done += 1
                if not told and num_done >= min(num_kept + ESTIMATE_CLIPS, facts.num_clips):
                    told = True
                    on_estimate(_estimate(folder, written=shards.num_bytes, done=num_done, total=facts.num_clips))
        write_whole(folder / FACTS_FILE, data=replace(facts, shard_sizes=shards.finish()).to_json().encode())
    return _report(manifest, folder=folder, num_kept=num_kept)


def _is_finished(folder: Path, *, facts: CacheFacts) -> bool:
    """Whether the cache asked for is there; ValueError for another one, and for a folder of other files."""
    found = read_facts(folder)
    if found is None:
        there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        foreign = sorted(name for name in there if name != INDEX_FILE and not name.startswith(PARTIAL_PREFIX))
        if foreign:
            raise ValueError(f"{folder} holds other files ({foreign[0]}); choose an empty folder for the frame cache.")
        return False
    if found.fingerprint != facts.fingerprint:
        raise ValueError(
            f"{folder} holds a frame cache of another manifest, or of other clips, labels, times, splits or classes; "
            "choose another folder."
        )
    if found.config != facts.config:
        raise ValueError(
            f"{folder} holds a frame cache of {found.config}, not of {facts.config}; choose another folder."
        )
    return found.shard_sizes is not None


def _jobs(manifest: Manifest, *, rows: Int64[np.ndarray, "left"]) -> Iterator[_Job]:
    """The rows, those for the estimate first."""
    if len(rows) == 0:
        return
    first = np.unique(uniform_indices(len(rows), num_samples=min(ESTIMATE_CLIPS, len(rows))))
    for number in (*rows[first].tolist(), *np.delete(rows, first).tolist()):
        row = manifest.rows[number]
        yield _Job(number, row.path, row.start_seconds, row.end_seconds)


def _estimate(folder: Path, *, written: int, done: int, total: int) -> SizeEstimate:
    total_bytes = written * total // done
    free_bytes = shutil.disk_usage(folder).free
    return SizeEstimate(total_bytes=total_bytes, left_bytes=total_bytes - written, free_bytes=free_bytes)


def _report(manifest: Manifest, *, folder: Path, num_kept: int) -> FrameCacheReport:
    cache = FrameCache(folder)
    rows = {number: manifest.rows[number] for number in cache.unreadable()}
    return FrameCacheReport(
        num_clips=len(cache),
        num_kept=num_kept,
        num_bytes=sum(cache.facts.shard_sizes or ()) + (folder / INDEX_FILE).stat().st_size,
        unreadable={row.video_id: f"{row.path}: {cache.cause(number)}" for number, row in rows.items()},
    )


def _warm_up() -> None:
    torch.set_num_threads(1)  # a process a core
    load_decoders()


def _cache_clip(job: _Job, *, clips: Path, config: FrameCacheConfig, decoder: Backend) -> int:
    """Writes the frames of one clip, or why there are none, to a file of its own; how many bytes they are."""
    try:
        clip = _read_clip(job, config=config, decoder=decoder)
    except UnreadableVideo as error:
        clip = failed_clip(str(error).removeprefix(f"{job.path}: "), config=config)
    except OSError as error:
        clip = failed_clip(f"it cannot be read ({error.strerror or error})", config=config)
    return write_clip(clips, number=job.number, clip=clip)


def _read_clip(job: _Job, *, config: FrameCacheConfig, decoder: Backend) -> EncodedClip:
    times = {"start_seconds": job.start_seconds, "end_seconds": job.end_seconds}
    with open_window(job.path, decoder=decoder, **times) as (video, first, last):
        numbers = first + uniform_indices(last - first, num_samples=min(config.num_frames, last - first))
        frames = _resized(video, numbers=numbers.tolist(), short_side=config.short_side)
        jpegs = [_to_jpeg(frame, quality=config.quality) for frame in frames]
        record = np.zeros(1, dtype=record_dtype(config.num_frames))[0]
        record["num_cached"] = count = len(numbers)
        record["height"], record["width"] = frames.shape[2:]
        record["video_frames"], record["first"], record["last"] = video.num_frames, first, last
        record["frames_per_second"] = video.frames_per_second
        record["numbers"][:count] = numbers
        record["times_seconds"][:count] = video.times_seconds[numbers]
        record["sizes"][:count] = [len(jpeg) for jpeg in jpegs]
        record["checksums"][:count] = [zlib.crc32(jpeg) for jpeg in jpegs]
    return EncodedClip(record, b"".join(jpegs))


def _resized(video: VideoReader, *, numbers: list[int], short_side: int) -> UInt8[Tensor, "frames 3 height width"]:
    """Frames with the short side no longer than `short_side`, antialiased; a few at a time, as memory allows."""
    many = max(1, _DECODED_BYTES // (3 * video.height * video.width))
    parts = []
    for start in range(0, len(numbers), many):
        part = video.frames(numbers[start : start + many])
        shrink = min(video.height, video.width) > short_side
        parts.append(F.resize(part, [short_side], antialias=True) if shrink else part)
    return torch.cat(parts)


def _to_jpeg(frame: UInt8[Tensor, "3 height width"], *, quality: int) -> bytes:
    """Chroma is halved, as it was in the video: keeping it whole gains 2 dB and costs 22% more bytes at quality 90."""
    buffer = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
