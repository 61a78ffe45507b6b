"""The little of the bit streams of H.264, HEVC and VP9 that tells where decoding can start, and of which size.

ITU-T H.264, 7.3 and 7.4; ITU-T H.265, 7.3.1.2 and table 7-1; ISO/IEC 14496-15 for the records avcC and hvcC.
"""

from typing import NamedTuple

SLICE, IDR_SLICE = 1, 5  # H.264's nal_unit_type, table 7-1
INTRA_SLICES = (2, 7)  # H.264's slice_type I, table 7-6
HEVC_SLICES, HEVC_INTRA = range(32), range(16, 24)  # HEVC's nal_unit_type: all slices; those of pictures to start at
H264_SEQUENCE, HEVC_SEQUENCE = 7, 33  # nal_unit_type of sequence parameter sets
HEADER_BYTES = 16  # two Exp-Golomb numbers of at most 32 bits and their zeros


class Start(NamedTuple):
    """What decoding may rely on at a packet that is called a key frame.

    is_whole: its picture needs no other; an encoder may mark the start of a gradual refresh too, and a container may
    call each packet a key frame. forgets: no later picture refers to an earlier one.
    """

    is_whole: bool
    forgets: bool


def start_of(data: bytes, *, record: bytes | None, codec: str) -> Start:
    """By the first slice of a packet of "h264" or "hevc"; without its `record` (avcC, hvcC) start codes part it."""
    is_h264 = codec == "h264"
    for at in _units(data, length_bytes=_length_bytes(record, codec=codec)):
        if is_h264 and (unit_type := data[at] & 31) in (SLICE, IDR_SLICE):
            bits = "".join(f"{byte:08b}" for byte in data[at + 1 : at + 1 + HEADER_BYTES])
            _, rest = _exp_golomb(bits)  # first_mb_in_slice
            is_idr = unit_type == IDR_SLICE
            return Start(is_whole=is_idr or _exp_golomb(rest)[0] in INTRA_SLICES, forgets=is_idr)
        if not is_h264 and (unit_type := data[at] >> 1 & 63) in HEVC_SLICES:
            # HEVC's leading pictures apart, which follow such a picture in the file, none refers further back.
            return Start(is_whole=unit_type in HEVC_INTRA, forgets=unit_type in HEVC_INTRA)
    return Start(is_whole=False, forgets=False)


def vp9_size_header(data: bytes) -> bytes:
    """What of a key frame of VP9 gives its colours and size (VP9 bitstream, 6.2; in profile 0 they end in byte 8)."""
    return data[1:8] + bytes(byte & 0xF0 for byte in data[8:9])


def sequence_headers(data: bytes, *, record: bytes | None, codec: str) -> set[bytes]:
    """The sequence parameter sets inside a packet of "h264" or "hevc": another one may mean another picture size."""
    length_bytes = _length_bytes(record, codec=codec)
    units = _units(data, length_bytes=length_bytes)
    ends = [*(at - (length_bytes or 3) for at in units[1:]), len(data)][: len(units)]  # a damaged packet may hold none
    return {
        data[at:end].rstrip(b"\0")  # a start code of four bytes leaves one of its zeros
        for at, end in zip(units, ends, strict=True)
        if (data[at] & 31 == H264_SEQUENCE if codec == "h264" else data[at] >> 1 & 63 == HEVC_SEQUENCE)
    }


def _length_bytes(record: bytes | None, *, codec: str) -> int | None:
    """How many bytes give the length of each unit, by the record; None: there is none."""
    place = 4 if codec == "h264" else 21
    return (record[place] & 3) + 1 if record is not None and len(record) > place and record[0] == 1 else None


def _units(data: bytes, *, length_bytes: int | None) -> list[int]:
    """Where each unit's first byte stands."""
    return _by_start_code(data) if length_bytes is None else _by_length(data, length_bytes=length_bytes)


def _by_length(data: bytes, *, length_bytes: int) -> list[int]:
    starts, at = [], 0
    while at + length_bytes < len(data):
        starts.append(at + length_bytes)
        at += length_bytes + int.from_bytes(data[at : at + length_bytes], "big")
    return starts


def _by_start_code(data: bytes) -> list[int]:
    starts, at = [], data.find(b"\0\0\1")
    while 0 <= at < len(data) - 3:
        starts.append(at + 3)
        at = data.find(b"\0\0\1", at + 3)
    return starts


def _exp_golomb(bits: str) -> tuple[int, str]:
    """A number in Exp-Golomb code (9.1) and the bits behind it; -1 where the bits do not hold one."""
    zeros = bits.find("1")
    if zeros < 0 or len(bits) < 2 * zeros + 1:
        return -1, ""
    return int(bits[zeros : 2 * zeros + 1], 2) - 1, bits[2 * zeros + 1 :]
