"""Features of clips: against a plain loop over frames, from videos and from a token cache."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from coca_video.data.decode import open_video
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import read_manifest
from coca_video.data.transforms import resize_crop, square_crop_box
from coca_video.data.video import ClipConfig, VideoDataset
from coca_video.eval.clip_features import ClipFeatures, features_of_clips, features_of_tokens, needs_prefix_tokens
from coca_video.eval.token_cache_build import build_token_cache
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.image import TimmConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig

CPU = torch.device("cpu")
NAMES = ("mean", "embedding", "frames")


@pytest.fixture
def dataset(drawn_clips: Path) -> VideoDataset:
    manifest = read_manifest(drawn_clips).select(split="test")
    return VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=48), seed=0)


def build_coca(poolers: str = "cascade") -> CoCa:
    torch.manual_seed(3)
    tiny = CoCaConfig.tiny()
    return CoCa(CoCaConfig(image=tiny.image, text=tiny.text, num_queries=4, poolers=poolers)).eval()


@torch.no_grad()
def plain(dataset: VideoDataset, coca: CoCa) -> dict[str, np.ndarray]:
    """Frame by frame: decoded, cropped, normalised by hand, encoded alone."""
    image = coca.encoder.config
    found: dict[str, list[np.ndarray]] = {name: [] for name in NAMES}
    for row in dataset.manifest.rows:
        with open_video(row.path) as video:
            frames = video.frames([2, 8, 13])  # the centres of three parts of 16 frames
        frames = resize_crop(frames, box=square_crop_box(48, 48), size=48, interpolation="bilinear").double() / 255
        pixels = ((frames - torch.tensor(image.mean)[:, None, None]) / torch.tensor(image.std)[:, None, None]).float()
        tokens = [coca.encoder(one[None])[0] for one in pixels]
        found["mean"].append(torch.cat(tokens).mean(dim=0).numpy())
        found["frames"].append(np.concatenate([one.mean(dim=0).numpy() for one in tokens]))
        found["embedding"].append(torch.cat([coca.encode_image(one[None])[0] for one in pixels]).mean(dim=0).numpy())
    return {name: np.stack(values) for name, values in found.items()}


def check(found: ClipFeatures, *, expected: dict[str, np.ndarray], tolerance: float) -> None:
    assert set(found.features) == set(expected)
    for name, values in expected.items():
        assert found.features[name].dtype == np.float32
        np.testing.assert_allclose(found.features[name], values, rtol=0, atol=tolerance)


@pytest.mark.parametrize("poolers", ["cascade", "parallel", "open_clip"])
def test_features_are_those_of_a_plain_loop(dataset: VideoDataset, poolers: str) -> None:
    coca, done = build_coca(poolers), []
    found = features_of_clips(
        coca.encoder, dataset=dataset, names=NAMES, coca=coca, device=CPU, batch_size=4, on_batch=done.append
    )
    check(found, expected=plain(dataset, coca), tolerance=2e-5)
    assert done == [4, 4, 2]
    assert found.video_ids == tuple(row.video_id for row in dataset.manifest.rows)
    assert found.labels.tolist() == [dataset.manifest.label_index(row) for row in dataset.manifest.rows]
    assert found.among([found.video_ids[3], "none"]).tolist() == [index == 3 for index in range(10)]
    rounded = features_of_clips(coca.encoder, dataset=dataset, names=("mean",), coca=None, device=CPU, bf16=True)
    error = np.abs(rounded.features["mean"] - found.features["mean"]).max()
    assert 1e-5 < error < 0.1


def test_a_token_cache_gives_the_same(dataset: VideoDataset, tmp_path: Path) -> None:
    coca = build_coca()
    model = VideoClassifier(VideoClassifierConfig(image=coca.encoder.config, num_classes=5, num_frames=3))
    model.encoder = coca.encoder
    model.eval().requires_grad_(False)
    cache = build_token_cache(
        model,
        dataset=dataset,
        folder=tmp_path,
        dtype="fp32",
        device=CPU,
        progress=lambda what, *, total, initial=0: tqdm(total=total, disable=True),
        on_estimate=lambda estimate: None,
    )
    found = features_of_tokens(cache, names=NAMES, coca=coca, device=CPU, batch_size=4)
    check(found, expected=plain(dataset, coca), tolerance=2e-5)


def test_the_class_token_of_open_clips_pooler_is_in_the_embedding_alone(dataset: VideoDataset) -> None:
    torch.manual_seed(0)
    tiny = CoCaConfig.tiny()
    image = TimmConfig(name="vit_tiny_patch16_224", image_size=48)
    coca = CoCa(CoCaConfig(image=image, text=tiny.text, num_queries=4, poolers="open_clip")).eval()
    check(
        features_of_clips(coca.encoder, dataset=dataset, names=NAMES, coca=coca, device=CPU),
        expected=plain(dataset, coca),
        tolerance=2e-5,
    )
    assert needs_prefix_tokens(coca, names=NAMES)
    assert not needs_prefix_tokens(coca, names=("mean", "frames"))
    assert not needs_prefix_tokens(build_coca(), names=NAMES)


def test_unreadable_clips_are_named_and_mistakes_are_sentences(dataset: VideoDataset, tmp_path: Path) -> None:
    coca = build_coca()
    rows = list(dataset.manifest.rows)
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    rows[2] = type(rows[2])(path=tmp_path / "bad.mp4", label=rows[2].label, video_id="bad")
    manifest = type(dataset.manifest)(source=tmp_path, rows=rows, classes=dataset.manifest.classes)
    damaged = VideoDataset(manifest, config=dataset.config, seed=0)
    found = features_of_clips(coca.encoder, dataset=damaged, names=("mean",), coca=None, device=CPU, batch_size=4)
    whole = features_of_clips(coca.encoder, dataset=dataset, names=("mean",), coca=None, device=CPU)
    assert [sample.key for sample in found.unreadable] == ["bad"]
    np.testing.assert_allclose(found.features["mean"], np.delete(whole.features["mean"], 2, axis=0), atol=1e-6)
    assert dataset[SampleKey(0, 3)].video_id == found.video_ids[2]
    with pytest.raises(ValueError, match="this model is none"):
        features_of_clips(coca.encoder, dataset=dataset, names=("embedding",), coca=None, device=CPU)
    nothing = VideoDataset(
        type(manifest)(source=tmp_path, rows=rows[2:3], classes=manifest.classes), config=dataset.config, seed=0
    )
    with pytest.raises(ValueError, match=r"None of the 1 clips could be read; the first: .*bad\.mp4"):
        features_of_clips(coca.encoder, dataset=nothing, names=("mean",), coca=None, device=CPU)
