"""Encoders of timm and repositories of the Hub, offline: folders and a cache in their layout, written by hand."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub.constants
import pytest
import timm
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from timm.models import save_for_hf
from torch import nn

import coca_video
from coca_video.hub import fingerprint, load, save
from coca_video.hub.sources import hub_errors
from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALVES = (0.5, 0.5, 0.5)


def timm_folder(folder: Path, *, name: str, image_size: int | None = None, **arguments: object) -> nn.Module:
    """Writes a model of random weights as timm pushes one to the Hub, its classifier included, and returns it."""
    torch.manual_seed(1)
    sized = {} if image_size is None else {"img_size": image_size}
    model: nn.Module = timm.create_model(name, num_classes=10, **sized, **arguments).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # fresh norms and biases are ones and zeros, which would hide a lost one
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    save_for_hf(model, str(folder), safe_serialization=True)
    return model


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no way to the Hub itself."""
    folder = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return folder


def put_into_cache(cache: Path, *, repository: str, content: Path) -> None:
    """What a download would leave: a snapshot called by its commit, and the branch that points there."""
    root = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(content, root / "snapshots" / COMMIT)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize(
    ("name", "image_size", "config", "license"),
    [
        (
            "vit_tiny_patch16_224",
            48,
            {"image_size": 48, "mean": HALVES, "std": HALVES, "interpolation": "bicubic"},
            "apache-2.0",
        ),
        (
            "vit_xsmall_patch16_clip_224",
            48,
            {"image_size": 48, "mean": OPENAI_MEAN, "std": OPENAI_STD, "interpolation": "bicubic"},
            "mit",
        ),
        pytest.param(
            "vit_base_patch16_siglip_224",
            48,
            {"image_size": 48, "mean": HALVES, "std": HALVES, "interpolation": "bicubic"},
            "apache-2.0",
            marks=pytest.mark.slow,
        ),
        (
            "vit_small_patch16_dinov3",
            None,
            {"image_size": 256, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"},
            "dinov3-license",
        ),
        (
            "vit_pe_core_tiny_patch16_384",
            48,
            {"image_size": 48, "mean": HALVES, "std": HALVES, "interpolation": "bicubic"},
            "apache-2.0",
        ),
        (
            "efficientnet_lite0",
            None,
            {"image_size": 224, "mean": IMAGENET_MEAN, "std": IMAGENET_STD, "interpolation": "bicubic"},
            "apache-2.0",
        ),
    ],
)
@torch.no_grad()
def test_tokens_of_a_timm_folder_are_timms(
    tmp_path: Path, name: str, image_size: int | None, config: dict[str, object], license: str
) -> None:
    """Bit-equal to timm's `forward_features`; sizes and pixels as timm says; later the folder is not needed."""
    reference = timm_folder(tmp_path / "timm", name=name, image_size=image_size)
    saved = load(f"timm:local-dir:{tmp_path / 'timm'}")
    assert isinstance(saved.model, ImageEncoder) and not saved.model.training
    assert saved.model.config == TimmConfig(name=name, **config)  # type: ignore[arg-type]
    assert (saved.license, saved.source) == (license, f"timm:local-dir:{tmp_path / 'timm'}")

    saved.save(tmp_path / "ours")
    shutil.rmtree(tmp_path / "timm")
    again = load(tmp_path / "ours")
    assert (again.license, again.source, again.model.config) == (saved.license, saved.source, saved.model.config)

    size = saved.model.config.image_size
    images = torch.randn(1, 3, size, size)
    expected = reference.forward_features(images)
    if expected.ndim == 4:
        expected = expected.flatten(2).transpose(1, 2)
    for encoder in (saved.model, again.model):
        assert isinstance(encoder, ImageEncoder)
        assert torch.equal(encoder(images, prefix_tokens=True), expected)


@torch.no_grad()
def test_a_folder_with_an_architecture_of_its_own_keeps_its_name(tmp_path: Path) -> None:
    """Layer scale is not in vit_tiny: rebuilt by the architecture's name the weights would not fit."""
    reference = timm_folder(tmp_path, name="vit_tiny_patch16_224", image_size=32, init_values=0.1, reg_tokens=2)
    encoder = load(f"timm:local-dir:{tmp_path}").encoder
    assert isinstance(encoder.config, TimmConfig) and encoder.config.name == f"local-dir:{tmp_path}"
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder(images), reference.forward_features(images)[:, 3:])


@torch.no_grad()
def test_a_folder_that_pools_another_way_keeps_its_name(tmp_path: Path) -> None:
    """With global_pool="avg" timm's ViT has its last norm behind the pooling, so tokens come out without one."""
    reference = timm_folder(tmp_path, name="vit_tiny_patch16_224", image_size=32, global_pool="avg")
    encoder = load(f"timm:local-dir:{tmp_path}").encoder
    assert isinstance(encoder.config, TimmConfig) and encoder.config.name == f"local-dir:{tmp_path}"
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(encoder(images, prefix_tokens=True), reference.forward_features(images))


@torch.no_grad()
def test_a_name_of_timm_from_the_cache(tmp_path: Path, cache: Path) -> None:
    """The weights that timm names, in the Hub's cache as timm's own loader leaves them; the tag is kept."""
    reference = timm_folder(tmp_path / "timm", name="test_vit")
    tagged = timm.get_pretrained_cfg("test_vit").hf_hub_id
    put_into_cache(cache, repository=tagged, content=tmp_path / "timm")
    # timm's classifier has 1000 classes, ours 10; neither has a part in the tokens
    saved = load("timm:test_vit")
    assert isinstance(saved.model.config, TimmConfig)
    assert f"timm/{saved.model.config.name}" == tagged and saved.source == f"timm:{saved.model.config.name}"
    size = saved.model.config.image_size
    images = torch.randn(1, 3, size, size)
    assert torch.equal(saved.encoder(images, prefix_tokens=True), reference.forward_features(images))


@torch.no_grad()
def test_a_repository_of_timms_layout_from_the_cache(tmp_path: Path, cache: Path) -> None:
    reference = timm_folder(tmp_path / "timm", name="vit_tiny_patch16_224", image_size=32)
    put_into_cache(cache, repository="org/own", content=tmp_path / "timm")
    saved = load("timm:hf-hub:org/own")
    assert saved.encoder.config.name == "vit_tiny_patch16_224" and saved.source == "timm:hf-hub:org/own"
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(saved.encoder(images, prefix_tokens=True), reference.forward_features(images))
    with pytest.raises(ValueError, match=r"is of timm's layout: load timm:local-dir:.*, or timm:hf-hub:ORG/NAME"):
        load("hf:org/own")


def test_a_repository_of_ours_from_the_cache(tmp_path: Path, cache: Path) -> None:
    model = VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=2, num_frames=4))
    save(tmp_path / "ours", model=model, classes=["a", "b"], license="cc-by-4.0", source="timm:vit_tiny_patch16_224")
    put_into_cache(cache, repository="org/name", content=tmp_path / "ours")
    for source in ("hf:org/name", "hf:org/name@main", f"hf:org/name@{COMMIT}"):
        saved = coca_video.load(source)
        assert fingerprint(saved.model) == fingerprint(model)
        assert (saved.classes, saved.license, saved.source) == (("a", "b"), "cc-by-4.0", f"hf:org/name@{COMMIT}")


@pytest.mark.parametrize("source", ["hf:org/none", "timm:vit_tiny_patch16_224", "timm:hf-hub:org/none"])
def test_what_is_not_in_the_cache_is_a_sentence(cache: Path, source: str) -> None:
    with pytest.raises(ValueError, match=f"^{source} is neither in the local cache nor to be had now: ") as caught:
        load(source)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("hugging:org/name", r"Expected a run or a model folder, hf:ORG/NAME.*timm:NAME.*got hugging:org/name"),
        ("hf:too/many/parts", r"hf:too/many/parts is neither .*Repo id must be in the form"),
        ("timm:vit_tiny_patch17_224", "timm has no model named 'vit_tiny_patch17_224'"),
        ("timm:vit_tiny_patch16_384_none", "timm has no model named"),
        ("timm:vit_base_patch16_rope_ape_224.none", "timm has no weights named"),
        ("timm:vit_large_patch14_224", r"timm has no weights for vit_large_patch14_224; RandomEncoder"),
        ("timm:local-dir:/no/such/folder", "timm:local-dir:/no/such/folder is neither"),
        ("runs/a:b", r"Expected a finished run or a model folder .* at runs/a:b"),
    ],
)
def test_sources_that_cannot_be_had(source: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(source)


def test_a_folder_may_have_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    encoder = ImageEncoder(VitConfig.tiny())
    save(Path("hf:mine"), model=encoder)
    assert fingerprint(load("hf:mine").model) == fingerprint(encoder)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "model.safetensors").write_bytes(b"cut"),
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "config.json").write_text("{"),
        lambda folder: timm_folder_of_another_width(folder),
    ],
)
def test_a_damaged_timm_folder_is_a_sentence(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    timm_folder(tmp_path, name="test_vit")
    damage(tmp_path)
    with pytest.raises(ValueError, match=r"^The weights of timm:local-dir:.* are damaged, or of another model: "):
        load(f"timm:local-dir:{tmp_path}")


def timm_folder_of_another_width(folder: Path) -> None:
    timm_folder(folder / "other", name="vit_tiny_patch16_224", image_size=32)
    shutil.copy(folder / "other" / "model.safetensors", folder)


def test_images_that_are_not_rgb_squares_are_a_sentence(tmp_path: Path) -> None:
    timm_folder(tmp_path, name="test_vit")
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"]["interpolation"] = "nearest"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"Expected bilinear or bicubic resizing; .* was trained with 'nearest'"):
        load(f"timm:local-dir:{tmp_path}")
    timm_folder(tmp_path / "grey", name="test_vit", in_chans=1)
    with pytest.raises(ValueError, match=r"Expected an encoder of square RGB images; .* takes 1 x 160 x 160"):
        load(f"timm:local-dir:{tmp_path / 'grey'}")


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (GatedRepoError("Access\nto it", response=Mock(headers={})), "^hf:a/b is gated: ask for access on its page"),
        (RepositoryNotFoundError("404\nno", response=Mock(headers={})), "^The Hub has no hf:a/b, or it is private"),
        (RevisionNotFoundError("404\nno", response=Mock(headers={})), "^hf:a/b: there is no such revision"),
        (HfHubHTTPError("503 down\nlater", response=Mock(headers={})), "^The Hub refused hf:a/b: 503 down.$"),
        (OfflineModeIsEnabled("No way.\nUnset"), "^hf:a/b is neither in the local cache nor to be had now: No way.$"),
    ],
)
def test_errors_of_the_hub_are_sentences(error: Exception, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught, hub_errors("hf:a/b"):
        raise error
    assert caught.value.__cause__ is error
