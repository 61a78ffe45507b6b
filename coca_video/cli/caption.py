"""`coca-video caption FILE... --model SOURCE`: a caption for each image or video file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from coca_video.cli.arguments import parse_options, say

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coca_video.data.video import ClipConfig
    from coca_video.models.coca import CoCa
    from coca_video.models.generate import GenerateConfig
    from coca_video.tokenizer import Tokenizer

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})  # every other file is a video
DEFAULT_MAX_LENGTH = 30


@dataclass(frozen=True, kw_only=True)
class CaptionOptions:
    """Captions images and videos, one line a file. A video's frames are captioned together."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """Images (.jpg .png .webp .bmp .tif) and video files."""
    model: str
    """A CoCa: a finished run, a model folder, hf:ORG/NAME, open_clip:NAME/TAG or open_clip:FILE."""
    prompt: str = ""
    """How every caption begins."""
    method: Literal["greedy", "sample", "beam"] = "greedy"
    """The most probable token at every step; a random one; or the best text that a beam search finds."""
    max_length: int | None = None
    """Tokens after the prompt, the end mark included; 30, or what fits the model, when not given."""
    min_length: int = 1
    """The shortest caption in tokens, the end mark included."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that are there already become less likely."""
    temperature: float = 1.0
    """Of sample: below 1 is less random."""
    top_k: int | None = None
    """Of sample: only the most probable k tokens."""
    top_p: float | None = None
    """Of sample: only the most probable tokens up to this mass."""
    seed: int = 0
    """Of sample."""
    num_beams: int | None = None
    """Of beam: texts that run side by side; 6 when not given."""
    length_penalty: float = 1.0
    """Of beam: above 0 favours long captions, below 0 short ones."""
    num_frames: int = 8
    """Frames of a video, uniformly sampled."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""
    json: bool = False
    """One JSON line a file instead of text."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to compute."""


def run(arguments: Sequence[str]) -> int:
    """Captions file by file, in their order. Status 1 when some file could not be read."""
    options = parse_options(CaptionOptions, verb="caption", arguments=arguments)
    if not options.files:
        raise ValueError("expected one or more image or video files; none was given.")
    if options.num_frames < 1:
        raise ValueError(f"--num-frames must be at least 1; got {options.num_frames}.")
    from coca_video.data.decode import UnreadableVideo
    from coca_video.data.image_text import UnreadablePair

    captioner = _Captioner(options)
    status = 0
    for number, path in enumerate(options.files):
        try:
            caption, log_probability = captioner.caption(path, key=number)
        except (UnreadableVideo, UnreadablePair, OSError) as error:
            sentence = str(error) if isinstance(error, UnreadableVideo) else f"{path}: {_cause(error)}"
            say(f"coca-video caption: {sentence}")
            status = 1
            if options.json:
                print(json.dumps({"file": str(path), "error": sentence}), flush=True)
            continue
        if options.json:
            line = json.dumps({"file": str(path), "caption": caption, "log_probability": log_probability})
        else:
            line = f"{path}\t{caption}"
        print(line, flush=True)
    return status


def _cause(error: Exception) -> str:
    """Why an image cannot be read."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class _Captioner:
    """A CoCa ready to be asked about files."""

    def __init__(self, options: CaptionOptions) -> None:
        from coca_video.data.video import ClipConfig
        from coca_video.train.loop import pick_device

        self._device: torch.device = pick_device(options.device)
        self._model, self._tokenizer = _load(options.model)
        self._model.to(self._device)
        self._prompt = _prompt_ids(options.prompt, tokenizer=self._tokenizer)
        room = self._model.config.text.max_length - 1 - len(self._prompt)
        if room < 2:  # a longer prompt was cut by the tokenizer, which keeps a place for the end mark
            raise ValueError("The prompt leaves the model no room for a caption; shorten it.")
        self._config = _generate_config(options, room=room)
        image = self._model.config.image
        self._clip: ClipConfig = ClipConfig(
            num_frames=options.num_frames,
            image_size=image.image_size,
            interpolation=image.interpolation,
            decoder=options.decoder,
            timeout_seconds=options.timeout_seconds,
        )

    def caption(self, path: Path, *, key: int) -> tuple[str, float]:
        """(caption with its prompt, log probability of what follows the prompt); `key` seeds a sample."""
        import torch

        from coca_video.models.generate import generate_from_tokens

        prompt = torch.tensor([self._prompt], dtype=torch.int64, device=self._device)
        generated = generate_from_tokens(
            self._model,
            self._image_tokens(_read_frames(path, config=self._clip)),
            config=self._config,
            begin_id=self._tokenizer.begin_id,
            end_id=self._tokenizer.end_id,
            prompt=prompt,
            keys=[key] if self._config.method == "sample" else None,
        )
        text = self._tokenizer.decode([*self._prompt, *generated.tokens[0][generated.mask[0]].tolist()])
        return text, float(generated.log_probability[0])

    def _image_tokens(self, frames_u8: "Tensor") -> "Tensor":
        """What the decoder attends to: the tokens of all frames [frames 3 size size] together through the poolers."""
        import torch

        from coca_video.data.transforms import normalize

        config = self._model.config
        with torch.no_grad():
            frames = normalize(frames_u8.to(self._device), mean=config.image.mean, std=config.image.std)
            tokens = self._model.encoder(frames, prefix_tokens=config.poolers == "open_clip")
            return self._model.pool(tokens.flatten(0, 1).unsqueeze(0))[1]


def _load(source: str) -> "tuple[CoCa, Tokenizer]":
    from coca_video.hub import load
    from coca_video.models.coca import CoCa

    saved = load(source)
    if not isinstance(saved.model, CoCa):
        raise ValueError(f"{source} holds a {type(saved.model).__name__}, which writes no captions; expected a CoCa.")
    if saved.tokenizer is None:
        raise ValueError(f"{source} holds a CoCa without a tokenizer, so its captions could not be read.")
    return saved.model, saved.tokenizer


def _prompt_ids(prompt: str, *, tokenizer: "Tokenizer") -> list[int]:
    """The prompt's tokens without the marks."""
    if not prompt.strip():
        return []
    ids, mask = tokenizer.encode([prompt])
    return [int(token) for token in ids[0][mask[0]][1:-1]]


def _generate_config(options: CaptionOptions, *, room: int) -> "GenerateConfig":
    from coca_video.models.generate import GenerateConfig

    return GenerateConfig(
        method=options.method,
        max_length=min(max(DEFAULT_MAX_LENGTH, options.min_length), room)
        if options.max_length is None
        else options.max_length,
        min_length=options.min_length,
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
    )


def _read_frames(path: Path, *, config: "ClipConfig") -> "Tensor":
    """[frames 3 size size] u8: the one of an image, or those of a video; UnreadablePair, OSError, UnreadableVideo."""
    from coca_video.data.image_text import decode_image
    from coca_video.data.transforms import resize_crop, square_crop_box
    from coca_video.data.video import load_clip

    if path.suffix.lower() not in IMAGE_SUFFIXES:
        return load_clip(path, config=config).frames
    image = decode_image(path.read_bytes())
    height, width = image.shape[-2:]
    box = square_crop_box(height, width)
    return resize_crop(image, box=box, size=config.image_size, interpolation=config.interpolation).unsqueeze(0)
