"""Captions a second against open_clip's generate, with the same random weights: coca_ViT-B-32 at 224 px, 30 tokens.

    python benchmarks/generate.py --json runs/benchmarks/generate.json
    python benchmarks/generate.py --batch 64 --repeats 1

BEGIN and 29 generated tokens, END forbidden before the last. open_clip encodes the image once for a greedy caption and
once a beam for a beam search, and runs the text decoder over the whole text at every step. Goal: at least 8 times its
captions a second. Before it is timed, a side's captions are compared with ours: open_clip sums unnormalised logits over
a beam, so for that comparison alone its logits are normalised; with 3 groups it runs three searches of two beams.

Its beam search needs a transformers that has BeamSearchScorer, which 4.57 has no more:
`pip install open_clip_torch "transformers<4.57"` into an environment of its own; elsewhere its rows are left out.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timing import Side, median_milliseconds, parser, report
from torch import Tensor, nn

from coca_video.models.coca import CoCa
from coca_video.models.convert import config_from_open_clip, from_open_clip
from coca_video.models.generate import GenerateConfig, generate

NAME, IMAGE_SIZE = "coca_ViT-B-32", 224
BEGIN, END = 49406, 49407
NUM_TOKENS = 30  # open_clip's default; BEGIN counts
NUM_BEAMS = 6
LENGTHS: dict[str, Any] = {"min_length": NUM_TOKENS - 1, "max_length": NUM_TOKENS - 1}

Generate = Callable[[Tensor], Tensor]


def import_open_clip() -> tuple[Any, bool]:
    """The library, and whether its beam search works here."""
    transformers = importlib.import_module("transformers")
    has_beams = hasattr(transformers, "BeamSearchScorer")
    if not has_beams:  # without the name it refuses to generate at all, greedily too
        transformers.BeamSearchScorer = type("BeamSearchScorer", (), {})  # type: ignore[attr-defined]
    return importlib.import_module("open_clip"), has_beams


def build(open_clip: Any, *, device: str) -> tuple[nn.Module, CoCa]:
    """open_clip's model and ours with the same random weights, which give logits of a deviation of about 1."""
    torch.manual_seed(0)
    theirs = open_clip.create_model(NAME).to(device).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.ndim >= 2:  # its decoder's output matrix is left uninitialised
                width = parameter.shape[0] if name == "text_decoder.text_projection" else parameter.shape[-1]
                parameter.normal_(std=width**-0.5)
    state = theirs.state_dict()
    ours = CoCa(config_from_open_clip(state)).to(device).eval()
    ours.load_state_dict(from_open_clip(state))
    return theirs, ours


def generated_by_open_clip(images: Tensor, *, model: nn.Module, **options: Any) -> Tensor:
    """Its tokens after BEGIN."""
    tokens: Tensor = model.generate(images, seq_len=NUM_TOKENS, min_seq_len=NUM_TOKENS - 1, **options)  # type: ignore[operator]
    return tokens[:, 1:]


def generated_by_us(images: Tensor, *, model: CoCa, config: GenerateConfig) -> Tensor:
    """Our tokens after BEGIN."""
    return generate(model, images, config=config, begin_id=BEGIN, end_id=END).tokens


class NormalizedLogits:
    """While it is entered, open_clip's model gives log probabilities for logits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __enter__(self) -> None:
        def normalize(_: nn.Module, __: Any, output: dict[str, Tensor]) -> dict[str, Tensor]:
            return output | {"logits": output["logits"].log_softmax(dim=-1)}

        self._hook = self._model.register_forward_hook(normalize)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()


def same_captions(theirs: Tensor, *, ours: Tensor) -> str:
    """How many captions are equal; greedy's last token apart, which open_clip makes END."""
    length = NUM_TOKENS - 2
    equal = (theirs[:, :length] == ours[:, :length]).all(dim=1)
    return f"{int(equal.sum())} of {len(equal)}"


def rows_of(
    sides: Mapping[str, Generate], *, method: str, images: Tensor, same: Mapping[str, str], options: Any
) -> list[dict[str, Any]]:
    """One row a side; the last is ours, which the others are compared with."""
    calls: dict[str, Side] = {name: partial(side, images) for name, side in sides.items()}
    times = median_milliseconds(calls, device=options.device, repeats=options.repeats)
    own = times["ours"]
    return [
        {
            "method": method,
            "side": name,
            "batch": len(images),
            "ms": times[name],
            "captions/s": 1e3 * len(images) / times[name],
            "ours is faster": times[name] / own,
            "captions as ours": same.get(name, "-"),
        }
        for name in sides
    ]


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--batch", type=int, default=16, help="images at once, greedy")
    commands.add_argument("--beam-batch", type=int, default=2, help="images at once, beam search")
    options = commands.parse_args()
    torch.set_num_threads(1)
    open_clip, has_beams = import_open_clip()
    theirs, ours = build(open_clip, device=options.device)
    num_images = max(options.batch, options.beam_batch)
    images = torch.randn(num_images, 3, IMAGE_SIZE, IMAGE_SIZE, device=options.device)

    greedy: dict[str, Generate] = {
        "open_clip": partial(generated_by_open_clip, model=theirs, generation_type="top_k", top_k=1),
        "ours": partial(generated_by_us, model=ours, config=GenerateConfig(**LENGTHS)),
    }
    batch = images[: options.batch]
    same = {"open_clip": same_captions(greedy["open_clip"](batch), ours=greedy["ours"](batch))}
    rows = rows_of(greedy, method="greedy", images=batch, same=same, options=options)

    batch = images[: options.beam_batch]
    config = GenerateConfig(method="beam", num_beams=NUM_BEAMS, **LENGTHS)
    beams: dict[str, Generate] = {"ours": partial(generated_by_us, model=ours, config=config)}
    same = {}
    if has_beams:
        search = partial(generated_by_open_clip, model=theirs, generation_type="beam_search", num_beams=NUM_BEAMS)
        groups: dict[str, Generate] = {f"open_clip, {n} groups": partial(search, num_beam_groups=n) for n in (1, 3)}
        with NormalizedLogits(theirs):
            same = {"open_clip, 1 groups": same_captions(search(batch, num_beam_groups=1), ours=beams["ours"](batch))}
        beams = groups | beams
    else:
        print("open_clip's beam search is left out: this transformers has no BeamSearchScorer (--help says what has).")
    rows += rows_of(beams, method=f"{NUM_BEAMS} beams", images=batch, same=same, options=options)
    report(rows, options=options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
