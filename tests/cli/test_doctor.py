"""`coca-video doctor`, and the facts of files with known properties."""

import json
import os
import shutil
from importlib.metadata import version
from pathlib import Path

import fsspec
import pytest
import torch
from PIL import Image

from coca_video.cli.doctor import run
from coca_video.data.decode import UnreadableVideo
from coca_video.data.decode.describe import describe
from tests.data.numbered_videos import encode, numbered_frame, sequential
from tests.data.odd_videos import BUILDERS

ENVIRONMENT = "COCA_VIDEO_DECODER"
ODDITIES = {
    "b_frames.mp4": (),
    "closed_gop_hevc.mp4": (),
    "long_gop.mp4": (),
    "variable_rate.mp4": (
        "its frame rate varies: frames are 8.333 to 58.33 ms apart",
        "its first frame is shown at 0.05 s and not at 0",
    ),
    "edit_list.mp4": (
        "an edit list hides 5 of its 60 packets",
        "its header counts 60 frames, and 55 decode",
    ),
    "open_gop_hevc.mp4": ("4 of its groups of pictures are open: pictures of theirs come before the key frame",),
    "interlaced_h264.mp4": ("60 of its frames are interlaced",),
    "turned_90.mp4": ("it is stored turned, and shown turned by 90 degrees",),
    "turned_270.mov": ("it is stored turned, and shown turned by -90 degrees",),
    "streams.mp4": ("it has 2 video streams, of which number 1 is read",),
    "start_delay.mp4": ("its first frame is shown at 2 s and not at 0",),
    "count_high.avi": (
        "its header says that it lasts 3.300 s, and its frames last 2.000 s",
        "its header counts 99 frames, and 60 decode",
    ),
    "alpha_png.mov": ("it has an alpha channel, which frames leave out",),
    "alpha_vp9.webm": ("it has an alpha channel, which frames leave out",),
    "ten_bit_h264.mp4": ("its pixels have 10 bits, and frames 8",),
    "mpeg4_packed.avi": (
        "its B-frames are packed: a packet of two pictures, then one of none",
        "its first frame is shown at 0.0333333 s and not at 0",
    ),
    "size_change_h264.mp4": ("its frames change their size midway",),
    "cut_before_key.mp4": (
        "it does not begin with a key frame",
        "its first frame is shown at 0.8 s and not at 0",
        "its header says that it lasts 1.400 s, and its frames last 1.200 s",
        "its header counts 42 frames, and 36 decode",
    ),
}


@pytest.mark.parametrize("name", ODDITIES)
def test_what_is_odd_about_a_file_and_nothing_else(tmp_path: Path, name: str) -> None:
    BUILDERS[name](tmp_path / name)
    facts = describe(tmp_path / name)
    frames = sequential(tmp_path / name)
    assert facts.oddities == ODDITIES[name]
    assert facts.num_frames == len(frames)
    assert (3, facts.height, facts.width) == frames[0].shape
    assert facts.num_bytes == (tmp_path / name).stat().st_size


def test_the_facts_of_a_plain_file(tmp_path: Path) -> None:
    path = encode(tmp_path / "plain.mkv", num_frames=45, gop_size=20, b_frames=0, pix_fmt="yuv422p10le")
    for source in (path, str(path), path.read_bytes()):
        facts = describe(source)
        assert (facts.codec, facts.profile, facts.pixel_format) == ("h264", "High 4:2:2", "yuv422p10le")
        assert (facts.container, facts.bit_depth, facts.pixel_aspect) == ("matroska,webm", 10, "1:1")
        assert (facts.num_video_streams, facts.audio_codecs, facts.rotation_degrees) == (1, (), 0)
        assert (facts.num_frames, facts.header_num_frames) == (45, None)  # Matroska counts no frames
        assert facts.duration_seconds == pytest.approx(1.5, abs=2e-3)
        assert facts.frames_per_second == pytest.approx(30, abs=0.05)
        assert facts.header_frames_per_second == 30
        assert (facts.key_frames[0], facts.key_frames[-1] <= 40, facts.key_frame_spacing <= 20) == (0, True, True)


def test_key_frames(tmp_path: Path) -> None:
    options = {"x264-params": "scenecut=0"}
    facts = describe(encode(tmp_path / "a.mp4", num_frames=45, gop_size=20, options=options))
    assert (facts.key_frames, facts.key_frame_spacing) == ((0, 20, 40), 20)
    facts = describe(encode(tmp_path / "b.mp4", num_frames=45, gop_size=30, options=options))
    assert (facts.key_frames, facts.key_frame_spacing) == ((0, 30), 30)


def test_audio_and_several_streams(tmp_path: Path) -> None:
    BUILDERS["streams_audio_first.mkv"](tmp_path / "streams.mkv")
    facts = describe(tmp_path / "streams.mkv")
    assert (facts.num_video_streams, facts.audio_codecs, facts.num_frames) == (2, ("aac",), 30)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = encode(tmp_path / "wide.mp4", num_frames=5, options={"x264-params": "sar=4/3"})
    facts = describe(path)
    assert facts.pixel_aspect == "4:3"
    assert facts.oddities == ("its pixels are not square (4:3); frames come as stored",)
    assert (facts.height, facts.width) == numbered_frame(0).shape[:2]


def test_real_clips(data_folder: Path) -> None:
    clips = data_folder / "clips"
    turned = describe(clips / "decord_test_video_90.mov")
    assert (turned.rotation_degrees, turned.height, turned.width, turned.num_frames) == (-90, 568, 320, 3)
    upside_down = describe(clips / "decord_test_video_180.mov")
    assert (upside_down.rotation_degrees, upside_down.height, upside_down.width) == (-180, 320, 568)
    hmdb51 = describe(clips / "torchvision_SchoolRulesHowTheyHelpUs_wave_f_nm_np1_ba_med_0.avi")
    assert (hmdb51.num_frames, hmdb51.header_num_frames) == (74, 75)
    assert any("packed" in oddity for oddity in hmdb51.oddities)
    assert describe(clips / "torchcodec_nasa_13013.mp4").num_video_streams == 2
    assert describe(clips / "torchcodec_test_non_zero_start.mp4").first_time_seconds == pytest.approx(8.333, abs=1e-3)
    damaged = describe(clips / "decord_test_corrupted.mp4")
    assert damaged.num_frames < damaged.header_num_frames == 50
    assert damaged.oddities[-1].startswith(f"decoding stops after {damaged.num_frames} frames")


def test_what_is_no_video_is_unreadable(tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    with pytest.raises(UnreadableVideo, match=r"text\.mp4: not a video file"):
        describe(tmp_path / "text.mp4")


def test_the_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    assert run(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for name in ("torch", "av", "timm", "numpy"):
        assert report["versions"][name] == version(name)
    assert report["decoders"]["proven"]["pyav"] is None
    assert report["decoders"]["environment"] == {ENVIRONMENT: None}
    proven = [name for name in ("torchcodec", "decord", "pyav") if report["decoders"]["proven"][name] is None]
    assert report["decoders"]["auto_order"] == proven
    assert report["ffmpeg"]["program"] == shutil.which("ffmpeg")
    assert len(report["machine"]["gpus"]) == torch.cuda.device_count()
    assert report["machine"]["num_cpus"] == os.cpu_count()
    assert "file" not in report


def test_the_environment_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT, "pyav")
    assert run([]) == 0
    assert f"{ENVIRONMENT} is pyav; auto tries pyav\n" in capsys.readouterr().out
    monkeypatch.setenv(ENVIRONMENT, "ffmpeg")
    assert run([]) == 1  # nothing that opens a video by auto works then
    printed = capsys.readouterr()
    assert f"{ENVIRONMENT} is ffmpeg; auto tries nothing\n" in printed.out
    assert f"{ENVIRONMENT} is 'ffmpeg'; expected one of" in printed.err


def test_no_proven_decoder_is_status_1(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)
    monkeypatch.setattr("coca_video.data.decode.prove", lambda backend: f"{backend} has gone")
    assert run([]) == 1
    printed = capsys.readouterr().out
    assert "  torchcodec    torchcodec has gone\n" in printed
    assert "auto tries nothing" in printed


def test_a_file_and_who_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "packed.avi"
    BUILDERS["mpeg4_packed.avi"](path)
    assert run([str(path), "--json"]) == 0
    file = json.loads(capsys.readouterr().out)["file"]
    assert file["facts"]["num_frames"] == 60
    assert file["facts"]["oddities"] == list(ODDITIES["mpeg4_packed.avi"])
    assert file["backends"]["auto"] == {"read_by": "pyav", "error": None}
    assert file["backends"]["pyav"] == {"read_by": "pyav", "error": None}
    assert file["backends"]["decord"]["read_by"] is None
    assert "packed.avi" in file["backends"]["decord"]["error"]
    assert run([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "  frames        60 (its header: 60)\n" in printed
    assert "  auto          yes, by pyav\n" in printed
    for oddity in ODDITIES["mpeg4_packed.avi"]:
        assert f"  {oddity}\n" in printed


def test_a_folder_of_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(2):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{number}.png")
    assert run([str(tmp_path), "--json"]) == 0
    file = json.loads(capsys.readouterr().out)["file"]
    assert (file["facts"], file["backends"]) == (None, {"auto": {"read_by": "images", "error": None}})
    assert file["error"] == f"{tmp_path}: a folder, whose images are read as the frames of one video"


def test_a_url(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = "memory://doctor/clip.mp4"
    with fsspec.open(url, "wb") as file:
        file.write(encode(tmp_path / "clip.mp4", num_frames=12).read_bytes())
    assert run([url, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["file"]
    assert (found["facts"]["name"], found["facts"]["num_frames"]) == (url, 12)
    assert found["backends"]["pyav"] == {"read_by": "pyav", "error": None}
    assert run(["nothing://clip.mp4", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)["file"]
    assert found["facts"] is None and found["error"].startswith("nothing://clip.mp4: fsspec knows no such kind of path")


@pytest.mark.parametrize("name", ["text.mp4", "missing.mp4"])
def test_a_file_that_nobody_reads_is_status_1(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (tmp_path / "text.mp4").write_text("no video")
    assert run([str(tmp_path / name), "--json"]) == 1
    file = json.loads(capsys.readouterr().out)["file"]
    assert file["facts"] is None
    assert all(answer["read_by"] is None and name in answer["error"] for answer in file["backends"].values())
