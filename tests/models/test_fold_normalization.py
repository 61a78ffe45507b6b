"""The normalisation folded into the patch embedding: tokens equal to normalising first, and what cannot be folded."""

import dataclasses

import pytest
import torch
from torch import nn

from coca_video.data.transforms import normalize
from coca_video.models.image import ImageConfig, ImageEncoder, TimmConfig, Triple, VitConfig, fold_normalization

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VIT = VitConfig(width=48, depth=2, num_heads=3, mlp_width=96, image_size=32, patch_size=8)
CONFIGS: dict[str, ImageConfig] = {
    "ours": VIT,
    "ours, CLIP's wiring": dataclasses.replace(VIT, pre_norm=True, class_token=True, mean=CLIP_MEAN, std=CLIP_STD),
    "vit": TimmConfig(name="vit_tiny_patch16_224", image_size=64),
    "distilled": TimmConfig(name="deit_tiny_distilled_patch16_224", image_size=64, mean=CLIP_MEAN, std=CLIP_STD),
    "eva": TimmConfig(name="eva02_tiny_patch14_224", image_size=56, mean=CLIP_MEAN, std=CLIP_STD),
    "clip": TimmConfig(name="vit_xsmall_patch16_clip_224", image_size=64, mean=CLIP_MEAN, std=CLIP_STD),
}


def frozen(config: ImageConfig) -> ImageEncoder:
    torch.manual_seed(0)
    return ImageEncoder(config).eval().requires_grad_(False)


def pixels(size: int, *, number: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def by_hand(images: torch.Tensor, config: ImageConfig) -> torch.Tensor:
    """(x / 255 - mean) / std in float64, as it is written."""
    mean, std = (torch.tensor(x, dtype=torch.float64).view(3, 1, 1) for x in (config.mean, config.std))
    return (images.double() / 255 - mean) / std


@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_normalised_images(name: str) -> None:
    """1e-5 in fp32 and 1e-10 in float64: rounding; the tokens are of size 1 to 4."""
    encoder, config = frozen(CONFIGS[name]), CONFIGS[name]
    images = pixels(config.image_size)
    folded = fold_normalization(encoder)
    expected = encoder(by_hand(images, config).float())
    torch.testing.assert_close(folded(images.float()), expected, rtol=1e-5, atol=1e-5)
    encoder = encoder.double()
    torch.testing.assert_close(
        fold_normalization(encoder)(images.double()), encoder(by_hand(images, config)), rtol=0, atol=1e-10
    )
    assert (
        encoder(images.double()) - encoder(by_hand(images, config))
    ).abs().max() > 0.1  # the fold has something to do


def test_weights_by_the_formula() -> None:
    """Entry by entry over a kernel, against loops."""
    config = dataclasses.replace(VIT, mean=CLIP_MEAN, std=CLIP_STD)
    encoder = frozen(config).double()
    nn.init.normal_(encoder.model.patch_embed.proj.bias)
    before, after = encoder.model.patch_embed.proj, fold_normalization(encoder).model.patch_embed.proj
    for o in (0, 17, 47):
        shift = 0.0
        for c in range(3):
            for y in range(8):
                for x in range(8):
                    weight = before.weight[o, c, y, x].item()
                    shift += weight * CLIP_MEAN[c] / CLIP_STD[c]
                    assert after.weight[o, c, y, x].item() == pytest.approx(weight / (255 * CLIP_STD[c]), rel=1e-13)
        assert after.bias[o].item() == pytest.approx(before.bias[o].item() - shift, rel=1e-12)


def test_the_encoder_stays_and_other_weights_are_shared() -> None:
    encoder = frozen(CONFIGS["ours, CLIP's wiring"])
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    folded = fold_normalization(encoder)
    after = encoder.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    own = [
        name
        for name, parameter in folded.named_parameters()
        if parameter.data_ptr() not in {p.data_ptr() for p in encoder.parameters()}
    ]
    assert own == ["model.patch_embed.proj.weight", "model.patch_embed.proj.bias"]
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert encoder.config == CONFIGS["ours, CLIP's wiring"] and not folded.training


def test_the_folded_config_normalises_nothing() -> None:
    """Code that normalises by the config gives the folded encoder the very pixels: all 256 levels."""
    config = fold_normalization(frozen(VIT)).config
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 256).expand(3, 1, 256)
    assert torch.equal(normalize(levels, mean=config.mean, std=config.std), levels.float())
    assert dataclasses.replace(config, mean=VIT.mean, std=VIT.std) == VIT


def test_bf16_holds_every_level() -> None:
    """Whole numbers up to 256 are exact in its 8 bits of significand, and 257 is the first that is not."""
    levels = torch.arange(258)
    assert torch.equal(levels[:257].to(torch.bfloat16).long(), levels[:257])
    assert levels[257].to(torch.bfloat16).item() == 256
    assert not torch.equal(by_hand(levels[:256], VIT).to(torch.bfloat16).double(), by_hand(levels[:256], VIT))


@pytest.mark.parametrize("mean_std", [((0.5,) * 3, (0.5,) * 3), (CLIP_MEAN, CLIP_STD)])
def test_bf16_is_off_by_less_than_a_percent(mean_std: tuple[Triple, Triple]) -> None:
    """Patch embeddings under autocast, of the norm: 0.3% when normalised first, 0.4 to 0.6% folded."""
    config = dataclasses.replace(VIT, width=192, patch_size=16, image_size=96, mean=mean_std[0], std=mean_std[1])
    encoder, images = frozen(config), pixels(96, number=4)
    folded = fold_normalization(encoder)
    exact = encoder.model.patch_embed(by_hand(images, config).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        normalised = encoder.model.patch_embed(by_hand(images, config).float())
        direct = folded.model.patch_embed(images.to(torch.bfloat16))
    errors = [((tokens.float() - exact).norm() / exact.norm()).item() for tokens in (normalised, direct)]
    assert errors[0] == pytest.approx(0.0029, rel=0.15)
    assert 0.0035 < errors[1] < 0.0065


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("resnet10t", "resnet10t has no plain patch embedding"),
        ("xcit_nano_12_p16_224", "xcit_nano_12_p16_224 has no plain patch embedding"),
        ("hiera_tiny_224", "hiera_tiny_224 has no plain patch embedding"),
    ],
)
def test_other_stems_are_refused(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        fold_normalization(frozen(TimmConfig(name=name, image_size=224)))


def test_padding_is_refused() -> None:
    encoder = frozen(VIT)
    encoder.model.patch_embed.dynamic_img_pad = True
    with pytest.raises(ValueError, match="pads its input with zeros"):
        fold_normalization(encoder)
    encoder.model.patch_embed.dynamic_img_pad = False
    encoder.model.patch_embed.proj = nn.Conv2d(3, 48, 8, stride=8, padding=1).requires_grad_(False)
    with pytest.raises(ValueError, match="pads its input with zeros"):
        fold_normalization(encoder)


def test_an_encoder_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match="Only a frozen encoder can be folded"):
        fold_normalization(ImageEncoder(VIT))
