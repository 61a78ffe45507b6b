"""Opening a video: by the backend asked for, or by the first that proves itself."""

import os
from pathlib import Path
from typing import get_args

from jaxtyping import UInt8
from torch import Tensor

from coca_video.data.decode.demux import check_length, decode_stream, open_stream
from coca_video.data.decode.images import ImageFolderReader, PictureReader, is_picture
from coca_video.data.decode.index import PacketIndex, index_packets
from coca_video.data.decode.proof import open_with, prove
from coca_video.data.decode.reader import BACKENDS, Backend, VideoReader
from coca_video.data.decode.source import Source, UnreadableVideo, VideoSource, as_source, is_url

ENVIRONMENT = "COCA_VIDEO_DECODER"


def open_video(source: VideoSource, *, backend: Backend = "auto", images_per_second: float = 25.0) -> VideoReader:
    """A reader of a video: a file's path, a URL (by fsspec), all its bytes, an open file, or a folder of images.

    The path or URL of a picture, by its ending, opens as a video of one frame.
    `auto` takes the backend that the environment variable COCA_VIDEO_DECODER names, else PyAV for the H.264 and HEVC
    that it reads fastest (`fastest_by_pyav`), else the first of torchcodec, decord and PyAV that proves itself: it
    decodes a known clip rightly on this machine, and of this file the first frame, in a stream of a kind that it reads
    exactly. Should it fail on a later frame, PyAV, the reference, goes on. A backend that is named refuses such files
    instead. images_per_second is the rate of a folder's images, and
    one picture lasts as long.

    UnreadableVideo for a file that is missing, empty, no video, cut off or damaged, or that this backend would not read
    exactly; ValueError where the backend does not work here.
    """
    if isinstance(source, str | Path) and not is_url(source) and Path(source).is_dir():
        return ImageFolderReader(Path(source), images_per_second=images_per_second)
    if is_picture(source):
        return PictureReader(as_source(source), images_per_second=images_per_second)
    chosen = choose_backend(backend)
    if chosen != "auto" and (cause := prove(chosen)) is not None:
        raise ValueError(f'{cause}; install or mend it, or take the decoder "auto"')
    opened = as_source(source)
    index = index_packets(opened)
    if chosen != "auto":
        return open_with(chosen, source=opened, index=index)
    return _open_first(opened, index=index)


def count_frames(source: VideoSource) -> int:
    """Decodes every frame of a video in order by PyAV, turning none into RGB, and returns how many there are.

    UnreadableVideo at the first that is damaged, or where the file is none or cut off.
    """
    if is_picture(source):
        return open_video(source).num_frames
    opened = as_source(source)
    with open_stream(opened) as (container, stream):
        check_length(opened, container=container, stream=stream)
        return sum(1 for _ in decode_stream(opened, container=container, stream=stream))


def choose_backend(backend: Backend) -> Backend:
    """What is asked for, else what COCA_VIDEO_DECODER names; ValueError if that is no backend."""
    known: dict[str, Backend] = {name: name for name in get_args(Backend)}
    named = os.environ.get(ENVIRONMENT, "")
    what, asked = (ENVIRONMENT, named) if backend == "auto" and named else ("The backend", backend)
    if asked not in known:
        raise ValueError(f"{what} is {asked!r}; expected one of {', '.join(known)}")
    return known[asked]


def fastest_by_pyav(index: PacketIndex) -> bool:
    """Whether PyAV reads this stream faster than the others, or as fast.

    It skips the pictures of H.264 and HEVC that nothing needs, and stops at the last packet it needs. 16 of 300 frames
    at 340x256, CPU ms, PyAV against torchcodec, both by this package: H.264 with B-frames 52 and 71 (a key frame every
    12), 65 and 87 (every 250), without 52 and 52, 78 and 79; HEVC 40 and 54, 44 and 63; all 300 frames 105 to 130 and
    134 to 155. But VP9 86 and 83, AV1 40 and 37, MPEG-4 17 and 10: nothing is skipped there. And where decoding cannot
    start at each key frame, as in open groups of H.264, 91 and 79.
    """
    return index.uncountable is None and index.can_skip and len(index.clean_pts) == index.num_key_frames


def _open_first(source: Source, *, index: PacketIndex) -> VideoReader:
    for name in () if fastest_by_pyav(index) else BACKENDS:
        if name == "pyav" or prove(name) is not None:
            continue
        try:
            return _BackedByReference(open_with(name, source=source, index=index), source=source, index=index)
        except UnreadableVideo:  # no loss: what PyAV cannot read is an error with its cause
            continue
    return open_with("pyav", source=source, index=index)


class _BackedByReference(VideoReader):
    """A reader, and PyAV in its place from the first frame on that it cannot decode."""

    def __init__(self, reader: VideoReader, *, source: Source, index: PacketIndex) -> None:
        self.name, self._source, self._index = source.name, source, index
        self._stamp = source.stamp()
        self.times_seconds, self.duration_seconds = reader.times_seconds, reader.duration_seconds
        self.num_frames, self.frames_per_second = reader.num_frames, reader.frames_per_second
        self._use(reader)

    def _use(self, reader: VideoReader) -> None:
        self._reader, self.backend = reader, reader.backend
        self.height, self.width = reader.height, reader.width

    def _frames(self, indices: list[int]) -> UInt8[Tensor, "len 3 height width"]:
        try:
            return self._reader.frames(indices)
        except UnreadableVideo:
            if self.backend == "pyav" or self._source.stamp() != self._stamp:  # another file needs another index
                raise
            reference = open_with("pyav", source=self._source, index=self._index)
            if reference.num_frames != self.num_frames:
                raise
        self._reader.close()
        self._use(reference)
        return reference.frames(indices)

    def _let_go(self) -> None:
        self._reader.close()
