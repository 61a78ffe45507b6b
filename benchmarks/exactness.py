"""What decoders return when called directly, on odd files and real clips, and who reads these files here.

    python benchmarks/exactness.py --json runs/benchmarks/exactness.json
    python benchmarks/exactness.py --clips data/clips

The odd files are those of the tests (tests/data/odd_videos.py), written anew; every frame shows its number. Each
decoder is asked for all frames in a shuffled order, and compared with a sequential decode by PyAV. In the table,
"exact" is every pixel of every frame; "n wrong" that so many frames of those asked for are other frames (their pixels
differ by more than 60 of 255 somewhere), "colours" that they are the right ones in other colours.
"""

import argparse
import json
import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from coca_video.data.decode import UnreadableVideo, open_video
from tests.data.numbered_videos import sequential, stack
from tests.data.odd_videos import BUILDERS

MOST_FRAMES = 60
OTHER_FRAME = 60  # of 255: the numbers' blocks are farther apart, other roundings of colours are nearer


def torchcodec_frames(path: Path, order: Sequence[int]) -> tuple[int, Tensor]:
    """The exact mode of torchcodec, called directly: (frames it counts, those asked for)."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(str(path), seek_mode="exact", num_ffmpeg_threads=1)
    return len(decoder), torch.stack([decoder.get_frame_at(index).data for index in order])


def decord_frames(path: Path, order: Sequence[int]) -> tuple[int, Tensor]:
    """The same by decord."""
    import decord

    reader = decord.VideoReader(str(path), num_threads=1)
    return len(reader), torch.from_numpy(reader.get_batch(list(order)).asnumpy()).permute(0, 3, 1, 2)


def verdict(read: Callable[[Path, Sequence[int]], tuple[int, Tensor]], path: Path, *, frames: dict[int, Tensor]) -> str:
    """How what a decoder returns differs from the frames of the reference."""
    from decord import DECORDError  # not at the top: loaded before PyAV, its libraries break PyAV's VP9 encoder

    order = random.Random(0).sample(sorted(frames), min(len(frames), MOST_FRAMES))
    try:
        count, found = read(path, order)
    except (DECORDError, RuntimeError, IndexError, ValueError, AssertionError) as error:
        return f"fails ({type(error).__name__})"
    expected = stack(frames, order)
    if found.shape != expected.shape:
        return f"size {found.shape[3]}x{found.shape[2]}"
    difference = (found.int() - expected.int()).abs().flatten(1).amax(dim=1)
    num_wrong = int((difference > OTHER_FRAME).sum())
    notes = [f"{num_wrong} of {len(order)} wrong"] if num_wrong else []
    notes += [f"colours by {int(difference.max())}"] if not num_wrong and difference.any() else []
    notes += [f"counts {count} of {len(frames)}"] if count != len(frames) else []
    return ", ".join(notes) or "exact"


def ours(path: Path, *, frames: dict[int, Tensor]) -> str:
    """Who reads the file under `auto`, and what comes out."""
    backend = ""

    def read(path: Path, order: Sequence[int]) -> tuple[int, Tensor]:
        nonlocal backend
        with open_video(path) as video:
            found = video.frames(order)
            backend = video.backend
            return video.num_frames, found

    return f"{verdict(read, path, frames=frames)} ({backend})"


def files(options: argparse.Namespace, *, folder: Path) -> Iterator[Path]:
    """The odd files, written into `folder`, or the clips of a folder."""
    if options.clips is not None:
        yield from sorted(path for path in options.clips.iterdir() if path.suffix != ".txt")
        return
    for name, build in BUILDERS.items():
        build(folder / name)
        yield folder / name


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=Path, help="a folder of real clips instead of the odd files")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args()
    table: dict[str, dict[str, str]] = {}
    print(f"{'file':<44}{'torchcodec, raw':<34}{'decord, raw':<34}coca_video, auto")
    with tempfile.TemporaryDirectory() as folder:
        for path in files(options, folder=Path(folder)):
            try:
                with open_video(path, backend="pyav") as video:
                    video.frames([video.num_frames - 1])
            except UnreadableVideo as error:
                print(f"{path.name[:42]:<44}{str(error).removeprefix(f'{path}: ')}")
                continue
            frames = sequential(path)
            row = {
                "torchcodec": verdict(torchcodec_frames, path, frames=frames),
                "decord": verdict(decord_frames, path, frames=frames),
                "coca_video": ours(path, frames=frames),
            }
            table[path.name] = row
            print(f"{path.name[:42]:<44}{row['torchcodec']:<34}{row['decord']:<34}{row['coca_video']}", flush=True)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(table, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
