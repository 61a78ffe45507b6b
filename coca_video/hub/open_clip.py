"""open_clip's CoCa weights: LAION's four releases, other repositories of the Hub, local files; and the way back."""

import sys
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RemoteEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coca_video.hub.folder import Saved
from coca_video.hub.sources import hub_errors
from coca_video.models.coca import CoCa
from coca_video.models.convert import POOLER_HEADS, config_from_open_clip, dropped_keys, from_open_clip, to_open_clip
from coca_video.tokenizer import Tokenizer, clip_tokenizer

RELEASED = {
    "coca_ViT-B-32/laion2b_s13b_b90k": "laion/CoCa-ViT-B-32-laion2B-s13B-b90k",
    "coca_ViT-B-32/mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-B-32-laion2B-s13B-b90k",
    "coca_ViT-L-14/laion2b_s13b_b90k": "laion/CoCa-ViT-L-14-laion2B-s13B-b90k",
    "coca_ViT-L-14/mscoco_finetuned_laion2b_s13b_b90k": "laion/mscoco_finetuned_CoCa-ViT-L-14-laion2B-s13B-b90k",
}
"""open_clip's names, MODEL/TAG, and LAION's repositories."""
LICENSES = {
    "laion/CoCa-ViT-B-32-laion2B-s13B-b90k": "mit",
    "laion/CoCa-ViT-L-14-laion2B-s13B-b90k": "mit",
}
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
CLIP_VOCABULARY = 49_408


def load_open_clip(
    name: str, *, vision_heads: int | None = None, text_heads: int | None = None, pooler_heads: int = POOLER_HEADS
) -> Saved:
    """A CoCa with open_clip's weights, in fp32, on the CPU, in evaluation mode.

    `name` is open_clip's MODEL/TAG of a release (`coca_ViT-L-14/laion2b_s13b_b90k`), a repository of the Hub in
    open_clip's layout (`org/name`, `org/name@revision`), or a file of torch.save or safetensors, weights or a training
    checkpoint. Heads are those of `config_from_open_clip`. The tokenizer is CLIP's where the vocabulary is; it comes
    with the open-clip extra, without which it is None, and a line on stderr says so. ValueError, in one sentence, for
    what cannot be had or is not a CoCa's.
    """
    if Path(name).suffix in (*TORCH_SUFFIXES, ".safetensors") or Path(name).is_file():
        path, source = Path(name).expanduser(), f"open_clip:{name}"
    else:
        path, source = _download(name)
    state = _read(path)
    if dropped := dropped_keys(state):
        print(f"Left out of {path}, since they are no weights: {', '.join(dropped)}.", file=sys.stderr)
    try:
        config = config_from_open_clip(
            state, vision_heads=vision_heads, text_heads=text_heads, pooler_heads=pooler_heads
        )
        converted = from_open_clip(state)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with torch.device("meta"):  # without memory, since drawing 638M numbers to overwrite them takes seconds
        model = CoCa(config)
    assert not list(model.buffers()), "a buffer would stay uninitialised"
    model.to_empty(device="cpu").load_state_dict(converted)
    return Saved(
        model=model.eval(),
        tokenizer=_tokenizer(vocab_size=config.text.vocab_size, max_length=config.text.max_length),
        license=LICENSES.get(source.removeprefix("open_clip:").partition("@")[0]),
        source=source,
    )


def save_open_clip(path: Path, *, model: CoCa) -> None:
    """Writes the weights in open_clip's layout, safetensors or torch.save: its CoCa of the same sizes loads them.

    ValueError for another suffix, and for a model that open_clip's CoCa cannot be.
    """
    if path.suffix not in (*TORCH_SUFFIXES, ".safetensors"):
        raise ValueError(f"Expected a file name ending in .safetensors or {' or '.join(TORCH_SUFFIXES)}; got {path}.")
    converted = to_open_clip(model.state_dict(), config=model.config)
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in converted.items()}
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".safetensors":
        save_file(state, partial)
    else:
        torch.save(state, partial)
    partial.replace(path)


def _download(name: str) -> tuple[Path, str]:
    """The file in the Hub's cache, and the source to keep, which names the commit."""
    model, slash, _ = name.partition("/")
    if not slash or (name not in RELEASED and model in {released.partition("/")[0] for released in RELEASED}):
        raise ValueError(
            f"Expected open_clip's {', '.join(RELEASED)}, a repository ORG/NAME of the Hub, or a file ending in "
            f".safetensors or {' or '.join(TORCH_SUFFIXES)}; got {name}."
        )
    repository, _, revision = RELEASED.get(name, name).partition("@")
    with hub_errors(f"open_clip:{name}"):
        path = _download_first(repository, revision=revision or None)
    return path, f"open_clip:{repository}@{path.parent.name}"  # the cache calls a snapshot by its commit


def _download_first(repository: str, *, revision: str | None) -> Path:
    """Of the two files that open_clip pushes the one that is there; offline, the one in the cache."""
    first, second = HUB_FILES
    try:
        return Path(hf_hub_download(repository, first, revision=revision))
    except LocalEntryNotFoundError:  # no connection: only the cache can have the other
        return Path(hf_hub_download(repository, second, revision=revision, local_files_only=True))
    except EntryNotFoundError:
        pass
    try:
        return Path(hf_hub_download(repository, second, revision=revision))
    except RemoteEntryNotFoundError as error:
        raise ValueError(f"Expected {first} or {second} in {repository} of the Hub; it has neither.") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a file, mapped and not read where the format allows: they are copied once, into the model."""
    if not path.is_file():
        raise ValueError(f"Expected open_clip's weights in the file {path}; there is none.")
    document = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    if isinstance(document, dict) and isinstance(document.get("state_dict"), dict):
        document = document["state_dict"]  # a checkpoint of open_clip's training
    if not isinstance(document, dict) or not all(isinstance(value, Tensor) for value in document.values()):
        raise ValueError(
            f"Expected {path} to hold tensors by name, or a checkpoint with such a state_dict; it does not."
        )
    return document


def _read_safetensors(path: Path) -> Any:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file ({error}).") from error


def _read_torch(path: Path) -> Any:
    """Without running code of the file. torch.save has written zip archives since 1.6; CoCa is younger."""
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} is not whole, or no file of torch.save: it is not the archive that torch.save writes."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged, or holds more than tensors and plain values, such as a whole model: "
            "save its state_dict()."
        ) from error


def _tokenizer(*, vocab_size: int, max_length: int) -> Tokenizer | None:
    """CLIP's, where weights have its vocabulary. Images need none, so a missing extra is no error."""
    if vocab_size != CLIP_VOCABULARY:
        print(f"No tokenizer: a vocabulary of {vocab_size} is not CLIP's of {CLIP_VOCABULARY}.", file=sys.stderr)
        return None
    if find_spec("open_clip") is None:
        print("No tokenizer: pip install 'coca_video[open-clip]' brings CLIP's vocabulary.", file=sys.stderr)
        return None
    return clip_tokenizer(max_length=max_length)
