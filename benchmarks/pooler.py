"""Pooling with one query: folded, against open_clip's AttentionalPooler(n_queries=1) and torch's MultiheadAttention.

    python benchmarks/pooler.py --json runs/benchmarks/pooler.json
    python benchmarks/pooler.py --device cuda --precision bf16

The tokens of 16 frames of 196 patches, [batch, 3136, 768], 12 heads, the same weights on all sides; forward and
backward, with frozen tokens (a probe) and with their gradient too (fine-tuning). First outputs and all gradients are
compared. Goals, fp32 and frozen tokens on a CPU: 25 times less time and 12 times less extra memory than open_clip's.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Side, extra_mebibytes, largest_relative_error, median_milliseconds, parser, ratios, report
from torch import Tensor, nn

from coca_video.models.pooler import AttentionalPooler

try:
    from open_clip.transformer import AttentionalPooler as OpenClipPooler
except ImportError:
    OpenClipPooler = None

TOKENS, WIDTH, HEADS = 16 * 196, 768, 12
LARGEST_ERROR_FP32 = 1e-5
CHECKED_BATCH = 4


class TorchPooler(nn.Module):
    """The ordinary pooler with a pooler's weights, named as open_clip names them; the output norm is open_clip's."""

    def __init__(self, pooler: AttentionalPooler) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(1, WIDTH))
        self.ln_q, self.ln_k, self.ln_post = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.load_state_dict(open_clip_names(dict(pooler.named_parameters())))

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to [batch, 1, WIDTH]."""
        context = self.ln_k(tokens)
        query = self.ln_q(self.query).expand(len(tokens), -1, -1)
        pooled: Tensor = self.ln_post(self.attn(query, context, context, need_weights=False)[0])
        return pooled


class OpenClipAndNorm(nn.Module):
    """open_clip's pooler and the layer norm that its image tower puts behind it."""

    def __init__(self, pooler: AttentionalPooler) -> None:
        super().__init__()
        assert OpenClipPooler is not None
        self.pooler, self.ln_post = OpenClipPooler(WIDTH, WIDTH, n_head=HEADS, n_queries=1), nn.LayerNorm(WIDTH)
        weights = open_clip_names(dict(pooler.named_parameters()))
        own = {name: weights.pop(f"ln_post.{name}") for name in ("weight", "bias")}
        self.pooler.load_state_dict(weights)
        self.ln_post.load_state_dict(own)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, tokens, WIDTH] to [batch, 1, WIDTH]."""
        pooled: Tensor = self.ln_post(self.pooler(tokens))
        return pooled


def open_clip_names(ours: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our pooler's parameters or their gradients under open_clip's names; it stacks the three input projections."""
    renamed = {"query": "query", "attention.out_proj": "attn.out_proj"}
    renamed |= {"norm_query": "ln_q", "norm_context": "ln_k", "norm_out": "ln_post"}
    found: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        found[f"attn.in_proj_{kind}"] = torch.cat([ours[f"attention.{name}_proj.{kind}"] for name in "qkv"])
    for name, value in ours.items():
        module, _, kind = name.rpartition(".")
        if name in renamed:
            found[renamed[name]] = value
        elif module in renamed:
            found[f"{renamed[module]}.{kind}"] = value
    return found


def folded() -> AttentionalPooler:
    """Ours; its biases and norms are drawn, so that none of them is idle."""
    torch.manual_seed(0)
    pooler = AttentionalPooler(WIDTH, num_heads=HEADS, num_queries=1)
    with torch.no_grad():
        for name, parameter in pooler.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return pooler


def multihead_attention() -> nn.Module:
    """torch's, with our weights."""
    return TorchPooler(folded())


def open_clip() -> nn.Module:
    """open_clip's, with our weights."""
    return OpenClipAndNorm(folded())


POOLERS: dict[str, Callable[[], nn.Module]] = {
    "folded (ours)": folded,
    "torch MultiheadAttention": multihead_attention,
}
if OpenClipPooler is not None:
    POOLERS["open_clip AttentionalPooler"] = open_clip


def forward_and_backward(pooler: nn.Module, *, tokens: Tensor, pull: Tensor, precision: str) -> dict[str, Tensor]:
    """Output and gradients, which nothing holds on to afterwards; `pull` is the output's gradient."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        pooled = pooler(tokens)
    torch.autograd.backward(pooled, pull.to(pooled.dtype))
    leaves = dict(pooler.named_parameters()) | ({"tokens": tokens} if tokens.requires_grad else {})
    found = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for leaf in leaves.values():
        leaf.grad = None
    return found | {"pooled": pooled.detach()}


def build(make: Callable[[], nn.Module], batch: int, frozen: str, device: str, precision: str) -> Side:
    """A side with inputs of its own. In bf16 the tokens are bf16, as an encoder under autocast leaves them."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(batch, TOKENS, WIDTH, generator=generator).to(device)
    if precision == "bf16":
        tokens = tokens.bfloat16()
    pull = torch.randn(batch, 1, WIDTH, generator=generator).to(device)
    tokens.requires_grad_(frozen != "frozen")
    return partial(forward_and_backward, make().to(device), tokens=tokens, pull=pull, precision=precision)


def error(name: str, *, options: argparse.Namespace) -> float:
    """The largest relative difference from torch in fp32: of outputs, of the tokens' and all parameters' gradients."""
    arguments = (min(CHECKED_BATCH, options.batch), "trained", options.device)
    expected = build(multihead_attention, *arguments, "fp32")()
    actual = build(POOLERS[name], *arguments, options.precision)()
    assert isinstance(expected, dict) and isinstance(actual, dict)
    if name == "folded (ours)":
        actual = open_clip_names(actual) | {key: actual[key] for key in ("tokens", "pooled")}
    actual = {key.removeprefix("pooler."): value for key, value in actual.items()}
    names = sorted(expected)
    assert names == sorted(actual)
    found = largest_relative_error([actual[key] for key in names], expected=[expected[key] for key in names])
    if options.precision == "fp32" and found > LARGEST_ERROR_FP32:
        sys.exit(f"Expected {name} to equal torch's pooler to {LARGEST_ERROR_FP32}, got {found:.2g}: mend it first.")
    return found


def measure(frozen: str, *, errors: dict[str, float], options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each pooler; what the others take is told in multiples of ours."""
    arguments = (options.batch, frozen, options.device, options.precision)
    memory = {name: extra_mebibytes(build, make, *arguments, device=options.device) for name, make in POOLERS.items()}
    sides = {name: build(make, *arguments) for name, make in POOLERS.items()}
    times = median_milliseconds(sides, device=options.device, repeats=options.repeats)
    rows = [
        {"tokens": frozen, "side": name, "ms": times[name], "extra MiB": memory[name], "error": errors[name]}
        for name in POOLERS
    ]
    return ratios(rows, of="folded (ours)")


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: tokens and autocast")
    commands.add_argument("--batch", type=int, default=32)
    options = commands.parse_args()
    torch.set_num_threads(1)
    if OpenClipPooler is None:
        print("open_clip is not installed, so its pooler is left out: pip install 'coca-video[open-clip]'")
    errors = {name: error(name, options=options) for name in POOLERS}
    report(
        [row for frozen in ("frozen", "trained") for row in measure(frozen, errors=errors, options=options)],
        options=options,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
