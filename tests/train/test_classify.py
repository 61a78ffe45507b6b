"""The probe: what it leaves alone, what it can be asked, and that each of its options does something."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coca_video.data.loader import SampleKey
from coca_video.data.manifest import read_manifest, write_manifest
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.classification import evaluate_clips
from coca_video.hub import fingerprint, load
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, ProbeConfig, RandomEncoder
from coca_video.train.probe_model import build_classifier

CPU = torch.device("cpu")


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips),
        out=tmp_path / "probe",
        num_frames=3,
        token_cache=tmp_path / "tokens",
        augment=False,
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=4, batch_size=8, log_every=1),
        device="cpu",
    )


def without_cache(config: ProbeConfig, **changed: Any) -> ProbeConfig:
    return replace(config, token_cache=None, **changed)


def losses(out: Path) -> list[float]:
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


@pytest.mark.parametrize("cached", [True, False])
def test_the_encoder_stays_bit_identical(config: ProbeConfig, cached: bool) -> None:
    config = config if cached else without_cache(config, augment=True)
    before = build_classifier(config, num_classes=5)
    run_probe(config)
    after = load(config.out).model
    assert fingerprint(after.encoder) == fingerprint(before.encoder)
    assert fingerprint(after) != fingerprint(before)


def test_cached_tokens_and_clips_give_the_same_probe(config: ProbeConfig, tmp_path: Path) -> None:
    """Without augmentation they are the same numbers, but for the batch in which a clip was encoded."""
    run_probe(config)
    clips = without_cache(config, out=tmp_path / "clips")
    run_probe(clips)
    assert losses(clips.out) == pytest.approx(losses(config.out), rel=1e-4)


@pytest.mark.parametrize("trained_with", [1, 3])
def test_any_number_of_frames_at_evaluation(config: ProbeConfig, trained_with: int) -> None:
    """Also a probe trained on one picture a clip takes video; scores equal a frame-by-frame computation."""
    run_probe(replace(config, num_frames=trained_with))
    saved = load(config.out)
    model = saved.model
    assert isinstance(model, VideoClassifier) and model.config.num_frames == trained_with
    manifest = read_manifest(config.clips.train).select(split="test")
    for num_frames in (1, 5, 16, 24):
        clip = ClipConfig(num_frames=num_frames, image_size=48)
        dataset = VideoDataset(manifest, config=clip, seed=0)
        result = evaluate_clips(model, dataset=dataset, classes=saved.classes, device=CPU)
        first = result.video_ids[0]
        index = next(i for i, row in enumerate(manifest.rows) if row.video_id == first)
        frames = dataset[SampleKey(0, index)].frames.double() / 255
        normalised = ((frames - 0.5) / 0.5).float()
        tokens = torch.cat([model.encoder(frame.unsqueeze(0)) for frame in normalised], dim=1)
        pooled = model.head.pooler.norm_out(model.head.pooler.attend(tokens)).squeeze(1)
        expected = model.head.classifier(pooled).double().softmax(dim=1)[0]
        torch.testing.assert_close(torch.from_numpy(result.scores[0]), expected, rtol=1e-4, atol=1e-6)


def test_one_frame_is_the_middle_one(config: ProbeConfig) -> None:
    manifest = read_manifest(config.clips.train)
    one = VideoDataset(manifest, config=ClipConfig(num_frames=1, image_size=48), seed=0)[SampleKey(0, 0)]
    every = VideoDataset(manifest, config=ClipConfig(num_frames=16, image_size=48), seed=0)[SampleKey(0, 0)]
    assert torch.equal(one.frames[0], every.frames[8])


@pytest.mark.parametrize(
    "changed",
    [
        {"num_frames": 4},
        {"image_size": 32},
        {"label_smoothing": 0.0},
        {"sampling": "dense", "stride": 2},
        *(
            {"encoder": RandomEncoder(image=replace(VitConfig.tiny(), **{name: value}))}
            for name, value in (
                ("width", 48),
                ("depth", 2),
                ("num_heads", 4),
                ("mlp_width", 200),
                ("patch_size", 16),
                ("mean", (0.4, 0.5, 0.5)),
                ("std", (0.5, 0.5, 0.4)),
            )
        ),
        {"encoder": RandomEncoder(image=TimmConfig(name="vit_tiny_patch16_224", image_size=48))},
        {"loop": LoopConfig(steps=4, batch_size=8, log_every=1, seed=1)},
        {"loop": LoopConfig(steps=4, batch_size=4, log_every=1)},
        {"loop": LoopConfig(steps=4, batch_size=8, log_every=1, precision="bf16")},
        {"optim": OptimConfig(warmup_steps=3)},
        {"token_cache": None, "augment": True},
        {"token_cache": None, "augment": True, "min_crop_area": 0.9},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_every_option_changes_the_losses(config: ProbeConfig, tmp_path: Path, changed: dict[str, object]) -> None:
    augmented = {"token_cache": None, "augment": True}
    plain = replace(config, **(augmented if len(changed) == 3 else {}))
    run_probe(plain)
    other = replace(plain, **changed, out=tmp_path / "other")
    run_probe(other)
    assert losses(other.out) != losses(plain.out)


def test_a_probe_learns_clips_by_heart(config: ProbeConfig) -> None:
    """Overfits 20 clips: the loss falls below a tenth of chance, and every training clip is named."""
    loop = LoopConfig(steps=120, batch_size=20, log_every=20, evaluate_every=60)
    clips = replace(config.clips, test_split="train")
    optim = OptimConfig(learning_rate=5e-3, warmup_steps=10)
    result = run_probe(replace(config, clips=clips, label_smoothing=0.0, loop=loop, optim=optim))
    assert losses(config.out)[-1] < 0.16
    assert result.evaluation is not None and result.evaluation["top1"] == 1.0
    assert (config.out / "curves.png").stat().st_size > 10_000


def test_unreadable_clips_are_counted_listed_and_never_replaced(drawn_clips: Path, config: ProbeConfig) -> None:
    folder = config.out.parent / "copy"
    shutil.copytree(drawn_clips.parent, folder)
    manifest = read_manifest(folder / "manifest.csv")
    broken = [manifest.select(split=split).rows[0] for split in ("train", "test")]
    for row in broken:
        row.path.write_bytes(row.path.read_bytes()[:300])
    config = replace(config, clips=replace(config.clips, train=folder / "manifest.csv"))
    for cached in (True, False):
        out = config.out / str(cached)
        result = run_probe(replace(config if cached else without_cache(config), out=out))
        assert result.num_unreadable == 2
        with (out / "unreadable.csv").open() as file:
            listed = dict(list(csv.reader(file))[1:])
        assert set(listed) == {row.video_id for row in broken}
        assert all(str(row.path) in listed[row.video_id] for row in broken)
        evaluation = result.evaluation
        assert evaluation is not None
        assert (evaluation["num_videos"], evaluation["num_unreadable"]) == (9, 1)
        assert evaluation["top1_unreadable_wrong"] == pytest.approx(evaluation["top1"] * 9 / 10)


def test_nothing_readable_is_a_sentence(drawn_clips: Path, config: ProbeConfig) -> None:
    folder = config.out.parent / "copy"
    shutil.copytree(drawn_clips.parent, folder)
    for path in folder.rglob("*.mp4"):
        path.write_bytes(b"")
    for cached in (True, False):
        broken = replace(
            config if cached else without_cache(config), clips=replace(config.clips, train=folder / "manifest.csv")
        )
        with pytest.raises(ValueError, match=r"None of the 20 .* could be read; the first.*the file is empty"):
            run_probe(replace(broken, out=config.out / str(cached)))


def test_another_test_manifest_keeps_the_order_of_classes(drawn_clips: Path, config: ProbeConfig) -> None:
    """A test manifest whose own classes.txt stands in another order must not permute the answers."""
    manifest = read_manifest(drawn_clips)
    plain = run_probe(config).evaluation
    other = config.out.parent / "other" / "manifest.csv"
    write_manifest(other, rows=manifest.select(split="test").rows, classes=manifest.classes[::-1])
    clips = replace(config.clips, test=other)
    permuted = run_probe(replace(config, clips=clips, out=config.out.parent / "again")).evaluation
    assert plain is not None and permuted is not None
    assert permuted["per_class"] == plain["per_class"] and list(permuted["per_class"]) == list(manifest.classes)


def test_options_that_would_do_nothing_are_refused(config: ProbeConfig) -> None:
    with pytest.raises(ValueError, match="augment would do nothing"):
        replace(config, augment=True)
    with pytest.raises(ValueError, match="--min-crop-area does nothing without --augment; give both, or neither"):
        replace(config, min_crop_area=0.1)
    with pytest.raises(ValueError, match=r"--loop.evaluate-every does nothing without a test split"):
        replace(config, clips=replace(config.clips, test_split=None), loop=replace(config.loop, evaluate_every=1))
    with pytest.raises(ValueError, match=r"--label-smoothing must be at least 0 and below 1; got 1.5"):
        replace(config, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"--loop.log-every must be at least 1; got 0"):
        LoopConfig(log_every=0)
    with pytest.raises(ValueError, match=r"--loop.evaluate-every must be at least 0; got -5"):
        LoopConfig(evaluate_every=-5)


def test_clips_without_labels_are_a_sentence(drawn_clips: Path, config: ProbeConfig) -> None:
    manifest = read_manifest(drawn_clips)
    rows = [replace(row, label=None if number == 3 else row.label) for number, row in enumerate(manifest.rows)]
    path = config.out.parent / "unlabelled" / "manifest.csv"
    write_manifest(path, rows=rows, classes=manifest.classes)
    with pytest.raises(ValueError, match=rf"1 of 20 clips without a label, the first is '{rows[3].video_id}'"):
        run_probe(replace(config, clips=replace(config.clips, train=path)))


def test_other_data_is_another_run(drawn_clips: Path, config: ProbeConfig) -> None:
    """A finished run does not answer for clips that it has not seen, though the path is the same."""
    manifest = read_manifest(drawn_clips)
    path = config.out.parent / "changing" / "manifest.csv"
    config = replace(config, clips=replace(config.clips, train=path))
    write_manifest(path, rows=manifest.rows, classes=manifest.classes)
    run_probe(config)
    shutil.rmtree(config.out / "checkpoints")  # to free the disk: the finished run is still the same one
    run_probe(config)
    write_manifest(path, rows=manifest.rows[1:], classes=manifest.classes)
    with pytest.raises(ValueError, match=r"started with other settings .*train_fingerprint"):
        run_probe(config)
