"""Frames in, captions out: what `caption` and the demo share."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from coca_video.data.decode import Backend
from coca_video.data.image_text import decode_image
from coca_video.data.transforms import normalize, resize_crop, square_crop_box
from coca_video.data.video import ClipConfig, load_clip
from coca_video.hub import Saved, load
from coca_video.models.coca import CoCa
from coca_video.models.generate import GenerateConfig, generate_from_tokens
from coca_video.tokenizer import Tokenizer

# What is read as one image; every other file is a video.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})


@dataclass(frozen=True, kw_only=True)
class Caption:
    """A text with the prompt it begins with, and the log probability under the model of what follows the prompt."""

    text: str
    log_probability: float


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A CoCa ready to be asked about frames and files. prompt: the tokens that every caption begins with, no marks."""

    model: CoCa
    tokenizer: Tokenizer
    config: GenerateConfig
    prompt: tuple[int, ...]
    clip: ClipConfig
    device: torch.device

    def __call__(self, path: Path, *, key: int | None = None) -> Caption:
        """The caption of an image or a video; `key` as in `caption_frames`. Raises what `read_frames` does."""
        frames = read_frames(path, config=self.clip).unsqueeze(0)
        return self.caption_frames(frames, keys=None if key is None else [key])[0]

    @torch.no_grad()
    def caption_frames(
        self, frames: UInt8[Tensor, "batch frames 3 height width"], *, keys: Sequence[int] | None = None
    ) -> list[Caption]:
        """A caption for each clip, from the tokens of all its frames together. An image is a clip of one frame.

        keys: of method "sample" alone: a number for each clip, by which its caption is drawn the same in any batch;
        its place in the batch when not given. ValueError for keys with another method.
        """
        generated = generate_from_tokens(
            self.model,
            self._image_tokens(frames),
            config=self.config,
            begin_id=self.tokenizer.begin_id,
            end_id=self.tokenizer.end_id,
            prompt=torch.tensor([self.prompt], dtype=torch.int64, device=self.device).expand(len(frames), -1),
            keys=keys,
        )
        texts = [
            self.tokenizer.decode([*self.prompt, *tokens[mask].tolist()])
            for tokens, mask in zip(generated.tokens, generated.mask, strict=True)
        ]
        log_probabilities = generated.log_probability.tolist()
        return [
            Caption(text=text, log_probability=log_probability)
            for text, log_probability in zip(texts, log_probabilities, strict=True)
        ]

    def _image_tokens(
        self, frames: UInt8[Tensor, "batch frames 3 height width"]
    ) -> Float[Tensor, "batch image_tokens dim"]:
        """What the decoder attends to: frames one by one through the encoder, a clip's tokens through the poolers."""
        config, (batch, num_frames) = self.model.config, frames.shape[:2]
        images = normalize(frames.flatten(0, 1).to(self.device), mean=config.image.mean, std=config.image.std)
        tokens = self.model.encoder(images, prefix_tokens=config.poolers == "open_clip")
        return self.model.pool(tokens.unflatten(0, (batch, num_frames)).flatten(1, 2))[1]


def load_captioner(
    source: str | Saved,
    *,
    num_frames: int,
    config: GenerateConfig,
    shorten: bool,
    prompt: str = "",
    decoder: Backend,
    timeout_seconds: float,
    device: torch.device,
) -> Captioner:
    """The CoCa of a run, a model folder, hf:ORG/NAME, open_clip:..., or one that is loaded already.

    num_frames: of a video, uniformly sampled. shorten: whether a max_length that the model has no room for behind the
    prompt is cut to what it has, instead of being an error at the first caption. ValueError for a model that writes no
    captions and for a prompt that leaves no room for one.
    """
    saved = load(source) if isinstance(source, str) else source
    name = source if isinstance(source, str) else "The loaded model"
    if not isinstance(saved.model, CoCa):
        raise ValueError(f"{name} holds a {type(saved.model).__name__}, which writes no captions; expected a CoCa.")
    if saved.tokenizer is None:
        raise ValueError(f"{name} holds a CoCa without a tokenizer, so its captions could not be read.")
    image, ids = saved.model.config.image, _prompt_ids(prompt, tokenizer=saved.tokenizer)
    room = saved.model.config.text.max_length - 1 - len(ids)
    if room < 2:  # a longer prompt was cut by the tokenizer, which keeps a place for the end mark
        raise ValueError("The prompt leaves the model no room for a caption; shorten it.")
    clip = ClipConfig(
        num_frames=num_frames,
        image_size=image.image_size,
        interpolation=image.interpolation,
        decoder=decoder,
        timeout_seconds=timeout_seconds,
    )
    return Captioner(
        model=saved.model.to(device),
        tokenizer=saved.tokenizer,
        config=replace(config, max_length=min(config.max_length, room)) if shorten else config,
        prompt=ids,
        clip=clip,
        device=device,
    )


def _prompt_ids(prompt: str, *, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The prompt's tokens without the marks."""
    if not prompt.strip():
        return ()
    ids, mask = tokenizer.encode([prompt])
    return tuple(ids[0][mask[0]][1:-1].tolist())


def read_frames(path: Path, *, config: ClipConfig) -> UInt8[Tensor, "frames 3 size size"]:
    """The one frame of an image (by its ending, upright), or those of a video.

    Raises UnreadableVideo for a video, UnreadablePair and OSError for an image.
    """
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return load_clip(path, config=config).frames
    image = decode_image(path.read_bytes())
    box = square_crop_box(*image.shape[-2:])
    return resize_crop(image, box=box, size=config.image_size, interpolation=config.interpolation).unsqueeze(0)
