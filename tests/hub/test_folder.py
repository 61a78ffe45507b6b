"""Model folders: bit-equal round trips, wholeness, fingerprints, and sentences for what is no model."""

from pathlib import Path

import pytest
import torch

from coca_video.hub import Saved, fingerprint, load, save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import ImageEncoder, TimmConfig, VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.tokenizer import train_tokenizer


def make_classifier() -> VideoClassifier:
    torch.manual_seed(3)
    return VideoClassifier(VideoClassifierConfig(image=VitConfig.tiny(), num_classes=2, num_frames=4))


def test_classifier_round_trip(tmp_path: Path) -> None:
    model = make_classifier()
    save(tmp_path / "m", model=model, classes=["b", "a\u2028c"])
    saved = load(tmp_path / "m")
    assert saved.classes == ("b", "a\u2028c") and saved.model.config == model.config and not saved.model.training
    for name, tensor in model.state_dict().items():
        assert torch.equal(saved.model.state_dict()[name], tensor), name
    assert sorted(path.name for path in (tmp_path / "m").iterdir()) == [
        "classes.txt",
        "config.json",
        "model.safetensors",
    ]


def test_coca_round_trip_keeps_its_tokenizer(tmp_path: Path) -> None:
    model = CoCa(CoCaConfig.tiny())
    tokenizer = train_tokenizer(["a dog", "a cat"], vocab_size=300, max_length=32)
    save(tmp_path, model=model, tokenizer=tokenizer)
    saved = load(tmp_path)
    assert isinstance(saved.model, CoCa) and saved.tokenizer is not None
    assert fingerprint(saved.model) == fingerprint(model)
    assert saved.tokenizer.encode(["a dog"])[0].equal(tokenizer.encode(["a dog"])[0])


@pytest.mark.parametrize("config", [VitConfig.tiny(), TimmConfig(name="vit_tiny_patch16_224", image_size=32)])
def test_encoder_round_trip(tmp_path: Path, config: VitConfig | TimmConfig) -> None:
    encoder = ImageEncoder(config)
    Saved(model=encoder, license="mit", source="timm:some").save(tmp_path)
    saved = load(str(tmp_path))
    assert isinstance(saved.model, ImageEncoder) and saved.model.config == config
    assert fingerprint(saved.model) == fingerprint(encoder)
    assert (saved.license, saved.source, saved.encoder) == ("mit", "timm:some", saved.model)


def test_the_encoder_of_each_model() -> None:
    coca, classifier = CoCa(CoCaConfig.tiny()), make_classifier()
    assert Saved(model=coca).encoder is coca.encoder
    assert Saved(model=classifier, classes=("a", "b")).encoder is classifier.encoder


def test_a_saved_coca_saves_its_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a dog", "a cat"], vocab_size=300, max_length=32)
    save(tmp_path / "first", model=CoCa(CoCaConfig.tiny()), tokenizer=tokenizer)
    load(tmp_path / "first").save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_run_is_found_by_its_folder(tmp_path: Path) -> None:
    save(tmp_path / "run" / "model", model=make_classifier(), classes=["a", "b"])
    assert load(tmp_path / "run").classes == ("a", "b")


def test_fingerprint_tells_one_bit() -> None:
    model, other = make_classifier(), make_classifier()
    assert fingerprint(model) == fingerprint(other)
    with torch.no_grad():
        other.head.classifier.bias[0] = torch.nextafter(other.head.classifier.bias[0], torch.tensor(1.0))
    assert fingerprint(model) != fingerprint(other)


def test_damaged_folders_are_sentences(tmp_path: Path) -> None:
    def damaged(name: str, content: bytes) -> Path:
        folder = tmp_path / f"{name}-{len(content)}"
        save(folder, model=make_classifier(), classes=["a", "b"])
        (folder / name).write_bytes(content)
        return folder

    for content in (b"", b"\x02\0\0\0\0\0\0\0{}", b"cut"):
        with pytest.raises(ValueError, match=r"model.safetensors is damaged, or not of the model"):
            load(damaged("model.safetensors", content))
    for content in (b"{}", b"[1]", b'{"model": '):
        with pytest.raises(ValueError, match=r"config.json is damaged"):
            load(damaged("config.json", content))
    for content, number in ((b"a\n", 1), (b"a\nb\nc\n", 3)):
        with pytest.raises(ValueError, match=rf"Expected 2 lines in .*classes.txt, one a class; got {number}"):
            load(damaged("classes.txt", content))


def test_what_is_no_model_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Expected a finished run or a model folder"):
        load(tmp_path / "nothing")
    (tmp_path / "unfinished" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not finished, so it has no model yet"):
        load(tmp_path / "unfinished")
    save(tmp_path / "other", model=make_classifier())
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"VideoClassifier"', '"Detector"'))
    with pytest.raises(
        ValueError, match="expected the model to be CoCa, VideoClassifier or ImageEncoder; got 'Detector'"
    ):
        load(tmp_path / "other")
