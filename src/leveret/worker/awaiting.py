"""Tasks that wait for other tasks' results, and hold the slots that those would run in."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from leveret.worker.job import Job, Jobs

log = logging.getLogger("leveret.worker")

#: How long all slots are held by such tasks before it is said (seconds).
HINT_AFTER = 5.0
#: How long a worker that is stopping waits for those that it runs, when nothing else runs in it (seconds). Another
#: worker may begin what they wait for meanwhile.
STOP_AFTER = 2.0
_LOOK = 0.1


class Awaiting:
    """Notices when jobs that wait for the results of tasks which have not begun hold all ``slots``."""

    def __init__(self, slots: Callable[[], int], jobs: Jobs) -> None:
        self._slots = slots
        self._jobs = jobs
        self._hinting: asyncio.TimerHandle | None = None
        self._is_said = False

    def note(self, job: Job, *, awaits: bool) -> None:
        job.awaits_since = time.monotonic() if awaits else None
        if awaits and self._hinting is None and not self._is_said:
            self._hinting = asyncio.get_running_loop().call_later(HINT_AFTER, self._hint)

    def stop(self) -> None:
        """Say nothing any more."""
        self._is_said = True
        if self._hinting is not None:
            self._hinting.cancel()

    async def until_stuck(self) -> None:
        """While a worker is stopping: until nothing runs but jobs that wait for tasks which nobody begins."""
        begun = time.monotonic()
        while not _are_stuck(self._jobs.begun.values(), begun):  # noqa: ASYNC110 - it is for a time that nothing happens
            await asyncio.sleep(_LOOK)
        log.warning(
            "not waiting for %d tasks, which wait for the results of tasks that have not begun: they are handed back",
            len(self._jobs.begun),
        )

    def _hint(self) -> None:
        self._hinting = None
        now = time.monotonic()
        since = [job.awaits_since for job in self._jobs.begun.values() if job.awaits_since is not None]
        long = sum(now - moment >= HINT_AFTER * 0.9 for moment in since)
        if long >= self._slots():
            self._is_said = True
            log.warning(
                "all %d slots are held by tasks that wait for the results of tasks that have not begun; if no other "
                "worker runs those, they wait for ever: raise --concurrency or --processes, give the others a queue "
                "and a worker of their own, or have them enqueue what follows instead of waiting for them",
                self._slots(),
            )
        elif since:
            self._hinting = asyncio.get_running_loop().call_later(HINT_AFTER / 2, self._hint)


def _are_stuck(running: Collection[Job], begun: float) -> bool:
    """Whether there are any, and each has waited since the stop ``begun``, for long."""
    latest = time.monotonic() - STOP_AFTER
    return bool(running) and all(
        job.awaits_since is not None and max(begun, job.awaits_since) < latest for job in running
    )
