"""CoCa's text decoder in two halves (section 3.2): unimodal, and multimodal, which cross-attends to image tokens."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from coca_video.models.attention import MLP, Attention, causal_mask, init_linear_layers


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes of the decoder. `max_length` counts tokens, the CLS apart."""

    width: int
    num_heads: int
    mlp_width: int
    num_unimodal_layers: int
    num_multimodal_layers: int
    vocab_size: int = 64_000
    max_length: int = 64


class UnimodalLayer(nn.Module):
    """Causal self-attention and one MLP, pre-norm."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(config.width)
        self.self_attention = Attention(config.width, num_heads=config.num_heads)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, hidden_dim=config.mlp_width)

    def forward(
        self, x: Float[Tensor, "batch length dim"], *, mask: Bool[Tensor, "#batch length length"]
    ) -> Float[Tensor, "batch length dim"]:
        """`mask` is True where a position may see another."""
        x = x + self.self_attention(self.norm_self(x), mask=mask)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class MultimodalLayer(nn.Module):
    """Causal self-attention, cross-attention to image tokens, ONE MLP (Table 1's parameters leave no second)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(config.width)
        self.self_attention = Attention(config.width, num_heads=config.num_heads)
        self.norm_cross = nn.LayerNorm(config.width)
        self.cross_attention = Attention(config.width, num_heads=config.num_heads)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.mlp = MLP(config.width, hidden_dim=config.mlp_width)

    def forward(
        self,
        x: Float[Tensor, "batch length dim"],
        *,
        image_tokens: Float[Tensor, "batch image_tokens dim"],
        mask: Bool[Tensor, "#batch length length"],
    ) -> Float[Tensor, "batch length dim"]:
        """Every text position sees every image token; `mask` is for the self-attention."""
        x = x + self.self_attention(self.norm_self(x), mask=mask)
        x = x + self.cross_attention(self.norm_cross(x), context=image_tokens)
        out: Tensor = x + self.mlp(self.norm_mlp(x))
        return out


class UnimodalDecoder(nn.Module):
    """Tokens to (embedding of the text, token features), with a learned CLS appended last.

    The CLS keeps the last position embedding whatever the padded length, and no token sees it: how far a batch is
    padded changes nothing.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.max_length = config.max_length
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Parameter(torch.empty(config.max_length + 1, config.width))
        self.cls_embedding = nn.Parameter(torch.empty(config.width))
        self.layers = nn.ModuleList(UnimodalLayer(config) for _ in range(config.num_unimodal_layers))
        self.norm_cls = nn.LayerNorm(config.width)
        self.projection = nn.Linear(config.width, config.width, bias=False)
        init_linear_layers(self)
        for parameter, std in (
            (self.token_embedding.weight, 0.02),
            (self.position_embedding, 0.01),
            (self.cls_embedding, 0.01),
        ):
            nn.init.normal_(parameter, std=std)

    def forward(
        self, tokens: Int[Tensor, "batch length"], *, mask: Bool[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch length dim"]]:
        """`mask` is True for real tokens; padding stands on the right. The embedding is not normalised yet."""
        batch, length = tokens.shape
        if length > self.max_length:
            raise ValueError(
                f"The text decoder takes at most {self.max_length} tokens; got {length}. Truncate the captions."
            )
        x = self.token_embedding(tokens) + self.position_embedding[:length]
        cls = (self.cls_embedding + self.position_embedding[-1]).expand(batch, 1, -1)
        x = torch.cat([x, cls], dim=1)
        key_mask = torch.cat([mask, mask.new_ones(batch, 1)], dim=1)
        visible = causal_mask(length + 1, device=tokens.device) & key_mask.unsqueeze(1)
        for layer in self.layers:
            x = layer(x, mask=visible)
        return self.projection(self.norm_cls(x[:, -1])), x[:, :-1]


class MultimodalDecoder(nn.Module):
    """Token features and image tokens to logits over the vocabulary, through an output matrix of its own (untied)."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MultimodalLayer(config) for _ in range(config.num_multimodal_layers))
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)
        init_linear_layers(self)
        nn.init.normal_(self.output.weight, std=config.width**-0.5)

    def forward(
        self,
        features: Float[Tensor, "batch length dim"],
        *,
        image_tokens: Float[Tensor, "batch image_tokens dim"],
        mask: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length vocabulary"]:
        """Logits at position t are for token t + 1; `mask` is True for real tokens."""
        visible = causal_mask(features.shape[1], device=features.device) & mask.unsqueeze(1)
        for layer in self.layers:
            features = layer(features, image_tokens=image_tokens, mask=visible)
        logits: Tensor = self.output(self.norm(features))
        return logits
