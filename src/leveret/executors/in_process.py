"""An executor without child processes: for tests, and for a worker inside a web application.

A task that blocks or crashes here takes its worker with it; `processes` is what production wants.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from leveret.executors.attempt import JobRunner, Runner
from leveret.executors.base import STOP_TIMEOUT, ExecutorEvent, Manifest, RunRequest, resident
from leveret.executors.lifespan import Lifespan
from leveret.model import ChildReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.client import App
    from leveret.errors import AppNotLoaded


class InProcessExecutor:
    """Runs tasks on the worker's own event loop and threads. A task that blocks or crashes takes its worker with it.

    Args:
        app: The application.
        concurrency: The number of tasks that run at once.
        stop_timeout: How long the application's lifespan may take to end (seconds).
    """

    def __init__(self, app: App, *, concurrency: int = 10, stop_timeout: float = STOP_TIMEOUT) -> None:
        self._app = app
        self._stop_timeout = stop_timeout
        self._lifespan = Lifespan(app)
        self._jobs = JobRunner(Runner(app, concurrency=concurrency), concurrency=concurrency)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slots = concurrency

    @property
    def broken(self) -> asyncio.Future[None]:
        return self._broken

    async def start(self, report: Callable[[Sequence[ExecutorEvent]], None]) -> Manifest:
        self._jobs.report_to(report)
        self._lifespan.broke = self._break
        self._jobs.run_with(await self._lifespan.enter(), self._lifespan.context)
        return Manifest.of(self._app)

    def submit(self, jobs: Sequence[RunRequest], *, ahead: int = 0) -> None:
        del ahead  # all wait in one place
        self._jobs.submit(jobs)

    def recall(self) -> None:
        self._jobs.recall()

    def cancel(self, keys: Sequence[int]) -> None:
        self._jobs.cancel(keys)

    def children(self) -> Sequence[ChildReport]:
        pid = os.getpid()
        return [ChildReport(pid, self._jobs.running_tasks(), self._jobs.finished, resident(pid))]

    async def stop(self) -> None:
        await self._jobs.stop()
        await self._lifespan.leave(self._stop_timeout)

    def _break(self, error: AppNotLoaded) -> None:
        if not self._broken.done():
            self._broken.set_exception(error)
