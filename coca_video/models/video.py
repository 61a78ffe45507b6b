"""CoCa's video classifier (section 3.3): every frame through the image encoder, ONE query over all tokens, softmax."""

from dataclasses import dataclass

from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.image import ImageConfig, ImageEncoder
from coca_video.models.pooler import AttentionalPooler


@dataclass(frozen=True, kw_only=True)
class VideoClassifierConfig:
    """An encoder and a head of `num_classes`. `num_frames` is what it was trained with, the default at evaluation."""

    image: ImageConfig
    num_classes: int
    num_frames: int


class VideoClassifier(nn.Module):
    """Frames to class scores. Pooling is a sum over a set: any number of frames goes, in any order."""

    def __init__(self, config: VideoClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config.image)
        width, num_heads = self.encoder.width, self.encoder.num_heads
        self.pooler = AttentionalPooler(width, num_heads=num_heads, num_queries=1)
        self.classifier = nn.Linear(width, config.num_classes)
        nn.init.trunc_normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def encode(self, frames: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Normalised frames to the tokens of all frames, frame after frame."""
        tokens: Tensor = self.encoder(frames.flatten(0, 1))
        return tokens.reshape(len(frames), -1, tokens.shape[-1])

    def classify(
        self, tokens: Float[Tensor, "batch tokens dim"], *, mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> Float[Tensor, "batch classes"]:
        """Tokens to logits; `mask` is True for real tokens."""
        logits: Tensor = self.classifier(self.pooler(tokens, mask=mask).squeeze(1))
        return logits

    def forward(self, frames: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch classes"]:
        """Normalised frames to logits."""
        return self.classify(self.encode(frames))

    def train(self, mode: bool = True) -> "VideoClassifier":  # noqa: FBT001, FBT002 (the signature of nn.Module)
        """Training mode for the head; a frozen encoder stays in evaluation mode, whatever drop-out it has."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        return self
