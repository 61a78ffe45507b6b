"""Where a model may come from: a folder, a repository of the Hub, timm, open_clip."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
from huggingface_hub import snapshot_download
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # that of the HTTP library, which is not the same in all versions
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging
from safetensors import SafetensorError
from timm.data.config import resolve_model_data_config
from timm.models import load_model_config_from_hf

from coca_video.hub.folder import CLASSES, CONFIG, TOKENIZER, WEIGHTS, Saved, load_folder
from coca_video.models.image import ImageEncoder, TimmConfig, Triple, check_timm_name, drop_head

SOURCES = (
    "a run or a model folder, hf:ORG/NAME[@REVISION], timm:NAME, timm:local-dir:FOLDER, timm:hf-hub:ORG/NAME, "
    "open_clip:NAME/TAG or open_clip:FILE"
)
# Of the arguments in a config.json of timm's layout those that a TimmConfig says too, or that are of the head. (Where
# `global_pool` moves the last norm, the modules differ.)
SAID_BY_CONFIG = frozenset({"img_size", "in_chans", "num_classes", "global_pool"})


def load(source: str | Path) -> Saved:
    """A model with its weights, on the CPU, in evaluation mode.

    `source` is a run or a model folder, or one of

    - `hf:org/name`, `hf:org/name@revision`: a repository that `push` wrote;
    - `timm:vit_base_patch16_siglip_224`, `timm:local-dir:/path`, `timm:hf-hub:org/name`: an image encoder of timm, with
      its own weights, image size and normalisation;
    - `open_clip:coca_ViT-L-14/laion2b_s13b_b90k`, `open_clip:/path/file.pt`: a CoCa of open_clip.

    ValueError, in one sentence, for what cannot be had.
    """
    prefix, colon, rest = str(source).partition(":")
    if not colon or not re.fullmatch(r"\w[\w-]+", prefix) or Path(source).exists():
        return load_folder(Path(source))
    match prefix:
        case "hf":
            return _load_hf(rest)
        case "timm":
            return _load_timm(rest)
        case "open_clip":
            from coca_video.hub.open_clip import load_open_clip  # its optional library is heavy, and often not there

            return load_open_clip(rest)
        case _:
            raise ValueError(f"Expected {SOURCES}; got {source}.")


@contextmanager
def hub_errors(what: str) -> Iterator[None]:
    """Turns what goes wrong with the Hub or a download into one sentence on `what`, without a line for each try."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(40)  # of the standard logging: errors
    try:
        yield
    except GatedRepoError as error:
        raise ValueError(f"{what} is gated: ask for access on its page, then log in with `hf auth login`.") from error
    except RepositoryNotFoundError as error:
        raise ValueError(f"The Hub has no {what}, or it is private: check the name, or `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise ValueError(f"{what}: there is no such revision; give a branch, a tag or a commit of it.") from error
    except HfHubHTTPError as error:
        raise ValueError(f"The Hub refused {what}: {_first_line(error)}.") from error
    except (
        EntryNotFoundError,
        HFValidationError,
        HTTPError,
        OSError,
    ) as error:  # offline is a missing entry of the local cache
        raise ValueError(f"{what} is neither in the local cache nor to be had now: {_first_line(error)}.") from error
    finally:
        logging.set_verbosity(verbosity)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def _load_hf(repository: str) -> Saved:
    """`org/name` or `org/name@revision`; the source that is kept names the commit."""
    name, _, revision = repository.partition("@")
    patterns = [CONFIG, WEIGHTS, CLASSES, TOKENIZER]
    with hub_errors(f"hf:{repository}"):
        folder = Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    saved = load_folder(folder)
    commit = folder.name  # the cache calls a snapshot by its commit
    return Saved(
        model=saved.model,
        classes=saved.classes,
        tokenizer=saved.tokenizer,
        license=saved.license,
        source=f"hf:{name}@{commit}",
    )


def _load_timm(name: str) -> Saved:
    """An image encoder with the weights that timm's own loader gives it."""
    check_timm_name(name)
    known = None if ":" in name else timm.get_pretrained_cfg(name)
    if known is not None and not known.has_weights:
        raise ValueError(f"timm has no weights for {name}; RandomEncoder with a TimmConfig builds it with fresh ones.")
    try:
        with hub_errors(f"timm:{name}"):
            model: Any = timm.create_model(name, pretrained=True, num_classes=0)
            arguments = _arguments(name)
    except (RuntimeError, SafetensorError, UnpicklingError, json.JSONDecodeError) as error:
        raise ValueError(
            f"The weights of timm:{name} are damaged, or of another model: {_first_line(error)}."
        ) from error
    drop_head(model, name=name)
    encoder = _fresh_encoder(model, name=name, arguments=arguments)
    encoder.model.load_state_dict(model.state_dict())
    config, license = encoder.config, model.pretrained_cfg.get("license")
    assert isinstance(config, TimmConfig)
    return Saved(
        model=encoder.eval(),
        license=None if license == "unknown" else license,
        source=f"timm:{name if ':' in name else config.name}",
    )


def _arguments(name: str) -> dict[str, Any]:
    """The arguments of timm's model that a folder or a repository brings with it."""
    source, _, place = name.partition(":")
    if source == "local-dir":
        arguments: dict[str, Any] = json.loads((Path(place) / CONFIG).read_text()).get("model_args", {})
        return arguments
    return dict(load_model_config_from_hf(place)[2]) if source == "hf-hub" else {}


def _fresh_encoder(model: Any, *, name: str, arguments: dict[str, Any]) -> ImageEncoder:
    """An encoder like timm's `model`, under a name that it can be rebuilt by.

    That is the architecture with the tag of its weights, or the architecture alone for a folder or a repository; but
    one that changes the architecture by arguments of its own can only be rebuilt from there.
    """
    data = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    architecture, tag = model.pretrained_cfg["architecture"], model.pretrained_cfg.get("tag")
    if ":" not in name:
        return ImageEncoder(_timm_config(f"{architecture}.{tag}" if tag else architecture, data=data))
    if arguments.keys() <= SAID_BY_CONFIG:
        encoder = ImageEncoder(_timm_config(architecture, data=data))
        if str(encoder.model) == str(model):
            return encoder
    return ImageEncoder(_timm_config(name, data=data))


def _timm_config(name: str, *, data: dict[str, Any]) -> TimmConfig:
    """What the weights were trained to see, as timm's data config says."""
    channels, height, width = data["input_size"]
    if channels != 3 or height != width:
        raise ValueError(f"Expected an encoder of square RGB images; {name} takes {channels} x {height} x {width}.")
    if data["interpolation"] not in ("bilinear", "bicubic"):
        raise ValueError(f"Expected bilinear or bicubic resizing; {name} was trained with {data['interpolation']!r}.")
    return TimmConfig(
        name=name,
        image_size=height,
        mean=_triple(data["mean"]),
        std=_triple(data["std"]),
        interpolation=data["interpolation"],
    )


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
