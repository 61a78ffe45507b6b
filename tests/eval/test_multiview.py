"""Test protocols on drawn clips: against a plain loop over views in float64, and at any number of ranks and batches."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
import pytest
import torch
from jaxtyping import Float64, UInt8
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from coca_video.data import video
from coca_video.data.decode import VideoReader, open_video, write_video
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import Manifest, VideoRow, read_manifest, write_manifest
from coca_video.data.transforms import normalize
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.data.views import Protocol, protocol
from coca_video.eval.classification import ClassificationResult, evaluate_clips, make_result
from coca_video.eval.multiview import MultiViewDataset, VideoViews, evaluate_views
from coca_video.eval.passes import one_pass, share_of
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.synthetic import ACTIONS, clip_parameters, render_clip
from tests.ranks import on_ranks

CPU = torch.device("cpu")
SIZE = 48
NUM_CLIPS = 37
# Few frames a clip, so that a test takes seconds; strides stay the peers'.
DENSE = replace(protocol("mmaction2_dense"), num_clips=3, frames_per_clip=3)
UNIFORMER = replace(protocol("uniformerv2"), num_clips=2, frames_per_clip=2)
SMALL: dict[str, Protocol] = {
    "uniform": replace(protocol("uniform"), num_clips=2, frames_per_clip=3),
    "mmaction2_tsn": replace(protocol("mmaction2_tsn"), num_clips=4),
    "mmaction2_dense": DENSE,
    "slowfast": replace(protocol("slowfast"), num_clips=3, frames_per_clip=3),
    "pytorchvideo": replace(protocol("pytorchvideo"), num_clips=2, frames_per_clip=3, clip_seconds=1.0),
    "uniformerv2": UNIFORMER,
    "videomae": replace(protocol("videomae"), num_clips=2, frames_per_clip=3),
    "videomae_ssv2": replace(protocol("videomae_ssv2"), frames_per_clip=3),
    "vjepa2": replace(protocol("vjepa2"), num_clips=3, frames_per_clip=2),
}


def draw(folder: Path, *, index: int) -> VideoRow:
    """Clip `index`, cut to a wide or a high picture, so that crops differ; 12 to 48 frames."""
    parameters = clip_parameters(index, seed=3, split="views", num_frames=12 + index)
    frames = render_clip(parameters, size=SIZE)
    path = folder / f"view_{index * 7 % NUM_CLIPS:03d}.mp4"  # not in the order of their names
    cut = frames[:, :, 8:40] if index % 2 else frames[:, :, :, 6:38]
    write_video(path, frames=cut, frames_per_second=8.0 + index % 3, crf=12)
    return VideoRow(path=path, label=parameters.action, video_id=path.stem)


@pytest.fixture(scope="module")
def clips_csv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """37 clips, and two files that are no video: one that each of two ranks comes to."""
    folder = tmp_path_factory.mktemp("views")
    rows = [draw(folder, index=index) for index in range(NUM_CLIPS)]
    for place, name in ((5, "broken_b"), (12, "broken_a")):
        (folder / f"{name}.mp4").write_bytes(b"no video")
        rows.insert(place, VideoRow(path=folder / f"{name}.mp4", label=ACTIONS[0], video_id=name))
    write_manifest(folder / "manifest.csv", rows=rows, classes=ACTIONS)
    return folder / "manifest.csv"


@pytest.fixture(scope="module")
def few(clips_csv: Path) -> Manifest:
    """The first five, one of each class, high and wide in turn."""
    manifest = read_manifest(clips_csv)
    return replace(manifest, rows=list(manifest.rows)[:5])


def random_model() -> VideoClassifier:
    """Random weights, far enough from zero that scores differ, and logits as small as a trained model's."""
    torch.manual_seed(0)
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=len(ACTIONS), num_frames=3)
    model = VideoClassifier(config)
    with torch.no_grad():
        model.head.classifier.weight.normal_(std=0.2)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VideoClassifier:
    return random_model()


def evaluate(
    model: VideoClassifier, manifest: Manifest, *, rule: Protocol, batch_size: int = 16, **options: Any
) -> ClassificationResult:
    dataset = MultiViewDataset(manifest, protocol=rule, image_size=SIZE)
    return evaluate_views(model, dataset=dataset, classes=ACTIONS, device=CPU, batch_size=batch_size, **options)


def pyav_frames(path: Path | str) -> UInt8[Tensor, "frames 3 height width"]:
    """All frames, decoded in order."""
    with av.open(str(path)) as container:
        pictures = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def naive_scores(
    model: VideoClassifier, path: Path | str, *, rule: Protocol, frames_per_second: float
) -> Float64[np.ndarray, "classes"]:
    """One view at a time, one frame at a time, everything in float64; pooled clips are one clip of all their frames."""
    exact = copy.deepcopy(model).double()
    frames = pyav_frames(path)
    clips = rule.frame_indices(num_frames=len(frames), frames_per_second=frames_per_second)
    if rule.aggregate == "concatenate_clips":
        clips = clips.reshape(1, -1)
    mean = torch.tensor(model.config.image.mean, dtype=torch.float64).view(3, 1, 1)
    std = torch.tensor(model.config.image.std, dtype=torch.float64).view(3, 1, 1)
    softmaxes = []
    for clip in clips:
        for (top, left, height, width), flipped in rule.crop_views(*frames.shape[-2:]):
            pixels = []
            for index in clip:
                picture = F.resized_crop(frames[int(index)], top, left, height, width, [SIZE, SIZE], antialias=True)
                pixels.append(((F.hflip(picture) if flipped else picture).double() / 255 - mean) / std)
            with torch.no_grad():
                softmaxes.append(exact(torch.stack(pixels)[None])[0].softmax(dim=0).numpy())
    result: Float64[np.ndarray, "classes"] = np.mean(softmaxes, axis=0)
    return result


@pytest.mark.parametrize("name", SMALL)
def test_scores_are_those_of_a_plain_loop_over_views(model: VideoClassifier, few: Manifest, name: str) -> None:
    rule = SMALL[name]
    result = evaluate(model, few, rule=rule, batch_size=5)
    assert result.video_ids == tuple(sorted(row.video_id for row in few.rows))
    rates = {row.video_id: 8.0 + index % 3 for index, row in enumerate(few.rows)}
    for row in list(few.rows)[:3]:
        place = result.video_ids.index(row.video_id)
        expected = naive_scores(model, row.path, rule=rule, frames_per_second=rates[row.video_id])
        np.testing.assert_allclose(result.scores[place], expected, atol=1e-6, rtol=0)  # float32 inside: 4e-7 at most
        assert ACTIONS[result.labels[place]] == row.label


def test_each_part_of_a_protocol_changes_the_scores(model: VideoClassifier, few: Manifest) -> None:
    """So that the equality above is no equality of constants."""
    rules = [
        DENSE,
        replace(DENSE, num_clips=2),
        replace(DENSE, frames_per_clip=2),
        replace(DENSE, stride=1),
        replace(DENSE, crops="centre"),
        replace(DENSE, crops="ten"),
        replace(DENSE, crops="centre", crop_size=128),
        replace(DENSE, aggregate="concatenate_clips"),
        UNIFORMER,
    ]
    scores = [evaluate(model, few, rule=rule).scores for rule in rules]
    for first in range(len(rules)):
        for second in range(first):
            assert np.abs(scores[first] - scores[second]).max() > 1e-5, (rules[first], rules[second])


def test_size_interpolation_and_precision_change_the_scores(model: VideoClassifier, few: Manifest) -> None:
    plain = evaluate(model, few, rule=UNIFORMER).scores
    views = MultiViewDataset(few, protocol=UNIFORMER, image_size=SIZE, interpolation="bicubic")
    bicubic = evaluate_views(model, dataset=views, classes=ACTIONS, device=CPU).scores
    bf16 = evaluate(model, few, rule=UNIFORMER, bf16=True).scores
    assert np.abs(bicubic - plain).max() > 1e-5 and 1e-5 < np.abs(bf16 - plain).max() < 0.02
    for bad in ({"image_size": 0}, {"image_size": SIZE, "timeout_seconds": 0.0}):
        with pytest.raises(ValueError, match="expected image_size of at least 1 and timeout_seconds above 0"):
            MultiViewDataset(few, protocol=UNIFORMER, **bad)
    with pytest.raises(ValueError, match="expected batch_size of at least 1, got 0"):
        evaluate(model, few, rule=UNIFORMER, batch_size=0)


class Opened(NamedTuple):
    """A video that was opened, and the frame numbers that were asked for at each call."""

    path: Path | str
    asked: list[list[int]]


class CountingReader:
    """A reader that notes what is asked of it."""

    def __init__(self, reader: VideoReader, *, asked: list[list[int]]) -> None:
        self._reader, self._asked = reader, asked

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def frames(self, indices: Sequence[int]) -> Tensor:
        self._asked.append(list(indices))
        return self._reader.frames(indices)


@pytest.mark.parametrize(
    "rule",
    [replace(DENSE, num_clips=5, frames_per_clip=4, stride=1), replace(SMALL["vjepa2"], frames_per_clip=3, stride=2)],
    ids=["dense", "vjepa2"],
)
def test_a_video_is_opened_once_and_a_frame_decoded_once(
    model: VideoClassifier, few: Manifest, rule: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Opened] = []

    @contextmanager
    def counting(path: Path, **options: Any) -> Iterator[CountingReader]:
        opened.append(Opened(path, []))
        with open_video(path, **options) as reader:
            yield CountingReader(reader, asked=opened[-1].asked)

    plain = evaluate(model, few, rule=rule)
    monkeypatch.setattr(video, "open_video", counting)
    done: list[int] = []
    again = evaluate(model, few, rule=rule, on_batch=done.append)
    np.testing.assert_array_equal(again.scores, plain.scores)
    assert [str(each.path) for each in opened] == [str(row.path) for row in few.rows] and done == [1] * 5
    for index, each in enumerate(opened):
        indices = rule.frame_indices(num_frames=12 + index, frames_per_second=8.0 + index % 3)
        assert each.asked == [sorted(set(indices.ravel().tolist()))]
        assert len(each.asked[0]) < indices.size  # clips of these videos share frames, or repeat their last


def test_views_are_crop_after_crop_and_clip_after_clip(few: Manifest) -> None:
    dataset = MultiViewDataset(few, protocol=SMALL["mmaction2_tsn"], image_size=SIZE)
    sample = dataset[SampleKey(0, 1)]
    assert isinstance(sample, VideoViews) and sample.frames.shape == (40, 1, 3, SIZE, SIZE)
    frames = pyav_frames(few.rows[1].path)
    rule = dataset.protocol
    clips = rule.frame_indices(num_frames=13, frames_per_second=9.0)
    view = 0
    for (top, left, height, width), flipped in rule.crop_views(*frames.shape[-2:]):
        for clip in clips:
            cut = F.resized_crop(frames[int(clip[0])], top, left, height, width, [SIZE, SIZE], antialias=True)
            assert torch.equal(sample.frames[view, 0], F.hflip(cut) if flipped else cut)
            view += 1
    assert view == 40


def test_the_times_of_a_row_bound_its_frames(few: Manifest) -> None:
    """Half a second of 8 frames each second from 0.5 s on: frames 4 to 7."""
    rule = replace(protocol("mmaction2_tsn"), num_clips=4, crops="centre", crop_size=256)
    row = replace(few.rows[0], start_seconds=0.5, end_seconds=1.0)
    late = replace(row, video_id="late", start_seconds=60.0, end_seconds=61.0)
    dataset = MultiViewDataset(replace(few, rows=[row, late]), protocol=rule, image_size=32)
    sample = dataset[SampleKey(0, 0)]
    assert isinstance(sample, VideoViews)
    cut = pyav_frames(row.path)  # 48 x 32, so the centre is rows 8 to 39, as they are
    assert torch.equal(sample.frames[:, 0], cut[4:8, :, 8:40])
    beyond = dataset[SampleKey(0, 1)]
    assert isinstance(beyond, Unreadable) and beyond.key == "late"
    assert beyond.cause.endswith("start_seconds is 60.0, but the last frame of the video is at 1.375 s")


@pytest.mark.parametrize(("rule", "batch_size"), [(UNIFORMER, 7), (UNIFORMER, 16), (SMALL["vjepa2"], 4)])
def test_the_encoder_always_sees_as_many_views(
    model: VideoClassifier, few: Manifest, rule: Protocol, batch_size: int
) -> None:
    shapes: list[tuple[int, ...]] = []
    hook = model.encoder.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    evaluate(model, few, rule=rule, batch_size=batch_size)
    hook.remove()
    num_chunks = -(-5 * rule.num_views // batch_size)
    assert shapes == [(batch_size * rule.frames_per_clip, 3, SIZE, SIZE)] * num_chunks
    assert 5 * rule.num_views % batch_size  # so there was padding


def test_workers_and_batch_size_change_nothing(model: VideoClassifier, few: Manifest) -> None:
    for rule in (UNIFORMER, SMALL["vjepa2"]):
        one = evaluate(model, few, rule=rule, batch_size=1)
        for options in ({"batch_size": 7}, {"batch_size": 64}, {"batch_size": 1, "num_workers": 2}):
            other = evaluate(model, few, rule=rule, **options)
            assert other.metrics == one.metrics
            np.testing.assert_allclose(other.scores, one.scores, atol=1e-6, rtol=0)


def test_one_clip_scores_are_those_of_a_plain_loop_bit_for_bit(model: VideoClassifier, clips_csv: Path) -> None:
    """What `evaluate` computes without a protocol: the same operations on the same batches."""
    manifest = read_manifest(clips_csv)
    dataset = VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=SIZE), seed=0)
    result = evaluate_clips(model, dataset=dataset, classes=ACTIONS, device=CPU, batch_size=7)
    expected: dict[str, np.ndarray] = {}
    image = model.config.image
    for first in range(0, len(dataset), 7):
        samples = [dataset[SampleKey(0, index)] for index in range(first, min(first + 7, len(dataset)))]
        clips = [sample for sample in samples if not isinstance(sample, Unreadable)]
        pixels = normalize(torch.stack([clip.frames for clip in clips]), mean=image.mean, std=image.std)
        with torch.no_grad():
            rows = model.classify(model.encode(pixels)).double().softmax(dim=1).numpy()
        expected |= {clip.video_id: row for clip, row in zip(clips, rows, strict=True)}
    assert list(result.video_ids) == sorted(expected) and len(expected) == NUM_CLIPS
    np.testing.assert_array_equal(result.scores, np.stack([expected[name] for name in result.video_ids]))
    uniform = evaluate(model, manifest, rule=protocol("uniform", frames_per_clip=3))
    assert uniform.metrics == result.metrics
    np.testing.assert_allclose(uniform.scores, result.scores, atol=1e-6, rtol=0)


def evaluate_everything(manifest_csv: Path) -> dict[str, ClassificationResult]:
    """By protocol and batch size, and without one; of this rank's point of view."""
    manifest, model = read_manifest(manifest_csv), random_model()
    dataset = VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=SIZE), seed=0)
    results = {}
    for batch_size in (1, 16):
        options: dict[str, Any] = {"classes": ACTIONS, "device": CPU, "batch_size": batch_size}
        results[f"one clip {batch_size}"] = evaluate_clips(model, dataset=dataset, **options)
        for name in ("uniformerv2", "vjepa2"):
            views = MultiViewDataset(manifest, protocol=SMALL[name], image_size=SIZE)
            results[f"{name} {batch_size}"] = evaluate_views(model, dataset=views, **options)
    return results


@pytest.mark.drill
def test_37_clips_on_one_and_two_ranks(clips_csv: Path) -> None:
    """At batch sizes 1 and 16: equal counts, the same two unreadable, scores to 1e-6."""
    alone = evaluate_everything(clips_csv)
    ranks = on_ranks(evaluate_everything, num_ranks=2, manifest_csv=clips_csv)
    for rank in ranks:
        for name, result in rank.items():
            one = alone[f"{name.rpartition(' ')[0]} 1"]
            assert len(result.video_ids) == result.metrics.num_videos == NUM_CLIPS
            assert result.video_ids == one.video_ids and result.metrics == one.metrics
            assert [failed.key for failed in result.unreadable] == ["broken_a", "broken_b"]
            assert result.unreadable == one.unreadable and result.metrics.num_unreadable == 2
            np.testing.assert_array_equal(result.labels, one.labels)
            np.testing.assert_allclose(result.scores, one.scores, atol=1e-6, rtol=0)
    for name, result in ranks[0].items():
        np.testing.assert_array_equal(ranks[1][name].scores, result.scores)
    assert np.abs(alone["one clip 1"].scores - alone["uniformerv2 1"].scores).max() > 1e-4
    assert np.abs(alone["vjepa2 1"].scores - alone["uniformerv2 1"].scores).max() > 1e-4


class Numbers:
    """0, 1, 2, ... by index, one of them unreadable."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, key: SampleKey) -> int | Unreadable:
        return Unreadable(key="4", cause="it is 4") if key.index == 4 else key.index


@pytest.mark.parametrize(("size", "count"), [(10, 1), (10, 3), (3, 3), (2, 3), (1, 4)])
def test_ranks_share_all_samples_and_repeat_none(size: int, count: int) -> None:
    seen, unreadable, dealt_with = [], list[Unreadable](), list[int]()
    for number in range(count):
        share = share_of(Numbers(size), number=number, count=count)
        batches = one_pass(
            share,
            batch_size=2,
            num_workers=0,
            collate=list,
            device=CPU,
            unreadable=unreadable,
            on_batch=dealt_with.append,
        )
        seen += [value for batch in batches for value in batch]
    assert sorted(seen) == [value for value in range(size) if value != 4]
    assert [failed.key for failed in unreadable] == (["4"] if size > 4 else []) and sum(dealt_with) == size


def test_nothing_readable_is_a_sentence() -> None:
    with pytest.raises(ValueError, match="None of the 1 videos could be read; the first: no video"):
        make_result([], classes=ACTIONS, unreadable=[Unreadable(key="a", cause="no video")])
