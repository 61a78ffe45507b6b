"""CoCa's recipes for classifiers, Table 9 of its appendix (arXiv 2205.01917), frozen and fine-tuned."""

from pathlib import Path
from typing import Literal

from coca_video.data.augment import AugmentConfig
from coca_video.train.loop import LoopConfig
from coca_video.train.optim import OptimConfig
from coca_video.train.probe_config import ClipsConfig, Finetune, Frozen, PretrainedEncoder, ProbeConfig

Data = Literal["imagenet", "kinetics", "moments_in_time"]

# The encoder's rate: section 4.2.1 says 1e-4 for fine-tuning on video, Table 9 says 5e-4, as for the pooler.
TEXT_RATE_FACTOR, TABLE_RATE_FACTOR = 0.2, 1.0


def table9(
    data: Data, *, encoder: str, clips: ClipsConfig, out: Path, finetune: bool, micro_batch_size: int | None = None
) -> ProbeConfig:
    """The probe of a column of Table 9; Kinetics-400, 600 and 700 share theirs.

    What is the paper's: the optimizer and its figures, steps, batch, warm-up, decay, averaging, label smoothing,
    RandAugment, one query. What it leaves open is our choice: 16 frames spread over the whole video, crops of half the
    area or more, a flip where the class permits it, the encoder's own image size (288 px for the paper's sizes), one
    central view at the test (`coca-video evaluate --protocol` takes more). Where it contradicts itself, the fine-tuned
    encoder's rate on video, the text's 1e-4 stands here; --tuning.rate-factor 1.0 is the table's 5e-4.

    A fine-tuned run keeps 2% of the training clips back and saves the weights that did best on them; the paper does
    not say which it took.
    """
    images = data == "imagenet"
    smoothing = {"imagenet": 0.5 if finetune else 0.2, "kinetics": 0.1, "moments_in_time": 0.0}
    rand_augment = AugmentConfig(rand_augment_num_ops=2, rand_augment_magnitude=20)
    steps = 200_000 if images else 120_000
    return ProbeConfig(
        encoder=PretrainedEncoder(model=encoder),
        clips=clips,
        out=out,
        num_frames=1 if images else 16,
        tuning=_finetune(TABLE_RATE_FACTOR if images else TEXT_RATE_FACTOR) if finetune else Frozen(),
        micro_batch_size=micro_batch_size,
        keep_best=finetune,
        augmentation=rand_augment if images else AugmentConfig(),
        label_smoothing=smoothing[data],
        optim=OptimConfig(
            algorithm="adafactor",
            learning_rate=5e-4,
            schedule="cosine",
            weight_decay=0.01 if images else 0.0,
            beta1=0.9,
            beta2=0.999,
            warmup_steps=0 if images else 1_000,
            gradient_clip=1.0,
            ema_decay=0.9999,
        ),
        loop=LoopConfig(
            steps=steps,
            batch_size=512 if images else 128,
            precision="bf16",
            log_every=100,
            checkpoint_every=1_000,
            evaluate_every=5_000 if finetune else 0,
            num_workers=8,
        ),
    )


def _finetune(rate_factor: float) -> Finetune:
    return Finetune(rate_factor=rate_factor, activation_checkpointing=True)
