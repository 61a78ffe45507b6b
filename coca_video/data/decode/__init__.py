"""One reader interface over video decoders, exact to the frame, and a writer of H.264 files.

The reference is the sequential decode of the best video stream by PyAV, each frame turned by its rotation: what any
other backend returns must equal it, else the backend refuses the file in a sentence. This package alone imports av,
decord and torchcodec, and only when a video is opened.
"""

from coca_video.data.decode.describe import VideoFacts, describe
from coca_video.data.decode.header import PacketCount, VideoHeader, count_packets, read_header
from coca_video.data.decode.open import count_frames, open_video
from coca_video.data.decode.proof import prove
from coca_video.data.decode.reader import BACKENDS, Backend, BackendName, VideoReader
from coca_video.data.decode.source import UnreadableVideo, VideoSource
from coca_video.data.decode.write import write_video

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendName",
    "PacketCount",
    "UnreadableVideo",
    "VideoFacts",
    "VideoHeader",
    "VideoReader",
    "VideoSource",
    "count_frames",
    "count_packets",
    "describe",
    "open_video",
    "prove",
    "read_header",
    "write_video",
]
