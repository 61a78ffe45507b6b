"""Captions of clips: against greedy decoding without a cache, in batches as alone, and of photos upright."""

import dataclasses
import io
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from coca_video.data.decode import open_video
from coca_video.data.image_text import Pair, PairDataset, UnreadablePair, decode_image, write_shard
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import read_manifest
from coca_video.data.transforms import resize_crop, square_crop_box
from coca_video.data.video import ClipConfig, load_clip
from coca_video.eval.captioning import Captioner, load_captioner, read_frames
from coca_video.hub import Saved, save
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.generate import GenerateConfig
from coca_video.models.image import ImageEncoder, VitConfig
from coca_video.tokenizer import train_tokenizer

CAPTIONS = ["a red circle on the left", "a photo of a blue square", "two green stars on a grey background"] * 4
CPU = torch.device("cpu")
DAMAGED_EXIF = (b"MM", b"no EXIF at all", b"MM\x00*\x00\x00")


def make_saved(**changes: object) -> Saved:
    """CoCaConfig.tiny with moved weights, and a tokenizer of its own."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, max_length=32)
    config = dataclasses.replace(CoCaConfig.tiny(), **changes)  # type: ignore[arg-type]
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, vocab_size=tokenizer.vocab_size))
    model = CoCa(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return Saved(model=model.eval(), tokenizer=tokenizer)


@pytest.fixture(scope="module")
def saved() -> Saved:
    return make_saved()


def captioner_of(
    source: str | Saved, *, config: GenerateConfig | None = None, prompt: str = "", shorten: bool = True
) -> Captioner:
    return load_captioner(
        source,
        num_frames=3,
        config=GenerateConfig() if config is None else config,
        shorten=shorten,
        prompt=prompt,
        decoder="pyav",
        timeout_seconds=30.0,
        device=CPU,
    )


def clips(count: int, *, num_frames: int) -> Tensor:
    """u8 clips of noise, each in a colour of its own."""
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (count, num_frames, 3, 48, 48))
    colours = rng.integers(0, 256, (count, num_frames, 3, 1, 1))
    return torch.from_numpy(((noise + 3 * colours) // 4).astype(np.uint8))


@torch.no_grad()
def by_hand(saved: Saved, frames: Tensor, *, prompt: str, num_tokens: int) -> tuple[str, float]:
    """Greedy decoding without batches and without caches: the whole text again for every token."""
    model, tokenizer = saved.model, saved.tokenizer
    assert isinstance(model, CoCa) and tokenizer is not None
    prefix_tokens = model.config.poolers == "open_clip"
    pixels = (frames.double() / 255 - 0.5) / 0.5
    tokens = torch.cat([model.encoder(frame[None].float(), prefix_tokens=prefix_tokens)[0] for frame in pixels])
    image_tokens = model.pool(tokens[None])[1]
    text = tokenizer.encode([prompt])[0][:, :-1] if prompt else torch.tensor([[tokenizer.begin_id]])
    log_probability = 0.0
    for _ in range(num_tokens):
        _, features = model.encode_text(text, mask=torch.ones_like(text, dtype=torch.bool))
        logits = model.vocabulary.logits(model.multimodal(features, image_tokens=image_tokens))[0, -1].double()
        token = int(logits.argmax())
        log_probability += float(logits.log_softmax(dim=0)[token])
        text = torch.cat([text, torch.tensor([[token]])], dim=1)
        if token == tokenizer.end_id:
            break
    return tokenizer.decode(text[0].tolist()), log_probability


@pytest.mark.parametrize("poolers", ["cascade", "open_clip"])
@pytest.mark.parametrize("prompt", ["", "a photo of"])
def test_a_batch_of_two_clips_is_each_alone(poolers: str, prompt: str) -> None:
    saved = make_saved(poolers=poolers)
    captioner = captioner_of(saved, config=GenerateConfig(max_length=12), prompt=prompt)
    frames = clips(2, num_frames=4)
    together = captioner.caption_frames(frames)
    assert together[0].text != together[1].text
    for caption, clip in zip(together, frames, strict=True):
        (alone,) = captioner.caption_frames(clip.unsqueeze(0))
        text, log_probability = by_hand(saved, clip, prompt=prompt, num_tokens=12)
        assert caption.text == alone.text == text and text.startswith(prompt)
        assert caption.log_probability == pytest.approx(log_probability, rel=1e-5)
        assert alone.log_probability == pytest.approx(log_probability, rel=1e-5)


def test_all_frames_of_a_clip_count(saved: Saved) -> None:
    """Any frame changes the caption's probability; their order does not, since pooling is over a set."""
    captioner = captioner_of(saved)
    (clip, other) = clips(2, num_frames=3)
    variants = [clip, clip.flip(0), *(clip.clone() for _ in range(3))]
    for place, variant in enumerate(variants[2:]):
        variant[place] = other[place]
    whole, backwards, *changed = (
        caption.log_probability for caption in captioner.caption_frames(torch.stack(variants))
    )
    assert backwards == pytest.approx(whole, rel=1e-5)
    assert all(abs(value - whole) > 1e-2 for value in changed)


def test_a_key_draws_the_same_sample_in_any_batch(saved: Saved) -> None:
    captioner = captioner_of(saved, config=GenerateConfig(method="sample", max_length=12, seed=3))
    clip = clips(1, num_frames=2)
    same = clip.expand(3, -1, -1, -1, -1)
    texts = [caption.text for caption in captioner.caption_frames(same, keys=[5, 9, 0])]
    assert len(set(texts)) == 3
    assert texts == [captioner.caption_frames(clip, keys=[key])[0].text for key in (5, 9, 0)]
    assert captioner.caption_frames(same)[0].text == texts[2]  # the place in the batch, when not given
    with pytest.raises(ValueError, match=r"keys are for method 'sample', one a row; got 1 for 1 and 'greedy'\."):
        captioner_of(saved).caption_frames(clip, keys=[5])


def test_a_file_is_the_frames_of_its_clip(saved: Saved, drawn_clips: Path, tmp_path: Path) -> None:
    """From a folder, or loaded already; sampled uniformly as the clip's config says."""
    save(tmp_path / "model", model=saved.model, tokenizer=saved.tokenizer)
    path = Path(read_manifest(drawn_clips).rows[0].path)
    captioner = captioner_of(str(tmp_path / "model"))
    expected = ClipConfig(num_frames=3, image_size=48, decoder="pyav", timeout_seconds=30.0)
    assert captioner.clip == expected
    (caption,) = captioner.caption_frames(load_clip(path, config=expected).frames.unsqueeze(0))
    assert captioner(path) == caption == captioner_of(saved)(path)


def test_the_length_that_fits(saved: Saved) -> None:
    """The tiny model has room for 32 tokens: BEGIN, 4 of this prompt, and 27 that are generated."""
    assert saved.tokenizer is not None
    prompt = "a red circle on"
    num_prompt = int(saved.tokenizer.encode([prompt])[1].sum()) - 2
    clip = clips(1, num_frames=1)
    long = GenerateConfig(max_length=32)
    assert captioner_of(saved, config=long, prompt=prompt).config.max_length == 31 - num_prompt
    assert captioner_of(saved, config=GenerateConfig(max_length=5), prompt=prompt).config.max_length == 5
    with pytest.raises(ValueError, match=f"take a max_length of at most {31 - num_prompt}"):
        captioner_of(saved, config=long, prompt=prompt, shorten=False).caption_frames(clip)
    with pytest.raises(ValueError, match="The prompt leaves the model no room for a caption; shorten it"):
        captioner_of(saved, prompt="word " * 40)


def test_a_loaded_model_that_writes_no_captions(saved: Saved) -> None:
    encoder = Saved(model=ImageEncoder(VitConfig.tiny()))
    with pytest.raises(ValueError, match="The loaded model holds a ImageEncoder, which writes no captions; expected"):
        captioner_of(encoder)
    with pytest.raises(ValueError, match="The loaded model holds a CoCa without a tokenizer"):
        captioner_of(Saved(model=saved.model))


UPRIGHT = (  # EXIF 2.32, tag 0x0112: orientation 1 to 8, of an array of rows and columns
    lambda stored: stored,
    lambda stored: stored[:, ::-1],
    lambda stored: stored[::-1, ::-1],
    lambda stored: stored[::-1],
    lambda stored: stored.swapaxes(0, 1),
    lambda stored: np.rot90(stored, -1),
    lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    lambda stored: np.rot90(stored),
)


def encoded(kind: str, *, exif: Image.Exif | bytes = b"") -> bytes:
    """A picture of 40x24, the same for any `exif`."""
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format=kind, exif=exif)
    return file.getvalue()


def oriented(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def expected_pixels(kind: str, *, orientation: int = 1) -> Tensor:
    with Image.open(io.BytesIO(encoded(kind))) as image:
        upright = UPRIGHT[orientation - 1](np.array(image))
    return torch.from_numpy(np.ascontiguousarray(upright)).permute(2, 0, 1)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photos_stand_upright(tmp_path: Path, kind: str, orientation: int) -> None:
    """In shards that are trained on, as clips and in captions; also a TIFF, which Pillow turns while it loads it."""
    data, upright = encoded(kind, exif=oriented(orientation)), expected_pixels(kind, orientation=orientation)
    assert torch.equal(decode_image(data), upright)
    path = tmp_path / "a.png"  # Pillow goes by the content
    path.write_bytes(data)
    with open_video(path) as video:
        assert torch.equal(video.frames([0])[0], upright)
    box = square_crop_box(*upright.shape[-2:])
    resized = resize_crop(upright, box=box, size=16, interpolation="bilinear")
    frames = read_frames(path, config=ClipConfig(num_frames=5, image_size=16))
    assert torch.equal(frames, resized.unsqueeze(0))
    write_shard(tmp_path / "a.tar", pairs=[("000", data, ["a cat"])])
    pair = PairDataset([tmp_path / "a.tar"], image_size=16, seed=0, augment=False)[SampleKey(epoch=0, index=0)]
    assert isinstance(pair, Pair) and torch.equal(pair.image, resized)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("exif", DAMAGED_EXIF, ids=["no header", "a header that is none", "cut"])
def test_damaged_exif_leaves_a_photo_as_it_is_stored(tmp_path: Path, kind: str, exif: bytes) -> None:
    data = encoded(kind, exif=exif)
    with Image.open(io.BytesIO(data)) as image, pytest.raises((SyntaxError, struct.error)):
        image.getexif()
    assert torch.equal(decode_image(data), expected_pixels(kind))
    (tmp_path / "a.png").write_bytes(data)
    with open_video(tmp_path / "a.png") as video:
        assert torch.equal(video.frames([0])[0], expected_pixels(kind))


def test_a_photo_that_cannot_be_read(tmp_path: Path) -> None:
    """Says the cause alone: the caller knows the file's name."""
    path = tmp_path / "a.png"
    config = ClipConfig(num_frames=1, image_size=16)
    with pytest.raises(FileNotFoundError):
        read_frames(path, config=config)
    path.write_bytes(encoded("PNG")[:500])
    with pytest.raises(UnreadablePair, match=r"^its image cannot be decoded: "):
        read_frames(path, config=config)
