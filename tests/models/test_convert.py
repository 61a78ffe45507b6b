"""open_clip's CoCa and ours on the same random weights: sizes, latents and logits, padding, round trips, refusals.

Reference: open_clip_torch itself. In fp32 both round in other orders (SDPA against nn.MultiheadAttention): unit-length
latents and logits of a few units differ by some 1e-6, so 1e-5 is asked for; in float64 they agree to 1e-12.
"""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.convert import config_from_open_clip, dropped_keys, from_open_clip, to_open_clip

open_clip = pytest.importorskip("open_clip", reason="the extra open-clip is not installed")
coca_model = pytest.importorskip("open_clip.coca_model")

CONTEXT, VOCABULARY = 76, 300

# name -> (embed_dim, vision_cfg, text_cfg, heads that we have to be told). "B-32" and "L-14" have the released widths.
SHAPES: dict[str, tuple[int, dict[str, Any], dict[str, Any], dict[str, int]]] = {
    "B-32": (512, {"image_size": 224, "patch_size": 32, "width": 768, "layers": 2}, {"width": 512, "heads": 8}, {}),
    "L-14": (768, {"image_size": 28, "patch_size": 14, "width": 1024, "layers": 2}, {"width": 768, "heads": 12}, {}),
    "odd": (
        96,
        {
            "image_size": 42,
            "patch_size": 14,
            "width": 120,
            "layers": 3,
            "head_width": 40,
            "mlp_ratio": 3.0,
            "attn_pooler_heads": 4,
            "attn_pooler_queries": 7,
        },
        {"width": 96, "heads": 2},
        {"vision_heads": 3, "text_heads": 2, "pooler_heads": 4},
    ),
    "one-width": (128, {"image_size": 32, "patch_size": 8, "width": 128, "layers": 1}, {"width": 128, "heads": 2}, {}),
}


def open_clip_coca(name: str, *, context_length: int = CONTEXT, attentional_pool: bool | str = True) -> nn.Module:
    """open_clip's CoCa of SHAPES with every parameter random; its own init leaves some of them uninitialised memory."""
    embed_dim, vision, text, _ = SHAPES[name]
    text = {**text, "context_length": context_length, "vocab_size": VOCABULARY}
    model: nn.Module = coca_model.CoCa(
        embed_dim,
        vision_cfg={"attn_pooler_heads": 8, **vision, "attentional_pool": attentional_pool, "output_tokens": True},
        text_cfg={**text, "layers": 2, "embed_cls": True, "output_tokens": True},
        multimodal_cfg={**text, "layers": 3},
    )
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """Norms near the identity, matrices that keep a unit scale, all else around zero: logits of a few units."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name == "logit_scale":
                parameter.fill_(2.5)
            elif name.endswith("weight") and parameter.ndim == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.ndim == 1:
                parameter.copy_(0.2 * noise)
            elif "projection" in name or name.endswith("proj"):
                parameter.copy_(noise * parameter.shape[0] ** -0.5)
            elif "embedding" in name or "query" in name:
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(noise * parameter[0].numel() ** -0.5)
    return model.eval()


def ours_of(theirs: nn.Module, *, heads: dict[str, int]) -> CoCa:
    state = theirs.state_dict()
    model = CoCa(config_from_open_clip(state, **heads)).to(theirs.logit_scale.dtype)  # type: ignore[arg-type]
    model.load_state_dict(from_open_clip(state))
    return model.eval()


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, CoCa]:
    """(open_clip's model, ours with its weights)."""
    theirs = open_clip_coca(request.param)
    return theirs, ours_of(theirs, heads=SHAPES[request.param][3])


@pytest.fixture(scope="module")
def odd() -> tuple[nn.Module, CoCa]:
    """The smallest pair, in float64."""
    theirs = open_clip_coca("odd").double()
    return theirs, ours_of(theirs, heads=SHAPES["odd"][3])


def captions(*lengths: int, context_length: int = CONTEXT) -> Tensor:
    """Random ids without 0, which open_clip takes for padding, padded with 0 to the context's length."""
    tokens = torch.randint(1, VOCABULARY, (len(lengths), context_length), generator=torch.Generator().manual_seed(6))
    return tokens * (torch.arange(context_length) < torch.tensor(lengths)[:, None])


def images_for(model: CoCa, *, count: int) -> Tensor:
    size = model.config.image.image_size
    images = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(7))
    return images.to(model.log_scale.dtype)


@torch.no_grad()
def assert_equal_outputs(theirs: nn.Module, ours: CoCa, *, tokens: Tensor, trim_to: int = CONTEXT, atol: float) -> None:
    """Embeddings, image tokens, scale and the logits of all positions that ours has."""
    images = images_for(ours, count=len(tokens))
    expected = theirs(images, tokens, output_labels=False)
    trimmed = tokens[:, :trim_to]
    mask = trimmed != 0
    image, image_tokens = ours.encode_image(images)
    text, _ = ours.encode_text(trimmed, mask=mask)
    logits = ours.logits(images, tokens=trimmed, mask=mask)
    for embedding in (image, text):
        torch.testing.assert_close(embedding.norm(dim=-1), torch.ones_like(embedding[:, 0]))
    assert 1 < expected["logits"].abs().max() < 20  # neither dead nor so large that 1e-5 would be beyond fp32
    torch.testing.assert_close(image, expected["image_features"], rtol=0, atol=atol)
    torch.testing.assert_close(text, expected["text_features"], rtol=0, atol=atol)
    torch.testing.assert_close(image_tokens, theirs._encode_image(images)[1], rtol=0, atol=atol)  # type: ignore[operator]
    torch.testing.assert_close(logits, expected["logits"][:, :trim_to], rtol=0, atol=atol)
    torch.testing.assert_close(ours.scale, expected["logit_scale"], rtol=1e-6, atol=0)


def test_outputs_equal_open_clip_with_and_without_padding(pair: tuple[nn.Module, CoCa]) -> None:
    theirs, ours = pair
    assert_equal_outputs(theirs, ours, tokens=captions(1, 9, 75, 76), atol=1e-5)


@pytest.mark.parametrize("longest", [1, 9, 75])
def test_captions_trimmed_to_the_longest_equal_open_clip_padded_to_76(
    odd: tuple[nn.Module, CoCa], longest: int
) -> None:
    theirs, ours = odd
    assert_equal_outputs(theirs, ours, tokens=captions(1, longest), trim_to=longest, atol=1e-12)


def test_float64_equals_open_clip_to_1e_12(odd: tuple[nn.Module, CoCa]) -> None:
    theirs, ours = odd
    assert_equal_outputs(theirs, ours, tokens=captions(*range(1, 77, 5), 76), atol=1e-12)


def test_another_context_length() -> None:
    theirs = open_clip_coca("odd", context_length=20)
    ours = ours_of(theirs, heads=SHAPES["odd"][3])
    assert ours.config.text.max_length == 20
    assert_equal_outputs(theirs, ours, tokens=captions(3, 19, 20, context_length=20), atol=1e-5)


def test_their_mask_shows_the_class_token_one_pad_and_not_itself(odd: tuple[nn.Module, CoCa]) -> None:
    """With the correct mask the same weights give another embedding, but for no token another feature."""
    _, ours = odd
    tokens = captions(1, 9, 76)
    corrected = copy.deepcopy(ours)
    corrected.unimodal.cls_mask = "correct"
    with torch.no_grad():
        text, features = ours.encode_text(tokens, mask=tokens != 0)
        other_text, other_features = corrected.encode_text(tokens, mask=tokens != 0)
    difference = (text - other_text).norm(dim=-1)
    assert (difference[:2] > 1e-2).all()
    assert difference[2] < 1e-12  # a full caption leaves no pad to see: the CLS sees itself
    torch.testing.assert_close(features[tokens != 0], other_features[tokens != 0], rtol=0, atol=1e-12)


def test_token_0_is_padding_wherever_it_stands_for_open_clip_and_a_token_for_us(odd: tuple[nn.Module, CoCa]) -> None:
    """Id 0 is CLIP's "!": open_clip hides it inside a caption too; our mask says what is padding."""
    theirs, ours = odd
    tokens = captions(9)
    tokens[0, 4] = 0
    length_mask = (torch.arange(CONTEXT) < 9)[None]
    with torch.no_grad():
        expected = theirs.encode_text(tokens)  # type: ignore[operator]
        hidden, _ = ours.encode_text(tokens, mask=tokens != 0)
        seen, _ = ours.encode_text(tokens, mask=length_mask)
    torch.testing.assert_close(hidden, expected, rtol=0, atol=1e-12)
    assert (seen - expected).norm() > 1e-2


@pytest.mark.parametrize(("name", "count"), [("coca_ViT-B-32", 253_560_065), ("coca_ViT-L-14", 638_450_177)])
def test_released_models_have_the_published_parameters_and_sizes(name: str, count: int) -> None:
    """Counts: open_clip's table of models (253.56M, 638.45M)."""
    config = open_clip.get_model_config(name)
    config.pop("custom_text")
    with torch.device("meta"):
        theirs = coca_model.CoCa(**config)
        found = config_from_open_clip(theirs.state_dict())
        ours = CoCa(found)
    assert sum(p.numel() for p in theirs.parameters()) == count
    assert sum(p.numel() for p in ours.parameters()) == count
    shapes = {key: tensor.shape for key, tensor in from_open_clip(theirs.state_dict()).items()}
    assert shapes == {key: tensor.shape for key, tensor in ours.state_dict().items()}
    vision, text, decoder = config["vision_cfg"], config["text_cfg"], config["multimodal_cfg"]
    assert (found.image.image_size, found.image.patch_size) == (vision["image_size"], vision["patch_size"])
    assert (found.image.width, found.image.depth) == (vision["width"], vision["layers"])
    assert found.image.num_heads == theirs.visual.transformer.resblocks[0].attn.num_heads
    assert found.pooler_heads == theirs.visual.attn_pool.attn.num_heads
    assert (found.text.width, found.text.num_heads, found.text.vocab_size) == (text["width"], text["heads"], 49_408)
    assert (found.text.num_unimodal_layers, found.text.num_multimodal_layers) == (text["layers"], decoder["layers"])
    assert found.text.num_heads == decoder["heads"]
    assert (found.text.max_length, found.num_queries) == (76, 256)


def test_images_are_to_be_prepared_as_open_clip_prepares_them(pair: tuple[nn.Module, CoCa]) -> None:
    image = pair[1].config.image
    assert image.mean == open_clip.OPENAI_DATASET_MEAN
    assert image.std == open_clip.OPENAI_DATASET_STD
    assert image.interpolation == open_clip.transform.PreprocessCfg().interpolation == "bicubic"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["odd", "one-width"])
def test_round_trip_is_bit_equal(name: str, dtype: torch.dtype) -> None:
    state = open_clip_coca(name).to(dtype).state_dict()
    config = config_from_open_clip(state, **SHAPES[name][3])
    back = to_open_clip(from_open_clip(state), config=config)
    assert back.keys() == state.keys()
    for key, tensor in state.items():
        assert back[key].dtype == dtype
        assert torch.equal(back[key], tensor), key


def test_a_model_of_ours_gives_open_clips_weights_back(pair: tuple[nn.Module, CoCa]) -> None:
    theirs, ours = pair
    back = to_open_clip(ours.state_dict(), config=ours.config)
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in theirs.state_dict().items())


def test_every_number_is_converted_once() -> None:
    """Numbering all weights of their model: ours hold each number exactly once."""
    state = open_clip_coca("one-width").state_dict()
    numbered, start = {}, 0
    for key, tensor in state.items():
        numbered[key] = torch.arange(start, start + tensor.numel(), dtype=torch.int64).view(tensor.shape)
        start += tensor.numel()
    ours = from_open_clip(numbered)
    assert torch.equal(torch.cat([tensor.flatten() for tensor in ours.values()]).sort().values, torch.arange(start))


def test_masks_and_the_prefix_of_old_files_are_dropped() -> None:
    state = open_clip_coca("odd").state_dict()
    heads = SHAPES["odd"][3]
    old = {f"module.{key}": tensor for key, tensor in state.items()}
    old["module.text.attn_mask"] = old["module.text_decoder.attn_mask"] = torch.zeros(77, 77)
    assert dropped_keys(old) == ("module.text.attn_mask", "module.text_decoder.attn_mask")
    assert config_from_open_clip(old, **heads) == config_from_open_clip(state, **heads)
    expected, converted = from_open_clip(state), from_open_clip(old)
    assert converted.keys() == expected.keys()
    assert all(torch.equal(converted[key], tensor) for key, tensor in expected.items())


def test_missing_and_unknown_keys_are_named() -> None:
    state = open_clip_coca("one-width").state_dict()
    for i in range(10):
        state[f"extra.{i}"] = torch.zeros(1)
    del state["text_decoder.cross_attn.1.ln_1_kv.bias"]
    with pytest.raises(
        ValueError, match=r"got text_decoder\.cross_attn\.1\.ln_1_kv\.bias missing, and extra\.0,"
    ) as error:
        from_open_clip(state)
    assert str(error.value).endswith("extra.7 and 2 more unknown.")
    ours = from_open_clip(open_clip_coca("one-width").state_dict())
    config = config_from_open_clip(open_clip_coca("one-width").state_dict())
    del ours["log_scale"]
    with pytest.raises(ValueError, match=r"a CoCa of this config and no others; got log_scale missing\.$"):
        to_open_clip(ours, config=config)


def test_a_tensor_of_another_shape_is_named() -> None:
    """open_clip's decoder takes no mlp_ratio from its config: here it does not fit the text tower's."""
    state = open_clip_coca("odd").state_dict()
    state["text_decoder.cross_attn.2.mlp.c_fc.weight"] = torch.zeros(192, 96)
    state["visual.proj"] = torch.zeros(96, 95)
    with pytest.raises(
        ValueError,
        match=r"shape \(96, 96\) of visual\.proj in an .*; got \(96, 95\), and 1 other tensors that do not fit",
    ):
        from_open_clip(state)


def test_a_whole_layer_missing_in_between_is_named() -> None:
    state = open_clip_coca("odd").state_dict()
    holed = {key: tensor for key, tensor in state.items() if not key.startswith("visual.transformer.resblocks.1.")}
    with pytest.raises(
        ValueError, match=r"got visual\.transformer\.resblocks\.1\.attn\.in_proj_bias, .* 4 more missing"
    ):
        from_open_clip(holed)


@pytest.mark.parametrize("attentional_pool", ["cascade", "parallel"])
def test_weights_of_coca2_are_refused_in_a_sentence(attentional_pool: str) -> None:
    state = open_clip_coca("one-width", attentional_pool=attentional_pool).state_dict()
    with pytest.raises(ValueError, match=r"of coca2, with two \(visual\.attn_pool_contrastive\.attn\.in_proj_bias, "):
        config_from_open_clip(state)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"visual.attn_pool.query": None}, r"with an attentional pooler, .* there is no visual\.attn_pool\.query"),
        ({"visual.positional_embedding": (6, 128)}, r"square images .* got 5 patches of 8 x 8 px"),
        ({"visual.conv1.weight": (128, 3, 8, 4)}, r"square patches; got 16 patches of 8 x 4 px"),
        ({"visual.conv1.weight": (100, 3, 8, 8)}, r"fails for width 100; give vision_heads"),
        ({"text.positional_embedding": (77, 100)}, r"fails for width 100; give text_heads"),
        ({"visual.conv1.weight": (128, 192)}, r"Expected 4 axes in visual\.conv1\.weight .* got shape \(128, 192\)"),
    ],
)
def test_other_weights_are_refused_in_a_sentence(change: dict[str, tuple[int, ...] | None], sentence: str) -> None:
    state = open_clip_coca("one-width").state_dict()
    for key, shape in change.items():
        del state[key]
        if shape is not None:
            state[key] = torch.zeros(shape)
    with pytest.raises(ValueError, match=sentence):
        config_from_open_clip(state)


def test_only_open_clips_wiring_can_go_back() -> None:
    config = config_from_open_clip(open_clip_coca("one-width").state_dict())
    corrected = replace(config, text=replace(config.text, cls_mask="correct"))
    for wrong, found in (
        (CoCaConfig.tiny(), "'poolers': 'cascade'"),
        (corrected, "'cls_mask': 'correct'"),
        (replace(config, image=replace(config.image, final_norm=True)), "'final_norm': True"),
    ):
        with pytest.raises(ValueError, match=f"wired as open_clip's: .*{found}"):
            to_open_clip({}, config=wrong)


@pytest.mark.slow
def test_whole_coca_vit_b_32_equals_open_clip() -> None:
    config = open_clip.get_model_config("coca_ViT-B-32")
    config.pop("custom_text")
    theirs = randomised(coca_model.CoCa(**config))
    assert_equal_outputs(theirs, ours_of(theirs, heads={}), tokens=captions(5, 76), atol=1e-5)
