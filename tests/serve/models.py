"""Small models with random weights, ready to serve."""

from dataclasses import replace

import torch

from coca_video.hub import Saved
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.serve.models import ServedModel, served_model
from coca_video.tokenizer import train_tokenizer

CLASSES = ("slide", "spin", "pulse", "blink", "change_colour")
CAPTIONS = ("a red circle on the left", "a photo of a blue square", "two green stars on a grey background") * 4


def classifier(name: str = "probe", *, seed: int = 0, classes: tuple[str, ...] = CLASSES) -> ServedModel:
    """A VideoClassifier of 4 frames whose scores differ from clip to clip."""
    torch.manual_seed(seed)
    image = CoCaConfig.tiny().image
    model = VideoClassifier(VideoClassifierConfig(image=image, num_classes=len(classes), num_frames=4)).eval()
    torch.nn.init.normal_(model.head.classifier.weight)
    return _served(Saved(model=model, classes=classes), name=name)


def coca(name: str = "coca", *, seed: int = 0) -> ServedModel:
    """A CoCa with a vocabulary of its own, whose captions differ from clip to clip."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CAPTIONS, vocab_size=300, max_length=32)
    config = CoCaConfig.tiny()
    model = CoCa(replace(config, text=replace(config.text, vocab_size=tokenizer.vocab_size))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return _served(Saved(model=model, tokenizer=tokenizer), name=name)


def _served(saved: Saved, *, name: str) -> ServedModel:
    return served_model(
        saved, name=name, device=torch.device("cpu"), decoder="auto", num_frames=None, timeout_seconds=60.0
    )
