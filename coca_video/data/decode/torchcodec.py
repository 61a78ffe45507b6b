"""torchcodec in its exact mode, on files whose packets tell their frames; it needs the system's FFmpeg libraries."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.index import PacketIndex
from coca_video.data.decode.reader import USE_AUTO, VideoReader
from coca_video.data.decode.source import Source, UnreadableVideo

TOLERANCE_SECONDS = 1e-5  # its times are float64 of the stream's; frames lie further apart than 1/10,000 s


class TorchcodecReader(VideoReader):
    """torchcodec finds a frame by its presentation time, and says which it found: the two are compared.

    It miscounts packets that hold no frame (packed B-frames in AVI) and shows what an edit list hides, so only files
    whose packets tell their frames are given to it.
    """

    backend = "torchcodec"

    def __init__(self, source: Source, *, index: PacketIndex) -> None:
        self.name = source.name
        if index.uncountable is not None:
            raise UnreadableVideo(
                f"{self.name}: torchcodec would misnumber its frames: {index.uncountable}; {USE_AUTO}"
            )
        if index.changes_size:
            raise UnreadableVideo(
                f"{self.name}: torchcodec reads one size, and its pictures may change theirs; {USE_AUTO}"
            )
        if index.other_colours is not None:
            raise UnreadableVideo(
                f"{self.name}: torchcodec would give other colours: {index.other_colours}; {USE_AUTO}"
            )
        from torchcodec.decoders import VideoDecoder

        data = source.data if isinstance(source.data, bytes) else str(source.data)
        try:
            # One thread: a data loader's workers are the parallelism.
            self._decoder: Any = VideoDecoder(data, seek_mode="exact", num_ffmpeg_threads=1)
            if (found := len(self._decoder)) != (true := len(index.pts)):
                raise UnreadableVideo(
                    f"{self.name}: torchcodec finds {found} frames where there are {true}; {USE_AUTO}"
                )
            first = self._decoder.get_frame_at(0)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, UnreadableVideo):
                raise
            raise UnreadableVideo(f"{self.name}: torchcodec cannot decode it ({_short(error)}); {USE_AUTO}") from error
        _, self.height, self.width = first.data.shape
        self._begin_seconds = first.pts_seconds
        self._set_timeline(index.timeline)

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        try:
            batch = self._decoder.get_frames_at(indices)
        except (RuntimeError, IndexError) as error:
            raise UnreadableVideo(f"{self.name}: torchcodec stops ({_short(error)}); {USE_AUTO}") from error
        found = batch.pts_seconds.numpy() - self._begin_seconds
        off = np.abs(found - self.times_seconds[indices])
        if off.max() > TOLERANCE_SECONDS:
            asked = indices[int(off.argmax())]
            raise UnreadableVideo(f"{self.name}: torchcodec returns another frame than {asked}; {USE_AUTO}")
        frames: Tensor = batch.data
        return frames

    def _let_go(self) -> None:
        self._decoder = None


def _short(error: Exception) -> str:
    """What torchcodec says, without its source position and stack trace."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    return line.removesuffix(" Likely causes:").rstrip(".").rsplit(".cpp:", 1)[-1].split(", ", 1)[-1]
