"""Ranks: the process group, gathers and sums over it, and models that train on it; one process needs none of it."""

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Strategy = Literal["ddp", "fsdp2"]

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# What a model's transformer blocks stand in: ours are called `layers`, timm's `blocks`.
BLOCK_LISTS = ("layers", "blocks")


def rank() -> int:
    """This process' number, from 0; 0 without a process group."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """The number of processes; 1 without a process group."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


@contextmanager
def start_from_environment(device: torch.device) -> Iterator[torch.device]:
    """The process group that torchrun's variables describe, for the length of a `with`; yields the device to use.

    On cuda that is the GPU numbered LOCAL_RANK, with nccl, and gloo beside it for tensors on the CPU; on the CPU gloo.
    Without the variables there is no group, and within a group there is no second: `device` comes back as it is.
    ValueError when variables are missing or a GPU is.
    """
    if dist.is_initialized() or not any(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")):
        yield device
        return
    if missing := [name for name in TORCHRUN_VARIABLES if name not in os.environ]:
        raise ValueError(f"A start on several ranks also needs {', '.join(missing)} in the environment: use torchrun.")
    match device.type:
        case "cuda":
            device = _local_gpu(int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
        case "cpu":
            dist.init_process_group("gloo")
        case other:
            raise ValueError(f"Several ranks train on cuda or cpu; got the device {other}: choose one of these.")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _local_gpu(local_rank: int) -> torch.device:
    if local_rank >= torch.cuda.device_count():
        raise ValueError(
            f"Each rank needs a GPU of its own; got local rank {local_rank} and {torch.cuda.device_count()} GPUs here: "
            "give torchrun a smaller --nproc-per-node."
        )
    return torch.device("cuda", local_rank)


def barrier() -> None:
    """Returns once every rank has come here."""
    any_rank(False)


def any_rank(flag: bool) -> bool:  # noqa: FBT001, the flag is all there is to say
    """Whether `flag` holds on any rank; all of them get the same answer, and none waits for a GPU."""
    if not dist.is_initialized():
        return flag
    held = torch.tensor(int(flag))
    dist.all_reduce(held, op=dist.ReduceOp.MAX)
    return bool(held)


def gather_objects(value: Any) -> list[Any]:
    """`value` of every rank (whatever can be pickled), in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_main(action: Callable[[], object]) -> None:
    """Runs `action` on rank 0 while the others wait; its ValueError or OSError is raised on every rank."""
    wrong: ValueError | OSError | None = None
    if is_main():
        try:
            action()
        except (ValueError, OSError) as error:
            wrong = error
    if (wrong := gather_objects(wrong)[0]) is not None:
        raise wrong


def sum_over_ranks(tensor: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """The sum of `tensor` over ranks, without a gradient; `tensor` stays as it is."""
    if not dist.is_initialized():
        return tensor.detach()
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


def counts_of_ranks(count: int) -> list[int]:
    """`count` of every rank, in rank order. It goes by way of the CPU: no GPU's queue is stalled for it."""
    if not dist.is_initialized():
        return [count]
    counts = torch.zeros(world_size(), dtype=torch.int64)
    dist.all_gather_into_tensor(counts, torch.tensor([count]))
    return [int(number) for number in counts.tolist()]


def gather_with_gradient(
    x: Shaped[Tensor, "rows *rest"], *, counts: list[int] | None = None
) -> Shaped[Tensor, "all_rows *rest"]:
    """The rows of all ranks, in rank order; backward sums over ranks the gradient of this rank's rows.

    Ranks may hold different numbers of rows, none included. `counts` is `counts_of_ranks(len(x))` for a caller that
    has it. Every rank has to go backward through it if one does.
    """
    if not dist.is_initialized():
        return x
    counts = counts_of_ranks(len(x)) if counts is None else counts
    assert counts[rank()] == len(x), f"this rank has {len(x)} rows, counts say {counts[rank()]}"
    gathered: Tensor = _Gather.apply(x, counts)
    return gathered


class _Gather(torch.autograd.Function):
    """All-gather of rows; its transpose is a reduce-scatter. Collectives want equal shapes: short ranks are padded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, counts: list[int]) -> Tensor:
        ctx.counts = counts
        rows = max(counts)
        padded = x.new_empty(len(counts) * rows, *x.shape[1:])
        if rows:
            dist.all_gather_into_tensor(padded, _pad(x, rows=rows))
        if all(count == rows for count in counts):
            return padded
        return torch.cat([part[:count] for part, count in zip(torch.split(padded, rows), counts, strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        counts = ctx.counts
        rows, own = max(counts), counts[rank()]
        summed = gradient.new_empty(rows, *gradient.shape[1:])
        if rows:
            padded = torch.cat([_pad(part, rows=rows) for part in torch.split(gradient, counts)])
            dist.reduce_scatter_tensor(summed, padded)
        return summed[:own], None


def _pad(x: Tensor, *, rows: int) -> Tensor:
    """`x` with zeros below, up to `rows` rows; contiguous, as collectives want it."""
    if len(x) == rows:
        return x.contiguous()
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])


def parallelize(model: nn.Module, *, strategy: Strategy, methods: tuple[str, ...] = ()) -> nn.Module:
    """The module to call in place of `model`, whose backward leaves the mean over ranks in the gradients.

    Args:
        model: on its device; all ranks go on with rank 0's weights. Build the optimizer afterwards, from `model`.
        strategy: "ddp" keeps all weights on every rank and wraps `model`, so that only calls of the wrapper are
            averaged. "fsdp2" shards them in place, each block of a list named `layers` or `blocks` by itself
            and the rest together, for models that do not fit.
        methods: what is called from outside beside `forward` and reads weights: fsdp2 gathers them for it too.

    One process without a group gets `model` back.
    """
    if not dist.is_initialized():
        return model
    match strategy:
        case "ddp":
            return DistributedDataParallel(model, gradient_as_bucket_view=True)
        case "fsdp2":
            return _shard(model, methods=methods)


def stays_whole(parameter: Tensor) -> bool:
    """Whether fsdp2 leaves a parameter whole on every rank: a scalar, or a tensor of one row.

    A scalar cannot be sharded; a row that is (a position embedding [1, tokens, dim]), Adafactor cannot factor.
    """
    return parameter.ndim == 0 or len(parameter) == 1


def _shard(model: nn.Module, *, methods: tuple[str, ...]) -> nn.Module:
    if any(isinstance(module, _BatchNorm) for module in model.modules()):
        raise ValueError("The model has batch norms, whose statistics fsdp2 would leave apart on every rank; take ddp.")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            dist.broadcast(tensor, src=0)
    # Every rank has the gradients of its own for what stays whole: they are averaged as DDP would.
    whole = {parameter for parameter in model.parameters() if stays_whole(parameter)}
    for parameter in whole:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)  # type: ignore[no-untyped-call]
    mesh = init_device_mesh(next(model.parameters()).device.type, (world_size(),))
    for block in reversed(list(_blocks(model))):  # a block inside a block (Swin) comes before it
        fully_shard(block, mesh=mesh, ignored_params=whole)
    fully_shard(model, mesh=mesh, ignored_params=whole)
    _gather_weights_for(model, methods=methods)
    return model


def _blocks(model: nn.Module) -> Iterator[nn.Module]:
    for name, module in model.named_modules():
        if name.split(".")[-1] in BLOCK_LISTS and isinstance(module, nn.ModuleList | nn.Sequential):
            yield from module.children()


def _average_gradient(parameter: Tensor) -> None:
    """What has been averaged already stays: it is the same on all ranks. So gradients may accumulate."""
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def _gather_weights_for(model: nn.Module, *, methods: tuple[str, ...]) -> None:
    """Has FSDP2 gather the weights around `methods`, where they are not called by `forward` or by one another.

    The outermost call has gathered them. FSDP2 would take the end of an inner one for the end of the forward, and no
    longer gather the blocks that follow ahead of their turn.
    """
    depth = 0

    def counted(outermost: Callable[..., Any], *, inner: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += 1
            try:
                return (outermost if depth == 1 else inner)(*args, **kwargs)
            finally:
                depth -= 1

        return call

    for name in methods:
        inner = getattr(model, name)
        register_fsdp_forward_method(model, name)
        setattr(model, name, counted(getattr(model, name), inner=inner))
    if methods:
        setattr(model, "forward", counted(model.forward, inner=model.forward))  # noqa: B010, mypy knows it as a method


def forget_gathered_weights(model: nn.Module) -> None:
    """Has FSDP2 gather a model's weights anew: after a forward without a backward it keeps what it gathered."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_model(model: ModuleT, *, fresh: Callable[[], ModuleT]) -> ModuleT:
    """`model` itself, or where it is sharded one from `fresh` with its whole weights, on the CPU. All ranks call it."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    forget_gathered_weights(model)
    state = {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()
        for name, tensor in model.state_dict().items()
    }
    whole = fresh()
    whole.load_state_dict(state)
    return whole
