"""`coca-video caption FILE... --model SOURCE`: a caption for each image or video file."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from coca_video.cli.arguments import parse_options, say

if TYPE_CHECKING:
    from coca_video.eval.captioning import Captioner

DEFAULT_MAX_LENGTH = 30
MAX_NUM_FRAMES = 128  # all of a video's are held decoded, 0.8 GB at 1920x1080, and go through the encoder in one batch
MAX_NUM_BEAMS = 64  # 3.6 times as long as 6, with CoCa-Base's decoder and 30 tokens on a CPU core (0.18 s a beam)


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
    """Of beam: texts that run side by side, 64 at most; 6 when not given."""
    length_penalty: float = 1.0
    """Of beam: above 0 favours long captions, below 0 short ones."""
    num_frames: int = 8
    """Frames of a video, uniformly sampled, 128 at most."""
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
    _check_within("--num-frames", options.num_frames, most=MAX_NUM_FRAMES)
    if options.num_beams is not None:
        _check_within("--num-beams", options.num_beams, most=MAX_NUM_BEAMS)
    captioner = _captioner(options)
    answers = [_answer(path, captioner=captioner, key=key, options=options) for key, path in enumerate(options.files)]
    return 0 if all(answers) else 1


def _check_within(flag: str, value: int, *, most: int) -> None:
    if not 1 <= value <= most:
        raise ValueError(f"{flag} must be from 1 to {most}; got {value}.")


def _captioner(options: CaptionOptions) -> "Captioner":
    from coca_video.eval.captioning import load_captioner
    from coca_video.models.generate import GenerateConfig
    from coca_video.train.loop import pick_device

    longest = options.max_length
    config = GenerateConfig(
        method=options.method,
        max_length=max(DEFAULT_MAX_LENGTH, options.min_length) if longest is None else longest,
        min_length=options.min_length,
        repetition_penalty=options.repetition_penalty,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        seed=options.seed,
        num_beams=options.num_beams,
        length_penalty=options.length_penalty,
    )
    return load_captioner(
        options.model,
        num_frames=options.num_frames,
        config=config,
        shorten=longest is None,
        prompt=options.prompt,
        decoder=options.decoder,
        timeout_seconds=options.timeout_seconds,
        device=pick_device(options.device),
    )


def _answer(path: Path, *, captioner: "Captioner", key: int, options: CaptionOptions) -> bool:
    """Prints the caption of a file, or why it has none, and says whether it has; `key` seeds a sample."""
    from coca_video.data.decode import UnreadableVideo
    from coca_video.data.image_text import UnreadablePair

    try:
        caption = captioner(path, key=key if options.method == "sample" else None)
    except (UnreadableVideo, UnreadablePair, OSError) as error:
        sentence = str(error) if isinstance(error, UnreadableVideo) else f"{path}: {_cause(error)}"
        say(f"coca-video caption: {sentence}")
        if options.json:
            print(json.dumps({"file": str(path), "error": sentence}), flush=True)
        return False
    if options.json:
        found = {"file": str(path), "caption": caption.text, "log_probability": caption.log_probability}
        print(json.dumps(found), flush=True)
    else:
        print(f"{path}\t{caption.text}", flush=True)
    return True


def _cause(error: Exception) -> str:
    """Why an image cannot be read."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
