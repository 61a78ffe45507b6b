"""The process group and its collectives, against plain sums; whole models on ranks are in test_parallelize.py."""

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coca_video import distributed
from coca_video.distributed import (
    any_rank,
    barrier,
    counts_of_ranks,
    gather_objects,
    gather_with_gradient,
    is_main,
    parallelize,
    rank,
    start_from_environment,
    sum_over_ranks,
    world_size,
)
from tests.ranks import on_ranks


@pytest.fixture
def no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in distributed.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("no_torchrun")
def test_one_process_needs_no_group() -> None:
    x, model = torch.arange(6.0).reshape(3, 2), nn.Linear(2, 2)
    with start_from_environment(torch.device("cpu")) as device:
        assert device == torch.device("cpu") and not torch.distributed.is_initialized()
        assert (rank(), world_size(), is_main()) == (0, 1, True)
        assert torch.equal(gather_with_gradient(x), x) and torch.equal(sum_over_ranks(x), x)
        assert (any_rank(True), any_rank(False)) == (True, False)
        assert gather_objects("a") == ["a"] and counts_of_ranks(3) == [3]
        assert parallelize(model, strategy="ddp") is model and parallelize(model, strategy="fsdp2") is model
        barrier()


@pytest.mark.usefixtures("no_torchrun")
@pytest.mark.parametrize(
    ("device", "variables", "sentence"),
    [
        ("cpu", ("RANK",), "needs WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT in the environment"),
        ("mps", distributed.TORCHRUN_VARIABLES, "train on cuda or cpu; got the device mps"),
        ("cuda", distributed.TORCHRUN_VARIABLES, "got local rank 1 and 1 GPUs here"),
    ],
)
def test_a_start_that_cannot_be_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, device: str, variables: tuple[str, ...], sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name in variables:
        monkeypatch.setenv(name, "1")
    with pytest.raises(ValueError, match=sentence), start_from_environment(torch.device(device)):
        pass


ROWS = ((3, 0, 2), (2, 2, 2), (0, 0, 0), (0, 1, 0))  # of three ranks


def rows_of(owner: int, *, count: int) -> Tensor:
    """Rows [count, 2, 2] that tell whose they are."""
    return torch.arange(count * 4.0).reshape(count, 2, 2) + 100.0 * (owner + 1)


def factors_of(owner: int, *, total: int) -> Tensor:
    """What rank `owner` multiplies the gathered rows with before its sum, [total, 2, 2]."""
    return torch.arange(total * 4.0).reshape(total, 2, 2) * 10.0**owner


def collectives() -> dict[str, Any]:
    """Every collective once; runs on ranks."""
    me, gathers = rank(), []
    for counts in ROWS:
        x = rows_of(me, count=counts[me]).requires_grad_()
        gathered = gather_with_gradient(x)
        (gathered * factors_of(me, total=sum(counts))).sum().backward()
        gathers.append((gathered.detach(), x.grad))
    summand = torch.tensor([me, 1.5], requires_grad=True)
    total = sum_over_ranks(summand)
    barrier()
    return {
        "gathers": gathers,
        "who": (me, world_size(), is_main()),
        "sum": (total, total.requires_grad, summand.detach()),
        "any": (any_rank(me == 1), any_rank(False)),
        "objects": gather_objects({"rank": me}),
        "counts": counts_of_ranks(me * 10),
    }


@pytest.mark.slow
def test_collectives_on_three_ranks() -> None:
    ranks = on_ranks(collectives, num_ranks=3)
    for me, result in enumerate(ranks):
        assert result["who"] == (me, 3, me == 0)
        assert result["any"] == (True, False)
        assert result["objects"] == [{"rank": 0}, {"rank": 1}, {"rank": 2}]
        assert result["counts"] == [0, 10, 20]
        total, has_gradient, summand = result["sum"]
        assert total.tolist() == [3.0, 4.5] and not has_gradient and summand.tolist() == [me, 1.5]
        for counts, (gathered, gradient) in zip(ROWS, result["gathers"], strict=True):
            expected = torch.cat([rows_of(owner, count=count) for owner, count in enumerate(counts)])
            assert torch.equal(gathered, expected), counts
            factors = sum(factors_of(owner, total=sum(counts)) for owner in range(3))
            start = sum(counts[:me])
            assert torch.equal(gradient, factors[start : start + counts[me]]), counts  # type: ignore[index]


def fail_on_one_rank() -> None:
    """Rank 1 fails while rank 0 waits for it."""
    if rank() == 1:
        raise ValueError("the fault of rank 1")
    barrier()


def sleep() -> None:
    """Never ends within a test's patience."""
    time.sleep(600)


@pytest.mark.slow
def test_a_failing_rank_shows_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)Rank 1 ended.*in fail_on_one_rank.*the fault of rank 1"):
        on_ranks(fail_on_one_rank)


def test_a_rank_that_hangs_is_ended() -> None:
    with pytest.raises(TimeoutError, match=r"Ranks \[0, 1\] never ended"):
        on_ranks(sleep, limit_seconds=0.2)
