"""Tokens of several encoder layers: against hooks on timm's blocks and its final norm."""

import pytest
import torch
from torch import Tensor, nn

from coca_video.models.head import HeadConfig
from coca_video.models.image import ImageConfig, ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

CONFIGS = {
    "ours": VitConfig(width=32, depth=4, num_heads=2, mlp_width=64, image_size=16, patch_size=8, class_token=True),
    "without-final-norm": VitConfig(
        width=32, depth=3, num_heads=2, mlp_width=64, image_size=16, patch_size=8, final_norm=False
    ),
    "registers": TimmConfig(name="vit_small_patch14_reg4_dinov2", image_size=28),
    "rotary": TimmConfig(name="vit_small_patch16_dinov3", image_size=32),
    "siglip": TimmConfig(name="vit_base_patch32_siglip_256", image_size=64),
}


def make_encoder(config: ImageConfig) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return encoder.requires_grad_(requires_grad=False)


def images(config: ImageConfig) -> Tensor:
    return torch.randn(2, 3, config.image_size, config.image_size, generator=torch.Generator().manual_seed(1))


def by_hooks(encoder: ImageEncoder, pixels: Tensor) -> list[Tensor]:
    """Each block's output through the final norm, prefix tokens in front, from one whole forward."""
    outputs: list[Tensor] = []
    hooks = [block.register_forward_hook(lambda *a: outputs.append(a[2])) for block in encoder.model.blocks]
    encoder.model.forward_features(pixels)
    for hook in hooks:
        hook.remove()
    return [encoder.model.norm(output) for output in outputs]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_layers_equal_hooks_on_the_blocks(config: ImageConfig) -> None:
    encoder, pixels = make_encoder(config), images(config)
    outputs = by_hooks(encoder, pixels)
    depth, prefix = len(outputs), encoder.model.num_prefix_tokens
    for layers in ((0,), (-1,), (1, depth - 1), (-1, 0), (-2, 0, -1)):
        expected = [outputs[layer] for layer in layers]
        whole = encoder(pixels, layers=layers, prefix_tokens=True)
        patches = encoder(pixels, layers=layers)
        torch.testing.assert_close(whole, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(patches, torch.cat([x[:, prefix:] for x in expected], dim=1), rtol=1e-5, atol=1e-5)
    assert (outputs[0] - outputs[-1]).abs().max() > 0.1


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_the_last_layer_is_the_default(config: ImageConfig) -> None:
    encoder, pixels = make_encoder(config), images(config)
    torch.testing.assert_close(encoder(pixels, layers=(-1,)), encoder(pixels), rtol=1e-6, atol=1e-6)


def test_blocks_after_the_last_wanted_are_not_run() -> None:
    encoder = make_encoder(CONFIGS["ours"])
    run: list[int] = []
    for number, block in enumerate(encoder.model.blocks):
        block.register_forward_hook(lambda *_, number=number: run.append(number))
    encoder(images(CONFIGS["ours"]), layers=(1, 0))
    assert run == [0, 1]


def test_a_classifier_takes_the_layers_of_its_head() -> None:
    torch.manual_seed(0)
    config = VideoClassifierConfig(
        image=CONFIGS["ours"], num_classes=3, num_frames=2, head=HeadConfig(encoder_layers=(1, -1))
    )
    model = VideoClassifier(config).eval()
    frames = torch.randn(2, 2, 3, 16, 16)
    tokens = model.encode(frames)
    assert tokens.shape == (2, 2, 8, 32)
    for frame in range(2):
        outputs = by_hooks(model.encoder, frames[:, frame])
        expected = torch.cat([outputs[1][:, 1:], outputs[3][:, 1:]], dim=1)
        torch.testing.assert_close(tokens[:, frame], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(frames), model.head(tokens))


@pytest.mark.parametrize(
    ("config", "layers", "message"),
    [
        (CONFIGS["ours"], (4,), "has 4 layers, counted from 0, .* got encoder_layers \\(4,\\)"),
        (CONFIGS["ours"], (-5,), "has 4 layers"),
        (CONFIGS["ours"], (3, -1), "expected different ones"),
        (TimmConfig(name="efficientnet_lite0", image_size=64), (0,), "efficientnet_lite0 has no layers to choose from"),
        (TimmConfig(name="hiera_tiny_224"), (0,), "hiera_tiny_224 has no layers to choose from"),
        (TimmConfig(name="xcit_nano_12_p16_224"), (0,), "xcit_nano_12_p16_224 has no layers to choose from"),
    ],
)
def test_layers_that_are_not_there(config: ImageConfig, layers: tuple[int, ...], message: str) -> None:
    """Said when the classifier is built, before a video is read."""
    head = HeadConfig(encoder_layers=layers)
    with pytest.raises(ValueError, match=message):
        VideoClassifier(VideoClassifierConfig(image=config, num_classes=3, num_frames=2, head=head))


def test_a_cnn_keeps_the_default_head() -> None:
    config = TimmConfig(name="efficientnet_lite0", image_size=64)
    model = VideoClassifier(VideoClassifierConfig(image=config, num_classes=3, num_frames=2)).eval()
    frames = torch.randn(1, 2, 3, 64, 64)
    features = model.encoder.model.forward_features(frames[0])
    expected: nn.Module | Tensor = features.flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.encode(frames)[0], expected)
    assert model(frames).shape == (1, 3)
