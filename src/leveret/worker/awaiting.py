"""Tasks that wait for other tasks' results, and hold the slots that those would run in."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

log = logging.getLogger("leveret.worker")

#: How long all slots are held by such tasks before it is said (seconds).
HINT_AFTER = 5.0
#: How long a worker that is stopping waits for those that it runs, when nothing else runs in it (seconds). Another
#: worker may begin what they wait for meanwhile.
STOP_AFTER = 2.0
_LOOK = 0.1


class Awaiting:
    """Which jobs wait for the results of tasks that have not begun. ``slots``: how many there are."""

    def __init__(self, slots: Callable[[], int]) -> None:
        self._slots = slots
        self._since: dict[int, float] = {}
        self._hinting: asyncio.TimerHandle | None = None
        self._is_said = False

    def note(self, key: int, *, awaits: bool) -> None:
        if not awaits:
            self.forget(key)
            return
        self._since[key] = time.monotonic()
        if self._hinting is None and not self._is_said:
            self._hinting = asyncio.get_running_loop().call_later(HINT_AFTER, self._hint)

    def forget(self, key: int) -> None:
        """It has ended, or gets on."""
        self._since.pop(key, None)

    def stop(self) -> None:
        """Say nothing any more."""
        self._is_said = True
        if self._hinting is not None:
            self._hinting.cancel()

    async def until_stuck(self, running: Callable[[], Collection[int]]) -> None:
        """While a worker is stopping: until nothing runs but jobs that wait for tasks which nobody begins."""
        begun = time.monotonic()
        while not self._is_stuck(running(), begun):  # noqa: ASYNC110 - it is for a time that nothing happens
            await asyncio.sleep(_LOOK)
        log.warning(
            "not waiting for %d tasks, which wait for the results of tasks that have not begun: they are handed back",
            len(running()),
        )

    def _is_stuck(self, running: Collection[int], begun: float) -> bool:
        now = time.monotonic()
        return bool(running) and all(now - max(begun, self._since.get(key, math.inf)) > STOP_AFTER for key in running)

    def _hint(self) -> None:
        self._hinting = None
        now = time.monotonic()
        long = sum(now - since >= HINT_AFTER * 0.9 for since in self._since.values())
        if long >= self._slots():
            self._is_said = True
            log.warning(
                "all %d slots are held by tasks that wait for the results of tasks that have not begun; if no other "
                "worker runs those, they wait for ever: raise --concurrency or --processes, give the others a queue "
                "and a worker of their own, or have them enqueue what follows instead of waiting for them",
                self._slots(),
            )
        elif self._since:
            self._hinting = asyncio.get_running_loop().call_later(HINT_AFTER / 2, self._hint)
