"""decord, on the files that it reads exactly; it refuses the others by what PyAV's demuxer says of them."""

from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.index import PacketIndex
from coca_video.data.decode.reader import USE_AUTO, VideoReader
from coca_video.data.decode.source import Source, UnreadableVideo

CODECS = frozenset({"h264", "hevc", "mpeg4"})  # its FFmpeg is of 2019: no AV1; VP8 and VP9 can change their size midway


class DecordReader(VideoReader):
    """decord finds a frame by counting on from the key frame before it, over a table of packets.

    That is wrong without a word where pictures shown before a key frame are coded after it (open groups of pictures,
    the rule in HEVC), where an edit list hides packets, and in containers without exact times, such as AVI with MPEG-4
    part 2; and it converts 10-bit pixels otherwise.
    """

    backend = "decord"

    def __init__(self, source: Source, *, index: PacketIndex) -> None:
        self.name, self._source, self._stamp = source.name, source, source.stamp()
        if (cause := _misread(index)) is not None:
            raise UnreadableVideo(f"{self.name}: decord would return {cause}; {USE_AUTO}")
        import decord

        # RuntimeError, AssertionError: its own checks of what it opened, in Python
        self._errors = (decord.DECORDError, RuntimeError, AssertionError)
        try:
            # One thread: a data loader's workers are the parallelism, and decord's own threads have hung (decord#220).
            self._reader: Any = decord.VideoReader(source.open(), num_threads=1)
            if (found := len(self._reader)) != (true := len(index.pts)):
                raise UnreadableVideo(f"{self.name}: decord finds {found} frames where there are {true}; {USE_AUTO}")
            # get_batch, since that is what fails: on frames turned to a width that is not a multiple of 64.
            _, self.height, self.width, _ = self._reader.get_batch([0]).shape
        except self._errors as error:
            raise UnreadableVideo(f"{self.name}: decord cannot decode it ({_short(error)}); {USE_AUTO}") from error
        self._set_timeline(index.timeline)

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        if self._source.stamp() != self._stamp:  # of a file cut since, decord returns other frames without a word
            raise UnreadableVideo(f"{self.name}: the file changed while it was read")
        try:
            batch = self._reader.get_batch(indices)
        except self._errors as error:
            raise UnreadableVideo(f"{self.name}: decord stops ({_short(error)}); {USE_AUTO}") from error
        # decord gives what its bridge says, which others set for the whole thread: importing pytorchvideo does.
        rgb = batch if isinstance(batch, Tensor) else torch.from_numpy(batch.asnumpy())
        return rgb.permute(0, 3, 1, 2).contiguous()

    def _let_go(self) -> None:
        self._reader = None


def _misread(index: PacketIndex) -> str | None:
    """Why decord would misread this stream, or None."""
    if index.uncountable is not None:
        return f"wrong frames: {index.uncountable}"
    if index.codec not in CODECS:
        return f"no exact frames: it reads {'/'.join(sorted(CODECS))} exactly, and this is {index.codec}"
    if index.hides_packets:
        return "wrong frames: an edit list hides some of its packets"
    if index.open_groups:
        return "wrong frames: it has open groups of pictures, whose first pictures are shown before their key frame"
    if index.changes_size:
        return "wrong frames: its pictures may change their size midway"
    if index.num_video_streams > 1:
        return "another stream than the best: it has several video streams"
    if index.other_colours is not None:
        return f"other colours: {index.other_colours}"
    return None


def _short(error: Exception) -> str:
    """What decord says, without its source position and stack trace."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rsplit(": ", 1)[-1]
