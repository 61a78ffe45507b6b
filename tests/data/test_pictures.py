"""One picture is a video of one frame: pixels as Pillow has them, upright, and rows of a manifest like any other."""

from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageOps

from coca_video.data.decode import UnreadableVideo, count_frames, open_video
from coca_video.data.decode.images import is_picture
from coca_video.data.loader import SampleKey, Unreadable
from coca_video.data.manifest import read_manifest
from coca_video.data.transforms import resize_crop, square_crop_box
from coca_video.data.video import Clip, ClipConfig, VideoDataset


def picture(seed: int = 0, *, size: tuple[int, int] = (40, 24)) -> Image.Image:
    width, height = size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize("ending", ["jpg", "JPEG", "png", "webp", "bmp"])
def test_a_picture_is_one_frame(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    picture().save(path)
    with open_video(path) as video:
        assert (video.backend, video.num_frames, video.height, video.width) == ("images", 1, 24, 40)
        assert video.times_seconds.tolist() == [0.0]
        assert video.duration_seconds == pytest.approx(1 / 25, abs=1e-12)
        with Image.open(path) as reference:
            assert torch.equal(video.frames([0, 0]), torch.stack([pixels(reference)] * 2))
        with pytest.raises(ValueError, match="frame 1 was asked for, but the video has frames 0 to 0"):
            video.frames([1])
    assert open_video(str(path), images_per_second=2.0).duration_seconds == pytest.approx(0.5, abs=1e-12)
    assert count_frames(path) == 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "a.png"
    picture().save(path, exif=exif)
    with Image.open(path) as image:
        expected = pixels(ImageOps.exif_transpose(image))
    with open_video(path) as video:
        assert torch.equal(video.frames([0])[0], expected)
        assert (video.height, video.width) == ((24, 40) if orientation < 5 else (40, 24))
    with open_video(tmp_path) as folder:  # and in a folder of images
        assert torch.equal(folder.frames([0])[0], expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    picture().convert(mode).save(path)
    with Image.open(path) as reference:
        assert torch.equal(open_video(path).frames([0])[0], pixels(reference))


def test_a_url_of_a_picture(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    with fsspec.open("memory://pictures/a.png", "wb") as file:
        file.write((tmp_path / "a.png").read_bytes())
    assert torch.equal(open_video("memory://pictures/a.png").frames([0])[0], pixels(picture()))


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(UnreadableVideo, match=r"a\.png: there is no such file"):
        open_video(path)
    picture().save(path)
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:20], b"text"):
        path.write_bytes(damaged)
        with pytest.raises(UnreadableVideo, match=r"a\.png: the picture cannot be decoded \("):
            open_video(path)
    path.write_bytes(b"")
    with pytest.raises(UnreadableVideo, match=r"a\.png: the file is empty"):
        open_video(path)
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="images_per_second above 0, got 0"):
        open_video(path, images_per_second=0.0)


def test_what_is_a_picture() -> None:
    for source in ("a.jpg", Path("b/a.JPEG"), "https://host/a.webp?size=2", "what?.png"):
        assert is_picture(source)
    for source in ("a.gif", "a.mp4", "jpg", "https://host/a.mp4?thumbnail=a.jpg", b"a.jpg"):
        assert not is_picture(source)


def test_broken_exif_leaves_the_picture_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    picture().save(path, exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01")
    with pytest.warns(UserWarning, match="Corrupt EXIF data"), open_video(path) as video:
        assert (video.height, video.width) == (24, 40)


def lay_out(folder: Path) -> Path:
    """ImageNet's layout: split/class/name.JPEG."""
    for number, name in enumerate(("train/cat/1.JPEG", "train/dog/2.JPEG", "val/cat/3.JPEG", "val/dog/4.JPEG")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    (folder / "classes.txt").write_text("dog\ncat\n")
    return folder


def test_pictures_in_class_folders_are_clips_of_one_frame(tmp_path: Path) -> None:
    manifest = read_manifest(lay_out(tmp_path))
    assert [(row.video_id, row.label, row.split) for row in manifest.rows] == [
        ("1", "cat", "train"),
        ("2", "dog", "train"),
        ("3", "cat", "val"),
        ("4", "dog", "val"),
    ]
    (tmp_path / "val/dog/4.JPEG").write_bytes(b"no picture")
    dataset = VideoDataset(manifest, config=ClipConfig(num_frames=1, image_size=16), seed=0)
    clip = dataset[SampleKey(0, 2)]
    assert isinstance(clip, Clip)
    with Image.open(tmp_path / "val/cat/3.JPEG") as image:
        whole = pixels(image)[None]
    assert torch.equal(clip.frames, resize_crop(whole, box=square_crop_box(24, 40), size=16, interpolation="bilinear"))
    assert clip.label == 1
    damaged = dataset[SampleKey(0, 3)]
    assert isinstance(damaged, Unreadable)
    assert damaged.key == "4"


def test_a_csv_of_pictures(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "m.csv").write_text("path,label\nval/dog/4.JPEG,dog\ntrain/cat/1.JPEG,cat\n")
    manifest = read_manifest(tmp_path / "m.csv")
    manifest.check_files()
    clips = [
        VideoDataset(manifest, config=ClipConfig(num_frames=3, image_size=8), seed=0)[SampleKey(0, n)] for n in (0, 1)
    ]
    assert [clip.label for clip in clips if isinstance(clip, Clip)] == [0, 1]
    first = clips[0]
    assert isinstance(first, Clip)
    assert torch.equal(first.frames[0], first.frames[2])  # three times the one frame there is


def test_pictures_beside_videos_are_no_clips(tmp_path: Path) -> None:
    lay_out(tmp_path)
    (tmp_path / "train/cat/1.mp4").touch()
    assert [row.path for row in read_manifest(tmp_path).rows] == [tmp_path / "train/cat/1.mp4"]
