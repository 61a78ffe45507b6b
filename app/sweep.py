"""Deletes what Gradio leaves behind in the upload folder: uploads that were broken off, and folders that got empty.

Gradio itself deletes the files that it knows (`delete_cache`), and so forgets their names; this comes a little later.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path


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
