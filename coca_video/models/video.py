"""CoCa's video classifier (section 3.3): every frame through the image encoder, ONE query over all tokens, softmax."""

from dataclasses import dataclass, field

from jaxtyping import Bool, Float
from torch import Tensor, nn

from coca_video.models.head import HeadConfig, VideoHead
from coca_video.models.image import ImageConfig, ImageEncoder


@dataclass(frozen=True, kw_only=True)
class VideoClassifierConfig:
    """An encoder and a head of `num_classes`.

    `num_frames`, `stride` and `clip_seconds` are what it was trained with, the defaults at evaluation. Without the last
    two the frames are spread over the whole video; a stride takes every stride-th frame of a part of it, clip_seconds
    spreads them over a part of that length.
    """

    image: ImageConfig
    num_classes: int
    num_frames: int
    stride: int | None = None
    clip_seconds: float | None = None
    head: HeadConfig = field(default_factory=HeadConfig)


class VideoClassifier(nn.Module):
    """Frames to class scores. With the paper's head any number of frames goes, in any order."""

    def __init__(self, config: VideoClassifierConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = ImageEncoder(config.image)
        self.encoder.check_layers(config.head.encoder_layers)
        self.head = VideoHead(
            config.head,
            dim=self.encoder.width,
            num_heads=self.encoder.num_heads,
            num_classes=config.num_classes,
            num_frames=config.num_frames,
        )

    def encode(self, frames: Float[Tensor, "batch frames 3 height width"]) -> Float[Tensor, "batch frames tokens dim"]:
        """Normalised frames to the tokens of each; those of several encoder layers stand side by side."""
        tokens: Tensor = self.encoder(frames.flatten(0, 1), layers=self.config.head.encoder_layers)
        return tokens.reshape(*frames.shape[:2], *tokens.shape[1:])

    def classify(
        self,
        tokens: Float[Tensor, "batch frames tokens dim"],
        *,
        mask: Bool[Tensor, "batch frames"] | None = None,
        variance: Float[Tensor, "batch frames tokens"] | None = None,
    ) -> Float[Tensor, "batch classes"]:
        """Tokens to logits; `mask` is True for real frames, `variance` that of mean-free tokens over their features."""
        logits: Tensor = self.head(tokens, mask=mask, variance=variance)
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
