"""The model card: what a model is, how to load it, what was measured, under which licence, and what it cannot know."""

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from torch import nn

from coca_video.hub.folder import CONFIG, Model, Saved, find_model
from coca_video.models.coca import CoCa
from coca_video.models.head import HeadConfig
from coca_video.models.image import ImageConfig, ImageEncoder, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

MAX_CLASSES_SHOWN = 100
PAPER = "[arXiv 2205.01917](https://arxiv.org/abs/2205.01917)"
# Identifiers that the Hub takes as they are; any other licence is "other" with a name.
# fmt: off
HUB_LICENSES = frozenset({
    "apache-2.0", "mit", "openrail", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0",
    "cc-by-nc-4.0", "cc-by-nc-sa-4.0", "cc-by-nd-4.0", "cc-by-nc-nd-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0",
    "agpl-3.0", "mpl-2.0", "unlicense", "apple-ascl", "apple-amlr", "gemma", "other",
})
# fmt: on
# Of these everyone can have the weights; any other source is a file or a folder of somebody's machine.
PUBLIC_SOURCE = re.compile(r"(hf|open_clip):[\w.-]+/[\w.-]+@\w+|timm:(hf-hub:.+|[\w.]+)")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """The figures of one result file, under the names they have there, and what they were measured on."""

    name: str
    data: str
    split: str | None
    date: str
    samples: str
    setting: str
    figures: dict[str, float]


def read_measurement(path: Path) -> Measurement:
    """What a `test.json`, or a file that `coca-video evaluate` wrote, holds. ValueError when it is no such file.

    The date is that of the file where it names none. Of the data only the last part of its path is kept.
    """
    try:
        document = json.loads(path.read_text())
        figures = {key: value for key, value in document.items() if isinstance(value, float)}
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as the result of an evaluation ({error}).") from error
    if not figures:
        raise ValueError(f"Expected the result of an evaluation, with its figures, in {path}; there are none.")
    written = datetime.fromtimestamp(path.stat().st_mtime, tz=UTC).date().isoformat()
    settings = {
        "num_frames": "{} frames a clip",
        "protocol": "protocol {0[name]}, {0[num_clips]} clips, crops: {0[crops]}",
        "frames": "{}",
        "precision": "{}",
    }
    return Measurement(
        name=path.stem,
        data=_data_name(document.get("data")),
        split=document.get("split"),
        date=document.get("date", written),
        samples=_samples(document),
        setting=", ".join(text.format(document[key]) for key, text in settings.items() if document.get(key)),
        figures=figures,
    )


def find_results(model_folder: Path) -> list[Path]:
    """The results kept with a model: the run's `test.json`, then what `coca-video evaluate` left, by name."""
    roots = [model_folder]
    if model_folder.name == "model":
        roots.insert(0, model_folder.parent)
    tests = [root / "test.json" for root in roots if (root / "test.json").is_file()]
    return tests + [path for root in roots for path in sorted((root / "evaluation").glob("*.json"))]


def measurements_of(source: Path) -> list[Measurement]:
    """What the run or model folder `source` keeps of results; empty where it keeps none, or is no folder (hf:...)."""
    if not source.is_dir():
        return []
    return [read_measurement(path) for path in find_results(find_model(source))]


def trained_on(source: Path) -> str | None:
    """The data that the run `source` was trained on, named as `Measurement.data` is; None where no run tells it."""
    path = (source.parent if source.name == "model" else source) / CONFIG
    if not path.is_file():
        return None
    document = json.loads(path.read_text())
    document = document.get("probe", document)  # a sweep's clips are its probe's
    data = document.get("clips", document.get("pairs", {})).get("train")
    return None if data is None else _data_name(data)


def _data_name(data: str | None) -> str:
    """A manifest is often called manifest.csv, so its folder's name goes with it; the rest of a path is private."""
    if data is None:
        return "test data of the run"
    path = Path(data)
    return f"{path.parent.name}/{path.name}".lstrip("/") if path.suffix else path.name


def _samples(document: dict[str, Any]) -> str:
    counts = [
        f"{document[key]} {key.removeprefix('num_')}"
        for key in ("num_videos", "num_images", "num_captions")
        if key in document
    ]
    unreadable = document.get("num_unreadable") or len(document.get("unreadable", ()))
    return ", ".join([*counts, *([f"{unreadable} unreadable"] if unreadable else [])])


def model_card(
    saved: Saved,
    *,
    repo: str,
    license: str,
    measurements: Sequence[Measurement] = (),
    datasets: Sequence[str] = (),
) -> str:
    """README.md of the repository `repo` (`org/name`): YAML front matter for the Hub, then text.

    `license` is that of these weights; that of the weights they were built on is told beside it. `datasets` are the
    Hub's names of what the model was trained on.
    """
    title = repo.rpartition("/")[2]
    sections = {
        "What it is": model_facts(saved),
        "How to load it": _loading(saved.model, repo=repo),
        "Measured": measured_table(measurements),
        "Licence": _licence(saved, license=license),
        "What it cannot know": model_limits(saved),
    }
    text = "\n\n".join(f"## {heading}\n\n{body}" for heading, body in sections.items())
    front = _front_matter(saved.model, title=title, license=license, measurements=measurements, datasets=datasets)
    return f"---\n{front}\n---\n\n# {title}\n\n{text}\n"


def _front_matter(
    model: Model, *, title: str, license: str, measurements: Sequence[Measurement], datasets: Sequence[str]
) -> str:
    task, tags = _task(model)
    results = [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", measurement.data),
            dataset_name=measurement.data,
            dataset_config=measurement.name,
            dataset_split=measurement.split,
            metric_type=_metric_type(name),
            metric_name=name,
            metric_value=value,
        )
        for measurement in measurements
        for name, value in measurement.figures.items()
    ]
    is_known = license in HUB_LICENSES
    card = ModelCardData(
        license=license if is_known else "other",
        license_name=None if is_known else license,
        library_name="coca_video",
        pipeline_tag=task,
        tags=tags,
        datasets=list(datasets) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    text: str = card.to_yaml()
    return text


def _metric_type(figure: str) -> str:
    """The Hub's name of what a figure measures; the figure's own where the Hub has none."""
    if figure.startswith(("top1", "top5", "mean_class")):
        return "accuracy"
    return "recall" if "recall@" in figure else figure


def _task(model: Model) -> tuple[str, list[str]]:
    """The Hub's name of the task, and tags."""
    match model:
        case VideoClassifier():
            return "video-classification", ["coca", "video-classification", "action-recognition"]
        case CoCa():
            return "zero-shot-image-classification", ["coca", "image-text-retrieval", "image-captioning"]
        case ImageEncoder():
            return "image-feature-extraction", ["image-feature-extraction"]


def model_facts(saved: Saved) -> str:
    """Kind, sizes and classes in Markdown, a line each."""
    model = saved.model
    common = (
        f"- Parameters: {_parameters(model):,}, of which {_parameters(saved.encoder):,} in the image encoder.\n"
        f"- Image encoder: {_describe_encoder(saved.encoder.config)}."
    )
    match model:
        case VideoClassifier():
            config = model.config
            return (
                "A video classifier: every frame goes through the image encoder, "
                f"{_describe_head(config.head)}.\n\n{common}\n"
                f"- Frames a clip in training: {config.num_frames}{_describe_sampling(config)}; any number goes.\n"
                f"- Classes ({config.num_classes}): {_class_list(saved.classes)}."
            )
        case CoCa():
            text = model.config.text
            return (
                f"A CoCa ({PAPER}): it compares images with texts, and writes captions.\n\n{common}\n"
                f"- Text: {text.num_unimodal_layers} unimodal and {text.num_multimodal_layers} multimodal layers of "
                f"width {text.width}, {text.vocab_size:,} token ids, at most {text.max_length} tokens."
            )
        case ImageEncoder():
            return f"An image encoder: images in, one token for each place out.\n\n{common}"


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _describe_encoder(config: ImageConfig) -> str:
    size = f"{config.image_size} px images, resized {config.interpolation}"
    if isinstance(config, VitConfig):
        blocks = f"width {config.width}, {config.depth} layers of {config.num_heads} heads"
        return f"a VisionTransformer of {blocks}, patches of {config.patch_size} px; {size}"
    return f"`{config.name}` of timm; {size}"


def _describe_head(config: HeadConfig) -> str:
    """How the tokens of all frames become one answer, as the end of a sentence."""
    many = config.num_queries > 1
    queries = f"{config.num_queries} learned queries" if many else "ONE learned query"
    told = "" if config.time_embedding == "none" else ", to which a time embedding was added"
    tokens = f"the tokens of all frames{told}"
    if config.pooling == "mean":
        how = f"the mean of {tokens} is normalised and classified"
    elif config.num_blocks > 0:
        blocks = f"an attentive pooler of depth {config.num_blocks}, with {queries}, pools {tokens}"
        how = f"{blocks} ([arXiv 2506.09985](https://arxiv.org/abs/2506.09985), section 4)"
    else:
        how = f"{queries} {'pool' if many else 'pools'} {tokens} (CoCa, {PAPER}, section 3.3)"
    layers = ", ".join(map(str, config.encoder_layers))
    return f"{how}; the tokens are those of the encoder's layers {layers}" if layers else how


def _describe_sampling(config: VideoClassifierConfig) -> str:
    if config.stride is not None:
        return f", one in {config.stride} of a part of the video"
    seconds = config.clip_seconds
    return ", spread over the whole video" if seconds is None else f", spread over {seconds:g} s of the video"


def _class_list(classes: Sequence[str]) -> str:
    shown = ", ".join(_code(name) for name in classes[:MAX_CLASSES_SHOWN])
    hidden = len(classes) - MAX_CLASSES_SHOWN
    return shown if hidden <= 0 else f"{shown} and {hidden} more in classes.txt"


def _code(text: str) -> str:
    """Text as a code span of Markdown, in which nothing of it acts: fenced by more backticks than it has in a row."""
    runs = re.findall("`+", text)
    if not runs:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, runs)))
    return f"{fence} {text} {fence}"


def _loading(model: Model, *, repo: str) -> str:
    python = f'```python\nimport coca_video\n\nsaved = coca_video.load("hf:{repo}")\n'
    match model:
        case VideoClassifier():
            shell = f"```sh\ncoca-video predict clip.mp4 --model hf:{repo}\n```"
            return f"{python}saved.model, saved.classes\n```\n\n{shell}"
        case CoCa():
            return f"{python}saved.model, saved.tokenizer\n```"
        case ImageEncoder():
            return f"{python}tokens = saved.model(images)  # normalised with saved.model.config.mean and .std\n```"


def measured_table(measurements: Sequence[Measurement]) -> str:
    """A table in Markdown, a row a figure; a sentence where nothing was measured."""
    if not measurements:
        return "Nothing was measured with these weights: no result of an evaluation was published with them."
    rows = [
        f"| {_cell(m.data)} | {_cell(m.split or 'all')} | {_cell(m.samples)} | {_cell(m.setting)} | {_cell(name)} "
        f"| {value:.4f} | {_cell(m.date)} |"
        for m in measurements
        for name, value in m.figures.items()
    ]
    header = "| Data | Split | Samples | Setting | Figure | Value | Date |\n| --- | --- | --- | --- | --- | --- | --- |"
    return "\n".join([header, *rows])


def _cell(text: str) -> str:
    """Text in a cell of a table: its bars are no borders, and its tags and entities no HTML."""
    return html.escape(text, quote=False).replace("|", r"\|")


def _licence(saved: Saved, *, license: str) -> str:
    if saved.source is None:
        return f"These weights: {license}."
    source = f"`{saved.source}`" if PUBLIC_SOURCE.fullmatch(saved.source) else "local files"
    return f"These weights: {license}. They were built on {source}, whose licence is {saved.license or 'not recorded'}."


def model_limits(saved: Saved) -> str:
    """What the model cannot tell, in Markdown, a line each."""
    match saved.model:
        case VideoClassifier():
            return (
                f"- {_order_limit(saved.model.config.head)}\n"
                "- What happens between the frames that it is shown.\n"
                "- Sound: it sees pictures only.\n"
                "- Actions outside its classes: scores sum to 1 over them, for a clip that shows none of them too."
            )
        case CoCa():
            return (
                "- What its training captions never named, and whether a caption that it writes is true.\n"
                "- Motion: it was trained on single images."
            )
        case ImageEncoder():
            return "- Names: what is in its tokens only a head that is trained on them can tell."


def _order_limit(config: HeadConfig) -> str:
    """What the head makes of the order of frames. Self-attention without a time embedding sees a set too."""
    if config.time_embedding == "none":
        return "The order of frames: they are pooled as a set, so a clip and its reverse get equal scores."
    if config.num_blocks > 1:
        return "Motion inside the encoder: each frame is encoded alone, and only then compared with the others in time."
    return (
        "How one frame differs from the next: each is encoded alone and weighed by its content and its place in time, "
        "but frames are not compared with one another before they are pooled."
    )
