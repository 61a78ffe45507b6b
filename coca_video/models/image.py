"""The image encoder: a VisionTransformer by size, or any image model of timm by name; patch tokens out, no head."""

import copy
import inspect
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import partial
from typing import Any, Literal

import timm
import torch
from jaxtyping import Float
from timm.layers.norm import LayerNorm
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Triple = tuple[float, float, float]
Interpolation = Literal["bilinear", "bicubic"]

# What only classifies or pools, under the names that timm's models give it. (MobileNetV3's is in `drop_head`.)
HEADS = ("head", "fc_norm", "attn_pool", "pre_logits")


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A VisionTransformer by size. Images are `image_size` px squares cut into `patch_size` px patches.

    `mean` and `std` normalise RGB in [0, 1]; with `interpolation`, which resizes to `image_size`, they travel with the
    weights: an encoder sees pixels as in its training. `pre_norm` is a norm before the first block (CLIP's), in place
    of the patch projection's bias; `final_norm` the one after the last; `norm_eps` is of all norms.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    image_size: int = 288
    patch_size: int = 18
    class_token: bool = False
    pre_norm: bool = False
    final_norm: bool = True
    norm_eps: float = 1e-6
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"

    @classmethod
    def base(cls) -> "VitConfig":
        """CoCa-Base, 86M (arXiv 2205.01917, Table 1; 288 px and patch 18 from its section 4.1)."""
        return cls(width=768, depth=12, num_heads=12, mlp_width=3072)

    @classmethod
    def large(cls) -> "VitConfig":
        """CoCa-Large, 303M (Table 1)."""
        return cls(width=1024, depth=24, num_heads=16, mlp_width=4096)

    @classmethod
    def giant(cls) -> "VitConfig":
        """The 1B encoder of the paper's 2B CoCa (Table 1), ViT-giant of "Scaling Vision Transformers"."""
        return cls(width=1408, depth=40, num_heads=16, mlp_width=6144)

    @classmethod
    def tiny(cls) -> "VitConfig":
        """Width 96, 3 layers, 48 px, patch 8: trains in minutes on two CPU cores (issue 2)."""
        return cls(width=96, depth=3, num_heads=3, mlp_width=384, image_size=48, patch_size=8)


@dataclass(frozen=True, kw_only=True)
class TimmConfig:
    """An image model under timm's name, at `image_size` px: a ViT (CLIP, SigLIP, DINOv3, PE) or a CNN.

    A name may have a tag (`vit_base_patch16_siglip_224.webli`), or be a folder or repository of timm's layout
    (`local-dir:/path`, `hf-hub:org/name`). Built from the config alone its weights are fresh:
    `coca_video.load("timm:...")` gives the trained ones, and the normalisation that goes with them.
    """

    name: str
    image_size: int = 224
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)
    interpolation: Interpolation = "bilinear"


ImageConfig = VitConfig | TimmConfig


class ImageEncoder(nn.Module):
    """Images to patch tokens. `model` is timm's module, `width` the tokens' dimension, `config` what it was built from.

    `num_heads` is that of the attention inside; for a model without one, what suits attention over its tokens.
    """

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.model: Any = _build_vit(config) if isinstance(config, VitConfig) else _build_timm(config)
        self.width: int = self.model.num_features
        self.num_heads = _num_heads(self.model, width=self.width)

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        *,
        prefix_tokens: bool = False,
        layers: tuple[int, ...] = (),
    ) -> Float[Tensor, "batch patches dim"]:
        """Normalised images at `config.image_size` to the tokens that timm's `forward_features` gives, row by row.

        Class and register tokens, where the model has them, are left out, or stand in front with `prefix_tokens`.
        A CNN's tokens are the places of its last feature map. With `layers` they are the outputs of these blocks (from
        0; -1 is the last), each through the model's final norm, one layer's tokens behind another's; what comes after
        the last of them is not computed. ValueError where the model has no such blocks.
        """
        if layers:
            return self._forward_layers(images, prefix_tokens=prefix_tokens, layers=layers)
        features = self.model.forward_features(images)
        if not isinstance(features, Tensor) or features.ndim not in (3, 4):
            raise ValueError(_no_tokens(self.config))
        if features.ndim == 4:
            is_channels_last = getattr(self.model, "output_fmt", "NCHW") == "NHWC"
            features = features.flatten(1, 2) if is_channels_last else features.flatten(2).transpose(1, 2)
        if features.shape[-1] != self.width:  # SelecSLS calls a part of its backbone a head
            raise ValueError(_no_tokens(self.config))
        return features if prefix_tokens else features[:, getattr(self.model, "num_prefix_tokens", 0) :]

    def _forward_layers(
        self, images: Float[Tensor, "batch 3 height width"], *, prefix_tokens: bool, layers: tuple[int, ...]
    ) -> Float[Tensor, "batch patches dim"]:
        numbers = self.check_layers(layers)
        outputs = self.model.forward_intermediates(
            images,
            indices=sorted(numbers),
            norm=True,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
            return_prefix_tokens=prefix_tokens,
        )
        if prefix_tokens and self.model.num_prefix_tokens:
            outputs = [torch.cat([prefix, patches], dim=1) for patches, prefix in outputs]
        by_number = dict(zip(sorted(numbers), outputs, strict=True))
        return torch.cat([by_number[number] for number in numbers], dim=1)

    def check_layers(self, layers: tuple[int, ...]) -> tuple[int, ...]:
        """`layers` counted from 0. ValueError for one that is not there or comes twice, and for a model without any."""
        depth = len(self.blocks())
        if layers and (depth == 0 or not _gives_layers(self.model)):
            raise ValueError(f"{_name(self.config)} has no layers to choose from; leave encoder_layers empty.")
        numbers = tuple(layer + depth if layer < 0 else layer for layer in layers)
        if len(set(numbers)) != len(numbers) or not all(0 <= number < depth for number in numbers):
            raise ValueError(
                f"{_name(self.config)} has {depth} layers, counted from 0, or from the last as -1; expected different "
                f"ones of these, got encoder_layers {layers}."
            )
        return numbers

    def blocks(self) -> list[nn.Module]:
        """The transformer blocks in order; none for a CNN and for a model that has its blocks in stages."""
        blocks = list(getattr(self.model, "blocks", ()))
        return blocks if all(hasattr(block, "attn") for block in blocks) else []


def check_timm_name(name: str) -> None:
    """ValueError, with near names, when timm knows no such architecture or no such tag of it."""
    source, colon, place = name.partition(":")
    if colon:
        if source not in ("hf-hub", "local-dir") or not place:
            raise ValueError(f"Expected a name of timm, hf-hub:org/name or local-dir:/path; got {name!r}.")
        return
    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = ", ".join(get_close_matches(architecture, timm.list_models(), n=3))
        raise ValueError(f"timm has no model named {name!r}; expected a name such as {near or 'vit_base_patch16_224'}.")
    known = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in known:
        raise ValueError(f"timm has no weights named {name!r}; expected one of: {', '.join(known) or architecture}.")


def drop_head(model: nn.Module, *, name: str) -> None:
    """Takes from a timm model all that only classifies or pools, so that every parameter left has a part in the tokens.

    ValueError for a model that cannot do without.
    """
    try:
        model.reset_classifier(0, "")  # type: ignore[operator]
    except AssertionError as error:  # timm's way to say that it pools by class token or average only
        raise ValueError(f"{name} gives no patch tokens ({error}); expected a model such as a ViT or a CNN.") from error
    for part in (*HEADS, *(("conv_head", "norm_head") if hasattr(model, "norm_head") else ())):
        if isinstance(getattr(model, part, None), nn.Module):
            setattr(model, part, nn.Identity())


def _build_vit(config: VitConfig) -> Any:
    """The timm module: no head, no pooling. ValueError for a size that cannot be had."""
    _check_patches(config.image_size, config.patch_size)
    if config.depth < 1:
        raise ValueError(f"An encoder needs a depth of at least 1; got {config.depth}.")
    if config.width % config.num_heads:
        raise ValueError(f"The heads must divide the width; got {config.num_heads} heads and {config.width}.")
    return VisionTransformer(
        img_size=config.image_size,
        patch_size=config.patch_size,
        embed_dim=config.width,
        depth=config.depth,
        num_heads=config.num_heads,
        mlp_ratio=(config.mlp_width + 0.5) / config.width,  # timm cuts width * ratio: half keeps it exact
        class_token=config.class_token,
        pre_norm=config.pre_norm,
        final_norm=config.final_norm,
        norm_layer=partial(LayerNorm, eps=config.norm_eps),
        global_pool="",
        num_classes=0,
    )


def _build_timm(config: TimmConfig) -> Any:
    """The module of timm without its head, freshly initialised. ValueError for a name or a size that cannot be had."""
    check_timm_name(config.name)
    known = None if ":" in config.name else timm.get_pretrained_cfg(config.name)
    try:
        if known is not None and known.fixed_input_size:
            model = timm.create_model(config.name, num_classes=0, img_size=config.image_size)
        else:
            model = timm.create_model(config.name, num_classes=0)
            _resize(model, image_size=config.image_size)
    except FileNotFoundError as error:
        raise ValueError(f"{config.name} cannot be read: {str(error).splitlines()[0]}.") from error
    drop_head(model, name=config.name)
    if isinstance(getattr(model, "cls_token", None), nn.Parameter) and not hasattr(model, "num_prefix_tokens"):
        raise ValueError(_no_tokens(config))  # its class token could not be told from its patches (VOLO, PiT)
    if (patch_size := _patch_size(model)) is not None:
        _check_patches(config.image_size, patch_size)
    return model


def _no_tokens(config: ImageConfig) -> str:
    return f"{_name(config)} gives neither patch tokens nor one feature map; expected a model such as a ViT or a CNN."


def _name(config: ImageConfig) -> str:
    return config.name if isinstance(config, TimmConfig) else "This encoder"


def _num_heads(model: Any, *, width: int) -> int:
    """Those of a model's first attention, else the divisor of `width` that comes nearest to 64 dimensions a head."""
    attention = getattr(next(iter(getattr(model, "blocks", ())), None), "attn", None)
    num_heads = getattr(attention, "num_heads", None)
    if isinstance(num_heads, int) and width % num_heads == 0:
        return num_heads
    return min((number for number in range(1, width + 1) if width % number == 0), key=lambda n: abs(n - width / 64))


def _gives_layers(model: Any) -> bool:
    """Whether timm gives its blocks as tokens: not with class-attention (CaiT), maps (SAM) or stages (Hiera)."""
    parameters = inspect.signature(getattr(model, "forward_intermediates", lambda: None)).parameters
    return {"return_prefix_tokens", "norm", "stop_early"} <= parameters.keys() and hasattr(model, "num_prefix_tokens")


def _patch_size(model: Any) -> int | None:
    """In px; None for a model that is not cut into patches."""
    ratio = getattr(getattr(model, "patch_embed", None), "feat_ratio", None)
    return None if ratio is None else int(ratio())


def _check_patches(image_size: int, patch_size: int) -> None:
    if image_size % patch_size or image_size < patch_size:
        raise ValueError(
            f"The image size must be a multiple of the patch size {patch_size} px; got {image_size} px. "
            f"Take {max(1, image_size // patch_size) * patch_size} or {(image_size // patch_size + 1) * patch_size}."
        )


def _resize(model: Any, *, image_size: int) -> None:
    if hasattr(model, "set_input_size"):
        if (patch_size := _patch_size(model)) is not None:
            _check_patches(image_size, patch_size)
        model.set_input_size(img_size=(image_size, image_size))
    elif model.pretrained_cfg.get("fixed_input_size") and model.pretrained_cfg["input_size"][-1] != image_size:
        name, size = model.pretrained_cfg["architecture"], model.pretrained_cfg["input_size"][-1]
        raise ValueError(
            f"timm cannot change the image size of {name} once it is built; take {size} px, got {image_size}."
        )


@torch.no_grad()
def resize_encoder(encoder: ImageEncoder, *, image_size: int) -> None:
    """Makes `encoder` take `image_size` px.

    A position embedding is resampled (bicubic, antialiased; timm's rule), rotary positions are those of the new grid,
    a CNN takes any size as it is. ValueError for the few models of timm that are built for one size.
    """
    if image_size == encoder.config.image_size:
        return
    _resize(encoder.model, image_size=image_size)
    encoder.config = replace(encoder.config, image_size=image_size)


@torch.no_grad()
def fold_normalization(encoder: ImageEncoder) -> ImageEncoder:
    """A frozen encoder that takes pixels as they are: floats 0 to 255 in place of (x / 255 - mean) / std.

    Its patch embedding has weight' = weight / (255 std), bias' = bias - sum(weight mean / std) over the kernel, and a
    bias where there was none; all other weights are shared with `encoder`, which stays as it is. Its `config` says so
    with mean 0 and std 1/255, for which the normalisation changes nothing. It is for computing, not for saving: save
    `encoder`.

    What it saves is memory traffic. Under bf16 autocast a value read as uint8 moves 21 bytes until the convolution has
    it (to fp32, scaled and shifted, to bf16), and 5 as `frames_u8.to(torch.bfloat16)`, which is exact: bf16 holds
    every whole number up to 256. For 16 frames of 224 px these are 51 and 12 MB a clip.

    Equal to normalising first up to rounding: tokens within 1e-5 in fp32. In bf16 the input is no longer rounded, but
    the weights' rounding now weighs on pixels that are not centred: patch embeddings are off by 0.4 to 0.6% of their
    norm in place of 0.3%, tokens by 0.5 to 0.7% in place of 0.3 to 0.4% (random weights, width 192, noise and smooth
    images).

    ValueError for an encoder that is not frozen (in training the scale of the weights would change their steps), and
    for one without a plain patch embedding: zero padding stands for the mean before folding and for black after it.
    """
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        raise ValueError("Only a frozen encoder can be folded; call encoder.requires_grad_(False) first.")
    _check_foldable(encoder)
    # Copies modules, not tensors: an encoder of 1B parameters is not held twice.
    shared = {id(tensor): tensor for tensor in (*encoder.parameters(), *encoder.buffers())}
    folded = copy.deepcopy(encoder, shared)
    projection = folded.model.patch_embed.proj
    weight, config = projection.weight.double(), encoder.config
    mean, std = (torch.tensor(x, dtype=torch.float64, device=weight.device) for x in (config.mean, config.std))
    bias = 0.0 if projection.bias is None else projection.bias.double()
    bias = bias - torch.einsum("oihw,i->o", weight, mean / std)
    weight = weight / (255 * std).view(1, 3, 1, 1)
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = nn.Parameter(value.to(projection.weight.dtype), requires_grad=False)
        projection.register_parameter(name, parameter)
    folded.config = replace(config, mean=(0.0, 0.0, 0.0), std=(1 / 255, 1 / 255, 1 / 255))
    return folded


def _check_foldable(encoder: ImageEncoder) -> None:
    """ValueError unless pixels reach the model through one unpadded convolution."""
    patch_embed = getattr(encoder.model, "patch_embed", None)
    projection = getattr(patch_embed, "proj", None)
    if (
        not isinstance(patch_embed, PatchEmbed)
        or type(projection) is not nn.Conv2d
        or projection.in_channels != len(encoder.config.mean)
        or projection.groups != 1
    ):
        raise ValueError(
            f"{_name(encoder.config)} has no plain patch embedding to fold the normalisation into; normalise."
        )
    if projection.padding not in ((0, 0), "valid") or patch_embed.dynamic_img_pad:
        raise ValueError(
            f"{_name(encoder.config)} pads its input with zeros, so that folding its normalisation would not be exact; "
            "normalise."
        )
