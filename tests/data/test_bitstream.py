"""What is read off H.264's bits, against units written out by hand and against files of known kinds."""

from pathlib import Path

import av
import pytest

from coca_video.data.decode.bitstream import Start, sequence_headers, start_of
from coca_video.data.decode.index import index_packets
from coca_video.data.decode.source import as_source
from tests.data.numbered_videos import encode
from tests.data.odd_videos import X265

AVCC = bytes([1, 0x64, 0, 31, 0xFF])  # a record whose fifth byte says: lengths of 4 bytes


def exp_golomb(number: int) -> str:
    """H.264, 9.1: as many zeros as the number + 1 has bits behind its first."""
    bits = f"{number + 1:b}"
    return "0" * (len(bits) - 1) + bits


def unit(kind: int, *numbers: int) -> bytes:
    bits = "".join(map(exp_golomb, numbers)) + "1"
    body = bits + "0" * (-len(bits) % 8)
    return bytes([0x60 | kind]) + bytes(int(body[at : at + 8], 2) for at in range(0, len(body), 8))


@pytest.mark.parametrize("number", [0, 1, 2, 7, 8, 300])
@pytest.mark.parametrize("slice_type", [0, 1, 2, 5, 7, 9])
@pytest.mark.parametrize("kind", [1, 5])
def test_start_of_h264(kind: int, slice_type: int, number: int) -> None:
    units = [unit(9, 0), unit(6, 1, 2), unit(kind, number, slice_type, 3), unit(1, 5, 0)]
    by_length = b"".join(len(each).to_bytes(4, "big") + each for each in units)
    by_start_code = b"".join(b"\0\0\1" + each for each in units)
    expected = Start(is_whole=kind == 5 or slice_type in (2, 7), forgets=kind == 5)
    assert start_of(by_length, record=AVCC, codec="h264") == expected
    assert start_of(by_start_code, record=None, codec="h264") == expected


@pytest.mark.parametrize("kind", range(64))
def test_start_of_hevc(kind: int) -> None:
    """H.265, table 7-1: 0 to 31 are slices, of which 16 to 23 are of pictures that need no other."""
    units = [bytes([35 << 1, 1, 0x50]), bytes([kind << 1, 1, 0xAF]), bytes([1 << 1, 1, 0xAF])]
    first = kind if kind < 32 else 1
    expected = Start(is_whole=16 <= first <= 23, forgets=16 <= first <= 23)
    assert start_of(b"".join(b"\0\0\1" + each for each in units), record=None, codec="hevc") == expected
    record = bytes([1, *[0] * 20, 0xFD])  # hvcC's 22nd byte: lengths of 2 bytes
    by_length = b"".join(len(each).to_bytes(2, "big") + each for each in units)
    assert start_of(by_length, record=record, codec="hevc") == expected


def test_a_packet_without_slices() -> None:
    for data, record in ((unit(6, 1), None), (b"", AVCC)):
        assert start_of(data, record=record, codec="h264") == Start(is_whole=False, forgets=False)


def test_sequence_headers() -> None:
    one, two = b"\x67\x64\0\x1f\xac", b"\x67\x64\0\x28\xad"
    packet = b"".join(len(each).to_bytes(4, "big") + each for each in (one, unit(5, 0, 7), two))
    assert sequence_headers(packet, record=AVCC, codec="h264") == {one, two}
    by_start_code = b"".join(b"\0\0\0\1" + each for each in (one, unit(5, 0, 7), two))
    assert sequence_headers(by_start_code, record=None, codec="h264") == {one, two}
    hevc = b"\0\0\1\x42\x01\x01\x60\0\0\1\x26\x01\xaf"
    assert sequence_headers(hevc, record=None, codec="hevc") == {b"\x42\x01\x01\x60"}
    assert sequence_headers(hevc[:3] + hevc[10:], record=None, codec="hevc") == set()
    for damaged, record in ((b"\0\0", AVCC), (b"no start code", None)):
        assert sequence_headers(damaged, record=record, codec="h264") == set()


@pytest.mark.parametrize(
    ("name", "options", "clean"),
    [
        ("closed.mp4", {"x264-params": "open-gop=0:keyint=12:scenecut=0"}, [0, 12, 24, 36, 48]),
        ("closed.mkv", {"x264-params": "open-gop=0:keyint=12:scenecut=0"}, [0, 12, 24, 36, 48]),
        ("open.mp4", {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}, [0]),
        ("open_hevc.mp4", {"x265-params": f"{X265}:open-gop=1"}, [0, 12, 24, 36, 48]),
        ("closed_hevc.mkv", {"x265-params": f"{X265}:open-gop=0"}, [0, 12, 24, 36, 48]),
        ("refresh.mp4", {"x264-params": "intra-refresh=1:keyint=12:bframes=0:scenecut=0"}, [0]),
    ],
)
def test_clean_starts(tmp_path: Path, name: str, options: dict[str, str], clean: list[int]) -> None:
    """Frames from which decoding may start: all key frames of closed groups, and of HEVC; the first alone otherwise."""
    path = encode(tmp_path / name, codec="libx265" if "x265-params" in options else "libx264", options=options)
    index = index_packets(as_source(path))
    assert [index.pts.index(time) for time in index.clean_pts] == clean
    assert (index.uncountable is not None) == (name == "refresh.mp4")
    with av.open(str(path)) as container:
        assert sum(packet.is_keyframe for packet in container.demux(video=0)) > len(clean) - 1
