"""CoCa (arXiv 2205.01917): image encoder, attentional poolers, unimodal and multimodal text decoder, vocabulary."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coca_video.models.image import ImageConfig, ImageEncoder, VitConfig
from coca_video.models.pooler import AttentionalPooler
from coca_video.models.text import MultimodalDecoder, TextConfig, UnimodalDecoder
from coca_video.models.vocabulary import TokenLoss, VocabularyProjection

INITIAL_TEMPERATURE = 0.07  # CoCa section 3.2
MAX_SCALE = 100.0  # 1 / temperature never grows past this: CLIP's bound, against a run-away softmax


@dataclass(frozen=True, kw_only=True)
class CoCaConfig:
    """Sizes and wiring of a CoCa."""

    image: ImageConfig
    text: TextConfig
    num_queries: int = 256
    """Of the generative pooler; the contrastive pooler has one."""
    poolers: Literal["cascade", "parallel", "open_clip"] = "cascade"
    """The contrastive pooler attends over the generative pooler's output (the paper's default), or beside it over the
    encoder's tokens (its ablation, Table 8f); or, as in open_clip's released weights, one pooler's first query is the
    embedding and the others go to the decoder."""
    pooler_heads: int | None = None
    """Heads of both poolers; the text decoder's when None."""

    def __post_init__(self) -> None:
        if self.poolers == "open_clip" and self.num_queries < 2:
            raise ValueError(
                f"With poolers open_clip the first query is the embedding: it takes 2 or more; got {self.num_queries}."
            )

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


class CoCaOutput(NamedTuple):
    """What the losses need: unit-length embeddings, the scale of their similarities, the loss of the next tokens.

    A NamedTuple, so that what wraps the model over ranks finds the tensors in it.
    """

    image: Float[Tensor, "batch dim"]
    text: Float[Tensor, "batch dim"]
    scale: Float[Tensor, ""]
    caption: TokenLoss


class CoCa(nn.Module):
    """Contrastive captioner: `encode_image`, `encode_text`, and both losses' inputs in one forward."""

    def __init__(self, config: CoCaConfig) -> None:
        super().__init__()
        width = config.text.width
        heads = config.text.num_heads if config.pooler_heads is None else config.pooler_heads
        self.config = config
        self.encoder = ImageEncoder(config.image)
        self.generative_pooler = AttentionalPooler(
            width, num_heads=heads, num_queries=config.num_queries, context_dim=self.encoder.width
        )
        self.contrastive_pooler: AttentionalPooler | None = None
        self.image_projection: nn.Linear | None = None
        if config.poolers == "open_clip":
            self.image_projection = nn.Linear(width, width, bias=False)
            nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        else:
            context_dim = width if config.poolers == "cascade" else self.encoder.width
            self.contrastive_pooler = AttentionalPooler(width, num_heads=heads, num_queries=1, context_dim=context_dim)
        self.unimodal = UnimodalDecoder(config.text)
        self.multimodal = MultimodalDecoder(config.text)
        self.vocabulary = VocabularyProjection(width, vocab_size=config.text.vocab_size)
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
        return self.pool(self.encoder(images, prefix_tokens=self.config.poolers == "open_clip"))

    def pool(
        self, tokens: Float[Tensor, "batch tokens encoder_dim"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch queries dim"]]:
        """The encoder's tokens, of one image or of several frames, to what `encode_image` gives."""
        image_tokens = self.generative_pooler(tokens)
        if self.image_projection is not None:  # open_clip
            return _unit(self.image_projection(image_tokens[:, 0])), image_tokens[:, 1:]
        assert self.contrastive_pooler is not None
        embedding = self.contrastive_pooler(image_tokens if self.config.poolers == "cascade" else tokens)
        return _unit(embedding.squeeze(1)), image_tokens

    def encode_text(
        self, tokens: Int[Tensor, "batch length"], *, mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length dim"]]:
        """Tokens to (unit-length embedding, features for the multimodal decoder); `mask` is True for real tokens."""
        embedding, features = self.unimodal(tokens, mask=mask)
        return _unit(embedding), features

    def forward(
        self,
        images: Float[Tensor, "batch 3 height width"],
        *,
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
        z_loss_weight: float = 0.0,
    ) -> CoCaOutput:
        """One pass over images and their captions (pairs stand in the same row).

        Padding is dropped by `mask`, and never by an id, before the vocabulary: position t predicts token t + 1 where
        that is a real one.
        """
        image, image_tokens = self.encode_image(images)
        text, features = self.encode_text(tokens, mask=mask)
        hidden = self.multimodal(features, image_tokens=image_tokens)
        predicted = mask[:, 1:]
        caption = self.vocabulary(
            hidden[:, :-1][predicted], targets=tokens[:, 1:][predicted], z_loss_weight=z_loss_weight
        )
        return CoCaOutput(image=image, text=text, scale=self.scale, caption=caption)

    def logits(
        self,
        images: Float[Tensor, "batch 3 height width"],
        *,
        tokens: Int[Tensor, "batch length"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Whole logits, for looking at: those of position t are for token t + 1. Training never builds them."""
        _, image_tokens = self.encode_image(images)
        _, features = self.encode_text(tokens, mask=mask)
        logits: Tensor = self.vocabulary.logits(self.multimodal(features, image_tokens=image_tokens))
        return logits


def _unit(embedding: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """At unit length, in fp32 at least: similarities are what the temperature multiplies."""
    return F.normalize(embedding.to(torch.promote_types(embedding.dtype, torch.float32)), dim=-1)


def count_parameters(model: CoCa) -> dict[str, int]:
    """Parameters of the encoder, of the decoder (both halves) and of the poolers, which Table 1 does not list."""

    def count(*modules: nn.Module | None) -> int:
        return sum(p.numel() for module in modules if module is not None for p in module.parameters())

    return {
        "encoder": count(model.encoder),
        "decoder": count(model.unimodal, model.multimodal, model.vocabulary),
        "poolers": count(model.generative_pooler, model.contrastive_pooler, model.image_projection),
    }
