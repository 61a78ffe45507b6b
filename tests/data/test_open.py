"""Opening videos: which backend is taken, what may be opened, and what a file that cannot be read is told."""

import inspect
import io
import os
import random
import sys
import types
from dataclasses import replace
from pathlib import Path

import av
import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from coca_video.data.decode import BACKENDS, UnreadableVideo, open_video, proof, prove
from coca_video.data.decode import open as open_module
from coca_video.data.decode.index import index_packets
from coca_video.data.decode.proof import CLIP
from coca_video.data.decode.pyav import PyAVReader
from coca_video.data.decode.source import as_source
from tests.data.numbered_videos import encode, numbered_frame, numbers_shown, sequential, stack

ENVIRONMENT = "COCA_VIDEO_DECODER"
pytest.importorskip("decord", reason="decord has wheels for x86-64 only")


@pytest.fixture(autouse=True)
def no_choice_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENVIRONMENT, raising=False)


def test_the_known_clip_shows_the_numbers_that_backends_are_asked_for() -> None:
    frames = sequential(CLIP)
    shown = [proof._number_shown(frame.numpy()) for frame in frames.values()]
    assert shown == list(range(proof.NUM_FRAMES)) and max(proof.ORDER) == proof.NUM_FRAMES - 1
    assert prove("pyav") is None and prove("decord") is None


def test_a_backend_that_decodes_other_frames_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        num_frames = 24

        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> "Wrong":
            return self

        def __exit__(self, *_: object) -> None: ...
        def frames(self, indices: tuple[int, ...]) -> torch.Tensor:
            return stack(sequential(CLIP), [max(0, index - 1) for index in indices])

    monkeypatch.setattr(proof, "open_with", Wrong)
    assert prove.__wrapped__("decord") == (
        "decord decodes other frames of a known clip: expected (23, 0, 13, 7, 7, 18, 2, 9), "
        "got (22, 0, 12, 6, 6, 17, 1, 8)"
    )


def test_a_backend_that_does_not_load_is_not_proven(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "decord", None)
    assert "decord does not work here: " in prove.__wrapped__("decord")
    broken = types.ModuleType("torchcodec.decoders")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", broken)
    assert "torchcodec does not work here: " in prove.__wrapped__("torchcodec")


@pytest.fixture
def slow_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyAV is the fastest for no file, so that `auto` tries the others first."""
    monkeypatch.setattr(open_module, "fastest_by_pyav", lambda index: False)


def test_auto_takes_pyav_where_it_skips_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mp4")
    index = index_packets(as_source(path))
    assert open_module.fastest_by_pyav(index)
    for slow in ({"can_skip": False}, {"num_key_frames": 6}, {"uncountable": "its packets tell nothing"}):
        assert not open_module.fastest_by_pyav(replace(index, **slow))
    monkeypatch.setattr(open_module, "prove", lambda name: pytest.fail(f"{name} is not needed for this file"))
    assert open_video(path).backend == "pyav"


@pytest.mark.usefixtures("slow_pyav")
def test_auto_takes_the_first_that_is_proven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mp4")
    order = [name for name in BACKENDS if prove(name) is None]
    assert order[-2:] == ["decord", "pyav"]
    while order:
        monkeypatch.setattr(open_module, "prove", lambda name, order=tuple(order): None if name in order else "no")
        assert open_video(path).backend == order.pop(0)


def test_the_environment_chooses_and_a_flag_overrides_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, avi = encode(tmp_path / "v.mp4"), encode(tmp_path / "v.avi", codec="mpeg4", b_frames=0)
    for name in ("pyav", "decord"):
        monkeypatch.setenv(ENVIRONMENT, name)
        assert open_video(path).backend == name
    with pytest.raises(UnreadableVideo, match="decord would return wrong frames"):
        open_video(avi)
    assert open_video(avi, backend="pyav").backend == "pyav"
    monkeypatch.setenv(ENVIRONMENT, "opencv")
    with pytest.raises(ValueError, match="COCA_VIDEO_DECODER is 'opencv'; expected one of auto, torchcodec, decord"):
        open_video(path)
    monkeypatch.setenv(ENVIRONMENT, "")
    assert open_video(path).num_frames == 60


def test_wrong_arguments_are_sentences(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4")
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "link.mp4").symlink_to("gone.mp4")
    for name, cause in (
        ("pipe.mp4", "not a file that can be read"),
        ("link.mp4", "a link to gone.mp4, and there is no"),
    ):
        with pytest.raises(UnreadableVideo, match=cause):
            open_video(tmp_path / name)
    with pytest.raises(ValueError, match=r"The backend is 'opencv'; expected one of auto, torchcodec, decord, pyav"):
        inspect.unwrap(open_module.choose_backend)("opencv")  # unwrapped: users have no checks of types
    with pytest.raises(TypeError, match="expected a video's path, URL, bytes or open file, got NoneType"):
        inspect.unwrap(as_source)(None)
    with (tmp_path / "text.txt").open("w+") as file, pytest.raises(TypeError, match="opened for bytes"):
        inspect.unwrap(as_source)(file)
    reader = open_video(path)
    reader.close()
    reader.close()
    with pytest.raises(ValueError, match="the reader is closed; open the video again"):
        reader.frames([0])


def test_a_backend_that_does_not_work_here_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_module, "prove", lambda name: f"{name} does not work here: no libraries")
    with pytest.raises(ValueError, match=r'decord does not work here: no libraries; .* the decoder "auto"'):
        open_video(encode(tmp_path / "v.mp4"), backend="decord")


@pytest.mark.usefixtures("slow_pyav")
def test_pyav_goes_on_where_another_backend_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = encode(tmp_path / "v.mp4")
    reader = open_video(path)
    first = reader.backend

    def fail(indices: list[int]) -> torch.Tensor:
        raise UnreadableVideo("it stops")

    monkeypatch.setattr(reader._reader, "_frames", fail)
    assert first != "pyav" and torch.equal(reader.frames([59, 3]), stack(sequential(path), [59, 3]))
    assert reader.backend == "pyav" and numbers_shown(reader.frames([7])) == [7]
    monkeypatch.setattr(reader._reader, "_frames", fail)
    with pytest.raises(UnreadableVideo, match="it stops"):
        reader.frames([1])


@pytest.mark.parametrize("kept_frames", [0, 7, 1000])
def test_frames_not_kept_are_decoded_again(tmp_path: Path, kept_frames: int) -> None:
    path = encode(tmp_path / "b.ts")
    with av.open(str(path)) as container:
        frame_bytes = sum(plane.buffer_size for plane in next(container.decode(video=0)).planes)
    source = as_source(path)
    reader = PyAVReader(source, index=index_packets(source), kept_bytes=kept_frames * frame_bytes)
    assert len(reader._kept) == min(kept_frames, 60)
    for order in ([3, 1, 3], [50, 2, 8], list(range(60))):
        assert numbers_shown(reader.frames(order)) == order


def test_a_seek_that_lands_elsewhere_is_walked_from_the_start(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4")
    source = as_source(path)
    index = index_packets(source)
    assert [index.pts.index(time) for time in index.clean_pts] == [0, 12, 24, 36, 48]
    untrue = replace(index, clean_pts=(index.pts[0], index.pts[30]))  # frame 30 is no key frame
    reader = PyAVReader(source, index=untrue)
    assert numbers_shown(reader.frames([59, 2, 30, 31])) == [59, 2, 30, 31]


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("index", [-1, 60])
def test_a_frame_that_is_not_there(tmp_path: Path, backend: str, index: int) -> None:
    if backend != "auto" and (cause := prove(backend)):
        pytest.skip(cause)
    reader = open_video(encode(tmp_path / "b.mp4"), backend=backend)
    with pytest.raises(ValueError, match=f"frame {index} was asked for, but the video has frames 0 to 59"):
        reader.frames([0, index])
    assert reader.frames([]).shape == (0, 3, 48, 64)


def test_urls(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4")
    with fsspec.open("memory://clips/v.mp4", "wb") as file:
        file.write(path.read_bytes())
    for source in ("memory://clips/v.mp4", f"file://{path}"):
        reader = open_video(source)
        assert reader.name == source
        assert torch.equal(reader.frames([40, 3]), stack(sequential(path), [40, 3]))
    with pytest.raises(UnreadableVideo, match=r"^memory://clips/none\.mp4: there is no such file"):
        open_video("memory://clips/none.mp4")
    with pytest.raises(ValueError, match=r"^nowhere://v\.mp4: fsspec knows no such kind of path"):
        open_video("nowhere://v.mp4")


def test_a_string_is_a_path_and_an_open_file_is_read_from_its_start(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.mp4")
    file = io.BytesIO(path.read_bytes())
    file.seek(100)
    for source in (str(path), file, path.read_bytes()):
        assert numbers_shown(open_video(source).frames([40, 3])) == [40, 3]
    for empty in (b"", io.BytesIO(b"")):
        with pytest.raises(UnreadableVideo, match="is empty"):
            open_video(empty)


def write_images(folder: Path, *, names: list[str], size: tuple[int, int] = (64, 48)) -> Path:
    folder.mkdir()
    for number, name in enumerate(names):
        Image.fromarray(numbered_frame(number, width=size[0], height=size[1])).save(folder / name)
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    names = [f"img_{number}.png" for number in range(12)]  # by name alone, 10 stands before 2
    folder = write_images(tmp_path / "clip", names=names)
    (folder / "notes.txt").write_text("no image")
    (folder / "._img_0.png").write_text("what macOS leaves")
    reader = open_video(folder, images_per_second=30000 / 1001)
    assert (reader.backend, reader.num_frames, reader.height, reader.width) == ("images", 12, 48, 64)
    assert numbers_shown(reader.frames([11, 2, 10, 2])) == [11, 2, 10, 2]
    expected = torch.from_numpy(np.stack([numbered_frame(3), numbered_frame(9)])).permute(0, 3, 1, 2)
    assert torch.equal(reader.frames([3, 9]), expected)
    np.testing.assert_allclose(reader.times_seconds, np.arange(12) * 1001 / 30000, rtol=0, atol=1e-12)
    assert open_video(str(folder)).duration_seconds == pytest.approx(12 / 25, abs=1e-12)


def test_folders_of_images_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UnreadableVideo, match="holds no images"):
        open_video(tmp_path / "empty")
    folder = write_images(tmp_path / "sizes", names=["0.png", "1.png"])
    Image.fromarray(numbered_frame(1, width=32, height=48)).save(folder / "1.png")
    with pytest.raises(UnreadableVideo, match=r"1\.png is 32x48 where the first image is 64x48"):
        open_video(folder).frames([0, 1])
    whole = (folder / "0.png").read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:16] + b"\0\0\0\0" + whole[20:], whole[:20]):
        (folder / "1.png").write_bytes(damaged)
        with pytest.raises(UnreadableVideo, match=r"1\.png cannot be decoded"):
            open_video(folder).frames([1])
    with pytest.raises(ValueError, match="images_per_second above 0, got 0"):
        open_video(folder, images_per_second=0.0)


def test_text_in_an_avi_header_is_no_list_of_packets(tmp_path: Path) -> None:
    path = encode(tmp_path / "v.avi", codec="mpeg4", b_frames=0)
    titled = tmp_path / "titled.avi"
    with av.open(str(path)) as old, av.open(str(titled), "w") as new:
        new.metadata["title"] = "my movie clip"
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size > 0:
                packet.stream = stream
                new.mux(packet)
    assert b"my movie clip" in titled.read_bytes()[: 2**16]
    assert numbers_shown(open_video(titled).frames([59, 0])) == [59, 0]


def test_damage_inside_a_container_is_a_sentence(tmp_path: Path) -> None:
    """Bytes drawn over files in 300 ways, each asked for frames in 3 places: frames or a sentence, nothing else."""
    rng, num_refused = random.Random(0), 0
    for name in ("v.ts", "v.webm", "v.mp4"):
        codec = {"codec": "libvpx-vp9", "b_frames": None} if name == "v.webm" else {}
        whole = encode(tmp_path / name, num_frames=30, **codec).read_bytes()
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(rng.randrange(1, 20)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            try:
                with open_video(bytes(damaged), backend="pyav") as reader:
                    reader.frames([0, reader.num_frames // 2, reader.num_frames - 1])
            except UnreadableVideo:
                num_refused += 1
    assert 100 < num_refused < 300


def _cut(path: Path, *, share: float) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def test_bad_files_name_their_cause(tmp_path: Path) -> None:
    (tmp_path / "zero.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    (tmp_path / "art.txt").write_text("FFmpeg would draw this text as a video\n" * 100)
    encode(tmp_path / "good.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n"
    (tmp_path / "list.m3u8").write_text(playlist)
    with av.open(str(tmp_path / "audio.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 16000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    _cut(encode(tmp_path / "index_lost.mp4"), share=0.6)
    _cut(encode(tmp_path / "index_first.mp4", faststart=True), share=0.7)
    _cut(encode(tmp_path / "cut.avi", codec="mpeg4", b_frames=0), share=0.8)
    _cut(encode(tmp_path / "cut.mkv"), share=0.7)
    _cut(encode(tmp_path / "cut.flv"), share=0.7)
    damaged = bytearray(encode(tmp_path / "damaged.mp4", faststart=True).read_bytes())
    damaged[-900:-300] = random.Random(1).randbytes(600)
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    causes = {
        "missing.mp4": "there is no such file",
        "zero.mp4": "empty",
        "text.mp4": "not a video file",
        "art.txt": "not a video file",
        "list.m3u8": "not a video file",
        "audio.mp4": "no video stream",
        "index_lost.mp4": "cut off",
        "index_first.mp4": "the file is cut off: it should have",
        "cut.avi": "the file is cut off: it should have",
        "cut.mkv": "the file is cut off: it should have",
        "cut.flv": "not whole",
        "damaged.mp4": "decoding stops after",
    }
    for name, cause in causes.items():
        with pytest.raises(UnreadableVideo, match=cause) as caught:
            open_video(tmp_path / name).frames(range(60))
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        for backend in (backend for backend in BACKENDS if prove(backend) is None):
            with pytest.raises(UnreadableVideo):
                open_video(tmp_path / name, backend=backend).frames(range(60))


@pytest.mark.parametrize("name", ["cut.mp4", "cut.avi", "cut.mkv"])
def test_a_file_cut_between_two_packets(tmp_path: Path, name: str) -> None:
    # FFmpeg decodes such a file without a word: 30 frames of 60.
    path = encode(tmp_path / name, codec="mpeg4" if name.endswith("avi") else "libx264", b_frames=0, faststart=True)
    assert open_video(path).num_frames == 60
    with av.open(str(path)) as container:
        packets = [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size > 0]
    position = packets[30][0] - (8 if name.endswith("avi") else 0)  # an AVI's position is behind a header of 8 bytes
    path.write_bytes(path.read_bytes()[:position])
    assert len(sequential(path)) == 30
    with pytest.raises(UnreadableVideo, match=f"cut off: it should have at least .* bytes, it has {position}"):
        open_video(path)


def test_decord_gives_frames_whatever_its_bridge_says() -> None:
    """Importing pytorchvideo sets it to torch, for the whole thread."""
    import decord

    expected = stack(sequential(CLIP), [3, 20])
    try:
        decord.bridge.set_bridge("torch")
        with open_video(CLIP, backend="decord") as video:
            assert torch.equal(video.frames([3, 20]), expected)
    finally:
        decord.bridge.set_bridge("native")
