"""`coca-video caption`: captions as its pieces make them by hand, in order; a mistake of the user is a sentence."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from coca_video.cli.__main__ import main
from coca_video.cli.caption import CaptionOptions
from coca_video.data.manifest import read_manifest
from coca_video.data.transforms import normalize
from coca_video.data.video import ClipConfig, load_clip
from coca_video.eval.captioning import load_captioner
from coca_video.hub import load, save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.generate import GenerateConfig, generate, generate_from_tokens
from coca_video.models.image import VitConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.tokenizer import Tokenizer, train_tokenizer
from coca_video.train.loop import pick_device

CAPTIONS = ["a red circle on the left", "a photo of a blue square", "two green stars on a grey background"] * 4


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder: CoCaConfig.tiny with moved weights, and a tokenizer of its own."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, max_length=32)
    config = CoCaConfig.tiny()
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size))
    model = CoCa(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = tmp_path_factory.mktemp("caption") / "model"
    save(folder, model=model, tokenizer=tokenizer)
    return str(folder)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A picture that already has the model's 48 px, so that its pixels are known."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.PNG")
    return tmp_path / "photo.PNG"


@pytest.fixture
def clip(drawn_clips: Path) -> Path:
    return Path(read_manifest(drawn_clips).rows[0].path)


def parts(source: str) -> tuple[CoCa, Tokenizer]:
    saved = load(source)
    assert isinstance(saved.model, CoCa) and saved.tokenizer is not None
    return saved.model, saved.tokenizer


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def by_hand(source: str, frames: Tensor, *, config: GenerateConfig, prompt: str = "") -> tuple[str, float]:
    """The caption of u8 frames: the tokens of all go together through the poolers."""
    model, tokenizer = parts(source)
    ids = tokenizer.encode([prompt])[0][:, 1:-1] if prompt else torch.zeros(1, 0, dtype=torch.int64)
    with torch.no_grad():
        tokens = model.encoder(normalize(frames, mean=(0.5,) * 3, std=(0.5,) * 3))
        image_tokens = model.pool(tokens.reshape(1, -1, tokens.shape[-1]))[1]
    found = generate_from_tokens(
        model, image_tokens, config=config, begin_id=tokenizer.begin_id, end_id=tokenizer.end_id, prompt=ids
    )
    text = tokenizer.decode([*ids[0].tolist(), *found.tokens[0][found.mask[0]].tolist()])
    return text, float(found.log_probability[0])


def test_an_image_and_a_video(source: str, photo: Path, clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", source, "--prompt", "a photo of", "--num-frames", "3", "--json", "--device", "cpu"]
    assert main(["caption", str(clip), str(photo), *arguments]) == 0
    found = [json.loads(line) for line in lines(capsys)]
    assert [line["file"] for line in found] == [str(clip), str(photo)]
    config = GenerateConfig(max_length=32 - 1 - len(parts(source)[1].encode(["a photo of"])[0][0][1:-1]))
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1).unsqueeze(0)
    frames = load_clip(clip, config=ClipConfig(num_frames=3, image_size=48)).frames
    assert len(frames) == 3
    for line, u8 in zip(found, (frames, pixels), strict=True):
        text, log_probability = by_hand(source, u8, config=config, prompt="a photo of")
        assert line["caption"] == text and text.startswith("a photo of")
        assert line["log_probability"] == pytest.approx(log_probability, rel=1e-5)
    assert found[0]["caption"] != found[1]["caption"]


def test_the_verb_prints_what_the_captioner_says(
    source: str, photo: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the bit, at the most frames that are taken; a video of 16 frames gives some several times."""
    assert main(["caption", str(clip), str(photo), "--model", source, "--num-frames", "128", "--json"]) == 0
    captioner = load_captioner(
        source,
        num_frames=128,
        config=GenerateConfig(),
        shorten=True,
        decoder="auto",
        timeout_seconds=60.0,
        device=pick_device("auto"),
    )
    found = [json.loads(line) for line in lines(capsys)]
    for line, path in zip(found, (clip, photo), strict=True):
        caption = captioner(path)
        assert (line["caption"], line["log_probability"]) == (caption.text, caption.log_probability)


def test_a_photo_that_lies_on_its_side_is_set_upright(
    source: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stored turned left by 90 degrees with the tag that says so, it has the caption of the photo itself."""
    with Image.open(photo) as image:
        sideways = image.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    sideways.save(tmp_path / "tagged.png", exif=exif)
    sideways.save(tmp_path / "sideways.png")
    files = [str(photo), str(tmp_path / "tagged.png"), str(tmp_path / "sideways.png")]
    assert main(["caption", *files, "--model", source, "--json", "--device", "cpu"]) == 0
    upright, tagged, untagged = (json.loads(line)["log_probability"] for line in lines(capsys))
    assert tagged == upright
    assert abs(untagged - upright) > 1e-3


def test_text_lines_and_an_image_through_the_whole_model(
    source: str, photo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["caption", str(photo), "--model", source, "--max-length", "6", "--device", "cpu"]) == 0
    model, tokenizer = parts(source)
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1).unsqueeze(0)
    images = normalize(pixels, mean=(0.5,) * 3, std=(0.5,) * 3)
    config = GenerateConfig(max_length=6)
    found = generate(model, images, config=config, begin_id=tokenizer.begin_id, end_id=tokenizer.end_id)
    assert lines(capsys) == [f"{photo}\t{tokenizer.decode(found.tokens[0].tolist())}"]


@pytest.mark.parametrize(
    "options",
    [
        {"min_length": 12},
        {"repetition_penalty": 3.0},
        {"method": "sample", "temperature": 0.5, "top_k": 20, "top_p": 0.9, "seed": 4},
        {"method": "beam"},
        {"method": "beam", "num_beams": 3, "length_penalty": -1.0},
        {"method": "beam", "num_beams": 64},
    ],
    ids=str,
)
def test_every_option_arrives(
    source: str, photo: Path, options: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    base = ["caption", str(photo), "--model", source, "--json", "--device", "cpu", "--max-length", "12"]
    assert main([*base, *flags]) == 0
    (found,) = lines(capsys)
    pixels = torch.from_numpy(np.array(Image.open(photo))).permute(2, 0, 1).unsqueeze(0)
    config = GenerateConfig(max_length=12, **options)  # type: ignore[arg-type]
    assert json.loads(found)["caption"] == by_hand(source, pixels, config=config)[0]


def test_the_options_are_those_of_the_config() -> None:
    """Repeated so that --help stays fast; defaults are the same but for max_length, which asks the model."""
    ours = {field.name: field.default for field in dataclasses.fields(CaptionOptions)}
    theirs = {field.name: field.default for field in dataclasses.fields(GenerateConfig)}
    assert {name: ours[name] for name in theirs if name != "max_length"} == {
        name: value for name, value in theirs.items() if name != "max_length"
    }
    assert ours["max_length"] is None


def test_unreadable_files_are_named_and_the_others_captioned(
    source: str, photo: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Status 1; a sample's draw goes by the file's place, whether or not those before it could be read."""
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(photo.read_bytes()[:200])
    no_video = tmp_path / "notes.mp4"
    no_video.write_text("no video")
    files = [str(broken), str(tmp_path / "gone.png"), str(no_video), str(photo)]
    arguments = ["--model", source, "--json", "--method", "sample", "--seed", "1", "--device", "cpu"]
    assert main(["caption", *files, *arguments]) == 1
    captured = capsys.readouterr()
    found = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["file"] for line in found] == files
    assert ["error" in line for line in found] == [True, True, True, False]
    assert "broken.jpg: its image cannot be decoded" in found[0]["error"]
    assert found[1]["error"] == f"{tmp_path / 'gone.png'}: No such file or directory"
    assert str(no_video) in found[2]["error"]
    assert captured.err.splitlines() == [f"coca-video caption: {line['error']}" for line in found[:3]]
    assert main(["caption", *[str(photo)] * 4, *arguments]) == 0
    again = [json.loads(line)["caption"] for line in lines(capsys)]
    assert again[3] == found[3]["caption"] and len(set(again)) > 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "expected one or more image or video files; none was given."),
        (["FILE", "--num-frames", "0"], "--num-frames must be from 1 to 128; got 0."),
        (["FILE", "--num-frames", "129"], "--num-frames must be from 1 to 128; got 129."),
        (["FILE", "--method", "beam", "--num-beams", "0"], "--num-beams must be from 1 to 64; got 0."),
        (["FILE", "--method", "beam", "--num-beams", "65"], "--num-beams must be from 1 to 64; got 65."),
        (["FILE", "--top-p", "0.5"], "top_p 0.5 has no effect with method 'greedy'; leave it out"),
        (
            ["FILE", "--max-length", "40"],
            "BEGIN and prompt (1) with max_length 40 must fit the text decoder's 32 tokens",
        ),
        (["FILE", "--min-length", "31", "--max-length", "30"], "max_length must be at least min_length (31); got 30."),
        (["FILE", "--prompt", "word " * 40], "The prompt leaves the model no room for a caption; shorten it."),
    ],
)
def test_wrong_input_is_a_sentence(
    source: str, photo: Path, arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [str(photo) if word == "FILE" else word for word in arguments]
    assert main(["caption", *arguments, "--model", source, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("coca-video: caption: ") and sentence in error and error.count("\n") == 1


def test_a_model_that_writes_no_captions(
    source: str, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = VideoClassifierConfig(image=VitConfig.tiny(), num_classes=2, num_frames=2)
    save(tmp_path / "probe", model=VideoClassifier(config), classes=("a", "b"))
    save(tmp_path / "mute", model=parts(source)[0])
    for name, sentence in (
        ("probe", "holds a VideoClassifier, which writes no captions; expected a CoCa."),
        ("mute", "holds a CoCa without a tokenizer, so its captions could not be read."),
    ):
        assert main(["caption", str(photo), "--model", str(tmp_path / name), "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"coca-video: caption: {tmp_path / name} {sentence}\n"
