"""The token cache: values against a plain loop, errors against closed forms, the same bytes however it was built."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_video.data import frame_cache_build
from coca_video.data.frame_cache import CachedVideoDataset, FrameCache
from coca_video.data.frame_cache_build import SizeEstimate, build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.loader import Order, SampleKey, Unreadable, batches
from coca_video.data.manifest import Manifest, read_manifest
from coca_video.data.video import Clip, ClipConfig, VideoDataset
from coca_video.distributed import on_main, rank
from coca_video.eval import features, token_cache, token_cache_build, token_cache_format
from coca_video.eval.classification import evaluate_clips, evaluate_tokens
from coca_video.eval.features import encode_frames, frozen_encode
from coca_video.eval.passes import Rows, share_of_rank
from coca_video.eval.token_cache import CachedTokens, TokenCache
from coca_video.eval.token_cache_build import build_token_cache, token_cache_key
from coca_video.eval.token_cache_format import TokenLayout, channel_scales, quantize
from coca_video.models.head import HeadConfig
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from tests.ranks import REPOSITORY, on_ranks

CPU = torch.device("cpu")
SHAPE = (3, 36, 96)  # 48 px in patches of 8; a clip is 41,472 bytes in fp32
SHARD_BYTES = 4 * 41_472  # four clips a shard
CLIP = ClipConfig(num_frames=3, image_size=48)
BROKEN = (1, 4, 5, 6, 7, 21)  # all of shard 1, and some of others
NUM_ROWS = 30


class Bars:
    """Counts what a progress bar would show."""

    def __init__(self) -> None:
        self.made: list[tuple[int, int]] = []
        self.updates = 0

    @contextmanager
    def __call__(self, what: str, *, total: int, initial: int = 0) -> Iterator["Bars"]:
        self.made.append((initial, total))
        yield self

    def update(self, n: float | None = 1, /) -> None:
        self.updates += int(n or 0)


@dataclass(frozen=True)
class Noting(VideoDataset):
    """Writes down which rows were read."""

    def __getitem__(self, key: SampleKey) -> Clip | Unreadable:
        with (self.manifest.source.parent / "read").open("a") as file:
            file.write(f"{key.index}\n")
        return super().__getitem__(key)

    def read(self) -> list[int]:
        """The rows since the last call."""
        path = self.manifest.source.parent / "read"
        rows = [int(line) for line in path.read_text().split()] if path.exists() else []
        path.unlink(missing_ok=True)
        return rows


@pytest.fixture(scope="module")
def whole(drawn_clips: Path) -> Manifest:
    """All 30 clips can be read."""
    return read_manifest(drawn_clips)


@pytest.fixture(scope="module")
def manifest(whole: Manifest, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Six of the 30 cannot."""
    folder = tmp_path_factory.mktemp("broken")
    (folder / "broken.mp4").write_bytes(b"no video")
    rows = [
        replace(row, path=folder / "broken.mp4") if number in BROKEN else row for number, row in enumerate(whole.rows)
    ]
    return replace(whole, source=folder / "manifest.csv", rows=rows)


def classifier(**changes: Any) -> VideoClassifier:
    torch.manual_seed(0)
    arguments: dict[str, Any] = {"image": VitConfig.tiny(), "num_classes": 5, "num_frames": 3} | changes
    model = VideoClassifier(VideoClassifierConfig(**arguments))
    with torch.no_grad():
        model.head.classifier.weight.normal_(std=0.2)
    model.encoder.requires_grad_(False)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> VideoClassifier:
    return classifier()


def build(model: VideoClassifier, manifest: Manifest, folder: Path, **changes: Any) -> TokenCache:
    arguments: dict[str, Any] = {
        "dataset": VideoDataset(manifest, config=CLIP, seed=0),
        "dtype": "fp32",
        "device": CPU,
        "progress": Bars(),
        "on_estimate": lambda _: None,
        "shard_bytes": SHARD_BYTES,
    }
    return build_token_cache(model, folder=folder, **(arguments | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where caches of `model` and `manifest` are built by those who do not change them."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cache(model: VideoClassifier, manifest: Manifest, folder: Path) -> TokenCache:
    return build(model, manifest, folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def readable(cache: TokenCache) -> Iterator[tuple[int, CachedTokens]]:
    for row in range(len(cache)):
        sample = cache[SampleKey(0, row)]
        if isinstance(sample, CachedTokens):
            yield row, sample


@torch.no_grad()
def by_hand(model: VideoClassifier, manifest: Manifest, row: int) -> np.ndarray:
    """The tokens of a row, one frame after the other, normalised as it is written."""
    clip = VideoDataset(manifest, config=CLIP, seed=0)[SampleKey(0, row)]
    assert isinstance(clip, Clip)
    config = model.config.image
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (config.mean, config.std))
    images = [((frame.double() / 255 - mean) / std).float() for frame in clip.frames]
    return np.stack([model.encoder(image.unsqueeze(0))[0].double().numpy() for image in images])


def test_values_are_those_of_a_plain_loop(model: VideoClassifier, manifest: Manifest, cache: TokenCache) -> None:
    """2e-5 for tokens of size 1 to 4 is the rounding of a folded normalisation on these even pictures."""
    assert cache.layout.shape == SHAPE and len(cache) == NUM_ROWS
    found = dict(readable(cache))
    assert sorted(found) == [row for row in range(NUM_ROWS) if row not in BROKEN]
    for row, sample in found.items():
        expected = by_hand(model, manifest, row)
        mean, variance = expected.mean(axis=-1), expected.var(axis=-1)
        np.testing.assert_allclose(sample.values, expected - mean[..., None], atol=2e-5)
        np.testing.assert_allclose(sample.mean, mean, atol=1e-5)
        np.testing.assert_allclose(sample.variance, variance, rtol=1e-4)
        assert sample.video_id == manifest.rows[row].video_id
        assert sample.label == cache.labels[row] == manifest.classes.index(str(manifest.rows[row].label))
    assert cache.relative_error == 0.0


def test_a_batch_is_tokens_without_their_means_or_with_them(
    model: VideoClassifier, manifest: Manifest, cache: TokenCache
) -> None:
    rows = [29, 0, 8]
    samples = [cache[SampleKey(0, row)] for row in rows]
    packed = TokenCache.collate([sample for sample in samples if isinstance(sample, CachedTokens)])
    expected = np.stack([by_hand(model, manifest, row) for row in rows])
    np.testing.assert_allclose(packed.to_whole_tokens().tokens, expected, atol=2e-5)
    assert packed.to_whole_tokens().variance is None
    batch = packed.to_tokens()
    np.testing.assert_allclose(batch.tokens, expected - expected.mean(-1, keepdims=True), atol=2e-5)
    assert batch.variance is not None
    np.testing.assert_allclose(batch.variance, expected.var(-1), rtol=1e-4)
    assert batch.video_ids == tuple(manifest.rows[row].video_id for row in rows)
    assert packed.to_tokens(torch.bfloat16).tokens.dtype == torch.bfloat16


def rounded_to_bf16(values: np.ndarray) -> np.ndarray:
    """To the nearest number whose lower 16 bits are zero, to the even one of two as near."""
    bits = values.view(np.uint32).astype(np.uint64)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.astype(np.uint32).view(np.float32)


def as_int8(values: np.ndarray) -> np.ndarray:
    """Steps of a 127th of the largest size that a feature has."""
    steps = np.abs(values).max(axis=(0, 1, 2)) / np.float32(127)
    return (np.rint(values / steps) * steps).astype(np.float32)


@pytest.mark.parametrize(("dtype", "num_bytes"), [("bf16", 2), ("int8", 1)])
def test_what_is_stored_is_the_closed_form(
    model: VideoClassifier, manifest: Manifest, cache: TokenCache, folder: Path, dtype: str, num_bytes: int
) -> None:
    """Bit for bit; the scales of int8 are of each shard's own tokens, and the error that is told is theirs."""
    smaller = build(model, manifest, folder, dtype=dtype)
    assert smaller.layout.token_bytes == num_bytes * 3 * 36 * 96
    errors = []
    exact, stored = dict(readable(cache)), dict(readable(smaller))
    for first in range(0, NUM_ROWS, 4):
        rows = [row for row in range(first, min(first + 4, NUM_ROWS)) if row in exact]
        if not rows:
            continue
        values = np.stack([exact[row].values for row in rows])
        expected = rounded_to_bf16(values) if dtype == "bf16" else as_int8(values)
        batch = TokenCache.collate([stored[row] for row in rows]).to_tokens()
        np.testing.assert_array_equal(batch.tokens, expected)
        np.testing.assert_array_equal(batch.variance, np.stack([exact[row].variance for row in rows]))
        difference = ((expected - values).astype(np.float64) ** 2).sum(-1) / (values.astype(np.float64) ** 2).sum(-1)
        errors.append(difference.ravel())
    assert smaller.relative_error == pytest.approx(np.sqrt(np.concatenate(errors).mean()), rel=1e-5)
    # Rounding to 8 bits of mantissa errs by 2^-9 at most; steps of a 127th by 1 / (2 * 127) of the largest.
    assert 1e-4 < smaller.relative_error < (2**-9 if dtype == "bf16" else 0.03)


def test_a_feature_of_zeros_stays_zero() -> None:
    tokens = torch.zeros(2, 1, 3, 4)
    tokens[1, 0, 2, 1] = -5.0
    scales = channel_scales(tokens, dtype="int8")
    assert scales is not None and scales.tolist() == pytest.approx([0, 5 / 127, 0, 0])
    stored = quantize(tokens, dtype="int8", scales=scales)
    assert stored.count_nonzero() == 1 and stored.min() == -127


KEY_CHANGES: dict[str, dict[str, Any]] = {
    "num_frames": {"clip": {"num_frames": 4}},
    "sampling": {"clip": {"sampling": "dense", "stride": 2}},
    "stride": {"clip": {"sampling": "dense", "stride": 3}},
    "interpolation": {"clip": {"interpolation": "bicubic"}},
    "image_size": {"clip": {"image_size": 40}},
    "decoder": {"clip": {"decoder": "pyav"}},
    "normalisation": {"model": {"image": replace(VitConfig.tiny(), mean=(0.4, 0.5, 0.5))}},
    "layers": {"model": {"head": HeadConfig(encoder_layers=(0, -1))}},
    "dtype": {"key": {"dtype": "int8"}},
    "precision": {"key": {"bf16": True}},
    "shard_bytes": {"key": {"shard_bytes": 2**20}},
}


def folder_name(manifest: Manifest, *, change: dict[str, Any]) -> str:
    clips = VideoDataset(manifest, config=replace(CLIP, **change.get("clip", {})), seed=change.get("seed", 0))
    arguments = {"dtype": "fp32", "bf16": False} | change.get("key", {})
    return token_cache_key(classifier(**change.get("model", {})), dataset=clips, **arguments).folder_name


def test_every_ingredient_is_in_the_key(whole: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = folder_name(whole, change={})
    names = [plain, *(folder_name(whole, change=change) for change in KEY_CHANGES.values())]
    relabelled = replace(whole, rows=[replace(row, label=whole.classes[0]) for row in whole.rows])
    names.append(folder_name(relabelled, change={}))
    other, clips = classifier(), VideoDataset(whole, config=CLIP, seed=0)
    with torch.no_grad():
        next(iter(other.encoder.parameters()))[0, 0, 0] += 1e-6
    names.append(token_cache_key(other, dataset=clips, dtype="fp32", bf16=False).folder_name)
    arguments = {"decoder": "auto", "num_workers": 1, "timeout_seconds": 60.0, "progress": Bars()}
    frames = FrameCacheConfig(num_frames=3, short_side=48)
    few = replace(whole, rows=list(whole.rows)[:1])
    monkeypatch.setattr(frame_cache_build, "parallel", lambda work, jobs, **_: ((job, work(job)) for job in jobs))
    build_frame_cache(few, folder=tmp_path / "frames", config=frames, on_estimate=lambda _: None, **arguments)  # type: ignore[arg-type]
    jpegs = CachedVideoDataset(few, config=CLIP, seed=0, cache=FrameCache(tmp_path / "frames"))
    names += [
        token_cache_key(classifier(), dataset=dataset, dtype="fp32", bf16=False).folder_name
        for dataset in (VideoDataset(few, config=CLIP, seed=0), jpegs)
    ]
    monkeypatch.setattr(token_cache_format, "FORMAT_VERSION", 2)
    names.append(folder_name(whole, change={}))
    assert len(set(names)) == len(names) == 17


def test_what_changes_no_token_is_not_in_the_key(whole: Manifest) -> None:
    plain = folder_name(whole, change={})
    for change in ({"clip": {"crop_scale": (0.1, 0.2)}}, {"clip": {"timeout_seconds": 9.0}}, {"seed": 1}):
        assert folder_name(whole, change=change) == plain
    head = classifier()
    with torch.no_grad():
        head.head.classifier.weight += 1
    key = token_cache_key(head, dataset=VideoDataset(whole, config=CLIP, seed=0), dtype="fp32", bf16=False)
    assert key.folder_name == plain


def test_another_key_leaves_the_first_alone(model: VideoClassifier, whole: Manifest, tmp_path: Path) -> None:
    first = build(model, whole, tmp_path)
    before = contents(first.folder)
    second = build(model, whole, tmp_path, bf16=True)
    assert first.folder != second.folder and contents(first.folder) == before
    one, other = (cache[SampleKey(0, 0)] for cache in (first, second))
    assert isinstance(one, CachedTokens) and isinstance(other, CachedTokens)
    error = np.linalg.norm(one.values - other.values) / np.linalg.norm(one.values)
    assert 1e-4 < error < 0.03  # the encoder did compute in bf16


@pytest.mark.parametrize("changes", [{"batch_size": 1}, {"batch_size": 3}, {"batch_size": 4, "num_workers": 2}])
def test_batches_and_workers_change_no_byte(
    model: VideoClassifier, manifest: Manifest, cache: TokenCache, tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert contents(build(model, manifest, tmp_path, **changes).folder) == contents(cache.folder)


def test_batches_are_filled_up_where_rounding_depends_on_them(model: VideoClassifier) -> None:
    """Off the CPU the encoder sees batches of one size only, and the tokens are those of the clips."""
    frames = torch.randint(0, 256, (2, 3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sizes: list[int] = []

    def encode(batch: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch))
        return encode_frames(model, batch, device=CPU)

    for count in (2, 1):
        tokens = token_cache_build._encode_filled(frames[:count], encode=encode, size=4)
        torch.testing.assert_close(tokens, encode_frames(model, frames[:count], device=CPU), rtol=1e-5, atol=1e-5)
    assert sizes == [4, 4]


def test_unreadable_clips_come_out_as_from_the_videos(manifest: Manifest, cache: TokenCache) -> None:
    clips = VideoDataset(manifest, config=CLIP, seed=0)
    expected = [clips[SampleKey(0, row)] for row in BROKEN]
    assert all(isinstance(sample, Unreadable) and "broken.mp4" in sample.cause for sample in expected)
    assert [cache[SampleKey(0, row)] for row in BROKEN] == expected == list(cache.unreadable)


def test_whole_shards_are_not_built_again(
    model: VideoClassifier, manifest: Manifest, cache: TokenCache, tmp_path: Path
) -> None:
    """A file gone, one cut short, one half written, and the mark of the end gone: rows 8 to 11 and 28, 29 are left."""
    noting = Noting(replace(manifest, source=tmp_path / "manifest.csv"), config=CLIP, seed=0)
    place = build(model, manifest, tmp_path / "cache", dataset=noting).folder
    assert noting.read() == list(range(NUM_ROWS))
    last = place / "tokens-00007.bin"
    last.write_bytes(last.read_bytes()[:-1])
    (place / "tokens-00002.bin").rename(place / ".partial-1-tokens-00002.bin")
    token_cache_format.TokenCacheFacts(key=cache.facts.key, layout=cache.layout).write(place)
    with pytest.raises(ValueError, match="is not finished; run its building again"):
        TokenCache(place, manifest=manifest)
    bars = Bars()
    build(model, manifest, tmp_path / "cache", dataset=noting, progress=bars)
    assert noting.read() == [8, 9, 10, 11, 28, 29]
    assert bars.made == [(24, 30)] and bars.updates == 6
    assert contents(place) == contents(cache.folder)
    build(model, manifest, tmp_path / "cache", dataset=noting, progress=bars)
    assert noting.read() == [] and len(bars.made) == 1


def test_the_size_is_told_first_and_refused_where_the_disk_is_too_small(
    model: VideoClassifier, whole: Manifest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noting = Noting(replace(whole, source=tmp_path / "manifest.csv"), config=CLIP, seed=0)
    told: list[tuple[SizeEstimate, list[int]]] = []
    clip = 3 * 36 * 96 + 2 * 448  # int8, and two statistics of 432 bytes, each at a multiple of 64
    expected = NUM_ROWS * clip + 8 * 96 * 4
    free = type("Usage", (), {"free": expected - 1})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    arguments = {"dataset": noting, "dtype": "int8", "on_estimate": lambda size: told.append((size, noting.read()))}
    with pytest.raises(ValueError, match=r"needs 0 MB more, and 0 MB are free; choose another folder"):
        build(model, whole, tmp_path / "cache", **arguments)
    size = SizeEstimate(total_bytes=expected, left_bytes=expected, free_bytes=expected - 1)
    assert told == [(size, [])] and noting.read() == []
    monkeypatch.undo()
    cache = build(model, whole, tmp_path / "cache", **arguments)
    on_disk = sum(path.stat().st_size for path in cache.folder.glob("tokens-*"))
    assert cache.num_bytes == on_disk and expected < on_disk < expected + 8 * 100  # what each shard says of itself


@pytest.mark.parametrize(
    ("many", "expected"), [(1, 1), (7.5, 7), (8, 8), (15.9, 8), (50, 48), (0.1, 1)], ids=lambda value: str(value)
)
def test_shards_hold_what_they_may(many: float, expected: int) -> None:
    layout = TokenLayout(
        num_clips=100, num_frames=3, num_tokens=36, dim=96, dtype="int8", shard_bytes=int(many * 41_472)
    )
    assert layout.clips_per_shard == expected
    rows = [row for shard in range(layout.num_shards) for row in layout.rows(shard)]
    assert rows == list(range(100))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_some_rows_load_as_batches(cache: TokenCache, manifest: Manifest, num_workers: int) -> None:
    """Two epochs over nine rows, two of which cannot be read, in a drawn order, with one shard mapped at a time."""
    rows = np.array([29, 3, 7, 2, 21, 8, 12, 16, 20])
    order = Order(num_samples=9, batch_size=3, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_cache, "MAX_MAPS", 1)
        loaded = list(
            batches(
                Rows(cache, rows=rows),
                order=order,
                first_step=0,
                last_step=6,
                workers=num_workers,
                collate=TokenCache.collate,
            )
        )
    for step, (batch, failed) in enumerate(loaded):
        asked = [int(rows[key.index]) for key in order.batch(step)]
        names = tuple(manifest.rows[row].video_id for row in asked if row not in BROKEN)
        assert () if batch is None else batch.video_ids == names
        assert [one.key for one in failed] == [manifest.rows[row].video_id for row in asked if row in BROKEN]
        for position, name in enumerate(names):
            (row,) = [row for row in asked if manifest.rows[row].video_id == name]
            sample = cache[SampleKey(0, row)]
            assert batch is not None and isinstance(sample, CachedTokens)
            np.testing.assert_array_equal(batch.values[position], sample.values)


def test_copies_for_processes_are_small(cache: TokenCache) -> None:
    before = cache[SampleKey(0, 0)]
    copied = pickle.dumps(cache)
    assert len(copied) < 41_472  # no clip is in it
    after = pickle.loads(copied)[SampleKey(0, 0)]
    assert isinstance(before, CachedTokens)
    np.testing.assert_array_equal(after.values, before.values)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_evaluation_from_the_cache_is_that_from_clips(
    model: VideoClassifier, manifest: Manifest, folder: Path, dtype: str
) -> None:
    clips = VideoDataset(manifest, config=CLIP, seed=0)
    expected = evaluate_clips(model, dataset=clips, classes=manifest.classes, device=CPU)
    told: list[int] = []
    found = evaluate_tokens(
        model,
        dataset=build(model, manifest, folder, dtype=dtype),
        classes=manifest.classes,
        device=CPU,
        batch_size=7,
        on_batch=told.append,
    )
    assert found.video_ids == expected.video_ids and found.unreadable == expected.unreadable
    assert told == [7, 7, 7, 7, 2]
    difference = np.abs(found.scores - expected.scores).max()
    least, most = {"fp32": (0, 1e-5), "bf16": (1e-5, 5e-3), "int8": (1e-4, 0.05)}[dtype]
    assert least <= difference < most
    assert expected.scores.std() > 0.05


def test_a_part_of_the_rows_is_evaluated_alone(model: VideoClassifier, manifest: Manifest, cache: TokenCache) -> None:
    whole = evaluate_tokens(model, dataset=cache, classes=manifest.classes, device=CPU)
    rows = np.array([0, 1, 9, 20])
    part = evaluate_tokens(
        model, dataset=Rows(cache, rows=rows), classes=manifest.classes, device=CPU, batch_size=3, num_workers=1
    )
    assert sorted(part.video_ids) == sorted(manifest.rows[row].video_id for row in (0, 9, 20))
    assert [one.key for one in part.unreadable] == [manifest.rows[1].video_id]
    for name, scores in zip(part.video_ids, part.scores, strict=True):
        np.testing.assert_allclose(scores, whole.scores[whole.video_ids.index(name)], atol=1e-6)


def test_mistakes_are_one_sentence(model: VideoClassifier, manifest: Manifest, whole: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="augmented ones differ; take augment=False"):
        build(model, whole, tmp_path, dataset=VideoDataset(whole, config=replace(CLIP, augment=True), seed=0))
    with pytest.raises(ValueError, match="holds no token cache; build one there first"):
        TokenCache(tmp_path, manifest=whole)
    cache = build(model, whole, tmp_path)
    relabelled = replace(whole, rows=[replace(row, label=whole.classes[0]) for row in whole.rows])
    with pytest.raises(ValueError, match="was built of another manifest than"):
        TokenCache(cache.folder, manifest=relabelled)
    for row in (-1, NUM_ROWS):
        with pytest.raises(ValueError, match=f"has clips 0 to 29, got {row}"):
            cache[SampleKey(0, row)]
    facts = cache.folder / "cache.json"
    text = facts.read_text()
    facts.write_text(text.replace('"format_version": 1', '"format_version": 9'))
    with pytest.raises(ValueError, match="of format 9, and this program reads 1"):
        build(model, whole, tmp_path)
    facts.write_text(text[:-9])
    with pytest.raises(ValueError, match="is damaged; delete the folder"):
        build(model, whole, tmp_path)
    facts.write_text(text)
    shard = cache.folder / "tokens-00003.bin"
    os.truncate(shard, 100)
    with pytest.raises(ValueError, match=r"has 100 bytes where [0-9]+ bytes were written; delete the folder"):
        TokenCache(cache.folder, manifest=whole)
    shard.unlink()
    with pytest.raises(ValueError, match="is missing where"):
        TokenCache(cache.folder, manifest=whole)


def test_one_process_builds_at_a_time(model: VideoClassifier, whole: Manifest, tmp_path: Path) -> None:
    clips = VideoDataset(whole, config=CLIP, seed=0)
    key = token_cache_key(model, dataset=clips, dtype="fp32", bf16=False, shard_bytes=SHARD_BYTES)
    place = tmp_path / key.folder_name
    place.mkdir()
    hold = f"import fcntl, sys; f = open({str(place / '.lock')!r}, 'wb'); fcntl.lockf(f, fcntl.LOCK_EX)"
    command = [sys.executable, "-c", f"{hold}; print('held', flush=True); sys.stdin.read()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="another process is building this token cache; wait for it"):
            build(model, whole, tmp_path)
        assert other.stdin is not None
        other.stdin.close()
    assert len(build(model, whole, tmp_path)) == NUM_ROWS


def test_a_frozen_encoder_takes_pixels_as_they_are_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """1e-5 is rounding. Under bf16, trainable, or where folding is not exact, the very tokens of normalising first."""
    model = classifier(image=replace(VitConfig.tiny(), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28)))
    frames = torch.randint(0, 256, (2, 3, 3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    expected = encode_frames(model, frames, device=CPU)
    torch.testing.assert_close(frozen_encode(model, device=CPU)(frames), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        frozen_encode(model, device=CPU, bf16=True)(frames),
        encode_frames(model, frames, device=CPU, bf16=True),
        rtol=0,
        atol=0,
    )
    network = classifier(image=TimmConfig(name="mobilenetv3_small_050", image_size=64))
    large = torch.randint(0, 256, (1, 2, 3, 64, 64), dtype=torch.uint8)
    torch.testing.assert_close(
        frozen_encode(network, device=CPU)(large), encode_frames(network, large, device=CPU), rtol=0, atol=0
    )
    folded = frozen_encode(model, device=CPU)
    model.encoder.requires_grad_(True)
    trainable = frozen_encode(model, device=CPU)
    torch.testing.assert_close(trainable(frames), expected, rtol=0, atol=0)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("normalised")

    monkeypatch.setattr(features, "normalize", refuse)
    folded(frames)
    for encode in (trainable, frozen_encode(model, device=CPU, bf16=True)):
        with pytest.raises(AssertionError, match="normalised"):
            encode(frames)


def build_on_rank(manifest: Manifest, folder: Path) -> tuple[list[list[int]], bytes, float, str]:
    """The rows that a rank read at first and after three shards were gone, the scores, the error, what went wrong."""
    noting = Noting(replace(manifest, source=folder / str(rank()) / "manifest.csv"), config=CLIP, seed=0)
    noting.manifest.source.parent.mkdir()
    model = classifier()
    cache = build(model, manifest, folder, dataset=noting, dtype="int8")
    rows = [noting.read()]
    assert len(share_of_rank(cache)) == 15
    result = evaluate_tokens(model, dataset=cache, classes=manifest.classes, device=CPU)
    on_main(lambda: lose(cache, shards=(1, 4, 6)))
    build(model, manifest, folder, dataset=noting, dtype="int8")
    rows.append(noting.read())

    def work() -> None:
        if rank() == 1:
            raise OSError("no room")

    try:
        token_cache_build._together(work)
    except OSError as error:
        return rows, result.scores.tobytes(), cache.relative_error, str(error)
    raise AssertionError("what is wrong on a rank has to stop all")


def lose(cache: TokenCache, *, shards: tuple[int, ...]) -> None:
    """As if the build had been killed before it wrote these."""
    token_cache_format.TokenCacheFacts(key=cache.facts.key, layout=cache.layout).write(cache.folder)
    for number in shards:
        (cache.folder / f"tokens-0000{number}.bin").unlink()


@pytest.mark.drill
def test_two_ranks_write_what_one_does(model: VideoClassifier, manifest: Manifest, tmp_path: Path) -> None:
    alone = build(model, manifest, tmp_path / "alone", dtype="int8")
    before = contents(alone.folder)
    (tmp_path / "together").mkdir()
    results = on_ranks(build_on_rank, manifest=manifest, folder=tmp_path / "together")
    shards = [list(range(4 * shard, min(4 * shard + 4, NUM_ROWS))) for shard in range(8)]
    first, second = (rows for rows, *_ in results)
    assert first == [list(chain(*shards[::2])), shards[1] + shards[6]]
    assert second == [list(chain(*shards[1::2])), shards[4]]
    scores = evaluate_tokens(model, dataset=alone, classes=manifest.classes, device=CPU).scores
    for _, found, error, wrong in results:
        np.testing.assert_allclose(np.frombuffer(found).reshape(scores.shape), scores, atol=1e-6)
        assert error == alone.relative_error and wrong == "no room"
    place = tmp_path / "together" / alone.folder.name
    assert contents(place) == before
    lose(TokenCache(place, manifest=manifest), shards=(0, 5))  # begun by two ranks, one goes on
    build(model, manifest, tmp_path / "together", dtype="int8")
    assert contents(place) == before


BUILD_SLOWLY = """
import pickle, sys, time
from coca_video.eval import token_cache_build
from tests.eval.test_token_cache import build, classifier
real = token_cache_build._encode_alike
def slowly(*args, **kwargs):
    time.sleep(0.3)
    yield from real(*args, **kwargs)
token_cache_build._encode_alike = slowly
if __name__ == "__main__":
    manifest, folder, workers = pickle.load(open(sys.argv[1], "rb"))
    build(classifier(), manifest, folder, num_workers=workers, batch_size=2)
"""


@pytest.mark.drill
@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_killed_build_redoes_no_whole_shard(
    model: VideoClassifier, manifest: Manifest, cache: TokenCache, tmp_path: Path, num_workers: int
) -> None:
    script, arguments = tmp_path / "build.py", tmp_path / "arguments"
    script.write_text(BUILD_SLOWLY)
    arguments.write_bytes(pickle.dumps((manifest, tmp_path / "cache", num_workers)))
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, str(script), str(arguments)], env=environment)
    place = tmp_path / "cache" / cache.folder.name
    deadline = time.monotonic() + 300
    while len(list(place.glob("tokens-*"))) < 4 and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    whole = sorted(path.name for path in place.glob("tokens-*"))
    assert 4 <= len(whole) < 8
    kept = {name: (place / name).stat().st_mtime_ns for name in whole}
    noting = Noting(replace(manifest, source=tmp_path / "manifest.csv"), config=CLIP, seed=0)
    build(model, manifest, tmp_path / "cache", dataset=noting)
    assert noting.read() == list(range(4 * len(whole), NUM_ROWS))
    assert {name: (place / name).stat().st_mtime_ns for name in whole} == kept
    assert contents(place) == contents(cache.folder)
