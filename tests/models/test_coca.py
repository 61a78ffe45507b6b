"""CoCa: parameter counts against Table 1, causality, padding, the cascade, initial temperature."""

import dataclasses

import pytest
import torch
from torch import Tensor

from coca_video.losses import captioning_loss
from coca_video.models.coca import CoCa, CoCaConfig, count_parameters
from coca_video.models.image import ImageEncoder, TimmVitConfig, VitConfig, resize_encoder


@pytest.fixture(scope="module")
def model() -> CoCa:
    """A tiny CoCa in float64 with every parameter moved from where it starts."""
    torch.manual_seed(0)
    model = CoCa(CoCaConfig.tiny()).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 48, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(3, 512, (3, 12), generator=torch.Generator().manual_seed(2))


def right_padded(tokens: Tensor, *, lengths: list[int]) -> Tensor:
    return torch.arange(tokens.shape[1]).expand(len(tokens), -1) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    ("config", "encoder", "decoder_in_paper"),
    [
        (CoCaConfig.base(), 85_999_872, 297e6),
        (CoCaConfig.large(), 303_569_920, 484e6),
        (CoCaConfig.giant(), 1_011_740_288, None),
    ],
    ids=["base", "large", "giant"],
)
def test_parameter_counts_of_table_1(config: CoCaConfig, encoder: int, decoder_in_paper: float | None) -> None:
    with torch.device("meta"):
        model = CoCa(config)
    counts = count_parameters(model)
    assert counts["encoder"] == encoder
    assert sum(counts.values()) + 1 == sum(parameter.numel() for parameter in model.parameters())  # + the temperature
    text = config.text
    width, mlp = text.width, text.mlp_width
    attention, hidden, norm = 4 * (width**2 + width), 2 * width * mlp + width + mlp, 2 * width
    closed_form = (
        2 * text.vocab_size * width  # embedding and untied output
        + (text.max_length + 1) * width  # positions
        + width  # CLS
        + text.num_unimodal_layers * (attention + hidden + 2 * norm)
        + text.num_multimodal_layers * (2 * attention + hidden + 3 * norm)  # ONE MLP
        + 2 * norm  # after the CLS, before the output
        + width**2  # projection of the CLS
    )
    assert counts["decoder"] == closed_form
    if decoder_in_paper is not None:
        assert counts["encoder"] == pytest.approx({12: 86e6, 24: 303e6}[config.image.depth], rel=0.003)
        assert counts["decoder"] == pytest.approx(decoder_in_paper, rel=0.003)
    else:
        assert counts["decoder"] == pytest.approx(1.18e9, rel=0.003)  # the table prints 1.1B


def test_tiny_sizes() -> None:
    config = CoCaConfig.tiny()
    assert (config.image.width, config.image.depth, config.image.num_heads) == (96, 3, 3)
    assert (config.text.num_unimodal_layers, config.text.num_multimodal_layers) == (1, 1)


def test_changing_a_token_changes_no_logit_before_it(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    logits = model(images, tokens=tokens, mask=mask).logits
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 7) % 512
        other = model(images, tokens=changed, mask=mask).logits
        assert torch.equal(other[:, :position], logits[:, :position])
        assert (other[:, position:] != logits[:, position:]).any(dim=-1).all()


def test_padding_changes_nothing(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    """Neither what stands in the padding nor how much of it there is: embeddings, logits and loss of real tokens."""
    lengths = [12, 5, 8]
    mask = right_padded(tokens, lengths=lengths)
    out = model(images, tokens=tokens, mask=mask)
    garbage = torch.where(mask, tokens, 511)
    longer = torch.cat([garbage, torch.full((3, 9), 17)], dim=1)
    longer_mask = right_padded(longer, lengths=lengths)
    padded = model(images, tokens=longer, mask=longer_mask)
    torch.testing.assert_close(padded.text, out.text, rtol=0, atol=1e-12)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(padded.logits[row, :length], out.logits[row, :length], rtol=0, atol=1e-11)
        alone = model(images[row : row + 1], tokens=tokens[row : row + 1, :length], mask=mask[row : row + 1, :length])
        torch.testing.assert_close(alone.text[0], out.text[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(alone.logits[0], out.logits[row, :length], rtol=0, atol=1e-11)
    ours, theirs = (
        captioning_loss(o.logits, tokens=t, mask=m) for o, t, m in ((out, tokens, mask), (padded, longer, longer_mask))
    )
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-9, atol=0)
    assert ours[1] == theirs[1] == sum(lengths) - 3


def test_text_embedding_sees_every_real_token_and_itself(model: CoCa, tokens: Tensor) -> None:
    mask = right_padded(tokens, lengths=[12, 5, 8])
    embedding = model.encode_text(tokens, mask=mask)[0]
    for position in range(12):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 7) % 512
        moved = (model.encode_text(changed, mask=mask)[0] != embedding).any(dim=1)
        assert torch.equal(moved, mask[:, position])


def test_cls_is_not_seen_by_tokens(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    mask = torch.ones_like(tokens, dtype=torch.bool)
    before = model(images, tokens=tokens, mask=mask)
    state = model.unimodal.cls_embedding.detach().clone()
    with torch.no_grad():
        model.unimodal.cls_embedding.add_(1.0 + torch.arange(96) / 96)
    after = model(images, tokens=tokens, mask=mask)
    with torch.no_grad():
        model.unimodal.cls_embedding.copy_(state)
    assert torch.equal(before.logits, after.logits)
    assert not torch.allclose(before.text, after.text)


def test_cascade_and_unit_length(model: CoCa, images: Tensor) -> None:
    """The contrastive pooler pools the generative pooler's output; captions attend to all of its queries."""
    embedding, image_tokens = model.encode_image(images)
    assert image_tokens.shape == (3, 8, 96)
    by_hand = model.contrastive_pooler(model.generative_pooler(model.encoder(images))).squeeze(1)
    by_hand = by_hand / by_hand.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(embedding, by_hand.float(), rtol=1e-5, atol=1e-6)


def test_temperature_starts_at_007_and_is_bounded_but_not_stuck() -> None:
    model = CoCa(CoCaConfig.tiny())
    assert 1 / model.scale.item() == pytest.approx(0.07, rel=1e-6)
    assert model.log_scale.requires_grad
    with torch.no_grad():
        model.log_scale.fill_(50.0)
    model.bound_scale()
    assert model.scale.item() == pytest.approx(100.0, rel=1e-5)
    model.scale.backward()  # at the bound a gradient still leads away from it
    assert model.log_scale.grad.item() == pytest.approx(100.0, rel=1e-5)


def test_output_matrix_is_untied() -> None:
    model = CoCa(CoCaConfig.tiny())
    assert model.multimodal.output.weight.data_ptr() != model.unimodal.token_embedding.weight.data_ptr()


def test_too_long_captions_are_a_sentence(model: CoCa, images: Tensor) -> None:
    tokens = torch.zeros(3, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes at most 32 tokens; got 33"):
        model(images, tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def test_encoder_equals_timm_by_hand() -> None:
    """Our tokens are timm's blocks and norm, run by hand on patches and positions: no class token hides in them."""
    torch.manual_seed(0)
    encoder = ImageEncoder(VitConfig.tiny()).eval()
    images = torch.randn(2, 3, 48, 48)
    vit = encoder.vit
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(images), vit.norm(x))
    assert encoder(images).shape == (2, 36, 96)
    assert encoder.vit.head.__class__ is torch.nn.Identity


@pytest.mark.parametrize(("width", "mlp_width"), [(56, 488), (1408, 480), (96, 384), (1408, 6144)])
def test_mlp_width_is_kept(width: int, mlp_width: int) -> None:
    """Through timm's ratio, 488 of 56 came out as 487."""
    config = dataclasses.replace(VitConfig.tiny(), width=width, mlp_width=mlp_width, num_heads=8, depth=1)
    with torch.device("meta"):
        assert ImageEncoder(config).vit.blocks[0].mlp.fc1.out_features == mlp_width


def test_encoder_by_timm_name() -> None:
    encoder = ImageEncoder(TimmVitConfig(name="vit_tiny_patch16_224", image_size=64))
    assert (encoder.width, encoder.num_heads) == (192, 3)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 16, 192)
    assert "cls_token" not in dict(encoder.named_parameters())


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TimmVitConfig(name="vit_tiny_patch17_224"), "timm has no model named 'vit_tiny_patch17_224'"),
        (TimmVitConfig(name="resnet18"), "is not a VisionTransformer"),
        (dataclasses.replace(VitConfig.tiny(), num_heads=5), "The heads must divide the width; got 5 heads and 96"),
        (
            dataclasses.replace(VitConfig.tiny(), image_size=50),
            "multiple of the patch size 8 px; got 50 px. Take 48 or 56",
        ),
    ],
)
def test_encoders_that_cannot_be_had(config: VitConfig | TimmVitConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ImageEncoder(config)


def test_resized_position_embedding() -> None:
    """The same size is the identity; another one equals torch's antialiased bicubic resampling of the grid."""
    torch.manual_seed(0)
    encoder = ImageEncoder(VitConfig.tiny())
    with torch.no_grad():
        encoder.vit.pos_embed.normal_()
    before = encoder.vit.pos_embed.detach().clone()
    resize_encoder(encoder, image_size=48)
    assert torch.equal(encoder.vit.pos_embed, before)
    resize_encoder(encoder, image_size=96)
    grid = before.reshape(1, 6, 6, 96).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder.vit.pos_embed, expected.permute(0, 2, 3, 1).reshape(1, 144, 96))
    assert encoder.config.image_size == 96
    assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 144, 96)
