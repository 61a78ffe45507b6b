"""`coca-video transcode SOURCE --out DIR`: videos made small and quick to sample."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from coca_video.cli.arguments import parse_options, say
from coca_video.data.workers import num_usable_cpus

if TYPE_CHECKING:
    from coca_video.data.transcode import TranscodeReport


@dataclass(frozen=True, kw_only=True)
class TranscodeOptions:
    """Makes H.264 files that are quick to sample from, of the same layout; the originals stay as they are.

    The same command again does only what is missing or has changed, also after an interruption.
    """

    source: tyro.conf.Positional[Path]
    """A folder of videos, at any depth; a manifest (CSV), of which a new one with the new paths is written too; or one
    video."""
    out: Path
    """Folder for the new files; outside of the originals."""
    short_side: int = 256
    """Pixels of the shorter side; smaller videos keep theirs."""
    gop: int = 16
    """Frames from key frame to key frame: fewer are quicker to sample from, and larger."""
    crf: int = 23
    """x264's quality: 0 loses least, 51 most."""
    preset: Literal["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"] = (
        "medium"
    )
    """x264's effort: slower gives smaller files."""
    num_workers: int = field(default_factory=num_usable_cpus)
    """Processes; the files are the same with any number."""
    timeout_seconds: float = 600.0
    """A video that takes longer counts as unreadable."""


def run(arguments: Sequence[str]) -> int:
    """Transcodes, lists what could not be read. Status 1 when there was such a file."""
    options = parse_options(TranscodeOptions, verb="transcode", arguments=arguments)
    if options.num_workers < 1:
        raise ValueError(f"--num-workers must be at least 1; got {options.num_workers}.")
    if not options.timeout_seconds > 0:
        raise ValueError(f"--timeout-seconds must be above 0; got {options.timeout_seconds:g}.")
    from coca_video.data.decode.write import TranscodeConfig
    from coca_video.data.transcode import JOURNAL, MANIFEST, plan_transcode, run_transcode
    from coca_video.train.loop import progress_bar

    config = TranscodeConfig(short_side=options.short_side, gop=options.gop, crf=options.crf, preset=options.preset)
    plan = plan_transcode(options.source, out=options.out)
    try:
        with progress_bar("transcoding", total=len(plan.jobs)) as bar:

            def on_done(report: "TranscodeReport") -> None:
                bar.set_postfix_str(_sizes(report), refresh=False)
                bar.update()

            report = run_transcode(
                plan,
                config=config,
                num_workers=options.num_workers,
                timeout_seconds=options.timeout_seconds,
                on_done=on_done,
            )
    except KeyboardInterrupt as stopped:
        if not (options.out / JOURNAL).is_file():
            raise
        raise KeyboardInterrupt(
            f"Interrupted; what was transcoded is kept in {options.out}: the same command goes on from there."
        ) from stopped
    print(f"transcoded  {report.num_done:,} files: {_sizes(report)}")
    print(f"kept        {report.num_kept:,} files that were there")
    print(f"unreadable  {len(report.unreadable):,} files")
    if plan.manifest is not None:
        num_left_out = sum(row.path in report.unreadable for row in plan.manifest.rows)
        if num_left_out == len(plan.manifest.rows):
            say(f"No {MANIFEST} was written: none of its clips can be read.")
        else:
            left_out = f", without the {num_left_out} clips of unreadable files" if num_left_out else ""
            say(f"{options.out / MANIFEST} names the new files{left_out}.")
    for cause in report.unreadable.values():
        say(f"  {cause}")
    return 1 if report.unreadable else 0


def _sizes(report: "TranscodeReport") -> str:
    return f"{_size(report.bytes_in)} in, {_size(report.bytes_out)} out"


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.3f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3f} MB"
