"""PyAV's reader decodes no more pictures than it needs, and what it returns is what decoding all of them returns."""

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from coca_video.data.decode import open_video
from coca_video.data.decode import pyav as pyav_module
from coca_video.data.decode.index import PacketIndex, index_packets
from coca_video.data.decode.open import fastest_by_pyav
from coca_video.data.decode.pyav import PyAVReader
from coca_video.data.decode.source import as_source
from tests.data.numbered_videos import encode, numbered_frame, numbers_shown, sequential, stack
from tests.data.odd_videos import BUILDERS, HEVC, HEVC_OPEN, X264_OPEN, X265
from tests.data.test_bitstream import exp_golomb

PYRAMID = {"options": {"x264-params": "bframes=7:b-adapt=0:b-pyramid=normal:ref=4:keyint=24:scenecut=0"}}


def noisy(number: int) -> np.ndarray:
    """A numbered frame with noise of its own: a picture predicted from another one than its own is another picture."""
    noise = np.random.default_rng(number).integers(-12, 13, (48, 64, 3))
    return np.clip(numbered_frame(number) + noise, 0, 255).astype(np.uint8)


KINDS: dict[str, dict] = {
    "b_frames.mp4": {},
    "pyramid.mp4": PYRAMID,
    "pyramid.mkv": PYRAMID,
    "no_b_frames.mp4": {"b_frames": 0},
    "all_key_frames.mp4": {"options": {"x264-params": "keyint=1"}},
    "open.mp4": X264_OPEN,
    "hevc.mp4": HEVC,
    "hevc_open.mp4": HEVC_OPEN,
    "hevc_open.mkv": HEVC_OPEN,
    "hevc_decodable_leading.mp4": {
        "codec": "libx265",
        "options": {"x265-params": f"{X265}:open-gop=0:radl=2"},
    },
}


def check_subsets(path: Path, *, num_subsets: int) -> None:
    """Each frame alone and random sets of frames, each set by a new reader or by one that has read before."""
    reference = sequential(path)
    draw, source = random.Random(path.name), as_source(path)
    index = index_packets(source)
    count = len(reference)
    kept = PyAVReader(source, index=index)
    for number in range(count):
        assert torch.equal(kept.frames([number])[0], reference[number]), number
    for _ in range(num_subsets):
        numbers = sorted(draw.sample(range(count), draw.randint(1, min(count, draw.choice([4, 16, count])))))
        for reader in (kept, PyAVReader(source, index=index)):
            assert torch.equal(reader.frames(numbers), stack(reference, numbers)), numbers


@pytest.mark.parametrize("name", KINDS)
def test_frames_with_and_without_the_others(tmp_path: Path, name: str) -> None:
    path = encode(tmp_path / name, draw=noisy, **KINDS[name])
    index = index_packets(as_source(path))
    assert index.can_skip and index.uncountable is None
    assert fastest_by_pyav(index) == (name != "open.mp4")
    check_subsets(path, num_subsets=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", BUILDERS)
def test_frames_of_odd_files_with_and_without_the_others(tmp_path: Path, name: str) -> None:
    BUILDERS[name](tmp_path / name)
    check_subsets(tmp_path / name, num_subsets=25)


def references(path: Path) -> list[tuple[int, bool]]:
    """(presentation time, whether others refer to it) of packets of H.264 in MP4, by their slices' nal_ref_idc."""
    found = []
    with av.open(str(path)) as container:
        for packet in container.demux(video=0):
            data, at = bytes(packet), 0
            while at < len(data):
                if data[at + 4] & 31 in (1, 5):
                    found.append((packet.pts, data[at + 4] >> 5 > 0))
                    break
                at += 4 + int.from_bytes(data[at : at + 4], "big")
    return found


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The presentation times of all frames that come out of the decoder on behalf of decode_wanted."""
    times: list[int] = []

    def noted(*arguments: object, **options: object) -> object:
        for frame in decode_wanted(*arguments, **options):
            times.append(frame.pts)
            yield frame

    decode_wanted = pyav_module.decode_wanted
    monkeypatch.setattr(pyav_module, "decode_wanted", noted)
    return times


@pytest.mark.parametrize("options", [{}, PYRAMID], ids=["plain", "pyramid"])
@pytest.mark.parametrize("numbers", [[30], [47], [24, 35], [26, 27, 40], [5, 29, 59]])
def test_what_is_decoded(tmp_path: Path, decoded: list[int], numbers: list[int], options: dict) -> None:
    path = encode(tmp_path / "v.mp4", gop_size=24, **options)
    packets = references(path)
    pts = sorted(time for time, _ in packets)
    expected = list[int]()
    for key in (0, 24, 48):
        group = [pts[number] for number in numbers if key <= number < key + 24]
        in_file = [packet for packet in packets if packet[0] in pts[key : key + 24]]
        last = max((place for place, (time, _) in enumerate(in_file) if time in group), default=-1)
        expected += sorted(time for time, is_reference in in_file[: last + 1] if is_reference or time in group)
    reader = open_video(path, backend="pyav")
    decoded.clear()
    assert numbers_shown(reader.frames(numbers)) == numbers
    assert decoded == expected
    assert len(decoded) < max(numbers) - min(numbers) // 24 * 24 + 1  # fewer than all between


def test_hevc_leaves_out_what_nothing_needs(tmp_path: Path, decoded: list[int]) -> None:
    reader = open_video(encode(tmp_path / "v.mp4", **HEVC_OPEN), backend="pyav")
    decoded.clear()
    assert numbers_shown(reader.frames([0, 11, 59])) == [0, 11, 59]
    assert 3 < len(decoded) < 20  # of the 24 in the two groups


@pytest.mark.parametrize("layers", [1, 3])
def test_hevc_of_several_temporal_layers_is_decoded_whole(tmp_path: Path, layers: int) -> None:
    # A picture "to which none of its layer refers" may serve a higher layer: FFmpeg would leave it out all the same.
    options = {"x265-params": f"{X265}:open-gop=0:temporal-layers={layers}:bframes=7:b-adapt=0"}
    path = encode(tmp_path / "v.mp4", codec="libx265", options=options, draw=noisy)
    assert index_packets(as_source(path)).can_skip == (layers == 1)
    check_subsets(path, num_subsets=10)


def without_reordering(path: Path) -> int:
    """Strips the SPS of its VUI, which tells how many frames come out of order; returns how many copies it found.

    H.264, 7.3.2.1.1, for a stream of the main profile without cropping; the rest of the unit becomes zeros.
    """
    with av.open(str(path)) as container:
        record = container.streams.video[0].codec_context.extradata
    length = int.from_bytes(record[6:8], "big")
    unit = record[8 : 8 + length]
    bits, at = "".join(f"{byte:08b}" for byte in unit), 32  # behind the header, profile, constraints and level

    def number() -> int:
        nonlocal at
        zeros = bits.index("1", at) - at
        value = int(bits[at + zeros : at + 2 * zeros + 1], 2) - 1
        at += 2 * zeros + 1
        assert bits[:at].endswith(exp_golomb(value))
        return value

    number(), number()  # its id, log2_max_frame_num
    assert number() == 0  # pic_order_cnt_type
    number(), number()  # log2_max_pic_order_cnt_lsb, max_num_ref_frames
    at += 1
    assert (number(), number()) == (3, 2)  # macroblocks across and down, less one
    assert bits[at] == "1"  # frame_mbs_only_flag
    at += 2
    assert bits[at : at + 2] == "01"  # no cropping, VUI
    stripped = bits[: at + 1] + "01"
    stripped += "0" * (len(bits) - len(stripped))
    new = int(stripped, 2).to_bytes(length, "big")
    data = path.read_bytes()
    path.write_bytes(data.replace(unit, new))
    return data.count(unit)


@pytest.mark.parametrize("b_frames", [1, 3, 7])
def test_a_decoder_that_has_to_find_out_the_reordering(tmp_path: Path, b_frames: int) -> None:
    params = f"bframes={b_frames}:b-adapt=0:b-pyramid=normal:keyint=24:scenecut=0"
    path = encode(tmp_path / "v.mp4", draw=noisy, options={"profile": "main", "x264-params": params})
    assert without_reordering(path) >= 1
    assert len(sequential(path)) == 60
    check_subsets(path, num_subsets=20)


def reader_with(path: Path, *, change: Callable[[PacketIndex], PacketIndex]) -> PyAVReader:
    source = as_source(path)
    return PyAVReader(source, index=change(index_packets(source)))


def test_a_frame_that_does_not_come_is_walked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mp4")
    reader = open_video(path, backend="pyav")
    lost = index_packets(as_source(path)).pts[31]

    def forgetful(*arguments: object, **options: object) -> object:
        return (frame for frame in decode_wanted(*arguments, **options) if frame.pts != lost)

    decode_wanted = pyav_module.decode_wanted
    monkeypatch.setattr(pyav_module, "decode_wanted", forgetful)
    numbers = [30, 31, 59, 2]
    assert torch.equal(reader.frames(numbers), stack(sequential(path), numbers))


@pytest.mark.parametrize("can_skip", [False, True])
def test_skipping_is_off_where_the_index_says_so(tmp_path: Path, decoded: list[int], can_skip: bool) -> None:
    path = encode(tmp_path / "v.mp4", options={"x264-params": "bframes=3:b-adapt=0:b-pyramid=none:scenecut=0"})
    reader = reader_with(path, change=lambda index: replace(index, can_skip=can_skip))
    decoded.clear()
    assert numbers_shown(reader.frames([24 + 8])) == [32]
    # In the file I P4 b1 b2 b3 P8 b5 b6 b7: up to P8, with or without the three in between.
    assert len(decoded) == (3 if can_skip else 6)


def times_open(path: Path) -> int:
    """How often this process has the file open."""
    return sum(link.resolve() == path for link in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="open files are listed on Linux only")
def test_an_opened_file_stays_open_until_frames_are_read(tmp_path: Path) -> None:
    path = encode(tmp_path.resolve() / "v.mp4")
    reader = open_video(path, backend="pyav")
    assert times_open(path) == 1
    reader.frames([40])
    assert times_open(path) == 0
    unread = open_video(path, backend="pyav")
    assert times_open(path) == 1
    unread.close()
    assert times_open(path) == 0


@pytest.mark.parametrize("is_forked", [False, True])
def test_a_forked_process_opens_the_file_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_forked: bool) -> None:
    path = encode(tmp_path / "v.mp4")
    reader, opens = open_video(path, backend="pyav"), 0

    def counted(*arguments: object) -> object:
        nonlocal opens
        opens += 1
        return open_stream(*arguments)

    open_stream = pyav_module.open_stream
    monkeypatch.setattr(pyav_module, "open_stream", counted)
    if is_forked:
        here = os.getpid()
        monkeypatch.setattr(pyav_module.os, "getpid", lambda: here + 1)
    for number, expected in ((40, int(is_forked)), (3, int(is_forked) + 1)):
        assert numbers_shown(reader.frames([number])) == [number]
        assert opens == expected


def test_the_frames_have_their_colours_last_in_memory(tmp_path: Path) -> None:
    frames = open_video(encode(tmp_path / "v.mp4"), backend="pyav").frames([3, 9])
    assert frames.shape == (2, 3, 48, 64) and frames.stride() == (48 * 64 * 3, 1, 64 * 3, 3)
