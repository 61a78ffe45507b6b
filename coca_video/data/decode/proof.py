"""Whether a backend works here: an import proves little, so each decodes a known clip before it is trusted."""

import functools
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from coca_video.data.decode.index import PacketIndex, index_packets
from coca_video.data.decode.reader import USE_AUTO, BackendName, VideoReader
from coca_video.data.decode.source import Source, UnreadableVideo

# 24 frames of H.264 in MP4, 64x64, B-frames, a key frame every 8: column k of 5 is white where bit k of the number is 1
CLIP = Path(__file__).with_name("proof.mp4")
NUM_FRAMES, NUM_BITS = 24, 5
HINTS = {"torchcodec": " (it needs FFmpeg's shared libraries on this system)"}
ORDER = (23, 0, 13, 7, 7, 18, 2, 9)  # back and forth, over key frames, with a repeat


def open_with(backend: BackendName, *, source: Source, index: PacketIndex) -> VideoReader:
    """The reader of one backend; UnreadableVideo if it would not read this video exactly."""
    match backend:
        case "torchcodec":
            from coca_video.data.decode.torchcodec import TorchcodecReader

            return TorchcodecReader(source, index=index)
        case "decord":
            from coca_video.data.decode.decord import DecordReader

            return DecordReader(source, index=index)
        case "pyav":
            from coca_video.data.decode.pyav import PyAVReader

            return PyAVReader(source, index=index)


@functools.cache
def prove(backend: BackendName) -> str | None:
    """None where the backend decodes a known clip rightly on this machine, else why it does not, in a sentence.

    The answer is kept for the process. torchcodec, for one, imports without FFmpeg's libraries only to fail later.
    """
    try:
        source = Source(str(CLIP), CLIP)
        with open_with(backend, source=source, index=index_packets(source)) as reader:
            frames = reader.frames(ORDER)
            found = reader.num_frames, tuple(_number_shown(frame) for frame in frames.numpy())
    except (ImportError, OSError, RuntimeError, UnreadableVideo) as error:
        return f"{backend} does not work here: {_cause(error)}{HINTS.get(backend, '')}"
    if found != (NUM_FRAMES, ORDER):
        return f"{backend} decodes other frames of a known clip: expected {ORDER}, got {found[1]}"
    return None


def _number_shown(frame: UInt8[np.ndarray, "3 64 64"]) -> int:
    """The number that a frame of the known clip shows, read in the middle of its columns."""
    return sum(int(frame[0, 32, 12 * bit + 6] > 127) << bit for bit in range(NUM_BITS))


def _cause(error: Exception) -> str:
    """The first line of what was raised, without the known clip's path and without advice on files."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line.removeprefix(f"{CLIP}: ").removesuffix(f"; {USE_AUTO}")
