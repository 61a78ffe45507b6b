"""Pretraining on captioned images: contrastive and captioning loss together (CoCa section 3.2)."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor, nn

from coca_video.data.image_text import Pair, PairDataset, open_shards
from coca_video.data.transforms import normalize
from coca_video.distributed import on_main, parallelize, start_from_environment, whole_model
from coca_video.eval.retrieval import evaluate_retrieval
from coca_video.hub import TOKENIZER, save
from coca_video.losses import contrastive_loss, global_mean
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import TimmConfig, VitConfig
from coca_video.tokenizer import Tokenizer, clip_tokenizer, train_tokenizer
from coca_video.train.loop import Device, LoopConfig, Training, pick_device, progress_bar, run_loop
from coca_video.train.optim import OptimConfig, build_optimizer, freeze, update
from coca_video.train.precision import autocast
from coca_video.train.run import Run
from coca_video.train.window import Sum, one_of_ranks


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Captioned images in tar shards (img2dataset's layout)."""

    train: Path
    """A tar, a folder of tars, a glob, or a range such as train-{00000..00005}.tar."""
    test: Path | None = None
    """The same, to measure retrieval on."""
    min_crop_area: float = 0.9
    """Smallest share of the image that a training crop keeps."""
    flip_probability: float = 0.0
    """Of a flip in training; 0 for captions that tell left from right."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """CoCa's image-text stage."""

    model: CoCaConfig
    pairs: PairsConfig
    out: Path
    """Folder of the run; the same command goes on where it stopped."""
    tokenizer: str | None = None
    """A tokenizer.json, or the word clip for CLIP's vocabulary; when None, a BPE is trained on the captions."""
    contrastive_weight: float = 1.0
    """Weight of the contrastive loss (CoCa section 3.2)."""
    contrastive_reduction: Literal["sum", "mean"] = "sum"
    """Of its two directions: the paper sums them (Eq. 2), open_clip takes their mean."""
    caption_weight: float = 2.0
    """Weight of the captioning loss (CoCa section 3.2)."""
    z_loss_weight: float = 0.0
    """Of the squared log-partition of every predicted token, added to its captioning loss; 1e-5 is usual."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    device: Device = "auto"
    """Where to compute."""


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where the model is, recall@K on the test pairs (empty without any), and how many pairs could not be read."""

    model_folder: Path
    metrics: dict[str, float]
    num_unreadable: int


@dataclass(frozen=True, kw_only=True)
class PairBatch:
    """Images as bytes and their captions as tokens, pairs in the same row."""

    images: UInt8[Tensor, "batch 3 height width"]
    tokens: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length"]


@dataclass(frozen=True, kw_only=True)
class CollatePairs:
    """Stacks pairs and tokenizes their captions; a class, so that worker processes can be handed it."""

    tokenizer: Tokenizer

    def __call__(self, pairs: Sequence[Pair]) -> PairBatch:
        """The batch, on the CPU."""
        tokens, mask = self.tokenizer.encode([pair.caption for pair in pairs])
        return PairBatch(images=torch.stack([pair.image for pair in pairs]), tokens=tokens, mask=mask)


def coca_step(
    model: CoCa,
    batch: PairBatch,
    optimizer: torch.optim.Optimizer,
    *,
    config: PretrainConfig,
    device: torch.device,
    parallel: nn.Module | None = None,
) -> dict[str, Sum]:
    """One update on `contrastive_weight * contrastive + caption_weight * captioning` (CoCa Eq. 4).

    `parallel` is what to call in place of `model` over several ranks; `batch` is then this rank's share.
    """
    images, tokens, mask = batch.images.to(device), batch.tokens.to(device), batch.mask.to(device)
    image = config.model.image
    with autocast(device, precision=config.loop.precision, num_tokens=_longest_sequence(config.model)):
        pixels = normalize(images, mean=image.mean, std=image.std)
        forward = model if parallel is None else parallel
        out = forward(pixels, tokens=tokens, mask=mask, z_loss_weight=config.z_loss_weight)
    contrastive = contrastive_loss(out.image, text=out.text, scale=out.scale, reduction=config.contrastive_reduction)
    captioning = global_mean(out.caption.loss_sum, count=out.caption.count)
    loss = config.contrastive_weight * contrastive + config.caption_weight * captioning
    norm = update(optimizer, loss=loss, gradient_clip=config.optim.gradient_clip)
    model.bound_scale()
    return {
        "loss": one_of_ranks(loss),
        "contrastive_loss": one_of_ranks(contrastive),
        "caption_loss": Sum(out.caption.cross_entropy_sum, out.caption.count),
        "gradient_norm": one_of_ranks(norm),
        "temperature": one_of_ranks(1 / out.scale),
    }


def _longest_sequence(model: CoCaConfig) -> int | None:
    """Tokens that attend to each other: patches of an image, or of a text with its CLS. None: not known beforehand."""
    match model.image:
        case VitConfig(image_size=image_size, patch_size=patch_size):
            return max((image_size // patch_size) ** 2, model.text.max_length + 1)
        case TimmConfig():
            return None


def run_pretraining(config: PretrainConfig) -> PretrainResult:
    """Trains, evaluates retrieval on `pairs.test`, writes the model. Goes on where `out` stopped.

    Started by torchrun, it trains over all ranks; each of them evaluates all test pairs.
    """
    _check_options(config)
    with start_from_environment(pick_device(config.device)) as device:
        return _run(config, device=device)


def _run(config: PretrainConfig, *, device: torch.device) -> PretrainResult:
    dataset = _training_pairs(config)
    run = Run(config.out, config=config, identity={"train_fingerprint": dataset.index.fingerprint()})
    if run.is_finished:
        return _finished(run)
    tokenizer = _tokenizer(dataset, config=config, run=run)
    torch.manual_seed(config.loop.seed)
    model = CoCa(config.model).to(device)
    freeze(model, config=config.optim)
    parallel = parallelize(model, strategy=config.loop.strategy, methods=("encode_image", "encode_text"))
    optimizer = build_optimizer(model, config=config.optim)
    training = Training(
        model=model,
        optimizer=optimizer,
        step=lambda batch: coca_step(model, batch, optimizer, config=config, device=device, parallel=parallel),
        dataset=dataset,
        collate=CollatePairs(tokenizer=tokenizer),
        evaluate=_retrieval_metrics(model, tokenizer=tokenizer, config=config, run=run, device=device),
        num_workers=config.loop.num_workers,
        device=device,
    )
    run_loop(training, config=config.loop, optim=config.optim, run=run)
    whole = whole_model(model, fresh=lambda: CoCa(config.model))
    on_main(lambda: save(run.model_folder, model=whole, tokenizer=tokenizer))
    return _finished(run)


def _finished(run: Run) -> PretrainResult:
    """The figures of the last evaluation, from the log."""
    evaluations = [record for record in run.log.records() if record["kind"] == "evaluation"]
    last = evaluations[-1] if evaluations else {}
    metrics = {name: float(value) for name, value in last.items() if name not in ("kind", "step")}
    return PretrainResult(model_folder=run.model_folder, metrics=metrics, num_unreadable=len(run.unreadable))


def _training_pairs(config: PretrainConfig) -> PairDataset:
    """The training pairs; shards that were not opened before are indexed, with a bar."""
    shards = open_shards(config.pairs.train)
    with progress_bar("indexing shards", total=len(shards)) as bar:
        return PairDataset(
            shards,
            image_size=config.model.image.image_size,
            interpolation=config.model.image.interpolation,
            seed=config.loop.seed,
            augment=True,
            crop_scale=(config.pairs.min_crop_area, 1.0),
            flip_probability=config.pairs.flip_probability,
            on_shard=bar.update,
        )


def _check_options(config: PretrainConfig) -> None:
    if not (0 <= config.contrastive_weight < math.inf and 0 <= config.caption_weight < math.inf):
        raise ValueError(
            f"Loss weights must be 0 or more; got {config.contrastive_weight} and {config.caption_weight}."
        )
    if not 0 <= config.z_loss_weight < math.inf:
        raise ValueError(f"--z-loss-weight must be 0 or more; got {config.z_loss_weight}.")
    for name, weight in (("contrastive_reduction", "contrastive_weight"), ("z_loss_weight", "caption_weight")):
        default = PretrainConfig.__dataclass_fields__[name].default
        if getattr(config, weight) == 0 and getattr(config, name) != default:
            raise ValueError(
                f"--{name.replace('_', '-')} does nothing where --{weight.replace('_', '-')} is 0; leave one out."
            )
    if config.contrastive_weight == 0 and config.caption_weight == 0:
        raise ValueError("Both loss weights are 0, so nothing would be learned; give one of them a value above 0.")
    if config.loop.evaluate_every and config.pairs.test is None:
        raise ValueError("--loop.evaluate-every does nothing without --pairs.test; give both, or neither.")


def _tokenizer(dataset: PairDataset, *, config: PretrainConfig, run: Run) -> Tokenizer:
    """The run's own from an earlier start, else the given one, else one trained on the captions; kept in the run."""
    path = run.folder / TOKENIZER
    on_main(lambda: None if path.is_file() else _new_tokenizer(dataset, config=config).save(path))
    return Tokenizer.load(path)


def _new_tokenizer(dataset: PairDataset, *, config: PretrainConfig) -> Tokenizer:
    text = config.model.text
    if config.tokenizer == "clip":
        tokenizer = clip_tokenizer(max_length=text.max_length)
    elif config.tokenizer is not None:
        tokenizer = Tokenizer(Tokenizer.load(Path(config.tokenizer)).backend, max_length=text.max_length)
    else:
        tokenizer = train_tokenizer(_captions(dataset), vocab_size=text.vocab_size, max_length=text.max_length)
    if tokenizer.vocab_size > text.vocab_size:
        raise ValueError(
            f"The tokenizer has {tokenizer.vocab_size} ids and the model takes {text.vocab_size}; "
            f"set --model.text.vocab-size {tokenizer.vocab_size}."
        )
    return tokenizer


def _captions(dataset: PairDataset) -> Iterator[str]:
    """Every caption, with a bar."""
    with progress_bar("reading captions", total=len(dataset)) as bar:
        for captions in dataset.all_captions():
            yield from captions
            bar.update()


def _retrieval_metrics(
    model: CoCa, *, tokenizer: Tokenizer, config: PretrainConfig, run: Run, device: torch.device
) -> Callable[[], dict[str, float]] | None:
    """What the loop calls to evaluate, if there are test pairs."""
    if config.pairs.test is None:
        return None
    shards = open_shards(config.pairs.test)
    image = config.model.image
    test = PairDataset(
        shards, image_size=image.image_size, interpolation=image.interpolation, seed=config.loop.seed, augment=False
    )

    def evaluate() -> dict[str, float]:
        with progress_bar("evaluating", total=len(test)) as bar:
            result = evaluate_retrieval(
                model,
                dataset=test,
                tokenizer=tokenizer,
                device=device,
                num_workers=config.loop.num_workers,
                bf16=config.loop.precision == "bf16",
                on_batch=bar.update,
            )
        run.note_unreadable(list(result.unreadable))
        return result.metrics

    return evaluate
