"""`coca-video linear DATA --model RUN`: linear evaluation, nearest neighbours and attentional pooling in one table."""

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from coca_video.cli.arguments import parse_options, say

if TYPE_CHECKING:
    import torch

    from coca_video.data.frame_cache_build import SizeEstimate
    from coca_video.data.manifest import Manifest
    from coca_video.data.video import VideoDataset
    from coca_video.eval.clip_features import ClipFeatures, FeatureName
    from coca_video.eval.linear import EvaluatedRow
    from coca_video.eval.token_cache import TokenCache
    from coca_video.hub import Saved

IMAGE_FRAMES, VIDEO_FRAMES = 1, 8
METHOD_OF = {  # the option of one method alone
    "regularizations": "linear",
    "max_iterations": "linear",
    "neighbors": "knn",
    "rates": "attention",
    "steps": "attention",
    "token_cache": "attention",
    "token_dtype": "attention",
}


@dataclass(frozen=True, kw_only=True)
class LinearOptions:
    """What the frozen features of an image encoder tell of videos or pictures: logistic regression and nearest
    neighbours on one vector a clip, and CoCa's attentional pooler on all tokens, in one table.

    Every choice is made on a held-out part of the training split; the test split is looked at once.
    """

    data: tyro.conf.Positional[Path]
    """A manifest (CSV), or a folder laid out as DIR/<split>/<class>/clip.mp4, or of pictures in the same way."""
    model: str
    """A finished run or a model folder, hf:ORG/NAME, open_clip:NAME/TAG or open_clip:FILE, timm:NAME."""
    out: Path
    """Folder for linear.json, and for the token cache."""
    train_split: str = "train"
    """Rows to train on."""
    test_split: str = "test"
    """Rows to test on."""
    num_frames: int | None = None
    """Frames a clip; 8 when not given, 1 for pictures."""
    methods: tuple[Literal["linear", "knn", "attention"], ...] = ("linear", "knn", "attention")
    """attention needs the tokens of all clips on disk (--token-cache)."""
    features: tuple[Literal["mean", "embedding", "frames"], ...] | None = None
    """For linear and knn: the mean of all tokens; the mean contrastive embedding of the frames, which a CoCa has; the
    mean token of each frame, side by side. When not given, those of them that there are."""
    regularizations: tuple[float, ...] = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
    """C of the logistic regression to choose from."""
    max_iterations: int = 1000
    """Of the logistic regression's solver."""
    neighbors: tuple[int, ...] = (1, 5, 10, 20, 100, 200)
    """Numbers of neighbours to choose from."""
    rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2)
    """Learning rates of the attentional pooler to choose from."""
    steps: int | None = None
    """Updates of the attentional pooler; 20 epochs, and 500 at least, when not given."""
    holdout_share: float = 0.2
    """Of each class's training clips, to choose on."""
    holdout_group: str | None = None
    """A column of the manifest whose clips stay together when some are held out."""
    token_cache: Path | None = None
    """Folder of the tokens that attention reads; OUT/tokens when not given."""
    token_dtype: Literal["fp32", "bf16", "int8"] = "bf16"
    """How the token cache keeps a number."""
    decoder: Literal["auto", "torchcodec", "decord", "pyav"] = "auto"
    """What reads the video files; auto takes for each the first that reads it exactly."""
    timeout_seconds: float = 60.0
    """A clip that takes longer to read counts as unreadable."""
    batch_size: int = 16
    """Clips encoded at a time."""
    num_workers: int = 0
    """Processes that read data."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the encoder."""
    seed: int = 0
    """Of the held-out part and of the attentional pooler."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to encode; scikit-learn computes on the CPU."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The clips of a split, and what the encoder made of them; None where no method asks for it."""

    dataset: "VideoDataset"
    tokens: "TokenCache | None"
    features: "ClipFeatures | None"

    @property
    def unreadable(self) -> dict[str, str]:
        """Names and causes."""
        samples = [
            *(self.tokens.unreadable if self.tokens else ()),
            *(self.features.unreadable if self.features else ()),
        ]
        return {sample.key: sample.cause for sample in samples}


def run(arguments: Sequence[str]) -> int:
    """Encodes, fits, prints the table, writes linear.json. Status 1 when some clips could not be read."""
    options = parse_options(LinearOptions, verb="linear", arguments=arguments)
    _check_options(options)
    from coca_video.data.holdout import split_holdout
    from coca_video.data.manifest import read_manifest
    from coca_video.eval.linear_report import table_lines, write_rows
    from coca_video.hub import load
    from coca_video.train.loop import pick_device

    manifest = read_manifest(options.data)
    train, test = (manifest.select(split=name) for name in (options.train_split, options.test_split))
    for part in (train, test):
        part.check_labels()
        part.check_files()
    _, held_out = split_holdout(train, share=options.holdout_share, group=options.holdout_group, seed=options.seed)
    encoder = _Encoder(load(options.model), options=options, manifest=manifest, device=pick_device(options.device))
    parts = {"training": encoder.part(train, what="training"), "test": encoder.part(test, what="test")}
    held_out_ids = [row.video_id for row in held_out.rows]
    rows = _rows(parts["training"], test=parts["test"], held_out=held_out_ids, encoder=encoder, options=options)
    unreadable = parts["training"].unreadable | parts["test"].unreadable
    print(f"{len(train.rows)} training clips, {len(held_out.rows)} of them to choose on; {len(test.rows)} test clips")
    print(f"{encoder.num_frames} frames a clip" if encoder.num_frames > 1 else "pictures, or one frame a clip")
    print("\n".join(table_lines(rows)))
    facts = {**asdict(options), "num_frames": encoder.num_frames}
    path = write_rows(options.out, rows=rows, facts=facts, num_held_out=len(held_out.rows), unreadable=unreadable)
    say(f"All figures: {path}")
    for cause in unreadable.values():
        say(f"could not be read: {cause}")
    return 1 if unreadable else 0


def _check_options(options: LinearOptions) -> None:
    """ValueError for what no table could be made of, and for an option without effect."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("Linear evaluation runs in one process, and torchrun started several; start it without.")
    for name in ("methods", "features", "regularizations", "neighbors", "rates"):
        values = getattr(options, name)
        if values is not None and not (values and len(set(values)) == len(values)):
            raise ValueError(f"--{name} takes one or more different values; got {values}.")
    for name in ("regularizations", "neighbors", "rates"):
        if min(getattr(options, name)) <= 0:
            raise ValueError(f"--{name} must be above 0; got {getattr(options, name)}.")
    for name in ("num_frames", "steps", "max_iterations", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1; got {value}.")
    for name, method in METHOD_OF.items():
        if method not in options.methods and getattr(options, name) != getattr(LinearOptions, name):
            raise ValueError(f"--{name.replace('_', '-')} does nothing without the method {method}; leave it out.")
    if options.features is not None and set(options.methods) == {"attention"}:
        raise ValueError("--features does nothing with attention alone, which sees all tokens; leave it out.")


class _Encoder:
    """A frozen encoder on a device, and what is to be computed with it."""

    def __init__(self, saved: "Saved", *, options: LinearOptions, manifest: "Manifest", device: "torch.device") -> None:
        from coca_video.models.coca import CoCa
        from coca_video.models.video import VideoClassifier, VideoClassifierConfig

        self.options, self.device = options, device
        self.coca = saved.model.to(device).eval() if isinstance(saved.model, CoCa) else None
        default = IMAGE_FRAMES if _are_pictures(manifest) else VIDEO_FRAMES
        self.num_frames = options.num_frames or default
        self.names = self._names()
        image = saved.encoder.config
        config = VideoClassifierConfig(image=image, num_classes=len(manifest.classes), num_frames=self.num_frames)
        self.model = VideoClassifier(config)  # a head that nobody uses: token caches are of classifiers
        self.model.encoder = saved.encoder
        self.model.to(device).eval().requires_grad_(False)

    def part(self, manifest: "Manifest", *, what: str) -> _Part:
        """Reads every clip of `manifest`, once where the features can be had from the tokens."""
        from coca_video.data.video import ClipConfig, VideoDataset

        options, image = self.options, self.model.config.image
        clips = ClipConfig(
            num_frames=self.num_frames,
            image_size=image.image_size,
            interpolation=image.interpolation,
            decoder=options.decoder,
            timeout_seconds=options.timeout_seconds,
        )
        dataset = VideoDataset(manifest, config=clips, seed=options.seed)
        tokens = self._tokens(dataset) if "attention" in options.methods else None
        features = None
        if set(options.methods) != {"attention"}:
            features = self._features(dataset, tokens=tokens, what=what)
        return _Part(dataset=dataset, tokens=tokens, features=features)

    def _names(self) -> "tuple[FeatureName, ...]":
        wanted = self.options.features
        if wanted is None:
            names: list[FeatureName] = ["mean"]
            names += ["embedding"] if self.coca is not None else []
            names += ["frames"] if self.num_frames > 1 else []
            return tuple(names)
        if "embedding" in wanted and self.coca is None:
            raise ValueError(f"{self.options.model} is no CoCa and has no embedding; leave it out of --features.")
        if "frames" in wanted and self.num_frames == 1:
            raise ValueError(
                "With one frame a clip, the feature frames is the feature mean; leave it out of --features."
            )
        return wanted

    def _tokens(self, dataset: "VideoDataset") -> "TokenCache":
        from coca_video.eval.token_cache_build import build_token_cache
        from coca_video.train.loop import progress_bar

        options = self.options
        return build_token_cache(
            self.model,
            dataset=dataset,
            folder=options.token_cache or options.out / "tokens",
            dtype=options.token_dtype,
            device=self.device,
            progress=progress_bar,
            on_estimate=_say_size,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            bf16=options.precision == "bf16",
        )

    def _features(self, dataset: "VideoDataset", *, tokens: "TokenCache | None", what: str) -> "ClipFeatures":
        from coca_video.eval.clip_features import features_of_clips, features_of_tokens, needs_prefix_tokens
        from coca_video.train.loop import progress_bar

        options = self.options
        with progress_bar(f"features of the {what} clips", total=len(dataset)) as bar:
            if tokens is not None and not needs_prefix_tokens(self.coca, names=self.names):
                return features_of_tokens(
                    tokens,
                    names=self.names,
                    coca=self.coca,
                    device=self.device,
                    batch_size=options.batch_size,
                    num_workers=options.num_workers,
                    on_batch=bar.update,
                )
            return features_of_clips(
                self.model.encoder,
                dataset=dataset,
                names=self.names,
                coca=self.coca,
                device=self.device,
                batch_size=options.batch_size,
                num_workers=options.num_workers,
                bf16=options.precision == "bf16",
                on_batch=bar.update,
            )


def _are_pictures(manifest: "Manifest") -> bool:
    from coca_video.data.decode.images import is_picture
    from coca_video.data.table import VideoRows

    assert isinstance(manifest.rows, VideoRows)  # by column: a row is an object, and there may be a million
    return all(is_picture(path or "") for path in manifest.rows.paths)


def _rows(
    train: _Part, *, test: _Part, held_out: Sequence[str], encoder: _Encoder, options: LinearOptions
) -> "list[EvaluatedRow]":
    rows: list[EvaluatedRow] = []
    if train.features is not None and test.features is not None:
        rows += _fitted(train.features, test=test.features, held_out=held_out, options=options, encoder=encoder)
    if train.tokens is not None and test.tokens is not None:
        rows.append(_attention(train.tokens, test=test.tokens, held_out=held_out, options=options, encoder=encoder))
    return rows


def _fitted(
    train: "ClipFeatures", *, test: "ClipFeatures", held_out: Sequence[str], options: LinearOptions, encoder: _Encoder
) -> "list[EvaluatedRow]":
    from coca_video.eval.linear import linear_row, neighbor_row
    from coca_video.train.loop import progress_bar

    rows: list[EvaluatedRow] = []
    is_held, num_classes = train.among(held_out), encoder.model.config.num_classes
    if "linear" in options.methods:
        with progress_bar("regressions", total=len(encoder.names) * (len(options.regularizations) + 1)) as bar:
            rows += [
                linear_row(
                    train,
                    test=test,
                    name=name,
                    held_out=is_held,
                    num_classes=num_classes,
                    regularizations=options.regularizations,
                    max_iterations=options.max_iterations,
                    on_fit=bar.update,
                )
                for name in encoder.names
            ]
    if "knn" in options.methods:
        rows += [
            neighbor_row(
                train,
                test=test,
                name=name,
                held_out=is_held,
                num_classes=num_classes,
                neighbors=options.neighbors,
            )
            for name in encoder.names
        ]
    return rows


def _attention(
    train: "TokenCache", *, test: "TokenCache", held_out: Sequence[str], options: LinearOptions, encoder: _Encoder
) -> "EvaluatedRow":
    from coca_video.train.attention import PoolerTraining, attention_row
    from coca_video.train.loop import progress_bar

    config = PoolerTraining(
        rates=options.rates, steps=options.steps, seed=options.seed, num_workers=options.num_workers
    )
    with progress_bar("attentional pooler", total=2 * config.num_steps(len(train))) as bar:
        return attention_row(
            encoder.model.encoder,
            train=train,
            test=test,
            held_out=held_out,
            config=config,
            device=encoder.device,
            on_step=bar.update,
        )


def _say_size(estimate: "SizeEstimate") -> None:
    megabytes, free = estimate.left_bytes / 10**6, estimate.free_bytes / 10**6
    say(f"The tokens still to be written will take about {megabytes:,.0f} MB; {free:,.0f} MB are free.")
