"""Headers against what was written into the files, and against a browser; lies and bombs cost nothing to find."""

import resource
import shutil
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from coca_video.data.decode import UnreadableVideo, count_packets, read_header
from tests.conftest import skip_or_fail
from tests.data.numbered_videos import encode, patch, remux
from tests.data.odd_videos import BUILDERS
from tests.data.test_bitstream import exp_golomb

# file of BUILDERS -> codec, pixel format, height, width, frames told; all as it was encoded
TOLD: dict[str, tuple[str, str, int, int, int | None]] = {
    "b_frames.mp4": ("h264", "yuv420p", 48, 64, 60),
    "b_frames.mkv": ("h264", "yuv420p", 48, 64, None),
    "long_gop.mp4": ("h264", "yuv420p", 48, 64, 300),
    "narrow.mp4": ("h264", "yuv420p", 50, 34, 60),
    "odd_size_vp9.webm": ("vp9", "yuv420p", 49, 65, None),
    "ten_bit_hevc.mp4": ("hevc", "yuv420p10le", 48, 64, 60),
    "h264_444.mp4": ("h264", "yuv444p", 48, 64, 60),
    "turned_90.mp4": ("h264", "yuv420p", 128, 64, 60),  # as stored
    "av1.webm": ("av1", "yuv420p", 96, 128, None),
    "count_high.avi": ("mjpeg", "yuvj420p", 48, 64, 99),  # what it claims
    "one_frame.mp4": ("h264", "yuv420p", 48, 64, 1),
}
PLAYED = {
    *("b_frames.mp4", "fragmented.mp4", "turned_90.mp4", "full_range.mp4", "narrow.mp4", "one_frame.mp4"),
    *("vp8_alt_ref.webm", "vp9_alt_ref.webm", "odd_size_vp9.webm"),
}
NOT_PLAYED = {
    "b_frames.mov": "QuickTime's brand",
    "b_frames.mkv": "Matroska",
    "closed_gop_hevc.mp4": "HEVC",
    "ten_bit_h264.mp4": "10 bits",
    "h264_422.mp4": "4:2:2",
    "h264_444.mp4": "4:4:4",
    "interlaced_h264.mp4": "interlaced",
    "vp9.mp4": "VP9, but in MP4",
    "av1.webm": "AV1",
    "alpha_vp9.webm": "an alpha channel, which frames leave out",
    "mpeg4.mp4": "MPEG-4 part 2",
    "mjpeg.avi": "AVI",
    "streams.mp4": "two video streams, of which a browser shows the first and we the best",
    "start_delay.mp4": "two seconds of nothing first, which a browser counts",
}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    for name in {*TOLD, *PLAYED, *NOT_PLAYED}:
        BUILDERS[name](folder / name)
    return folder


@pytest.mark.parametrize("name", TOLD)
def test_what_was_written_is_told(odd: Path, name: str) -> None:
    header = read_header(odd / name)
    assert (header.codec, header.pixel_format, header.height, header.width, header.num_frames) == TOLD[name]
    with av.open(str(odd / name)) as container:
        assert header.container == container.format.name


def test_seconds(odd: Path) -> None:
    for name, seconds in (("b_frames.mp4", 2.0), ("b_frames.mkv", 2.0), ("long_gop.mp4", 10.0), ("b_frames.mov", 2.0)):
        assert read_header(odd / name).duration_seconds == pytest.approx(seconds, abs=1e-3)
    assert read_header(odd / "count_high.avi").duration_seconds == pytest.approx(99 / 30)
    raw = odd / "raw.h264"
    raw.write_bytes(annex_b(width=64, height=48))
    assert read_header(raw).duration_seconds is None and read_header(raw).num_frames is None


@pytest.mark.parametrize("name", sorted(PLAYED))
def test_what_browsers_play(odd: Path, name: str) -> None:
    assert read_header(odd / name).plays_in_browser


@pytest.mark.parametrize("name", NOT_PLAYED)
def test_what_not_all_browsers_play_as_it_is_shown_here(odd: Path, name: str) -> None:
    assert not read_header(odd / name).plays_in_browser, NOT_PLAYED[name]


@pytest.mark.parametrize(
    ("name", "copied", "plays"),
    [
        ("b_frames.mp4", "clip.m4v", True),
        ("b_frames.mp4", "CLIP.MP4", True),
        ("b_frames.mp4", "clip.mov", False),
        ("vp9_alt_ref.webm", "clip.mkv", False),
        ("vp9_alt_ref.webm", "clip.mp4", False),
    ],
)
def test_a_name_that_would_be_served_as_something_else(
    odd: Path, tmp_path: Path, name: str, copied: str, plays: bool
) -> None:
    shutil.copy(odd / name, tmp_path / copied)
    assert read_header(tmp_path / copied).plays_in_browser is plays
    assert read_header((odd / name).read_bytes()).plays_in_browser  # bytes have no name


@pytest.mark.parametrize(("stretch", "plays"), [((1, 1), True), ((640, 639), True), ((4, 3), False)])
def test_pixels_that_are_not_square_are_shown_stretched(tmp_path: Path, stretch: tuple[int, int], plays: bool) -> None:
    path = tmp_path / "clip.mp4"
    sar = f"sar={stretch[0]}/{stretch[1]}"
    encode(path, num_frames=3, options={"x264-params": sar})
    assert read_header(path).plays_in_browser is plays


@pytest.mark.parametrize(("codec", "plays"), [("aac", True), ("ac3", False), ("flac", False)])
def test_sound_that_not_all_browsers_know(tmp_path: Path, codec: str, plays: bool) -> None:
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        sound, video = container.add_stream(codec, rate=48000), container.add_stream("libx264", rate=30)
        video.height, video.width, video.pix_fmt = 48, 64, "yuv420p"
        layout, sample_format = "stereo", sound.codec_context.codec.audio_formats[0].name
        silence = av.AudioFrame(format=sample_format, layout=layout, samples=1024)
        silence.sample_rate = 48000
        for plane in silence.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(sound.encode(silence))
        container.mux(sound.encode(None))
        container.mux(video.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(video.encode(None))
    assert read_header(path).plays_in_browser is plays


@pytest.mark.slow
def test_chromium_plays_what_is_said_to_play(odd: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        skip_or_fail("chromium", reason="there is no chromium on the path")
    playwright = pytest.importorskip("playwright.sync_api")
    page_file = odd / "page.html"
    page_file.write_text("<video muted></video>")
    script = """url => new Promise(done => {
        const video = document.querySelector("video");
        video.onerror = () => done(video.error.message);
        video.onloadeddata = () => { video.onended = () => done([video.videoHeight, video.videoWidth]); video.play(); };
        video.defaultPlaybackRate = 8;
        video.src = url;
    })"""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(page_file.as_uri())
        for name in sorted(PLAYED):
            header = read_header(odd / name)
            upright = [header.height, header.width][:: -1 if name == "turned_90.mp4" else 1]
            assert page.evaluate(script, (odd / name).as_uri()) == upright, name
        browser.close()


@pytest.mark.parametrize("name", ["count_low.avi", "count_low.mp4", "count_low.mkv"])
def test_packets_are_counted_whatever_a_header_claims(tmp_path: Path, name: str) -> None:
    """The header says 17 frames, or as long as those; 60 are there, the last of them 59/30 s after the first."""
    path = tmp_path / name
    BUILDERS[name](path)
    assert read_header(path).duration_seconds == pytest.approx(17 / 30, abs=1e-3)
    assert count_packets(path, at_most=100).num_packets == 60
    assert count_packets(path, at_most=60).num_packets == 60
    assert count_packets(path, at_most=20).num_packets == 20
    if path.suffix != ".avi":  # whose packets have no presentation times
        assert count_packets(path, at_most=100).span_seconds == pytest.approx(59 / 30, abs=1e-3)


def write_liar(path: Path) -> None:
    """An AVI of 100,000 frames whose header counts 10."""
    encode(path, codec="mjpeg", pix_fmt="yuvj420p", b_frames=0, num_frames=10, height=16, width=16)
    remux(path, packets=lambda packets: [_at(packets[0], time) for time in range(100_000)])
    for name, skip in ((b"avih", 4 + 16), (b"strh", 4 + 32)):
        patch(path, after=name, skip=skip, value=10, order="little")


def test_a_header_of_ten_frames_over_a_hundred_thousand(tmp_path: Path) -> None:
    path = tmp_path / "liar.avi"
    write_liar(path)
    assert read_header(path).num_frames == 10
    assert count_packets(path, at_most=200_000).num_packets == 100_000


def _at(packet: av.Packet, time: int) -> av.Packet:
    copy = av.Packet(bytes(packet))
    copy.pts = copy.dts = time
    copy.time_base, copy.duration, copy.is_keyframe = packet.time_base, packet.duration, True
    return copy


def test_no_picture_is_needed(odd: Path, tmp_path: Path) -> None:
    """Noise in place of all coded pictures; what kind of pixels they hold FFmpeg alone finds out by a look at them."""
    path = tmp_path / "b_frames.mp4"
    data = bytearray((odd / "b_frames.mp4").read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov", start) - 4
    data[start:end] = np.random.default_rng(0).bytes(end - start)
    path.write_bytes(data)
    header = replace(read_header(path), pixel_format="yuv420p", plays_in_browser=True)
    assert header == read_header(odd / "b_frames.mp4")


def bits_to_unit(kind: int, bits: str) -> bytes:
    """An H.264 unit with its emulation prevention (7.4.1): a 3 behind two zeros where a byte below 4 follows."""
    bits += "1"
    bits += "0" * (-len(bits) % 8)
    data = bytearray([kind])
    for byte in bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)):
        if data[-2:] == b"\0\0" and byte < 4:
            data.append(3)
        data.append(byte)
    return b"\0\0\0\1" + bytes(data)


def annex_b(*, width: int, height: int, num_frames: int = 3) -> bytes:
    """H.264 by hand (7.3.2.1, 7.3.2.2, 7.3.3): baseline, level 6.2, one slice a picture, which breaks off."""
    ue = exp_golomb
    profile = f"{66:08b}{0:08b}{62:08b}{ue(0)}"
    size = f"{ue(width // 16 - 1)}{ue(height // 16 - 1)}"
    sequence = f"{profile}{ue(0)}{ue(2)}{ue(1)}0{size}1100"
    picture = f"{ue(0)}{ue(0)}00{ue(0)}{ue(0)}{ue(0)}000{ue(0)}{ue(0)}{ue(0)}000"
    piece = f"{ue(0)}{ue(7)}{ue(0)}0000{ue(0)}00{ue(0)}" + "1010" * 10
    return bits_to_unit(0x67, sequence) + bits_to_unit(0x68, picture) + num_frames * bits_to_unit(0x65, piece)


def picture_bomb(path: Path, *, width: int, height: int) -> None:
    """A file of under 100 bytes that promises so many pixels and holds none."""
    match path.suffix:
        case ".png":
            chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
            path.write_bytes(
                b"\x89PNG\r\n\x1a\n\0\0\0\x0d" + chunk + struct.pack(">I", zlib.crc32(chunk)) + _no_pixels()
            )
        case ".bmp":
            info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
            path.write_bytes(b"BM" + struct.pack("<IHHI", 54, 0, 0, 54) + info)
        case ".jpg":
            frame = struct.pack(">HHBHHB", 0xFFC0, 11, 8, height, width, 1) + b"\1\x11\0"
            path.write_bytes(b"\xff\xd8" + frame + b"\xff\xda\0\x08\1\1\0\0\x3f\0\xff\xd9")
        case ".h264":
            path.write_bytes(annex_b(width=width, height=height, num_frames=1))


def _no_pixels() -> bytes:
    chunk = b"IDAT" + zlib.compress(b"")
    return struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".jpg", ".h264"])
def test_bombs_are_measured_by_their_header(tmp_path: Path, suffix: str) -> None:
    """Decoded, each would be 192 million pixels; the process's own peak of memory shows that none was."""
    path = tmp_path / f"bomb{suffix}"
    picture_bomb(path, width=16_000, height=12_000)
    assert path.stat().st_size < 200
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    header = read_header(path)
    assert (header.width, header.height) == (16_000, 12_000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_the_stream_itself_tells_its_size_where_the_container_lies(tmp_path: Path) -> None:
    raw, path = tmp_path / "raw.h264", tmp_path / "liar.mp4"
    raw.write_bytes(annex_b(width=8000, height=4800))
    with av.open(str(raw)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for number, packet in enumerate(old.demux(video=0)):
            if packet.size > 0:
                packet.stream, packet.pts, packet.dts = stream, number, number
                new.mux(packet)
    patch(path, after=b"avc1\0\0\0\0\0\0", skip=18, value=(64 << 16) + 48, order="big")  # ISO 14496-12, 12.1.3
    assert (read_header(path).height, read_header(path).width) == (4800, 8000)


@pytest.mark.parametrize(("suffix", "codec"), [(".png", "png"), (".jpg", "jpeg"), (".webp", "webp"), (".bmp", "bmp")])
def test_pictures_are_one_frame(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tmp_path / f"picture{suffix}"
    Image.fromarray(np.zeros((30, 50, 3), np.uint8)).save(path)
    header = read_header(path)
    assert (header.codec, header.height, header.width, header.num_frames) == (codec, 30, 50, 1)
    assert header.duration_seconds is None and not header.plays_in_browser
    assert count_packets(path, at_most=5) == (1, 0.0)


@pytest.mark.parametrize(
    ("name", "data", "cause"),
    [
        ("empty.mp4", b"", "the file is empty"),
        ("words.mp4", b"not a video at all\n" * 20, "not a video file"),
        ("list.mp4", b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://localhost/a.ts\n", "not a video file"),
        ("words.png", b"not a picture", "not a JPEG, PNG, WebP or BMP picture"),
        ("program.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "not a JPEG, PNG, WebP"),
        ("cut.png", b"\x89PNG\r\n\x1a\n\0\0", "not a JPEG, PNG, WebP or BMP picture"),
    ],
)
def test_what_is_no_video(tmp_path: Path, name: str, data: bytes, cause: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(UnreadableVideo, match=cause):
        read_header(path)
    with pytest.raises(UnreadableVideo, match="there is no such file"):
        read_header(tmp_path / f"no-{name}")
