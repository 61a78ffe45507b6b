"""The drawn world: same seed same bytes, true captions, actions seen in decoded pixels, not in single frames."""

import colorsys
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from coca_video.data.decode import open_video
from coca_video.data.image_text import PairDataset
from coca_video.data.loader import SampleKey
from coca_video.data.manifest import read_manifest
from coca_video.synthetic import (
    ACTIONS,
    COLOURS,
    SHAPES,
    DrawnClip,
    DrawnShape,
    Picture,
    clip_parameters,
    coverage,
    draw_clip_set,
    draw_clips,
    draw_pictures,
    picture_parameters,
    render_clip,
    render_picture,
)

NUM_FRAMES = 16
SIZE_WORDS = {"small": 0.1, "tiny": 0.1, "medium": 0.15, "medium-sized": 0.15, "large": 0.2, "big": 0.2}
TILT = re.compile(r"(?:tilted|leaning) (a little|slightly|far|strongly) to the (left|right)|upright|standing straight")


def pictures(count: int, *, seed: int = 0) -> list[Picture]:
    return [picture_parameters(index, seed=seed) for index in range(count)]


def outline(shape: str) -> np.ndarray:
    """Corners [n, 2] of the shape in its own frame, y down: written out again, apart from the code."""
    if shape in ("triangle", "star"):
        radii = [1.0] * 3 if shape == "triangle" else [1.0, 0.381966] * 5
        angles = 2 * np.pi * np.arange(len(radii)) / len(radii)
        return np.array([(r * np.sin(a), -r * np.cos(a)) for r, a in zip(radii, angles, strict=True)])
    c = 0.28
    corners = {
        "square": [(-0.72, -0.72), (0.72, -0.72), (0.72, 0.72), (-0.72, 0.72)],
        "bar": [(-0.95, -0.3), (0.95, -0.3), (0.95, 0.3), (-0.95, 0.3)],
        "cross": [(-c, -0.95), (c, -0.95), (c, -c), (0.95, -c), (0.95, c), (c, c), (c, 0.95), (-c, 0.95), (-c, c),
                  (-0.95, c), (-0.95, -c), (-c, -c)],
        "L": [(-0.39, -0.91), (0.13, -0.91), (0.13, 0.13), (0.65, 0.13), (0.65, 0.65), (-0.39, 0.65)],
        "T": [(-0.72, -0.551), (0.72, -0.551), (0.72, -0.071), (0.24, -0.071), (0.24, 0.949), (-0.24, 0.949),
              (-0.24, -0.071), (-0.72, -0.071)],
    }  # fmt: skip
    return np.array(corners[shape])


def pillow_coverage(shape: str, *, x: float, y: float, radius: float, degrees: float, size: int) -> np.ndarray:
    """Pillow's polygon at 16 times the size, averaged."""
    a = np.radians(degrees)
    clockwise = np.array([[np.cos(a), -np.sin(a)], [np.sin(a), np.cos(a)]])
    corners = (np.array([x, y]) + radius * outline(shape) @ clockwise.T) * size * 16 - 0.5
    canvas = Image.new("L", (size * 16, size * 16))
    ImageDraw.Draw(canvas).polygon([tuple(corner) for corner in corners], fill=255)
    return np.asarray(canvas).reshape(size, 16, size, 16).mean(axis=(1, 3)) / 255


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_equal_pillows_polygons(shape: str) -> None:
    for degrees in (0.0, 20.0, 133.0):
        numbers = {"x": 0.45, "y": 0.52, "radius": 0.3}
        arrays = {name: np.array([value]) for name, value in numbers.items()}
        drawn = coverage(shape, **arrays, angle_degrees=np.array([degrees]), size=48)[0]
        expected = pillow_coverage(shape, **numbers, degrees=degrees, size=48)
        assert np.abs(drawn - expected).max() < 0.35  # at corners a clipped distance is not an area
        assert np.abs(drawn - expected).sum() < 0.04 * expected.sum()
        rows, columns = np.mgrid[:48, :48] + 0.5
        assert abs((drawn * columns).sum() / drawn.sum() / 48 - 0.45) < 0.003  # turns about its centre of mass
        assert abs((drawn * rows).sum() / drawn.sum() / 48 - 0.52) < 0.003


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        draw_pictures(tmp_path / name, num_pictures=25, seed=seed, pictures_per_shard=10)
        draw_clip_set(tmp_path / name, num_train=5, num_test=5, seed=seed)
    files = {n: {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.*")} for n in "abc"}
    assert files["a"] == files["b"]
    assert files["a"].keys() == files["c"].keys()
    differing = {path.suffix for path in files["a"] if files["a"][path] != files["c"][path]}
    assert differing == {".tar", ".mp4", ".csv"}
    assert len(files["a"]) == 3 + 10 + 2


def test_a_picture_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    (few,) = draw_pictures(tmp_path / "few", num_pictures=3, seed=0)
    many = draw_pictures(tmp_path / "many", num_pictures=7, seed=0, pictures_per_shard=2)
    assert [path.name for path in many] == ["00000.tar", "00001.tar", "00002.tar", "00003.tar"]
    with tarfile.open(few) as one, tarfile.open(many[1]) as two:
        assert one.extractfile("000000002.jpg").read() == two.extractfile("000000002.jpg").read()
        details = json.loads(two.extractfile("000000002.json").read())
        assert Image.open(io.BytesIO(two.extractfile("000000002.jpg").read())).size == (48, 48)
    assert tuple(details["captions"]) == picture_parameters(2, seed=0).captions


def test_pictures_come_back_as_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COCA_VIDEO_CACHE", str(tmp_path / "cache"))
    shards = draw_pictures(tmp_path, num_pictures=6, seed=1, pictures_per_shard=4)
    dataset = PairDataset(shards, image_size=48, seed=0, augment=False)
    assert len(dataset) == 6
    for index in range(6):
        pair = dataset[SampleKey(0, index)]
        drawn = render_picture(picture_parameters(index, seed=1), size=48)
        assert pair.captions == picture_parameters(index, seed=1).captions
        assert (pair.image.float() - drawn.float()).abs().mean() < 3


def test_the_shares_of_empty_and_of_two_shapes() -> None:
    counts = np.bincount([len(picture.shapes) for picture in pictures(3000)], minlength=3) / 3000
    assert np.abs(counts - [0.08, 0.72, 0.2]).max() < 0.025  # 3 standard errors
    shapes = [shape for picture in pictures(3000) for shape in picture.shapes]
    for name, kinds in (("shape", 7), ("colour", 8), ("place", 9), ("size", 3), ("tilt", 5)):
        found = np.unique([getattr(shape, name) for shape in shapes], return_counts=True)[1]
        assert len(found) == kinds
        assert found.min() > 0.8 * len(shapes) / kinds


def parts_of(caption: str) -> tuple[str | None, list[str]]:
    """The background that a caption names, and what it says of each shape."""
    background = re.search(
        r"(?:on |but |only )?an? (dark|grey|light) background|an empty (dark|grey|light) picture", caption
    )
    rest = caption.replace(background[0], "") if background else caption
    two = re.sub(r"^[, ]*(there are two shapes: )?", "", rest)
    says = two.split(" and ") if len(re.findall("|".join(SHAPES), rest)) == 2 else [two]
    return next(filter(None, background.groups())) if background else None, says


def check_says_true(text: str, shape: DrawnShape) -> None:
    """Each word of `text` against the numbers the shape was drawn with, not against the names it was chosen by."""
    assert re.findall(rf"\b(?:{'|'.join(SHAPES)})\b", text) == [shape.shape]
    (colour,) = re.findall(rf"\b(?:{'|'.join(COLOURS)})\b", text)
    distances = {name: np.abs(np.subtract(shape.rgb, rgb)).sum() for name, rgb in COLOURS.items()}
    assert min(distances, key=distances.get) == colour
    sizes = re.findall(rf"\b(?:{'|'.join(sorted(SIZE_WORDS, key=len, reverse=True))})(?!\S)", text.replace(",", " "))
    assert all(abs(shape.radius - SIZE_WORDS[word]) < 0.01 for word in sizes)
    assert len(sizes) <= 1
    tilt = TILT.search(text)
    if tilt:
        strength, side = tilt.groups()
        low, high = {None: (-2, 2), "a little": (9, 14), "slightly": (9, 14)}.get(strength, (21, 28))
        assert low <= (-shape.angle_degrees if side == "left" else shape.angle_degrees) <= high
    where = re.findall(r"top|upper|bottom|lower|left|right|middle|centre", TILT.sub("", text))
    if where:
        x = 0.25 if "left" in where else 0.75 if "right" in where else 0.5
        y = 0.25 if {"top", "upper"} & set(where) else 0.75 if {"bottom", "lower"} & set(where) else 0.5
        assert abs(shape.x - x) < 0.05
        assert abs(shape.y - y) < 0.05
    assert sizes or tilt or where


def test_captions_are_true() -> None:
    for picture in pictures(2000):
        assert len(set(picture.captions)) == 3
        for caption in picture.captions:
            background, says = parts_of(caption)
            if background:
                low, high = {"dark": (0, 60), "grey": (90, 150), "light": (200, 255)}[background]
                assert low < picture.grey_level < high
            if not picture.shapes:
                assert background
                assert not re.search("|".join([*SHAPES, *COLOURS]), caption)
                continue
            assert len(says) == len(picture.shapes), caption
            order = sorted(picture.shapes, key=lambda s: says[0].find(s.shape) < 0 or says[0].find(s.colour) < 0)
            if len(order) == 2 and order[0].shape == order[1].shape and order[0].colour == order[1].colour:
                continue  # which of two alike is meant first is told by the rest only
            for text, shape in zip(says, order, strict=True):
                check_says_true(text, shape)
            assert not re.search(r"\ban? an?\b|\ba orange|\ban [^oe]|[{}]|  ", caption), caption


def test_the_drawn_pixels_have_the_colours_and_places_that_captions_name() -> None:
    """Through JPEG at 48 px: the colour at the centre of mass is nearest to its name's; beside shapes is background."""
    right = []
    for index, picture in enumerate(pictures(400)):
        pixels = render_picture(picture, size=48).permute(1, 2, 0).numpy().astype(float)
        assert np.abs(pixels[0, 0] - picture.grey_level).max() <= 1
        if not picture.shapes:
            assert np.ptp(pixels) == 0
        buffer = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(buffer, "JPEG", quality=95)
        decoded = np.asarray(Image.open(buffer)).astype(float)
        for shape in picture.shapes:
            at = pixels[int(shape.y * 48), int(shape.x * 48)], decoded[int(shape.y * 48), int(shape.x * 48)]
            near = [min(COLOURS, key=lambda name: np.abs(np.subtract(p, COLOURS[name])).sum()) for p in at]
            assert near[0] == shape.colour, index
            right.append(near[1] == shape.colour)
    assert np.mean(right) > 0.98  # JPEG halves the resolution of colour, and the smallest bars are 3 px wide


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    draw_clip_set(folder, num_train=60, num_test=5, seed=0)
    return folder


def decoded_clips(folder: Path) -> list[tuple[DrawnClip, np.ndarray]]:
    """Parameters and decoded pixels [frames, height, width, 3] of the training clips."""
    found = []
    for index, row in enumerate(read_manifest(folder / "manifest.csv").select(split="train").rows):
        with open_video(row.path) as reader:
            frames = reader.frames(range(reader.num_frames)).permute(0, 2, 3, 1).numpy().astype(float)
        found.append((clip_parameters(index, seed=0, split="train", num_frames=NUM_FRAMES), frames))
    return found


def test_clips_are_video_files_named_by_a_manifest(clip_folder: Path) -> None:
    manifest = read_manifest(clip_folder / "manifest.csv")
    assert (clip_folder / "classes.txt").read_text().split() == list(ACTIONS)
    assert [row.split for row in manifest.rows] == ["train"] * 60 + ["test"] * 5
    assert [row.label for row in manifest.rows] == list(ACTIONS) * 13
    for index, row in enumerate(manifest.rows[:60]):
        assert row.path == clip_folder / "train" / ACTIONS[index % 5] / f"train_{index:05d}.mp4"
        clip = clip_parameters(index, seed=0, split="train", num_frames=NUM_FRAMES)
        assert row.extra == {"shape": clip.shape, "colour": clip.colours[8]}
        with open_video(row.path) as reader:
            assert (reader.num_frames, reader.height, reader.width) == (16, 48, 48)
            assert reader.frames_per_second == 8.0


def test_splits_and_sizes_differ_as_asked(tmp_path: Path) -> None:
    assert draw_clips(tmp_path, num_clips=0, seed=0, split="x") == []
    train, test = (clip_parameters(0, seed=0, split=split, num_frames=16) for split in ("train", "test"))
    assert not torch.equal(render_clip(train, size=48), render_clip(test, size=48))
    (row,) = draw_clips(tmp_path, num_clips=1, seed=0, split="x", size=64, num_frames=24, frames_per_second=12.0)
    with open_video(row.path) as reader:
        assert (reader.num_frames, reader.height, reader.frames_per_second) == (24, 64, 12.0)
    with pytest.raises(ValueError, match="at least 8 frames to be seen, got 7"):
        clip_parameters(0, seed=0, split="x", num_frames=7)
    with pytest.raises(ValueError, match="at least one picture"):
        draw_pictures(tmp_path, num_pictures=0, seed=0)


class Measured:
    """What decoded pixels show in each frame: area, centre, orientation and colour of what is not background."""

    def __init__(self, frames: np.ndarray, *, shape: str) -> None:
        border = np.concatenate([frames[:, 0], frames[:, -1], frames[:, :, 0], frames[:, :, -1]], axis=1)
        difference = np.abs(frames - np.median(border, axis=1)[:, None, None]).max(axis=-1)
        difference[difference < 15] = 0
        self.shown = difference.max(axis=(1, 2)) > 40
        height = np.percentile(difference.reshape(len(frames), -1), 99.3, axis=1)
        weights = np.clip(difference[self.shown] / height[self.shown, None, None], 0, 1)
        rows, columns = np.mgrid[: frames.shape[1], : frames.shape[2]]
        self.area = weights.sum(axis=(1, 2))
        self.x, self.y = ((weights * at).sum(axis=(1, 2)) / self.area for at in (columns, rows))
        z = (columns - self.x[:, None, None]) + 1j * (rows - self.y[:, None, None])
        fold = {"bar": 2, "L": 2, "triangle": 3, "T": 3, "square": 4, "cross": 4, "star": 5}[shape]
        phase = np.unwrap(np.angle((weights * z**fold).sum(axis=(1, 2))))
        self.degrees = np.degrees(phase) / fold  # clockwise, unwrapped; from an unknown start
        core = weights > 0.8
        self.rgb = np.stack([frame[mask].mean(axis=0) for frame, mask in zip(frames[self.shown], core, strict=True)])

    @property
    def path(self) -> float:
        return float(max(np.ptp(self.x), np.ptp(self.y)))

    @property
    def hues(self) -> np.ndarray:
        return np.array([colorsys.rgb_to_hsv(*np.clip(rgb / 255, 0, 1))[0] for rgb in self.rgb])


def test_each_clip_does_its_action_and_nothing_else(clip_folder: Path) -> None:
    """Measured from decoded pixels. Over 300 clips the nearest values came to: path 0.5 / 11.4 px, area 1.3 / 2.5,
    turn 14 / 140 degrees, hue 4 / 147 degrees (largest without the action / smallest with it)."""
    for clip, frames in decoded_clips(clip_folder):
        found = Measured(frames, shape=clip.shape)
        assert found.shown.tolist() == clip.visible.tolist()
        assert found.shown[NUM_FRAMES // 2]
        assert (found.shown.sum() < NUM_FRAMES) == (clip.action == "blink")
        assert (found.path > 8) == (clip.action == "slide")
        assert (found.path < 1) != (clip.action == "slide")
        assert (found.area.max() / found.area.min() > 2.2) == (clip.action == "pulse")
        assert (found.area.max() / found.area.min() < 1.4) != (clip.action == "pulse")
        turned, truly = (degrees[-1] - degrees[0] for degrees in (found.degrees, clip.angle_degrees))
        assert (abs(turned) > 120) == (clip.action == "spin")
        assert np.ptp(found.degrees) < 25 or (clip.action == "spin" and abs(turned - truly) < 12)
        apart = np.degrees(np.abs(np.angle(np.exp(2j * np.pi * (found.hues[:, None] - found.hues)))))
        assert (apart.max() > 60) == (clip.action == "change_colour")
        assert (apart.max() < 15) != (clip.action == "change_colour")
        if clip.action == "change_colour":
            assert len(np.unique((apart > 8), axis=0)) >= 3  # three groups of frames with hues of their own


def test_actions_keep_what_they_promise() -> None:
    """On the parameters of 2,000 clips of 16 and 200 of 8 and 40 frames."""
    for num_frames, count in ((16, 2000), (8, 200), (40, 200)):
        for index in range(count):
            clip = clip_parameters(index, seed=5, split="train", num_frames=num_frames)
            assert clip.visible[num_frames // 2]
            runs = np.diff(np.flatnonzero(np.diff(np.r_[0, clip.visible, 0]) > 0))
            assert clip.action != "blink" or (len(runs) > 0 and set(runs.tolist()) <= {2, 3, 4})
            assert clip.action != "change_colour" or 3 <= len(set(clip.colours)) <= 6
            assert clip.action != "spin" or 140 <= abs(clip.angle_degrees[-1] - clip.angle_degrees[0]) <= 270
            for place in (clip.x, clip.y):
                assert (place - clip.radius).min() > 0
                assert (place + clip.radius).max() < 1


def chi_square(values: list[float], *, actions: np.ndarray) -> float:
    """Of the table actions x (up to 8 equally full bins of values): at most 28 degrees of freedom."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, 9)[1:-1]))
    table = np.zeros((5, len(edges) + 1))
    np.add.at(table, (actions, np.searchsorted(edges, values)), 1)
    table = table[:, table.sum(axis=0) > 0]
    assert table.shape[1] >= 5
    expected = table.sum(axis=1, keepdims=True) * table.sum(axis=0) / table.sum()
    return float(((table - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("at", [0, NUM_FRAMES // 2, NUM_FRAMES - 1])
def test_a_single_frame_tells_nothing_of_the_action(at: int) -> None:
    """Each quantity against the action, 4 seeds x 1,500 clips, at the first, middle and last frame (where blink's shape
    may be hidden, but is where it is). Chi-squares summed over seeds have 112 degrees of freedom:
    99.99% lie below 175."""
    sums: dict[str, float] = {}
    for seed in range(4):
        clips = [clip_parameters(index, seed=seed, split="train", num_frames=NUM_FRAMES) for index in range(1500)]
        quantities = {
            "x": [clip.x[at] for clip in clips],
            "y": [clip.y[at] for clip in clips],
            "radius": [clip.radius[at] for clip in clips],
            "angle": [clip.angle_degrees[at] % 360 for clip in clips],
            "grey": [clip.grey_level for clip in clips],
            "colour": [list(COLOURS).index(clip.colours[at]) for clip in clips],
            "red": [clip.rgb[at, 0] for clip in clips],
            "shape": [SHAPES.index(clip.shape) for clip in clips],
        }
        for name, values in quantities.items():
            sums[name] = sums.get(name, 0.0) + chi_square(values, actions=np.arange(1500) % 5)
    assert max(sums.values()) < 175, sums


def test_the_chi_square_would_see_a_difference() -> None:
    """Clips that slide from a third of the picture, or spin from upright, would be told from the others."""
    rng, actions = np.random.default_rng(0), np.arange(1500) % 5
    assert chi_square(rng.random(1500).tolist(), actions=actions) < 64
    assert chi_square((rng.random(1500) * np.where(actions == 0, 0.7, 1.0)).tolist(), actions=actions) > 64
