"""The classifier that a probe trains: an encoder from somewhere, a fresh head, and what of the encoder learns."""

from dataclasses import replace

import torch

from coca_video.hub import Saved, load
from coca_video.models.adapt import (
    add_lora,
    checkpoint_activations,
    layer_rate_factors,
    merge_lora,
    set_drop_path,
)
from coca_video.models.coca import CoCa
from coca_video.models.head import VideoHead, contrastive_head, start_from_contrastive_pooler
from coca_video.models.image import resize_encoder
from coca_video.models.video import VideoClassifier, VideoClassifierConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import Finetune, Frozen, Lora, PretrainedEncoder, ProbeConfig, RandomEncoder


def load_pretrained(encoder: PretrainedEncoder | RandomEncoder) -> Saved | None:
    """The model that the encoder comes from; None for a random one."""
    match encoder:
        case PretrainedEncoder(model=source):
            return load(source)
        case RandomEncoder():
            return None


def build_classifier(config: ProbeConfig, *, num_classes: int, pretrained: Saved | None = None) -> VideoClassifier:
    """A classifier with a fresh head on the config's encoder, which is frozen and at the config's image size.

    `pretrained` is what `load_pretrained(config.encoder)` gives, where it is at hand. `tune` comes after.
    """
    pretrained = load_pretrained(config.encoder) if pretrained is None else pretrained
    if pretrained is not None:
        image = pretrained.encoder.config
    else:
        assert isinstance(config.encoder, RandomEncoder)
        image = config.encoder.image
    coca = _coca(pretrained) if config.init_pooler == "contrastive" else None
    head = config.head if coca is None else contrastive_head(config.head, coca=coca)
    torch.manual_seed(config.loop.seed)
    model = VideoClassifier(
        VideoClassifierConfig(
            image=image,
            num_classes=num_classes,
            num_frames=config.num_frames,
            stride=config.stride,
            clip_seconds=config.clip_seconds,
            head=head,
        )
    )
    if pretrained is not None:
        model.encoder.load_state_dict(pretrained.encoder.state_dict())
    if config.image_size is not None and config.image_size != image.image_size:
        resize_encoder(model.encoder, image_size=config.image_size)
        model.config = replace(model.config, image=model.encoder.config)
    model.encoder.requires_grad_(False).eval()
    model.head = fresh_head(model, seed=config.loop.seed)
    if coca is not None:
        start_from_contrastive_pooler(model.head, coca=coca)
    return model


def _coca(pretrained: Saved | None) -> CoCa:
    if pretrained is None or not isinstance(pretrained.model, CoCa):
        found = "no model" if pretrained is None else f"a {type(pretrained.model).__name__}"
        raise ValueError(
            f"--init-pooler contrastive takes the pooler of a CoCa, and the encoder comes from {found}; "
            "name a CoCa as the encoder, or take --init-pooler random."
        )
    return pretrained.model


def fresh_head(model: VideoClassifier, *, seed: int) -> VideoHead:
    """A head like the model's with weights that the seed alone decides, however the encoder was made."""
    torch.manual_seed(seed)
    config = model.config
    return VideoHead(
        config.head,
        dim=model.encoder.width,
        num_heads=model.encoder.num_heads,
        num_classes=config.num_classes,
        num_frames=config.num_frames,
    )


def tune(model: VideoClassifier, *, config: ProbeConfig) -> None:
    """Makes of the frozen encoder what `config.tuning` trains, in place."""
    match config.tuning:
        case Frozen():
            return
        case Finetune(drop_path=drop_path):
            model.encoder.requires_grad_(True)
            if drop_path:
                set_drop_path(model.encoder, rate=drop_path)
        case Lora(rank=rank, alpha=alpha):
            add_lora(model.encoder, rank=rank, alpha=alpha, seed=config.loop.seed)
    if layers := model.encoder.check_layers(config.head.encoder_layers):
        # DDP waits for a gradient of all that is free, and these blocks are not run.
        for block in model.encoder.blocks()[max(layers) + 1 :]:
            block.requires_grad_(False)
    if config.tuning.activation_checkpointing:
        checkpoint_activations(model.encoder)


def untuned(model: VideoClassifier, *, config: ProbeConfig) -> VideoClassifier:
    """`model` with weights of the names and shapes that `build_classifier` gives, to be saved; changed in place."""
    if isinstance(config.tuning, Lora):
        merge_lora(model.encoder)
    return model


def tuned_optim(model: VideoClassifier, *, config: ProbeConfig) -> OptimConfig:
    """`config.optim` with the rates that `config.tuning` gives the encoder and its layers; its own factors win."""
    tuning = config.tuning
    if isinstance(tuning, Frozen):
        return config.optim
    factors = {"encoder": tuning.rate_factor}
    if isinstance(tuning, Finetune) and tuning.layer_decay != 1:
        of_layers = layer_rate_factors(model.encoder, decay=tuning.layer_decay)
        factors = {name: tuning.rate_factor * factor for name, factor in of_layers.items()}
    return replace(config.optim, rate_factors=factors | config.optim.rate_factors)
