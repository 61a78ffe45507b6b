"""What of the encoder a probe trains, at which rates, from which head; and that every such option changes numbers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from coca_video.cli.__main__ import main
from coca_video.data.manifest import read_manifest
from coca_video.eval.predict import load_predictor
from coca_video.hub import fingerprint, load, save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.head import HeadConfig
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier
from coca_video.train.classify import run_probe
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig, build_optimizer
from coca_video.train.probe_config import (
    ClipsConfig,
    Finetune,
    Frozen,
    Lora,
    PretrainedEncoder,
    ProbeConfig,
    RandomEncoder,
)
from coca_video.train.probe_model import build_classifier, tune, tuned_optim, untuned

SIZE = VitConfig.tiny()  # 3 blocks


@pytest.fixture
def config(drawn_clips: Path, tmp_path: Path) -> ProbeConfig:
    return ProbeConfig(
        encoder=RandomEncoder(image=SIZE),
        clips=ClipsConfig(train=drawn_clips, test_split=None),
        out=tmp_path / "probe",
        num_frames=2,
        augment=False,
        optim=OptimConfig(learning_rate=1e-3, warmup_steps=1),
        loop=LoopConfig(steps=3, batch_size=4, log_every=1),
        device="cpu",
    )


def losses(config: ProbeConfig) -> list[float]:
    run_probe(config)
    records = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "train"]


def moved(config: ProbeConfig) -> set[str]:
    """The names of weights that a run changed."""
    before = build_classifier(config, num_classes=5).state_dict()
    after = load_file(run_probe(config).model_folder / "model.safetensors")
    assert after.keys() == before.keys()
    return {name for name in after if not torch.equal(after[name], before[name])}


def test_frozen_leaves_the_encoder_bit_equal(config: ProbeConfig) -> None:
    changed = moved(config)
    assert changed and all(name.startswith("head.") for name in changed)


def test_fine_tuning_moves_all_of_the_encoder(config: ProbeConfig) -> None:
    changed = moved(replace(config, tuning=Finetune()))
    names = {name for name, _ in build_classifier(config, num_classes=5).named_parameters()}
    # The keys' bias of a pooler has no true gradient: folded, it is exactly zero, and nothing moves it.
    assert names - changed == {"head.pooler.attention.k_proj.bias"}


def test_lora_moves_matrices_of_attention_and_mlp_alone(config: ProbeConfig) -> None:
    """The saved model is a plain one, whose change of each matrix has the rank that was asked for."""
    changed = moved(replace(config, tuning=Lora(rank=2)))
    of_encoder = {name for name in changed if name.startswith("encoder.")}
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    assert of_encoder == {f"encoder.model.blocks.{block}.{part}.weight" for block in range(3) for part in parts}
    before = build_classifier(config, num_classes=5).state_dict()
    after = load(config.out).model.state_dict()
    for name in of_encoder:
        singular_values = torch.linalg.svdvals((after[name] - before[name]).double())
        assert int((singular_values > 1e-4 * singular_values[0]).sum()) == 2, name


@pytest.mark.slow
def test_what_is_evaluated_is_what_is_saved_with_lora(config: ProbeConfig) -> None:
    """The test scores come from the adapters, those here from the merged matrices."""
    config = replace(config, tuning=Lora(), clips=replace(config.clips, test_split="test"))
    run_probe(config)
    out = config.out / "again"
    evaluate = ["evaluate", str(config.clips.train), "--split", "test", "--model", str(config.out), "--out", str(out)]
    assert main([*evaluate, "--num-frames", "2"]) == 0
    (again,) = out.glob("*_videos.csv")
    tables = [path.read_text().splitlines()[1:] for path in (config.out / "test_videos.csv", again)]
    ours, theirs = [[[float(cell) for cell in line.split(",")[3:]] for line in table] for table in tables]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=1e-5)


def rates(config: ProbeConfig) -> dict[str, float]:
    """The rate of each trainable parameter."""
    model = build_classifier(config, num_classes=5)
    tune(model, config=config)
    optimizer = build_optimizer(model, config=tuned_optim(model, config=config))
    by_parameter = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    return {name: by_parameter[parameter] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_the_encoder_and_its_layers_have_rates_of_their_own(config: ProbeConfig) -> None:
    """BEiT's rule: block i of n has decay^(n - i), what is before them decay^(n + 1), what is after them 1."""
    found = rates(replace(config, tuning=Finetune(rate_factor=0.2, layer_decay=0.5)))
    expected = {"patch_embed": 2.0**-4, "pos_embed": 2.0**-4, "norm": 1.0}
    for name, rate in found.items():
        if name.startswith("head."):
            assert rate == 1e-3, name
        elif name.startswith("encoder.model.blocks."):
            assert rate == pytest.approx(1e-3 * 0.2 * 0.5 ** (3 - int(name.split(".")[3]))), name
        else:
            assert rate == pytest.approx(1e-3 * 0.2 * expected[name.split(".")[2]]), name
    assert {name.split(".")[2] for name in found if name.startswith("encoder.")} == {*expected, "blocks"}
    alike = rates(replace(config, tuning=Finetune(rate_factor=0.2)))
    assert {rate for name, rate in alike.items() if name.startswith("encoder.")} == {1e-3 * 0.2}
    optim = replace(config.optim, rate_factors={"encoder.model.blocks.1": 0.75, "head.classifier": 2.0})
    own = rates(replace(config, optim=optim, tuning=Finetune(layer_decay=0.5)))
    assert own["encoder.model.blocks.1.attn.qkv.weight"] == pytest.approx(0.75e-3)
    assert own["head.classifier.weight"] == pytest.approx(2e-3)
    with pytest.raises(ValueError, match=r"leave `encoder` out of --optim.rate-factors"):
        replace(config, tuning=Lora(), optim=replace(optim, rate_factors={"encoder": 0.1}))


def test_lora_trains_the_factors_alone(config: ProbeConfig) -> None:
    found = rates(replace(config, tuning=Lora(rate_factor=0.5)))
    of_encoder = {name: rate for name, rate in found.items() if name.startswith("encoder.")}
    assert len(of_encoder) == 2 * 4 * 3 and set(of_encoder.values()) == {0.5e-3}
    assert {name.split(".")[-1] for name in of_encoder} == {"down", "up"}


def test_blocks_that_no_token_comes_from_are_not_trained(config: ProbeConfig) -> None:
    """DDP would wait for their gradients."""
    first_two = HeadConfig(encoder_layers=(0, 1))
    for tuning in (Finetune(), Lora()):
        found = rates(replace(config, tuning=tuning, head=first_two))
        assert {name.split(".")[3] for name in found if ".blocks." in name} == {"0", "1"}
    changed = moved(replace(config, tuning=Finetune(), head=first_two))
    assert {name.split(".")[3] for name in changed if ".blocks." in name} == {"0", "1"}


def test_the_head_depends_on_the_seed_alone(config: ProbeConfig) -> None:
    """So that a probe on another encoder, and each probe of a sweep, starts from the same one."""
    plain = build_classifier(config, num_classes=5).head.state_dict()
    deep = replace(config, encoder=RandomEncoder(image=replace(SIZE, depth=5, image_size=64)))
    same = build_classifier(deep, num_classes=5).head.state_dict()
    assert all(torch.equal(plain[name], same[name]) for name in plain)
    seeded = build_classifier(replace(config, loop=replace(config.loop, seed=1)), num_classes=5).head.state_dict()
    assert not torch.equal(plain["classifier.weight"], seeded["classifier.weight"])


def save_coca(folder: Path, **changed: Any) -> CoCa:
    torch.manual_seed(7)
    coca = CoCa(replace(CoCaConfig.tiny(), **changed))
    save(folder, model=coca)
    return coca


@pytest.mark.slow
def test_the_pooler_starts_from_the_contrastive_one(config: ProbeConfig, tmp_path: Path) -> None:
    """Before training, what the head's pooler gives is CoCa's own pooled token of the image."""
    coca = save_coca(tmp_path / "coca", poolers="parallel").eval()
    config = replace(config, encoder=PretrainedEncoder(model=str(tmp_path / "coca")), init_pooler="contrastive")
    model = build_classifier(config, num_classes=5).eval()
    tokens = model.encoder(torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    assert coca.contrastive_pooler is not None
    with torch.no_grad():
        torch.testing.assert_close(model.head.pooler(tokens), coca.contrastive_pooler(tokens), rtol=0, atol=1e-6)
    assert load(run_probe(config).model_folder).model.config.head == model.config.head
    random = replace(config, init_pooler="random", out=tmp_path / "random")
    assert losses(random) != losses(config)
    save_coca(tmp_path / "cascade", poolers="cascade")
    cascade = replace(config, encoder=PretrainedEncoder(model=str(tmp_path / "cascade")))
    with pytest.raises(ValueError, match="take init_pooler random"):
        build_classifier(cascade, num_classes=5)
    with pytest.raises(ValueError, match="takes the pooler of a CoCa, and the encoder comes from a VideoClassifier"):
        build_classifier(replace(config, encoder=PretrainedEncoder(model=str(config.out))), num_classes=5)
    with pytest.raises(ValueError, match="takes the pooler of a trained CoCa, and the encoder is random"):
        replace(config, encoder=RandomEncoder(image=SIZE))
    with pytest.raises(ValueError, match=r"leave --head.width and --head.num-heads out"):
        replace(config, head=HeadConfig(num_heads=2))


@pytest.mark.slow
def test_every_option_changes_the_losses(config: ProbeConfig, tmp_path: Path) -> None:
    """No two of these runs are alike; their first losses are before any update."""
    base = replace(config, tuning=Finetune(), loop=replace(config.loop, steps=2))
    tried: dict[str, dict[str, Any]] = {
        "frozen": {"tuning": Frozen()},
        "finetune": {},
        "rate": {"tuning": Finetune(rate_factor=1.0)},
        "decay": {"tuning": Finetune(layer_decay=0.5)},
        "drop path": {"tuning": Finetune(drop_path=0.5)},
        "lora": {"tuning": Lora()},
        "rank": {"tuning": Lora(rank=4)},
        "alpha": {"tuning": Lora(alpha=64.0)},
        "lora rate": {"tuning": Lora(rate_factor=5.0)},
        "balanced": {"class_balanced": True},
        "held out": {"clips": replace(config.clips, holdout_share=0.3)},
        "mean": {"head": HeadConfig(pooling="mean")},
        "layers": {"head": HeadConfig(encoder_layers=(1, 2))},
        "seconds": {"sampling": "pytorchvideo", "clip_seconds": 0.3},
    }
    found = {
        name: tuple(losses(replace(base, **changed, out=tmp_path / name.replace(" ", "-"))))
        for name, changed in tried.items()
    }
    assert len(set(found.values())) == len(found)
    # What is trained changes nothing before the first update, drop path apart.
    for name in ("frozen", "rate", "decay", "lora", "rank", "alpha", "lora rate"):
        assert found[name][0] == pytest.approx(found["finetune"][0], rel=1e-5), name
    assert found["drop path"][0] != pytest.approx(found["finetune"][0], rel=1e-5)


@pytest.mark.slow
def test_checkpointed_activations_change_no_bit(config: ProbeConfig, tmp_path: Path) -> None:
    for plain, checkpointed in (
        (Finetune(drop_path=0.3), Finetune(drop_path=0.3, activation_checkpointing=True)),
        (Lora(), Lora(activation_checkpointing=True)),
    ):
        name = type(plain).__name__
        expected = losses(replace(config, tuning=plain, out=tmp_path / name))
        assert losses(replace(config, tuning=checkpointed, out=tmp_path / f"{name}-again")) == expected


@pytest.mark.slow
def test_parts_of_a_batch_train_as_the_whole(config: ProbeConfig, tmp_path: Path) -> None:
    """Frames and tokens, to rounding; the parts are seen."""
    for tuning in (Frozen(), Finetune()):
        whole = replace(config, tuning=tuning, out=tmp_path / f"{type(tuning).__name__}-whole")
        parts = replace(whole, micro_batch_size=3, out=tmp_path / f"{type(tuning).__name__}-parts")
        assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


@pytest.mark.slow
def test_a_batch_norm_learns_and_travels(config: ProbeConfig) -> None:
    """The statistics of a fine-tuned CNN are saved; those of a frozen one stay as they are."""
    cnn = replace(config, encoder=RandomEncoder(image=TimmConfig(name="test_efficientnet", image_size=64)))
    statistics = {name for name in moved(replace(cnn, tuning=Finetune())) if "running_mean" in name}
    assert statistics
    assert not [name for name in moved(replace(cnn, out=config.out / "frozen")) if name.startswith("encoder.")]


def test_the_initial_encoder_tells_runs_apart(config: ProbeConfig) -> None:
    """As with a frozen one: a run does not go on from other weights than it began with."""
    config = replace(config, tuning=Lora())
    run_probe(config)
    found = json.loads((config.out / "config.json").read_text())
    assert found["encoder_fingerprint"] == fingerprint(build_classifier(config, num_classes=5).encoder)
    assert found["tuning"] == {
        "type": "Lora",
        "rank": 16,
        "alpha": 16.0,
        "rate_factor": 1.0,
        "activation_checkpointing": False,
    }
    with pytest.raises(ValueError, match=r"started with other settings \(tuning.rank: 16 -> 8\)"):
        run_probe(replace(config, tuning=Lora(rank=8)))


def test_untuned_is_what_was_built(config: ProbeConfig) -> None:
    """Names, order and bits, where nothing has been trained yet."""
    for tuning in (Frozen(), Finetune(drop_path=0.5, activation_checkpointing=True), Lora()):
        config = replace(config, tuning=tuning)
        plain, model = build_classifier(config, num_classes=5), build_classifier(config, num_classes=5)
        tune(model, config=config)
        state = untuned(model, config=config).state_dict()
        assert list(state) == list(plain.state_dict())
        assert all(torch.equal(tensor, state[name]) for name, tensor in plain.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "part", [{"sampling": "dense", "stride": 3}, {"sampling": "pytorchvideo", "clip_seconds": 1.0}], ids=["dense", "s"]
)
def test_the_part_that_was_trained_on_travels_with_the_model(config: ProbeConfig, part: dict[str, Any]) -> None:
    """And predict and evaluate sample as the training did, to the same scores."""
    trained = replace(config, num_frames=3, clips=replace(config.clips, test_split="test"), **part)
    model = load(run_probe(trained).model_folder).model
    assert isinstance(model, VideoClassifier) and model.config.num_frames == 3
    assert (model.config.stride, model.config.clip_seconds) == (part.get("stride"), part.get("clip_seconds"))
    out = config.out / "again"
    evaluate = ["evaluate", str(config.clips.train), "--split", "test", "--model", str(config.out), "--out", str(out)]
    assert main(evaluate) == 0
    (again,) = out.glob("*_videos.csv")
    assert again.read_text() == (config.out / "test_videos.csv").read_text()
    (facts,) = out.glob("*.json")
    document = json.loads(facts.read_text())
    assert {name: document[name] for name in ("stride", "clip_seconds", "protocol")} == {
        "stride": part.get("stride"),
        "clip_seconds": part.get("clip_seconds"),
        "protocol": None,
    }
    row = read_manifest(config.clips.train).select(split="test").rows[0]
    asked = load_predictor(
        str(config.out), num_frames=None, decoder="auto", timeout_seconds=60.0, device=torch.device("cpu")
    )
    line = next(line for line in again.read_text().splitlines() if line.startswith(f"{row.video_id},"))
    expected = sorted((float(cell) for cell in line.split(",")[3:]), reverse=True)
    assert [probability for _, probability in asked(Path(row.path))] == pytest.approx(expected, rel=1e-5)
    run_probe(replace(config, out=config.out / "uniform"))
    assert load(config.out / "uniform").model.config.stride is None
