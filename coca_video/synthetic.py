"""The drawn world of the quickstart and of tests: pictures of shapes with true captions, and H.264 clips of actions.

Everything is a pure function of (seed, index). Lengths are fractions of the picture's side, x to the right and y down,
angles in degrees clockwise as seen, so that a positive one tilts a shape to the right. Colours are RGB in [0, 255].
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float32, Float64, UInt8
from torch import Tensor

from coca_video.data.decode import write_video
from coca_video.data.image_text import encode_jpeg, write_shard
from coca_video.data.manifest import VideoRow, write_manifest
from coca_video.data.sampling import sample_rng

ACTIONS = ("slide", "spin", "pulse", "blink", "change_colour")

# Unions of one or two boxes (centre x, centre y, half width, half height) about their centre of mass, the furthest
# corner at about 1. No shape is round, so a turn shows. Pictures tilt by at most 28 degrees: less than half of the 72
# after which a star looks the same, so left is never right.
BOXES: dict[str, tuple[tuple[float, float, float, float], ...]] = {
    "square": ((0.0, 0.0, 0.72, 0.72),),
    "bar": ((0.0, 0.0, 0.95, 0.3),),
    "cross": ((0.0, 0.0, 0.95, 0.28), (0.0, 0.0, 0.28, 0.95)),
    "L": ((-0.13, -0.13, 0.26, 0.78), (0.13, 0.39, 0.52, 0.26)),
    "T": ((0.0, -0.311, 0.72, 0.24), (0.0, 0.199, 0.24, 0.75)),
}
SHAPES = (*BOXES, "triangle", "star")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (215, 35, 35),
    "green": (35, 165, 60),
    "blue": (45, 75, 225),
    "yellow": (240, 220, 40),
    "orange": (245, 140, 25),
    "purple": (135, 50, 175),
    "pink": (245, 130, 195),
    "turquoise": (35, 205, 205),
}
BACKGROUNDS: dict[str, tuple[float, float]] = {"dark": (10, 35), "grey": (105, 135), "light": (215, 245)}

# Name -> (its number or range, the ways to say it); names are also the first way to say it.
SIZES: dict[str, tuple[float, tuple[str, ...]]] = {  # radius of the circle around the shape
    "small": (0.1, ("small", "tiny")),
    "medium": (0.15, ("medium", "medium-sized")),
    "large": (0.2, ("large", "big")),
}
PLACES: dict[str, tuple[tuple[float, float], tuple[str, ...]]] = {
    "at the top left": ((0.25, 0.25), ("at the top left", "in the upper left corner")),
    "at the top": ((0.5, 0.25), ("at the top", "near the upper edge")),
    "at the top right": ((0.75, 0.25), ("at the top right", "in the upper right corner")),
    "on the left": ((0.25, 0.5), ("on the left", "near the left edge")),
    "in the middle": ((0.5, 0.5), ("in the middle", "in the centre")),
    "on the right": ((0.75, 0.5), ("on the right", "near the right edge")),
    "at the bottom left": ((0.25, 0.75), ("at the bottom left", "in the lower left corner")),
    "at the bottom": ((0.5, 0.75), ("at the bottom", "near the lower edge")),
    "at the bottom right": ((0.75, 0.75), ("at the bottom right", "in the lower right corner")),
}
TILTS: dict[str, tuple[tuple[float, float], tuple[str, ...]]] = {
    "upright": ((-2, 2), ("upright", "standing straight")),
    "tilted a little to the left": ((-14, -9), ("tilted a little to the left", "leaning slightly to the left")),
    "tilted a little to the right": ((9, 14), ("tilted a little to the right", "leaning slightly to the right")),
    "tilted far to the left": ((-28, -21), ("tilted far to the left", "leaning strongly to the left")),
    "tilted far to the right": ((21, 28), ("tilted far to the right", "leaning strongly to the right")),
}

ONE_SHAPE = (
    "a {size} {colour} {shape} {place}",
    "a {size} {colour} {shape}, {tilt}, {place}",
    "a {colour} {shape} {place}, {tilt}, on a {background} background",
    "{place} there is a {size} {colour} {shape}, {tilt}",
    "there is a {colour} {shape} {place}, {tilt}",
    "on a {background} background, a {size} {colour} {shape}, {tilt}",
    "the {shape} {place} is {colour}, {size} and {tilt}",
    "a picture of a {colour} {shape} that is {size} and {tilt}",
)
SHAPE_OF_TWO = (
    "a {size} {colour} {shape} {place}",
    "a {colour} {shape} {place}",
    "a {colour} {shape} {tilt} {place}",
    "a {size} {colour} {shape} {tilt}",
)
TWO_SHAPES = (
    "{first} and {second}",
    "{first} and {second} on a {background} background",
    "there are two shapes: {first} and {second}",
    "on a {background} background, {first} and {second}",
)
NO_SHAPE = (
    "an empty {background} picture",
    "a {background} background with nothing on it",
    "nothing but a {background} background",
    "there is no shape here, only a {background} background",
)

EMPTY_SHARE, TWO_SHARE = 0.08, 0.2
CAPTIONS_PER_PICTURE = 3
PLACE_JITTER, RADIUS_JITTER, COLOUR_JITTER = 0.03, 0.006, 8.0
CLIP_MARGIN = 0.22  # more than the largest radius of a clip, so that a shape at any angle stays inside
CLIP_MIDDLE_RADIUS = 0.14  # times 2**-0.5 to 2**0.5
MIN_FRAMES = 8


@dataclass(frozen=True, kw_only=True)
class DrawnShape:
    """One shape of a picture: what captions may say of it, and the numbers it is drawn with."""

    shape: str
    colour: str
    size: str
    place: str
    tilt: str
    x: float
    y: float
    radius: float
    angle_degrees: float
    rgb: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class Picture:
    """None to two shapes on a plain background, and three true captions."""

    shapes: tuple[DrawnShape, ...]
    background: str
    grey_level: float
    captions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class DrawnClip:
    """One shape doing one action: what it looks like in each frame. `colours` are the names behind `rgb`."""

    action: str
    shape: str
    x: Float64[np.ndarray, "frames"]
    y: Float64[np.ndarray, "frames"]
    radius: Float64[np.ndarray, "frames"]
    angle_degrees: Float64[np.ndarray, "frames"]
    visible: Bool[np.ndarray, "frames"]
    colours: tuple[str, ...]
    rgb: Float64[np.ndarray, "frames 3"]
    grey_level: float


def draw_pictures(
    folder: Path, *, num_pictures: int, seed: int, size: int = 48, pictures_per_shard: int = 1000
) -> list[Path]:
    """Writes pictures 0 to num_pictures - 1 as tar shards 00000.tar, 00001.tar, ... and returns their paths."""
    if num_pictures < 1 or pictures_per_shard < 1:
        raise ValueError(
            f"Expected at least one picture, and one a shard; got {num_pictures} and {pictures_per_shard}."
        )
    paths = []
    for number, first in enumerate(range(0, num_pictures, pictures_per_shard)):
        paths.append(folder / f"{number:05d}.tar")
        indices = range(first, min(first + pictures_per_shard, num_pictures))
        write_shard(paths[-1], pairs=_encoded_pictures(indices, seed=seed, size=size))
    return paths


def draw_clip_set(
    folder: Path,
    *,
    num_train: int,
    num_test: int,
    seed: int,
    size: int = 48,
    num_frames: int = 16,
    frames_per_second: float = 8.0,
) -> Path:
    """Draws the splits "train" and "test", writes manifest.csv and classes.txt, and returns the manifest's path."""
    draw = partial(draw_clips, folder, seed=seed, size=size, num_frames=num_frames, frames_per_second=frames_per_second)
    rows = [*draw(num_clips=num_train, split="train"), *draw(num_clips=num_test, split="test")]
    write_manifest(folder / "manifest.csv", rows=rows, classes=ACTIONS)
    return folder / "manifest.csv"


def draw_clips(
    folder: Path,
    *,
    num_clips: int,
    seed: int,
    split: str,
    size: int = 48,
    num_frames: int = 16,
    frames_per_second: float = 8.0,
) -> list[VideoRow]:
    """Writes clips 0 to num_clips - 1 of a split, actions in turn, as folder/<split>/<action>/<split>_00000.mp4."""
    for action in ACTIONS:
        (folder / split / action).mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_clips):
        clip = clip_parameters(index, seed=seed, split=split, num_frames=num_frames)
        path = folder.absolute() / split / clip.action / f"{split}_{index:05d}.mp4"
        # crf 12: at x264's usual 23 the edges of shapes a few pixels wide are smeared
        write_video(path, frames=render_clip(clip, size=size), frames_per_second=frames_per_second, crf=12)
        extra = {"shape": clip.shape, "colour": clip.colours[num_frames // 2]}
        rows.append(VideoRow(path=path, label=clip.action, video_id=path.stem, split=split, extra=extra))
    return rows


def picture_parameters(index: int, *, seed: int) -> Picture:
    """What picture `index` shows and says."""
    rng = sample_rng(seed=seed, epoch=0, index=index, purpose="drawn picture")
    share = rng.random()
    num_shapes = 0 if share < EMPTY_SHARE else 2 if share < EMPTY_SHARE + TWO_SHARE else 1
    shapes: list[DrawnShape] = []
    while len(shapes) < num_shapes:
        shape = _random_shape(rng)
        if all(np.hypot(shape.x - s.x, shape.y - s.y) > shape.radius + s.radius + 0.02 for s in shapes):
            shapes.append(shape)
    background = _choose(rng, tuple(BACKGROUNDS))
    captions = _captions(shapes, background=background, rng=rng)
    grey_level = float(rng.uniform(*BACKGROUNDS[background]))
    return Picture(shapes=tuple(shapes), background=background, grey_level=grey_level, captions=captions)


def clip_parameters(index: int, *, seed: int, split: str, num_frames: int) -> DrawnClip:
    """What clip `index` of a split shows: action ACTIONS[index % 5] through the whole clip, all else at rest.

    All that is random is drawn alike for every action, and what moves keeps its distribution (a bouncing place, a
    phase, a walk over colours), so a single frame tells nothing of the action but for the empty frames of "blink";
    the middle frame, num_frames // 2, always shows the shape.
    """
    if num_frames < MIN_FRAMES:
        raise ValueError(f"An action needs at least {MIN_FRAMES} frames to be seen, got {num_frames}.")
    rng = sample_rng(seed=seed, epoch=0, index=index, purpose=f"drawn clip {split}")
    action = ACTIONS[index % len(ACTIONS)]
    steps = np.arange(num_frames) - float(num_frames // 2)  # the middle frame is each action's state at rest
    time = {name: steps if name == action else np.zeros(num_frames) for name in ACTIONS}
    duration = num_frames - 1

    heading, path = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 1.3) / duration
    start_x, start_y = rng.uniform(0, 2, size=2)
    turn = rng.choice([-1, 1]) * rng.uniform(140, 270) / duration
    phase, swing = rng.uniform(0, 2 * np.pi), 2 * np.pi * rng.uniform(1.0, 1.6) / duration
    period = int(rng.integers(2, 5))
    shown = int(rng.integers(1, period))
    hold = rng.uniform(1 / 5.2, 1 / 3.2) * num_frames  # frames of one colour: at least 3 colours, fewer than all 8
    walk = rng.permutation(list(COLOURS))[
        np.floor((time["change_colour"] + rng.uniform(0, hold)) / hold).astype(int) % 8
    ]
    colours = tuple(str(name) for name in walk)
    return DrawnClip(
        action=action,
        shape=_choose(rng, SHAPES),
        x=_bounce(start_x + np.cos(heading) * path * time["slide"]),
        y=_bounce(start_y + np.sin(heading) * path * time["slide"]),
        radius=CLIP_MIDDLE_RADIUS * 2 ** (0.5 * np.sin(phase + swing * time["pulse"])),
        angle_degrees=rng.uniform(0, 360) + turn * time["spin"],
        visible=(time["blink"] + rng.integers(0, shown)) % period < shown,
        colours=colours,
        rgb=np.array([COLOURS[name] for name in colours]) + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER, size=3),
        grey_level=float(rng.uniform(*BACKGROUNDS[_choose(rng, tuple(BACKGROUNDS))])),
    )


def render_picture(picture: Picture, *, size: int) -> UInt8[Tensor, "3 size size"]:
    """The pixels of a picture, antialiased."""
    canvas = np.full((1, 3, size, size), picture.grey_level, dtype=np.float32)
    for shape in picture.shapes:
        numbers = {name: np.array([getattr(shape, name)]) for name in ("x", "y", "radius", "angle_degrees")}
        mask = coverage(shape.shape, **numbers, size=size)
        canvas = _paint(canvas, mask=mask, rgb=np.array([shape.rgb]))
    return _to_u8(canvas)[0]


def render_clip(clip: DrawnClip, *, size: int) -> UInt8[Tensor, "frames 3 size size"]:
    """The pixels of a clip, antialiased, all frames at once."""
    mask = coverage(clip.shape, x=clip.x, y=clip.y, radius=clip.radius, angle_degrees=clip.angle_degrees, size=size)
    mask = mask * clip.visible[:, None, None]
    canvas = np.full((len(mask), 3, size, size), clip.grey_level, dtype=np.float32)
    return _to_u8(_paint(canvas, mask=mask, rgb=clip.rgb))


def coverage(
    shape: str,
    *,
    x: Float64[np.ndarray, "frames"],
    y: Float64[np.ndarray, "frames"],
    radius: Float64[np.ndarray, "frames"],
    angle_degrees: Float64[np.ndarray, "frames"],
    size: int,
) -> Float32[np.ndarray, "frames size size"]:
    """How much of each pixel the shape covers, in [0, 1]: its signed distance, clipped to one pixel around the edge."""
    columns = (_pixel_centres(size)[None, None, :] - x[:, None, None]) / radius[:, None, None]
    rows = (_pixel_centres(size)[None, :, None] - y[:, None, None]) / radius[:, None, None]
    angle = np.radians(angle_degrees)[:, None, None]
    right = (np.cos(angle) * columns).astype(np.float32) + (np.sin(angle) * rows).astype(np.float32)
    down = (np.cos(angle) * rows).astype(np.float32) - (np.sin(angle) * columns).astype(np.float32)
    pixels = (radius * size).astype(np.float32)[:, None, None]
    covered: Float32[np.ndarray, "frames size size"] = np.clip(0.5 - _distance(shape, right, down) * pixels, 0, 1)
    return covered


def _distance(shape: str, right: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Signed distance to the outline in the shape's own frame (beyond a corner: to the nearer side's line)."""
    distance: np.ndarray
    if shape == "triangle":  # inside all three sides of an equilateral triangle with corners at 1
        distance = np.max(_beyond_sides(3, right, down, distance=0.5), axis=0)
    elif shape == "star":  # a pentagram with tips at 1, one above: inside at least four of five sides
        distance = np.partition(_beyond_sides(5, right, -down, distance=0.309), 3, axis=0)[3]
    else:
        boxes = [
            np.maximum(np.abs(right - np.float32(x)) - np.float32(w), np.abs(down - np.float32(y)) - np.float32(h))
            for x, y, w, h in BOXES[shape]
        ]
        distance = np.minimum(boxes[0], boxes[-1])
    return distance


def _beyond_sides(sides: int, right: np.ndarray, down: np.ndarray, *, distance: float) -> np.ndarray:
    """How far a point lies beyond each side of the regular polygon whose first side is below, at `distance`."""
    angles = 2 * np.pi * np.arange(sides) / sides
    normals = np.stack([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
    return np.stack([a * right + b * down for a, b in normals]) - np.float32(distance)


@lru_cache(maxsize=8)
def _pixel_centres(size: int) -> Float64[np.ndarray, "size"]:
    centres: Float64[np.ndarray, "size"] = (np.arange(size) + 0.5) / size
    return centres


def _paint(canvas: np.ndarray, *, mask: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    colour = rgb.astype(np.float32)[:, :, None, None]
    painted: np.ndarray = canvas + mask[:, None] * (colour - canvas)
    return painted


def _to_u8(canvas: np.ndarray) -> UInt8[Tensor, "frames 3 size size"]:
    return torch.from_numpy(np.clip(np.rint(canvas), 0, 255).astype(np.uint8))


def _bounce(way: np.ndarray) -> Float64[np.ndarray, "frames"]:
    """A place within the margins after `way` widths between them, thrown back at each: uniform if its start is."""
    place: Float64[np.ndarray, "frames"] = CLIP_MARGIN + (1 - 2 * CLIP_MARGIN) * (1 - np.abs(1 - way % 2))
    return place


def _choose(rng: np.random.Generator, names: Sequence[str]) -> str:
    return names[int(rng.integers(len(names)))]


def _random_shape(rng: np.random.Generator) -> DrawnShape:
    colour, size, place, tilt = (_choose(rng, tuple(names)) for names in (COLOURS, SIZES, PLACES, TILTS))
    (x, y), (low, high) = PLACES[place][0], TILTS[tilt][0]
    red, green, blue = (float(value + rng.uniform(-COLOUR_JITTER, COLOUR_JITTER)) for value in COLOURS[colour])
    return DrawnShape(
        shape=_choose(rng, SHAPES),
        colour=colour,
        size=size,
        place=place,
        tilt=tilt,
        x=float(x + rng.uniform(-PLACE_JITTER, PLACE_JITTER)),
        y=float(y + rng.uniform(-PLACE_JITTER, PLACE_JITTER)),
        radius=float(SIZES[size][0] + rng.uniform(-RADIUS_JITTER, RADIUS_JITTER)),
        angle_degrees=float(rng.uniform(low, high)),
        rgb=(red, green, blue),
    )


def _captions(shapes: Sequence[DrawnShape], *, background: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Three different sentences; the order of two shapes is drawn anew for each."""
    templates = (NO_SHAPE, ONE_SHAPE, TWO_SHAPES)[len(shapes)]
    captions = []
    for number in rng.permutation(len(templates))[:CAPTIONS_PER_PICTURE]:
        words = {"background": background}
        if len(shapes) == 1:
            words |= _words(shapes[0], rng=rng)
        for name, at in zip(("first", "second"), rng.permutation(len(shapes)), strict=False):
            words[name] = _choose(rng, SHAPE_OF_TWO).format(**_words(shapes[at], rng=rng))
        captions.append(re.sub(r"\ba (?=orange)", "an ", templates[number].format(**words)))
    return tuple(captions)


def _words(shape: DrawnShape, *, rng: np.random.Generator) -> dict[str, str]:
    said = {"shape": shape.shape, "colour": shape.colour}
    ways = {"size": SIZES[shape.size][1], "place": PLACES[shape.place][1], "tilt": TILTS[shape.tilt][1]}
    return said | {name: _choose(rng, phrases) for name, phrases in ways.items()}


def _encoded_pictures(indices: range, *, seed: int, size: int) -> Iterator[tuple[str, bytes, tuple[str, ...]]]:
    for index in indices:
        picture = picture_parameters(index, seed=seed)
        yield f"{index:09d}", encode_jpeg(render_picture(picture, size=size), quality=95), picture.captions
