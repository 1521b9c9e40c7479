"""Coroutines that run beside the worker's own: one owner keeps them, waits for them and ends them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any


class Background:
    """Starts coroutines as tasks. asyncio itself keeps only weak references to its tasks."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def until_done(self) -> None:
        """Wait until nothing runs, what was started meanwhile included."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    async def close(self, within: float) -> None:
        """Wait for what runs now, for so many seconds, and cancel what is left."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=within)
        self.cancel()

    def cancel(self) -> None:
        for task in self._tasks:
            task.cancel()
