"""A demo in a process of its own, with small models; how it is started and where it keeps files is known here alone."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = (sys.executable, str(REPOSITORY / "app" / "demo.py"))
VERB = (sys.executable, "-m", "coca_video.cli", "demo")
FAULTY = (sys.executable, str(REPOSITORY / "tests" / "app" / "faulty.py"))
PRIVATE = "coca_video_demo_*"  # the folder that the demo makes below TMPDIR
HOST_OPTION, PORT_OPTION = "--server-name", "--server-port"
START_SECONDS = 180.0  # that no start here comes near


@dataclass(frozen=True, kw_only=True)
class Demo:
    """A demo that runs. temp, home, work: what it has as TMPDIR, HOME and working directory, empty when it started."""

    url: str
    port: int
    process: subprocess.Popen[str]
    temp: Path
    home: Path
    work: Path
    log: Path

    @property
    def folder(self) -> Path:
        """Where it keeps uploads and what is made of them."""
        (folder,) = self.temp.glob(PRIVATE)
        return folder

    @property
    def is_alive(self) -> bool:
        """Whether the server has not ended."""
        return self.process.poll() is None

    def output(self) -> str:
        """What it has printed until now, on both streams."""
        return self.log.read_text(encoding="utf-8")

    def end(self, number: int) -> int:
        """Sends a signal, as a terminal does to all processes (SIGINT) or as a container does to one; the status."""
        if number == signal.SIGINT:
            os.killpg(self.process.pid, number)
        else:
            self.process.send_signal(number)
        return self.process.wait(timeout=60)


@contextlib.contextmanager
def running(
    models: Sequence[Path],
    *,
    root: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    program: Sequence[str] = SCRIPT,
) -> Iterator[Demo]:
    """A demo on a free port, from its first answer on; it is killed at the end where it still runs then."""
    folders = {name: root / name for name in ("temp", "home", "work")}
    for folder in folders.values():
        folder.mkdir(parents=True)
    port = free_port()
    command = [*program, *(part for model in models for part in ("--model", str(model))), PORT_OPTION, str(port)]
    log = root / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [*command, *options],
            cwd=folders["work"],
            env=_environment(folders) | (environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    demo = Demo(url=f"http://127.0.0.1:{port}", port=port, process=process, log=log, **folders)
    try:
        _wait(demo)
        yield demo
    finally:
        if demo.is_alive:
            demo.end(signal.SIGTERM)
        shutil.rmtree(root / "temp", ignore_errors=True)


def _environment(folders: Mapping[str, Path]) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith(("GRADIO_", "COCA_VIDEO_DEMO"))}
    return own | {
        "TMPDIR": str(folders["temp"]),
        "HOME": str(folders["home"]),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # one that is set would be asked for what is on this machine, too
        "NO_PROXY": "127.0.0.1,localhost",
    }


def free_port() -> int:
    """One that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(demo: Demo) -> None:
    deadline = time.monotonic() + START_SECONDS
    while "The demo is at" not in demo.output():
        if not demo.is_alive or time.monotonic() > deadline:
            raise AssertionError(f"the demo did not start:\n{demo.output()}")
        time.sleep(0.1)


def children(process: int) -> set[int]:
    """The ids of all processes below one (Linux)."""
    found: set[int] = set()
    with contextlib.suppress(OSError):  # it has ended meanwhile
        for task in Path(f"/proc/{process}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child)} | children(int(child))
    return found


def resident_bytes(demo: Demo) -> dict[int, int]:
    """The memory that the server and each process below it holds, by process id (Linux)."""
    found = {}
    for number in {demo.process.pid} | children(demo.process.pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{number}/status").read_text()
            found[number] = 1024 * int(status.split("VmRSS:")[1].split()[0]) if "VmRSS:" in status else 0
    return found
