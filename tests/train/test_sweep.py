"""The sweep: each probe equals the same probe trained alone, and the test split has no say in which one is kept."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file

from coca_video.config import from_json, to_json
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import read_manifest, write_manifest
from coca_video.data.transforms import normalize
from coca_video.data.video import Clip, ClipConfig, VideoDataset
from coca_video.eval.metrics import classification_metrics
from coca_video.hub import load
from coca_video.models.head import HeadConfig
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier
from coca_video.train import sweep
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, Finetune, ProbeConfig, RandomEncoder
from coca_video.train.probe_data import read_splits
from coca_video.train.sweep import ProbeHeads, run_sweep
from coca_video.train.sweep_config import SweepConfig
from coca_video.train.sweep_figures import Figures, HeldOutPart, SweptProbe, best_of
from tests.ranks import on_ranks

HEADS = (
    HeadConfig(),
    HeadConfig(time_embedding="sincos"),
    HeadConfig(time_embedding="learned", num_queries=2),
    HeadConfig(pooling="mean"),
    HeadConfig(num_blocks=1),
)
MEASURED = ("samples_per_second", "data_wait_share", "memory_mb", "learning_rate")


@pytest.fixture
def probe(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    """Clipping at 0.5 acts on every update: gradients have a norm of 0.6 to 3 here."""
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=drawn_clips, holdout_share=0.25),
        out=tmp_path / "sweep",
        num_frames=3,
        token_cache=tmp_path / "tokens",
        token_dtype="fp32",
        augment=False,
        optim=OptimConfig(warmup_steps=2, gradient_clip=0.5, ema_decay=0.5),
        loop=LoopConfig(steps=6, batch_size=6, seed=3, log_every=2, checkpoint_every=6, evaluate_every=3),
        device="cpu",
    )


def records_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def curves(out: Path, *, number: int | None = None) -> list[dict[str, Any]]:
    """The records without what the machine decides; of a sweep those of one probe, under the names of a run alone."""
    found = []
    for record in records_of(out):
        own = {name: value for name, value in record.items() if name not in MEASURED}
        if number is not None:
            suffix = f"/{number:02d}"
            own = {
                name.removesuffix(suffix): value
                for name, value in own.items()
                if name in ("kind", "step") or name.endswith(suffix)
            }
        found.append(own)
    return found


def trained_heads(config: SweepConfig, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """Runs the sweep; the weights of all heads that it chose from."""
    kept: list[dict[str, torch.Tensor]] = []
    real: Callable[..., None] = sweep._take_head

    def take_head(model: VideoClassifier, *, heads: ProbeHeads, **options: Any) -> None:
        kept.extend(dict(heads[number].state_dict()) for number in range(len(heads.heads)))
        real(model, heads=heads, **options)

    monkeypatch.setattr(sweep, "_take_head", take_head)
    run_sweep(config)
    return kept


def assert_equal_curves(own: list[dict[str, Any]], alone: list[dict[str, Any]], *, tolerance: float) -> None:
    assert [(record["kind"], record["step"]) for record in own] == [(one["kind"], one["step"]) for one in alone]
    for mine, other in zip(own, alone, strict=True):
        numbers = {name: value for name, value in mine.items() if name != "kind"}
        if mine["kind"] == "evaluation":
            numbers.pop("loss")  # which a run alone does not log
        expected = {name: value for name, value in other.items() if name != "kind"}
        assert numbers == pytest.approx(expected, rel=tolerance, abs=tolerance)


ADAFACTOR: dict[str, Any] = {"algorithm": "adafactor", "beta2": 0.999, "rate_factors": {"head.classifier": 0.5}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "optim", "options", "tolerance"),
    [
        ("tokens", {}, {"weight_decays": (0.01, 0.5)}, 1e-5),
        ("augmented videos", ADAFACTOR, {"label_smoothings": (0.0, 0.2)}, 1e-4),
    ],
    ids=["adamw", "adafactor"],
)
def test_each_probe_equals_the_same_probe_alone(
    probe: ProbeConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    optim: dict[str, Any],
    options: dict[str, Any],
    tolerance: float,
) -> None:
    """Weights, losses, gradient norms and accuracies, with other rates, decays, smoothings and heads beside it."""
    probe = replace(probe, optim=replace(probe.optim, **optim))
    if source != "tokens":
        probe = replace(probe, token_cache=None, token_dtype="bf16", augment=True, micro_batch_size=4)
    grid = SweepConfig(probe=probe, learning_rates=(1e-3, 5e-3), heads=HEADS, **options)
    weights = trained_heads(grid, monkeypatch)
    assert len(weights) == 20
    for number in (0, 7, 9, 14, 19):  # each head once, with either rate and either of the other option
        alone = replace(grid.probes[number], out=tmp_path / f"alone-{number}")
        run_probe(alone)
        expected = curves(alone.out)
        assert all(one["gradient_norm"] > 0.5 for one in expected if one["kind"] == "train")  # clipping acts
        assert_equal_curves(curves(probe.out, number=number), expected, tolerance=tolerance)
        saved = load_file(alone.out / "model" / "model.safetensors")
        for name, tensor in weights[number].items():
            if not name.endswith(("k_proj.bias", "key.bias")):  # no gradient but rounding's
                torch.testing.assert_close(tensor, saved[f"head.{name}"], rtol=0, atol=tolerance)


def small(probe: ProbeConfig, **changed: Any) -> SweepConfig:
    """Two rates, two decays."""
    return SweepConfig(probe=replace(probe, **changed), learning_rates=(1e-3, 3e-2), weight_decays=(0.01, 5.0))


def written_probes(out: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((out / "probes.json").read_text())
    return document


@pytest.mark.slow
def test_every_option_changes_a_number(probe: ProbeConfig) -> None:
    """All 16 probes of a grid of twos end with training losses and held-out losses of their own."""
    grid = SweepConfig(
        probe=probe,
        learning_rates=(1e-3, 5e-3),
        weight_decays=(0.01, 0.5),
        label_smoothings=(0.0, 0.2),
        heads=HEADS[:2],
    )
    run_sweep(grid)
    for kind in ("train", "evaluation"):
        last = [record for record in records_of(probe.out) if record["kind"] == kind][-1]
        losses = [value for name, value in last.items() if name.startswith("loss/")]
        assert len(losses) == len(set(losses)) == 16


@pytest.mark.slow
def test_what_a_sweep_writes(probe: ProbeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small(probe)
    weights = trained_heads(config, monkeypatch)
    document = written_probes(probe.out)
    assert (document["num_held_out"], document["step"]) == (5, 6)
    options = [(row["number"], row["learning_rate"], row["weight_decay"]) for row in document["probes"]]
    assert options == [(0, 1e-3, 0.01), (1, 1e-3, 5.0), (2, 3e-2, 0.01), (3, 3e-2, 5.0)]
    last = [record for record in records_of(probe.out) if record["kind"] == "evaluation"][-1]
    for row in document["probes"]:
        assert row["held_out"] == {
            name: last[f"{name}/{row['number']:02d}"] for name in ("top1", "top5", "mean_class", "loss")
        }
    chosen = max(document["probes"], key=lambda row: (row["held_out"]["top1"], -row["held_out"]["loss"]))
    assert document["chosen"] == chosen["number"]
    assert last["best_top1"] == chosen["held_out"]["top1"]
    saved = load_file(probe.out / "model" / "model.safetensors")
    for name, tensor in weights[chosen["number"]].items():
        assert torch.equal(saved[f"head.{name}"], tensor)
    test = json.loads((probe.out / "test.json").read_text())
    assert test["num_videos"] == 10
    assert {name: test["chosen"][name] for name in ("probe", "of", "held_out_top1", "step", "learning_rate")} == {
        "probe": chosen["number"],
        "of": 4,
        "held_out_top1": chosen["held_out"]["top1"],
        "step": 6,
        "learning_rate": chosen["learning_rate"],
    }
    again = run_sweep(config)  # it is finished: what is there is read
    assert [asdict(one.held_out) for one in again.probes] == [row["held_out"] for row in document["probes"]]
    assert again.result.evaluation == test and again.chosen.number == chosen["number"]


@pytest.mark.slow
def test_held_out_figures_are_those_of_the_saved_model(probe: ProbeConfig) -> None:
    """Clip by clip, with the model that was saved, and without the sweep's code."""
    heads = (HeadConfig(), HeadConfig(time_embedding="learned"))
    swept = run_sweep(SweepConfig(probe=probe, learning_rates=(3e-2,), heads=heads))
    saved = load(probe.out)
    model = saved.model
    assert isinstance(model, VideoClassifier)
    assert model.config.head == swept.chosen.config.head
    splits = read_splits(probe.clips, seed=probe.loop.seed)
    assert splits.holdout is not None

    manifest = splits.holdout.manifest
    clips = VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=48), seed=0)
    labels, scores = [], []
    for index, row in enumerate(manifest.rows):
        clip = clips[SampleKey(0, index)]
        assert isinstance(clip, Clip)
        frames = clip.frames.unsqueeze(0)
        with torch.no_grad():
            logits = model(normalize(frames, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
        scores.append(logits[0].double().softmax(dim=0))
        labels.append(manifest.label_index(row))
    probabilities, targets = torch.stack(scores), torch.tensor(labels)
    expected = -probabilities[range(5), targets].log().mean().item()
    assert swept.chosen.held_out.loss == pytest.approx(expected, rel=1e-4)
    metrics = classification_metrics(probabilities.numpy(), labels=targets.numpy())
    assert swept.chosen.held_out.top1 == metrics.top1 and swept.chosen.held_out.top5 == metrics.top5


@pytest.mark.slow
def test_the_test_split_chooses_nothing(drawn_clips: Path, probe: ProbeConfig, tmp_path: Path) -> None:
    """With every label of the test split wrong, all but the test's figures is the same."""
    config = small(probe)
    run_sweep(config)
    manifest = read_manifest(drawn_clips)
    following = dict(zip(manifest.classes, manifest.classes[1:] + manifest.classes[:1], strict=True))
    rows = [replace(row, label=following[str(row.label)]) if row.split == "test" else row for row in manifest.rows]
    wrong = tmp_path / "wrong" / "manifest.csv"
    write_manifest(wrong, rows=rows, classes=manifest.classes)
    other = replace(probe, clips=replace(probe.clips, train=wrong), out=tmp_path / "other")
    run_sweep(replace(config, probe=other))
    assert written_probes(other.out) == written_probes(probe.out)
    assert curves(other.out) == curves(probe.out)
    models = [(out / "model" / "model.safetensors").read_bytes() for out in (probe.out, other.out)]
    assert models[0] == models[1]
    tests = [json.loads((out / "test.json").read_text()) for out in (probe.out, other.out)]
    assert tests[0]["chosen"] == tests[1]["chosen"]
    assert {name: one["top1"] for name, one in tests[0]["per_class"].items()} != {
        name: one["top1"] for name, one in tests[1]["per_class"].items()
    }


@pytest.mark.slow
def test_without_a_test_part_and_with_a_broken_held_out_clip(
    drawn_clips: Path, probe: ProbeConfig, tmp_path: Path
) -> None:
    manifest = read_manifest(drawn_clips)
    splits = read_splits(probe.clips, seed=probe.loop.seed)
    assert splits.holdout is not None
    broken = splits.holdout.manifest.rows[0].video_id
    (tmp_path / "broken.mp4").write_bytes(b"")
    rows = [
        replace(row, path=tmp_path / "broken.mp4") if row.video_id == broken else row
        for row in manifest.select(split="train").rows
    ]
    path = tmp_path / "training" / "manifest.csv"
    write_manifest(path, rows=rows, classes=manifest.classes)
    clips = replace(probe.clips, train=path, test_split=None)
    swept = run_sweep(small(probe, clips=clips))
    assert swept.result.evaluation is None and not (probe.out / "test.json").exists()
    assert swept.result.num_unreadable == 1
    with (probe.out / "unreadable.csv").open() as file:
        assert [row[0] for row in csv.reader(file)][1:] == [broken]
    assert all((one.held_out.top1 * 4).is_integer() for one in swept.probes)  # of the four that could be read


@pytest.mark.slow
def test_groups_stay_on_one_side(drawn_clips: Path, probe: ProbeConfig, tmp_path: Path) -> None:
    manifest = read_manifest(drawn_clips)
    rows = [replace(row, extra={"person": f"p{number % 4}"}) for number, row in enumerate(manifest.rows)]
    path = tmp_path / "people" / "manifest.csv"
    write_manifest(path, rows=rows, classes=manifest.classes)
    clips = replace(probe.clips, train=path, holdout_group="person")
    splits = read_splits(clips, seed=probe.loop.seed)
    assert splits.holdout is not None
    people = [{row.extra["person"] for row in part.manifest.rows} for part in (splits.train, splits.holdout)]
    assert people[0] and people[1] and not people[0] & people[1]
    swept = run_sweep(small(probe, clips=clips))
    assert swept.num_held_out == len(splits.holdout.manifest.rows)
    by_video = run_sweep(small(probe, out=tmp_path / "by_video"))
    assert [one.held_out for one in by_video.probes] != [one.held_out for one in swept.probes]


@pytest.mark.slow
def test_the_best_of_all_evaluations(probe: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With keep_best the pair of evaluation and probe is chosen, here by figures that are made up."""
    made_up = {3: (0.2, 0.8, 0.6, 0.8), 6: (0.8, 0.4, 0.4, 0.4)}  # at 6 an equal of the best: the first is kept
    real = HeldOutPart.evaluate

    def evaluate(self: Any) -> dict[str, float]:
        values = real(self)
        step = 3 if not calls else 6
        calls.append(None)
        loss = {"loss/01": 2.0, "loss/03": 1.0}
        top1 = {f"top1/{number:02d}": value for number, value in enumerate(made_up[step])}
        return values | top1 | loss | {"best_top1": max(made_up[step])}

    calls: list[None] = []
    monkeypatch.setattr(HeldOutPart, "evaluate", evaluate)
    kept = trained_heads(small(probe, keep_best=True), monkeypatch)
    document = written_probes(probe.out)
    assert (document["step"], document["chosen"]) == (3, 3)
    calls.clear()
    last = trained_heads(small(probe, out=tmp_path / "last"), monkeypatch)
    document = written_probes(tmp_path / "last")
    assert (document["step"], document["chosen"]) == (6, 0)
    assert not torch.equal(kept[3]["classifier.weight"], last[3]["classifier.weight"])
    saved = load_file(probe.out / "model" / "model.safetensors")
    assert torch.equal(saved["head.classifier.weight"], kept[3]["classifier.weight"])


@pytest.mark.slow
def test_clips_are_encoded_once_for_all_probes(probe: ProbeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[int] = []
    real: Callable[..., Callable[[torch.Tensor], torch.Tensor]] = getattr(sweep, "frozen_encode")  # noqa: B009, mypy sees no export

    def counted(*args: Any, **options: Any) -> Callable[[torch.Tensor], torch.Tensor]:
        encode = real(*args, **options)

        def count(clips: torch.Tensor) -> torch.Tensor:
            frames.append(len(clips))
            return encode(clips)

        return count

    monkeypatch.setattr(sweep, "frozen_encode", counted)
    run_sweep(small(probe, token_cache=None, token_dtype="bf16", augment=True))
    assert frames == [6] * 6  # batches of six, six updates, four probes


def outcome(out: Path) -> tuple[list[dict[str, Any]], bytes, str, Any]:
    """All that a run leaves, but for times."""
    model = (out / "model" / "model.safetensors").read_bytes()
    test = json.loads((out / "test.json").read_text())
    test.pop("model")
    return curves(out), model, (out / "probes.json").read_text(), test


def resumable(probe: ProbeConfig) -> SweepConfig:
    return small(probe, keep_best=True, loop=replace(probe.loop, steps=8, checkpoint_every=2, evaluate_every=3))


class Killed(BaseException):
    """Stands for the process ending without a chance to do anything."""


@pytest.mark.drill
@pytest.mark.parametrize("places", [("sweep_step", "_test"), ("best_of", "save_classifier")])
def test_death_anywhere(
    probe: ProbeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, places: tuple[str, ...]
) -> None:
    """In update 6, with the checkpoint of update 4 behind it, when a choice is made, before and after the test."""
    whole = resumable(replace(probe, out=tmp_path / "whole"))
    run_sweep(whole)
    for place in places:
        dies = resumable(replace(probe, out=tmp_path / place))
        with monkeypatch.context() as patch:
            die_in(patch, place=place)
            with pytest.raises(Killed):
                run_sweep(dies)
        run_sweep(dies)
        assert outcome(dies.probe.out) == outcome(whole.probe.out)


def die_in(monkeypatch: pytest.MonkeyPatch, *, place: str) -> None:
    """Makes the process "die" at the sixth update, or at the first call of another function."""
    calls: list[None] = []
    real = getattr(sweep, place)

    def dying(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if place != "sweep_step" or len(calls) == 6:
            raise Killed
        return real(*args, **options)

    monkeypatch.setattr(sweep, place, dying)


SCRIPT = """
import json, sys
from pathlib import Path
from coca_video.config import from_json
from coca_video.train.sweep import run_sweep
from coca_video.train.sweep_config import SweepConfig
run_sweep(from_json(SweepConfig, json.loads(Path(sys.argv[1]).read_text())))
"""


@pytest.mark.drill
def test_sigkill(probe: ProbeConfig, tmp_path: Path) -> None:
    """A real process and kill -9: while the first checkpoint is written, once more later, and then to the end."""
    whole, killed = (resumable(replace(probe, out=tmp_path / name)) for name in ("whole", "killed"))
    run_sweep(whole)
    (tmp_path / "config.json").write_text(json.dumps(to_json(killed)))
    out = killed.probe.out
    for trigger in ("checkpoints/.partial", "checkpoints/step-00000004"):
        process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "config.json")])
        deadline = time.monotonic() + 240
        while not (out / trigger).exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not (out / "model").exists()
    run_sweep(killed)
    assert outcome(out) == outcome(whole.probe.out)


def run_on_a_rank(config: SweepConfig) -> tuple[int, list[dict[str, float]], Any]:
    swept = run_sweep(config)
    return swept.chosen.number, [asdict(one.held_out) for one in swept.probes], swept.result.evaluation


@pytest.mark.drill
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_ranks_sweep_as_one(probe: ProbeConfig, tmp_path: Path, strategy: Literal["ddp", "fsdp2"]) -> None:
    """Batches of 5 from videos: the ranks train on 2 and 3 clips, and evaluate 3 and 2 held out."""
    probe = replace(probe, token_cache=None, token_dtype="bf16", loop=replace(probe.loop, batch_size=5))
    config = SweepConfig(probe=probe, learning_rates=(1e-3, 5e-3), heads=HEADS[:4])
    one = run_on_a_rank(config)
    loop = replace(probe.loop, strategy=strategy)
    first, second = on_ranks(
        run_on_a_rank, config=replace(config, probe=replace(probe, out=tmp_path / "two", loop=loop))
    )
    assert first == second
    assert first[0] == one[0]
    for mine, other in zip(first[1], one[1], strict=True):
        assert mine == pytest.approx(other, rel=1e-4)
    ours, theirs = curves(tmp_path / "two"), curves(probe.out)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)
    saved = [load_file(out / "model" / "model.safetensors") for out in (tmp_path / "two", probe.out)]
    for name, tensor in saved[0].items():
        torch.testing.assert_close(tensor, saved[1][name], rtol=0, atol=1e-4)


def test_the_grid(probe: ProbeConfig) -> None:
    grid = SweepConfig.vjepa2(probe)
    options = [(one.optim.learning_rate, one.optim.weight_decay) for one in grid.probes]
    rates = [0.005] * 4 + [0.003] * 4 + [0.001] * 4 + [0.0003] * 4 + [0.0001] * 4
    assert options == list(zip(rates, [0.01, 0.1, 0.4, 0.8] * 5, strict=True))
    many = SweepConfig(probe=probe, label_smoothings=(0.0, 0.2), heads=HEADS[:2])
    assert [(one.head, one.label_smoothing) for one in many.probes] == [
        (HEADS[0], 0.0),
        (HEADS[0], 0.2),
        (HEADS[1], 0.0),
        (HEADS[1], 0.2),
    ]
    assert from_json(SweepConfig, json.loads(json.dumps(to_json(many)))) == many


def test_ties_go_to_the_lower_loss_then_to_the_lower_number(probe: ProbeConfig) -> None:
    def swept(number: int, *, top1: float, loss: float) -> SweptProbe:
        figures = Figures(top1=top1, top5=1.0, mean_class=top1, loss=loss)
        return SweptProbe(number=number, config=probe, held_out=figures)

    probes = [swept(0, top1=0.5, loss=0.1), swept(1, top1=0.6, loss=0.9), swept(2, top1=0.6, loss=0.8)]
    assert best_of(tuple(probes)).number == 2
    assert best_of((*probes, swept(3, top1=0.6, loss=0.8))).number == 2
    assert best_of((*probes, swept(3, top1=0.7, loss=9.0))).number == 3


def test_what_makes_no_sweep_is_a_sentence(probe: ProbeConfig) -> None:
    def refused(match: str, **options: Any) -> None:
        given: dict[str, Any] = {"probe": probe, "learning_rates": (1e-3, 1e-4)} | options
        with pytest.raises(ValueError, match=match):
            SweepConfig(**given)

    refused("A sweep trains many probes on one frozen encoder", probe=replace(probe, token_cache=None, **UNFROZEN))
    unheld = replace(probe.clips, holdout_share=0.0)
    refused("never on the test clips; give --probe.clips.holdout-share", probe=replace(probe, clips=unheld))
    refused("this is one; give several --learning-rates", learning_rates=(1e-3,))
    refused("--learning-rates takes different values; got 0.1, 0.1", learning_rates=(0.1, 0.1))
    rate = replace(probe, optim=replace(probe.optim, learning_rate=0.5))
    refused("--probe.optim.learning-rate does nothing where --learning-rates says", probe=rate)
    refused("--probe.label-smoothing does nothing", probe=replace(probe, label_smoothing=0.3), label_smoothings=(0.0,))
    refused("--probe.head does nothing where --heads says", probe=replace(probe, head=HEADS[1]), heads=HEADS[:2])
    refused("learning-rate must be above 0 and finite; got -1", learning_rates=(1e-3, -1.0))
    refused("2 choices of encoder layers", heads=(HeadConfig(encoder_layers=(-1,)), HeadConfig(encoder_layers=(0, 1))))
    with pytest.raises(ValueError, match=r"--probe.optim.weight-decay does nothing where --weight-decays says"):
        SweepConfig(probe=replace(probe, optim=replace(probe.optim, weight_decay=0.3)), weight_decays=(0.1, 0.2))


UNFROZEN: dict[str, Any] = {"token_dtype": "bf16", "tuning": Finetune()}
