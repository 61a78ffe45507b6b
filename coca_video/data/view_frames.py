"""The frames of each clip by each peer's test protocol, from counts alone. `views.Protocol` tells the rules.

Every function takes a video's number of frames, checked by `Protocol`, and gives frame numbers in [0, num_frames).
"""

import numpy as np
from jaxtyping import Int64

from coca_video.data.sampling import (
    exact_rate,
    linspace_float32,
    pytorchvideo_constant,
    pytorchvideo_indices,
    uniform_indices,
)

SLOWFAST_FRAMES_PER_SECOND = 30  # DATA.TARGET_FPS in PySlowFast's config/defaults.py


def uniform(num_frames: int, *, num_clips: int, frames_per_clip: int) -> Int64[np.ndarray, "clips frames"]:
    """Clip c has the frames at (c + 1/2) / C of each segment."""
    offsets = [np.full(frames_per_clip, (2 * clip + 1) / (2 * num_clips)) for clip in range(num_clips)]
    return np.stack([uniform_indices(num_frames, num_samples=frames_per_clip, offsets=each) for each in offsets])


def mmaction2_tsn(num_frames: int, *, num_clips: int) -> Int64[np.ndarray, "clips 1"]:
    """SampleFrames for clips of one frame."""
    # In floating point, as MMAction2 has it: with 25 clips, 7% of lengths below 5,000 have a frame that is not exact.
    segment = num_frames / num_clips
    centres = np.arange(num_clips, dtype=np.float64) * segment + segment / 2
    return centres.astype(np.int64)[:, None]


def mmaction2_dense(
    num_frames: int, *, num_clips: int, frames_per_clip: int, stride: int
) -> Int64[np.ndarray, "clips frames"]:
    """SampleFrames for longer clips, which go on from frame 0 beyond the end."""
    last_start = max(num_frames - ((frames_per_clip - 1) * stride + 1), 0)
    if num_clips == 1:
        starts = np.array([last_start // 2])
    else:
        starts = np.round(np.arange(num_clips) * (last_start / (num_clips - 1))).astype(np.int64)
    indices: Int64[np.ndarray, "clips frames"] = starts[:, None] + np.arange(frames_per_clip) * stride
    indices %= num_frames
    return indices


def slowfast(
    num_frames: int, *, frames_per_second: float, num_clips: int, frames_per_clip: int, stride: int
) -> Int64[np.ndarray, "clips frames"]:
    """get_start_end_idx, then temporal_sampling."""
    clip_length = max(stride * frames_per_clip / SLOWFAST_FRAMES_PER_SECOND * frames_per_second, 1.0)
    slack = max(num_frames - clip_length, 0.0)
    starts = [slack * clip / num_clips for clip in range(num_clips)]
    points = [linspace_float32(start, stop=start + clip_length - 1, num_samples=frames_per_clip) for start in starts]
    indices: Int64[np.ndarray, "clips frames"] = np.clip(np.stack(points), 0, num_frames - 1).astype(np.int64)
    return indices


def pytorchvideo(
    num_frames: int, *, frames_per_second: float, num_clips: int, frames_per_clip: int, clip_seconds: float
) -> Int64[np.ndarray, "clips frames"]:
    """ConstantClipsPerVideoSampler, then uniform_temporal_subsample."""
    rate = exact_rate(frames_per_second)
    clips = pytorchvideo_constant(num_frames / rate, clip_seconds=clip_seconds, num_clips=num_clips)
    return np.stack(
        [
            pytorchvideo_indices(num_frames, frames_per_second=rate, clip=clip, num_samples=frames_per_clip)
            for clip in clips
        ]
    )


def uniformerv2(num_frames: int, *, num_clips: int, frames_per_clip: int) -> Int64[np.ndarray, "clips frames"]:
    """get_seq_frames."""
    segment = (num_frames - 1) / frames_per_clip
    starts = np.round(np.arange(frames_per_clip) * segment).astype(np.int64)
    offsets = np.floor(segment / (num_clips + 1) * np.arange(1, num_clips + 1)).astype(np.int64)
    indices: Int64[np.ndarray, "clips frames"] = np.minimum(starts + offsets[:, None], num_frames - 1)
    return indices


def videomae(
    num_frames: int, *, num_clips: int, frames_per_clip: int, stride: int
) -> Int64[np.ndarray, "clips frames"]:
    """VideoClsDataset, mode "test"."""
    kept = np.arange(0, num_frames, stride, dtype=np.int64)
    step = max((len(kept) - frames_per_clip) / (num_clips - 1), 0.0)
    starts = np.array([int(clip * step) for clip in range(num_clips)])
    indices: Int64[np.ndarray, "clips frames"] = kept[
        np.minimum(starts[:, None] + np.arange(frames_per_clip), len(kept) - 1)
    ]
    return indices


def videomae_ssv2(num_frames: int, *, frames_per_clip: int) -> Int64[np.ndarray, "clips frames"]:
    """SSVideoClsDataset, mode "test"."""
    segment = num_frames / frames_per_clip
    starts = np.arange(frames_per_clip) * segment
    return np.stack([starts, segment / 2 + starts]).astype(np.int64)


def vjepa2(num_frames: int, *, num_clips: int, frames_per_clip: int, stride: int) -> Int64[np.ndarray, "clips frames"]:
    """VideoDataset.loadvideo_decord with allow_clip_overlap, its random window replaced by the middle one."""
    frames, clips = frames_per_clip, np.arange(num_clips)[:, None]
    partition, clip_length = num_frames // num_clips, frames * stride
    if partition > clip_length:
        start = (partition - 1 - clip_length) // 2
        window = np.linspace(start, start + clip_length, num=frames)
        return np.clip(window, start, start + clip_length - 1).astype(np.int64) + clips * partition
    last = min(clip_length, num_frames) - 1
    points = np.linspace(0, last, num=last // stride)
    points = np.concatenate([points, np.full(frames - len(points), last)])
    step = (num_frames - clip_length) // (num_clips - 1) if num_frames > clip_length else 0
    return np.clip(points, 0, max(last - 1, 0)).astype(np.int64) + clips * step
