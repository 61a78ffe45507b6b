"""The paper's recipes, against the figures of its Table 9, and the configs that use them."""

import runpy
from dataclasses import asdict
from pathlib import Path

import pytest

from coca_video.data.augment import AugmentConfig
from coca_video.train.probe_config import Finetune, Frozen, ProbeConfig

REPOSITORY = Path(__file__).resolve().parents[2]
SIZES = ("base", "large", "giant")
VIDEO = {"k400": 0.1, "k600": 0.1, "k700": 0.1, "mit": 0.0}  # label smoothing


def load(name: str) -> ProbeConfig:
    config = runpy.run_path(str(REPOSITORY / "configs" / "probe" / f"{name}.py"))["config"]
    assert isinstance(config, ProbeConfig)
    return config


def figures(config: ProbeConfig) -> dict[str, object]:
    """What Table 9 has a row for."""
    optim, augmentation = config.optim, config.augmentation
    return {
        "optimizer": optim.algorithm,
        "gradient clip": optim.gradient_clip,
        "EMA": optim.ema_decay,
        "schedule": optim.schedule,
        "mixup, CutMix": (augmentation.mixup_alpha, augmentation.cutmix_alpha),
        "RandAugment": (augmentation.rand_augment_num_ops, augmentation.rand_augment_magnitude),
        "label smoothing": config.label_smoothing,
        "steps": config.loop.steps,
        "batch": config.loop.batch_size,
        "pooler rate": optim.learning_rate,
        "warm-up": optim.warmup_steps,
        "weight decay": optim.weight_decay,
    }


SHARED = {
    "optimizer": "adafactor",
    "gradient clip": 1.0,
    "EMA": 0.9999,
    "schedule": "cosine",
    "mixup, CutMix": (0.0, 0.0),
    "pooler rate": 5e-4,
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("data", VIDEO)
@pytest.mark.parametrize("kind", ["frozen", "finetune"])
def test_video_columns(data: str, size: str, kind: str) -> None:
    config = load(f"{data}_{size}_{kind}")
    expected = {
        "RandAugment": (0, 0),
        "label smoothing": VIDEO[data],
        "steps": 120_000,
        "batch": 128,
        "warm-up": 1_000,
        "weight decay": 0.0,
    }
    assert figures(config) == SHARED | expected
    assert config.num_frames == 16 and f"coca_{size}" in asdict(config.encoder)["model"]
    if kind == "frozen":
        assert config.tuning == Frozen() and not config.keep_best
    else:
        assert isinstance(config.tuning, Finetune) and config.keep_best
        assert config.tuning.rate_factor * config.optim.learning_rate == pytest.approx(1e-4)  # section 4.2.1
        assert config.micro_batch_size is not None and config.tuning.activation_checkpointing


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("kind", "smoothing", "encoder_rate"), [("frozen", 0.2, 0.0), ("finetune", 0.5, 5e-4)])
def test_imagenet_columns(size: str, kind: str, smoothing: float, encoder_rate: float) -> None:
    config = load(f"imagenet_{size}_{kind}")
    expected = {
        "RandAugment": (2, 20),
        "label smoothing": smoothing,
        "steps": 200_000,
        "batch": 512,
        "warm-up": 0,
        "weight decay": 0.01,
    }
    assert figures(config) == SHARED | expected
    assert config.num_frames == 1
    factor = config.tuning.rate_factor if isinstance(config.tuning, Finetune) else 0.0
    assert factor * config.optim.learning_rate == pytest.approx(encoder_rate)


@pytest.mark.parametrize("name", ["laion_coca_b32", "laion_coca_l14", "siglip2_base", "dinov3_base", "pe_core_base"])
def test_public_encoders(name: str) -> None:
    config = load(f"k400_{name}")
    assert figures(config) == figures(load("k400_base_frozen")) | {"steps": 20 * 240_000 // 128}
    assert config.tuning == Frozen() and config.augmentation == AugmentConfig()
