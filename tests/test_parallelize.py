"""The whole CoCa trained on two ranks, under DDP and under FSDP2, against one process with the same global batch."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from coca_video.distributed import Strategy, forget_gathered_weights, parallelize, rank, whole_model, world_size
from coca_video.losses import contrastive_loss, global_mean
from coca_video.models.coca import CoCa, CoCaConfig
from coca_video.train.optim import update
from tests.ranks import on_ranks

Optimizer = Literal["sgd", "adamw"]

# Five pairs a step: rank 0 has three of them, rank 1 two with shorter captions, one of which has nothing to predict.
CAPTION_LENGTHS = ((9, 4, 7, 3, 1), (2, 6, 5, 12, 8), (3, 3, 3, 5, 2))  # of three steps
RUNS: tuple[tuple[Optimizer, int], ...] = (("sgd", 1), ("adamw", 3))
OF_ONE_ROW = {"log_scale", "contrastive_pooler.query", "encoder.model.pos_embed"}  # FSDP2 shards all but these
METHODS = ("encode_image", "encode_text", "logits")


def coca_batches(rows: slice) -> Iterator[dict[str, Tensor]]:
    """Those rows of each step's batch, padded to the longest caption among them."""
    generator = torch.Generator().manual_seed(7)
    for lengths in CAPTION_LENGTHS:
        images = torch.randn(5, 3, 48, 48, generator=generator)
        tokens = torch.randint(0, 512, (5, max(lengths)), generator=generator)
        longest = max(lengths[rows])
        mask = torch.arange(longest) < torch.tensor(lengths[rows]).unsqueeze(1)
        yield {"images": images[rows], "tokens": tokens[rows, :longest], "mask": mask}


def own_rows() -> slice:
    return slice(0, 5) if world_size() == 1 else (slice(0, 3), slice(3, 5))[rank()]


def coca_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """CoCa Eq. 4, with the weights of the paper."""
    out = model(batch["images"], tokens=batch["tokens"], mask=batch["mask"], z_loss_weight=1e-4)
    caption = global_mean(out.caption.loss_sum, count=out.caption.count)
    return contrastive_loss(out.image, text=out.text, scale=out.scale) + 2.0 * caption


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train_coca(strategy: Strategy, *, optimizer: Optimizer, steps: int) -> dict[str, Any]:
    """Losses, gradient norms, weights and what the methods give, after a few steps; runs on ranks or in one process."""
    torch.manual_seed(rank())  # other ranks' own weights must not matter
    model = CoCa(CoCaConfig.tiny())
    model.encoder.model.patch_embed.requires_grad_(False)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    to_call = parallelize(model, strategy=strategy, methods=METHODS)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # torch's fused step takes no DTensors and others in one group.
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if isinstance(p, DTensor) is sharded]} for sharded in (True, False)
    ]
    own_optimizer = (
        torch.optim.SGD(groups, lr=0.3)
        if optimizer == "sgd"
        else torch.optim.AdamW(groups, lr=1e-3, eps=1e-4, fused=True)
    )
    losses, norms = [], []
    for batch, _ in zip(coca_batches(own_rows()), range(steps), strict=False):
        loss = coca_loss(to_call, batch)
        norms.append(whole(update(own_optimizer, loss=loss, gradient_clip=1e9)))
        losses.append(loss.detach())
    model.eval()
    with torch.no_grad():
        # From outside, in another order than forward's, and one method that calls others.
        batch = next(coca_batches(slice(0, 5)))
        text, _ = model.encode_text(batch["tokens"], mask=batch["mask"])
        logits = model.logits(batch["images"], tokens=batch["tokens"], mask=batch["mask"])
        image, _ = model.encode_image(batch["images"])
    forget_gathered_weights(model)
    weights = {name: whole(parameter) for name, parameter in model.named_parameters()}
    shards = {name for name, parameter in model.named_parameters() if isinstance(parameter, DTensor)}
    outputs = {"text": text, "image": image, "logits": logits}
    copy = whole_model(model, fresh=lambda: CoCa(CoCaConfig.tiny()))
    assert (copy is model) == (not shards)
    return {
        "copy": {name: parameter.detach() for name, parameter in copy.named_parameters()},
        "losses": losses,
        "norms": norms,
        "weights": weights,
        "outputs": outputs,
        "shards": shards,
        "before": before,
    }


class Toy(nn.Module):
    """Calls one of its own methods in its forward, and has a scalar and tensors of one row, which are not sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3)])
        self.first, self.last = nn.Linear(2, 3), nn.Linear(3, 1)
        self.factor = nn.Parameter(torch.tensor(0.5))
        self.is_forward_running: bool | None = None

    def head(self, x: Tensor) -> Tensor:
        return self.factor * self.last(x)

    def forward(self, x: Tensor) -> Tensor:
        out = self.head(self.layers[0](self.first(x)).tanh())
        if world_size() > 1:  # by FSDP2's own account, which nothing public tells
            self.is_forward_running = self._get_fsdp_state()._state_ctx.iter_forward_root is not None
        return out


def accumulate_gradients() -> tuple[dict[str, Tensor], bool | None]:
    """The gradients of two backward passes together, and whether FSDP2 took the end of `head` for the forward's."""
    torch.manual_seed(0)
    model = parallelize(Toy(), strategy="fsdp2", methods=("head",))
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        x = torch.randn(4, 2, generator=generator)
        own = x if world_size() == 1 else x[2 * rank() : 2 * rank() + 2]
        model(own).square().mean().backward()
    gradients = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return gradients, model.is_forward_running


def train_all() -> tuple[list[dict[str, Any]], tuple[dict[str, Tensor], bool | None]]:
    """Both strategies with both optimizers, and the toy; runs on ranks."""
    coca = [
        train_coca(strategy, optimizer=optimizer, steps=steps)
        for strategy in ("ddp", "fsdp2")
        for optimizer, steps in RUNS
    ]
    return coca, accumulate_gradients()


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    """What `train_all` gives on each of two ranks."""
    return on_ranks(train_all)


@pytest.mark.slow
def test_accumulated_gradients_are_means_too_and_methods_end_no_forward(two_ranks: list[Any]) -> None:
    expected, _ = accumulate_gradients()
    assert len(expected) == 7 and min(float(gradient.abs().max()) for gradient in expected.values()) > 1e-3
    for _, (gradients, is_forward_running) in two_ranks:
        torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-7)
        assert is_forward_running is True


@pytest.mark.slow
def test_coca_on_two_ranks_equals_one_process(two_ranks: list[Any]) -> None:
    ranks = [coca for coca, _ in two_ranks]
    alone = [train_coca("ddp", optimizer=optimizer, steps=steps) for optimizer, steps in RUNS] * 2
    for run, (reference, *results) in enumerate(zip(alone, *ranks, strict=True)):
        strategy = ("ddp", "fsdp2")[run // 2]
        moved = {name: (reference["before"][name] - w).abs().max() for name, w in reference["weights"].items()}
        assert sum(change > 1e-4 for change in moved.values()) > 0.8 * len(moved)
        for index, loss in enumerate(reference["losses"]):
            mean = sum(result["losses"][index] for result in results) / 2
            torch.testing.assert_close(mean, loss, rtol=1e-5, atol=0)
        for result in results:
            torch.testing.assert_close(result["norms"], reference["norms"], rtol=1e-4, atol=0)
            torch.testing.assert_close(result["weights"], reference["weights"], rtol=0, atol=1e-5)
            torch.testing.assert_close(result["copy"], result["weights"], rtol=0, atol=0)
            torch.testing.assert_close(result["outputs"], reference["outputs"], rtol=0, atol=1e-4)
            assert result["shards"] == (set(moved) - OF_ONE_ROW if strategy == "fsdp2" else set())
