"""Child processes that run the tasks, so that user code can block, leak or crash without harm to the connection.

A child's death is told by the end of its socket. What it had started is charged an attempt, with the signal as the
reason; what it had not goes to another child, uncharged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING

from leveret.brokers.backoff import backoff
from leveret.errors import AppNotLoaded
from leveret.executors import Died, Finished, Job, Manifest, Report, Started
from leveret.executors.wire import Begin, NotLoaded, Pipe, Ready, Run, ToWorker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

log = logging.getLogger("leveret.executors")

#: A child that is idle ends within this time of being told to (seconds); then it is killed.
_FAREWELL = 2.0
#: How long a child may take to import the application (seconds).
_IMPORT = 120.0
#: How long the last reports of a process that has ended may take to arrive (seconds).
_LAST_WORDS = 0.2


class ProcessExecutor:
    """``processes`` children, each running ``concurrency`` tasks at once."""

    def __init__(self, app: str, *, url: str | None = None, processes: int = 1, concurrency: int = 10) -> None:
        self._begin = Begin(app, url, concurrency)
        self._processes = processes
        self._children: list[Child] = []
        self._births: set[asyncio.Task[None]] = set()
        self._waiting: deque[Job] = deque()
        self._stopping = False
        self._report: Callable[[Sequence[Report]], None] = lambda _: None
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.slots = processes * concurrency

    @property
    def broken(self) -> asyncio.Future[None]:
        return self._broken

    @property
    def pids(self) -> list[int]:
        """The children that are alive."""
        return [child.pid for child in self._children]

    async def start(self, report: Callable[[Sequence[Report]], None]) -> Manifest:
        self._report = report
        first = await Child.start(self._begin, self._on_reports, self._on_death)
        self._children.append(first)
        for _ in range(self._processes - 1):
            self._replace()
        return first.manifest

    def submit(self, jobs: Sequence[Job]) -> None:
        self._waiting.extend(jobs)
        self._assign()

    async def stop(self) -> None:
        self._stopping = True
        self._waiting.clear()
        for birth in self._births:
            birth.cancel()
        await asyncio.gather(*self._births, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in self._children))

    def _assign(self) -> None:
        """Give waiting jobs to the children with free slots, the idlest first."""
        batches: dict[Child, list[Job]] = {}
        while self._waiting and self._children:
            child = min(self._children, key=Child.load)
            if child.load() >= self._begin.concurrency:
                break
            job = self._waiting.popleft()
            child.hold(job)
            batches.setdefault(child, []).append(job)
        for child, jobs in batches.items():
            child.send(jobs)

    def _on_reports(self, reports: Sequence[Report]) -> None:
        self._report(reports)
        self._assign()

    def _on_death(self, child: Child) -> None:
        if self._stopping:
            return
        self._children.remove(child)
        cause = f"the task ended when its child process (pid {child.pid}) {child.cause()}"
        log.error("a child process (pid %d) %s; it ran %d tasks", child.pid, child.cause(), len(child.started))
        self._waiting.extendleft(reversed(child.unstarted()))
        self._replace()
        self._report([Died(key, cause) for key in child.started])
        self._assign()

    def _replace(self) -> None:
        birth = asyncio.get_running_loop().create_task(self._bear())
        self._births.add(birth)
        birth.add_done_callback(self._births.discard)

    async def _bear(self) -> None:
        for pause in backoff():
            try:
                child = await Child.start(self._begin, self._on_reports, self._on_death)
            except AppNotLoaded as error:
                if not self._broken.done():
                    self._broken.set_exception(error)
                return
            except OSError as error:
                log.warning("no child process can be started, trying again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)
            else:
                self._children.append(child)
                self._assign()
                return


class Child:
    """One child process, from its start to its death."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        pipe: Pipe[ToWorker],
        lifeline: int,
        manifest: Manifest,
    ) -> None:
        self.pid = process.pid
        self.manifest = manifest
        self.started: dict[int, Job] = {}
        self._held: dict[int, Job] = {}
        self._process = process
        self._pipe = pipe
        self._lifeline = lifeline
        self._ended = asyncio.ensure_future(process.wait())
        self._reading: asyncio.Task[None] | None = None

    @classmethod
    async def start(
        cls,
        begin: Begin,
        report: Callable[[Sequence[Report]], None],
        died: Callable[[Child], None],
    ) -> Child:
        """A child that has imported the application. Raises AppNotLoaded with the reason, and leaves nothing behind."""
        process, pipe, lifeline = await _spawn()
        try:
            pipe.write([begin])
            async with asyncio.timeout(_IMPORT):
                manifest = _manifest(await pipe.read())
        except BaseException as error:
            pipe.close()
            if isinstance(error, (asyncio.CancelledError, TimeoutError)):
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()
            os.close(lifeline)
            if isinstance(error, TimeoutError):
                raise AppNotLoaded(f"importing {begin.app!r} took more than {_IMPORT:g} s") from None
            if isinstance(error, AppNotLoaded) and not error.args:
                raise AppNotLoaded(
                    f"importing {begin.app!r} ended the child process, which {_cause(process)}"
                ) from None
            raise
        child = cls(process, pipe, lifeline, manifest)
        child._reading = asyncio.get_running_loop().create_task(child._read(report, died))
        return child

    def load(self) -> int:
        """How many jobs it has."""
        return len(self.started) + len(self._held)

    def hold(self, job: Job) -> None:
        self._held[job.key] = job

    def unstarted(self) -> list[Job]:
        return list(self._held.values())

    def send(self, jobs: Sequence[Job]) -> None:
        self._pipe.write([Run(job) for job in jobs])

    def cause(self) -> str:
        return _cause(self._process)

    async def stop(self) -> None:
        """Let an idle child end by itself; kill one that still runs a task."""
        if self.load():
            self._kill()
        self._pipe.close()
        try:
            await asyncio.wait_for(self._process.wait(), _FAREWELL)
        except TimeoutError:
            self._kill()
        if self._reading is not None:
            await self._reading

    def _kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)

    async def _batch(self) -> list[ToWorker]:
        """The next batch; empty when the process has ended, though a process that it forked holds its socket open."""
        reading = asyncio.ensure_future(self._pipe.read())
        await asyncio.wait([reading, self._ended], return_when=asyncio.FIRST_COMPLETED)
        if not reading.done():
            # What it wrote before it ended is in our buffer by now, or on the way to it.
            await asyncio.wait([reading], timeout=_LAST_WORDS)
        if reading.done():
            return reading.result()
        reading.cancel()
        return []

    async def _read(self, report: Callable[[Sequence[Report]], None], died: Callable[[Child], None]) -> None:
        while batch := await self._batch():
            reports = [message for message in batch if isinstance(message, (Started, Finished))]
            for message in reports:
                if isinstance(message, Started):
                    self.started[message.key] = self._held.pop(message.key)
                else:
                    del self.started[message.key]
            report(reports)
        # A socket that ended without its process (closed by the task's code) makes the child useless all the same.
        self._pipe.close()
        try:
            await asyncio.wait_for(self._process.wait(), _FAREWELL)
        except TimeoutError:
            self._kill()
            await self._process.wait()
        os.close(self._lifeline)
        died(self)


async def _spawn() -> tuple[asyncio.subprocess.Process, Pipe[ToWorker], int]:
    ours, theirs = socket.socketpair()
    lifeline_read, lifeline = os.pipe()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "leveret.executors.child",
            str(theirs.fileno()),
            str(lifeline_read),
            pass_fds=(theirs.fileno(), lifeline_read),
            stdin=asyncio.subprocess.DEVNULL,
            # A group of its own: Ctrl-C in a terminal is for the worker, which decides what to do about its children.
            process_group=0,
        )
    except BaseException:
        ours.close()
        os.close(lifeline)
        raise
    finally:
        theirs.close()
        os.close(lifeline_read)
    reader, writer = await asyncio.open_connection(sock=ours)
    return process, Pipe(reader, writer, ToWorker), lifeline


def _manifest(batch: list[ToWorker]) -> Manifest:
    for message in batch:
        if isinstance(message, Ready):
            return message.manifest
        if isinstance(message, NotLoaded):
            raise AppNotLoaded(message.reason)
    raise AppNotLoaded


def _cause(process: asyncio.subprocess.Process) -> str:
    code = process.returncode
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}"
    return f"exited with code {code}"
