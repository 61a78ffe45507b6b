"""Pretraining: it learns, its options do something, its figures are those of the saved model."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from coca_video.data.image_text import PairDataset, open_shards
from coca_video.eval.retrieval import evaluate_retrieval
from coca_video.hub import load
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.pretrain import PairsConfig, PretrainConfig, run_pretraining


@pytest.fixture
def config(pictures: Path, tmp_path: Path) -> PretrainConfig:
    return PretrainConfig(
        model=CoCaConfig.tiny(),
        pairs=PairsConfig(train=pictures),
        out=tmp_path / "run",
        optim=OptimConfig(warmup_steps=2),
        loop=LoopConfig(steps=3, batch_size=8, log_every=1),
        device="cpu",
    )


def records(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "train"]


def test_loss_is_the_weighted_sum_and_starts_at_chance(config: PretrainConfig) -> None:
    run_pretraining(replace(config, optim=OptimConfig(learning_rate=1e-6, warmup_steps=0)))
    first = records(config.out)[0]
    assert first["loss"] == pytest.approx(first["contrastive_loss"] + 2 * first["caption_loss"], rel=1e-5)
    assert first["caption_loss"] == pytest.approx(torch.tensor(512.0).log().item(), rel=0.15)
    assert first["temperature"] == pytest.approx(0.07, rel=1e-4)


def test_overfits_a_few_pictures(config: PretrainConfig, pictures: Path) -> None:
    """24 pictures by heart: retrieval becomes perfect, and the saved model gives the logged figures."""
    loop = LoopConfig(steps=150, batch_size=24, log_every=50)
    pairs = PairsConfig(train=pictures, test=pictures, min_crop_area=1.0)
    optim = OptimConfig(learning_rate=3e-3, warmup_steps=10)
    result = run_pretraining(replace(config, loop=loop, pairs=pairs, optim=optim))
    assert records(config.out)[-1]["loss"] < 0.5 * records(config.out)[0]["loss"]
    assert result.metrics["image_to_text_recall@1"] >= 0.9
    saved = load(config.out)
    assert isinstance(saved.model, CoCa) and saved.tokenizer is not None
    dataset = PairDataset(open_shards(pictures), image_size=48, seed=0, augment=False)
    again = evaluate_retrieval(saved.model, dataset=dataset, tokenizer=saved.tokenizer, device=torch.device("cpu"))
    assert again.metrics == result.metrics
    assert (again.num_images, again.num_captions) == (24, 72)


@pytest.mark.parametrize(
    "changed",
    [
        {"contrastive_weight": 0.5},
        {"contrastive_reduction": "mean"},
        {"caption_weight": 1.0},
        {"z_loss_weight": 1e-3},
        {"model": replace(CoCaConfig.tiny(), num_queries=4)},
        {"model": replace(CoCaConfig.tiny(), poolers="parallel")},
        {"model": replace(CoCaConfig.tiny(), poolers="open_clip")},
        {"model": replace(CoCaConfig.tiny(), pooler_heads=2)},
        {"model": replace(CoCaConfig.tiny(), image=replace(CoCaConfig.tiny().image, interpolation="bicubic"))},
        *(
            {"model": replace(CoCaConfig.tiny(), text=replace(CoCaConfig.tiny().text, **{name: value}))}
            for name, value in (
                ("width", 48),
                ("num_heads", 2),
                ("mlp_width", 200),
                ("num_unimodal_layers", 2),
                ("num_multimodal_layers", 2),
                ("vocab_size", 400),
                ("max_length", 8),
                ("multimodal_layer", "open_clip"),
                ("cls_mask", "open_clip"),
            )
        ),
        {"loop": LoopConfig(steps=3, batch_size=8, log_every=1, precision="bf16")},
        {"loop": LoopConfig(steps=3, batch_size=8, log_every=1, seed=1)},
        {"pairs.min_crop_area": 0.4},
        {"pairs.flip_probability": 1.0},
    ],
    ids=lambda changed: ",".join(changed),
)
def test_every_option_changes_the_losses(config: PretrainConfig, tmp_path: Path, changed: dict[str, object]) -> None:
    run_pretraining(config)
    (name, value), *_ = changed.items()
    if name.startswith("pairs."):
        changed = {"pairs": replace(config.pairs, **{name.removeprefix("pairs."): value})}
    other = replace(config, **changed, out=tmp_path / "other")
    run_pretraining(other)
    assert [record["loss"] for record in records(other.out)] != [record["loss"] for record in records(config.out)]


def test_a_given_tokenizer_is_used(config: PretrainConfig, tmp_path: Path) -> None:
    run_pretraining(config)
    given = replace(config, tokenizer=str(config.out / "tokenizer.json"), out=tmp_path / "given")
    run_pretraining(given)
    assert (given.out / "tokenizer.json").read_text() == (config.out / "tokenizer.json").read_text()
    text = replace(config.model.text, vocab_size=300)
    small = replace(given, model=replace(config.model, text=text), out=tmp_path / "small")
    with pytest.raises(
        ValueError, match=r"The tokenizer has \d+ ids and the model takes 300; set --model.text.vocab-size"
    ):
        run_pretraining(small)


def test_clips_vocabulary_by_its_name(config: PretrainConfig) -> None:
    text = replace(config.model.text, vocab_size=49_408)
    run_pretraining(replace(config, tokenizer="clip", model=replace(config.model, text=text)))
    saved = load(config.out)
    assert saved.tokenizer is not None and saved.tokenizer.max_length == text.max_length
    assert saved.tokenizer.encode(["a dog"])[0].tolist() == [[49406, 320, 1929, 49407]]


def test_reduction_and_z_loss_in_the_logged_losses(config: PretrainConfig) -> None:
    """At a rate of (nearly) zero: the mean is half the sum, and the z-loss is in the loss but not in the caption's."""
    still = replace(config, optim=OptimConfig(learning_rate=1e-12, warmup_steps=0))
    run_pretraining(still)
    z_losses = []
    for weight in (1e-3, 2e-3):
        out = config.out / f"z{weight}"
        run_pretraining(replace(still, contrastive_reduction="mean", z_loss_weight=weight, out=out))
        for summed, mean in zip(records(config.out), records(out), strict=True):
            assert mean["contrastive_loss"] == pytest.approx(summed["contrastive_loss"] / 2, rel=1e-6)
            assert mean["caption_loss"] == pytest.approx(summed["caption_loss"], rel=1e-6)
            z_losses.append((mean["loss"] - mean["contrastive_loss"]) / 2 - mean["caption_loss"])
    # log Z is the log of the vocabulary where logits are 0, and more where they spread.
    assert all(z_loss > 1e-3 * math.log(512) ** 2 for z_loss in z_losses)
    assert z_losses[3:] == pytest.approx([2 * z_loss for z_loss in z_losses[:3]], rel=1e-3)


def test_divergence_stops_with_a_sentence_and_keeps_no_broken_checkpoint(config: PretrainConfig) -> None:
    diverging = replace(config, optim=OptimConfig(learning_rate=1e30, warmup_steps=0, gradient_clip=1e9))
    with pytest.raises(ValueError, match=r"became (nan|inf) shortly before step \d; .*a lower --optim.learning-rate"):
        run_pretraining(replace(diverging, loop=LoopConfig(steps=6, batch_size=8, log_every=2, checkpoint_every=1)))


def test_weights_of_zero_are_refused(config: PretrainConfig) -> None:
    with pytest.raises(ValueError, match="Both loss weights are 0"):
        run_pretraining(replace(config, contrastive_weight=0.0, caption_weight=0.0))
    with pytest.raises(ValueError, match=r"Loss weights must be 0 or more; got -1.0 and 2.0"):
        run_pretraining(replace(config, contrastive_weight=-1.0))
    with pytest.raises(ValueError, match=r"--z-loss-weight must be 0 or more; got -1.0"):
        run_pretraining(replace(config, z_loss_weight=-1.0))
    with pytest.raises(ValueError, match=r"--z-loss-weight does nothing where --caption-weight is 0; leave one out"):
        run_pretraining(replace(config, z_loss_weight=1e-5, caption_weight=0.0))
    with pytest.raises(ValueError, match=r"--contrastive-reduction does nothing where --contrastive-weight is 0"):
        run_pretraining(replace(config, contrastive_reduction="mean", contrastive_weight=0.0))
    with pytest.raises(ValueError, match=r"--loop.evaluate-every does nothing without --pairs.test"):
        run_pretraining(replace(config, loop=replace(config.loop, evaluate_every=1)))
