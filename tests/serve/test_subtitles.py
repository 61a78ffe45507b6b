"""WebVTT: written by hand, and read back by FFmpeg's demuxer and decoder whatever a caption holds."""

import io
import math
import re

import av
import pytest
from av.subtitles.subtitle import AssSubtitle
from hypothesis import example, given
from hypothesis import strategies as st

from coca_video.serve.answers import Segment
from coca_video.serve.subtitles import web_vtt


def segment(start: float, end: float, caption: str = "a cat") -> Segment:
    return Segment(start_seconds=start, end_seconds=end, caption=caption)


def read_back(vtt: str) -> list[tuple[int, int, str]]:
    """(start, end, text) in milliseconds of every cue, as FFmpeg demuxes and decodes them."""
    found = []
    with av.open(io.BytesIO(vtt.encode()), mode="r", format="webvtt") as container:
        (stream,) = container.streams.subtitles
        for packet in container.demux(stream):
            if packet.size:
                assert packet.time_base == pytest.approx(1 / 1000) and packet.pts is not None and packet.duration
                (line,) = stream.codec_context.decode2(packet) or ()
                assert isinstance(line, AssSubtitle)
                found.append((packet.pts, packet.pts + packet.duration, _plain(line.ass.decode())))
    return found


def _plain(ass: str) -> str:
    """The text of an ASS event: what stands behind its eighth comma, without how ASS itself escapes { and a backslash.

    FFmpeg writes { as \\\\{{} and a backslash with an invisible word joiner behind it.
    """
    text = ass.split(",", 8)[8]
    return text.replace("\\{{}", "{").replace("\\\u2060", "\\")


def test_a_file_as_written_by_hand() -> None:
    segments = [segment(0.0, 2.5), segment(2.5, 5.0004, "x < y & z"), segment(3599.9996, 360000.25, "the end")]
    assert web_vtt(segments) == (
        "WEBVTT\n"
        "\n"
        "00:00:00.000 --> 00:00:02.500\n"
        "a cat\n"
        "\n"
        "00:00:02.500 --> 00:00:05.000\n"
        "x &lt; y &amp; z\n"
        "\n"
        "01:00:00.000 --> 100:00:00.250\n"
        "the end\n"
    )


@pytest.mark.parametrize(
    ("caption", "shown"),
    [
        ("a --> b", "a --> b"),
        ("00:00:09.000 --> 00:00:10.000", "00:00:09.000 --> 00:00:10.000"),
        ("<b>bold</b> <script>alert(1)</script> <v Bob>hi", "<b>bold</b> <script>alert(1)</script> <v Bob>hi"),
        ("salt & pepper &amp; &lt;i&gt;", "salt & pepper &amp; &lt;i&gt;"),
        ("two\nlines", "two lines"),
        ("an empty\n\nline\r\n\r\n00:00:09.000 --> 00:00:10.000\nmore", None),
        ("WEBVTT", "WEBVTT"),
        ("NOTE no comment", "NOTE no comment"),
        ("  spaces\t around\v ", "spaces around"),
        ("nul\x00 bell\x07 escape\x1b", "nul bell escape"),
        ("half of a pair \ud83d, line\u2028paragraph\u2029next\x85", "half of a pair , line paragraph next"),
        ("{\\an8} \\N \\h braces", "{\\an8} \\N \\h braces"),
        (
            "猫 и кот, \U0001f468\u200d\U0001f469\u200d\U0001f467",
            "猫 и кот, \U0001f468\u200d\U0001f469\u200d\U0001f467",
        ),
    ],
)
def test_a_caption_never_breaks_the_format(caption: str, shown: str | None) -> None:
    """The cues before and behind it are what they were, and it is one cue with its own text."""
    found = read_back(web_vtt([segment(0.0, 1.0, "before"), segment(1.0, 2.25, caption), segment(2.25, 4.0, "after")]))
    if shown is None:
        shown = "an empty line 00:00:09.000 --> 00:00:10.000 more"
    assert found == [(0, 1000, "before"), (1000, 2250, shown), (2250, 4000, "after")]


@pytest.mark.parametrize("blank", ["", "  ", "\n\n", "\x00"])
def test_a_blank_caption_has_no_cue(blank: str) -> None:
    assert read_back(web_vtt([segment(0.0, 1.0, blank), segment(1.0, 2.0)])) == [(1000, 2000, "a cat")]
    assert web_vtt([segment(0.0, 1.0, blank)]) == web_vtt([]) == "WEBVTT\n"


def test_the_shortest_cue_is_a_millisecond() -> None:
    found = read_back(web_vtt([segment(2.0, 2.0), segment(3.0, 3.0001), segment(4.0, 4.0016)]))
    assert [cue[:2] for cue in found] == [(2000, 2001), (3000, 3001), (4000, 4002)]


@pytest.mark.parametrize("times", [(-0.5, 1.0), (2.0, 1.0), (0.0, math.inf), (math.nan, 1.0), (0.0, math.nan)])
def test_times_that_are_none(times: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match=re.escape(f"0 <= start <= end, got {times[0]:g} and {times[1]:g} seconds.")):
        web_vtt([segment(*times)])


@given(st.lists(st.text(st.sampled_from("-->< &;amplt\n\r\x00a\u2028:0. NOTEWBV")), min_size=1, max_size=6))
@example(["-->", "--", ">"])
def test_any_captions_are_as_many_cues(captions: list[str]) -> None:
    segments = [segment(float(number), number + 1.0, caption) for number, caption in enumerate(captions)]
    expected = [
        (number * 1000, number * 1000 + 1000, words)
        for number, caption in enumerate(captions)
        if (words := " ".join(re.split(r"[\s\x00]+", caption)).strip())
    ]
    assert read_back(web_vtt(segments)) == expected
