"""An executor without child processes: for tests, and for a worker inside a web application.

A task that blocks or crashes here takes its worker with it; `processes` is what production wants.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING

from leveret.executors.attempt import JobRunner, Runner
from leveret.executors.base import ExecutorEvent, Manifest, RunRequest, resident
from leveret.model import ChildReport

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.client import App


class InProcessExecutor:
    """Runs tasks on the worker's own event loop and threads. A task that blocks or crashes takes its worker with it.

    Args:
        app: The application.
        concurrency: The number of tasks that run at once.
    """

    def __init__(self, app: App, *, concurrency: int = 10) -> None:
        self._app = app
        self._jobs = JobRunner(Runner(app, concurrency=concurrency), concurrency=concurrency)
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slots = concurrency

    @property
    def broken(self) -> asyncio.Future[None]:
        return self._broken

    async def start(self, report: Callable[[Sequence[ExecutorEvent]], None]) -> Manifest:
        self._jobs.report_to(report)
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
