"""A run stopped anywhere and started again equals one that never stopped: all losses and weights, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from coca_video.models.coca import CoCaConfig
from coca_video.models.image import VitConfig
from coca_video.train import classify, pretrain
from coca_video.train.checkpoint import Checkpoints
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig, Stopped
from coca_video.train.optim import OptimConfig
from coca_video.train.pretrain import PairsConfig, PretrainConfig, run_pretraining
from coca_video.train.probe_config import ClipsConfig, Finetune, PretrainedEncoder, ProbeConfig, RandomEncoder

STEPS = 8
# Log lines every 3 steps and checkpoints every 2: a resumed run starts in the middle of a line's window.
LOOP = LoopConfig(steps=STEPS, batch_size=7, seed=5, log_every=3, checkpoint_every=2, evaluate_every=4)
OPTIM = OptimConfig(warmup_steps=3)
# At 0.4 the average still forms over these few steps and then goes on at its own decay.
AVERAGED = OptimConfig(
    warmup_steps=3,
    algorithm="adafactor",
    beta2=0.999,
    schedule="linear",
    rate_factors={"encoder": 0.5, "log_scale": 0.0},
    ema_decay=0.4,
)

Config = PretrainConfig | ProbeConfig

MORE_KINDS = (
    "averaged pretrain",
    "probe",
    "cached probe",
    "fine-tuned probe",
)  # in the drills: each runs for half a minute


def pretrain_config(pictures: Path, *, out: Path) -> PretrainConfig:
    pairs = PairsConfig(train=pictures, test=pictures, min_crop_area=0.5, flip_probability=0.5)
    return PretrainConfig(model=CoCaConfig.tiny(), pairs=pairs, out=out, optim=OPTIM, loop=LOOP, device="cpu")


def probe_config(manifest: Path, *, out: Path, cached: bool = False) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=VitConfig.tiny()),
        clips=ClipsConfig(train=manifest),
        out=out,
        num_frames=3,
        token_cache=out / "tokens" if cached else None,
        augment=not cached,
        optim=OPTIM,
        loop=LOOP,
        device="cpu",
    )


def make_config(kind: str, *, pictures: Path, clips: Path, out: Path) -> Config:
    if kind.endswith("pretrain"):
        config = pretrain_config(pictures, out=out)
        return replace(config, optim=AVERAGED) if kind == "averaged pretrain" else config
    probe = probe_config(clips, out=out, cached=kind == "cached probe")
    return fine_tuned(probe) if kind == "fine-tuned probe" else probe


def fine_tuned(config: ProbeConfig) -> ProbeConfig:
    """With the encoder, its drop path, averaged weights, and the best of those on held-out clips."""
    return replace(
        config,
        clips=replace(config.clips, holdout_share=0.25),
        tuning=Finetune(drop_path=0.3, layer_decay=0.8),
        optim=replace(OPTIM, ema_decay=0.4),
        micro_batch_size=3,
        keep_best=True,
    )


def run(config: Config) -> None:
    if isinstance(config, PretrainConfig):
        run_pretraining(config)
    else:
        run_probe(config)


def outcome(out: Path) -> tuple[list[dict[str, Any]], bytes]:
    """Log records without what is measured on the machine, and the bytes of the trained weights."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for name in ("samples_per_second", "data_wait_share", "memory_mb"):
            record.pop(name, None)
    return records, (out / "model" / "model.safetensors").read_bytes()


def last_state(out: Path) -> dict[str, Any]:
    """All that the newest checkpoint holds, by its place: weights, moments, averages and what is no tensor."""
    newest = Checkpoints(out / "checkpoints").newest()
    assert newest is not None
    dcp_to_torch_save(newest, out / "state.pt")
    state = torch.load(out / "state.pt", weights_only=False)
    return dict(leaves(state, place=()))


def leaves(tree: Any, *, place: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(place, leaf), tensors as their type and bytes."""
    match tree:
        case dict():
            for key, value in tree.items():
                yield from leaves(value, place=(*place, str(key)))
        case list():
            for number, value in enumerate(tree):
                yield from leaves(value, place=(*place, str(number)))
        case torch.Tensor():
            yield "/".join(place), (tree.dtype, tree.numpy().tobytes())
        case _:
            yield "/".join(place), tree


def shown(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in the run's event files."""
    viewer = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    viewer.Reload()
    tags = viewer.Tags()["scalars"]
    return {tag: [(point.step, point.value) for point in viewer.Scalars(tag)] for tag in tags}


def written(out: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves in metrics.jsonl, in float32 as TensorBoard keeps them."""
    curves: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()):
        for name in record.keys() - {"kind", "step"}:
            curves[f"{record['kind']}/{name}"].append((record["step"], float(np.float32(record[name]))))
    return curves


class Killed(BaseException):
    """Stands for the process ending without a chance to do anything."""


def die_in_step(monkeypatch: pytest.MonkeyPatch, *, number: int) -> None:
    """Makes the process "die" inside update `number` (from 1), after its gradients and before anything is saved."""
    for module, name in ((pretrain, "coca_step"), (classify, "probe_step")):
        real: Callable[..., Any] = getattr(module, name)
        calls = iter(range(1, 10_000))

        def step(*args: Any, _real: Callable[..., Any] = real, _calls: Any = calls, **options: Any) -> Any:
            sums = _real(*args, **options)
            if next(_calls) == number:
                raise Killed
            return sums

        monkeypatch.setattr(module, name, step)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["pretrain", *(pytest.param(kind, marks=pytest.mark.drill) for kind in MORE_KINDS)])
def test_death_in_any_step(kind: str, pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    run(make_config(kind, pictures=pictures, clips=drawn_clips, out=tmp_path / "whole"))
    expected = outcome(tmp_path / "whole")
    assert [record["step"] for record in expected[0] if record["kind"] == "train"] == [3, 6, 8]
    for number in range(1, STEPS + 1):
        config = make_config(kind, pictures=pictures, clips=drawn_clips, out=tmp_path / f"dies-{number}")
        with pytest.MonkeyPatch.context() as patch:
            die_in_step(patch, number=number)
            with pytest.raises(Killed):
                run(config)
        run(config)
        assert outcome(config.out) == expected, f"died in step {number}"


@pytest.mark.drill
def test_death_with_adafactor_and_averaged_weights(pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    """Weights, moments and averages of the last checkpoint are the same to the bit, and every curve is shown once."""
    whole = make_config("averaged pretrain", pictures=pictures, clips=drawn_clips, out=tmp_path / "whole")
    run(whole)
    config = replace(whole, out=tmp_path / "dies")
    with pytest.MonkeyPatch.context() as patch:
        die_in_step(patch, number=6)
        with pytest.raises(Killed):
            run(config)
    time.sleep(1.0)  # event files are read in the order of the second they were opened in
    run(config)
    assert outcome(config.out) == outcome(whole.out)
    states = [last_state(folder) for folder in (whole.out, config.out)]
    assert states[0] == states[1]
    places = states[0].keys()
    assert any(place.endswith("exp_avg_sq_r") for place in places)
    # The model's weights are the averages and not the latest ones; the frozen one is in neither part of a checkpoint.
    saved = load_file(config.out / "model" / "model.safetensors")
    names = saved.keys() - {"log_scale"}
    assert {place for place in places if place.startswith("averages/")} == {f"averages/{name}" for name in names}
    for name in names:
        assert saved[name].numpy().tobytes() == states[0][f"averages/{name}"][1]
    differing = [name for name in names if states[0][f"averages/{name}"] != states[0][f"model/{name}"]]
    assert len(differing) > 0.9 * len(names)  # a bias that gets no gradient stays what it was
    assert shown(config.out) == written(config.out)


@pytest.mark.parametrize("kind", ["pretrain", "probe"])
def test_number_of_workers_changes_nothing(kind: str, pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    outcomes = []
    for workers in (0, 2):
        config = make_config(kind, pictures=pictures, clips=drawn_clips, out=tmp_path / str(workers))
        run(replace(config, loop=replace(config.loop, num_workers=workers)))
        outcomes.append(outcome(config.out))
    assert outcomes[0] == outcomes[1]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_resume import make_config, run
run(make_config({kind!r}, pictures=Path({pictures!r}), clips=Path({clips!r}), out=Path({out!r})))
"""


def start(kind: str, *, pictures: Path, clips: Path, out: Path) -> "subprocess.Popen[bytes]":
    script = SCRIPT.format(
        tests=str(Path(__file__).parent), kind=kind, pictures=str(pictures), clips=str(clips), out=str(out)
    )
    return subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, env=os.environ.copy())


def wait_for(condition: Callable[[], bool], *, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.drill
@pytest.mark.parametrize("kind", ["pretrain", "probe", "fine-tuned probe"])
def test_sigkill(kind: str, pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    """Real processes and kill -9: as soon as the first checkpoint is being written, and once more a little later."""
    run(make_config(kind, pictures=pictures, clips=drawn_clips, out=tmp_path / "whole"))
    out = tmp_path / "killed"
    for trigger in ("checkpoints/.partial", "checkpoints/step-00000004"):
        process = start(kind, pictures=pictures, clips=drawn_clips, out=out)
        wait_for((out / trigger).exists, process=process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stderr.close()  # type: ignore[union-attr]
        assert not (out / "model").exists()
    run(make_config(kind, pictures=pictures, clips=drawn_clips, out=out))
    assert outcome(out) == outcome(tmp_path / "whole")


def test_ctrl_c_saves_and_the_same_run_goes_on(
    pictures: Path, drawn_clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config("pretrain", pictures=pictures, clips=drawn_clips, out=tmp_path / "whole"))
    config = make_config("pretrain", pictures=pictures, clips=drawn_clips, out=tmp_path / "stopped")
    real = pretrain.coca_step
    calls = iter(range(1, 100))

    def step(*args: Any, **options: Any) -> Any:
        if next(calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "coca_step", step)
        with pytest.raises(Stopped, match="Stopped after step 3, with a checkpoint; run the same command again"):
            run(config)
    assert Checkpoints(config.out / "checkpoints").newest() == config.out / "checkpoints" / "step-00000003"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(config)
    assert outcome(config.out) == outcome(tmp_path / "whole")


@pytest.mark.drill
def test_sigterm_to_all_processes_saves(pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    """A scheduler ends a job by signalling the whole group, loader processes included."""
    out = tmp_path / "run"
    options = {"kind": "pretrain", "pictures": str(pictures), "clips": str(drawn_clips), "out": str(out)}
    script = SCRIPT.format(tests=str(Path(__file__).parent), **options)
    script = script.replace("run(make_config(", "run(long(make_config(").rstrip() + ")\n"
    script = script.replace("import make_config, run", "import long, make_config, run")
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, start_new_session=True)
    wait_for((out / "checkpoints" / "step-00000002").exists, process=process)
    os.killpg(process.pid, signal.SIGTERM)
    error = process.communicate(timeout=60)[1].decode()
    assert "Stopped after step" in error, error
    stopped_after = int(error.split("Stopped after step ")[1].split(",")[0])
    assert Checkpoints(out / "checkpoints").newest() == out / "checkpoints" / f"step-{stopped_after:08d}"


def long(config: Config) -> Config:
    """The same with loader processes, and too many steps to come to an end."""
    return replace(config, loop=replace(config.loop, steps=100_000, num_workers=2, evaluate_every=0))


def test_other_settings_are_refused(pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    config = pretrain_config(pictures, out=tmp_path / "run")
    run(config)
    with pytest.raises(ValueError, match=r"started with other settings \(optim.learning_rate: 0.001 -> 0.5\)"):
        run(replace(config, optim=replace(OPTIM, learning_rate=0.5)))
    before = outcome(config.out)
    run(replace(config, loop=replace(LOOP, num_workers=1)))  # changes no number, and the run is finished
    assert outcome(config.out) == before


def test_a_changed_encoder_is_refused(pictures: Path, drawn_clips: Path, tmp_path: Path) -> None:
    """A frozen encoder is not in the checkpoints: other weights under the same path must not slip in."""
    for seed in (0, 1):
        pretraining = pretrain_config(pictures, out=tmp_path / f"encoder-{seed}")
        run(replace(pretraining, loop=replace(LOOP, seed=seed, steps=1)))
    (tmp_path / "encoder").symlink_to(tmp_path / "encoder-0")
    encoder = PretrainedEncoder(model=str(tmp_path / "encoder"))
    config = replace(probe_config(drawn_clips, out=tmp_path / "probe"), encoder=encoder)
    run(config)
    (tmp_path / "encoder").unlink()
    (tmp_path / "encoder").symlink_to(tmp_path / "encoder-1")
    with pytest.raises(ValueError, match=r"started with other settings .*encoder_fingerprint"):
        run(config)
