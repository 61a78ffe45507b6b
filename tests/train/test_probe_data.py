"""What a probe trains, chooses and tests on: which clips, read how, and that no option of it is without effect."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_video.data.loader import Order, SampleKey
from coca_video.data.manifest import read_manifest, write_manifest
from coca_video.data.video import Clip, ClipConfig, VideoDataset, collate_clips
from coca_video.eval.token_cache import TokenCache
from coca_video.hub import load, save
from coca_video.models.head import HeadConfig
from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, Finetune, Lora, PretrainedEncoder, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import Part, Splits, read_splits, training_data
from coca_video.train.probe_model import build_classifier

CPU = torch.device("cpu")


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips),
        out=tmp_path / "probe",
        num_frames=2,
        token_cache=tmp_path / "tokens",
        augment=False,
        optim=OptimConfig(warmup_steps=1),
        loop=LoopConfig(steps=4, batch_size=5, log_every=1),
        device="cpu",
    )


def ids(part: Part | None) -> set[str]:
    assert part is not None
    found = [row.video_id for row in part.manifest.rows]
    assert len(found) == len(set(found))
    if part.rows is not None:
        assert [part.whole.rows[row].video_id for row in part.rows] == found
    return set(found)


def test_parts_are_cut_from_the_splits(drawn_clips: Path) -> None:
    """4 training clips of each of 5 classes: a quarter held out is one of each, and the test split is as it was."""
    manifest = read_manifest(drawn_clips)
    of_split = {name: {row.video_id for row in manifest.select(split=name).rows} for name in ("train", "test")}
    plain = read_splits(ClipsConfig(train=drawn_clips), seed=0)
    assert ids(plain.train) == of_split["train"] and ids(plain.test) == of_split["test"] and plain.holdout is None
    held = read_splits(ClipsConfig(train=drawn_clips, holdout_share=0.25), seed=0)
    assert ids(held.train) | ids(held.holdout) == of_split["train"] and not ids(held.train) & ids(held.holdout)
    assert held.holdout is not None and ids(held.test) == of_split["test"]
    counts = Counter(row.label for row in held.holdout.manifest.rows)
    assert counts == dict.fromkeys(manifest.classes, 1)
    other = read_splits(ClipsConfig(train=drawn_clips, holdout_share=0.25), seed=1)
    assert ids(other.holdout) != ids(held.holdout)
    assert held.train.manifest.classes == held.holdout.manifest.classes == manifest.classes


def unsplit(drawn_clips: Path, folder: Path) -> Path:
    """The same clips without splits, in recordings of three clips."""
    manifest = read_manifest(drawn_clips)
    rows = [
        replace(row, split=None, extra=row.extra | {"recording": str(number // 3)})
        for number, row in enumerate(manifest.rows)
    ]
    write_manifest(folder / "manifest.csv", rows=rows, classes=manifest.classes)
    return folder / "manifest.csv"


def test_without_splits_a_share_is_tested_on(drawn_clips: Path, tmp_path: Path) -> None:
    path = unsplit(drawn_clips, tmp_path)
    everything = {row.video_id for row in read_manifest(path).rows}
    clips = ClipsConfig(train=path, test_share=0.2, holdout_share=0.4)
    parts = read_splits(clips, seed=0)
    train, holdout, test = ids(parts.train), ids(parts.holdout), ids(parts.test)
    assert train | holdout | test == everything and len(train) + len(holdout) + len(test) == 30
    assert (len(test), len(holdout)) == (5, 10)  # of 6 a class 1, then 2 of 5
    with pytest.raises(ValueError, match=r"no clip has a split; give --clips.test-share 0.2, or --clips.test, or"):
        read_splits(ClipsConfig(train=path), seed=0)
    whole = read_splits(ClipsConfig(train=path, train_split=None, test_split=None), seed=0)
    assert ids(whole.train) == everything and whole.test is None
    by_split = read_splits(ClipsConfig(train=drawn_clips, test_share=0.2), seed=0)
    assert len(ids(by_split.test)) == 10  # what has splits is tested on as they say


def test_a_recording_stays_on_one_side(drawn_clips: Path, tmp_path: Path) -> None:
    path = unsplit(drawn_clips, tmp_path)
    clips = ClipsConfig(train=path, test_share=0.3, holdout_share=0.3, holdout_group="recording")
    parts = read_splits(clips, seed=0)
    sides = [
        {row.extra["recording"] for row in part.manifest.rows}
        for part in (parts.train, parts.holdout, parts.test)
        if part
    ]
    assert len(sides) == 3 and sum(map(len, sides)) == len(set.union(*sides)) == 10
    by_id = read_splits(replace(clips, holdout_group=None), seed=0)
    assert ids(by_id.test) != ids(parts.test)


def test_tokens_of_another_share_are_not_computed_again(config: ProbeConfig) -> None:
    """The cache is of the whole training split, whatever is held out of it."""
    run_probe(config)
    caches = sorted(config.token_cache.iterdir())  # type: ignore[union-attr]
    assert len(caches) == 2
    times = {path: path.stat().st_mtime_ns for folder in caches for path in folder.glob("tokens-*.bin")}
    clips = replace(config.clips, holdout_share=0.25)
    run_probe(replace(config, clips=clips, out=config.out.parent / "held"))
    assert sorted(config.token_cache.iterdir()) == caches  # type: ignore[union-attr]
    assert {path: path.stat().st_mtime_ns for path in times} == times
    manifest = read_splits(clips, seed=0).train.whole
    assert sorted(len(TokenCache(folder, manifest=manifest)) for folder in caches if _is_of(folder, manifest)) == [20]


def _is_of(folder: Path, manifest: Any) -> bool:
    return bool(json.loads((folder / "cache.json").read_text())["key"]["manifest"] == manifest.fingerprint())


def prepared(config: ProbeConfig, *, step: int) -> Any:
    model = build_classifier(config, num_classes=5)
    data = training_data(read_splits(config.clips, seed=0).train, model=model, config=config, device=CPU)
    return data, data.prepare(data.collate([data.dataset[key] for key in data.order.batch(step)]))


def test_tokens_are_those_of_the_clips_of_the_part(config: ProbeConfig) -> None:
    """With a held-out part, in float32: mean-free tokens, their variances and the labels, row by row."""
    config = replace(config, clips=replace(config.clips, holdout_share=0.25), token_dtype="fp32")
    data, batch = prepared(config, step=2)
    plain, frames = prepared(replace(config, token_cache=None, token_dtype="bf16"), step=2)
    model = build_classifier(config, num_classes=5)
    assert len(data.dataset) == len(plain.dataset) == 15
    tokens = model.encode(((frames.inputs.double() / 255 - 0.5) / 0.5).float())
    free = tokens - tokens.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(batch.inputs, free, rtol=0, atol=2e-5)
    torch.testing.assert_close(batch.variance, free.square().mean(dim=-1), rtol=1e-4, atol=1e-6)
    part = read_splits(config.clips, seed=0).train.manifest
    expected = [part.label_index(part.rows[key.index]) for key in Order(num_samples=15, batch_size=5, seed=0).batch(2)]
    assert batch.labels.tolist() == frames.labels.tolist() == expected


def test_flips_look_up_the_class_of_the_clip(config: ProbeConfig, tmp_path: Path) -> None:
    """Of a part too, whose rows are numbered otherwise than those of the whole: no clip of a direction is mirrored."""
    manifest = read_manifest(config.clips.train)
    names = dict(zip(manifest.classes, ("push left", "run", "push right", "jump", "swim"), strict=True))
    rows = [replace(row, label=names[str(row.label)]) for row in manifest.rows]
    write_manifest(tmp_path / "directions.csv", rows=rows, classes=list(names.values()))
    clips = ClipsConfig(train=tmp_path / "directions.csv", holdout_share=0.25)
    augmentation = replace(config.augmentation, flip_probability=1.0)
    config = replace(config, clips=clips, token_cache=None, augment=True, augmentation=augmentation)
    seen = set()
    for step in range(3):
        data, batch = prepared(config, step=step)
        plain = collate_clips([data.dataset[key] for key in data.order.batch(step)])
        for ours, frames, label in zip(batch.inputs, plain.frames, batch.labels.tolist(), strict=True):
            assert torch.equal(ours, frames if label in (0, 2) else frames.flip(-1))
            seen.add(label)
    assert seen == set(range(5))


def test_balanced_classes_come_equally_often(config: ProbeConfig, tmp_path: Path) -> None:
    manifest = read_manifest(config.clips.train).select(split="train")
    first = manifest.classes[0]
    rows = [row for row in manifest.rows if row.label == first] + [row for row in manifest.rows if row.label != first][
        :6
    ]
    write_manifest(tmp_path / "few.csv", rows=rows, classes=manifest.classes)
    config = replace(config, clips=ClipsConfig(train=tmp_path / "few.csv", test_split=None), class_balanced=True)
    labels = np.concatenate([prepared(config, step=step)[1].labels.numpy() for step in range(8)])
    counts = Counter(labels.tolist())
    there = {manifest.label_index(row) for row in rows}
    assert set(counts) == there and max(counts.values()) - min(counts.values()) <= len(there)
    shuffled = [prepared(replace(config, class_balanced=False), step=step)[1].labels.numpy() for step in range(8)]
    assert Counter(np.concatenate(shuffled).tolist()) != counts


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"augment": True}, r"--token-cache keeps one encoding of each clip, so augment would do nothing"),
    ({"tuning": Finetune()}, r"--token-cache keeps the tokens of a frozen encoder, and --tuning trains it"),
    ({"tuning": Lora()}, r"--token-cache keeps the tokens of a frozen encoder, and --tuning trains it"),
    ({"token_cache": None, "token_dtype": "int8"}, r"--token-dtype does nothing without --token-cache; give both"),
    ({"keep_best": True}, r"--keep-best chooses weights on a held-out part of the training clips; give"),
    ({"keep_best": True, "clips": {"holdout_share": 0.2}}, r"with --loop.evaluate-every 0 there is one in 4 steps"),
    ({"micro_batch_size": 5}, r"--micro-batch-size must be at least 1 and below --loop.batch-size 5; got 5"),
    ({"micro_batch_size": 0}, r"--micro-batch-size must be at least 1 and below --loop.batch-size 5; got 0"),
    ({"clips": {"holdout_group": "person"}}, r"--clips.holdout-group does nothing without --clips.holdout-share"),
    ({"clips": {"holdout_share": 1.0}}, r"--clips.holdout-share must be at least 0 and below 1; got 1.0"),
    ({"clips": {"test_share": -0.1}}, r"--clips.test-share must be at least 0 and below 1; got -0.1"),
    ({"clip_seconds": 1.0}, r'clip_seconds of 1 do nothing with sampling "uniform"'),
    ({"sampling": "pytorchvideo"}, r'sampling "pytorchvideo" needs clip_seconds above 0'),
]


@pytest.mark.parametrize(("changed", "sentence"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_would_do_nothing_is_refused(config: ProbeConfig, changed: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(config, **{**changed, "clips": replace(config.clips, **changed.get("clips", {}))})


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Finetune(rate_factor=0.0), r"--tuning.rate-factor must be above 0 and finite; got 0.0"),
        (lambda: Finetune(layer_decay=1.5), r"--tuning.layer-decay must be above 0 and at most 1; got 1.5"),
        (lambda: Finetune(drop_path=1.0), r"--tuning.drop-path must be at least 0 and below 1; got 1.0"),
        (lambda: Lora(rank=0), r"--tuning.rank must be at least 1; got 0"),
        (lambda: Lora(alpha=0.0), r"--tuning.alpha must be above 0 and finite; got 0.0"),
        (lambda: Lora(rate_factor=-1.0), r"--tuning.rate-factor must be above 0 and finite; got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make()


def losses(config: ProbeConfig) -> list[float]:
    run_probe(config)
    records = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.slow
def test_how_tokens_are_kept_changes_the_losses_a_little(config: ProbeConfig, tmp_path: Path) -> None:
    """Against tokens that are computed: fp32 to rounding, bf16 and int8 close by and each its own."""
    exact = losses(replace(config, token_cache=None, out=tmp_path / "videos"))
    found = {
        dtype: losses(replace(config, token_dtype=dtype, out=tmp_path / dtype)) for dtype in ("fp32", "bf16", "int8")
    }
    assert found["fp32"] == pytest.approx(exact, rel=1e-5)
    for dtype in ("bf16", "int8"):
        assert found[dtype] == pytest.approx(exact, rel=1e-2) and found[dtype] != pytest.approx(exact, rel=1e-6)
    assert found["bf16"] != found["int8"]
    layers = replace(config, head=HeadConfig(encoder_layers=(0, 2)), out=tmp_path / "layers")
    assert losses(layers) != found["bf16"]


def test_splits_are_told_apart_by_the_run(config: ProbeConfig) -> None:
    """Another part held out is another run, though the manifest is the same."""
    clips = replace(config.clips, holdout_share=0.25)
    run_probe(replace(config, clips=clips))
    found = json.loads((config.out / "config.json").read_text())
    parts: Splits = read_splits(clips, seed=0)
    assert parts.holdout is not None
    assert found["train_fingerprint"] == parts.train.manifest.fingerprint()
    assert found["holdout_fingerprint"] == parts.holdout.manifest.fingerprint()
    records = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    (evaluation,) = [record for record in records if record["kind"] == "evaluation"]
    assert evaluation["top1"] * 5 == round(evaluation["top1"] * 5)  # of the 5 held out, not of the 10 to test on


@pytest.mark.parametrize("cached", [True, False], ids=["tokens", "clips"])
def test_a_frozen_encoders_batch_norms_stay_as_they_are(config: ProbeConfig, tmp_path: Path, *, cached: bool) -> None:
    """Their statistics are those it was trained to, in every pass over clips, and nothing changes them."""
    torch.manual_seed(0)
    encoder = ImageEncoder(TimmConfig(name="test_efficientnet", image_size=48))
    encoder.train()(torch.randn(16, 3, 48, 48))  # statistics that differ from a batch's and from fresh ones
    save(tmp_path / "cnn", model=encoder)
    before = load(tmp_path / "cnn").encoder
    config = replace(
        config,
        encoder=PretrainedEncoder(model=str(tmp_path / "cnn")),
        token_cache=config.token_cache if cached else None,
        token_dtype="fp32" if cached else "bf16",
        clips=replace(config.clips, test_split="test"),
    )
    result = run_probe(config)
    model = load(result.model_folder).model
    assert isinstance(model, VideoClassifier)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name]), name
    test = read_manifest(config.clips.train).select(split="test")
    clip = VideoDataset(test, config=ClipConfig(num_frames=2, image_size=48), seed=0)[SampleKey(0, 0)]
    assert isinstance(clip, Clip)
    with torch.no_grad():
        expected = model((clip.frames.unsqueeze(0).float() / 255 - 0.5) / 0.5)[0].softmax(dim=0)
    with (config.out / "test_videos.csv").open(newline="") as file:
        (row,) = [row for row in csv.reader(file) if row[0] == clip.video_id]
    assert [float(cell) for cell in row[3:]] == pytest.approx(expected.tolist(), abs=1e-5)
