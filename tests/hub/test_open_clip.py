"""open_clip's weights from files and from the Hub's cache, the way back, and files that are no such thing.

Reference: open_clip_torch's own model, whose state dict is what the files hold.
"""

from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from coca_video.hub import load
from coca_video.hub.open_clip import RELEASED, load_open_clip, save_open_clip
from coca_video.models.coca import CoCa, CoCaConfig

open_clip = pytest.importorskip("open_clip", reason="the extra open-clip is not installed")
coca_model = pytest.importorskip("open_clip.coca_model")

HEADS = {"vision_heads": 2, "text_heads": 2, "pooler_heads": 8}
COMMIT = "c0ffee00" * 5


def small_open_clip(*, vocab_size: int = 50) -> nn.Module:
    """open_clip's CoCa of width 64 with random weights."""
    text = {"context_length": 76, "vocab_size": vocab_size, "width": 64, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 16, "width": 48, "head_width": 24, "layers": 1}
    model: nn.Module = coca_model.CoCa(
        64,
        vision_cfg={**vision, "attentional_pool": True, "output_tokens": True},
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        multimodal_cfg=text,
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return small_open_clip()


def assert_same_model(ours: object, theirs: nn.Module) -> None:
    """The embeddings of an image and of a caption."""
    assert isinstance(ours, CoCa)
    assert not ours.training
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = torch.randint(1, 50, (2, 9), generator=generator)
    padded = torch.nn.functional.pad(tokens, (0, 67))
    with torch.no_grad():
        image, _ = ours.encode_image(images)
        text, _ = ours.encode_text(tokens, mask=tokens > 0)
        torch.testing.assert_close(image, theirs.encode_image(images), rtol=0, atol=1e-5)  # type: ignore[operator]
        torch.testing.assert_close(text, theirs.encode_text(padded), rtol=0, atol=1e-5)  # type: ignore[operator]


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".safetensors"])
def test_a_local_file_gives_open_clips_model(theirs: nn.Module, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(theirs.state_dict(), path)
    else:
        torch.save(theirs.state_dict(), path)
    saved = load_open_clip(str(path), **HEADS)
    assert_same_model(saved.model, theirs)
    assert saved.source == f"open_clip:{path}"
    assert saved.license is None


def test_a_training_checkpoint_with_the_prefix_of_ddp(theirs: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "epoch_3.pt"
    state = {f"module.{name}": tensor for name, tensor in theirs.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state, "optimizer": {"param_groups": [{"lr": 1e-3}]}}, path)
    assert_same_model(load_open_clip(str(path), **HEADS).model, theirs)


def test_what_is_left_out_is_said(theirs: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "old.pt"
    torch.save({**theirs.state_dict(), "text.attn_mask": torch.zeros(77, 77)}, path)
    assert_same_model(load_open_clip(str(path), **HEADS).model, theirs)
    assert f"Left out of {path}, since they are no weights: text.attn_mask." in capsys.readouterr().err


def test_half_precision_becomes_fp32(theirs: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    half = {name: tensor.half() for name, tensor in theirs.state_dict().items()}
    save_file(half, path)
    model = load_open_clip(str(path), **HEADS).model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.state_dict()["vocabulary.weight"], half["text_decoder.text_projection"].float().T)


def test_the_models_memory_is_its_own(theirs: nn.Module, tmp_path: Path) -> None:
    """Files are mapped: a model that kept the mapping would change, or crash, with its file."""
    path = tmp_path / "weights.safetensors"
    save_file(theirs.state_dict(), path)
    model = load_open_clip(str(path), **HEADS).model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with path.open("r+b") as file:
        file.write(b"\xff" * path.stat().st_size)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    assert sum(tensor.untyped_storage().nbytes() for tensor in storages.values()) == 4 * sum(
        parameter.numel() for parameter in model.parameters()
    )


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_the_way_back_loads_into_open_clip(theirs: nn.Module, tmp_path: Path, suffix: str) -> None:
    source, back = tmp_path / "theirs.pt", tmp_path / f"back{suffix}"
    torch.save(theirs.state_dict(), source)
    model = load_open_clip(str(source), **HEADS).model
    assert isinstance(model, CoCa)
    save_open_clip(back, model=model)
    state: dict[str, Tensor] = load_file(back) if suffix == ".safetensors" else torch.load(back, weights_only=True)
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())
    small_open_clip().load_state_dict(state)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_only_open_clips_model_and_known_suffixes_are_written(tmp_path: Path) -> None:
    model = CoCa(CoCaConfig.tiny())
    with pytest.raises(ValueError, match=r"wired as open_clip's: .* got \{'poolers': 'cascade'"):
        save_open_clip(tmp_path / "model.pt", model=model)
    with pytest.raises(
        ValueError, match=r"Expected a file name ending in \.safetensors or \.pt .* got .*model\.npz\.$"
    ):
        save_open_clip(tmp_path / "model.npz", model=model)


def test_the_names_are_open_clips() -> None:
    """Every CoCa that the installed open_clip has weights for, and from where."""
    known = {
        f"{model}/{tag}": open_clip.get_pretrained_cfg(model, tag)["hf_hub"].rstrip("/")
        for model, tag in open_clip.list_pretrained()
        if model.startswith("coca_")
    }
    assert known == RELEASED


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return tmp_path


def snapshot(cache: Path, *, repository: str) -> Path:
    """The folder of a repository's commit in the cache, which `main` points to."""
    entry = cache / f"models--{repository.replace('/', '--')}"
    (entry / "refs").mkdir(parents=True)
    (entry / "refs" / "main").write_text(COMMIT)
    folder = entry / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize(("name", "repository"), [*RELEASED.items(), ("someone/coca", "someone/coca")])
@pytest.mark.parametrize("file", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_release_is_found_in_the_hubs_cache(
    theirs: nn.Module, cache: Path, name: str, repository: str, file: str
) -> None:
    path = snapshot(cache, repository=repository) / file
    if path.suffix == ".bin":
        torch.save(theirs.state_dict(), path)
    else:
        save_file(theirs.state_dict(), path)
    saved = load_open_clip(name, **HEADS)
    assert_same_model(saved.model, theirs)
    assert saved.source == f"open_clip:{repository}@{COMMIT}"
    assert saved.license == ("mit" if repository.startswith("laion/CoCa-") else None)
    assert saved.source is not None
    again = load_open_clip(saved.source.removeprefix("open_clip:"), **HEADS)
    assert (again.source, again.license) == (saved.source, saved.license)
    assert_same_model(again.model, theirs)


def test_what_is_neither_cached_nor_to_be_had(cache: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^open_clip:coca_ViT-L-14/laion2b_s13b_b90k is neither in the local cache nor"
    ):
        load("open_clip:coca_ViT-L-14/laion2b_s13b_b90k")


@pytest.mark.parametrize("name", ["coca_ViT-L-14/laion400m", "coca_ViT-L-14", ""])
def test_an_unknown_release_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected open_clip's coca_ViT-B-32/laion2b_s13b_b90k, .* got {name}\.$"):
        load(f"open_clip:{name}")


def broken_files(folder: Path) -> dict[str, Path]:
    """One of each kind of file that is not open_clip's CoCa."""
    whole = folder / "whole.pt"
    torch.save(small_open_clip().state_dict(), whole)
    files = {
        name: folder / name
        for name in ("cut.pt", "text.bin", "empty.pt", "cut.safetensors", "code.pt", "list.pt", "bytes.pt", "clip.pt")
    }
    files["cut.pt"].write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    files["text.bin"].write_text("version https://git-lfs.github.com/spec/v1\n")
    files["empty.pt"].write_bytes(b"")
    save_file({"logit_scale": torch.ones(100)}, files["cut.safetensors"])
    files["cut.safetensors"].write_bytes(files["cut.safetensors"].read_bytes()[:-10])
    torch.save({"state_dict": {}, "args": Path("code")}, files["code.pt"])  # pickled by a call, which is refused
    torch.save([torch.ones(1)], files["list.pt"])
    torch.save({"state_dict": "gone", "epoch": 3}, files["bytes.pt"])
    torch.save({"visual.conv1.weight": torch.ones(8, 3, 4, 4), "positional_embedding": torch.ones(1)}, files["clip.pt"])
    return files


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cut.pt", "is not whole, or no file of torch.save"),
        ("text.bin", "is not whole, or no file of torch.save"),
        ("empty.pt", "is not whole, or no file of torch.save"),
        ("cut.safetensors", "is damaged, or no safetensors file"),
        ("code.pt", "is damaged, or holds more than tensors and plain values, such as a whole model"),
        ("list.pt", "to hold tensors by name, or a checkpoint with such a state_dict; it does not"),
        ("bytes.pt", "to hold tensors by name, or a checkpoint with such a state_dict; it does not"),
        ("clip.pt", "Expected the weights of an open_clip CoCa .* there is no text.positional_embedding"),
        ("absent.pt", "Expected open_clip's weights in the file .*; there is none"),
    ],
)
def test_a_file_that_is_something_else_ends_in_one_sentence(tmp_path: Path, name: str, sentence: str) -> None:
    path = broken_files(tmp_path).get(name, tmp_path / name)
    with pytest.raises(ValueError, match=sentence) as error:
        load(f"open_clip:{path}")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_clips_tokenizer_comes_with_clips_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "clip.safetensors"
    save_file(small_open_clip(vocab_size=49_408).state_dict(), path)
    tokenizer = load_open_clip(str(path), **HEADS).tokenizer
    assert tokenizer is not None
    tokens, mask = tokenizer.encode(["a man is waving!", "two men"])
    expected = open_clip.get_tokenizer("coca_ViT-L-14")(["a man is waving!", "two men"])
    assert torch.equal(tokens * mask, expected[:, : tokens.shape[1]])


def test_without_the_extra_or_the_vocabulary_there_is_no_tokenizer_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "weights.safetensors"
    save_file(small_open_clip().state_dict(), path)
    assert load_open_clip(str(path), **HEADS).tokenizer is None
    assert "a vocabulary of 50 is not CLIP's of 49408" in capsys.readouterr().err
    save_file(small_open_clip(vocab_size=49_408).state_dict(), path)
    monkeypatch.setattr("coca_video.hub.open_clip.find_spec", lambda name: None)
    assert load_open_clip(str(path), **HEADS).tokenizer is None
    assert "pip install 'coca_video[open-clip]'" in capsys.readouterr().err
