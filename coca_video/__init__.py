"""coca_video: CoCa, an image-text model, pretrained on pairs and put to work on video action recognition."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from coca_video.hub import load as load

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> object:
    """`coca_video.load` on first use (PEP 562): `import coca_video` alone loads no torch."""
    if name != "load":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from coca_video.hub import load

    return load
