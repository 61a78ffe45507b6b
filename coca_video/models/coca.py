"""CoCa (arXiv 2205.01917): image encoder, cascade of two attentional poolers, unimodal and multimodal text decoder."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coca_video.models.image import ImageConfig, ImageEncoder, VitConfig
from coca_video.models.pooler import AttentionalPooler
from coca_video.models.text import MultimodalDecoder, TextConfig, UnimodalDecoder

INITIAL_TEMPERATURE = 0.07  # CoCa section 3.2
MAX_SCALE = 100.0  # 1 / temperature never grows past this: CLIP's bound, against a run-away softmax


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Sizes of a CoCa. `num_queries` is the generative pooler's; the contrastive pooler has one."""

    image: ImageConfig
    text: TextConfig
    num_queries: int = 256

    @classmethod
    def base(cls) -> "CoCaConfig":
        """CoCa-Base, 383M (Table 1). The vocabulary is the paper's; it does not state the text's length: 64 is ours."""
        return cls(
            image=VitConfig.base(),
            text=TextConfig(width=768, num_heads=12, mlp_width=3072, num_unimodal_layers=12, num_multimodal_layers=12),
        )

    @classmethod
    def large(cls) -> "CoCaConfig":
        """CoCa-Large, 787M (Table 1)."""
        return cls(
            image=VitConfig.large(),
            text=TextConfig(width=1024, num_heads=16, mlp_width=4096, num_unimodal_layers=12, num_multimodal_layers=12),
        )

    @classmethod
    def giant(cls) -> "CoCaConfig":
        """The paper's 2B CoCa (Table 1)."""
        return cls(
            image=VitConfig.giant(),
            text=TextConfig(width=1408, num_heads=16, mlp_width=5632, num_unimodal_layers=18, num_multimodal_layers=18),
        )

    @classmethod
    def tiny(cls) -> "CoCaConfig":
        """Width 96, 3 encoder and 1 + 1 decoder layers: the quickstart's, minutes on two CPU cores (issue 2)."""
        text = TextConfig(
            width=96,
            num_heads=3,
            mlp_width=384,
            num_unimodal_layers=1,
            num_multimodal_layers=1,
            vocab_size=512,
            max_length=32,
        )
        return cls(image=VitConfig.tiny(), text=text, num_queries=8)


@dataclass(frozen=True, kw_only=True)
class CoCaOutput:
    """What the losses need: unit-length embeddings, the scale of their similarities, logits for the next token."""

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    scale: Float[Tensor, ""]
    logits: Float[Tensor, "batch length vocabulary"]


class CoCa(nn.Module):
    """Contrastive captioner, wired as the paper's default: a cascade of the generative and the contrastive pooler."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width, num_heads = config.text.width, config.text.num_heads
        self.config = config
        self.encoder = ImageEncoder(config.image)
        self.generative_pooler = AttentionalPooler(
            width, num_heads=num_heads, num_queries=config.num_queries, context_dim=self.encoder.width
        )
        self.contrastive_pooler = AttentionalPooler(width, num_heads=num_heads, num_queries=1)
        self.unimodal = UnimodalDecoder(config.text)
        self.multimodal = MultimodalDecoder(config.text)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(INITIAL_TEMPERATURE)))

    @property
    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature."""
        return self.log_scale.exp()

    @torch.no_grad()
    def bound_scale(self) -> None:
        """Brings the scale back to `MAX_SCALE` after an update; a clamp in the forward would have no gradient there."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def encode_image(
        self, images: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch queries dim"]]:
        """Normalised images to (unit-length embedding, image tokens for the multimodal decoder)."""
        image_tokens = self.generative_pooler(self.encoder(images))
        embedding = self.contrastive_pooler(image_tokens).squeeze(1)
        return F.normalize(embedding.float(), dim=-1), image_tokens

    def encode_text(
        self, tokens: Int[Tensor, "batch length"], *, mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length dim"]]:
        """Tokens to (unit-length embedding, features for the multimodal decoder); `mask` is True for real tokens."""
        embedding, features = self.unimodal(tokens, mask=mask)
        return F.normalize(embedding.float(), dim=-1), features

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        *,
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> CoCaOutput:
        """One pass over images and their captions (pairs stand in the same row)."""
        image, image_tokens = self.encode_image(images)
        text, features = self.encode_text(tokens, mask=mask)
        logits = self.multimodal(features, image_tokens=image_tokens, mask=mask)
        return CoCaOutput(image=image, text=text, scale=self.scale, logits=logits)


def count_parameters(model: CoCa) -> dict[str, int]:
    """Parameters of the encoder, of the decoder (both halves) and of the poolers, which Table 1 does not list."""

    def count(*modules: nn.Module) -> int:
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    return {
        "encoder": count(model.encoder),
        "decoder": count(model.unimodal, model.multimodal),
        "poolers": count(model.generative_pooler, model.contrastive_pooler),
    }
