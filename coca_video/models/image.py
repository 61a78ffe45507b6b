"""The image encoder: a timm VisionTransformer, by size or by timm's name; patch tokens out, no class token, no head."""

from dataclasses import dataclass, replace

import timm
import torch
from jaxtyping import Float
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class VitConfig:
    """A VisionTransformer by size. Images are `image_size` px squares cut into `patch_size` px patches.

    `mean` and `std` normalise RGB in [0, 1] and travel with the weights: an encoder sees pixels as in its training.
    """

    width: int
    depth: int
    num_heads: int
    mlp_width: int
    image_size: int = 288
    patch_size: int = 18
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)

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
class TimmVitConfig:
    """A VisionTransformer under timm's name (`vit_small_patch16_224`), freshly initialised, at `image_size` px."""

    name: str
    image_size: int = 224
    mean: Triple = (0.5, 0.5, 0.5)
    std: Triple = (0.5, 0.5, 0.5)


ImageConfig = VitConfig | TimmVitConfig


class ImageEncoder(nn.Module):
    """Images to patch tokens. `width` is the tokens' dimension, `patch_size` in px, `config` what it was built from."""

    def __init__(self, config: ImageConfig) -> None:
        super().__init__()
        self.config = config
        self.vit = _build_vit(config)
        self.width: int = self.vit.embed_dim
        self.num_heads: int = self.vit.blocks[0].attn.num_heads  # type: ignore[union-attr, assignment]

    def forward(self, images: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch patches dim"]:
        """Normalised images at `config.image_size` to the tokens after the final norm, row by row of patches."""
        tokens: Tensor = self.vit.forward_features(images)
        return tokens


def _build_vit(config: ImageConfig) -> VisionTransformer:
    """The timm module: no class token, no head, no pooling. ValueError for a name or a size that cannot be had."""
    match config:
        case VitConfig():
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
                class_token=False,
                global_pool="",
                num_classes=0,
            )
        case TimmVitConfig():
            return _build_named_vit(config)


def _build_named_vit(config: TimmVitConfig) -> VisionTransformer:
    if not timm.is_model(config.name):
        near = ", ".join(timm.list_models(f"*{config.name.split('_')[0]}*")[:3])
        raise ValueError(
            f"timm has no model named {config.name!r}; expected a name such as {near or 'vit_base_patch16_224'}."
        )
    if not timm.models.is_model_in_modules(config.name, ["vision_transformer"]):
        raise ValueError(
            f"{config.name!r} is not a VisionTransformer of timm; expected a name such as vit_base_patch16_224."
        )
    vit = timm.create_model(
        config.name, img_size=config.image_size, class_token=False, global_pool="", num_classes=0, reg_tokens=0
    )
    assert isinstance(vit, VisionTransformer)
    _check_patches(config.image_size, vit.patch_embed.patch_size[0])
    return vit


def _check_patches(image_size: int, patch_size: int) -> None:
    if image_size % patch_size or image_size < patch_size:
        raise ValueError(
            f"The image size must be a multiple of the patch size {patch_size} px; got {image_size} px. "
            f"Take {max(1, image_size // patch_size) * patch_size} or {(image_size // patch_size + 1) * patch_size}."
        )


@torch.no_grad()
def resize_encoder(encoder: ImageEncoder, *, image_size: int) -> None:
    """Makes `encoder` take `image_size` px: its position embedding is resampled (bicubic, antialiased; timm's rule)."""
    patch_size = encoder.vit.patch_embed.patch_size[0]
    _check_patches(image_size, patch_size)
    encoder.vit.set_input_size(img_size=(image_size, image_size))
    encoder.config = replace(encoder.config, image_size=image_size)
