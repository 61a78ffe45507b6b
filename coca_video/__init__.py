"""coca_video: CoCa, an image-text model, pretrained on pairs and put to work on video action recognition."""

__version__ = "0.1.0.dev0"
