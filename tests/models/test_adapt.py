"""Adapters, drop path, checkpointed activations and layer-wise rates: formulas by hand, and timm's own."""

import copy
import re
from collections.abc import Callable

import pytest
import timm
import torch
from timm.layers.drop import DropPath
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from coca_video.models.adapt import (
    add_lora,
    checkpoint_activations,
    layer_rate_factors,
    merge_lora,
    set_drop_path,
)
from coca_video.models.image import ImageConfig, ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.optim import OptimConfig, build_optimizer

VIT = VitConfig(width=32, depth=4, num_heads=2, mlp_width=64, image_size=16, patch_size=8, class_token=True)
# Queries, keys and values whose biases are apart: timm reads the weight there, and does not call the layer.
EVA = TimmConfig(name="eva02_tiny_patch14_224", image_size=28)
BEIT = TimmConfig(name="beit_base_patch16_224", image_size=32)
CNN = TimmConfig(name="efficientnet_lite0", image_size=32)


def make_encoder(config: ImageConfig = VIT) -> ImageEncoder:
    torch.manual_seed(0)
    encoder = ImageEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return encoder


def images(config: ImageConfig = VIT, *, batch: int = 2) -> Tensor:
    size = config.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def pull(encoder: ImageEncoder, pixels: Tensor, **options: tuple[int, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """Tokens, and the gradients of what is trainable."""
    encoder.zero_grad()
    tokens = encoder(pixels, **options)
    (tokens * torch.linspace(-1, 1, tokens.numel()).view_as(tokens)).sum().backward()
    return tokens.detach(), {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def adapters(encoder: ImageEncoder) -> dict[str, nn.Module]:
    return {
        name.removesuffix(".parametrizations.weight.0"): module
        for name, module in encoder.named_modules()
        if name.endswith(".parametrizations.weight.0")
    }


@pytest.mark.parametrize(("config", "num_matrices"), [(VIT, 16), (EVA, 48)], ids=["vit", "eva"])
def test_lora_changes_nothing_at_first_and_trains_only_itself(config: ImageConfig, num_matrices: int) -> None:
    """Four matrices a block."""
    encoder = make_encoder(config)
    before = encoder(images(config)).detach()
    add_lora(encoder, rank=3, alpha=6.0, seed=0)
    assert torch.equal(encoder(images(config)), before)
    trainable = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{n}.parametrizations.weight.0.{part}" for n in adapters(encoder) for part in ("up", "down")}
    assert len(trainable) == 2 * num_matrices
    _, found = pull(encoder, images(config))
    assert found.keys() == trainable
    for name, gradient in found.items():  # with B = 0 nothing reaches A yet, and something every B
        assert (gradient.abs().max() > 0) == name.endswith("up"), name


@pytest.mark.parametrize("config", [VIT, EVA], ids=["vit", "eva"])
def test_merged_weights_are_by_hand(config: ImageConfig) -> None:
    """W + alpha / rank B A for each adapted matrix, all else as before, and the same tokens."""
    encoder = make_encoder(config)
    names, before = list(encoder.state_dict()), {k: v.clone() for k, v in encoder.state_dict().items()}
    add_lora(encoder, rank=3, alpha=6.0, seed=0)
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    added = {f"{n}.weight": 6.0 / 3 * (a.up.detach() @ a.down.detach()) for n, a in adapters(encoder).items()}
    adapted = encoder(images(config)).detach()
    merge_lora(encoder)
    assert list(encoder.state_dict()) == names and not adapters(encoder)
    assert len(added) == (16 if config is VIT else 48)
    for name, tensor in encoder.state_dict().items():
        torch.testing.assert_close(tensor, before[name] + added.get(name, 0.0), rtol=1e-6, atol=1e-6, msg=name)
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    torch.testing.assert_close(encoder(images(config)), adapted, rtol=1e-6, atol=1e-6)
    assert type(encoder.blocks()[0].attn.proj) is nn.Linear


def test_lora_draws_depend_on_the_seed_and_the_matrix() -> None:
    """Of variance 1 / inputs; the global generator is left alone."""
    encoders = [make_encoder() for _ in range(3)]
    for encoder, seed in zip(encoders, (0, 0, 1), strict=True):
        torch.manual_seed(4)
        add_lora(encoder, rank=4, alpha=1.0, seed=seed)
        assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(4)))
    first, same, other = ([a.down.detach() for a in adapters(encoder).values()] for encoder in encoders)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    every = [*first, *other]
    assert not any(a.shape == b.shape and torch.equal(a, b) for i, a in enumerate(every) for b in every[:i])
    scaled = torch.cat([(down * down.shape[1] ** 0.5).flatten() for down in first])
    assert float(scaled.std()) == pytest.approx(1.0, rel=0.05)


def test_lora_under_autocast_is_what_is_merged() -> None:
    encoder = make_encoder()
    add_lora(encoder, rank=3, alpha=6.0, seed=0)
    adapter = adapters(encoder)["model.blocks.0.attn.qkv"]
    with torch.no_grad():
        adapter.up.normal_()
    plain = encoder.blocks()[0].attn.qkv.weight
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(encoder.blocks()[0].attn.qkv.weight, plain)


def test_an_adapted_encoder_can_be_copied_and_loaded() -> None:
    """What an average of weights and a resumed run do."""
    encoder, other = make_encoder(), make_encoder()
    add_lora(encoder, rank=2, alpha=2.0, seed=0)
    add_lora(other, rank=2, alpha=2.0, seed=1)
    with torch.no_grad():
        for adapter in adapters(encoder).values():
            adapter.up.normal_()
    copied = copy.deepcopy(encoder)
    other.load_state_dict(encoder.state_dict())
    expected = encoder(images())
    for same in (copied, other):
        assert torch.equal(same(images()), expected)
    merge_lora(copied)
    assert torch.equal(encoder(images()), expected) and len(adapters(encoder)) == 16


def test_an_adapted_encoder_trains_inside_a_classifier() -> None:
    """The optimizer finds the adapters below `encoder`; two updates move them and no frozen weight."""
    model = VideoClassifier(VideoClassifierConfig(image=VIT, num_classes=3, num_frames=2))
    add_lora(model.encoder, rank=2, alpha=2.0, seed=0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, config=OptimConfig(rate_factors={"encoder": 0.5}, weight_decay=0.0))
    for _ in range(2):
        optimizer.zero_grad()
        model.train()(torch.randn(2, 2, 3, 16, 16)).square().sum().backward()
        optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert {name for name in moved if name.startswith("encoder")} == {
        name for name in before if name.endswith(("weight.0.up", "weight.0.down"))
    }


def test_drop_path_rises_to_its_rate_as_in_timm() -> None:
    encoder = make_encoder()
    names = list(encoder.state_dict())
    set_drop_path(encoder, rate=0.3)
    reference = timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=4, num_heads=2, drop_path_rate=0.3
    )
    for number, (ours, theirs) in enumerate(zip(encoder.blocks(), reference.blocks, strict=True)):
        for place in ("drop_path1", "drop_path2"):
            assert getattr(ours, place).drop_prob == pytest.approx(0.1 * number)
            assert getattr(ours, place).drop_prob == pytest.approx(getattr(getattr(theirs, place), "drop_prob", 0.0))
    assert list(encoder.state_dict()) == names
    set_drop_path(encoder, rate=0.9)
    assert [block.drop_path2.drop_prob for block in encoder.blocks()] == pytest.approx([0, 0.3, 0.6, 0.9])


def test_drop_path_drops_at_its_rate_and_only_in_training() -> None:
    """The last block's two branches fall away together for 0.6^2 of the frames: those come out as they went in."""
    encoder = make_encoder()
    before = encoder(images()).detach()
    set_drop_path(encoder, rate=0.6)
    assert torch.equal(encoder(images()), before)
    block = encoder.train().blocks()[-1]
    torch.manual_seed(0)
    x = torch.randn(4000, 1, 32)
    skipped = (block(x) == x).all(dim=-1).float().mean()
    assert float(skipped) == pytest.approx(0.36, abs=0.03)  # four deviations


@pytest.mark.parametrize("layers", [(), (1, 3)])
@pytest.mark.parametrize("adapted", [False, True], ids=["whole", "lora"])
def test_checkpointed_activations_are_equal_to_the_bit(layers: tuple[int, ...], adapted: bool) -> None:
    """Tokens and gradients, with drop path drawing, and with a frozen patch embedding before the first block."""
    plain, checkpointed = make_encoder(), make_encoder()
    for encoder in (plain, checkpointed):
        if adapted:
            add_lora(encoder, rank=2, alpha=2.0, seed=0)
        set_drop_path(encoder, rate=0.5)
        encoder.train()
    checkpoint_activations(checkpointed)
    assert list(plain.state_dict()) == list(checkpointed.state_dict())
    results = []
    for encoder in (plain, checkpointed, copy.deepcopy(checkpointed)):
        torch.manual_seed(5)
        results.append(pull(encoder, images(batch=6), layers=layers))
    (tokens, expected), *others = results
    assert expected
    for ours, found in others:
        assert torch.equal(ours, tokens) and found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def saved_bytes(run: Callable[[], object]) -> int:
    """Of the distinct tensors that a forward keeps for its backward, parameters among them."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_checkpointed_activations_keep_one_tensor_a_block() -> None:
    """What is added by an image more: the input of each block, in place of all inside."""
    grown = []
    for checkpointed in (False, True):
        encoder = make_encoder().train()
        if checkpointed:
            checkpoint_activations(encoder)
        few, many = (saved_bytes(lambda n=n, e=encoder: e(images(batch=n))) for n in (1, 3))
        grown.append((many - few) / 2)
    block_input = 5 * 32 * 4
    outside = 3 * 16 * 16 * 4 + 3 * block_input + 5 * 8  # pixels; positions, final norm and its statistics, with room
    assert 4 * block_input <= grown[1] <= 4 * block_input + outside
    assert grown[0] > 4 * 10 * block_input and grown[1] < grown[0] / 5


@pytest.mark.parametrize("config", [VIT, EVA, BEIT], ids=["vit", "eva", "beit"])
def test_layer_rates_are_beits(config: ImageConfig) -> None:
    """decay^(n + 1 - id), ids from 0 for what precedes the blocks to n + 1 for the norm: by hand, and timm's groups."""
    model = VideoClassifier(VideoClassifierConfig(image=config, num_classes=3, num_frames=2))
    depth = len(model.encoder.blocks())
    factors = layer_rate_factors(model.encoder, decay=0.7)

    def number(name: str) -> int:
        block = re.match(r"encoder\.model\.blocks\.(\d+)\.", name)
        if block:
            return int(block[1]) + 1
        return depth + 1 if name.startswith(("encoder.model.norm.", "encoder.model.fc_norm.")) else 0

    names = [name for name, _ in model.encoder.named_parameters(prefix="encoder")]
    for name in names:
        (found,) = [value for prefix, value in factors.items() if f"{name}.".startswith(f"{prefix}.")]
        assert found == pytest.approx(0.7 ** (depth + 1 - number(name))), name
    assert min(factors.values()) == factors["encoder.model.patch_embed"] == pytest.approx(0.7 ** (depth + 1))

    timms = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(model.encoder.model, layer_decay=0.7)
        for parameter in group["params"]
    }
    optimizer = build_optimizer(model, config=OptimConfig(rate_factors=factors))
    ours = {id(p): group["rate_factor"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.encoder.named_parameters(prefix="encoder"):
        if not name.startswith("encoder.model.norm."):  # which timm puts with the last block
            assert ours[id(parameter)] == pytest.approx(0.7 * timms[id(parameter)]), name
    assert all(ours[id(parameter)] == 1.0 for parameter in model.head.parameters())


def test_layer_rates_of_frozen_parts_are_left_out() -> None:
    model = VideoClassifier(VideoClassifierConfig(image=VIT, num_classes=3, num_frames=2))
    model.encoder.model.patch_embed.requires_grad_(requires_grad=False)
    model.encoder.model.blocks[0].requires_grad_(requires_grad=False)
    factors = layer_rate_factors(model.encoder, decay=0.5)
    blocks = {f"encoder.model.blocks.{number}": 0.5 ** (4 - number) for number in (1, 2, 3)}
    tokens = dict.fromkeys(("encoder.model.cls_token", "encoder.model.pos_embed"), 0.5**5)
    assert factors == {**blocks, **tokens, "encoder.model.norm": 1.0}
    build_optimizer(model, config=OptimConfig(rate_factors=factors))


def test_what_cannot_be_had_is_a_sentence() -> None:
    cnn, vit = make_encoder(CNN), make_encoder()
    for call, message in (
        (lambda: add_lora(cnn, rank=1, alpha=1.0, seed=0), "no attention or MLP matrices to adapt"),
        (lambda: set_drop_path(cnn, rate=0.1), "no transformer blocks for drop path"),
        (lambda: checkpoint_activations(cnn), "batch norms, .* leave activation_checkpointing off"),
        (lambda: layer_rate_factors(cnn, decay=0.5), "no transformer blocks for a layer decay"),
        (lambda: checkpoint_activations(make_encoder(TimmConfig(name="convnext_atto", image_size=32))), "no transf"),
        (lambda: add_lora(vit, rank=0, alpha=1.0, seed=0), "rank of 1 or more and an alpha above 0; got 0 and 1.0"),
        (lambda: add_lora(vit, rank=1, alpha=0.0, seed=0), "got 1 and 0.0"),
        (lambda: set_drop_path(vit, rate=1.0), "at least 0 and below 1; got 1.0"),
        (lambda: layer_rate_factors(vit, decay=0.0), "above 0 and at most 1; got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(parameter.requires_grad for parameter in vit.parameters())
    assert not any(isinstance(module, DropPath) for module in vit.modules())
