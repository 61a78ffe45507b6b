"""Evaluating a classifier by a test protocol: several clips and crops of every video, their scores made one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from itertools import islice

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, UInt8
from torch import Tensor

from coca_video.data.deadline import within
from coca_video.data.decode import Backend, UnreadableVideo
from coca_video.data.frame_cache import FrameCache
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest
from coca_video.data.transforms import Interpolation, horizontal_flip, resize_crop
from coca_video.data.video import open_window
from coca_video.data.views import CropView, Protocol
from coca_video.eval.classification import ClassificationResult, Scored, make_result, softmax_scores
from coca_video.eval.features import encode_frames
from coca_video.eval.passes import one_pass, over_ranks, share_of_rank
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class VideoViews:
    """All views of a video: those of the first crop, clip after clip, then those of the next crop."""

    frames: UInt8[Tensor, "views frames 3 size size"]
    label: int
    video_id: str


@dataclass(frozen=True)
class MultiViewDataset:
    """The views of a manifest's labelled videos, by SampleKey; the epoch changes nothing.

    A row's start_seconds and end_seconds bound what the protocol takes for the video. A crop is resized to image_size,
    whatever size the peer's was. A video that takes longer than timeout_seconds to read counts as unreadable.
    """

    manifest: Manifest
    _: KW_ONLY
    protocol: Protocol
    image_size: int
    interpolation: Interpolation = "bilinear"
    decoder: Backend = "auto"
    timeout_seconds: float = 60.0

    def __post_init__(self) -> None:
        if self.image_size < 1 or not self.timeout_seconds > 0:
            raise ValueError(
                "expected image_size of at least 1 and timeout_seconds above 0, "
                f"got {self.image_size} and {self.timeout_seconds}"
            )

    def __len__(self) -> int:
        return len(self.manifest.rows)

    @property
    def sample_timeout_seconds(self) -> float:
        """The most that reading a video takes: see `loader_workers.TimeLimited`."""
        return self.timeout_seconds

    def __getitem__(self, key: SampleKey) -> VideoViews | Unreadable:
        """The views of row key.index, or the name and cause of a video that cannot be read."""
        row = self.manifest.rows[key.index]
        label = self.manifest.label_index(row)
        try:
            frames, places = within(self.timeout_seconds, lambda: self._read(key.index), name=str(row.path))
        except UnreadableVideo as error:
            return Unreadable(key=row.video_id, cause=str(error))
        crops = self.protocol.crop_views(*frames.shape[-2:])
        views = cut_views(
            frames, places=places, crops=crops, image_size=self.image_size, interpolation=self.interpolation
        )
        return VideoViews(frames=views, label=label, video_id=row.video_id)

    def _read(self, index: int) -> tuple[UInt8[Tensor, "needed 3 height width"], Int64[np.ndarray, "clips frames"]]:
        """The frames that any clip needs, each once, and where among them those of each clip are."""
        row = self.manifest.rows[index]
        times = {"start_seconds": row.start_seconds, "end_seconds": row.end_seconds}
        with open_window(row.path, decoder=self.decoder, **times) as (reader, first, last):
            indices = first + self.protocol.frame_indices(
                num_frames=last - first, frames_per_second=reader.frames_per_second
            )
            needed = np.unique(indices)
            return reader.frames(needed.tolist()), np.searchsorted(needed, indices)


@dataclass(frozen=True)
class CachedMultiViewDataset(MultiViewDataset):
    """The same from a frame cache; ValueError where the protocol takes a frame that it does not keep."""

    _: KW_ONLY
    cache: FrameCache

    def _read(self, index: int) -> tuple[UInt8[Tensor, "needed 3 height width"], Int64[np.ndarray, "clips frames"]]:
        if (cause := self.cache.cause(index)) is not None:
            raise UnreadableVideo(f"{self.manifest.rows[index].path}: {cause}")
        cached = self.cache.clip(index)
        num_frames = cached.last_frame - cached.first_frame
        rule = self.protocol.frame_indices(num_frames=num_frames, frames_per_second=cached.frames_per_second)
        needed = np.unique(rule)
        positions = cached.positions_of((cached.first_frame + needed).tolist())
        return cached.frames(positions), np.searchsorted(needed, rule)


def cut_views(
    frames: UInt8[Tensor, "needed 3 height width"],
    *,
    places: Int64[np.ndarray, "clips frames"],
    crops: Sequence[CropView],
    image_size: int,
    interpolation: Interpolation,
) -> UInt8[Tensor, "views frames 3 size size"]:
    """Every clip in every crop, in the order of `VideoViews`; a frame is cut and resized once a box."""
    resized = {
        box: resize_crop(frames, box=box, size=image_size, interpolation=interpolation)
        for box in dict.fromkeys(crop.box for crop in crops)
    }
    views = torch.empty(len(crops), *places.shape, 3, image_size, image_size, dtype=torch.uint8)
    for view, crop in zip(views, crops, strict=True):
        cut = resized[crop.box]
        view.copy_((horizontal_flip(cut) if crop.flipped else cut)[torch.from_numpy(places)])
    return views.flatten(0, 1)


@torch.no_grad()
def evaluate_views(
    model: VideoClassifier,
    *,
    dataset: MultiViewDataset,
    classes: tuple[str, ...],
    device: torch.device,
    batch_size: int = 16,
    num_workers: int = 0,
    bf16: bool = False,
    on_batch: Callable[[int], object] | None = None,
) -> ClassificationResult:
    """Scores every video of `dataset` by its protocol: the mean softmax of its views, in float64.

    For "concatenate_clips" one softmax comes from the tokens of all clips of a crop, pooled together.

    Args:
        batch_size: of views; the encoder always sees as many, whatever videos they are of. It is the most that the
            device holds at a time beside the views of two videos and the tokens that are pooled together.
        num_workers: processes that read, each a video at a time.
        on_batch: called with 1 for each video that was read or cannot be.

    Ranks share the videos, and each gets the whole result.
    """
    if batch_size < 1:
        raise ValueError(f"expected batch_size of at least 1, got {batch_size}")
    unreadable: list[Unreadable] = []
    seen: list[tuple[str, int]] = []
    videos = one_pass(
        share_of_rank(dataset),
        batch_size=1,
        num_workers=num_workers,
        collate=_only,
        device=device,
        unreadable=unreadable,
        on_batch=on_batch,
    )
    rule = dataset.protocol
    num_pooled = rule.num_clips if rule.aggregate == "concatenate_clips" else 1
    chunks = _chunks(_noted(videos, seen=seen), size=batch_size)
    tokens = (encode_frames(model, chunk, device=device, bf16=bf16) for chunk in chunks)
    scores = (row for pooled in _pooled_together(tokens, size=num_pooled) for row in softmax_scores(model, pooled))
    means = list(_means(scores, size=rule.num_views // num_pooled))
    # More means than videos where padding was scored too: it comes last.
    scored = [Scored(video_id, label, mean) for (video_id, label), mean in zip(seen, means, strict=False)]
    assert len(scored) == len(seen), f"{len(seen)} videos, {len(means)} scores"
    return make_result(over_ranks(scored), classes=classes, unreadable=over_ranks(unreadable))


def _only(videos: Sequence[VideoViews]) -> VideoViews:
    (video,) = videos
    return video


def _noted(videos: Iterable[VideoViews], *, seen: list[tuple[str, int]]) -> Iterator[VideoViews]:
    for video in videos:
        seen.append((video.video_id, video.label))
        yield video


def _chunks(videos: Iterable[VideoViews], *, size: int) -> Iterator[UInt8[Tensor, "size frames 3 height width"]]:
    """The views of one video after the other, `size` at a time, the last filled up with black ones."""
    waiting: Tensor | None = None
    for video in videos:
        waiting = _joined(waiting, video.frames)
        while len(waiting) >= size:
            yield waiting[:size]
            waiting = waiting[size:]
    if waiting is not None and len(waiting):
        yield torch.cat([waiting, waiting.new_zeros(size - len(waiting), *waiting.shape[1:])])


def _pooled_together(
    views: Iterable[Float[Tensor, "views frames tokens dim"]], *, size: int
) -> Iterator[Float[Tensor, "pooled all_frames tokens dim"]]:
    """The tokens of each `size` views in a row as one set, frame after frame."""
    waiting: Tensor | None = None
    for tokens in views:
        waiting = _joined(waiting, tokens)
        whole = len(waiting) - len(waiting) % size
        if whole:
            yield waiting[:whole].reshape(whole // size, -1, *waiting.shape[2:])
        waiting = waiting[whole:]


def _joined(before: Tensor | None, after: Tensor) -> Tensor:
    return after if before is None or not len(before) else torch.cat([before, after])


def _means(rows: Iterator[Float64[np.ndarray, "classes"]], *, size: int) -> Iterator[Float64[np.ndarray, "classes"]]:
    """The mean of each `size` rows; what is left over is not one."""
    while len(group := list(islice(rows, size))) == size:
        yield np.mean(group, axis=0)
