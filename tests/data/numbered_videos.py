"""Videos whose every frame shows its own number: to draw, write and patch, and the reference that reads them."""

from collections.abc import Callable, Container, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

HEIGHT, WIDTH = 48, 64
ROWS, COLUMNS = 3, 4  # 12 bits: numbers below 4096
# Of a bit that is 0 and 1, by the parity of its column: coloured, so that a wrong colour matrix is another pixel.
COLOURS = np.array([[[20, 50, 60], [235, 200, 120]], [[70, 50, 20], [160, 200, 235]]], dtype=np.uint8)
UNIT = Fraction(1, 30)
Draw = Callable[[int], np.ndarray]


def numbered_frame(number: int, *, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """RGB: twelve blocks in three rows, light where the bit of `number` is 1, the lowest bit first."""
    bits = (number >> np.arange(ROWS * COLUMNS) & 1).reshape(ROWS, COLUMNS)
    blocks = COLOURS[np.arange(COLUMNS) % 2, bits]
    return blocks[np.arange(height) * ROWS // height][:, np.arange(width) * COLUMNS // width]


def numbers_shown(frames: torch.Tensor) -> list[int]:
    """The numbers that frames [T, 3, H, W] show, read in green at the centres of the blocks."""
    height, width = frames.shape[2:]
    rows = [(2 * row + 1) * height // (2 * ROWS) for row in range(ROWS)]
    columns = [(2 * column + 1) * width // (2 * COLUMNS) for column in range(COLUMNS)]
    centres = frames[:, 1][:, rows][:, :, columns].flatten(1)
    return [sum(int(value > 127) << bit for bit, value in enumerate(row)) for row in centres.tolist()]


def encode(
    path: Path,
    *,
    codec: str = "libx264",
    num_frames: int = 60,
    first: int = 0,
    pts: Sequence[int] | None = None,
    time_base: Fraction = UNIT,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    b_frames: int | None = 3,
    pix_fmt: str = "yuv420p",
    faststart: bool = False,
    height: int = HEIGHT,
    width: int = WIDTH,
    gop_size: int = 12,
    draw: Draw | None = None,
    colour: tuple[Colorspace, ColorRange] | None = None,
) -> Path:
    """A video of frames first, first + 1, ... with a key frame every `gop_size`, of 1/30 s each unless `pts` says."""
    muxing = {"movflags": "faststart"} if faststart else {}
    with av.open(str(path), "w", options=muxing | (container_options or {})) as container:
        stream = container.add_stream(codec, rate=30, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        stream.codec_context.gop_size, stream.codec_context.thread_count = gop_size, 1
        if b_frames is not None:
            stream.codec_context.max_b_frames = b_frames
        stream.codec_context.time_base = stream.time_base = time_base
        if colour is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = colour
        for place, number in enumerate(range(first, first + num_frames)):
            pixels = draw(number) if draw is not None else numbered_frame(number, height=height, width=width)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba" if pixels.shape[2] == 4 else "rgb24")
            if colour is not None:
                frame = frame.reformat(format=pix_fmt, dst_colorspace=colour[0], dst_color_range=colour[1])
            frame.pts, frame.time_base = (pts[place] if pts else place), time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(
    path: Path, *, packets: Callable[[list[av.Packet]], list[av.Packet]], options: dict[str, str] | None = None
) -> None:
    """Writes the file again, without encoding, from what `packets` makes of its packets."""
    source = path.with_name(f"source-{path.name}")
    path.rename(source)
    with av.open(str(source)) as old, av.open(str(path), "w", options=options or {}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in packets([packet for packet in old.demux(video=0) if packet.size > 0]):
            packet.stream = stream
            new.mux(packet)
    source.unlink()


def sequential(path: Path, *, only: Container[int] | None = None) -> dict[int, torch.Tensor | None]:
    """The reference, number to frame: the best video stream decoded in order, RGB, turned by its rotation.

    `only` names the frames to convert; the others are decoded and None. Where a stream changes its size midway, its
    frames are scaled to the first one's.
    """
    converter, size, frames = VideoReformatter(), dict[str, int](), dict[int, torch.Tensor | None]()
    with av.open(str(path), metadata_errors="ignore") as container:
        for number, frame in enumerate(container.decode(container.streams.best("video"))):
            size = size or {"width": frame.width, "height": frame.height}
            frames[number] = None
            if only is None or number in only:
                pixels = converter.reformat(frame, format="rgb24", threads=1, **size).to_ndarray()
                turned = np.rot90(pixels, k=round(frame.rotation / 90))
                frames[number] = torch.from_numpy(turned.transpose(2, 0, 1).copy())
    return frames


def sequential_seconds(path: Path) -> list[float]:
    """When each frame is shown, from the first on: by its time, or by the rate where times are not distinct."""
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.best("video")
        rate = stream.average_rate or stream.guessed_rate
        pts = [frame.pts for frame in container.decode(stream)]
        if None in pts or len(set(pts)) < len(pts):
            return [float(number / rate) for number in range(len(pts))]
        return [float((time - min(pts)) * stream.time_base) for time in sorted(pts)]


def stack(frames: dict[int, torch.Tensor | None], order: Iterable[int]) -> torch.Tensor:
    """The frames of the reference in this order, [T, 3, H, W]."""
    return torch.stack([frames[number] for number in order])


def rotate(path: Path, *, a: int, b: int, c: int, d: int) -> Path:
    """Writes a display matrix into an MP4's track header (ISO 14496-12, 8.3.2): 16.16 numbers at places 0, 1, 3, 4."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    for place, value in ((0, a), (1, b), (3, c), (4, d)):
        data[at + 4 * place : at + 4 * place + 4] = (value * 65536).to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    return path


def patch(path: Path, *, after: bytes, skip: int, value: int, order: str) -> None:
    """Overwrites 4 bytes, `skip` bytes behind the name `after`, at each of its places."""
    data = bytearray(path.read_bytes())
    at = data.find(after)
    assert at >= 0, f"{path} holds no {after!r}"
    while at >= 0:
        start = at + len(after) + skip
        data[start : start + 4] = value.to_bytes(4, order)
        at = data.find(after, start)
    path.write_bytes(data)
