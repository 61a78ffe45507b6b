"""The losses, chunked with gradients in the forward, against whole logits: time and extra memory, forward and backward.

    python benchmarks/losses.py --json runs/benchmarks/losses.json
    python benchmarks/losses.py --device cuda --precision bf16 --captions 256

Captioning: [captions x 76, 768] hidden states, 49,408 words, 40% padding. Contrastive: --pairs pairs of width 512.
Goals: at most 1.05 times the time and 0.25 times the extra memory of whole logits. Extra memory includes the gradients.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timing import Side, extra_mebibytes, largest_relative_error, median_milliseconds, parser, ratios, report
from torch import Tensor

from coca_video.losses import contrastive_loss
from coca_video.models.vocabulary import token_loss

LENGTH, WIDTH, VOCABULARY, EMBEDDING = 76, 768, 49_408, 512
REAL_SHARE = 0.6
IGNORED = -100

Inputs = dict[str, Tensor]
Loss = Callable[[Inputs], Tensor]


def caption_inputs(num_captions: int, device: str) -> Inputs:
    """Hidden states, the vocabulary's weight, targets (padding is IGNORED) and the mask of real tokens."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(num_captions * LENGTH).view(num_captions, LENGTH) % LENGTH < round(REAL_SHARE * LENGTH)
    targets = torch.randint(VOCABULARY, (num_captions, LENGTH), generator=generator).masked_fill(~mask, IGNORED)
    hidden = torch.randn(num_captions, LENGTH, WIDTH, generator=generator)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator).mul_(WIDTH**-0.5)
    inputs = {"hidden": hidden, "weight": weight, "targets": targets, "mask": mask}
    return _on_device(inputs, device, trained=("hidden", "weight"))


def pair_inputs(num_pairs: int, device: str) -> Inputs:
    """Unit-length embeddings of images and texts, and the scale."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(num_pairs, EMBEDDING, generator=generator), dim=-1) for _ in range(2))
    inputs = {"image": image, "text": text, "scale": torch.tensor(14.3)}
    return _on_device(inputs, device, trained=("image", "text", "scale"))


def _on_device(inputs: Inputs, device: str, *, trained: tuple[str, ...]) -> Inputs:
    return {name: value.to(device).requires_grad_(name in trained) for name, value in inputs.items()}


def whole(inputs: Inputs) -> Tensor:
    """All logits, those of padding too, which the loss ignores."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    return F.cross_entropy(logits.flatten(0, 1), inputs["targets"].flatten(), ignore_index=IGNORED)


def open_clip_whole(inputs: Inputs) -> Tensor:
    """The same with classes in the middle, as open_clip's CoCaLoss has them."""
    logits = F.linear(inputs["hidden"], inputs["weight"])
    return F.cross_entropy(logits.permute(0, 2, 1), inputs["targets"], ignore_index=IGNORED)


def whole_without_padding(inputs: Inputs) -> Tensor:
    """The logits of real tokens."""
    mask = inputs["mask"]
    return F.cross_entropy(F.linear(inputs["hidden"][mask], inputs["weight"]), inputs["targets"][mask])


def torch_linear_cross_entropy(inputs: Inputs) -> Tensor:
    """What torch has for this since 2.13, of real tokens."""
    mask, options = inputs["mask"], torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(inputs["hidden"][mask], inputs["weight"], inputs["targets"][mask], options=options)


def chunked(inputs: Inputs) -> Tensor:
    """Ours, of real tokens."""
    mask = inputs["mask"]
    loss = token_loss(inputs["hidden"][mask], weight=inputs["weight"], targets=inputs["targets"][mask])
    mean: Tensor = loss.loss_sum / loss.count
    return mean


def contrastive_whole(inputs: Inputs) -> Tensor:
    """Both directions from whole logits."""
    logits = inputs["scale"] * inputs["image"] @ inputs["text"].T
    targets = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)


def contrastive_chunked(inputs: Inputs) -> Tensor:
    """Ours, which chooses the rows at a time itself."""
    return contrastive_loss(inputs["image"], text=inputs["text"], scale=inputs["scale"])


CAPTIONING: dict[str, Loss] = {
    "whole logits": whole,
    "whole logits, open_clip's order": open_clip_whole,
    "whole logits, padding dropped": whole_without_padding,
    "padding dropped and chunked (ours)": chunked,
}
if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
    CAPTIONING["padding dropped, F.linear_cross_entropy"] = torch_linear_cross_entropy
CONTRASTIVE: dict[str, Loss] = {"whole logits": contrastive_whole, "chunked (ours)": contrastive_chunked}


def forward_and_backward(loss: Loss, *, inputs: Inputs, precision: str) -> Inputs:
    """The loss and the gradients, which nothing holds on to afterwards."""
    trained = {name: value for name, value in inputs.items() if value.requires_grad}
    with torch.autocast(inputs[next(iter(inputs))].device.type, torch.bfloat16, enabled=precision == "bf16"):
        value = loss(inputs)
    value.backward()
    grads = {name: leaf.grad for name, leaf in trained.items()}
    for leaf in trained.values():
        leaf.grad = None
    return {"loss": value.detach()} | {name: grad for name, grad in grads.items() if grad is not None}


def build(loss: Loss, make: Callable[[int, str], Inputs], size: int, device: str, precision: str) -> Side:
    """A side with inputs of its own, for the process that measures its memory."""
    return partial(forward_and_backward, loss, inputs=make(size, device), precision=precision)


def measure(
    name: str, *, losses: dict[str, Loss], make: Callable[[int, str], Inputs], size: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """One row for each of `losses`; the first is what the others are compared with."""
    device, precision = options.device, options.precision
    memory = {
        side: extra_mebibytes(build, losses[side], make, size, device, precision, device=device) for side in losses
    }
    inputs = make(size, device)
    sides = {side: partial(forward_and_backward, losses[side], inputs=inputs, precision=precision) for side in losses}
    first = next(iter(losses))
    expected = forward_and_backward(losses[first], inputs=inputs, precision="fp32").values()
    errors = {side: largest_relative_error(sides[side]().values(), expected=expected) for side in losses}
    del expected
    times = median_milliseconds(sides, device=device, repeats=options.repeats)
    rows = [
        {"loss": name, "side": side, "ms": times[side], "extra MiB": memory[side], "error": errors[side]}
        for side in losses
    ]
    return ratios(rows, of=first)


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is autocast's")
    commands.add_argument("--captions", type=int, default=16)
    commands.add_argument("--pairs", type=int, default=8192)
    options = commands.parse_args()
    torch.set_num_threads(1)
    rows = measure("captioning", losses=CAPTIONING, make=caption_inputs, size=options.captions, options=options)
    rows += measure("contrastive", losses=CONTRASTIVE, make=pair_inputs, size=options.pairs, options=options)
    report(rows, options=options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
