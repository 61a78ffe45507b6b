"""CoCa: parameter counts against Table 1, causality, padding, the cascade, initial temperature."""

import dataclasses

import pytest
import torch
from torch import Tensor

from coca_video.models.coca import CoCa, CoCaConfig, count_parameters
from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig, resize_encoder


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
    logits = model.logits(images, tokens=tokens, mask=mask)
    for position in range(tokens.shape[1]):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 7) % 512
        other = model.logits(images, tokens=changed, mask=mask)
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
    logits = model.logits(images, tokens=tokens, mask=mask)
    longer_logits = model.logits(images, tokens=longer, mask=longer_mask)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(longer_logits[row, :length], logits[row, :length], rtol=0, atol=1e-11)
        one = slice(row, row + 1)
        alone = {"tokens": tokens[one, :length], "mask": mask[one, :length]}
        torch.testing.assert_close(model.encode_text(**alone)[0][0], out.text[row], rtol=0, atol=1e-12)
        torch.testing.assert_close(model.logits(images[one], **alone)[0], logits[row, :length], rtol=0, atol=1e-11)
    torch.testing.assert_close(padded.caption.loss_sum, out.caption.loss_sum, rtol=1e-9, atol=0)
    assert out.caption.count == padded.caption.count == sum(lengths) - 3


def test_captioning_loss_is_that_of_the_whole_logits(model: CoCa, images: Tensor, tokens: Tensor) -> None:
    """The next token of every position but the last, padding left out; open_clip leaves out id 0 instead."""
    lengths = [12, 5, 8]
    tokens = tokens.clone()
    tokens[0, 3] = 0
    mask = right_padded(tokens, lengths=lengths)
    log_p = model.logits(images, tokens=tokens, mask=mask).detach().log_softmax(dim=-1)
    expected = -sum(
        float(log_p[row, t, tokens[row, t + 1]]) for row, length in enumerate(lengths) for t in range(length - 1)
    )
    caption = model(images, tokens=tokens, mask=mask).caption
    assert caption.loss_sum.item() == pytest.approx(expected, rel=1e-10)
    assert float(caption.cross_entropy_sum) == pytest.approx(expected, rel=1e-10)
    with_z = model(images, tokens=tokens, mask=mask, z_loss_weight=0.25).caption
    log_z = model.logits(images, tokens=tokens, mask=mask).detach().logsumexp(dim=-1)
    z_loss = sum(float(log_z[row, t]) ** 2 for row, length in enumerate(lengths) for t in range(length - 1))
    assert with_z.loss_sum.item() == pytest.approx(expected + 0.25 * z_loss, rel=1e-10)
    assert float(with_z.cross_entropy_sum) == pytest.approx(expected, rel=1e-10)


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
    assert torch.equal(before.caption.loss_sum, after.caption.loss_sum)
    assert not torch.allclose(before.text, after.text)


def test_cascade_and_unit_length(model: CoCa, images: Tensor) -> None:
    """The contrastive pooler pools the generative pooler's output; captions attend to all of its queries."""
    embedding, image_tokens = model.encode_image(images)
    assert image_tokens.shape == (3, 8, 96)
    by_hand = model.contrastive_pooler(model.generative_pooler(model.encoder(images))).squeeze(1)
    by_hand = by_hand / by_hand.square().sum(dim=1, keepdim=True).sqrt()
    torch.testing.assert_close(embedding, by_hand, rtol=0, atol=1e-12)


def test_parallel_poolers_both_pool_the_encoders_tokens(images: Tensor) -> None:
    """The paper's ablation (Table 8f): the embedding does not depend on the generative pooler."""
    torch.manual_seed(1)
    model = CoCa(dataclasses.replace(CoCaConfig.tiny(), poolers="parallel", pooler_heads=6)).double()
    embedding, image_tokens = model.encode_image(images)
    tokens = model.encoder(images)
    assert model.contrastive_pooler is not None
    assert model.contrastive_pooler.attention.num_heads == model.generative_pooler.attention.num_heads == 6
    by_hand = model.contrastive_pooler.norm_out(model.contrastive_pooler.attend(tokens)).squeeze(1)
    torch.testing.assert_close(embedding, by_hand / by_hand.norm(dim=1, keepdim=True), rtol=0, atol=1e-10)
    torch.testing.assert_close(image_tokens, model.generative_pooler(tokens))
    with torch.no_grad():
        model.generative_pooler.query.add_(1.0 + torch.arange(96) / 96)
    assert torch.equal(model.encode_image(images)[0], embedding)
    assert not torch.allclose(model.encode_image(images)[1], image_tokens)


def test_open_clip_wiring_splits_one_pooler(images: Tensor) -> None:
    torch.manual_seed(1)
    image = dataclasses.replace(VitConfig.tiny(), class_token=True)
    model = CoCa(dataclasses.replace(CoCaConfig.tiny(), image=image, poolers="open_clip")).double()
    embedding, image_tokens = model.encode_image(images)
    pooled = model.generative_pooler(model.encoder(images, prefix_tokens=True))
    assert model.contrastive_pooler is None and model.image_projection is not None
    assert torch.equal(image_tokens, pooled[:, 1:]) and image_tokens.shape == (3, 7, 96)
    by_hand = pooled[:, 0] @ model.image_projection.weight.T
    torch.testing.assert_close(embedding, by_hand / by_hand.norm(dim=1, keepdim=True), rtol=0, atol=1e-10)
    with pytest.raises(ValueError, match="takes 2 or more; got 1"):
        dataclasses.replace(CoCaConfig.tiny(), poolers="open_clip", num_queries=1)


def test_what_the_cls_sees_with_open_clips_mask(tokens: Tensor) -> None:
    """Every real token and the first padding position; itself only in a sequence of full length."""
    torch.manual_seed(1)
    text = dataclasses.replace(CoCaConfig.tiny().text, cls_mask="open_clip", max_length=12)
    unimodal = CoCa(dataclasses.replace(CoCaConfig.tiny(), text=text)).double().unimodal
    for length in (4, 11, 12):
        mask = right_padded(tokens, lengths=[length] * 3)
        embedding = unimodal(tokens, mask=mask)[0]
        for position in range(12):
            changed = tokens.clone()
            changed[:, position] = (changed[:, position] + 7) % 512
            moved = (unimodal(changed, mask=mask)[0] != embedding).any(dim=1)
            assert moved.all() if position <= length else not moved.any()
        padded = torch.where(mask, tokens, 0)
        trimmed = unimodal(padded[:, :length], mask=mask[:, :length])[0]
        torch.testing.assert_close(trimmed, unimodal(padded, mask=mask)[0], rtol=0, atol=1e-12)


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
    assert model.vocabulary.weight.data_ptr() != model.unimodal.token_embedding.weight.data_ptr()


def test_too_long_captions_are_a_sentence(model: CoCa, images: Tensor) -> None:
    tokens = torch.zeros(3, 33, dtype=torch.int64)
    with pytest.raises(ValueError, match="takes at most 32 tokens; got 33"):
        model(images, tokens=tokens, mask=torch.ones_like(tokens, dtype=torch.bool))


def test_encoder_equals_timm_by_hand() -> None:
    """Our tokens are timm's blocks and norm, run by hand on patches and positions: no class token hides in them."""
    torch.manual_seed(0)
    encoder = ImageEncoder(VitConfig.tiny()).eval()
    images = torch.randn(2, 3, 48, 48)
    vit = encoder.model
    x = vit.patch_embed.proj(images).flatten(2).transpose(1, 2) + vit.pos_embed
    for block in vit.blocks:
        x = block(x)
    torch.testing.assert_close(encoder(images), vit.norm(x))
    assert encoder(images).shape == (2, 36, 96)
    assert encoder.model.head.__class__ is torch.nn.Identity


@pytest.mark.parametrize(("width", "mlp_width"), [(56, 488), (1408, 480), (96, 384), (1408, 6144)])
def test_mlp_width_is_kept(width: int, mlp_width: int) -> None:
    """Through timm's ratio, 488 of 56 came out as 487."""
    config = dataclasses.replace(VitConfig.tiny(), width=width, mlp_width=mlp_width, num_heads=8, depth=1)
    with torch.device("meta"):
        assert ImageEncoder(config).model.blocks[0].mlp.fc1.out_features == mlp_width


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (TimmConfig(name="vit_tiny_patch17_224"), "timm has no model named 'vit_tiny_patch17_224'"),
        (dataclasses.replace(VitConfig.tiny(), num_heads=5), "The heads must divide the width; got 5 heads and 96"),
        (
            dataclasses.replace(VitConfig.tiny(), image_size=50),
            "multiple of the patch size 8 px; got 50 px. Take 48 or 56",
        ),
    ],
)
def test_encoders_that_cannot_be_had(config: VitConfig | TimmConfig, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        ImageEncoder(config)


def test_resized_position_embedding() -> None:
    """The same size is the identity; another one equals torch's antialiased bicubic resampling of the grid."""
    torch.manual_seed(0)
    encoder = ImageEncoder(VitConfig.tiny())
    with torch.no_grad():
        encoder.model.pos_embed.normal_()
    before = encoder.model.pos_embed.detach().clone()
    resize_encoder(encoder, image_size=48)
    assert torch.equal(encoder.model.pos_embed, before)
    resize_encoder(encoder, image_size=96)
    grid = before.reshape(1, 6, 6, 96).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(12, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(encoder.model.pos_embed, expected.permute(0, 2, 3, 1).reshape(1, 144, 96))
    assert encoder.config.image_size == 96
    assert encoder(torch.randn(1, 3, 96, 96)).shape == (1, 144, 96)
