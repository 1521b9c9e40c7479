"""One child process as its worker sees it, from its start to its death.

Beside the socket that jobs and reports travel on there are two more lines. The lifeline ends when either process
does, and the child's watch reports on it while the child's event loop is blocked. The tickets are a pipe with one byte
for each job sent: the child reads one before it starts a job, and the worker reads out those of the jobs that it takes
back. The kernel gives each byte to one of them, so that no job can be started twice, whatever state the child is in.

All three are open in a process that runs anybody's code. Whatever is read of them that the child has not written, and a
message whose rest does not come, end the child.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec

from leveret.errors import AppNotLoaded
from leveret.executors.base import (
    Awaits,
    Blocks,
    Finished,
    Progressed,
    Report,
    Returned,
    RunRequest,
    Started,
    resident,
    running,
)
from leveret.executors.session import StartedProcess
from leveret.executors.wire import Begin, Cancel, NotLoaded, Pipe, Ready, Recall, Run, ToWorker, Turns, Unfit, runs
from leveret.model import ChildReport, DeadLettered, Retrying

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger("leveret.executors")

#: A child that is idle ends within this time of being told to, its lifespan apart (seconds); then it is killed.
SHUTDOWN_TIMEOUT = 3.0
#: How long the last reports of a process that has ended may take to arrive (seconds).
_LAST_WORDS = 0.2
#: How often a child with jobs is looked at (seconds).
_LOOK = 0.3
#: How long the rest of a message may be on its way, while the child's event loop turns (seconds).
_INCOMPLETE = 10.0


class ChildOwner(Protocol):
    """Who is told what happens to a child."""

    def reported(self, child: Child, reports: Sequence[Report], /) -> None: ...
    def doubts(self, child: Child, job: RunRequest, /) -> bool:
        """Whether that job, which failed in a child that is unfit, is not told of, as it shall run again."""

    def looked(self, child: Child, /) -> None:
        """A moment is over, and it has jobs or had some."""

    def died(self, child: Child, unstarted: Sequence[RunRequest], belated: Started, /) -> None:
        """The jobs that it had not started, and the news of those of which it could not say any more that it had."""


class Begun(msgspec.Struct, frozen=True, gc=False):
    """A job that runs."""

    job: RunRequest
    #: On the monotonic clock (seconds).
    since: float
    #: Seconds that it may run.
    timeout: float | None
    #: Until when another job is known to have blocked the event loop, so that it could not end itself.
    held_up: float = 0.0

    def overtime(self, now: float) -> float:
        """For how long it could have ended and should have (seconds); negative: for so long it need not."""
        return now - max(self.since + self.timeout, self.held_up) if self.timeout is not None else -math.inf


class Lines(NamedTuple):
    """Our ends of what connects us with a child."""

    pipe: Pipe[ToWorker]
    lifeline: Pipe[ToWorker]
    tickets_in: int
    tickets_out: int

    def close(self) -> None:
        self.pipe.close()
        self.lifeline.close()
        os.close(self.tickets_in)
        os.close(self.tickets_out)


class ChildJobs:
    """The jobs that a child has: those that wait in it, those that it runs, and which of these block it."""

    def __init__(self) -> None:
        self.started: dict[int, Begun] = {}
        #: How many it has finished.
        self.finished = 0
        #: While its event loop is blocked: the jobs of which one does that, as far as can be told.
        self.blockers: frozenset[int] = frozenset()
        #: Since when that is known (monotonic, seconds).
        self._blocked_at = 0.0
        #: Since when it is to give back what it has not started (monotonic, seconds); None: it is not.
        self._recalled_at: float | None = None
        #: The jobs that it has not started, and when each was sent.
        self._held: dict[int, tuple[RunRequest, float]] = {}

    def __len__(self) -> int:
        return len(self.started) + len(self._held)

    def __contains__(self, key: int) -> bool:
        return key in self.started or key in self._held

    def sent(self, jobs: Sequence[RunRequest]) -> None:
        now = time.monotonic()
        self._held.update((job.key, (job, now)) for job in jobs)

    def start(self, message: Started, now: float) -> None:
        held, started, timeout = self._held, self.started, message.timeout
        for key in message.keys:
            started[key] = Begun(held.pop(key)[0], now, timeout)

    def recall(self) -> bool:
        """What it has not started is wanted back; whether it must be told so."""
        is_new = bool(self._held) and self._recalled_at is None
        if is_new:
            self._recalled_at = time.monotonic()
        return is_new

    def recalled_for(self) -> float:
        """How long that has been wanted (seconds); 0 if it is not."""
        return 0.0 if self._recalled_at is None else time.monotonic() - self._recalled_at

    def returned(self, keys: Sequence[int]) -> None:
        self._recalled_at = None
        for key in keys:
            del self._held[key]

    def oldest_unstarted(self) -> tuple[int, float] | None:
        """The first of the jobs that it has not started, and when it was sent."""
        return next(((key, since) for key, (_, since) in self._held.items()), None)

    @property
    def unstarted(self) -> int:
        return len(self._held)

    def take_last(self, count: int) -> list[RunRequest]:
        """So many of those that it has not started, the last ones."""
        keys = list(self._held)[len(self._held) - count :]
        return [self._held.pop(key)[0] for key in keys]

    def start_rest(self) -> Started:
        """Those that it has not started, as far as it could say."""
        rest, self._held = self._held, {}
        now = time.monotonic()
        self.started.update((key, Begun(job, now, None)) for key, (job, _) in rest.items())
        return Started(list(rest))

    def block(self, key: int) -> None:
        """That job may be what blocks the event loop."""
        if not self.blockers:
            self._blocked_at = time.monotonic()
        self.blockers |= {key}

    def blocked_for(self) -> float | None:
        """How long the event loop is known not to turn (seconds); None: it turns."""
        return time.monotonic() - self._blocked_at if self.blockers else None

    def turns_again(self) -> None:
        now = time.monotonic()
        for key in self.started.keys() - self.blockers:
            self.started[key] = msgspec.structs.replace(self.started[key], held_up=now)
        self.blockers = frozenset()


class Child:
    """One child process."""

    def __init__(
        self, process: StartedProcess, lines: Lines, ready: Ready, owner: ChildOwner, stop_timeout: float
    ) -> None:
        self.pid = process.pid
        self.manifest = ready.manifest
        self.sources = ready.sources
        #: How often its owner had reloaded when it began to import the application.
        self.generation = 0
        self.jobs = ChildJobs()
        #: The job that it was killed for, and why, if so.
        self.condemned: tuple[int, str] | None = None
        #: Why what it runs may fail without a fault of its own, if so.
        self.unfit: str | None = None
        self._reading = Reading(lines.pipe)
        #: Why it was killed, if there is more to say than the signal.
        self._reason: str | None = None
        self._process = process
        self._lines = lines
        #: Seconds that its lifespan may take to end; None: it has none.
        self._stop_timeout = stop_timeout if ready.has_lifespan else None
        self._owner = owner
        self._looking: asyncio.TimerHandle | None = None
        lines.pipe.hear = self._hear
        lines.lifeline.hear = self._hear_watch
        self._life = asyncio.get_running_loop().create_task(self._live())

    @classmethod
    async def start(cls, begin: Begin, owner: ChildOwner) -> Child:
        """A child that has imported the application and entered its lifespan.

        Raises AppNotLoaded with the reason, and leaves nothing behind.
        """
        process, lines = await _spawn()
        try:
            lines.pipe.write([begin])
            async with asyncio.timeout(begin.start_timeout):
                ready = _ready(await lines.pipe.first())
        except BaseException as error:
            broken = lines.pipe.broken or lines.lifeline.broken
            lines.pipe.close()
            if broken is not None or isinstance(error, (asyncio.CancelledError, TimeoutError)):
                process.kill()
            try:
                await _end(process, SHUTDOWN_TIMEOUT)
            finally:
                lines.close()
            if isinstance(error, TimeoutError):
                raise AppNotLoaded(
                    f"importing {begin.app!r} and entering its lifespan took more than {begin.start_timeout:g} s, "
                    "the worker's --start-timeout"
                ) from None
            if isinstance(error, AppNotLoaded) and not error.args:
                raise AppNotLoaded(
                    f"importing {begin.app!r} ended the child process, which "
                    f"{_cause(process) if broken is None else _scribbled(broken)}"
                ) from None
            raise
        return cls(process, lines, ready, owner, begin.stop_timeout)

    def send(self, jobs: Sequence[RunRequest]) -> None:
        self.jobs.sent(jobs)
        os.write(self._lines.tickets_in, bytes(len(jobs)))
        self._reading.write(list(runs(jobs)))
        self._look_later()

    def cancel(self, keys: Sequence[int]) -> None:
        """Tell it to have those of the jobs that it has not run, or end."""
        mine = [key for key in keys if key in self.jobs]
        if mine:
            self._reading.write([Cancel(mine)])

    def recall(self) -> None:
        """Have it give back the jobs that it has not started."""
        if self.jobs.recall():
            self._reading.write([Recall()])

    def oldest_unstarted(self) -> tuple[int, float] | None:
        """The first of the jobs that it has not started, and how long it could have (seconds).

        Not since it was sent, but since the child has all that it can get: while it reads on, it is not blocked.
        """
        oldest = self.jobs.oldest_unstarted()
        if oldest is None:
            return None
        key, since = oldest
        return key, time.monotonic() - max(since, self._reading.moved_at)

    def take_back(self) -> list[RunRequest]:
        """The jobs that it has not started and now never will. It must not be sent another one after this."""
        if not self.jobs.unstarted:
            return []
        try:
            count = len(os.read(self._lines.tickets_out, self.jobs.unstarted))
        except BlockingIOError:
            return []
        # It starts them in the order in which they were sent: ours are the last ones.
        return self.jobs.take_last(count)

    def cause(self) -> str:
        return self._reason or _cause(self._process)

    def report(self) -> ChildReport:
        now, monotonic = time.time(), time.monotonic()
        tasks = [running(begun.job, now - (monotonic - begun.since)) for begun in self.jobs.started.values()]
        return ChildReport(self.pid, tasks, self.jobs.finished, resident(self.pid))

    def condemn(self, key: int, cause: str) -> None:
        """Kill it because of one of its jobs."""
        self.condemned = (key, cause)
        self.kill()

    def end_for(self, reason: str) -> None:
        """Kill it, and say that reason instead of the signal."""
        if self._reason is None:
            self._reason = reason
            self.kill()

    def kill(self) -> None:
        self._process.kill()

    async def stop(self) -> None:
        """Let an idle child end by itself. One that still runs a task is killed, unless it has a lifespan to leave."""
        if self.jobs and (self._stop_timeout is None or self.jobs.blockers):
            self.kill()
        self._lines.pipe.close()
        if not await self._end() and self._stop_timeout is not None:
            log.error("a child process (pid %d) did not leave its application's lifespan, and was killed", self.pid)
        await self._life

    async def _end(self) -> bool:
        """Whether it has ended by itself."""
        return await _end(self._process, SHUTDOWN_TIMEOUT + (self._stop_timeout or 0.0))

    def _look_later(self) -> None:
        if self._looking is None:
            self._reading.begin()
            self._looking = asyncio.get_running_loop().call_later(_LOOK, self._look)

    def _look(self) -> None:
        self._looking = None
        is_held_up = self._reading.look()
        lines = (self._lines.pipe, self._lines.lifeline)
        if not is_held_up and not self.jobs.blockers and any(map(_is_incomplete, lines)):
            self.end_for(
                "was ended, as the rest of a message did not come: something that runs in it has written into "
                "descriptors that are not its own, or has closed them"
            )
        self._owner.looked(self)
        if self.jobs or any(pipe.is_within for pipe in lines):
            self._look_later()

    def _hear(self, batch: list[ToWorker]) -> None:
        now = time.monotonic()
        reports: list[Report] = []
        for message in batch:
            if isinstance(message, Finished):
                job = self.jobs.started.pop(message.key).job
                if not (self.unfit and _has_failed(message) and self._owner.doubts(self, job)):
                    reports.append(message)
                self.jobs.finished += 1
            elif isinstance(message, Started):
                self.jobs.start(message, now)
                reports.append(message)
            elif isinstance(message, (Progressed, Awaits)):
                reports.append(message)
            elif isinstance(message, Returned):
                self.jobs.returned(message.keys)
                reports.append(message)
            elif isinstance(message, Unfit):
                self.unfit = message.reason
        self._owner.reported(self, reports)

    def _hear_watch(self, batch: list[ToWorker]) -> None:
        reports: list[Report] = []
        for message in batch:
            if isinstance(message, Blocks):
                self.jobs.block(message.key)
                if message.key in self.jobs.started:
                    reports.append(message)
            elif isinstance(message, Turns):
                self.jobs.turns_again()
            elif isinstance(message, Unfit):
                self.unfit = message.reason
        if reports or self.unfit:
            self._owner.reported(self, reports)

    async def _live(self) -> None:
        """Until the process has ended, though one that it forked may hold its socket open."""
        socket_ended, ended = self._lines.pipe.ended, asyncio.ensure_future(self._process.wait())
        ends: list[asyncio.Future[Any]] = [socket_ended, self._lines.lifeline.ended, ended]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        broken = self._lines.pipe.broken or self._lines.lifeline.broken
        if broken is not None:
            self.end_for(_scribbled(broken))
        # What it wrote before it ended is in the socket by now.
        await asyncio.wait([socket_ended], timeout=_LAST_WORDS)
        # A socket that ended without its process (closed by the task's code) makes the child useless all the same.
        self._lines.pipe.close()
        await self._end()
        unstarted = self.take_back()
        # Its last reports may be lost with it, but the ticket of a job that it began is gone.
        belated = self.jobs.start_rest()
        self._end_lines()
        self._owner.died(self, unstarted, belated)

    def _end_lines(self) -> None:
        if self._looking is not None:
            self._looking.cancel()
        self._lines.close()


class Reading:
    """Whether a child reads what is sent to it."""

    def __init__(self, pipe: Pipe[ToWorker]) -> None:
        self._pipe = pipe
        #: How much of it was sent when it was written, or was seen to go since (bytes).
        self._seen = pipe.sent
        self._looked_at = -math.inf
        #: When more was seen to go, or may have gone unseen (monotonic, seconds).
        self.moved_at = -math.inf

    def write(self, messages: Sequence[Run | Cancel | Recall]) -> None:
        before = self._pipe.sent
        self._pipe.write(messages)
        # What the kernel takes at once says nothing about the child.
        self._seen += self._pipe.sent - before

    def begin(self) -> None:
        """Be looked at from now on."""
        self._looked_at = time.monotonic()

    def look(self) -> bool:
        """Every `_LOOK`; whether this process itself could not look in time."""
        now = time.monotonic()
        is_held_up = now - self._looked_at > 2 * _LOOK
        if is_held_up or self._pipe.sent != self._seen:
            self._seen, self.moved_at = self._pipe.sent, now
        self._looked_at = now
        return is_held_up


async def _spawn() -> tuple[StartedProcess, Lines]:
    ours, theirs = socket.socketpair()
    lifeline, their_lifeline = socket.socketpair()
    tickets_out, tickets_in = os.pipe()
    os.set_blocking(tickets_out, False)
    os.set_blocking(tickets_in, False)
    inherited = (theirs.fileno(), their_lifeline.fileno(), tickets_out)
    try:
        process = StartedProcess(
            [sys.executable, "-m", "leveret.executors.child", *(str(number) for number in inherited)],
            pass_fds=inherited,
        )
    except BaseException:
        ours.close()
        lifeline.close()
        os.close(tickets_out)
        os.close(tickets_in)
        raise
    finally:
        theirs.close()
        their_lifeline.close()
    pipes: list[Pipe[ToWorker]] = []
    try:
        for end in (ours, lifeline):
            pipes.append(await Pipe[ToWorker].open(end, ToWorker))  # noqa: PERF401 - those that are open are closed
    except BaseException:
        process.kill()
        for pipe in pipes:
            pipe.close()
        for number in (tickets_in, tickets_out):
            os.close(number)
        for end in (ours, lifeline)[len(pipes) :]:
            end.close()
        await process.wait()
        raise
    return process, Lines(pipes[0], pipes[1], tickets_in, tickets_out)


async def _end(process: StartedProcess, within: float) -> bool:
    """By itself, now that it was told to; or by force, since a thread of the application may hold it up for ever.

    Whether it has ended by itself.
    """
    is_in_time = False
    try:
        with suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), within)
            is_in_time = True
    finally:
        process.kill()
    await process.wait()
    return is_in_time


def _ready(batch: list[ToWorker]) -> Ready:
    for message in batch:
        if isinstance(message, Ready):
            return message
        if isinstance(message, NotLoaded):
            raise AppNotLoaded(message.reason, message.traceback)
    raise AppNotLoaded


def _is_incomplete(pipe: Pipe[ToWorker]) -> bool:
    return pipe.is_within and time.monotonic() - pipe.heard_at > _INCOMPLETE


def _has_failed(report: Finished) -> bool:
    return isinstance(report.outcome, (Retrying, DeadLettered))


def _scribbled(what: str) -> str:
    return (
        "was ended, as something that runs in it has written into descriptors that are not its own "
        f"(its connection with the worker: {what})"
    )


def _cause(process: StartedProcess) -> str:
    code = process.returncode
    if code is not None and code < 0:
        try:
            name = signal.Signals(-code).name
        except ValueError:
            name = f"signal {-code}"
        return f"was killed by {name}{_HINTS.get(name, '')}"
    return f"exited with code {code}"


_A_TIMER = " (a timer of a task's, signal.alarm() or setitimer(): give the task a timeout instead)"
#: What ends a process that is told nothing else about these signals.
_HINTS = {
    "SIGALRM": _A_TIMER,
    "SIGVTALRM": _A_TIMER,
    "SIGPROF": _A_TIMER,
    "SIGXCPU": " (it has used up its RLIMIT_CPU)",
    "SIGXFSZ": " (it has written a file larger than its RLIMIT_FSIZE)",
}
