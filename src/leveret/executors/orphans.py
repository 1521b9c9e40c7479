"""The first process of a container has to reap what others have left behind, or there are more zombies each day."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Collection

_PR_GET_CHILD_SUBREAPER = 37
#: How often zombies are looked for (seconds).
_LOOK = 5.0


@asynccontextmanager
async def reaping(ours: Callable[[], Collection[int]]) -> AsyncGenerator[None]:
    """Reap the orphans that this process gets, if it gets any, until the block is left. ``ours``: its own children."""
    if not takes_orphans():
        yield
        return
    task = asyncio.create_task(_reap_on(ours))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _reap_on(ours: Callable[[], Collection[int]]) -> None:
    orphans = Orphans()
    while True:
        await asyncio.sleep(_LOOK)
        # A machine may have many processes to look through.
        await asyncio.to_thread(orphans.reap, frozenset(ours()))


def takes_orphans() -> bool:
    """Whether this process gets the orphans of others: it is the first one of its container, or asked for them."""
    if os.getpid() == 1:
        return True
    if sys.platform != "linux":
        return False
    is_one = ctypes.c_int(0)
    try:
        ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(is_one), 0, 0, 0)
    except (OSError, AttributeError):
        return False
    return bool(is_one.value)


class Orphans:
    """Reaps zombies of this process that nobody waits for: those that are seen in two looks."""

    def __init__(self) -> None:
        self._seen: frozenset[int] = frozenset()

    def reap(self, ours: Collection[int]) -> int:
        """Now and then; ``ours`` are waited for by others. How many were reaped."""
        zombies = frozenset(_zombies()) - frozenset(ours)
        old = zombies & self._seen
        self._seen = zombies - old
        for pid in old:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        return len(old)


def _zombies() -> list[int]:
    own, found = os.getpid(), []
    for name in os.listdir("/proc") if sys.platform == "linux" else ():  # noqa: PTH208 - no object for each
        if name.isdigit():
            with suppress(OSError, ValueError):
                state, parent, *_ = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
                if state == "Z" and int(parent) == own:
                    found.append(int(name))
    return found
