"""How the probes of a sweep do on held-out clips, which of them is chosen by that, and `probes.json`, which says so."""

import json
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor, nn

from coca_video.config import to_json
from coca_video.data.loader import Unreadable
from coca_video.data.video import collate_clips
from coca_video.eval.features import TokenBatch, encode_batch
from coca_video.eval.metrics import metrics_of_ranks, ranks_of_labels
from coca_video.eval.passes import one_pass, over_ranks, share_of_rank
from coca_video.eval.token_cache import TokenCache
from coca_video.models.video import VideoClassifier
from coca_video.train.log import Record
from coca_video.train.loop import progress_bar
from coca_video.train.probe_config import ProbeConfig
from coca_video.train.probe_data import Part, probe_clips, token_cache
from coca_video.train.run import write_atomically
from coca_video.train.sweep_config import SweepConfig

BATCH_SIZE = 16  # of clips that are evaluated, as in `evaluate_clips`
BEST = "best_top1"
PROBES_FILE = "probes.json"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """A probe's accuracies on clips in [0, 1], and its mean cross entropy there, without label smoothing."""

    top1: float
    top5: float
    mean_class: float
    loss: float


@dataclass(frozen=True, kw_only=True)
class SweptProbe:
    """A probe of a sweep, by number: its config, as a run of its own has it, and how it does on held-out clips."""

    number: int
    config: ProbeConfig
    held_out: Figures

    @property
    def merit(self) -> tuple[float, float, int]:
        """Greater for a better probe: by held-out top1, then held-out loss; of equals the first is better."""
        return self.held_out.top1, -self.held_out.loss, -self.number


def key_of(name: str, *, number: int) -> str:
    """What the log calls a value of a probe."""
    return f"{name}/{number:02d}"


class _Judged(NamedTuple):
    """One held-out video: for each probe, how many classes come before the right one, and its cross entropy."""

    video_id: str
    label: int
    ranks: Int64[np.ndarray, "probes"]
    losses: Float64[np.ndarray, "probes"]


class HeldOutPart:
    """The held-out clips of a sweep, encoded once an evaluation for all heads, or read from the token cache.

    heads: tokens (and `variance`) to the logits of all probes. `note_unreadable` is told what could not be read.
    """

    def __init__(
        self,
        part: Part,
        *,
        model: VideoClassifier,
        heads: nn.Module,
        config: ProbeConfig,
        device: torch.device,
        note_unreadable: Callable[[list[Unreadable]], object],
    ) -> None:
        self._part, self._model, self._heads, self._config, self._device = part, model, heads, config, device
        self._note_unreadable = note_unreadable
        self._tokens = None
        if config.token_cache is not None:
            self._tokens = part.samples(token_cache(part.whole, model=model, config=config, device=device))
        else:
            self._clips = part.samples(probe_clips(part.whole, model=model, config=config, augment=False))

    def evaluate(self) -> dict[str, float]:
        """Each probe's figures for the log, and the best top1 of all. Ranks share the clips, and each gets all."""
        unreadable: list[Unreadable] = []
        own = [video for batch in self._batches(unreadable) for video in self._judge(batch)]
        videos = sorted(over_ranks(own), key=attrgetter("video_id"))
        unreadable = over_ranks(unreadable)
        self._note_unreadable(unreadable)
        if not videos:
            raise ValueError(f"None of the {len(unreadable)} held-out videos could be read: {unreadable[0].cause}")
        figures = self._figures(videos)
        values = {
            key_of(name, number=number): value
            for number, of_probe in enumerate(figures)
            for name, value in asdict(of_probe).items()
        }
        return {BEST: max(of_probe.top1 for of_probe in figures), **values}

    def _batches(self, unreadable: list[Unreadable]) -> Generator[TokenBatch, None, None]:
        options: dict[str, Any] = {
            "batch_size": BATCH_SIZE,
            "num_workers": self._config.loop.num_workers,
            "device": self._device,
            "unreadable": unreadable,
        }
        if self._tokens is not None:
            for packed in one_pass(share_of_rank(self._tokens), collate=TokenCache.collate, **options):
                yield packed.to_tokens()
            return
        bf16 = self._config.loop.precision == "bf16"
        clips = share_of_rank(self._clips)
        with progress_bar("evaluating held-out clips", total=len(clips)) as bar:
            for batch in one_pass(clips, collate=collate_clips, on_batch=bar.update, **options):
                yield encode_batch(self._model, batch, device=self._device, bf16=bf16)

    @torch.no_grad()
    def _judge(self, batch: TokenBatch) -> list[_Judged]:
        logits: Float[Tensor, "probes batch classes"] = self._heads(batch.tokens, variance=batch.variance)
        log_scores = logits.cpu().double().log_softmax(dim=2).numpy()
        labels = batch.labels.cpu().numpy()
        ranks = np.stack([ranks_of_labels(np.exp(of_probe), labels=labels) for of_probe in log_scores], axis=1)
        losses = -log_scores[:, np.arange(len(labels)), labels].T
        return list(map(_Judged, batch.video_ids, labels.tolist(), ranks, losses))

    def _figures(self, videos: list[_Judged]) -> list[Figures]:
        labels = np.array([video.label for video in videos], dtype=np.int64)
        ranks = np.stack([video.ranks for video in videos], axis=1)
        losses = np.stack([video.losses for video in videos], axis=1).mean(axis=1)
        num_classes = len(self._part.manifest.classes)
        metrics = [metrics_of_ranks(of_probe, labels=labels, num_classes=num_classes) for of_probe in ranks]
        return [
            Figures(top1=of_probe.top1, top5=of_probe.top5, mean_class=of_probe.mean_class, loss=float(loss))
            for of_probe, loss in zip(metrics, losses, strict=True)
        ]


def swept_probes(records: list[Record], *, step: int, config: SweepConfig) -> tuple[SweptProbe, ...]:
    """The probes with what a run's log has of their evaluation after update `step`."""
    found = [record for record in records if record["kind"] == "evaluation" and record["step"] == step]
    if len(found) != 1:
        raise ValueError(f"metrics.jsonl has no evaluation of step {step}; was it changed? Start another --probe.out.")
    values = found[0]
    return tuple(
        SweptProbe(
            number=number,
            config=probe,
            held_out=Figures(
                top1=float(values[key_of("top1", number=number)]),
                top5=float(values[key_of("top5", number=number)]),
                mean_class=float(values[key_of("mean_class", number=number)]),
                loss=float(values[key_of("loss", number=number)]),
            ),
        )
        for number, probe in enumerate(config.probes)
    )


def best_of(probes: tuple[SweptProbe, ...]) -> SweptProbe:
    """The one with the most merit."""
    return max(probes, key=attrgetter("merit"))


def options_of(probe: ProbeConfig) -> dict[str, Any]:
    """What may differ between the probes of a sweep, as JSON has it."""
    return {
        "learning_rate": probe.optim.learning_rate,
        "weight_decay": probe.optim.weight_decay,
        "label_smoothing": probe.label_smoothing,
        "head": to_json(probe.head),
    }


def write_probes(
    folder: Path,
    *,
    config: SweepConfig,
    num_held_out: int,
    probes: tuple[SweptProbe, ...] = (),
    step: int | None = None,
) -> None:
    """Which number has which options; with `probes`, their figures after update `step` and the number chosen by them.

    num_held_out: clips, unreadable ones included.
    """
    figures = [asdict(probe.held_out) for probe in probes] if probes else [None for _ in config.probes]
    document = {
        "num_held_out": num_held_out,
        "step": step,
        "chosen": best_of(probes).number if probes else None,
        "probes": [
            {"number": number, **options_of(probe), "held_out": held_out}
            for number, (probe, held_out) in enumerate(zip(config.probes, figures, strict=True))
        ],
    }
    write_atomically(folder / PROBES_FILE, json.dumps(document, indent=2) + "\n")


def read_probes(folder: Path, *, config: SweepConfig) -> tuple[SweptProbe, ...]:
    """The probes of a finished sweep."""
    document = json.loads((folder / PROBES_FILE).read_text())
    return tuple(
        SweptProbe(number=number, config=probe, held_out=Figures(**written["held_out"]))
        for number, (probe, written) in enumerate(zip(config.probes, document["probes"], strict=True))
    )
