"""The image encoder: tokens equal to timm's own, nothing in it that has no part in them, sizes, and sentences."""

import dataclasses
from functools import partial

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig, resize_encoder
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

SMALL = {"width": 32, "depth": 2, "num_heads": 2, "mlp_width": 64, "image_size": 16, "patch_size": 8}


def random_norms(model: nn.Module) -> None:
    """Fresh norms and biases are ones and zeros, and fresh tokens zeros or nearly: with these nothing can hide."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.shape[:1] == (1,):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def encoder_and_timm(name: str, *, image_size: int) -> tuple[ImageEncoder, nn.Module, Tensor]:
    """An encoder, timm's whole model with the same weights, and images."""
    torch.manual_seed(0)
    fixed = timm.get_pretrained_cfg(name).fixed_input_size
    reference = timm.create_model(name, **({"img_size": image_size} if fixed else {})).eval()
    random_norms(reference)
    encoder = ImageEncoder(TimmConfig(name=name, image_size=image_size)).eval()
    state = reference.state_dict()
    encoder.model.load_state_dict({key: state[key] for key in encoder.model.state_dict()})
    return encoder, reference, torch.randn(2, 3, image_size, image_size)


def test_the_default_vit_is_as_it_was() -> None:
    """Names, order and initial values of a plain timm VisionTransformer: weights saved before the new fields load."""
    torch.manual_seed(3)
    encoder = ImageEncoder(VitConfig(**SMALL))
    torch.manual_seed(3)
    expected = VisionTransformer(
        img_size=16,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=2,
        mlp_ratio=2,
        class_token=False,
        global_pool="",
        num_classes=0,
    )
    assert list(encoder.model.state_dict()) == list(expected.state_dict())
    for name, tensor in expected.state_dict().items():
        assert torch.equal(encoder.model.state_dict()[name], tensor), name
    images = torch.randn(1, 3, 16, 16)
    assert torch.equal(encoder(images), expected.forward_features(images))


@torch.no_grad()
def test_clips_trunk_by_hand() -> None:
    """Class token, norm before the blocks, none after them, eps 1e-5: the trunk of CLIP and of open_clip's CoCa."""
    torch.manual_seed(0)
    config = VitConfig(**SMALL, class_token=True, pre_norm=True, final_norm=False, norm_eps=1e-5)
    encoder = ImageEncoder(config).eval()
    random_norms(encoder)
    model, images = encoder.model, 1e-3 * torch.randn(2, 3, 16, 16)
    patches = nn.functional.conv2d(images, model.patch_embed.proj.weight, stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([model.cls_token.expand(2, 1, 32), patches], dim=1) + model.pos_embed
    x = nn.functional.layer_norm(x, [32], model.norm_pre.weight, model.norm_pre.bias, eps=1e-5)
    for block in model.blocks:
        assert (block.norm1.eps, block.norm2.eps) == (1e-5, 1e-5)
        x = block(x)
    torch.testing.assert_close(encoder(images, prefix_tokens=True), x)
    torch.testing.assert_close(encoder(images), x[:, 1:])
    assert model.patch_embed.proj.bias is None


@pytest.mark.parametrize(
    ("name", "image_size", "num_prefix", "num_patches", "width", "num_heads"),
    [
        ("vit_tiny_patch16_224", 48, 1, 9, 192, 3),
        ("vit_xsmall_patch16_clip_224", 48, 1, 9, 256, 4),
        pytest.param("vit_base_patch16_siglip_224", 48, 0, 9, 768, 12, marks=pytest.mark.slow),
        ("vit_small_patch16_dinov3", 48, 5, 9, 384, 6),
        ("vit_pe_core_tiny_patch16_384", 48, 1, 9, 192, 3),
        ("eva02_tiny_patch14_224", 42, 1, 9, 192, 3),
    ],
)
@torch.no_grad()
def test_tokens_of_transformers_are_timms(
    name: str, image_size: int, num_prefix: int, num_patches: int, width: int, num_heads: int
) -> None:
    encoder, reference, images = encoder_and_timm(name, image_size=image_size)
    expected = reference.forward_features(images)
    assert expected.shape == (2, num_prefix + num_patches, width)
    assert torch.equal(encoder(images, prefix_tokens=True), expected)
    assert torch.equal(encoder(images), expected[:, num_prefix:])
    assert (encoder.width, encoder.num_heads) == (width, num_heads)


@pytest.mark.parametrize(
    ("name", "image_size", "width", "num_heads"),
    [
        ("efficientnet_lite0", 64, 1280, 20),
        ("resnet18", 64, 512, 8),
        ("mobilenetv3_small_050", 64, 288, 4),  # 4.5 heads of 64: 4 and 6 divide, 4 is nearer
        ("swin_tiny_patch4_window7_224", 64, 768, 12),
    ],
)
@torch.no_grad()
def test_tokens_of_a_feature_map_go_row_by_row(name: str, image_size: int, width: int, num_heads: int) -> None:
    """Token 2 y + x is the place (y, x), whether timm's map has its channels first or, as Swin's, last."""
    encoder, reference, images = encoder_and_timm(name, image_size=image_size)
    features, tokens = reference.forward_features(images), encoder(images)
    assert tokens.shape == (2, 4, width)
    for y in range(2):
        for x in range(2):
            place = features[:, y, x] if name.startswith("swin") else features[:, :, y, x]
            assert torch.equal(tokens[:, 2 * y + x], place)
    assert torch.equal(encoder(images, prefix_tokens=True), tokens)
    assert (encoder.width, encoder.num_heads) == (width, num_heads)


@pytest.mark.parametrize(
    ("name", "image_size"),
    [
        ("vit_tiny_patch16_224", 32),
        ("eva02_tiny_patch14_224", 28),  # a norm behind the pooling
        ("vit_pe_core_tiny_patch16_384", 32),  # attention pooling
        ("efficientnet_lite0", 64),
        ("mobilenetv3_small_050", 64),  # a convolution behind the pooling
        ("convnext_atto", 64),  # a norm in the head
    ],
)
def test_every_parameter_has_a_part_in_the_tokens(name: str, image_size: int) -> None:
    encoder = ImageEncoder(TimmConfig(name=name, image_size=image_size))
    encoder(torch.randn(2, 3, image_size, image_size)).square().sum().backward()
    assert [key for key, parameter in encoder.named_parameters() if parameter.grad is None] == []


def test_a_cnn_under_the_single_query_pooler() -> None:
    model = VideoClassifier(
        VideoClassifierConfig(image=TimmConfig(name="efficientnet_lite0", image_size=64), num_classes=3, num_frames=2)
    ).eval()
    frames = torch.randn(2, 2, 3, 64, 64)
    tokens = model.encode(frames)
    assert tokens.shape == (2, 2, 4, 1280)
    assert torch.equal(tokens[:, 1], model.encoder(frames[:, 1]))
    assert model(frames).shape == (2, 3)


@torch.no_grad()
def test_rotary_positions_follow_the_size() -> None:
    """DINOv3 has no other positions: resized, it is what it had been had it been built at that size."""
    torch.manual_seed(0)
    small, large = (ImageEncoder(TimmConfig(name="vit_small_patch16_dinov3", image_size=s)).eval() for s in (32, 48))
    random_norms(large)
    small.load_state_dict(large.state_dict())
    resize_encoder(small, image_size=48)
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(small(images), large(images))
    assert small.config == large.config


@torch.no_grad()
def test_both_kinds_of_positions_follow_the_size() -> None:
    """PE core has rotary and learned positions: the grid of the second is resampled, its class token's stays."""
    torch.manual_seed(0)
    small, large = (
        ImageEncoder(TimmConfig(name="vit_pe_core_tiny_patch16_384", image_size=s)).eval() for s in (32, 48)
    )
    random_norms(small)
    position = small.model.pos_embed.clone()
    resize_encoder(small, image_size=48)
    grid = position[:, 1:].reshape(1, 2, 2, 192).permute(0, 3, 1, 2)
    grid = nn.functional.interpolate(grid, size=(3, 3), mode="bicubic", antialias=True)
    resampled = torch.cat([position[:, :1], grid.permute(0, 2, 3, 1).reshape(1, 9, 192)], dim=1)
    torch.testing.assert_close(small.model.pos_embed, resampled)
    large.load_state_dict(small.state_dict())
    images = torch.randn(1, 3, 48, 48)
    assert torch.equal(small(images), large(images))


@torch.no_grad()
def test_a_cnn_takes_another_size_as_it_is() -> None:
    encoder, reference, _ = encoder_and_timm("efficientnet_lite0", image_size=64)
    resize_encoder(encoder, image_size=96)
    images = torch.randn(1, 3, 96, 96)
    assert encoder.config.image_size == 96
    assert torch.equal(encoder(images), reference.forward_features(images).flatten(2).transpose(1, 2))


build = partial(TimmConfig, image_size=224)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (
            build(name="vit_tiny_patch17_224"),
            "timm has no model named 'vit_tiny_patch17_224'; expected a name such as vit_tiny_patch16_",
        ),
        (
            build(name="vit_tiny_patch16_224.xyz"),
            r"no weights named 'vit_tiny_patch16_224.xyz'; expected one of: .*augreg",
        ),
        (build(name="hub:a/b"), "Expected a name of timm, hf-hub:org/name or local-dir:/path; got 'hub:a/b'"),
        (build(name="local-dir:"), "Expected a name of timm"),
        (build(name="local-dir:/no/such/folder"), "local-dir:/no/such/folder cannot be read"),
        (build(name="volo_d1_224"), "volo_d1_224 gives neither patch tokens nor one feature map"),
        (build(name="crossvit_tiny_240", image_size=240), "crossvit_tiny_240 gives no patch tokens"),
        (
            build(name="vit_tiny_patch16_224", image_size=50),
            "multiple of the patch size 16 px; got 50 px. Take 48 or 64",
        ),
        (build(name="vit_small_patch16_dinov3", image_size=50), "multiple of the patch size 16 px"),
        (VitConfig(**{**SMALL, "num_heads": 5}), "The heads must divide the width; got 5 heads and 32"),
        (VitConfig(**{**SMALL, "depth": 0}), "depth of at least 1; got 0"),
    ],
)
def test_what_cannot_be_had_is_a_sentence(config: VitConfig | TimmConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ImageEncoder(config)


def test_a_model_of_one_size_is_a_sentence() -> None:
    encoder = ImageEncoder(TimmConfig(name="mixer_s32_224"))
    with pytest.raises(ValueError, match=r"timm cannot change the image size of mixer_s32_224.*take 224 px, got 256"):
        resize_encoder(encoder, image_size=256)
    resize_encoder(encoder, image_size=224)
    assert encoder.config == dataclasses.replace(encoder.config, image_size=224)
