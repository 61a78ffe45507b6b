"""Training a classifier of clips: the head alone on a frozen encoder (CoCa section 3.3), or the encoder too."""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from coca_video.data.transforms import normalize
from coca_video.distributed import (
    counts_of_ranks,
    on_main,
    parallelize,
    start_from_environment,
    whole_model,
    world_size,
)
from coca_video.eval.classification import ClassificationResult, write_result
from coca_video.eval.features import frozen_encode
from coca_video.hub import Saved, fingerprint, save
from coca_video.losses import classification_loss_sum
from coca_video.models.video import VideoClassifier
from coca_video.train.best import BestWeights
from coca_video.train.loop import Training, pick_device, run_loop
from coca_video.train.optim import adding_up, build_optimizer, freeze, take_step
from coca_video.train.precision import autocast
from coca_video.train.probe_config import Frozen, ProbeConfig
from coca_video.train.probe_data import (
    Part,
    ProbeBatch,
    Splits,
    check_decoder,
    encoded,
    evaluation,
    read_splits,
    training_data,
)
from coca_video.train.probe_model import build_classifier, load_pretrained, tune, tuned_optim, untuned
from coca_video.train.run import Run
from coca_video.train.window import Sum, one_of_ranks

Scores = Callable[[ProbeBatch], Float[Tensor, "batch classes"]]


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Where the classifier is, its evaluation (None without a test part), and how many clips could not be read."""

    model_folder: Path
    evaluation: dict[str, Any] | None
    num_unreadable: int


def probe_step(
    model: nn.Module, batch: ProbeBatch, optimizer: torch.optim.Optimizer, *, scores: Scores, config: ProbeConfig
) -> dict[str, Sum]:
    """One update on the mean loss of all ranks' batches, gone through in parts of `config.micro_batch_size`.

    model: what `parallelize` gave of what is trained. scores: a part's class scores, by way of `model`.
    `top1` counts against the class of the larger share where labels are soft.
    """
    counts = counts_of_ranks(len(batch))
    parts = parts_of(batch, most=max(counts), size=config.micro_batch_size)
    loss, correct = torch.zeros(()), torch.zeros((), dtype=torch.int64)
    optimizer.zero_grad(set_to_none=True)
    for number, (part, weight) in enumerate(parts):
        with adding_up(model, is_last=number == len(parts) - 1):
            logits = scores(part)
            total = classification_loss_sum(logits, labels=part.labels, label_smoothing=config.label_smoothing)
            part_loss = weight * total / sum(counts)
            torch.autograd.backward(part_loss * world_size())  # gradients are averaged over ranks
        heaviest = part.labels.argmax(dim=1) if part.labels.is_floating_point() else part.labels
        loss = loss.to(total) + part_loss.detach()
        correct = correct.to(total.device) + weight * (logits.argmax(dim=1) == heaviest).sum()
    norm = take_step(optimizer, gradient_clip=config.optim.gradient_clip)
    return {
        "loss": Sum(loss, 1 / world_size()),
        "top1": Sum(correct, len(batch)),
        "gradient_norm": one_of_ranks(norm),
    }


def parts_of(batch: ProbeBatch, *, most: int, size: int | None) -> list[tuple[ProbeBatch, int]]:
    """As many parts as `most` samples in parts of `size` make, even and with weight 1.

    Ranks hold different numbers of samples and fsdp2 needs as many forwards of each: where a rank has too few, the
    parts left over are its first sample with weight 0.
    """
    number = 1 if size is None else -(-most // size)
    bounds = [len(batch) * part // number for part in range(number + 1)]
    return [
        (batch.part(first, last), 1) if last > first else (batch.part(0, 1), 0)
        for first, last in itertools.pairwise(bounds)
    ]


def run_probe(config: ProbeConfig) -> ProbeResult:
    """Trains, evaluates on the test part, writes the classifier. Goes on where `out` stopped.

    Started by torchrun, ranks share every batch and every evaluation.
    """
    with start_from_environment(pick_device(config.device)) as device:
        return _run(config, device=device)


def _run(config: ProbeConfig, *, device: torch.device) -> ProbeResult:
    check_decoder(config.clips.decoder)
    splits = read_splits(config.clips, seed=config.loop.seed)
    pretrained = load_pretrained(config.encoder)
    model = build_classifier(config, num_classes=len(splits.train.manifest.classes), pretrained=pretrained).to(device)
    run = Run(config.out, config=config, identity=run_identity(model, splits=splits))
    if run.is_finished:
        return probe_result(run)
    tune(model, config=config)
    test = _Evaluation.on(splits.test, what="test", model=model, config=config, device=device)
    holdout = _Evaluation.on(splits.holdout, what="held-out", model=model, config=config, device=device)
    training = _training(model, part=splits.train, config=config, run=run, device=device)
    watched = holdout or test
    training.evaluate = None if watched is None else watched.metrics
    run_loop(training, config=config.loop, optim=config.optim, run=run)
    model.eval()
    if test is not None and splits.test is not None:
        # A run that was killed after its last checkpoint has no step left in which the loop would evaluate.
        result = test.latest or test.evaluate()
        run.note_unreadable(list(result.unreadable))
        part = splits.test
        on_main(lambda: write_test(result, part=part, config=config, run=run))
    save_classifier(model, classes=splits.train.manifest.classes, pretrained=pretrained, config=config, run=run)
    return probe_result(run)


def run_identity(model: VideoClassifier, *, splits: Splits) -> dict[str, str]:
    """What must be the same when the run goes on."""
    parts = {"train": splits.train, "holdout": splits.holdout, "test": splits.test}
    fingerprints = {
        f"{name}_fingerprint": part.manifest.fingerprint() for name, part in parts.items() if part is not None
    }
    return {"encoder_fingerprint": fingerprint(model.encoder), **fingerprints}


def probe_result(run: Run) -> ProbeResult:
    """What a finished run has found."""
    path = _test_file(run)
    found = json.loads(path.read_text()) if path.is_file() else None
    return ProbeResult(model_folder=run.model_folder, evaluation=found, num_unreadable=len(run.unreadable))


def _test_file(run: Run) -> Path:
    return run.folder / "test.json"  # and not in evaluation/, which belongs to whoever evaluates later


@dataclass(kw_only=True)
class _Evaluation:
    """What evaluates on a part of the clips, and its latest result."""

    evaluate: Callable[[], ClassificationResult]
    latest: ClassificationResult | None = None

    @classmethod
    def on(cls, part: Part | None, **options: Any) -> "_Evaluation | None":
        """Of `part`, with the options of `probe_data.evaluation`; None without one."""
        return None if part is None else cls(evaluate=evaluation(part, **options))

    def metrics(self) -> dict[str, float]:
        """Evaluates anew; the figures for the log."""
        self.latest = self.evaluate()
        metrics = self.latest.metrics
        return {"top1": metrics.top1, "top5": metrics.top5, "mean_class": metrics.mean_class}


def _training(model: VideoClassifier, *, part: Part, config: ProbeConfig, run: Run, device: torch.device) -> Training:
    """What the loop needs; over ranks, what is trained is wrapped or sharded: the head, or all of the model."""
    data = training_data(part, model=model, config=config, device=device)
    run.note_unreadable(list(data.unreadable))
    optim = tuned_optim(model, config=config)
    freeze(model, config=optim)
    strategy = config.loop.strategy
    if isinstance(config.tuning, Frozen):
        parallel = parallelize(model.head, strategy=strategy)
    else:
        parallel = parallelize(model, strategy=strategy, methods=("encode", "classify"))
    optimizer = build_optimizer(model, config=optim)
    scores = _scores(model, parallel=parallel, config=config, device=device)
    return Training(
        model=model,
        optimizer=optimizer,
        step=lambda batch: probe_step(parallel, data.prepare(batch), optimizer, scores=scores, config=config),
        dataset=data.dataset,
        collate=data.collate,
        order=data.order,
        best=BestWeights(run.folder / "best", metric="top1") if config.keep_best else None,
        num_workers=data.num_workers,
        device=device,
    )


def _scores(model: VideoClassifier, *, parallel: nn.Module, config: ProbeConfig, device: torch.device) -> Scores:
    """Class scores by way of `parallel`, which stands for the head of a frozen encoder, else for the model."""
    image = model.config.image
    encode = frozen_encode(model, device=device, bf16=config.loop.precision == "bf16")

    def of_head(part: ProbeBatch) -> Tensor:
        tokens = encoded(part, encode=encode)
        with autocast(device, precision=config.loop.precision, num_tokens=None):
            logits: Tensor = parallel(tokens.inputs, variance=tokens.variance)
        return logits

    def of_model(part: ProbeBatch) -> Tensor:
        with autocast(device, precision=config.loop.precision, num_tokens=None):
            logits: Tensor = parallel(normalize(part.inputs, mean=image.mean, std=image.std))
        return logits

    return of_head if isinstance(config.tuning, Frozen) else of_model


def write_test(
    result: ClassificationResult,
    *,
    part: Part,
    config: ProbeConfig,
    run: Run,
    more_facts: dict[str, Any] | None = None,
) -> None:
    """Writes `test.json` and the scores beside it: the result on the test part, and how it came about."""
    test_share = None if part.rows is None else config.clips.test_share
    facts = {
        "model": str(run.model_folder),
        "data": str((config.clips.test or config.clips.train).resolve()),
        "split": config.clips.test_split if test_share is None else None,
        "test_share": test_share,
        "num_frames": config.num_frames,
        "sampling": config.sampling,
        "stride": config.stride,
        "clip_seconds": config.clip_seconds,
        "frames": "videos" if config.frame_cache is None else "JPEG cache",
        **(more_facts or {}),
    }
    _test_file(run).unlink(missing_ok=True)  # of a start that was killed before it had written its model
    written = write_result(run.folder, name="test", result=result, facts=facts)
    assert written == _test_file(run)


def save_classifier(
    model: VideoClassifier, *, classes: tuple[str, ...], pretrained: Saved | None, config: ProbeConfig, run: Run
) -> None:
    """Writes the run's model folder, after which the run counts as finished."""

    def fresh() -> VideoClassifier:
        other = VideoClassifier(model.config)
        tune(other, config=config)
        return other

    whole = untuned(whole_model(model, fresh=fresh), config=config)
    license, source = (None, None) if pretrained is None else (pretrained.license, pretrained.source)
    on_main(lambda: save(run.model_folder, model=whole, classes=classes, license=license, source=source))
