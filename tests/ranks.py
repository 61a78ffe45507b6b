"""Runs a function of a test file on several ranks, started as torchrun would start them: real processes, gloo, CPU.

The ranks are fresh interpreters, so `function` is found again by its file and its name, and arguments and results are
pickled. The store that ranks meet at lives in the test's own process, on a port that the system picks.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

REPOSITORY = Path(__file__).resolve().parents[1]
POLL_SECONDS = 0.05
GRACE_SECONDS = 10.0


def on_ranks(
    function: Callable[..., Any], *, num_ranks: int = 2, limit_seconds: float = 300, **arguments: Any
) -> list[Any]:
    """What `function(**arguments)` returned on each rank, in rank order.

    RuntimeError with the output of those that failed, tracebacks included; TimeoutError after `limit_seconds`.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    file, name = function.__code__.co_filename, function.__qualname__
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "call").write_bytes(pickle.dumps((file, name, arguments)))
        ranks = [_start(rank, num_ranks=num_ranks, port=store.port, folder=Path(folder)) for rank in range(num_ranks)]
        try:
            _wait(ranks, folder=Path(folder), deadline=time.monotonic() + limit_seconds)
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        return [pickle.loads(Path(folder, f"result{rank}").read_bytes()) for rank in range(num_ranks)]


def _start(rank: int, *, num_ranks: int, port: int, folder: Path) -> subprocess.Popen[bytes]:
    variables = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        "OMP_NUM_THREADS": 1,
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
    }
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    with Path(folder, f"output{rank}").open("wb") as output:
        command = [sys.executable, __file__, str(folder)]
        return subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)


def _wait(ranks: list[subprocess.Popen[bytes]], *, folder: Path, deadline: float) -> None:
    """Until all ranks have ended well, or some have not."""
    while None in (statuses := [rank.poll() for rank in ranks]) and not any(statuses):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Ranks {[rank for rank, status in enumerate(statuses) if status is None]} never ended.")
        time.sleep(POLL_SECONDS)
    if not any(statuses):
        return
    # The others fail too, of a lost connection, or wait for ever. They may be first: the one at fault disconnects
    # before it prints its traceback.
    grace_ends = time.monotonic() + GRACE_SECONDS
    while None in (statuses := [rank.poll() for rank in ranks]) and time.monotonic() < grace_ends:
        time.sleep(POLL_SECONDS)
    outputs = [
        f"Rank {rank} ended with status {status}:\n{Path(folder, f'output{rank}').read_text()}"
        for rank, status in enumerate(statuses)
        if status
    ]
    raise RuntimeError("\n".join(outputs))


def _run(folder: Path) -> None:
    """A rank: calls the function inside the process group and leaves its result in `folder`."""
    from jaxtyping import install_import_hook

    with install_import_hook("coca_video", "beartype.beartype"):  # as in the test's own process
        from coca_video.distributed import rank, start_from_environment

        file, name, arguments = pickle.loads((folder / "call").read_bytes())
        spec = importlib.util.spec_from_file_location("rank_functions", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        with start_from_environment(torch.device("cpu")):
            result = getattr(module, name)(**arguments)
            (folder / f"result{rank()}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
