"""open_clip's CoCa weights and ours, both ways: one table of names, tensors in and tensors out, no files.

open_clip (LAION's released weights) has one pooler whose first query is the embedding, two MLPs in a multimodal layer,
a class token, a norm before the encoder's blocks and none after them. Its attention packs query, key and value
projections in one tensor, and matrices that it applies as x @ P are Linear weights here, P transposed.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import VitConfig
from coca_video.models.text import TextConfig

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training images; open_clip normalises with them
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # of every encoder and decoder that open_clip has released
POOLER_HEADS = (
    8  # open_clip reads vision_cfg.attn_pooler_heads, 8 everywhere; the 12 of coca_ViT-L-14's decoder is unused
)
NAMES_IN_A_MESSAGE = 8


@dataclass(frozen=True)
class Row:
    """One key of open_clip, the keys of ours that hold the same numbers, and how the tensors differ.

    `token` is [width] there and [1, 1, width] here, `tokens` [n, width] and [1, n, width]; `transposed` swaps axes;
    `packed` is one tensor there and equal parts of it, along the first axis, here.
    """

    theirs: str
    ours: tuple[str, ...]
    how: Literal["same", "token", "tokens", "transposed", "packed"] = "same"


def config_from_open_clip(
    state: Mapping[str, Tensor],
    *,
    vision_heads: int | None = None,
    text_heads: int | None = None,
    pooler_heads: int = POOLER_HEADS,
) -> CoCaConfig:
    """The architecture of open_clip's CoCa weights, from shapes alone.

    Heads leave no trace in shapes: None is one head for each 64 of width, and the pooler has 8, as in all released
    weights; a wrong number loads, and computes something else. ValueError where the weights are of another model.
    """
    state = _stripped(state)
    _check_single_pooler(state)
    num_positions, text_width = _shape(state, "text.positional_embedding", num_axes=2)
    text = TextConfig(
        width=text_width,
        num_heads=_heads(text_width, given=text_heads, name="text_heads"),
        mlp_width=_shape(state, "text.transformer.resblocks.0.mlp.c_fc.weight", num_axes=2)[0],
        num_unimodal_layers=_count_layers(state, "text.transformer.resblocks"),
        num_multimodal_layers=_count_layers(state, "text_decoder.resblocks"),
        vocab_size=_shape(state, "text.token_embedding.weight", num_axes=2)[0],
        max_length=num_positions - 1,  # the last position is the CLS's
        multimodal_layer="open_clip",
        cls_mask="open_clip",
    )
    return CoCaConfig(
        image=_vision_config(state, heads=vision_heads),
        text=text,
        num_queries=_shape(state, "visual.attn_pool.query", num_axes=2)[0],
        poolers="open_clip",
        pooler_heads=pooler_heads,
    )


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict for `CoCa(config_from_open_clip(state))`: the same numbers in the same dtype, views where it can be.

    What `dropped_keys` lists is left out. ValueError, naming keys, where some are missing, unknown or of another shape.
    """
    state = _stripped(state)
    config = config_from_open_clip(state, vision_heads=1, text_heads=1, pooler_heads=1)  # heads change no name or shape
    table = tuple(_table(config))
    _check_keys(state, expected={row.theirs for row in table}, whose="an open_clip CoCa")
    _check_shapes(state, table=table, config=config)
    ours: dict[str, Tensor] = {}
    for row in table:
        ours.update(zip(row.ours, _to_ours(state[row.theirs], row=row), strict=True))
    return ours


def to_open_clip(state: Mapping[str, Tensor], *, config: CoCaConfig) -> dict[str, Tensor]:
    """The way back: our state dict with open_clip's names and shapes, bit for bit what `from_open_clip` was given.

    ValueError where open_clip's CoCa cannot be such a model, or the keys are not those of `config`.
    """
    table = tuple(_table(config))
    _check_keys(state, expected={name for row in table for name in row.ours}, whose="a CoCa of this config")
    return {row.theirs: _to_theirs([state[name] for name in row.ours], row=row) for row in table}


def dropped_keys(state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Keys of open_clip's state that hold no weights: causal masks, which old files carry as buffers."""
    return tuple(key for key in state if _is_mask(key))


def _is_mask(key: str) -> bool:
    return key.rpartition(".")[2] == "attn_mask"


def _stripped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without masks, and without the `module.` that DistributedDataParallel put in front of every name."""
    wrapped = bool(state) and all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state.items() if not _is_mask(key)}


def _table(config: CoCaConfig) -> Iterator[Row]:
    """Every key of open_clip's CoCa of these sizes, once."""
    image, text = _check_wiring(config), config.text
    yield Row("logit_scale", ("log_scale",))
    yield from _vision_rows(image.depth)
    yield from _pooler_rows(packed=image.width == text.width)
    yield Row("text.token_embedding.weight", ("unimodal.token_embedding.weight",))
    yield Row("text.positional_embedding", ("unimodal.position_embedding",))
    yield Row("text.cls_emb", ("unimodal.cls_embedding",))
    for i in range(text.num_unimodal_layers):
        names = ("self_attention", "norm_self", "norm_mlp", "mlp")
        yield from _block_rows(f"text.transformer.resblocks.{i}", f"unimodal.layers.{i}", names=names)
    yield from _affine("text.ln_final", "unimodal.norm_cls")
    yield Row("text.text_projection", ("unimodal.projection.weight",), "transposed")
    for i in range(text.num_multimodal_layers):
        yield from _multimodal_rows(i)
    yield from _affine("text_decoder.ln_final", "multimodal.norm")
    yield Row("text_decoder.text_projection", ("vocabulary.weight",), "transposed")


def _vision_rows(num_layers: int) -> Iterator[Row]:
    """The encoder, which is timm's here and packs queries, keys and values as open_clip's does."""
    ours = "encoder.model"
    yield Row("visual.class_embedding", (f"{ours}.cls_token",), "token")
    yield Row("visual.positional_embedding", (f"{ours}.pos_embed",), "tokens")
    yield Row("visual.conv1.weight", (f"{ours}.patch_embed.proj.weight",))
    yield from _affine("visual.ln_pre", f"{ours}.norm_pre")
    for i in range(num_layers):
        block, their_block = f"{ours}.blocks.{i}", f"visual.transformer.resblocks.{i}"
        yield from _affine(f"{their_block}.ln_1", f"{block}.norm1")
        yield from _affine(f"{their_block}.attn.in_proj_", f"{block}.attn.qkv.", join="")
        yield from _affine(f"{their_block}.attn.out_proj", f"{block}.attn.proj")
        yield from _affine(f"{their_block}.ln_2", f"{block}.norm2")
        yield from _affine(f"{their_block}.mlp.c_fc", f"{block}.mlp.fc1")
        yield from _affine(f"{their_block}.mlp.c_proj", f"{block}.mlp.fc2")


def _pooler_rows(*, packed: bool) -> Iterator[Row]:
    """The one pooler and the projection of its first query."""
    theirs, ours = "visual.attn_pool", "generative_pooler"
    yield Row(f"{theirs}.query", (f"{ours}.query",))
    yield from _affine(f"{theirs}.ln_q", f"{ours}.norm_query")
    yield from _affine(f"{theirs}.ln_k", f"{ours}.norm_context")
    yield from _attention_rows(f"{theirs}.attn", f"{ours}.attention", packed=packed)
    yield from _affine("visual.ln_post", f"{ours}.norm_out")
    yield Row("visual.proj", ("image_projection.weight",), "transposed")


def _multimodal_rows(i: int) -> Iterator[Row]:
    """One layer of ours is two blocks of theirs, in two lists: self-attention, then cross-attention."""
    ours = f"multimodal.layers.{i}"
    yield from _block_rows(
        f"text_decoder.resblocks.{i}", ours, names=("self_attention", "norm_self", "norm_self_mlp", "self_mlp")
    )
    yield from _block_rows(
        f"text_decoder.cross_attn.{i}", ours, names=("cross_attention", "norm_cross", "norm_mlp", "mlp")
    )
    yield from _affine(f"text_decoder.cross_attn.{i}.ln_1_kv", f"{ours}.norm_context")


def _block_rows(theirs: str, ours: str, *, names: tuple[str, str, str, str]) -> Iterator[Row]:
    """One residual block of a decoder; `names` are ours: attention, the norm before it, the MLP's norm, the MLP."""
    attention, norm_attention, norm_mlp, mlp = (f"{ours}.{name}" for name in names)
    yield from _affine(f"{theirs}.ln_1", norm_attention)
    yield from _attention_rows(f"{theirs}.attn", attention, packed=True)
    yield from _affine(f"{theirs}.ln_2", norm_mlp)
    yield from _affine(f"{theirs}.mlp.c_fc", f"{mlp}.0")
    yield from _affine(f"{theirs}.mlp.c_proj", f"{mlp}.2")


def _attention_rows(theirs: str, ours: str, *, packed: bool) -> Iterator[Row]:
    """torch.nn.MultiheadAttention, which packs weights only if queries and keys have one width; biases always."""
    projections = ("q_proj", "k_proj", "v_proj")
    if packed:
        yield Row(f"{theirs}.in_proj_weight", tuple(f"{ours}.{name}.weight" for name in projections), "packed")
    else:
        yield from (Row(f"{theirs}.{name}_weight", (f"{ours}.{name}.weight",)) for name in projections)
    yield Row(f"{theirs}.in_proj_bias", tuple(f"{ours}.{name}.bias" for name in projections), "packed")
    yield from _affine(f"{theirs}.out_proj", f"{ours}.out_proj")


def _affine(theirs: str, ours: str, *, join: str = ".") -> Iterator[Row]:
    """Weight and bias of a norm or a Linear."""
    for name in ("weight", "bias"):
        yield Row(f"{theirs}{join}{name}", (f"{ours}{join}{name}",))


def _to_ours(tensor: Tensor, *, row: Row) -> tuple[Tensor, ...]:
    match row.how:
        case "same":
            return (tensor,)
        case "token" | "tokens":
            return (tensor.reshape(1, -1, tensor.shape[-1]),)
        case "transposed":
            return (tensor.T,)
        case "packed":
            return tensor.chunk(len(row.ours))


def _to_theirs(tensors: list[Tensor], *, row: Row) -> Tensor:
    match row.how:
        case "same":
            return tensors[0]
        case "token":
            return tensors[0].flatten()
        case "tokens":
            return tensors[0].flatten(0, 1)
        case "transposed":
            return tensors[0].T
        case "packed":
            return torch.cat(tensors)


def _vision_config(state: Mapping[str, Tensor], *, heads: int | None) -> VitConfig:
    width, _, patch_height, patch_width = _shape(state, "visual.conv1.weight", num_axes=4)
    num_patches = _shape(state, "visual.positional_embedding", num_axes=2)[0] - 1
    grid = math.isqrt(num_patches)
    if grid * grid != num_patches or patch_height != patch_width:
        raise ValueError(
            f"Expected square images of square patches; got {num_patches} patches of {patch_height} x {patch_width} px."
        )
    return VitConfig(
        width=width,
        depth=_count_layers(state, "visual.transformer.resblocks"),
        num_heads=_heads(width, given=heads, name="vision_heads"),
        mlp_width=_shape(state, "visual.transformer.resblocks.0.mlp.c_fc.weight", num_axes=2)[0],
        image_size=grid * patch_height,
        patch_size=patch_height,
        class_token=True,
        pre_norm=True,
        final_norm=False,
        norm_eps=1e-5,
        mean=OPENAI_MEAN,
        std=OPENAI_STD,
        interpolation="bicubic",
    )


def _check_single_pooler(state: Mapping[str, Tensor]) -> None:
    second_pooler = [key for key in state if key.startswith("visual.attn_pool_contrastive.")]
    if second_pooler:
        raise ValueError(
            "Expected open_clip's CoCa with one pooler, as released; these weights are of coca2, with two "
            f"({_listed(second_pooler)}) that have no norm after them as ours have, so they cannot be converted."
        )


def _check_wiring(config: CoCaConfig) -> VitConfig:
    """The encoder's config; ValueError where open_clip's CoCa has no such wiring."""
    image, text = config.image, config.text
    wiring = {"poolers": config.poolers, "multimodal_layer": text.multimodal_layer, "cls_mask": text.cls_mask}
    if not isinstance(image, VitConfig):
        raise ValueError(f"Expected an encoder by size, as open_clip's CoCa has; got {image}.")
    wiring_of_encoder = {name: getattr(image, name) for name in ("class_token", "pre_norm", "final_norm")}
    if set(wiring.values()) != {"open_clip"} or tuple(wiring_of_encoder.values()) != (True, True, False):
        raise ValueError(
            "Expected a CoCa wired as open_clip's: poolers, multimodal_layer and cls_mask open_clip, class_token and "
            f"pre_norm True, final_norm False; got {wiring | wiring_of_encoder}, which open_clip has no model for."
        )
    return image


def _shape(state: Mapping[str, Tensor], key: str, *, num_axes: int) -> tuple[int, ...]:
    if key not in state:
        raise ValueError(
            f"Expected the weights of an open_clip CoCa with an attentional pooler, such as coca_ViT-L-14; among these "
            f"{len(state)} tensors there is no {key}."
        )
    if state[key].ndim != num_axes:
        raise ValueError(
            f"Expected {num_axes} axes in {key} of an open_clip CoCa; got shape {tuple(state[key].shape)}."
        )
    return tuple(state[key].shape)


def _count_layers(state: Mapping[str, Tensor], prefix: str) -> int:
    """The highest index after `prefix`, plus one; layers missing below it are found by `_check_keys`."""
    found = (re.match(rf"{re.escape(prefix)}\.(\d+)\.", key) for key in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _heads(width: int, *, given: int | None, name: str) -> int:
    if given is None and width % HEAD_WIDTH:
        raise ValueError(
            f"Heads cannot be seen in weights and are taken as width / {HEAD_WIDTH}, which fails for width "
            f"{width}; give {name}."
        )
    return width // HEAD_WIDTH if given is None else given


def _check_keys(state: Mapping[str, Tensor], *, expected: set[str], whose: str) -> None:
    missing, unknown = expected - state.keys(), state.keys() - expected
    if missing or unknown:
        faults = [f"{_listed(keys)} {what}" for keys, what in ((missing, "missing"), (unknown, "unknown")) if keys]
        raise ValueError(f"Expected all weights of {whose} and no others; got " + ", and ".join(faults) + ".")


def _check_shapes(state: Mapping[str, Tensor], *, table: tuple[Row, ...], config: CoCaConfig) -> None:
    """Sizes are read off a few tensors: do the others fit? A CoCa without memory tells what they ought to be."""
    with torch.device("meta"):
        ours = CoCa(config).state_dict()
    expected = {row.theirs: _to_theirs([ours[name] for name in row.ours], row=row).shape for row in table}
    wrong = [key for key, shape in expected.items() if state[key].shape != shape]
    if wrong:
        others = f", and {len(wrong) - 1} other tensors that do not fit" if len(wrong) > 1 else ""
        raise ValueError(
            f"Expected shape {tuple(expected[wrong[0]])} of {wrong[0]} in an open_clip CoCa of this size; got "
            f"{tuple(state[wrong[0]].shape)}{others}."
        )


def _listed(keys: set[str] | list[str]) -> str:
    """The first of the names, in order, and how many more there are."""
    names = sorted(keys)
    more = f" and {len(names) - NAMES_IN_A_MESSAGE} more" if len(names) > NAMES_IN_A_MESSAGE else ""
    return ", ".join(names[:NAMES_IN_A_MESSAGE]) + more
