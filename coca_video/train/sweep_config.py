"""What a sweep is: one probe's clips and encoder, and the options that its many probes are to be tried with."""

import itertools
from dataclasses import dataclass, replace

from coca_video.models.head import HeadConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import Frozen, ProbeConfig

# V-JEPA 2 (arXiv 2506.09985; evals/video_classification_frozen) trains 20 heads at once, these rates x these decays.
VJEPA2_RATES = (5e-3, 3e-3, 1e-3, 3e-4, 1e-4)
VJEPA2_DECAYS = (0.01, 0.1, 0.4, 0.8)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Many probes trained in one pass over a frozen encoder; the one that does best on held-out clips is kept.

    The probes are the product of the options below, an empty one being `probe`'s own. They are numbered from 0, heads
    first, then label smoothings, learning rates and weight decays, which change fastest.
    """

    probe: ProbeConfig
    """What all probes share. The choice is made on its held-out part: --probe.clips.holdout-share."""
    learning_rates: tuple[float, ...] = ()
    """Peaks; all follow the same schedule."""
    weight_decays: tuple[float, ...] = ()
    """Each scaled by its probe's rate."""
    label_smoothings: tuple[float, ...] = ()
    """Shares of the target that are spread over all classes."""
    heads: tuple[HeadConfig, ...] = ()
    """All of them on the same encoder layers."""

    @classmethod
    def vjepa2(cls, probe: ProbeConfig) -> "SweepConfig":
        """V-JEPA 2's grid of 5 rates and 4 decays. (Its decay follows a cosine; ours stays.)"""
        return cls(probe=probe, learning_rates=VJEPA2_RATES, weight_decays=VJEPA2_DECAYS)

    def __post_init__(self) -> None:
        self._check_probe()
        self._check_lists()
        if len(layers := {head.encoder_layers for head in self.heads}) > 1:
            raise ValueError(
                f"The heads of a sweep share one read of the tokens, and these ask for {len(layers)} choices of "
                "encoder layers; give all of them the same, and sweep the others by themselves."
            )
        if len(self.probes) < 2:
            raise ValueError(
                "A sweep chooses among probes, and this is one; give several --learning-rates, --weight-decays or "
                "--label-smoothings, or train it with `coca-video probe`."
            )

    @property
    def probes(self) -> tuple[ProbeConfig, ...]:
        """Each probe as the run of its own that it equals. ValueError for an option out of its range."""
        probe = self.probe
        choices = (
            self.heads or (probe.head,),
            self.label_smoothings or (probe.label_smoothing,),
            self.learning_rates or (probe.optim.learning_rate,),
            self.weight_decays or (probe.optim.weight_decay,),
        )
        return tuple(
            replace(
                probe,
                head=head,
                label_smoothing=smoothing,
                optim=replace(probe.optim, learning_rate=rate, weight_decay=decay),
            )
            for head, smoothing, rate, decay in itertools.product(*choices)
        )

    def _check_probe(self) -> None:
        if not isinstance(self.probe.tuning, Frozen):
            raise ValueError(
                "A sweep trains many probes on one frozen encoder, and --probe.tuning trains the encoder; take frozen, "
                "or train each by itself with `coca-video probe`."
            )
        if not self.probe.clips.holdout_share:
            raise ValueError(
                "A sweep chooses its probe on a held-out part of the training clips, never on the test clips; give "
                "--probe.clips.holdout-share, such as 0.2."
            )

    def _check_lists(self) -> None:
        probe, optim = self.probe, OptimConfig()
        lists = {
            "learning_rates": (probe.optim.learning_rate, optim.learning_rate, "--probe.optim.learning-rate"),
            "weight_decays": (probe.optim.weight_decay, optim.weight_decay, "--probe.optim.weight-decay"),
            "label_smoothings": (probe.label_smoothing, ProbeConfig.label_smoothing, "--probe.label-smoothing"),
            "heads": (probe.head, HeadConfig(), "--probe.head"),
        }
        for name, (own, default, option) in lists.items():
            values, flag = getattr(self, name), f"--{name.replace('_', '-')}"
            if len(set(values)) != len(values):
                raise ValueError(f"{flag} takes different values; got {', '.join(map(str, values))}.")
            if values and own != default:
                raise ValueError(f"{option} does nothing where {flag} says what to try; leave one of them out.")
