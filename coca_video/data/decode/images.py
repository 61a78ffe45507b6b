"""A folder of images as a video: frames extracted beforehand, as MMAction2's raw frames and TSN's tools leave them."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from coca_video.data.decode.reader import Clock, VideoReader, timeline
from coca_video.data.decode.source import UnreadableVideo

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp"})


class ImageFolderReader(VideoReader):
    """The images directly inside a folder in the order of their names, numbers by value: frame_2 before frame_10.

    Such a folder does not say how fast its frames follow; images_per_second does. All images have the first one's size.
    """

    backend = "images"

    def __init__(self, folder: Path, *, images_per_second: float) -> None:
        if not 0 < images_per_second < float("inf"):
            raise ValueError(f"{folder}: expected images_per_second above 0, got {images_per_second}")
        self.name = str(folder)
        try:
            self._paths = image_files(folder)
        except OSError as error:
            raise UnreadableVideo(f"{folder}: the folder cannot be read ({error.strerror})") from error
        if not self._paths:
            raise UnreadableVideo(f"{folder}: the folder holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        self.height, self.width, _ = self._read(self._paths[0]).shape
        rate = Fraction(images_per_second).limit_denominator(1001)  # 1001: 29.97... is 30000/1001
        clock = Clock(unit_seconds=1 / rate, frames_per_second=rate)
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
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        # SyntaxError, ValueError: broken PNGs; the bomb: an image of more pixels than 179 million
        except (UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError) as error:
            raise UnreadableVideo(f"{self.name}: {path.name} cannot be decoded ({error})") from error

    def _let_go(self) -> None:
        self._paths = []


def image_files(folder: Path) -> list[Path]:
    """The images directly inside a folder, in the order of their names, numbers by value."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted(found, key=_natural)


def _natural(path: Path) -> tuple[list[tuple[int, str]], str]:
    """Digits by value, other characters by themselves; the name itself decides between 1.jpg and 01.jpg."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts], path.name
