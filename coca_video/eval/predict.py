"""One file in, class probabilities out: what `predict` and the demo share."""

from dataclasses import dataclass
from pathlib import Path

import torch

from coca_video.data.decode import Backend
from coca_video.data.video import ClipConfig, collate_clips, load_clip, sampling_of
from coca_video.eval.features import encode_batch
from coca_video.hub import load
from coca_video.models.video import VideoClassifier


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """A classifier ready to be asked about files."""

    model: VideoClassifier
    classes: tuple[str, ...]
    clip: ClipConfig
    device: torch.device

    @torch.no_grad()
    def __call__(self, path: Path) -> list[tuple[str, float]]:
        """(class, probability) of the video at `path`, most probable first. Raises UnreadableVideo with the cause."""
        batch = encode_batch(self.model, collate_clips([load_clip(path, config=self.clip)]), device=self.device)
        probabilities = self.model.classify(batch.tokens)[0].cpu().double().softmax(dim=0)
        order = probabilities.argsort(descending=True).tolist()
        return [(self.classes[index], float(probabilities[index])) for index in order]


def load_predictor(
    source: str, *, num_frames: int | None, decoder: Backend, timeout_seconds: float, device: torch.device
) -> Predictor:
    """The classifier of a run, a model folder or hf:ORG/NAME; `num_frames` as in training when None, sampled as there.

    (A training with pytorchvideo's sampling is not in the model: frames are then spread over the whole video.)
    """
    saved = load(source)
    if not isinstance(saved.model, VideoClassifier):
        raise ValueError(
            f"{source} holds a {type(saved.model).__name__}, which names no actions; expected a probe's run."
        )
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
