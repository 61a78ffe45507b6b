"""What augments a probe's training clips: which pixels and labels it learns from, and that each option counts."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coca_video.data.augment import AugmentConfig
from coca_video.data.loader import Order, SampleKey
from coca_video.data.manifest import Manifest, read_manifest, write_manifest
from coca_video.data.sampling import sample_rng
from coca_video.data.video import ClipConfig, VideoDataset, collate_clips
from coca_video.eval.classification import evaluate_clips
from coca_video.hub import load
from coca_video.models.image import VitConfig
from coca_video.train import classify, loop
from coca_video.train.classify import probe_step, run_probe
from coca_video.train.loop import LoopConfig, Training, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import ProbeBatch, augment_batch
from coca_video.train.probe_model import build_classifier
from coca_video.train.run import Run
from coca_video.train.window import Sum

SEED, STEPS, BATCH_SIZE = 3, 4, 8
EVERYTHING = AugmentConfig(
    rand_augment_num_ops=2,
    rand_augment_magnitude=9,
    colour_jitter=(0.4, 0.4, 0.4, 0.1),
    erase_probability=0.5,
    mixup_alpha=0.8,
    cutmix_alpha=1.0,
)


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips, test_split=None),
        out=tmp_path / "probe",
        num_frames=3,
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=STEPS, batch_size=BATCH_SIZE, seed=SEED, log_every=1),
        device="cpu",
    )


def records(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(config: ProbeConfig) -> list[float]:
    run_probe(config)
    return [record["loss"] for record in records(config.out) if record["kind"] == "train"]


def training_dataset(manifest: Manifest) -> VideoDataset:
    """The augmented clips before anything happens to them on the device."""
    clip = ClipConfig(num_frames=3, image_size=48, augment=True)
    return VideoDataset(manifest, config=clip, seed=SEED)


def steps_of(manifest: Manifest) -> list[list[SampleKey]]:
    order = Order(num_samples=len(manifest.rows), batch_size=BATCH_SIZE, seed=SEED)
    return [order.batch(step) for step in range(STEPS)]


def flip_draw(key: SampleKey) -> float:
    return float(sample_rng(seed=SEED, epoch=key.epoch, index=key.index, purpose="flip").random())


def record_frames(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What a probe gives its encoder, batch by batch."""
    real: Callable[..., Any] = classify.frozen_encode
    seen: list[torch.Tensor] = []

    def recording(*args: Any, **options: Any) -> Any:
        encode = real(*args, **options)

        def record(frames: torch.Tensor) -> Any:
            seen.append(frames)
            return encode(frames)

        return record

    monkeypatch.setattr(classify, "frozen_encode", recording)
    return seen


def test_by_default_clips_flip_by_their_own_draws(config: ProbeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = record_frames(monkeypatch)
    run_probe(config)
    manifest = read_manifest(config.clips.train).select(split="train")
    dataset, flipped = training_dataset(manifest), 0
    for frames, keys in zip(seen, steps_of(manifest), strict=True):
        for clip, key in zip(frames, keys, strict=True):
            expected = dataset[key].frames
            assert torch.equal(clip, expected.flip(-1) if flip_draw(key) < 0.5 else expected)
            flipped += flip_draw(key) < 0.5
    assert 0 < flipped < STEPS * BATCH_SIZE


def test_classes_that_name_a_direction_are_never_flipped(
    config: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = read_manifest(config.clips.train).select(split="train")
    renamed = dict(zip(manifest.classes, ("push left", "push right", "run", "jump", "swim"), strict=True))
    rows = [replace(row, label=renamed[row.label]) for row in manifest.rows if row.label is not None]
    write_manifest(tmp_path / "directions.csv", rows=rows, classes=list(renamed.values()))
    seen = record_frames(monkeypatch)
    always = AugmentConfig(flip_probability=1.0)
    run_probe(replace(config, clips=replace(config.clips, train=tmp_path / "directions.csv"), augmentation=always))
    manifest = read_manifest(tmp_path / "directions.csv").select(split="train")
    dataset, directed = training_dataset(manifest), 0
    for frames, keys in zip(seen, steps_of(manifest), strict=True):
        for clip, key in zip(frames, keys, strict=True):
            has_direction = str(manifest.rows[key.index].label).startswith("push")
            expected = dataset[key].frames
            assert torch.equal(clip, expected if has_direction else expected.flip(-1))
            directed += has_direction
    assert 0 < directed < STEPS * BATCH_SIZE


def test_mixup_mixes_pixels_and_labels_alike(config: ProbeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clip and label i are w times their own and 1 - w times those of clip i - 1, w from the clip's own draw."""
    seen, labels = record_frames(monkeypatch), []
    real = classify.probe_step

    def recording(*args: Any, **options: Any) -> Any:
        labels.append(args[1].labels)
        return real(*args, **options)

    monkeypatch.setattr(classify, "probe_step", recording)
    run_probe(replace(config, augmentation=AugmentConfig(flip_probability=0.0, mixup_alpha=0.7)))
    manifest = read_manifest(config.clips.train).select(split="train")
    dataset = training_dataset(manifest)
    for frames, soft, keys in zip(seen, labels, steps_of(manifest), strict=True):
        clips = [dataset[key] for key in keys]
        for i, key in enumerate(keys):
            rng = sample_rng(seed=SEED, epoch=key.epoch, index=key.index, purpose="mix")
            own = rng.beta(0.7, 0.7)
            expected = own * clips[i].frames.double() + (1 - own) * clips[i - 1].frames.double()
            assert (frames[i].double() - expected).abs().max() <= 0.5 + 1e-4  # rounded to whole levels
            shares = torch.zeros(5, dtype=torch.float64)
            shares[clips[i].label] += own
            shares[clips[i - 1].label] += 1 - own
            torch.testing.assert_close(soft[i].double(), shares, rtol=0, atol=1e-7)


def test_what_is_erased_is_the_mean_of_the_encoder(config: ProbeConfig) -> None:
    image = replace(VitConfig.tiny(), mean=(0.2, 0.4, 0.6))
    model = build_classifier(replace(config, encoder=RandomEncoder(image=image)), num_classes=5)
    manifest = read_manifest(config.clips.train).select(split="train")
    batch = collate_clips([training_dataset(manifest)[SampleKey(0, index)] for index in range(6)])
    erasing = AugmentConfig(flip_probability=0.0, erase_probability=1.0)
    frames, labels = augment_batch(batch, config=erasing, seed=SEED, may_flip=np.ones(6, dtype=bool), model=model)
    assert torch.equal(labels, batch.labels)
    changed = (frames != batch.frames).any(dim=2)
    assert changed.flatten(1).any(dim=1).all()  # something of each clip
    filled = frames.movedim(2, -1)[changed]
    assert (filled == torch.tensor([51, 102, 153], dtype=torch.uint8)).all()


def test_top1_counts_against_the_heavier_label(config: ProbeConfig) -> None:
    model = build_classifier(config, num_classes=5)
    with torch.no_grad():
        model.head.classifier.weight.zero_()
        model.head.classifier.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 0.0, 0.0]))  # says class 1 of every clip
    tokens = torch.randn(3, 1, 12, 96, generator=torch.Generator().manual_seed(0))
    shares = torch.tensor([[0.4, 0.6, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0, 0.0], [0.0, 0.7, 0.3, 0.0, 0.0]])
    optimizer = build_optimizer(model, config=config.optim)
    plain = replace(config, label_smoothing=0.0)
    batch = ProbeBatch(inputs=tokens, labels=shares)
    sums = probe_step(model.head, batch, optimizer, scores=lambda part: model.head(part.inputs), config=plain)
    assert (float(sums["top1"].total), sums["top1"].count) == (2.0, 3)
    normalizer = np.log(4 + np.exp(3.0))
    loss = torch.as_tensor(sums["loss"].total).detach()
    assert float(loss) == pytest.approx(normalizer - 3.0 * (0.6 + 0.4 + 0.7) / 3, rel=1e-6)


@pytest.mark.parametrize(
    "changed",
    [
        {"flip_probability": 0.0},
        {"rand_augment_num_ops": 1, "rand_augment_magnitude": 9},
        {"rand_augment_num_ops": 2, "rand_augment_magnitude": 9},
        {"rand_augment_num_ops": 2, "rand_augment_magnitude": 20},
        {"colour_jitter": (0.4, 0.0, 0.0, 0.0)},
        {"erase_probability": 0.5},
        {"erase_probability": 0.5, "erase_value": "black"},
        {"mixup_alpha": 0.8},
        {"mixup_alpha": 0.3},
        {"cutmix_alpha": 0.8},
        {"mixup_alpha": 0.8, "cutmix_alpha": 0.8},
    ],
    ids=str,
)
def test_every_option_changes_the_losses(
    config: ProbeConfig, tmp_path: Path, changed: dict[str, Any], losses_so_far: dict[str, tuple[float, ...]]
) -> None:
    if not losses_so_far:
        losses_so_far["plain"] = tuple(losses(config))
    found = tuple(losses(replace(config, augmentation=AugmentConfig(**changed), out=tmp_path / "other")))
    assert found not in losses_so_far.values()
    losses_so_far[str(changed)] = found


@pytest.fixture(scope="module")
def losses_so_far() -> dict[str, tuple[float, ...]]:
    """Of every config tried: no two may be alike."""
    return {}


@pytest.mark.drill
def test_a_run_with_everything_resumes_bit_equal_with_any_number_of_workers(
    config: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(config, augmentation=EVERYTHING, loop=replace(config.loop, checkpoint_every=2))
    expected = losses(config)
    workers = replace(config, out=tmp_path / "workers", loop=replace(config.loop, num_workers=2))
    assert losses(workers) == expected
    real, calls = classify.probe_step, iter(range(1, 100))

    def dying(*args: Any, **options: Any) -> Any:
        if next(calls) == 4:
            raise OSError("the lights went out")
        return real(*args, **options)

    stopped = replace(config, out=tmp_path / "stopped")
    with monkeypatch.context() as patch:
        patch.setattr(classify, "probe_step", dying)
        with pytest.raises(OSError, match="the lights went out"):
            run_probe(stopped)
    assert losses(stopped) == expected


def test_options_without_effect_are_refused(config: ProbeConfig) -> None:
    still = replace(config, augment=False)
    for name, value in (("flip_probability", 0.1), ("mixup_alpha", 0.8)):
        option = name.replace("_", "-")
        with pytest.raises(ValueError, match=rf"--augmentation\.{option} does nothing without --augment; give both"):
            replace(still, augmentation=AugmentConfig(**{name: value}))
    with pytest.raises(ValueError, match='a stride of 4 does nothing with sampling "uniform"'):
        replace(config, stride=4)
    with pytest.raises(ValueError, match='sampling "dense" needs a stride of at least 1 frame, got None'):
        replace(config, sampling="dense")
    for name in ("mixup_alpha", "cutmix_alpha"):
        alone = replace(config.loop, batch_size=1)
        with pytest.raises(ValueError, match=r"mix the clips of a batch with each other, and --loop.batch-size is 1"):
            replace(config, augmentation=AugmentConfig(**{name: 0.8}), loop=alone)
        assert replace(config, augmentation=AugmentConfig(**{name: 0.8}), loop=replace(alone, batch_size=2))


@pytest.mark.slow
def test_dense_sampling_takes_every_stride_th_frame(config: ProbeConfig, tmp_path: Path) -> None:
    """Training draws the start anew; the test result says how its clips were sampled."""
    manifest = read_manifest(config.clips.train)
    dense = replace(config, sampling="dense", stride=2, clips=replace(config.clips, test_split="test"))
    other = replace(dense, stride=4, out=tmp_path / "other")
    uniform = replace(config, out=tmp_path / "uniform")
    assert len({tuple(losses(tried)) for tried in (dense, other, uniform)}) == 3
    document = json.loads((dense.out / "test.json").read_text())
    assert (document["sampling"], document["stride"], document["frames"]) == ("dense", 2, "videos")
    model = load(dense.out).model
    clip = ClipConfig(num_frames=3, image_size=48, sampling="dense", stride=2)
    test = VideoDataset(manifest.select(split="test"), config=clip, seed=0)
    result = evaluate_clips(model, dataset=test, classes=manifest.classes, device=torch.device("cpu"))
    assert (document["top1"], document["num_videos"]) == (result.metrics.top1, 10)
    saved = (dense.out / "test_videos.csv").read_text().splitlines()[1:]
    scores = [[float(cell) for cell in line.split(",")[3:]] for line in saved]
    np.testing.assert_allclose(np.array(scores), result.scores, rtol=0, atol=1e-8)


@pytest.mark.parametrize("device", [None, torch.device("meta")])
def test_batches_come_to_the_device_of_the_training(tmp_path: Path, device: torch.device | None) -> None:
    """`meta` stands for an accelerator."""
    model = torch.nn.Linear(1, 1)
    optim = OptimConfig(warmup_steps=0)
    places: list[str] = []

    def step(batch: torch.Tensor) -> dict[str, Sum]:
        places.append(batch.device.type)
        return {"loss": Sum(1.0, 1)}

    class Points:
        def __len__(self) -> int:
            return 5

        def __getitem__(self, key: SampleKey) -> torch.Tensor:
            return torch.tensor([float(key.index)])

    training = Training(
        model=model,
        optimizer=build_optimizer(model, config=optim),
        step=step,
        dataset=Points(),
        collate=torch.stack,
        device=device,
    )
    config = LoopConfig(steps=3, batch_size=2)
    run_loop(training, config=config, optim=optim, run=Run(tmp_path, config=config))
    assert places == 3 * ["cpu" if device is None else "meta"]


@pytest.mark.parametrize(("device", "pinned"), [(None, False), ("cpu", False), ("cuda", True)])
def test_memory_is_pinned_for_cuda_alone(device: str | None, pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not where batches stay: tokens on a GPU cannot be pinned."""
    asked: dict[str, Any] = {}

    def batches(dataset: Any, **options: Any) -> Any:
        asked.update(options)
        return (step for step in ())

    monkeypatch.setattr(loop, "batches", batches)
    monkeypatch.setattr(loop, "to_device_ahead", lambda stream, *, device: stream)
    model = torch.nn.Linear(1, 1)
    training = Training(
        model=model,
        optimizer=build_optimizer(model, config=OptimConfig()),
        step=lambda batch: {},
        dataset=[0],
        collate=list,
        device=None if device is None else torch.device(device),
    )
    order = Order(num_samples=1, batch_size=1, seed=0)
    assert list(loop._stream(training, order=order, share=loop.Share(), first=0, last=1)) == []
    assert asked["pin_memory"] is pinned
