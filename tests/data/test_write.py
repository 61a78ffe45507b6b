"""Transcoding one file: its frames, times and colours stay, key frames lie in their places, each option shows."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from coca_video.data.decode import UnreadableVideo, open_video
from coca_video.data.decode.write import TranscodeConfig, transcode_video
from tests.data.numbered_videos import encode, numbers_shown, sequential, sequential_seconds, stack
from tests.data.odd_videos import BUILDERS

SMALL = TranscodeConfig(short_side=32, crf=10)


def boxes(path: Path) -> list[str]:
    """The names of an MP4's outermost boxes, in order (ISO 14496-12, 4.2)."""
    data, at, names = path.read_bytes(), 0, list[str]()
    while at < len(data):
        names.append(data[at + 4 : at + 8].decode())
        at += int.from_bytes(data[at : at + 4], "big")
    return names


def key_packets(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size > 0]
    assert not any(packet.is_discard for packet in packets)
    assert [packet.pts for packet in packets] == sorted(packet.pts for packet in packets)  # no B-frames
    return [number for number, packet in enumerate(packets) if packet.is_keyframe]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        ((1080, 1920), (256, 456)),  # 455.1: the nearest even number
        ((1920, 1080), (456, 256)),
        ((512, 512), (256, 256)),
        ((256, 340), (256, 340)),
        ((240, 320), (240, 320)),  # never enlarged
        ((49, 65), (48, 64)),
        ((256, 341), (256, 340)),
        ((1, 9), (2, 8)),
    ],
)
def test_size(shown: tuple[int, int], expected: tuple[int, int]) -> None:
    assert TranscodeConfig().size(height=shown[0], width=shown[1]) == expected


@pytest.mark.parametrize(
    "name",
    [
        "b_frames.mp4",
        "open_gop_hevc.mkv",
        "variable_rate.mkv",
        "variable_rate.mp4",
        "one_frame.mp4",
        "odd_size_h264.mp4",
        "edit_list.mp4",
        "edit_list_end.mp4",
        "start_delay.mp4",
        "ten_bit_h264.mp4",
        "alpha_png.mov",
        "interlaced_h264.mp4",
        "non_zero_start.ts",
        "streams_audio_first.mkv",
        "turned_90.mp4",
        "turned_180.mp4",
        "turned_270.mov",
        "count_high.avi",
        "mpeg4_packed.avi",
        "mpeg4_b_frames.avi",
        "shared_times.mkv",
        "fine_time_base.mp4",
        "size_change_h264.mkv",
    ],
)
def test_every_frame_and_its_time_is_kept(tmp_path: Path, name: str) -> None:
    source, out = tmp_path / name, tmp_path / "out.mp4"
    shown = BUILDERS[name](source)
    expected, before = sequential(source), source.read_bytes()
    height, width = expected[0].shape[1:]
    written = transcode_video(source, out=out, config=TranscodeConfig(crf=10))
    found = sequential(out)
    assert numbers_shown(stack(found, range(len(shown)))) == shown
    assert found[0].shape == (3, height // 2 * 2, width // 2 * 2)
    assert (written.num_frames, written.height, written.width) == (len(shown), *found[0].shape[1:])
    np.testing.assert_allclose(sequential_seconds(out), sequential_seconds(source), rtol=0, atol=1e-6)
    with open_video(source, backend="pyav") as old, open_video(out, backend="pyav") as new:
        assert new.duration_seconds == pytest.approx(old.duration_seconds, abs=1e-3)
        assert written.duration_seconds == pytest.approx(old.duration_seconds, abs=1e-6)
    assert key_packets(out) == list(range(0, len(shown), 16))
    assert boxes(out).index("moov") < boxes(out).index("mdat")
    with av.open(str(out)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.sample_aspect_ratio in (None, 1)
        assert next(container.decode(stream)).rotation == 0
    assert source.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == sorted([source, out])


def quarters(number: int) -> np.ndarray:
    """Four strong colours, from which another matrix is far; they change places with the number."""
    colours = np.array([[[200, 40, 30], [40, 180, 60]], [[30, 50, 210], [200, 190, 40]]], np.uint8)
    return np.kron(np.roll(colours.reshape(4, 3), number, axis=0).reshape(2, 2, 3), np.ones((24, 32, 1), np.uint8))


@pytest.mark.parametrize("value_range", [ColorRange.MPEG, ColorRange.JPEG])
@pytest.mark.parametrize("matrix", [Colorspace.ITU601, Colorspace.ITU709, Colorspace.SMPTE240M, Colorspace.BT2020])
def test_colours_stay_what_a_reader_gave(tmp_path: Path, matrix: Colorspace, value_range: ColorRange) -> None:
    source, out = (tmp_path / name for name in ("source.mp4", "out.mp4"))
    pix_fmt = "yuvj420p" if value_range == ColorRange.JPEG else "yuv420p"
    encode(source, num_frames=8, draw=quarters, pix_fmt=pix_fmt, colour=(matrix, value_range), options={"crf": "4"})
    transcode_video(source, out=out, config=TranscodeConfig(crf=4))
    old, new = (stack(sequential(path), range(8)).float() for path in (source, out))
    assert (old - new).abs().mean() < 2.5
    assert (old - new).mean(dim=(0, 2, 3)).abs().max() < 1.5
    with open_video(out) as reader:  # and so in the backend that `auto` takes
        assert (reader.frames(range(8)).float() - old).abs().mean() < 2.5
    # The limits are narrow enough: without a look at the tags, the source's own pixels are further away.
    with av.open(str(source)) as container:
        pixels = next(container.decode(video=0)).to_ndarray()
    wrong = av.VideoFrame.from_ndarray(pixels, format="yuv420p").reformat(format="rgb24")
    if (matrix, value_range) != (Colorspace.ITU601, ColorRange.MPEG):
        assert (torch.from_numpy(wrong.to_ndarray()).permute(2, 0, 1) - old[0]).abs().mean() > 4


def test_scaling_keeps_the_picture(tmp_path: Path, data_folder: Path) -> None:
    source, out = data_folder / "clips" / "decord_test_video_90.mov", tmp_path / "out.mp4"
    transcode_video(source, out=out, config=TranscodeConfig(short_side=160, crf=10))
    old, new = (stack(sequential(path), range(3)).float() for path in (source, out))
    assert (old.shape, new.shape) == ((3, 3, 568, 320), (3, 3, 284, 160))
    halved = torch.nn.functional.avg_pool2d(old, 2)
    assert (halved - new).abs().mean() < 2.5
    assert (halved - new).mean().abs() < 0.5


def test_every_option_shows(tmp_path: Path) -> None:
    source = encode(tmp_path / "source.mp4", height=96, width=128)
    files = {}
    for number, config in enumerate(
        [
            SMALL,
            SMALL,
            replace(SMALL, gop=5),
            replace(SMALL, crf=40),
            replace(SMALL, preset="ultrafast"),
            replace(SMALL, short_side=48),
        ]
    ):
        files[number] = tmp_path / f"{number}.mp4"
        transcode_video(source, out=files[number], config=config)
    first, again, short_gop, coarse, quick, larger = (files[number].read_bytes() for number in range(6))
    assert first == again
    assert key_packets(files[0]) == list(range(0, 60, 16))
    assert key_packets(files[2]) == list(range(0, 60, 5))
    assert len(short_gop) > len(first) > len(coarse)
    assert b"deblock=1" in first and b"deblock=0" in quick  # x264 writes its settings into the stream
    assert sequential(files[0])[0].shape == (3, 32, 42)  # 42.67: the nearest even number
    assert sequential(files[5])[0].shape == (3, 48, 64)
    assert larger != first


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"short_side": 255}, "even number"),
        ({"short_side": 8}, "at least 16"),
        ({"gop": 0}, "--gop must be at least 1"),
        ({"crf": 52}, "--crf must lie between 0 and 51; got 52"),
    ],
)
def test_wrong_settings_are_a_sentence(changes: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranscodeConfig(**changes)


def test_a_damaged_source_leaves_nothing(tmp_path: Path) -> None:
    whole = encode(tmp_path / "whole.mp4", num_frames=100, faststart=True)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:-2000])
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    for path in (cut, text, tmp_path / "missing.mp4"):
        with pytest.raises(UnreadableVideo, match=path.name):
            transcode_video(path, out=tmp_path / "out.mp4", config=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.mp4", "text.mp4", "whole.mp4"]


def test_a_folder_that_takes_no_file_is_an_os_error(tmp_path: Path) -> None:
    source = encode(tmp_path / "source.mp4", num_frames=2)
    with pytest.raises(FileNotFoundError) as caught:
        transcode_video(source, out=tmp_path / "missing" / "out.mp4", config=SMALL)
    assert type(caught.value) is FileNotFoundError  # a plain one, which can be sent from one process to another


MEMORY = """
import resource, sys
from pathlib import Path
from coca_video.data.decode.write import TranscodeConfig, transcode_video
config = TranscodeConfig(short_side=32, preset="ultrafast")
transcode_video(Path(sys.argv[1]), out=Path(sys.argv[2]), config=config)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.drill
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.parametrize("suffix", [".mp4", ".avi"])
def test_memory_does_not_grow_with_the_length(tmp_path: Path, suffix: str) -> None:
    megabytes = []
    blank = np.zeros((480, 640, 3), np.uint8)
    for num_frames in (50, 400):  # 350 frames of 460,800 bytes in yuv420p are 154 MiB
        path = tmp_path / f"{num_frames}{suffix}"
        encode(
            path, num_frames=num_frames, draw=lambda _: blank, height=480, width=640, options={"preset": "ultrafast"}
        )
        command = [sys.executable, "-c", MEMORY, str(path), str(tmp_path / "out.mp4")]
        megabytes.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert megabytes[1] - megabytes[0] < 60


@pytest.mark.parametrize("name", ["cut.mkv", "cut.webm", "cut.avi", "cut.mp4"])
def test_a_file_cut_off_is_no_shorter_video(tmp_path: Path, name: str) -> None:
    codec = {".webm": "libvpx", ".avi": "mpeg4"}.get(Path(name).suffix, "libx264")
    path = encode(tmp_path / name, codec=codec, num_frames=60, b_frames=0)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    with pytest.raises(UnreadableVideo, match="cut off"):
        transcode_video(path, out=tmp_path / "out.mp4", config=SMALL)
    assert not (tmp_path / "out.mp4").exists()
