"""A sweep: many probes on one frozen encoder in one pass over its tokens; the best on held-out clips is kept.

Each is trained as if it were alone: its loss reaches no other's weights, and clipping and averaging act on it by
itself. What the probes share is reading and encoding clips, and one read of the tokens for all heads that fold.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coca_video.distributed import (
    counts_of_ranks,
    gather_objects,
    is_main,
    on_main,
    parallelize,
    start_from_environment,
    whole_model,
    world_size,
)
from coca_video.eval.features import frozen_encode
from coca_video.hub import Saved
from coca_video.losses import classification_loss_sum
from coca_video.models.head import VideoHead, stacked_logits
from coca_video.models.video import VideoClassifier
from coca_video.train.best import BestWeights
from coca_video.train.classify import ProbeResult, parts_of, probe_result, run_identity, save_classifier, write_test
from coca_video.train.loop import Training, pick_device, run_loop
from coca_video.train.optim import (
    adding_up,
    clip_gradients,
    freeze,
    optimizer_of,
    parameter_groups,
    parameters_of,
)
from coca_video.train.precision import autocast
from coca_video.train.probe_config import ProbeConfig
from coca_video.train.probe_data import (
    ProbeBatch,
    Splits,
    check_decoder,
    encoded,
    evaluation,
    read_splits,
    training_data,
)
from coca_video.train.probe_model import build_classifier, load_pretrained
from coca_video.train.run import Run
from coca_video.train.sweep_config import SweepConfig
from coca_video.train.sweep_figures import (
    BEST,
    HeldOutPart,
    SweptProbe,
    best_of,
    key_of,
    options_of,
    read_probes,
    swept_probes,
    write_probes,
)
from coca_video.train.window import Sum, one_of_ranks

StackedScores = Callable[[ProbeBatch], Float[Tensor, "probes batch classes"]]


@dataclass(frozen=True, kw_only=True)
class SweepResult:
    """All probes by number, the one that was chosen, and its run's result."""

    probes: tuple[SweptProbe, ...]
    chosen: SweptProbe
    num_held_out: int
    result: ProbeResult


class ProbeHeads(nn.Module):
    """The heads of all probes: what ranks share."""

    def __init__(self, heads: Sequence[VideoHead]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(
        self,
        tokens: Float[Tensor, "batch frames tokens dim"],
        *,
        variance: Float[Tensor, "batch frames tokens"] | None = None,
    ) -> Float[Tensor, "probes batch classes"]:
        """Tokens to the logits of every head; `variance`: see `VideoHead.forward`."""
        return stacked_logits([self[number] for number in range(len(self.heads))], tokens, variance=variance)

    def __getitem__(self, number: int) -> VideoHead:
        head = self.heads[number]
        assert isinstance(head, VideoHead)
        return head


def sweep_step(
    model: nn.Module,
    batch: ProbeBatch,
    optimizer: torch.optim.Optimizer,
    *,
    scores: StackedScores,
    probes: Sequence[ProbeConfig],
    parameters: Sequence[list[Tensor]],
) -> dict[str, Sum]:
    """One update of every probe, each as `classify.probe_step` does one.

    model: what `parallelize` gave of the heads. scores: a part's class scores, by way of `model`. probes, parameters:
    of each head, its options and its trainable weights.
    """
    counts = counts_of_ranks(len(batch))
    parts = parts_of(batch, most=max(counts), size=probes[0].micro_batch_size)
    losses, correct = torch.zeros(len(probes)), torch.zeros(len(probes), dtype=torch.int64)
    optimizer.zero_grad(set_to_none=True)
    for number, (part, weight) in enumerate(parts):
        with adding_up(model, is_last=number == len(parts) - 1):
            logits = scores(part)
            totals = torch.stack(
                [
                    classification_loss_sum(own, labels=part.labels, label_smoothing=probe.label_smoothing)
                    for own, probe in zip(logits, probes, strict=True)
                ]
            )
            part_losses = weight * totals / sum(counts)
            # In a sum, each weight's gradient is that of its own probe's loss. (Averaged over ranks.)
            torch.autograd.backward(part_losses.sum() * world_size())
        heaviest = part.labels.argmax(dim=1) if part.labels.is_floating_point() else part.labels
        losses = losses.to(totals) + part_losses.detach()
        correct = correct.to(totals.device) + weight * (logits.argmax(dim=2) == heaviest).sum(dim=1)
    norms = [
        clip_gradients(own, bound=probe.optim.gradient_clip) for own, probe in zip(parameters, probes, strict=True)
    ]
    optimizer.step()
    sums: dict[str, Sum] = {}
    for number, norm in enumerate(norms):
        sums[key_of("loss", number=number)] = Sum(losses[number], 1 / world_size())
        sums[key_of("top1", number=number)] = Sum(correct[number], len(batch))
        sums[key_of("gradient_norm", number=number)] = one_of_ranks(norm)
    return sums


def run_sweep(config: SweepConfig) -> SweepResult:
    """Trains all probes, chooses one by the held-out clips, tests that one, writes its classifier.

    Goes on where `config.probe.out` stopped. Started by torchrun, ranks share every batch and every evaluation.
    """
    with start_from_environment(pick_device(config.probe.device)) as device:
        return _run(config, device=device)


def _run(config: SweepConfig, *, device: torch.device) -> SweepResult:
    probe = config.probe
    check_decoder(probe.clips.decoder)
    splits = read_splits(probe.clips, seed=probe.loop.seed)
    assert splits.holdout is not None
    num_held_out, classes = len(splits.holdout.manifest.rows), splits.train.manifest.classes
    pretrained = load_pretrained(probe.encoder)
    model, heads = _build(config, num_classes=len(classes), pretrained=pretrained)
    model, heads = model.to(device).eval(), heads.to(device)
    run = Run(probe.out, config=config, identity=run_identity(model, splits=splits))
    if not run.is_finished:
        on_main(lambda: write_probes(run.folder, config=config, num_held_out=num_held_out))
        probes, step = _train(config, model=model, heads=heads, splits=splits, run=run, device=device)
        on_main(lambda: write_probes(run.folder, config=config, num_held_out=num_held_out, probes=probes, step=step))
        chosen = best_of(probes)
        _take_head(model, heads=heads, number=chosen.number, device=device)
        _test(model, chosen=chosen, step=step, config=config, splits=splits, run=run, device=device)
        save_classifier(model, classes=classes, pretrained=pretrained, config=chosen.config, run=run)
    probes = read_probes(run.folder, config=config)
    return SweepResult(probes=probes, chosen=best_of(probes), num_held_out=num_held_out, result=probe_result(run))


def _build(config: SweepConfig, *, num_classes: int, pretrained: Saved | None) -> tuple[VideoClassifier, ProbeHeads]:
    """A classifier with the encoder, and the heads, each as `run_probe` would begin with it."""
    models: dict[str, VideoClassifier] = {}
    for probe in config.probes:
        name = repr(probe.head)  # the initial weights depend on nothing else that differs
        if name not in models:
            models[name] = build_classifier(probe, num_classes=num_classes, pretrained=pretrained)
            models[name].encoder = next(iter(models.values())).encoder
    heads = [copy.deepcopy(models[repr(probe.head)].head) for probe in config.probes]
    return next(iter(models.values())), ProbeHeads(heads)


def _train(
    config: SweepConfig,
    *,
    model: VideoClassifier,
    heads: ProbeHeads,
    splits: Splits,
    run: Run,
    device: torch.device,
) -> tuple[tuple[SweptProbe, ...], int]:
    """Leaves in `heads` what is to be chosen from; their held-out figures, and the update they are of."""
    probe, first = config.probe, config.probes[0]
    training = _training(config, model=model, heads=heads, splits=splits, run=run, device=device)
    run_loop(training, config=probe.loop, optim=first.optim, run=run)
    heads.eval()
    best = training.best
    step = probe.loop.steps if best is None else best.step
    assert step is not None
    records = gather_objects(run.log.records() if is_main() else None)[0]
    return swept_probes(records, step=step, config=config), step


def _training(
    config: SweepConfig,
    *,
    model: VideoClassifier,
    heads: ProbeHeads,
    splits: Splits,
    run: Run,
    device: torch.device,
) -> Training:
    """What the loop needs. Its rate is that of probe 0, of which each group has a multiple."""
    probe, probes = config.probe, config.probes
    assert splits.holdout is not None
    data = training_data(splits.train, model=model, config=probe, device=device)
    for number, own in enumerate(probes):
        freeze(_named(heads[number]), config=own.optim)
    parallel = parallelize(heads, strategy=probe.loop.strategy)
    groups = [_groups(heads[number], config=own, first=probes[0]) for number, own in enumerate(probes)]
    optimizer = optimizer_of([group for of_probe in groups for group in of_probe], config=probes[0].optim)
    parameters = [parameters_of(of_probe) for of_probe in groups]
    held_out = HeldOutPart(
        splits.holdout, model=model, heads=heads, config=probe, device=device, note_unreadable=run.note_unreadable
    )
    scores = _scores(model, parallel=parallel, config=probe, device=device)
    return Training(
        model=heads,
        optimizer=optimizer,
        step=lambda batch: sweep_step(
            parallel, data.prepare(batch), optimizer, scores=scores, probes=probes, parameters=parameters
        ),
        dataset=data.dataset,
        collate=data.collate,
        order=data.order,
        evaluate=held_out.evaluate,
        best=BestWeights(run.folder / "best", metric=BEST) if probe.keep_best else None,
        num_workers=data.num_workers,
        device=device,
    )


def _named(head: VideoHead) -> nn.Module:
    """The head under the name that it has in a classifier, by which `rate_factors` go."""
    return nn.ModuleDict({"head": head})


def _groups(head: VideoHead, *, config: ProbeConfig, first: ProbeConfig) -> list[dict[str, Any]]:
    """The groups of one probe; their factors are of the first probe's rate, which the loop knows."""
    groups = parameter_groups(_named(head), config=config.optim)
    for group in groups:
        group["rate_factor"] *= config.optim.learning_rate / first.optim.learning_rate
    return groups


def _scores(model: VideoClassifier, *, parallel: nn.Module, config: ProbeConfig, device: torch.device) -> StackedScores:
    """Class scores of all heads by way of `parallel`, which stands for them."""
    encode = frozen_encode(model, device=device, bf16=config.loop.precision == "bf16")

    def of_heads(part: ProbeBatch) -> Tensor:
        tokens = encoded(part, encode=encode)
        with autocast(device, precision=config.loop.precision, num_tokens=None):
            logits: Tensor = parallel(tokens.inputs, variance=tokens.variance)
        return logits

    return of_heads


def _take_head(model: VideoClassifier, *, heads: ProbeHeads, number: int, device: torch.device) -> None:
    """Makes of the classifier that of one probe, whole where the heads are sharded."""
    whole = whole_model(heads, fresh=lambda: _fresh(model, heads=heads))
    model.head = whole[number].to(device).eval()
    model.config = replace(model.config, head=model.head.config)


def _fresh(model: VideoClassifier, *, heads: ProbeHeads) -> ProbeHeads:
    """Heads like those that are sharded, whole."""
    sizes: dict[str, int] = {
        "dim": model.encoder.width,
        "num_heads": model.encoder.num_heads,
        "num_classes": model.config.num_classes,
        "num_frames": model.config.num_frames,
    }
    return ProbeHeads([VideoHead(heads[number].config, **sizes) for number in range(len(heads.heads))])


def _test(
    model: VideoClassifier,
    *,
    chosen: SweptProbe,
    step: int,
    config: SweepConfig,
    splits: Splits,
    run: Run,
    device: torch.device,
) -> None:
    """Evaluates the chosen probe, and no other, on the test part, if there is one."""
    part = splits.test
    if part is None:
        return
    result = evaluation(part, what="test", model=model, config=config.probe, device=device)()
    run.note_unreadable(list(result.unreadable))
    how = {
        "probe": chosen.number,
        "of": len(config.probes),
        "by": "top1 on held-out training clips",
        "held_out_top1": chosen.held_out.top1,
        "step": step,
        **options_of(chosen.config),
    }
    on_main(lambda: write_test(result, part=part, config=config.probe, run=run, more_facts={"chosen": how}))
