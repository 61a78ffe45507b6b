"""What a clip may be: of the standard library alone, so that the command line shows it without loading torch."""

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a clip may be, and what reading it may take; the first four are held against its header before decoding."""

    max_megabytes: float = 100.0
    """Size of the file, in 10^6 bytes."""
    max_seconds: float = 600.0
    """Length of the clip."""
    max_side: int = 4096
    """Pixels of the longer side."""
    max_frames: int = 40_000
    """Frames in the file."""
    read_seconds: float = 60.0
    """Reading a clip may take this long; then its process is ended."""
    read_megabytes: float = 2000.0
    """Memory that reading a clip may take on top of what the process has, in 10^6 bytes."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"expected --{name.replace('_', '-')} above 0 and finite, got {value:g}")
