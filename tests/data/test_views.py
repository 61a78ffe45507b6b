"""Frames and crops of each peer's test protocol, worked out by hand from the formula in its source."""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from coca_video.data.transforms import Box
from coca_video.data.views import CropRule, Protocol, ProtocolName, protocol

NAMES = get_args(ProtocolName)


def frames(name: ProtocolName, num_frames: int, *, rate: float = 30.0) -> list[list[int]]:
    indices = protocol(name).frame_indices(num_frames=num_frames, frames_per_second=rate)
    assert indices.dtype == np.int64
    return [clip.tolist() for clip in indices]


def corners(rule: Protocol, height: int, width: int) -> list[tuple[int, int, int, bool]]:
    """(top, left, side, flipped) of each crop."""
    views = rule.crop_views(height, width)
    assert all(view.box.height == view.box.width for view in views)
    return [(view.box.top, view.box.left, view.box.height, view.flipped) for view in views]


def lefts(rule: Protocol, height: int, width: int) -> list[int]:
    """Of crops as high as the frame: their left edges, and the same as top edges of the frame turned upright."""
    found = corners(rule, height, width)
    assert {(top, side, flipped) for top, _, side, flipped in found} == {(0, height, False)}
    turned = [(left, top, side, flipped) for top, left, side, flipped in found]
    assert corners(rule, width, height) == turned
    return [left for _, left, _, _ in found]


@pytest.mark.parametrize(
    ("name", "clips", "frames_per_clip", "stride", "crops", "views", "sizes", "aggregate"),
    [
        ("uniform", 1, 16, None, "centre", 1, (224, 224), "mean_softmax"),
        ("mmaction2_tsn", 25, 1, None, "ten", 250, (256, 224), "mean_softmax"),
        ("mmaction2_dense", 10, 16, 4, "three", 30, (256, 256), "mean_softmax"),
        ("slowfast", 10, 8, 8, "three", 30, (256, 256), "mean_softmax"),
        ("pytorchvideo", 10, 8, None, "three", 30, (256, 256), "mean_softmax"),
        ("uniformerv2", 4, 8, None, "three", 12, (224, 224), "mean_softmax"),
        ("videomae", 5, 16, 4, "three", 15, (224, 224), "mean_softmax"),
        ("videomae_ssv2", 2, 16, None, "three", 6, (224, 224), "mean_softmax"),
        ("vjepa2", 8, 16, 4, "three", 24, (256, 256), "concatenate_clips"),
    ],
)
def test_presets(
    name: ProtocolName,
    clips: int,
    frames_per_clip: int,
    stride: int | None,
    crops: CropRule,
    views: int,
    sizes: tuple[int, int],
    aggregate: str,
) -> None:
    rule = protocol(name)
    assert (rule.name, rule.num_clips, rule.frames_per_clip, rule.stride) == (name, clips, frames_per_clip, stride)
    assert (rule.crops, rule.num_views, rule.aggregate) == (crops, views, aggregate)
    assert (rule.short_side, rule.crop_size) == sizes
    assert rule.frame_indices(num_frames=300, frames_per_second=30.0).shape == (clips, frames_per_clip)
    assert len(rule.crop_views(240, 320)) == rule.num_crops


def test_all_presets_are_tested_for_one_frame() -> None:
    for name in NAMES:
        indices = protocol(name).frame_indices(num_frames=1, frames_per_second=25.0)
        assert not indices.any() and indices.size > 0


def test_frames_per_clip() -> None:
    rule = protocol("videomae", frames_per_clip=8)  # kept 0, 4, ..., 296 (75 of them); starts 16.75 c
    indices = rule.frame_indices(num_frames=300, frames_per_second=30.0)
    assert indices[:, 0].tolist() == [4 * start for start in (0, 16, 33, 50, 67)]
    assert indices[4].tolist() == [268, 272, 276, 280, 284, 288, 292, 296]
    assert protocol("videomae", frames_per_clip=16) == protocol("videomae")


def test_uniform() -> None:
    rule = protocol("uniform", frames_per_clip=4)
    assert rule.frame_indices(num_frames=300, frames_per_second=30.0).tolist() == [[37, 112, 187, 262]]  # 75 i + 37.5
    two = replace(rule, num_clips=2)  # 75 i + 18.75 and + 56.25
    assert two.frame_indices(num_frames=300, frames_per_second=30.0).tolist() == [
        [18, 93, 168, 243],
        [56, 131, 206, 281],
    ]
    assert rule.frame_indices(num_frames=3, frames_per_second=25.0).tolist() == [[0, 1, 1, 2]]  # 0.75 i + 0.375


def test_mmaction2_tsn() -> None:
    # floor(c N / 25 + N / 50)
    assert frames("mmaction2_tsn", 300) == [[12 * clip + 6] for clip in range(25)]
    assert frames("mmaction2_tsn", 250) == [[10 * clip + 5] for clip in range(25)]
    # 2.56 c + 1.28
    expected = [1, 3, 6, 8, 11, 14, 16, 19, 21, 24, 26, 29, 32, 34, 37, 39, 42, 44, 47, 49, 52, 55, 57, 60, 62]
    assert frames("mmaction2_tsn", 64) == [[frame] for frame in expected]
    # 0.4 c + 0.2
    expected = [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5, 6, 6, 7, 7, 7, 8, 8, 9, 9, 9]
    assert frames("mmaction2_tsn", 10) == [[frame] for frame in expected]
    # 1.2 c + 0.6 is 15 for clip 12, but in floating point 14.399999999999999 + 0.6 stays below it
    assert frames("mmaction2_tsn", 30)[11:14] == [[13], [14], [16]]


@given(st.integers(1, 20_000))
def test_mmaction2_tsn_in_floating_point(num_frames: int) -> None:
    average = num_frames / 25.0
    assert frames("mmaction2_tsn", num_frames) == [[int(clip * average + average / 2.0)] for clip in range(25)]


def test_mmaction2_dense() -> None:
    # A clip spans 61 frames: the last start is 239, and starts are round(c 239 / 9)
    indices = frames("mmaction2_dense", 300)
    assert [clip[0] for clip in indices] == [0, 27, 53, 80, 106, 133, 159, 186, 212, 239]
    assert indices[1] == [27, 31, 35, 39, 43, 47, 51, 55, 59, 63, 67, 71, 75, 79, 83, 87]
    assert indices[9][-1] == 299
    indices = frames("mmaction2_dense", 250, rate=25.0)  # 189 / 9 = 21
    assert [clip[0] for clip in indices] == [0, 21, 42, 63, 84, 105, 126, 147, 168, 189]
    assert indices[9] == list(range(189, 250, 4))
    indices = frames("mmaction2_dense", 64)  # round(c 3 / 9)
    assert [clip[0] for clip in indices] == [0, 0, 1, 1, 1, 2, 2, 2, 3, 3]
    assert indices[9] == list(range(3, 64, 4))
    assert frames("mmaction2_dense", 10) == [[0, 4, 8, 2, 6, 0, 4, 8, 2, 6, 0, 4, 8, 2, 6, 0]] * 10  # 4 i modulo 10


def test_mmaction2_dense_single_clip_and_halves() -> None:
    one = replace(protocol("mmaction2_dense"), num_clips=1)
    assert one.frame_indices(num_frames=300, frames_per_second=30.0)[0, 0] == 119  # 239 // 2
    three = replace(protocol("mmaction2_dense"), num_clips=3)
    # the middle of 0 .. 61 and of 0 .. 63: 30.5 and 31.5, to the even number
    assert three.frame_indices(num_frames=122, frames_per_second=30.0)[:, 0].tolist() == [0, 30, 61]
    assert three.frame_indices(num_frames=124, frames_per_second=30.0)[:, 0].tolist() == [0, 32, 63]


def test_slowfast() -> None:
    # L = 8 x 8 = 64 frames at 30 a second, start 23.6 c, then steps of 63 / 7 = 9
    indices = frames("slowfast", 300)
    assert [clip[0] for clip in indices] == [0, 23, 47, 70, 94, 118, 141, 165, 188, 212]
    assert indices[0] == [0, 9, 18, 27, 36, 45, 54, 63]
    assert indices[1] == [23, 32, 41, 50, 59, 68, 77, 86]
    assert indices[9] == [212, 221, 230, 239, 248, 257, 266, 275]  # not 299: the end is not reached
    # At 25 a second L = 53.33, start 19.67 c, steps of 7.476
    indices = frames("slowfast", 250, rate=25.0)
    assert [clip[0] for clip in indices] == [0, 19, 39, 59, 78, 98, 118, 137, 157, 177]
    assert indices[0] == [0, 7, 14, 22, 29, 37, 44, 52]
    assert indices[9] == [177, 184, 191, 199, 206, 214, 221, 229]
    assert frames("slowfast", 64) == [[0, 9, 18, 27, 36, 45, 54, 63]] * 10
    assert frames("slowfast", 10) == [[0, 9, 9, 9, 9, 9, 9, 9]] * 10
    assert frames("slowfast", 10, rate=25.0) == [[0, 7, 9, 9, 9, 9, 9, 9]] * 10
    # A clip of less than one frame is one frame: start 9 c, all eight the same
    assert frames("slowfast", 91, rate=0.1) == [[9 * clip] * 8 for clip in range(10)]


@given(st.integers(1, 900), st.sampled_from([10.0, 15.0, 24000 / 1001, 25.0, 30000 / 1001, 30.0, 50.0, 60.0]))
def test_slowfast_as_torch_samples(num_frames: int, rate: float) -> None:
    length = max(1.0, 8 * 8 / 30 * rate)
    slack = max(num_frames - length, 0)
    expected = []
    for clip in range(10):
        start = slack * clip / 10
        points = torch.linspace(start, start + length - 1, 8)
        expected.append(torch.clamp(points, 0, num_frames - 1).long().tolist())
    assert frames("slowfast", num_frames, rate=rate) == expected


def test_uniformerv2() -> None:
    # 37.375 i: 0, 37.375, 74.75, 112.125, 149.5 (to even), 186.875, 224.25, 261.625; + floor(7.475 (c + 1))
    starts = np.array([0, 37, 75, 112, 150, 187, 224, 262])
    assert frames("uniformerv2", 300) == [(starts + offset).tolist() for offset in (7, 14, 22, 29)]
    # 31.125 i: the fifth is 124.5, to even; 6.225 (c + 1)
    starts = np.array([0, 31, 62, 93, 124, 156, 187, 218])
    assert frames("uniformerv2", 250, rate=25.0) == [(starts + offset).tolist() for offset in (6, 12, 18, 24)]
    # 7.875 i: 31.5 to even; 1.575 (c + 1)
    starts = np.array([0, 8, 16, 24, 32, 39, 47, 55])
    assert frames("uniformerv2", 64) == [(starts + offset).tolist() for offset in (1, 3, 4, 6)]
    # 1.125 i, 4.5 to even; 0.225 (c + 1) is below 1
    assert frames("uniformerv2", 10) == [[0, 1, 2, 3, 4, 6, 7, 8]] * 4


def test_videomae() -> None:
    # Kept 0, 4, ..., 296: 75; starts 14.75 c of them
    indices = frames("videomae", 300)
    assert [clip[0] for clip in indices] == [0, 56, 116, 176, 236]
    assert indices[1] == [56, 60, 64, 68, 72, 76, 80, 84, 88, 92, 96, 100, 104, 108, 112, 116]
    assert indices[4][-1] == 296
    assert [clip[0] for clip in frames("videomae", 250, rate=25.0)] == [0, 44, 92, 140, 188]  # 63 kept: 11.75 c
    assert [clip[0] for clip in frames("videomae", 70)] == [0, 0, 4, 4, 8]  # 18 kept: 0.5 c
    assert frames("videomae", 64) == [list(range(0, 64, 4))] * 5
    assert frames("videomae", 10) == [[0, 4] + [8] * 14] * 5


def test_videomae_ssv2() -> None:
    assert frames("videomae_ssv2", 300) == [  # 18.75 i and 18.75 i + 9.375
        [0, 18, 37, 56, 75, 93, 112, 131, 150, 168, 187, 206, 225, 243, 262, 281],
        [9, 28, 46, 65, 84, 103, 121, 140, 159, 178, 196, 215, 234, 253, 271, 290],
    ]
    assert frames("videomae_ssv2", 250) == [  # 15.625 i and 15.625 i + 7.8125
        [0, 15, 31, 46, 62, 78, 93, 109, 125, 140, 156, 171, 187, 203, 218, 234],
        [7, 23, 39, 54, 70, 85, 101, 117, 132, 148, 164, 179, 195, 210, 226, 242],
    ]
    assert frames("videomae_ssv2", 64) == [list(range(0, 64, 4)), list(range(2, 64, 4))]
    assert frames("videomae_ssv2", 10) == [  # 0.625 i and 0.625 i + 0.3125
        [0, 0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 6, 7, 8, 8, 9],
        [0, 0, 1, 2, 2, 3, 4, 4, 5, 5, 6, 7, 7, 8, 9, 9],
    ]


def test_vjepa2_where_segments_overlap() -> None:
    # floor(63 / 4) = 15 numbers from 0 to 63, 4.5 apart, then 63; all at most 62
    window = np.array([0, 4, 9, 13, 18, 22, 27, 31, 36, 40, 45, 49, 54, 58, 62, 62])
    assert frames("vjepa2", 300) == [(window + 33 * clip).tolist() for clip in range(8)]  # 236 // 7
    assert frames("vjepa2", 250, rate=25.0) == [(window + 26 * clip).tolist() for clip in range(8)]  # 186 // 7
    assert frames("vjepa2", 519) == [(window + 65 * clip).tolist() for clip in range(8)]  # a segment has 64 frames
    assert frames("vjepa2", 64) == [window.tolist()] * 8
    assert frames("vjepa2", 10) == [[0] + [8] * 15] * 8  # floor(9 / 4) = 2 numbers from 0 to 9, then 9; at most 8


def test_vjepa2_where_segments_do_not_overlap() -> None:
    # Segments of 65 frames leave one window, from 0: 64 / 15 i, the last at most 63
    window = np.array([0, 4, 8, 12, 17, 21, 25, 29, 34, 38, 42, 46, 51, 55, 59, 63])
    assert frames("vjepa2", 520) == [(window + 65 * clip).tolist() for clip in range(8)]
    # Segments of 75: V-JEPA 2 draws a start from 0 to 10, we take 5: 5 + 64 / 15 i
    window = np.array([5, 9, 13, 17, 22, 26, 30, 34, 39, 43, 47, 51, 56, 60, 64, 68])
    assert frames("vjepa2", 600) == [(window + 75 * clip).tolist() for clip in range(8)]


@given(st.sampled_from(NAMES), st.integers(1, 1500), st.floats(1.0, 120.0))
def test_frames_lie_in_the_video_and_do_not_go_back(name: ProtocolName, num_frames: int, rate: float) -> None:
    indices = protocol(name).frame_indices(num_frames=num_frames, frames_per_second=rate)
    assert indices.min() >= 0 and indices.max() < num_frames
    assert (np.diff(indices[:, 0]) >= 0).all()
    if name != "mmaction2_dense":  # which goes on from frame 0 beyond the end
        assert (np.diff(indices, axis=1) >= 0).all()


@pytest.mark.parametrize(
    "bad", [{"num_frames": 0, "frames_per_second": 25.0}, {"num_frames": 9, "frames_per_second": 0.0}]
)
def test_frame_indices_says_what_is_wrong(bad: dict[str, Any]) -> None:
    for name in NAMES:
        with pytest.raises(ValueError, match="expected a frame and a positive rate"):
            protocol(name).frame_indices(**bad)


def test_crops_of_240_x_427() -> None:
    assert lefts(protocol("uniform"), 240, 427) == [93]  # 187 // 2
    # 256 x 455 (455.47 to nearest): slack 199, steps of 99; 198 and 99 of 455 are 185.8 and 92.9 of 427
    assert lefts(protocol("mmaction2_dense"), 240, 427) == [0, 186, 93]
    # 256 x 455: 0, ceil(99.5), 199; 93.8 and 186.8 of 427
    assert lefts(protocol("slowfast"), 240, 427) == [0, 94, 187]
    assert lefts(protocol("pytorchvideo"), 240, 427) == [0, 94, 187]
    # 224 x 398 (398.5 down): 0, 87, 174; 93.3 and 186.7 of 427
    assert lefts(protocol("uniformerv2"), 240, 427) == [0, 93, 187]
    assert lefts(protocol("videomae"), 240, 427) == [0, 93, 187]
    assert lefts(protocol("videomae_ssv2"), 240, 427) == [0, 93, 187]
    # 256 x 455: 0, 99, 198
    assert lefts(protocol("vjepa2"), 240, 427) == [0, 93, 186]


def test_crops_of_256_x_340() -> None:
    assert lefts(protocol("mmaction2_dense"), 256, 340) == [0, 84, 42]  # nothing is resized
    assert lefts(protocol("slowfast"), 256, 340) == [0, 42, 84]
    # 224 x 297 (297.5 down), slack 73: middle 37 and 36; 42.4, 41.2 and 83.6 of 340
    assert lefts(protocol("uniformerv2"), 256, 340) == [0, 42, 84]
    assert lefts(protocol("videomae"), 256, 340) == [0, 41, 84]


def test_long_side_to_nearest_or_down() -> None:
    # 1279 x 256 / 720 = 454.76
    assert lefts(protocol("mmaction2_dense"), 720, 1279) == [0, 557, 278]  # 455: 198 and 99, times 1279 / 455
    assert lefts(protocol("slowfast"), 720, 1279) == [0, 279, 558]  # 454: 99 and 198, times 1279 / 454
    assert lefts(protocol("vjepa2"), 720, 1279) == [0, 279, 558]
    # 230 / 224 x 224 is 229.99 in floating point, but a short side of 224 is not resized
    assert lefts(protocol("uniformerv2"), 224, 230) == [0, 3, 6]
    # pytorchvideo resizes it, to 229: slack 5, offsets 0, 3, 5
    small = replace(protocol("pytorchvideo"), short_side=224, crop_size=224)
    assert lefts(small, 224, 230) == [0, 3, 5]


def test_ten_crops() -> None:
    # 256 x 455, crop 224: steps of 231 // 4 = 57 and 32 // 4 = 8. In the source a crop is 210, corners at
    # 228 x 427 / 455 = 213.97 and 32 x 240 / 256 = 30, the centre at 114 and 16: 106.98 and 15
    places = [(0, 0), (0, 214), (30, 0), (30, 214), (15, 107)]
    expected = [(top, left, 210, flipped) for top, left in places for flipped in (False, True)]
    assert corners(protocol("mmaction2_tsn"), 240, 427) == expected
    tall = [(left, top, side, flipped) for top, left, side, flipped in corners(protocol("mmaction2_tsn"), 427, 240)]
    assert sorted(tall) == sorted(expected)


@pytest.mark.parametrize(
    ("name", "left"),
    [
        ("uniform", 93),
        ("mmaction2_dense", 93),
        ("slowfast", 94),
        ("pytorchvideo", 94),
        ("uniformerv2", 93),
        ("videomae", 93),
        ("vjepa2", 93),
    ],
)
def test_centre_crop(name: ProtocolName, left: int) -> None:
    assert lefts(replace(protocol(name), crops="centre"), 240, 427) == [left]


def test_centre_crop_smaller_than_the_short_side() -> None:
    rule = replace(protocol("mmaction2_dense"), crops="centre", crop_size=224)
    # 256 x 455: (16, 115), in the source 15 and 107.9, side 210
    assert corners(rule, 240, 427) == [(15, 108, 210, False)]
    rule = replace(protocol("uniform"), short_side=256)  # 7/8 of 240 in the source's own pixels
    assert corners(rule, 240, 427) == [(15, 108, 210, False)]


def test_three_crops_of_our_own() -> None:
    assert lefts(replace(protocol("uniform"), crops="three"), 240, 427) == [0, 93, 187]


@given(st.sampled_from(NAMES), st.sampled_from(["centre", "three", "ten"]), st.integers(1, 2000), st.integers(1, 2000))
@example("slowfast", "three", 1, 1)
def test_crops_lie_in_the_frame(name: ProtocolName, crops: CropRule, height: int, width: int) -> None:
    if name == "mmaction2_tsn" and crops == "three":
        return  # its crop is smaller than its short side
    rule = replace(protocol(name), crops=crops)
    views = rule.crop_views(height, width)
    assert len(views) == rule.num_crops
    for box, _ in views:
        assert 0 <= box.top <= box.top + box.height <= height and 0 <= box.left <= box.left + box.width <= width
        assert box.height == box.width >= 1
    if rule.crop_size == rule.short_side and crops != "ten":
        assert {box.height for box, _ in views} == {min(height, width)}
    if height == width and rule.crop_size == rule.short_side:
        assert {view.box for view in views} == {Box(0, 0, height, width)}


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("uniform", {"num_clips": 0}, "counts of at least 1"),
        ("uniform", {"frames_per_clip": 0}, "counts of at least 1"),
        ("uniform", {"crop_size": 225}, "crop_size <= short_side"),
        ("slowfast", {"stride": 0}, "counts of at least 1"),
        ("slowfast", {"stride": None}, "expected a stride for protocol 'slowfast', got None"),
        ("uniformerv2", {"stride": 4}, "expected no stride for protocol 'uniformerv2', got 4"),
        ("pytorchvideo", {"stride": 4}, "expected no stride for protocol 'pytorchvideo', got 4"),
        ("pytorchvideo", {"clip_seconds": None}, "expected clip_seconds for protocol 'pytorchvideo', got None"),
        ("pytorchvideo", {"clip_seconds": 0.0}, "expected clip_seconds above 0 and finite, got 0.0"),
        ("slowfast", {"clip_seconds": 2.0}, "expected no clip_seconds for protocol 'slowfast', got 2.0"),
        ("mmaction2_tsn", {"crops": "three"}, "three crops as wide as the short side, 256, got 224"),
        ("mmaction2_tsn", {"frames_per_clip": 8}, "clips of 1 frame"),
        ("mmaction2_dense", {"frames_per_clip": 1}, "MMAction2 uses 'mmaction2_tsn'"),
        ("videomae", {"num_clips": 1}, "2 clips or more for 'videomae'"),
        ("videomae_ssv2", {"num_clips": 3}, "2 clips for 'videomae_ssv2'"),
    ],
)
def test_a_protocol_says_what_is_wrong(name: ProtocolName, change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        replace(protocol(name), **change)
    with pytest.raises(ValueError, match="height and width of at least 1"):
        protocol(name).crop_views(0, 9)


def test_stride_changes_dense_rules() -> None:
    for name in ("mmaction2_dense", "slowfast", "videomae", "vjepa2"):
        assert (
            frames(name, 300)
            != replace(protocol(name), stride=2).frame_indices(num_frames=300, frames_per_second=30.0).tolist()
        )
