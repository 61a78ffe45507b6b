"""The demo, with processes that crash, hang or eat memory when the name of a clip says so.

`python tests/app/faulty.py`, with the arguments of app/demo.py.
"""

import os
import runpy
import signal
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY) not in sys.path:  # the processes that read are told this path, too
    sys.path.insert(0, str(REPOSITORY))

from coca_video.serve.answers import ReadClip  # noqa: E402
from coca_video.serve.reading import DisplayRequest, ReadRequest, work  # noqa: E402

APP = REPOSITORY / "app"
PATIENCE = 600.0  # seconds that no test comes near
SLOW_SECONDS = 2.0


def work_or_worse(request: ReadRequest | DisplayRequest) -> ReadClip | str | None:
    """Reads a clip, unless its name says what goes wrong."""
    match Path(request.path).stem.split("_")[0]:
        case "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case "hang":
            time.sleep(PATIENCE)
        case "bomb":
            bytearray(8 * 10**9)[:: 2**12] = b"x" * (8 * 10**9 // 2**12)
        case "slow":
            time.sleep(SLOW_SECONDS)
        case "fail":
            raise RuntimeError(f"a fault of ours at {request.path}")
    return work(request)


def main() -> None:
    """Runs app/demo.py with a service whose default is `work_or_worse`."""
    from coca_video.serve.service import Service
    from tests.app.faulty import work_or_worse as read  # by a name that the processes can import

    assert Service.__init__.__kwdefaults__ is not None
    Service.__init__.__kwdefaults__["read"] = read
    sys.path.insert(0, str(APP))
    runpy.run_path(str(APP / "demo.py"), run_name="__main__")


if __name__ == "__main__":
    main()
