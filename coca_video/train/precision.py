"""The precision of a training step, applied from outside the model."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["fp32", "bf16"]

# The CPU's fused attention is slow backward in bf16 where sequences are short: forward and backward took 79 ms against
# 32 ms in plain matrix products at 64 tokens (batch 128, 6 heads of 32), 143 against 108 at 144 (32, 12 heads of 64),
# 160 against 163 at 160, and 371 against 669 at 196 (one thread of an AMD EPYC, torch 2.15). In fp32 it is the faster.
MAX_TOKENS_FOR_PLAIN_ATTENTION = 144


@contextmanager
def autocast(device: torch.device, *, precision: Precision, num_tokens: int | None) -> Iterator[None]:
    """Runs a model's forward in `precision`: bf16 is autocast, weights and losses stay fp32.

    `num_tokens` is the longest sequence that attends to itself; a short one takes plain attention on a CPU.
    """
    half = precision == "bf16"
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, dtype=torch.bfloat16, enabled=half))
        if half and device.type == "cpu" and num_tokens is not None and num_tokens <= MAX_TOKENS_FOR_PLAIN_ATTENTION:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        yield
