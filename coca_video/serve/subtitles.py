"""Captions of a clip's parts as WebVTT, the subtitles that browsers show (https://www.w3.org/TR/webvtt1/)."""

import html
import math
import unicodedata
from collections.abc import Sequence

from coca_video.serve.answers import Segment

# Unicode's control characters, halves of surrogate pairs (UTF-8 has none), ends of lines and of paragraphs. Not all
# that str.isprintable() leaves out: joiners are part of Persian and Hindi words and of emoji.
BREAKS = frozenset({"Cc", "Cs", "Zl", "Zp"})


def web_vtt(segments: Sequence[Segment]) -> str:
    """A WebVTT file with a cue of one line for each segment, in order; none for one whose caption is blank.

    Nothing in a caption is read as format: "&", "<" and ">" are escaped, and so no "-->" is left; line breaks, which
    would end a cue, and control characters become spaces. Times are rounded to the format's milliseconds, and a cue
    lasts one at least. ValueError for times that are not 0 <= start <= end, or not finite.
    """
    cues = [_cue(segment) for segment in segments if _one_line(segment.caption)]
    return "\n".join(["WEBVTT\n", *cues])


def _cue(segment: Segment) -> str:
    start, end = segment.start_seconds, segment.end_seconds
    if not 0 <= start <= end < math.inf:
        raise ValueError(f"expected the times of a segment as 0 <= start <= end, got {start:g} and {end:g} seconds.")
    first = round(start * 1000)
    last = max(first + 1, round(end * 1000))  # the format forbids cues that end where they start
    return f"{_timestamp(first)} --> {_timestamp(last)}\n{html.escape(_one_line(segment.caption), quote=False)}\n"


def _one_line(text: str) -> str:
    """`text` with single spaces where it has control characters, line breaks or other white space."""
    return " ".join("".join(" " if unicodedata.category(letter) in BREAKS else letter for letter in text).split())


def _timestamp(milliseconds: int) -> str:
    seconds, milliseconds = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:02d}:{minutes:02d}:{seconds:02d}.{milliseconds:03d}"
