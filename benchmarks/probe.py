"""A sweep of probes on frozen tokens, against V-JEPA 2's classifiers trained one by one, and against the encoder.

    python benchmarks/probe.py --part sweep --json runs/benchmarks/probe_sweep.json
    python benchmarks/probe.py --part encode --json runs/benchmarks/probe_encode.json
    python benchmarks/probe.py --part sweep --device cuda --precision bf16 --batch 32

`--part sweep`: 20 probes (4 rates, 5 decays; they cost the same whatever they are) on the tokens of 16 frames of 196
patches, [batch, 16, 196, 768], 12 heads, 400 classes: forward, loss and backward of all. The peers are 20 attentive
classifiers of depth 1 and 4 as V-JEPA 2 describes them (arXiv 2506.09985, appendix; 16 heads there, 12 here, as the
width asks). They run one after the other and clip by clip nothing gets cheaper, so `--peers` of them are run on
`--peer-batch` clips and the time is scaled to 20 and to a clip. Goals: 70 and 2,000 times less time on a CPU, 30 and
200 times on a GPU, where ours also has to move its tokens at half of the speed of a copy.

`--part encode`: ViT-B/16 on the same clips, and what 20 probes, their optimizer included, add to it: goal, 3% or less.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timing import Side, median_milliseconds, parser, report
from torch import Tensor, nn
from torch.nn import functional as F

from coca_video.models.head import HeadConfig, VideoHead, stacked_logits
from coca_video.models.image import ImageEncoder, VitConfig

FRAMES, PATCHES, WIDTH, HEADS, CLASSES = 16, 196, 768, 12, 400
PROBES = 20
OURS, COPY = "single query, folded (ours)", "a copy of the tokens"
TOKEN_PASSES = 4  # of a folded forward and backward: scores, pooling, and the same two for their gradients


class Block(nn.Module):
    """A pre-norm block: self-attention over all tokens, or one query that attends over them, then an MLP."""

    def __init__(self, *, cross: bool) -> None:
        super().__init__()
        self.norm_attention, self.norm_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        # The cross-attention of V-JEPA 2 has no output projection, its self-attention does.
        self.out = nn.Identity() if cross else nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Attends over `context`, or over itself."""
        normed = self.norm_attention(x if context is None else context)
        query = self.q(normed if context is None else x)
        key, value = self.kv(normed).chunk(2, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (query, key, value))
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        x = x + self.out(attended)
        mlp: Tensor = self.mlp(self.norm_mlp(x))
        return x + mlp


class AttentiveClassifier(nn.Module):
    """V-JEPA 2's classifier of a depth: depth - 1 self-attention blocks, one cross-attention block, a linear layer."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.query = nn.Parameter(0.02 * torch.randn(1, 1, WIDTH))
        self.blocks = nn.ModuleList(Block(cross=False) for _ in range(depth - 1))
        self.pool = Block(cross=True)
        self.linear = nn.Linear(WIDTH, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, frames, patches, WIDTH] to [batch, CLASSES]."""
        x = tokens.flatten(1, 2)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.linear(self.pool(self.query.expand(len(x), -1, -1), x).squeeze(1))
        return logits


def video_heads() -> nn.ModuleList:
    """Our probes."""
    return nn.ModuleList(
        VideoHead(HeadConfig(), dim=WIDTH, num_heads=HEADS, num_classes=CLASSES, num_frames=FRAMES)
        for _ in range(PROBES)
    )


def attentive_classifiers(depth: int, number: int) -> nn.ModuleList:
    """Those of V-JEPA 2."""
    return nn.ModuleList(AttentiveClassifier(depth) for _ in range(number))


def forward_and_backward(heads: nn.ModuleList, *, tokens: Tensor, labels: Tensor, precision: str) -> None:
    """The loss of every head on the same tokens, and all gradients; ours together, the others in a loop."""
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=precision == "bf16"):
        if isinstance(heads[0], VideoHead):
            logits = stacked_logits(list(heads), tokens)
            F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(len(heads)), reduction="sum").backward()
        else:
            for head in heads:
                F.cross_entropy(head(tokens).float(), labels, reduction="sum").backward()
    for parameter in heads.parameters():
        parameter.grad = None


def inputs(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Tokens, bf16 where that is the precision, and labels."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(options.batch, FRAMES, PATCHES, WIDTH, generator=generator).to(options.device)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator).to(options.device)
    return (tokens.bfloat16() if options.precision == "bf16" else tokens), labels


def measure_sweep(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each kind of head: what 20 of them take on a batch, and in multiples of ours."""
    tokens, labels = inputs(options)
    peer_batch = min(options.peer_batch, options.batch)
    kinds: dict[str, tuple[Callable[[], nn.ModuleList], int, int]] = {
        OURS: (video_heads, PROBES, options.batch),
        "V-JEPA 2, depth 1": (partial(attentive_classifiers, 1, options.peers), options.peers, peer_batch),
        "V-JEPA 2, depth 4": (partial(attentive_classifiers, 4, options.peers), options.peers, peer_batch),
    }
    sides: dict[str, Side] = {
        name: partial(
            forward_and_backward,
            make().to(options.device),
            tokens=tokens[:batch],
            labels=labels[:batch],
            precision=options.precision,
        )
        for name, (make, _, batch) in kinds.items()
    }
    sides[COPY] = tokens.clone
    times = median_milliseconds(sides, device=options.device, repeats=options.repeats)
    kinds[COPY] = (video_heads, PROBES, options.batch)
    a_clip = {name: times[name] * PROBES / number / batch for name, (_, number, batch) in kinds.items()}
    reading = TOKEN_PASSES * times[COPY] / 2 / times[OURS]  # a copy reads once and writes once
    print(f"Ours reads its tokens {TOKEN_PASSES} times: at {reading:.2f} of the speed of a copy.", file=sys.stderr)
    return [
        {
            "side": name,
            "run": number,
            "clips": batch,
            "ms a clip for 20": a_clip[name],
            "time ratio": a_clip[name] / a_clip[OURS],
        }
        for name, (_, number, batch) in kinds.items()
    ]


def measure_encode(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The encoder alone, and with 20 probes trained on what it gives: one update of each."""
    torch.manual_seed(0)
    vit = VitConfig(width=WIDTH, depth=12, num_heads=HEADS, mlp_width=4 * WIDTH, image_size=224, patch_size=16)
    encoder = ImageEncoder(vit).to(options.device).eval().requires_grad_(requires_grad=False)
    frames = torch.randn(options.batch * FRAMES, 3, 224, 224, device=options.device)
    tokens, labels = inputs(options)
    heads = video_heads().to(options.device)
    optimizer = torch.optim.AdamW(heads.parameters(), fused=True)

    def encode() -> None:
        with torch.inference_mode(), torch.autocast(options.device, torch.bfloat16, options.precision == "bf16"):
            for clip in frames.split(FRAMES):
                encoder(clip)

    def update() -> None:
        with torch.autocast(options.device, torch.bfloat16, enabled=options.precision == "bf16"):
            logits = stacked_logits(list(heads), tokens)
        F.cross_entropy(logits.flatten(0, 1).float(), labels.repeat(PROBES), reduction="sum").backward()
        optimizer.step()
        optimizer.zero_grad()

    times = median_milliseconds({"encode": encode, "20 probes": update}, device=options.device, repeats=options.repeats)
    return [
        {"side": name, "ms a clip": time / options.batch, "of encode": time / times["encode"]}
        for name, time in times.items()
    ]


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--part", choices=["sweep", "encode"], required=True)
    commands.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: tokens and autocast")
    commands.add_argument("--batch", type=int, default=32, help="clips")
    commands.add_argument("--peers", type=int, default=1, help="classifiers of V-JEPA 2 that are run")
    commands.add_argument("--peer-batch", type=int, default=4, help="clips that they are run on")
    options = commands.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = measure_sweep(options) if options.part == "sweep" else measure_encode(options)
    report(rows, options=options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
