"""Builders of video files as they are met in practice, odd ones first, whose every frame shows its own number.

`BUILDERS` maps a file name to a function that writes it and returns the numbers that a player shows, in order. PyAV's
own encoders write all of them; what FFmpeg cannot write (a wrong count, a rotation) is patched into the bytes.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

from tests.data.numbered_videos import HEIGHT, WIDTH, encode, numbered_frame, patch, remux, rotate

Builder = Callable[[Path], list[int]]


def plain(path: Path, *, shown: Sequence[int] | None = None, **arguments: object) -> list[int]:
    """A file that `encode` writes as it stands; shows all its frames unless `shown` says which."""
    encode(path, **arguments)
    first, count = arguments.get("first", 0), arguments.get("num_frames", 60)
    return list(range(first, first + count)) if shown is None else list(shown)


def turned(path: Path, *, quarter_turns: int) -> list[int]:
    """A recording by a phone on its side: stored turned, shown upright by its display matrix."""
    a, b, c, d = {1: (0, -1, 1, 0), 2: (-1, 0, 0, -1), 3: (0, 1, -1, 0)}[quarter_turns]
    # As shown 48 rows of 64 (for half a turn) or 64 rows of 128: stored, the width is a multiple of 64 either way.
    size = {"height": 48, "width": 64} if quarter_turns == 2 else {"height": 64, "width": 128}
    stored = {"height": 48, "width": 64} if quarter_turns == 2 else {"height": 128, "width": 64}
    encode(
        path,
        draw=lambda number: np.ascontiguousarray(np.rot90(numbered_frame(number, **size), -quarter_turns)),
        **stored,
    )
    rotate(path, a=a, b=b, c=c, d=d)
    return list(range(60))


def translucent(number: int) -> np.ndarray:
    """RGBA: the numbered frame, its right half half transparent."""
    alpha = np.full((HEIGHT, WIDTH, 1), 255, np.uint8)
    alpha[:, WIDTH // 2 :] = 128
    return np.concatenate([numbered_frame(number), alpha], axis=2)


def several_streams(path: Path, *, audio_first: bool) -> list[int]:
    """A small stream, then the best one; audio before both on demand."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16000) if audio_first else None
        streams = [container.add_stream("libx264", rate=30) for _ in range(2)]
        streams[1].disposition = av.stream.Disposition.default
        for stream, scale in zip(streams, (2, 1), strict=True):
            stream.height, stream.width, stream.pix_fmt = HEIGHT // scale, WIDTH // scale, "yuv420p"
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            silence.sample_rate, silence.pts = 16000, 0
            container.mux(sound.encode(silence))
            container.mux(sound.encode(None))
        for number in range(30):
            for stream in streams:
                other = number if stream is streams[1] else 4095 - number
                pixels = numbered_frame(other, height=stream.height, width=stream.width)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode(None))
    return list(range(30))


def end_hidden(path: Path) -> list[int]:
    """An edit list that ends after 40 of 60 frames."""
    encode(path)
    patch(path, after=b"elst", skip=8, value=40 * 1000 // 30, order="big")
    return list(range(40))


def wrong_count(path: Path, *, count: int) -> list[int]:
    """The header's count of frames, or what stands for it in this container, is `count`; 60 frames are there."""
    if path.suffix == ".avi":
        encode(path, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0)
        patch(path, after=b"avih", skip=4 + 16, value=count, order="little")
        patch(path, after=b"strh", skip=4 + 32, value=count, order="little")
    elif path.suffix == ".mp4":
        encode(path)
        for box in (b"mvhd", b"mdhd"):
            scale = int.from_bytes(path.read_bytes().split(box)[1][12:16], "big")
            patch(path, after=box, skip=16, value=count * scale // 30, order="big")
    else:
        encode(path, container_options={"live": "0"})
        data = path.read_bytes()
        at = data.index(b"\x44\x89\x88") + 3  # Segment/Info/Duration, a float of 8 bytes, in milliseconds
        path.write_bytes(data[:at] + np.array(count * 1000 / 30, ">f8").tobytes() + data[at + 8 :])
    return list(range(60))


def packed_b_frames(path: Path) -> list[int]:
    """DivX 5's way to keep B-frames in AVI: a packet of two pictures, then an empty one (N-VOP)."""
    encode(path, codec="mpeg4", b_frames=1, options={"sc_threshold": "1000000000"})
    remux(path, packets=_pack)
    return list(range(60))


def _pack(packets: list[av.Packet]) -> list[av.Packet]:
    """P, B, P, B -> P and B, empty, P and B, empty; the user data that marks the stream as packed."""
    mark, empty = b"\0\0\1\xb2DivX503b1393p", b"\0\0\1\xb6\x50\x4f"
    datas = [bytes(packet) for packet in packets]
    kinds = [data[data.index(b"\0\0\1\xb6") + 4] >> 6 for data in datas]  # 0: I, 1: P, 2: B
    out: list[bytes] = []
    for data, kind in zip(datas, kinds, strict=True):
        if kind == 2:
            out[-1] += data
            out.append(empty)
        else:
            at = data.index(b"\0\0\1\xb6")
            out.append(data[:at] + mark + data[at:] if kind == 0 else data)
    return [_packet(data, like=packet) for data, packet in zip(out, packets, strict=True)]


def _packet(data: bytes, *, like: av.Packet, pts: int | None = None) -> av.Packet:
    packet = av.Packet(data)
    packet.pts = packet.dts = like.dts if pts is None else pts
    packet.time_base, packet.duration, packet.is_keyframe = like.time_base, like.duration, like.is_keyframe
    return packet


def empty_pictures(path: Path) -> list[int]:
    """MPEG-4 with a picture "as before" (N-VOP, which decoders do not return) after each tenth one."""
    encode(path, codec="mpeg4", b_frames=0, pts=[number + number // 10 for number in range(60)])

    def add(packets: list[av.Packet]) -> list[av.Packet]:
        out = []
        for number, packet in enumerate(packets):
            out.append(packet)
            if number % 10 == 9 and number < 59:  # at the end of a file FFmpeg would show the last picture again
                empty = _packet(b"\0\0\1\xb6\x50\x4f", like=packet, pts=packet.pts + packet.duration // 2)
                empty.is_keyframe = False
                out.append(empty)
        return out

    remux(path, packets=add)
    return list(range(60))


def shared_times(path: Path) -> list[int]:
    """Each time is that of two frames, as after a recorder's clock stood still."""
    encode(path, b_frames=0)

    def halve(packets: list[av.Packet]) -> list[av.Packet]:
        for packet in packets:
            packet.pts = packet.dts = packet.pts // 66 * 66
        return packets

    remux(path, packets=halve)
    return list(range(60))


def size_change(path: Path, **arguments: object) -> list[int]:
    """Two recordings put one behind the other; the second has twice the height and width."""
    encode(path, num_frames=30, **arguments)
    second = path.with_name(f"second-{path.name}")
    large = {"height": 2 * HEIGHT, "width": 2 * WIDTH}
    encode(second, first=30, num_frames=30, pts=list(range(30, 60)), **large, **arguments)
    with av.open(str(second)) as container:
        later = [packet for packet in container.demux(video=0) if packet.size > 0]
        remux(path, packets=lambda packets: packets + later)
    second.unlink()
    return list(range(60))


def cut_before_key(path: Path) -> list[int]:
    """Cut without encoding, 6 frames before the key frame 24; those 6 cannot be decoded."""
    encode(path, b_frames=0)
    remux(path, packets=lambda packets: packets[18:])
    return list(range(24, 60))


def cut_at_open_key(path: Path, **arguments: object) -> list[int]:
    """Cut without encoding at the key frame 24 of an open group: pictures shown before it need what was cut away."""
    encode(path, **arguments)

    def from_key(packets: list[av.Packet]) -> list[av.Packet]:
        (start,) = (
            place for place, packet in enumerate(packets) if packet.is_keyframe and packet.pts == 24 * 1000 // 30
        )
        return packets[start:]

    remux(path, packets=from_key)
    return list(range(24, 60))


def no_key_table(path: Path, **arguments: object) -> list[int]:
    """An MP4 without its table of key frames (stss), which by the standard says that every frame is one."""
    encode(path, b_frames=0, **arguments)
    path.write_bytes(path.read_bytes().replace(b"stss", b"free"))
    return list(range(60))


def two_edits(path: Path) -> list[int]:
    """An edit list that shows frames 24 to 43 first, then 0 to 9."""
    encode(path, b_frames=0, time_base=Fraction(1, 30))
    data = path.read_bytes()
    scale = int.from_bytes(data.split(b"mdhd")[1][12:16], "big")
    edits = [(20 * 1000 // 30, 24 * scale // 30), (10 * 1000 // 30, 0)]
    body = bytes(4) + len(edits).to_bytes(4, "big")
    body += b"".join(d.to_bytes(4, "big") + m.to_bytes(4, "big") + b"\0\1\0\0" for d, m in edits)
    at = data.index(b"elst") - 4
    old = int.from_bytes(data[at : at + 4], "big")
    box = (8 + len(body)).to_bytes(4, "big") + b"elst" + body
    grown = bytearray(data[:at] + box + data[at + old :])
    for name in (b"edts", b"trak", b"moov"):  # those that hold it; the frames lie before them and do not move
        start = grown.rindex(name, 0, at) - 4
        size = int.from_bytes(grown[start : start + 4], "big") + len(box) - old
        grown[start : start + 4] = size.to_bytes(4, "big")
    path.write_bytes(grown)
    return [*range(24, 44), *range(10)]


VARIABLE_PTS = np.cumsum(np.random.default_rng(0).integers(1, 8, 60)).tolist()
VARIABLE = {"pts": VARIABLE_PTS, "time_base": Fraction(1, 120)}
X264_OPEN = {"options": {"x264-params": "open-gop=1:keyint=12:bframes=3:scenecut=0"}}
X264_REPEAT = {"b_frames": 0, "options": {"x264-params": "repeat-headers=1"}}
X265 = "keyint=12:bframes=3:pools=none:log-level=0"
HEVC = {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=0"}}
HEVC_OPEN = {"codec": "libx265", "options": {"x265-params": f"{X265}:open-gop=1"}}
HEVC_P = {"codec": "libx265", "options": {"x265-params": "keyint=12:bframes=0:pools=none:log-level=0"}}
VP8 = {"codec": "libvpx", "b_frames": None}
VP9 = {"codec": "libvpx-vp9", "b_frames": None}
ALT_REF = {"auto-alt-ref": "1", "lag-in-frames": "16"}
AV1 = {"codec": "libsvtav1", "b_frames": None, "height": 96, "width": 128}
AV1 |= {"options": {"svtav1-params": "lp=1", "preset": "12"}}
MJPEG = {"codec": "mjpeg", "pix_fmt": "yuvj420p", "b_frames": None}
MPEG2 = {"codec": "mpeg2video", "b_frames": 2, "options": {"flags": "+ildct+ilme"}}
FIELDS = {"options": {"flags": "+ildct+ilme", "x264-params": "tff=1"}, "height": 96, "width": 128}
WITH_ALPHA = {"b_frames": None, "draw": translucent}
TV, FULL = ColorRange.MPEG, ColorRange.JPEG
BUILDERS: dict[str, Builder] = {
    "b_frames.mp4": plain,
    "b_frames.mkv": plain,
    "b_frames.mov": plain,
    "fragmented.mp4": partial(plain, container_options={"movflags": "frag_keyframe+empty_moov"}),
    "long_gop.mp4": partial(plain, num_frames=300, gop_size=250),
    "open_gop_h264.mp4": partial(plain, **X264_OPEN),
    "open_gop_h264.mkv": partial(plain, **X264_OPEN),
    "open_gop_hevc.mp4": partial(plain, **HEVC_OPEN),
    "open_gop_hevc.mkv": partial(plain, **HEVC_OPEN),
    "closed_gop_hevc.mp4": partial(plain, **HEVC),
    "intra_refresh.mp4": partial(plain, b_frames=0, options={"x264-params": "intra-refresh=1:keyint=24"}),
    "no_key_table_h264.mp4": no_key_table,
    "no_key_table_hevc.mp4": partial(no_key_table, **HEVC_P),
    "no_key_table_vp9.mp4": partial(no_key_table, codec="libvpx-vp9"),
    "no_key_table_mpeg4.mp4": partial(no_key_table, codec="mpeg4"),
    "variable_rate.mp4": partial(plain, **VARIABLE),
    "variable_rate.mkv": partial(plain, **VARIABLE),
    "one_frame.mp4": partial(plain, num_frames=1),
    "one_frame.mkv": partial(plain, num_frames=1),
    "odd_size_h264.mp4": partial(plain, pix_fmt="yuv444p", height=49, width=65),
    "odd_size_vp9.webm": partial(plain, **VP9, height=49, width=65),
    "narrow.mp4": partial(plain, height=50, width=34),
    "edit_list.mp4": partial(plain, pts=range(-5, 55), shown=range(5, 60)),
    "edit_list_end.mp4": end_hidden,
    "two_edits.mp4": two_edits,
    "start_delay.mp4": partial(plain, pts=range(60, 120)),
    "ten_bit_h264.mp4": partial(plain, pix_fmt="yuv420p10le"),
    "ten_bit_hevc.mp4": partial(plain, pix_fmt="yuv420p10le", **HEVC),
    "h264_422.mp4": partial(plain, pix_fmt="yuv422p"),
    "h264_444.mp4": partial(plain, pix_fmt="yuv444p"),
    "h264_gray.mp4": partial(plain, pix_fmt="gray"),
    "h264_rgb.mkv": partial(plain, codec="libx264rgb", pix_fmt="rgb24"),
    "ffv1_gray.mkv": partial(plain, codec="ffv1", b_frames=None, pix_fmt="gray"),
    "alpha_vp9.webm": partial(
        plain, codec="libvpx-vp9", pix_fmt="yuva420p", options={"auto-alt-ref": "0"}, **WITH_ALPHA
    ),
    "alpha_png.mov": partial(plain, codec="png", pix_fmt="rgba", **WITH_ALPHA),
    "alpha_qtrle.mov": partial(plain, codec="qtrle", pix_fmt="argb", **WITH_ALPHA),
    "interlaced_h264.mp4": partial(plain, **FIELDS),
    "interlaced_mpeg2.mpg": partial(plain, **MPEG2),
    "interlaced_mpeg2.ts": partial(plain, **MPEG2),
    "non_zero_start.mkv": partial(plain, pts=range(100, 160)),
    "non_zero_start.ts": partial(plain, pts=range(100, 160)),
    "negative_start.ts": partial(plain, pts=range(-20, 40), container_options={"avoid_negative_ts": "disabled"}),
    "streams.mp4": partial(several_streams, audio_first=False),
    "streams_audio_first.mkv": partial(several_streams, audio_first=True),
    "turned_90.mp4": partial(turned, quarter_turns=1),
    "turned_180.mp4": partial(turned, quarter_turns=2),
    "turned_270.mov": partial(turned, quarter_turns=3),
    "count_high.avi": partial(wrong_count, count=99),
    "count_low.avi": partial(wrong_count, count=17),
    "count_high.mp4": partial(wrong_count, count=99),
    "count_low.mp4": partial(wrong_count, count=17),
    "count_high.mkv": partial(wrong_count, count=99),
    "count_low.mkv": partial(wrong_count, count=17),
    "mpeg4.avi": partial(plain, codec="mpeg4", b_frames=0),
    "mpeg4_b_frames.avi": partial(plain, codec="mpeg4", b_frames=2),
    "mpeg4_packed.avi": packed_b_frames,
    "mpeg4.mp4": partial(plain, codec="mpeg4", b_frames=2),
    "mpeg4_empty_pictures.mp4": empty_pictures,
    "h264.avi": plain,
    "mjpeg.avi": partial(plain, **MJPEG),
    "h264.ts": plain,
    "h264.flv": plain,
    "flv1.flv": partial(plain, codec="flv", b_frames=0),
    "wmv2.wmv": partial(plain, codec="wmv2", b_frames=0),
    "palette.gif": partial(
        plain, codec="gif", b_frames=None, pix_fmt="rgb8", time_base=Fraction(1, 100), pts=range(0, 240, 4)
    ),
    "prores.mov": partial(plain, codec="prores_ks", b_frames=None, pix_fmt="yuv422p10le"),
    "av1.mkv": partial(plain, **AV1),
    "av1.mp4": partial(plain, **AV1),
    "av1.webm": partial(plain, **AV1),
    "vp8_alt_ref.webm": partial(plain, **VP8, options=ALT_REF | {"b": "500k"}),
    "vp9_alt_ref.webm": partial(plain, **VP9, options=ALT_REF),
    "vp9.mp4": partial(plain, **VP9),
    "fine_time_base.mp4": partial(plain, pts=range(0, 60 * 33_333, 33_333), time_base=Fraction(1, 1_000_000)),
    "coarse_time_base.mkv": partial(plain, time_base=Fraction(1, 2000), b_frames=0),
    "shared_times.mkv": shared_times,
    "size_change.ts": partial(size_change, **X264_REPEAT),
    "size_change_h264.mkv": partial(size_change, **X264_REPEAT),
    "size_change_h264.mp4": partial(size_change, **X264_REPEAT),
    "size_change_vp9.webm": partial(size_change, **VP9),
    "size_change_vp8.webm": partial(size_change, **VP8),
    "cut_at_open_key_h264.mkv": partial(cut_at_open_key, **X264_OPEN),
    "cut_at_open_key_hevc.mkv": partial(cut_at_open_key, **HEVC_OPEN),
    "cut_before_key.mp4": cut_before_key,
    "cut_before_key.mkv": cut_before_key,
    "full_range.mp4": partial(plain, pix_fmt="yuvj420p", colour=(Colorspace.ITU601, FULL)),
    "bt709.mp4": partial(plain, colour=(Colorspace.ITU709, TV)),
    "bt709_full.mp4": partial(plain, pix_fmt="yuvj420p", colour=(Colorspace.ITU709, FULL)),
    "bt601.mp4": partial(plain, colour=(Colorspace.ITU601, TV)),
    "smpte240.mp4": partial(plain, colour=(Colorspace.SMPTE240M, TV)),
    "bt2020.mp4": partial(plain, colour=(Colorspace.BT2020, TV)),
    "bt2020_ten_bit.mp4": partial(plain, pix_fmt="yuv420p10le", colour=(Colorspace.BT2020, TV), **HEVC),
}
