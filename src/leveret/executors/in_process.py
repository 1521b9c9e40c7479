"""An executor without child processes: for tests, and for a worker inside a web application.

A task that blocks or crashes here takes its worker with it; `processes` is what production wants.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from leveret.executors.attempt import Runner
from leveret.executors.base import (
    Awaits,
    ExecutorEvent,
    Finished,
    Manifest,
    Progressed,
    Report,
    RunRequest,
    Started,
    resident,
    running,
)
from leveret.model import Cancelled, ChildReport, Succeeded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.client import App
    from leveret.model import Outcome, Progress, RunningTask

#: Progress within this time is told as one (seconds).
_GATHER = 0.05


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

    def submit(self, jobs: Sequence[RunRequest]) -> None:
        self._jobs.submit(jobs)

    def cancel(self, keys: Sequence[int]) -> None:
        self._jobs.cancel(keys)

    def children(self) -> Sequence[ChildReport]:
        pid = os.getpid()
        return [ChildReport(pid, self._jobs.running_tasks(), self._jobs.finished, resident(pid))]

    async def stop(self) -> None:
        await self._jobs.stop()


class _Link:
    """Between a job and its runner; see `leveret.model.Runtime`."""

    def __init__(self, key: int, tell: Callable[[int, Progress], None], tell_awaits: Callable[[int], None]) -> None:
        self._key = key
        self._tell = tell
        self._tell_awaits = tell_awaits
        #: How many tasks it waits for that have not begun, and whether that is told.
        self.awaited = 0
        self.is_told_to_await = False
        self.cancelled = False
        #: Not before its asyncio task has taken its first step: cancelled then, it would end without a word.
        self.interruptible = False
        #: Unix time.
        self.since = time.time()

    def progressed(self, progress: Progress) -> None:
        self._tell(self._key, progress)

    def awaits(self, change: int) -> None:
        self.awaited += change
        self._tell_awaits(self._key)


class JobRunner:
    """Runs jobs through a runner, ``concurrency`` at once and in order, and reports in batches.

    ``admit``: asked how many of the next jobs may start; those that may not are dropped, they are another's now.
    Both executors use it: this module in the worker's process, `child` in its own.
    """

    def __init__(
        self, runner: Runner, *, concurrency: int, admit: Callable[[int], int] = lambda wanted: wanted
    ) -> None:
        self._runner = runner
        self._admit = admit
        #: The jobs that run, by the asyncio task that runs each.
        self.running: dict[asyncio.Task[Any], RunRequest] = {}
        #: How many jobs have run.
        self.finished = 0
        self._stopping = False
        self._context = contextvars.copy_context()
        self._free = concurrency
        self._waiting: deque[RunRequest] = deque()
        self._reports: list[Report] = []
        self._links: dict[int, _Link] = {}
        #: Jobs that wait and shall not run.
        self._unwanted: set[int] = set()
        #: The latest of each job, from whatever thread; told in a moment.
        self._progress: dict[int, Progress] = {}
        self._progress_lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._report: Callable[[Sequence[Report]], None] = _nobody

    def report_to(self, report: Callable[[Sequence[Report]], None]) -> None:
        self._report = report

    def submit(self, jobs: Sequence[RunRequest]) -> None:
        if self._stopping:
            return
        self._waiting.extend(jobs)
        self._start_waiting()

    def cancel(self, keys: Sequence[int]) -> None:
        """Have these jobs not run, or end if they do."""
        for task, job in self.running.items():
            if job.key in keys:
                link = self._links[job.key]
                link.cancelled = True
                if link.interruptible:
                    task.cancel()
        self._unwanted.update(key for key in keys if key not in self._links)

    def running_tasks(self) -> list[RunningTask]:
        return [running(job, self._links[job.key].since) for job in self.running.values()]

    async def stop(self) -> None:
        self._stopping = True
        self._waiting.clear()
        self._runner.close()
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    def _start_waiting(self) -> None:
        wanted = min(self._free, len(self._waiting))
        if not wanted:
            return
        loop = asyncio.get_running_loop()
        admitted = self._admit(wanted)
        self._free -= admitted
        for _ in range(admitted):
            job = self._waiting.popleft()
            self._say(Started(job.key, self._runner.timeout(job.envelope)))
            # A context of its own: what one task sets in a context variable is not the next one's to see.
            link = self._links[job.key] = _Link(job.key, self._note_progress, self._note_awaits)
            task = loop.create_task(self._run(job, link), context=self._context.copy())
            self.running[task] = job
        if admitted < wanted:
            self._waiting.clear()  # taken back, to be run elsewhere
            self._unwanted.clear()

    async def _run(self, job: RunRequest, link: _Link) -> None:
        began = time.monotonic()
        is_unwanted = link.cancelled or job.key in self._unwanted
        try:
            if is_unwanted:
                self._unwanted.discard(job.key)
                outcome: Outcome = Cancelled("cancelled before it ran")
            else:
                outcome = await self._runner.run(job.envelope, link)
        except BaseException as error:
            if self._stopping:
                raise
            # The task cancelled the asyncio task that it runs in: it has failed like any other, and costs no slot.
            outcome = self._runner.classify(error, job.envelope)
        if link.cancelled and not is_unwanted and not isinstance(outcome, Succeeded):
            outcome = Cancelled("cancelled while it ran")
        self._tell_progress()
        del self._links[job.key]
        # By hand: a callback would be one more round of the loop for each job.
        this = asyncio.current_task()
        if this is not None:
            self.running.pop(this, None)
        self._free += 1
        self.finished += 1
        self._say(Finished(job.key, outcome, None if is_unwanted else time.monotonic() - began))
        self._start_waiting()

    def _note_progress(self, key: int, progress: Progress) -> None:
        """From any thread."""
        with self._progress_lock:
            is_first = not self._progress
            self._progress[key] = progress
        if is_first:
            self._loop.call_soon_threadsafe(self._loop.call_later, _GATHER, self._tell_progress)

    def _note_awaits(self, key: int) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._tell_awaits, key)

    def _tell_awaits(self, key: int) -> None:
        link = self._links.get(key)
        if link is not None and link.is_told_to_await != (link.awaited > 0):
            link.is_told_to_await = link.awaited > 0
            self._say(Awaits(key, link.is_told_to_await))

    def _tell_progress(self) -> None:
        if not self._progress:
            return
        with self._progress_lock:
            progress, self._progress = self._progress, {}
        for key, told in progress.items():
            if key in self._links:
                self._say(Progressed(key, told))

    def _say(self, report: Report) -> None:
        if not self._reports:
            asyncio.get_running_loop().call_soon(self._flush)
        self._reports.append(report)

    def _flush(self) -> None:
        reports, self._reports = self._reports, []
        self._report(reports)


def _nobody(reports: Sequence[Report]) -> None:
    raise RuntimeError(f"{len(reports)} reports before report_to()")
