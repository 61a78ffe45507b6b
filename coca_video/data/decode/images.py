"""Images as videos: one picture is a video of one frame, a folder of images one of frames extracted beforehand.

Folders are what MMAction2's raw frames and TSN's tools leave; pictures are for image classification with the same code.
"""

import io
import re
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from coca_video.data.clip_files import IMAGE_SUFFIXES as IMAGE_SUFFIXES
from coca_video.data.decode.reader import Clock, VideoReader, timeline
from coca_video.data.decode.source import Source, UnreadableVideo, VideoSource, is_url

# What sets an image upright, by its EXIF orientation (EXIF 2.32, tag 0x0112). Pillow's exif_transpose would write the
# other tags anew and fails on the broken ones that phones and editors leave.
UPRIGHT: dict[int | None, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureReader(VideoReader):
    """One picture, upright by its EXIF orientation, as a video of one frame, which lasts 1 / images_per_second."""

    backend = "images"

    def __init__(self, source: Source, *, images_per_second: float) -> None:
        self.name = source.name
        clock = _clock(source.name, images_per_second=images_per_second)
        with source.open_file() as file:
            self._pixels = _read_image(file, name=f"{source.name}: the picture")
        self.height, self.width, _ = self._pixels.shape
        self._set_timeline(timeline([0], clock=clock, last_duration=1))

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        return torch.from_numpy(np.stack([self._pixels.transpose(2, 0, 1)] * len(indices)))

    def _let_go(self) -> None:
        self._pixels = self._pixels[:0]


class ImageFolderReader(VideoReader):
    """The images directly inside a folder in the order of their names, numbers by value: frame_2 before frame_10.

    Such a folder does not say how fast its frames follow; images_per_second does. All images have the first one's size.
    """

    backend = "images"

    def __init__(self, folder: Path, *, images_per_second: float) -> None:
        self.name = str(folder)
        clock = _clock(self.name, images_per_second=images_per_second)
        try:
            self._paths = image_files(folder)
        except OSError as error:
            raise UnreadableVideo(f"{folder}: the folder cannot be read ({error.strerror})") from error
        if not self._paths:
            raise UnreadableVideo(f"{folder}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.height, self.width, _ = self._read(self._paths[0]).shape
        self._set_timeline(timeline(range(len(self._paths)), clock=clock, last_duration=1))

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        read = {index: self._read(self._paths[index]) for index in set(indices)}
        for index, pixels in read.items():
            if pixels.shape != (self.height, self.width, 3):
                height, width, _ = pixels.shape
                raise UnreadableVideo(
                    f"{self.name}: {self._paths[index].name} is {width}x{height} where the first image is "
                    f"{self.width}x{self.height}"
                )
        return torch.from_numpy(np.stack([read[index].transpose(2, 0, 1) for index in indices]))

    def _read(self, path: Path) -> UInt8[np.ndarray, "height width 3"]:
        return _read_image(path, name=f"{self.name}: {path.name}")

    def _let_go(self) -> None:
        self._paths = []


def is_picture(source: VideoSource) -> bool:
    """Whether this is the path or the URL of a picture, by its ending; a URL may have a query behind it."""
    if not isinstance(source, str | Path):
        return False
    path = str(source).split("?")[0] if is_url(source) else source
    return Path(path).suffix.lower() in IMAGE_SUFFIXES


def image_files(folder: Path) -> list[Path]:
    """The images directly inside a folder, in the order of their names, numbers by value."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted(found, key=_natural)


def _clock(name: str, *, images_per_second: float) -> Clock:
    if not 0 < images_per_second < float("inf"):
        raise ValueError(f"{name}: expected images_per_second above 0, got {images_per_second}")
    rate = Fraction(images_per_second).limit_denominator(1001)  # 1001: 29.97... is 30000/1001
    return Clock(unit_seconds=1 / rate, frames_per_second=rate)


def _read_image(file: Path | io.BufferedReader | io.BytesIO, *, name: str) -> UInt8[np.ndarray, "height width 3"]:
    try:
        with Image.open(file) as image:
            return np.asarray(upright_rgb(image))
    # SyntaxError, ValueError: broken PNGs; the bomb: an image of more pixels than 179 million
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
        raise UnreadableVideo(f"{name} cannot be decoded ({error})") from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, turned and flipped as its EXIF orientation says; as it is stored where that cannot be read.

    Raises what Pillow raises for pixels that cannot be decoded.
    """
    pixels = image.convert("RGB")  # before the orientation is read: Pillow turns a TIFF itself, and forgets its tag
    try:
        transpose = UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except (SyntaxError, ValueError, struct.error):  # damaged EXIF beside whole pixels
        transpose = None
    return pixels if transpose is None else pixels.transpose(transpose)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Digits by value, other characters by themselves; the name itself decides between 1.jpg and 01.jpg."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
