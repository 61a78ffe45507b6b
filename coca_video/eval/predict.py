"""One file in, class probabilities out, and what the head looked at: what `predict` and the demo share."""

import math
import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64, UInt8
from torch import Tensor

from coca_video.data.decode import Backend, VideoSource
from coca_video.data.video import ClipConfig, load_clip, sampling_of
from coca_video.eval.features import encode_frames
from coca_video.hub import Saved, load
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one clip got: `probabilities` in the order of the classes.

    attention: the share of each place of each frame in what was pooled, all summing to 1 (`VideoHead.attention`; those
    of several encoder layers added up). None where it was not asked for, for a head that pools by the mean, and for an
    encoder whose tokens are no square grid. encode_seconds, pool_seconds: wall time of the whole batch, the attention
    counted to the pooling.
    """

    probabilities: Float64[Tensor, "classes"]
    attention: Float[Tensor, "frames rows columns"] | None
    encode_seconds: float
    pool_seconds: float


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A classifier ready to be asked about files, or about clips that were read as `clip` says."""

    model: VideoClassifier
    classes: tuple[str, ...]
    clip: ClipConfig
    device: torch.device

    def __call__(self, source: VideoSource) -> list[tuple[str, float]]:
        """(class, probability) of the video, most probable first. Raises UnreadableVideo with the cause."""
        (prediction,) = self.predict_frames(load_clip(source, config=self.clip).frames.unsqueeze(0))
        return self.ranked(prediction)

    @torch.no_grad()
    def predict_frames(
        self, frames: UInt8[Tensor, "batch frames 3 height width"], *, attention: bool = False
    ) -> list[Prediction]:
        """What each clip gets; a clip gets the same in any batch, to 1e-6."""
        start = self._clock()
        tokens = encode_frames(self.model, frames, device=self.device)
        encoded = self._clock()
        probabilities = self.model.classify(tokens).cpu().double().softmax(dim=-1)
        maps = self._attention_maps(tokens) if attention else None
        pooled = self._clock()
        return [
            Prediction(
                probabilities=probabilities[index],
                attention=None if maps is None else maps[index],
                encode_seconds=encoded - start,
                pool_seconds=pooled - encoded,
            )
            for index in range(len(frames))
        ]

    def ranked(self, prediction: Prediction) -> list[tuple[str, float]]:
        """(class, probability), most probable first; equal ones in the order of the classes."""
        order = prediction.probabilities.argsort(descending=True, stable=True).tolist()
        return [(self.classes[index], float(prediction.probabilities[index])) for index in order]

    def _attention_maps(
        self, tokens: Float[Tensor, "batch frames tokens dim"]
    ) -> Float[Tensor, "batch frames rows columns"] | None:
        shares = self.model.head.attention(tokens)
        if shares is None:
            return None
        num_layers = max(1, len(self.model.config.head.encoder_layers))  # their tokens stand side by side
        places = shares.cpu().view(*shares.shape[:2], num_layers, -1).sum(dim=2)
        side = math.isqrt(places.shape[-1])
        return places.view(*places.shape[:2], side, side) if side * side == places.shape[-1] else None

    def _clock(self) -> float:
        """Seconds, after all that the device was asked to do."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()


def load_predictor(
    source: str, *, num_frames: int | None, decoder: Backend, timeout_seconds: float, device: torch.device
) -> Predictor:
    """The classifier of a run, a model folder or hf:ORG/NAME, as `predictor_of` makes it ready; ValueError for none."""
    saved = load(source)
    if not isinstance(saved.model, VideoClassifier):
        raise ValueError(
            f"{source} holds a {type(saved.model).__name__}, which names no actions; expected a probe's run."
        )
    return predictor_of(saved, num_frames=num_frames, decoder=decoder, timeout_seconds=timeout_seconds, device=device)


def predictor_of(
    saved: Saved, *, num_frames: int | None, decoder: Backend, timeout_seconds: float, device: torch.device
) -> Predictor:
    """A loaded classifier, moved to `device`; `num_frames` as in training when None, sampled as there."""
    assert isinstance(saved.model, VideoClassifier), type(saved.model)
    trained = saved.model.config
    clip = ClipConfig(
        num_frames=trained.num_frames if num_frames is None else num_frames,
        image_size=trained.image.image_size,
        interpolation=trained.image.interpolation,
        decoder=decoder,
        timeout_seconds=timeout_seconds,
        sampling=sampling_of(stride=trained.stride, clip_seconds=trained.clip_seconds),
        stride=trained.stride,
        clip_seconds=trained.clip_seconds,
    )
    return Predictor(model=saved.model.to(device), classes=saved.classes, clip=clip, device=device)
