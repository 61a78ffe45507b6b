"""Sixteen frames of a video: ours against other ways to read them, the frame cache, the loader, and a long epoch.

    python benchmarks/decode.py --json runs/benchmarks/decode.json
    python benchmarks/decode.py --part sampling --clip data/clips/torchvision_R6llTwEh07w.mp4

300 frames of H.264 (x264, medium, crf 23) at 340x256 and 1280x720 with a key frame every 12 and every 250, written by
this script: a drawn camera over smooth noise, or --clip scaled. The parts:

sampling: open and read 16 uniform frames, CPU time on one thread; all frames are first compared. read_video style is
    what torchvision's read_video and pytorchvideo do: decode all to RGB, then take 16. The ratio of a row is its time
    over ours. Goals: read_video style 2.5 at 240p and 4.5 at 720p, decord 1.1 and 0.9, torchcodec 0.95.
cache: 16 of the 64 frames of the JPEG frame cache against decoding the same; as read, and as clips of 224x224. Goals
    for decoding over ours: 6 at 240p with a key frame every 250, 4 with one every 12, 60 at 720p.
loader, epoch: see benchmarks/loading.py.
"""

import argparse
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from loading import epoch_rows, loader_rows, row
from timing import Side, median_milliseconds, parser, report
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from coca_video.data.decode import BACKENDS, Backend, open_video, prove
from coca_video.data.frame_cache import CachedVideoDataset, FrameCache
from coca_video.data.frame_cache_build import build_frame_cache
from coca_video.data.frame_cache_format import FrameCacheConfig
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import Manifest, VideoRow
from coca_video.data.sampling import uniform_indices
from coca_video.data.video import ClipConfig, VideoDataset

if TYPE_CHECKING:
    import av

NUM_FRAMES, FRAMES_PER_SECOND, NUM_SAMPLES = 300, 30, 16
SIZES = {"240p": (256, 340), "720p": (720, 1280)}  # height, width
GOPS = (12, 250)
READ_AT_ONCE = 30  # frames of a real clip: each reading starts at a key frame again
SAMPLING_GOALS = {
    "read_video style": {"240p": 2.5, "720p": 4.5},
    "pytorchvideo": {"240p": 2.5, "720p": 4.5},
    "decord": {"240p": 1.1, "720p": 0.9},
    "torchcodec": {"240p": 0.95, "720p": 0.95},
}
CACHE_GOALS = {("240p", 12): 4.0, ("240p", 250): 6.0, ("720p", 12): 60.0, ("720p", 250): 60.0}
LARGEST_CACHE_DIFFERENCE = 6.0  # of 255, in the mean: JPEG of quality 90 loses 1 to 3
PARTS = ("sampling", "cache", "loader", "epoch")


class Video(NamedTuple):
    """A file to measure on."""

    path: Path
    size: str
    gop: int

    @property
    def case(self) -> str:
        """What it is called in the table; the bit rate tells how hard it is."""
        kilobits = self.path.stat().st_size * 8 / 1000 * FRAMES_PER_SECOND / NUM_FRAMES
        return f"{self.size}, GOP {self.gop}, {kilobits:.0f} kb/s"


def noise(height: int, width: int, *, generator: torch.Generator, finest: int) -> Float[Tensor, "1 3 height width"]:
    """Smooth noise in colour between 0 and 1: octaves of rising frequency whose amplitude falls as the scale does."""
    total, scale = torch.zeros(1, 3, height, width), max(height, width) // 2
    while scale >= finest:
        coarse = torch.rand(1, 3, height // scale + 2, width // scale + 2, generator=generator) - 0.5
        total += scale**0.4 * F.resize(coarse, [height, width], F.InterpolationMode.BICUBIC, antialias=False)
        scale //= 2
    return (0.5 + total / (4 * total.std())).clamp(0, 1)


def drawn_frames(height: int, width: int) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """A camera that sways over smooth noise, three textured discs that cross it, and a little noise of the sensor."""
    generator = torch.Generator().manual_seed(0)
    unit = height / 256
    margin = round(40 * unit)
    ground = noise(height + 2 * margin, width + 2 * margin, generator=generator, finest=max(2, round(2 * unit)))[0]
    side = round(80 * unit)
    discs = [noise(side, side, generator=generator, finest=max(2, round(2 * unit)))[0] for _ in range(3)]
    ys, xs = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (ys - side / 2) ** 2 + (xs - side / 2) ** 2 < (side / 2) ** 2
    for number in range(NUM_FRAMES):
        turn = 2 * math.pi * number / NUM_FRAMES
        top, left = (margin + round(margin * 0.95 * math.sin(speed * turn)) for speed in (3, 2))
        frame = ground[:, top : top + height, left : left + width].clone()
        for which, disc in enumerate(discs):
            y = round((height - side) * (0.5 + 0.5 * math.sin((which + 2) * turn + which)))
            x = round((width - side) * (0.5 + 0.5 * math.cos((which + 1) * turn + 2 * which)))
            window = frame[:, y : y + side, x : x + side]
            window.copy_(torch.where(inside, disc, window))
        frame += 0.03 * torch.randn(frame.shape, generator=generator)
        yield (255 * frame.clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous().numpy()


def clip_frames(clip: Path, *, height: int, width: int) -> Iterator[UInt8[np.ndarray, "height width 3"]]:
    """The first frames of a real clip, scaled; there and back again where it is too short."""
    with open_video(clip, backend="pyav") as reader:
        period = max(1, 2 * (reader.num_frames - 1))
        places = [min(number % period, period - number % period) for number in range(NUM_FRAMES)]
        for start in range(0, NUM_FRAMES, READ_AT_ONCE):
            frames = reader.frames(places[start : start + READ_AT_ONCE])
            scaled = F.resize(frames, [height, width], antialias=True)
            yield from scaled.permute(0, 2, 3, 1).contiguous().numpy()


def write_h264(path: Path, *, frames: Sequence[UInt8[np.ndarray, "height width 3"]], gop: int) -> Path:
    """x264 as most videos on the web are made: medium, crf 23, three B-frames; key frames at every gop-th frame."""
    import av

    height, width = frames[0].shape[:2]
    with av.open(str(path), "w") as container:
        options = {"crf": "23", "preset": "medium", "x264-params": f"keyint={gop}:min-keyint={gop}:scenecut=0"}
        stream = container.add_stream("libx264", rate=Fraction(FRAMES_PER_SECOND), options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode(None))
    return path


def write_videos(folder: Path, *, sizes: Sequence[str], clip: Path | None) -> list[Video]:
    """One file for each size and distance of key frames."""
    videos = []
    for size in sizes:
        height, width = SIZES[size]
        drawn = drawn_frames(height, width) if clip is None else clip_frames(clip, height=height, width=width)
        frames = list(drawn)
        for gop in GOPS:
            path = write_h264(folder / f"{size}-{gop}.mp4", frames=frames, gop=gop)
            videos.append(Video(path=path, size=size, gop=gop))
    return videos


def ours(path: Path, *, backend: Backend, indices: Sequence[int]) -> Tensor:
    """Opened and read by coca_video."""
    with open_video(path, backend=backend) as reader:
        return reader.frames(indices)


@contextmanager
def _one_thread(path: Path) -> Iterator["av.container.InputContainer"]:
    import av

    with av.open(str(path)) as container:
        container.streams.video[0].codec_context.thread_count = 1
        yield container


def read_video_style(path: Path, *, indices: Sequence[int]) -> Tensor:
    """All frames to RGB in one array, as torchvision.io.read_video returned them, then those asked for."""
    with _one_thread(path) as container:
        video = np.stack([frame.to_rgb().to_ndarray() for frame in container.decode(video=0)])
    return torch.from_numpy(video)[list(indices)].permute(0, 3, 1, 2)


def pytorchvideo(path: Path, *, indices: Sequence[int]) -> Tensor:
    """Its EncodedVideo on PyAV: all frames of the clip as float32 [3, frames, height, width]."""
    from pytorchvideo.data.encoded_video import EncodedVideo

    video = EncodedVideo.from_path(str(path), decode_audio=False, decoder="pyav")
    found: Tensor = video.get_clip(0, NUM_FRAMES / FRAMES_PER_SECOND + 1)["video"]
    video.close()
    return found[:, list(indices)].permute(1, 0, 2, 3)


def decord(path: Path, *, indices: Sequence[int]) -> Tensor:
    """Called directly, one thread."""
    import decord as library

    batch = library.VideoReader(str(path), num_threads=1).get_batch(list(indices)).asnumpy()
    return torch.from_numpy(batch).permute(0, 3, 1, 2)


def torchcodec(path: Path, *, indices: Sequence[int]) -> Tensor:
    """Called directly, one thread, in the exact mode."""
    from torchcodec.decoders import VideoDecoder

    frames: Tensor = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1).get_frames_at(list(indices)).data
    return frames


OTHERS: dict[str, Callable[..., Tensor]] = {
    "read_video style": read_video_style,
    "pytorchvideo": pytorchvideo,
    "decord": decord,
    "torchcodec": torchcodec,
}


def sampling_sides(path: Path) -> dict[str, Callable[[], Tensor]]:
    """Those of the sides that work here; the first is ours."""
    indices = uniform_indices(NUM_FRAMES, num_samples=NUM_SAMPLES).tolist()
    sides: dict[str, Callable[[], Tensor]] = {"ours (auto)": partial(ours, path, backend="auto", indices=indices)}
    for backend in BACKENDS:
        if (cause := prove(backend)) is not None:
            print(f"Left out: {cause}")
            continue
        sides[f"ours ({backend})"] = partial(ours, path, backend=backend, indices=indices)
    for name, read in OTHERS.items():
        if f"ours ({name})" in sides or name in ("read_video style", "pytorchvideo"):
            sides[name] = partial(read, path, indices=indices)
    return sides


def check_equal(sides: dict[str, Callable[[], Tensor]], *, expected: Tensor) -> None:
    """Ends the run where a side reads other frames than PyAV in order."""
    for name, side in sides.items():
        found = side()
        if found.shape != expected.shape or (found.float() - expected.float()).abs().max() > 0:
            sys.exit(f"{name} does not return the frames of the reference, so its time means nothing; mend it first.")


def sampling_rows(videos: Sequence[Video], *, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each file and side."""
    rows = []
    for video in videos:
        sides = sampling_sides(video.path)
        check_equal(sides, expected=sides["read_video style"]())  # which decodes all in order
        times = median_milliseconds(dict[str, Side](sides), device="cpu", repeats=options.repeats)
        for name, milliseconds in times.items():
            goal = SAMPLING_GOALS.get(name, {}).get(video.size)
            ratio = milliseconds / times["ours (auto)"]
            rows.append(row("sampling", video.case, side=name, cpu=milliseconds, ratio=ratio, at_least=goal))
    return rows


class _NoBar:
    """Progress that nobody looks at."""

    def __call__(self, what: str, *, total: int, initial: int = 0) -> "_NoBar":
        return self

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, n: float | None = 1, /) -> None:
        """Nothing is shown."""


def build_cache(videos: Sequence[Video], *, folder: Path) -> tuple[Manifest, FrameCache]:
    """The default cache of the files, in their order."""
    rows = [VideoRow(path=video.path, label=None, video_id=video.path.stem) for video in videos]
    manifest = Manifest(source=folder, rows=rows, classes=("a class",))
    build_frame_cache(
        manifest,
        folder=folder,
        config=FrameCacheConfig(),
        decoder="auto",
        num_workers=1,
        timeout_seconds=600.0,
        progress=_NoBar(),
        on_estimate=lambda _: None,
    )
    return manifest, FrameCache(folder)


def check_cache(cached: Tensor, *, decoded: Tensor) -> None:
    """Ends the run where cached frames are not the decoded ones, resized."""
    expected = F.resize(decoded, list(cached.shape[-2:]), antialias=True)
    difference = float((cached.float() - expected.float()).abs().mean())
    if difference > LARGEST_CACHE_DIFFERENCE:
        sys.exit(f"Cached frames differ from decoded ones by {difference:.2g} of 255 in the mean; mend it first.")


def cache_rows(videos: Sequence[Video], *, folder: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Two rows for each file and for frames as they are read, then for clips as a model takes them."""
    manifest, cache = build_cache(videos, folder=folder)
    config, rows = ClipConfig(num_frames=NUM_SAMPLES), []
    decoding = VideoDataset(manifest, config=config, seed=0)
    caching = CachedVideoDataset(manifest, cache=cache, config=config, seed=0)
    for number, video in enumerate(videos):
        positions = uniform_indices(len(cache.clip(number)), num_samples=NUM_SAMPLES)
        indices = cache.clip(number).numbers[positions].tolist()
        read = partial(_read_cached, cache, number=number, positions=positions.tolist())
        decode = partial(ours, video.path, backend="auto", indices=indices)
        check_cache(read(), decoded=decode())
        key = SampleKey(epoch=0, index=number)
        goal = CACHE_GOALS[video.size, video.gop]
        pairs: dict[str, tuple[Side, Side]] = {
            "frames": (read, decode),
            "224x224": (partial(caching.__getitem__, key), partial(decoding.__getitem__, key)),
        }
        for what, (from_cache, by_decoding) in pairs.items():
            sides = {f"cache, {what}": from_cache, f"decoding, {what}": by_decoding}
            times = median_milliseconds(sides, device="cpu", repeats=options.repeats)
            base = times[f"cache, {what}"]
            for name, milliseconds in times.items():
                at_least = goal if name.startswith("decoding") else None
                ratio = milliseconds / base
                rows.append(row("cache", video.case, side=name, cpu=milliseconds, ratio=ratio, at_least=at_least))
    return rows


def _read_cached(cache: FrameCache, *, number: int, positions: Sequence[int]) -> Tensor:
    return cache.clip(number).frames(positions)


def main() -> int:
    """The command line."""
    commands = parser(__doc__)
    commands.add_argument("--part", choices=PARTS, action="append", help="run this part (again for more; default: all)")
    commands.add_argument("--clip", type=Path, help="a real clip to scale, in place of what is drawn")
    commands.add_argument("--size", choices=tuple(SIZES), action="append", help="only files of this size")
    commands.add_argument("--clips", type=int, default=96, help="clips in a pass of the loader")
    commands.add_argument("--epoch-clips", type=int, default=112, help="clips in the smallest epoch, 96 or more")
    options = commands.parse_args()
    if options.epoch_clips < 96 or options.clips < 8:
        commands.error("expected --epoch-clips of at least 96 and --clips of at least 8")
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # in processes started from here too
    parts, rows = options.part or PARTS, list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = options.size or (tuple(SIZES) if {"sampling", "cache"} & set(parts) else ("240p",))
        videos = [] if set(parts) == {"epoch"} else write_videos(folder, sizes=sizes, clip=options.clip)
        if "sampling" in parts:
            rows += sampling_rows(videos, options=options)
        if "cache" in parts:
            rows += cache_rows(videos, folder=folder / "cache", options=options)
        if "loader" in parts:
            rows += loader_rows(videos[0].path, case=videos[0].case, options=options)
        if "epoch" in parts:
            small = write_h264(folder / "small.mp4", frames=list(drawn_frames(64, 80))[:32], gop=16)
            rows += epoch_rows(small, folder=folder, options=options)
    report(rows, options=options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
