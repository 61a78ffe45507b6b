"""What makes class scores of a clip's tokens: by default CoCa's single learned query and one linear layer."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.pooler import AttentionalPooler


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The head of a probe. The defaults are the paper's (CoCa section 3.3): one query, which sees no order."""


class VideoHead(nn.Module):
    """Tokens of all frames to class scores."""

    def __init__(self, config: HeadConfig, *, dim: int, num_heads: int, num_classes: int, num_frames: int) -> None:
        super().__init__()
        self.config = config
        self.num_frames = num_frames
        self.pooler = AttentionalPooler(dim, num_heads=num_heads, num_queries=1)
        self.classifier = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward(
        self, tokens: Float[Tensor, "batch frames tokens dim"], *, mask: Bool[Tensor, "batch frames"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Tokens to logits; `mask` is True for real frames."""
        token_mask = None if mask is None else mask.repeat_interleave(tokens.shape[2], dim=1)
        logits: Tensor = self.classifier(self.pooler(tokens.flatten(1, 2), mask=token_mask).squeeze(1))
        return logits
