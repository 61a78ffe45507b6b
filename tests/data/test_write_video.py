"""write_video: what is written is what is read, byte for byte the same each time."""

from pathlib import Path

import av
import numpy as np
import pytest
import torch

from coca_video.data.decode import open_video, write_video
from tests.data.numbered_videos import numbered_frame, numbers_shown


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_write_video(tmp_path: Path, suffix: str) -> None:
    frames = torch.from_numpy(np.stack([numbered_frame(number) for number in range(20)])).permute(0, 3, 1, 2)
    first, second = tmp_path / f"a{suffix}", tmp_path / f"b{suffix}"
    write_video(first, frames=frames, frames_per_second=30000 / 1001)
    for _ in range(10):
        open_video(first)  # leaves other bytes in freed memory, which a careless encoder would read
        write_video(second, frames=frames, frames_per_second=30000 / 1001)
        assert first.read_bytes() == second.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [first.name, second.name]
    reader = open_video(first)
    assert numbers_shown(reader.frames(range(20))) == list(range(20))
    assert (reader.frames(range(20)).int() - frames.int()).abs().float().mean() < 8  # of 255; lossy at colour edges
    assert reader.times_seconds[-1] == pytest.approx(19 * 1001 / 30000, abs=1e-3)  # MKV keeps milliseconds
    with av.open(str(first)) as container:
        context = container.streams.video[0].codec_context
        assert (context.codec.canonical_name, context.pix_fmt) == ("h264", "yuv420p")


def test_write_video_quality(tmp_path: Path) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (8, 3, 32, 32), dtype=np.uint8))
    for crf in (1, 40):
        write_video(tmp_path / f"{crf}.mp4", frames=noise, frames_per_second=25.0, crf=crf)
    assert (tmp_path / "1.mp4").stat().st_size > 2 * (tmp_path / "40.mp4").stat().st_size


def test_write_video_says_what_is_wrong(tmp_path: Path) -> None:
    frames = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match="even height and width"):
        write_video(tmp_path / "a.mp4", frames=frames[..., :7], frames_per_second=25.0)
    with pytest.raises(ValueError, match="at least one frame"):
        write_video(tmp_path / "a.mp4", frames=frames[:0], frames_per_second=25.0)
    with pytest.raises(ValueError, match="a name that ends in"):
        write_video(tmp_path / "a.txt", frames=frames, frames_per_second=25.0)
    with pytest.raises(ValueError, match="above 0"):
        write_video(tmp_path / "a.mp4", frames=frames, frames_per_second=0.0)
    assert list(tmp_path.iterdir()) == []
