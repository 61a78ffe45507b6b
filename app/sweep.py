"""The upload folder: how much may lie in it, and what Gradio leaves behind there, which is deleted here.

That are uploads that were broken off, and folders that got empty. Gradio itself deletes the files that it knows
(`delete_cache`), and so forgets their names; this comes a little later.
"""

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path

MAX_UPLOADS = 50  # so many files of the largest size may lie in the folder
MIN_FREE_BYTES = 10**9  # of the disk, that uploads leave to all others
MIN_FILE_BYTES = 16_384  # that a file counts at least: a million empty ones fill a disk, too
MEASURED_SECONDS = 5.0  # so long a measurement of the folder holds


def folder_bytes(folder: Path) -> int:
    """The size of all files below a folder, each at least MIN_FILE_BYTES; links are not followed."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # it went meanwhile
            total += max(MIN_FILE_BYTES, path.lstat().st_size)
    return total


class Room:
    """How much more may be uploaded. Used in the one thread of the server's event loop.

    max_bytes: beside what lies in the folder at first, the examples. Between two measurements of the folder, what is
    received is added to the last.
    """

    def __init__(self, folder: Path, *, max_bytes: int) -> None:
        self.folder = folder
        self._when = time.monotonic()
        self._used, self._free = self._measured()
        self.max_bytes = self._used + max_bytes

    def _measured(self) -> tuple[int, int]:
        return folder_bytes(self.folder), shutil.disk_usage(self.folder).free

    async def measure(self) -> None:
        """Looks at the folder again when the last look is too old."""
        now = time.monotonic()
        if now - self._when >= MEASURED_SECONDS:
            self._when = now  # whoever comes while it is measured goes by the last numbers
            self._used, self._free = await asyncio.to_thread(self._measured)

    def has(self, num_bytes: int) -> bool:
        """Whether so many bytes more have room."""
        return self._used + num_bytes <= self.max_bytes and self._free - num_bytes >= MIN_FREE_BYTES

    def take(self, num_bytes: int) -> None:
        """So many bytes were received."""
        self._used += num_bytes
        self._free -= num_bytes


def sweep(folder: Path, *, keep_seconds: float, kept: Path) -> None:
    """Removes files that were not written to for `keep_seconds`, and empty folders of that age; not those in `kept`.

    An age is that of the last change: of a folder, that of the last file that went.
    """
    now = time.time()
    for path in sorted(folder.rglob("*"), reverse=True):  # what lies in a folder before the folder
        if path.is_relative_to(kept):
            continue
        with contextlib.suppress(OSError):  # somebody was faster, or a folder is not empty
            if now - path.lstat().st_mtime < keep_seconds:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()


def sweeping(
    folder: Path, *, keep_seconds: float, every_seconds: float, kept: Path
) -> Callable[[object], AbstractAsyncContextManager[None]]:
    """A lifespan of a server, during which the folder is swept."""

    async def run() -> None:
        while True:
            await asyncio.sleep(every_seconds)
            await asyncio.to_thread(sweep, folder, keep_seconds=keep_seconds, kept=kept)

    @contextlib.asynccontextmanager
    async def lifespan(_: object) -> AsyncIterator[None]:
        task = asyncio.create_task(run())
        try:
            yield
        finally:
            task.cancel()

    return lifespan
