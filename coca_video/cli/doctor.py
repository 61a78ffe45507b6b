"""`coca-video doctor [FILE]`: what works on this machine, and what a video file is."""

import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from coca_video.cli.arguments import parse_options, say
from coca_video.data.workers import num_usable_cpus

# In the order of printing; the second ones are forks that install the same module.
PACKAGES = (
    "torch",
    "torchvision",
    "torchcodec",
    "decord",
    "eva-decord",
    "decord2",
    "av",
    "timm",
    "numpy",
    "pytorchvideo",
    "fsspec",
)
FORKS = ("eva-decord", "decord2")
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Says what works on this machine: versions, decoders, FFmpeg, GPU, disk; with FILE, what that video is."""

    file: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[FILE]")] = None
    """A video file, or its URL, to describe: its streams, which decoders read it and why others do not, what is odd
    about it."""
    json: bool = False
    """One JSON object instead of text."""


def run(arguments: Sequence[str]) -> int:
    """Looks and prints. Status 1 when `auto` has no decoder that works here, or the file cannot be read."""
    options = parse_options(DoctorOptions, verb="doctor", arguments=arguments)
    report: dict[str, Any] = {
        "versions": _versions(),
        "decoders": _decoders(),
        "ffmpeg": _ffmpeg(),
        "machine": _machine(),
    }
    decoders = report["decoders"]
    healthy = decoders["environment_error"] is None and any(
        decoders["proven"][name] is None for name in decoders["auto_order"]
    )
    if options.file is not None:
        report["file"] = _file(options.file if "://" in options.file else Path(options.file))
        healthy = healthy and report["file"]["backends"]["auto"]["error"] is None
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        _print(report)
    return 0 if healthy else 1


def _versions() -> dict[str, str | None]:
    """None: not installed. By the packages' metadata, since importing them takes seconds, or fails."""
    from coca_video import __version__

    found: dict[str, str | None] = {"coca_video": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name not in FORKS:
                found[name] = None
    return found


def _decoders() -> dict[str, Any]:
    """proven: None, or why not. auto_order: what `auto` tries here, the first that reads a file exactly taking it.

    H.264 and HEVC that PyAV reads fastest are its own, whatever the order (`fastest_by_pyav`).
    """
    from coca_video.data.decode import BACKENDS, prove
    from coca_video.data.decode.open import ENVIRONMENT, choose_backend

    named: str | None = os.environ.get(ENVIRONMENT) or None
    proven = {name: prove(name) for name in BACKENDS}
    try:
        chosen, error = choose_backend("auto"), None
        order = [name for name in BACKENDS if proven[name] is None] if chosen == "auto" else [chosen]
    except ValueError as wrong:  # then nothing opens by auto, whatever works
        order, error = [], str(wrong)
    return {"proven": proven, "environment": {ENVIRONMENT: named}, "environment_error": error, "auto_order": order}


def _ffmpeg() -> dict[str, Any]:
    from coca_video.data.decode.describe import ffmpeg_versions

    program = shutil.which("ffmpeg")
    return {"program": program, "version": program and _program_version(program), "libraries": ffmpeg_versions()}


def _program_version(program: str) -> str | None:
    try:
        done = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    found = re.match(r"ffmpeg version (\S+)", done.stdout)
    return found and found[1]


def _machine() -> dict[str, Any]:
    import torch

    gpus = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "num_cpus": os.cpu_count(),
        "num_cpus_usable": num_usable_cpus(),
        "memory_bytes": _memory_bytes(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus],
        "free_disk_bytes": {
            str(folder): shutil.disk_usage(folder).free for folder in (Path.cwd(), Path(tempfile.gettempdir()))
        },
    }


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):  # Windows, or a system without these names
        return None


def _file(source: Path | str) -> dict[str, Any]:
    """facts: None with `error` for what is no video. backends: who reads it, by name, or the reason it gives."""
    from coca_video.data.decode import BACKENDS
    from coca_video.data.decode.describe import describe

    if isinstance(source, Path) and source.is_dir():  # the decoders read files; what they say of a folder is no finding
        error: str | None = f"{source}: a folder, whose images are read as the frames of one video"
        return {"facts": None, "error": error, "backends": {"auto": _open(source, backend="auto")}}
    facts, error = None, None
    try:
        facts = asdict(describe(source))
    except ValueError as unreadable:  # UnreadableVideo, or a URL of an unknown kind
        error = str(unreadable)
    names: tuple[Literal["auto", "torchcodec", "decord", "pyav"], ...] = ("auto", *BACKENDS)
    return {"facts": facts, "error": error, "backends": {name: _open(source, backend=name) for name in names}}


def _auto(decoders: dict[str, Any]) -> str:
    """What `auto` does here, in words."""
    order, (named, *_) = decoders["auto_order"], decoders["environment"].values()
    if order and named in (None, "auto"):
        return f"takes pyav for most H.264 and HEVC, else tries {', '.join(order)}"
    return f"tries {', '.join(order) or 'nothing'}"


def _open(source: Path | str, *, backend: Literal["auto", "torchcodec", "decord", "pyav"]) -> dict[str, str | None]:
    """Opened, and three frames really decoded."""
    from coca_video.data.decode import open_video

    try:
        with open_video(source, backend=backend) as reader:
            reader.frames([0, reader.num_frames // 2, reader.num_frames - 1])
            return {"read_by": reader.backend, "error": None}
    except ValueError as error:  # UnreadableVideo is one too
        return {"read_by": None, "error": str(error)}


def _print(report: Mapping[str, Any]) -> None:
    for name, number in report["versions"].items():
        print(f"{name:<16}{number or 'not installed'}")
    decoders = report["decoders"]
    print("\ndecoders")
    for name, cause in decoders["proven"].items():
        print(f"  {name:<14}{cause or 'proven: it decodes a known clip rightly'}")
    (environment, named), *_ = decoders["environment"].items()
    print(f"  {environment} is {named or 'not set'}; auto {_auto(decoders)}")
    if decoders["environment_error"] is not None:
        say(f"coca-video doctor: {decoders['environment_error']}")
    ffmpeg, machine = report["ffmpeg"], report["machine"]
    print(f"\nFFmpeg          {ffmpeg['version'] or 'no program'} {ffmpeg['program'] or ''}".rstrip())
    for name, libraries in ffmpeg["libraries"].items():
        print(f"  {name:<14}{libraries}")
    print(f"\nplatform        {machine['platform']}")
    print(f"CPUs            {machine['num_cpus']}, of which this process may use {machine['num_cpus_usable']}")
    print(f"memory          {_gib(machine['memory_bytes'])}")
    for gpu in machine["gpus"] or [None]:
        print(f"GPU             {'none' if gpu is None else gpu['name'] + ', ' + _gib(gpu['memory_bytes'])}")
    for folder, free in machine["free_disk_bytes"].items():
        print(f"free disk       {_gib(free)} in {folder}")
    if "file" in report:
        _print_file(report["file"])


def _gib(num_bytes: int | None) -> str:
    return "unknown" if num_bytes is None else f"{num_bytes / GIB:.1f} GiB"


def _print_file(file: Mapping[str, Any]) -> None:
    print()
    facts = file["facts"]
    if facts is None:
        print(file["error"])
    else:
        _print_facts(facts)
    print("read by")
    for name, answer in file["backends"].items():
        by = f"yes, by {answer['read_by']}" if name == "auto" else "yes"
        print(f"  {name:<14}{by if answer['error'] is None else answer['error']}")


def _print_facts(facts: Mapping[str, Any]) -> None:
    print(facts["name"])
    profile = f" ({facts['profile']})" if facts["profile"] else ""
    streams = f"{facts['num_video_streams']} video, {len(facts['audio_codecs'])} audio"
    if facts["audio_codecs"]:
        streams += f" ({', '.join(facts['audio_codecs'])})"
    keys = f"{len(facts['key_frames'])}, at most {facts['key_frame_spacing']} frames apart"
    lines = {
        "container": f"{facts['container']}, {facts['num_bytes']:,} bytes",
        "codec": f"{facts['codec']}{profile}, {facts['pixel_format']}, {facts['bit_depth']} bits",
        "streams": streams,
        "size": f"{facts['height']} x {facts['width']} (height x width), turned by {facts['rotation_degrees']} degrees",
        "frames": f"{facts['num_frames']} (its header: {facts['header_num_frames'] or 'no count'})",
        "rate": f"{facts['frames_per_second']:.3f} a second (its header: {facts['header_frames_per_second']:.3f})",
        "duration": f"{facts['duration_seconds']:.3f} s",
        "key frames": keys,
    }
    for name, text in lines.items():
        print(f"  {name:<14}{text}")
    print("odd about it" + ("" if facts["oddities"] else "    nothing"))
    for oddity in facts["oddities"]:
        print(f"  {oddity}")
