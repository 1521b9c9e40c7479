"""Child processes that run the tasks, so that user code can block, leak or crash without harm to the connection.

Children serve (they are given jobs), or leave (they finish what they run and are given no more: recycled, blocked, or
overrun), or are isolated (they run one job alone, to learn whether it is what kills its process). A child that dies is
replaced. What it had not started goes to another child, uncharged. Of what it had started the guilty job is charged:
the only one, or the one that it was killed for; of several suspects each runs again, uncharged, isolated.

A child may also become unfit: a task of its changes what belongs to all (its limits, its user, its descriptors). It
leaves, and is ended if its event loop does not turn any more. What fails or dies in it is a suspect, unless it was
alone in it from the beginning. So is, at last, a job that no child begins.

How many serve may change (`resize`): those that are too many leave. A reload replaces all that serve, one by one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import OrderedDict, deque
from heapq import heapify, heapreplace
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import absolute, backoff
from leveret.errors import AppNotLoaded, ConfigurationError
from leveret.executors.base import (
    OVERTIME,
    START_TIMEOUT,
    STOP_TIMEOUT,
    Died,
    ExecutorEvent,
    Finished,
    Manifest,
    Overran,
    Report,
    Returned,
    RunRequest,
    Started,
    resident,
)
from leveret.executors.loops import check_loop
from leveret.executors.spawn import Begun, Child, ChildOwner
from leveret.executors.wire import Begin
from leveret.model import Cancelled
from leveret.observe import ChildReplaced, write

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.executors.loops import Loop
    from leveret.model import ChildReport
    from leveret.observe import Logging

log = logging.getLogger("leveret.executors")

#: A child that has not started a job for this long, though it has a slot for it, does not turn its loop (seconds).
_PATIENCE = 0.6
#: Each time that a job is taken back from such a child the next one has twice as long for it; after so many it is tried
#: alone, so that there is an end.
_MOST_MOVES = 4
#: A child that gets no more jobs ends if it does not begin one that it has for so long, and turns its loop (seconds).
_LAST_PATIENCE = 30.0
#: How long after its timeout a task that is cancelled may take to end before its child gets no more jobs (seconds).
_LATE = 0.5
#: An unfit child whose event loop is known to be blocked for so long is ended (seconds): it may wait for a thread that
#: found no memory to begin, and so for ever. What blocks it for a moment only has ended by then.
_STUCK = 5.0
#: So many suspects run at once, each in a child of its own.
_MOST_ISOLATED = 2
#: While the application can't be imported any more, a child is tried after so long at first, and at last (seconds).
_NOT_LOADED = (2.0, 60.0)
#: The tasks that killed a child here and are not forgotten yet.
_KILLERS = 1_000


class Recycling(msgspec.Struct, frozen=True):
    """When a child is replaced by a fresh one: after about so many tasks, or when it holds so much memory (bytes)."""

    max_tasks: int | None = None
    max_rss: int | None = None

    def __post_init__(self) -> None:
        if self.max_tasks is not None and self.max_tasks < 1:
            raise ConfigurationError(f"max tasks per child is {self.max_tasks}; it must be at least 1")
        if self.max_rss is not None and self.max_rss < 1:
            raise ConfigurationError(f"max RSS is {self.max_rss} bytes; it must be at least 1")
        if self.max_rss is not None and sys.platform != "linux":
            raise ConfigurationError(f"a child's memory can't be read on {sys.platform}: leave max RSS out")

    def is_due(self, child: Child) -> bool:
        """Whether that child is to be replaced."""
        if self.max_tasks is not None and child.jobs.finished >= self.max_tasks:
            return True
        return self.max_rss is not None and resident(child.pid) >= self.max_rss


class ProcessExecutor:
    """Runs tasks in child processes, each with ``concurrency`` tasks at once.

    Args:
        app: ``MODULE:APP`` or ``FILE.py:APP``, imported by the child processes alone.
        url: The URL of the broker, in place of the application's.
        processes: The number of child processes.
        concurrency: The number of tasks that each child runs at once.
        recycling: When a child is replaced by a fresh one: after about so many tasks, or when it holds so much memory
            (bytes). By default never.
        logs: Where the children's logs go, unless the application decides that when it is imported. None: the
            application alone decides.
        loop: The children's event loop; "uvloop" needs ``leveret[uvloop]``. "auto": the one of the policy that the
            application sets, else asyncio's.
        start_timeout: How long a child may take to import the application and to enter its lifespan (seconds).
        stop_timeout: How long the lifespan may take to end (seconds).

    Raises:
        ConfigurationError: ``loop`` is unknown or not installed.
    """

    def __init__(
        self,
        app: str,
        *,
        url: str | None = None,
        processes: int = 1,
        concurrency: int = 10,
        recycling: Recycling = Recycling(),  # noqa: B008 - frozen
        logs: Logging | None = None,
        loop: Loop = "auto",
        start_timeout: float = START_TIMEOUT,
        stop_timeout: float = STOP_TIMEOUT,
    ) -> None:
        check_loop(loop)
        # Whole: the application's module may change the directory while it is imported.
        whole = None if url is None else absolute(url)
        begin = Begin(app, whole, concurrency, logs, loop, start_timeout, stop_timeout)
        self._report: Callable[[Sequence[ExecutorEvent]], None] = lambda _: None
        self._backlog = Backlog(self._tell)
        self._pool = Pool(begin, processes, recycling, self, self._backlog, self._tell)
        self._watchdog = Watchdog(self._pool, self._backlog, self._tell)

    @property
    def processes(self) -> int:
        """How many children serve, or are about to."""
        return self._pool.processes

    @property
    def concurrency(self) -> int:
        return self._pool.concurrency

    @property
    def slots(self) -> int:
        return self._pool.processes * self._pool.concurrency

    @property
    def broken(self) -> asyncio.Future[None]:
        return self._pool.starter.broken

    @property
    def pids(self) -> list[int]:
        """The children that are given jobs."""
        return [child.pid for child in self._pool.serving]

    @property
    def sources(self) -> frozenset[str]:
        """The files of the application that the children had imported when they were ready."""
        return frozenset(path for child in self._pool.serving for path in child.sources)

    async def start(self, report: Callable[[Sequence[ExecutorEvent]], None]) -> Manifest:
        self._report = report
        return await self._pool.start()

    def submit(self, jobs: Sequence[RunRequest], *, ahead: int = 0) -> None:
        if self._pool.is_stopping:
            return
        self._pool.ahead = ahead
        self._backlog.add(jobs)
        if self._backlog.suspects:
            self._pool.restock()
        self._pool.assign()

    def cancel(self, keys: Sequence[int]) -> None:
        self._backlog.cancel(keys)
        for child in self._pool.all():
            child.cancel(keys)
        self._backlog.withdraw()

    def recall(self) -> None:
        self._pool.ahead = 0
        for child in self._pool.serving:
            child.recall()

    def children(self) -> Sequence[ChildReport]:
        return [child.report() for child in self._pool.all()]

    def resize(self, processes: int) -> None:
        """Have so many children from now on. Those that are too many finish what they run, and then leave."""
        self._pool.resize(processes)

    async def reload(self, adopt: Callable[[Manifest], None]) -> int:
        """Replace the children, each when a fresh one is ready: how many. Not to be called again before it has ended.

        Those that are being started are not waited for, nor counted, but do not stay either. ``adopt`` is called with
        what the application is now, before it runs anything. Raises AppNotLoaded when it can't be imported any more;
        then the children that are there go on.
        """
        return await self._pool.reload(adopt)

    async def stop(self) -> None:
        self._backlog.waiting.clear()
        await self._pool.stop()

    def _tell(self, events: Sequence[ExecutorEvent]) -> None:
        self._report(events)

    # What the children tell.

    def reported(self, child: Child, reports: Sequence[Report]) -> None:
        self._backlog.hear(reports)
        self._report(reports)
        pool = self._pool
        if pool.is_stopping:
            return
        if child.unfit is not None:
            self._watchdog.replace_unfit(child)
        if child in pool.serving:
            pool.recycle_if_due(child)
        elif not child.jobs:
            pool.has_finished(child)
        pool.assign()

    def doubts(self, child: Child, job: RunRequest) -> bool:
        """It runs again, uncharged, alone; but what fails alone is to blame, and what may not run again is not run."""
        is_alone = self._pool.is_alone(child)
        if self._pool.is_stopping or is_alone or not self._backlog.may_run_again(job):
            if is_alone:
                self._backlog.remember(job)
            return False
        self._backlog.suspects.append(job)
        self._pool.restock()
        return True

    def looked(self, child: Child) -> None:
        if self._pool.is_stopping:
            return
        self._watchdog.look(child)
        if child in self._pool.serving:
            self._pool.recycle_if_due(child)

    def died(self, child: Child, unstarted: Sequence[RunRequest], belated: Started) -> None:
        pool = self._pool
        was_replaced, was_alone = child in pool.leaving, pool.is_alone(child)
        if pool.is_stopping or not pool.forget(child):
            return
        log.error("a child process (pid %d) %s; it ran %d tasks", child.pid, child.cause(), len(child.jobs.started))
        begun, charged = self._backlog.inherit(child, unstarted, is_known=child.unfit is None or was_alone)
        pool.restock()
        replaced = [] if was_replaced else [ChildReplaced(child.pid, "died" if child.condemned is None else "overran")]
        self._report([belated, *begun, *replaced, *charged])
        pool.assign()


class Pool:
    """The children: those that serve, that leave, that are isolated, and that are being started."""

    def __init__(
        self,
        begin: Begin,
        processes: int,
        recycling: Recycling,
        owner: ChildOwner,
        backlog: Backlog,
        report: Callable[[Sequence[ExecutorEvent]], None],
    ) -> None:
        self.processes = processes
        self.concurrency = begin.concurrency
        #: How many more jobs than they run at once the children may have.
        self.ahead = 0
        self._recycling = recycling
        self._backlog = backlog
        self._report = report
        self.serving: list[Child] = []
        self.leaving: set[Child] = set()
        self.isolated: set[Child] = set()
        self._generations = Generations()
        self.starter = ChildStarter(begin, owner, self._generations, self.serving)
        #: Serving children that are being started, each with the child that leaves when it has come.
        self._starting: dict[asyncio.Task[None], Child | None] = {}
        self._starting_isolated: set[asyncio.Task[None]] = set()
        self._ending: set[asyncio.Task[None]] = set()
        self.is_stopping = False

    def all(self) -> Sequence[Child]:
        return (*self.serving, *self.leaving, *self.isolated)

    async def start(self) -> Manifest:
        """Raises AppNotLoaded, and OSError when no process can be started."""
        first = await self.starter.first()
        self._generations.know(first)
        self.serving.append(first)
        if self._generations.is_stale(first):  # there was a reload while it was started
            self._starting[asyncio.create_task(self._add())] = first
        self.restock()
        return first.manifest

    def resize(self, processes: int) -> None:
        self.processes = processes
        self._trim()
        self.restock()

    async def reload(self, adopt: Callable[[Manifest], None]) -> int:
        self._generations.begin(adopt)
        count = 0
        while self._stale() is not None:
            try:
                fresh = await self.starter.start()
            except AppNotLoaded:
                self._generations.give_up()
                raise
            if self.is_stopping:
                await fresh.stop()
                break
            self._generations.introduce(fresh)
            self.serving.append(fresh)
            stale = self._stale()
            if stale is not None:
                self.retire(stale)
                count += 1
            self._trim()
            self.assign()
        return count

    async def stop(self) -> None:
        self.is_stopping = True
        starting = [*self._starting, *self._starting_isolated]
        for start in starting:
            start.cancel()
        await asyncio.gather(*starting, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in self.all()))
        await asyncio.gather(*self._ending)

    def assign(self) -> None:
        """Give waiting jobs to the children with free slots, the idlest first."""
        self._backlog.withdraw()
        waiting = self._backlog.waiting
        loads = [(len(child.jobs), number) for number, child in enumerate(self.serving)] if waiting else []
        heapify(loads)
        batches: dict[int, list[RunRequest]] = {}
        most = self.concurrency + self.ahead // max(1, len(self.serving))
        while waiting and loads:
            load, number = loads[0]
            if load >= most:
                break
            heapreplace(loads, (load + 1, number))
            batches.setdefault(number, []).append(waiting.popleft())
        for number, jobs in batches.items():
            self.serving[number].send(jobs)

    def retire(self, child: Child, *, is_blocked: bool = False) -> int:
        """Give a serving child no more jobs, and take back those that it has not started: how many."""
        self.forget(child)
        self.leaving.add(child)
        jobs = child.take_back()
        self._backlog.take_back(jobs, is_blocked=is_blocked)
        if not child.jobs:
            self._dismiss(child)
        self.restock()
        self.assign()
        return len(jobs)

    def has_finished(self, child: Child) -> None:
        """A child that does not serve runs nothing: an isolated one takes its next suspect, any other ends."""
        if (
            child in self.isolated
            and self._backlog.suspects
            and child.unfit is None
            and not self._generations.is_stale(child)
        ):
            child.send([self._backlog.suspects.popleft()])
        else:
            self._dismiss(child)
            self.restock()

    def forget(self, child: Child) -> bool:
        """Whether it was still one of ours."""
        for start, leaver in self._starting.items():
            if leaver is child:
                self._starting[start] = None
        known = child in self.serving or child in self.leaving or child in self.isolated
        if child in self.serving:
            self.serving.remove(child)
        self.leaving.discard(child)
        self.isolated.discard(child)
        return known

    def has_room(self) -> bool:
        """Children that leave take memory too: when many do, no more are replaced before some have gone."""
        return len(self.serving) + len(self.leaving) + len(self._starting) < 2 * self.processes + 2

    def is_alone(self, child: Child) -> bool:
        """Whether what that child runs is the first that it runs, and the only one: nobody else can have spoilt it."""
        return child in self.isolated and not child.jobs.finished

    def recycle_if_due(self, child: Child) -> None:
        """One at a time, and the next child is ready before this one leaves."""
        if not any(self._starting.values()) and self._recycling.is_due(child):
            log.info("a child process (pid %d) is recycled after %d tasks", child.pid, child.jobs.finished)
            self._starting[asyncio.create_task(self._add())] = child

    def restock(self) -> None:
        """Start the children that are wanted and not there."""
        coming = sum(leaver is None for leaver in self._starting.values())
        for _ in range(self.processes - len(self.serving) - coming):
            self._starting[asyncio.create_task(self._add())] = None
        wanted = min(_MOST_ISOLATED - len(self.isolated), len(self._backlog.suspects)) - len(self._starting_isolated)
        for _ in range(wanted):
            self._starting_isolated.add(asyncio.create_task(self._add_isolated()))

    def _trim(self) -> None:
        """Have the children leave that are too many: those of an earlier generation first, then the idlest."""
        for _ in range(len(self.serving) - self.processes):
            self.retire(min(self.serving, key=lambda child: (not self._generations.is_stale(child), len(child.jobs))))

    def _stale(self) -> Child | None:
        return next((child for child in self.serving if self._generations.is_stale(child)), None)

    def _dismiss(self, child: Child) -> None:
        if self.forget(child):
            ending = asyncio.create_task(child.stop())
            self._ending.add(ending)
            ending.add_done_callback(self._ending.discard)

    async def _add(self) -> None:
        this = asyncio.current_task()
        assert this is not None
        try:
            child = await self.starter.start_unless_broken()
        finally:
            leaver = self._starting.pop(this)
        if child is None:
            return
        if self._generations.is_stale(child):  # there was a reload while it was started
            self.leaving.add(child)
            self._dismiss(child)
            self.restock()
            return
        self._generations.introduce(child)
        self.serving.append(child)
        if leaver is not None:
            self.retire(leaver)
            if not self._generations.is_stale(leaver):
                self._report([ChildReplaced(leaver.pid, "recycled")])
        self._trim()
        self.assign()

    async def _add_isolated(self) -> None:
        this = asyncio.current_task()
        assert this is not None
        try:
            child = await self.starter.start_unless_broken()
        finally:
            # Not when this task is done: if this child is sent away, another one is wanted at once.
            self._starting_isolated.discard(this)
        if child is not None:
            self.isolated.add(child)
            if not self._generations.is_stale(child):
                self._generations.introduce(child)
            self.has_finished(child)


class ChildStarter:
    """Starts children of one application. ``serving``: those that go on meanwhile."""

    def __init__(self, begin: Begin, owner: ChildOwner, generations: Generations, serving: Sequence[Child]) -> None:
        self._begin = begin
        self._owner = owner
        self._generations = generations
        self._serving = serving
        #: Gets an exception when no child can be had any more.
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def first(self) -> Child:
        """Raises AppNotLoaded, and OSError when no process can be started."""
        return await self._start(self._generations.latest)

    async def start_unless_broken(self) -> Child | None:
        """A child, however long that takes; None when the application can't be imported and no child is there."""
        pauses = backoff(*_NOT_LOADED)
        while True:
            try:
                return await self.start()
            except AppNotLoaded as error:
                if not self._serving:
                    if not self.broken.done():
                        self.broken.set_exception(error)
                    return None
                pause = next(pauses)
                message = "no fresh child process, so those that are there go on; trying again in %.0f s: %s"
                write(log, logging.ERROR, message, pause, error, traceback=error.traceback)
            await asyncio.sleep(pause)

    async def start(self) -> Child:
        """A child, however long that takes. Raises AppNotLoaded."""
        generation = self._generations.latest
        pauses = backoff()
        while True:
            try:
                return await self._start(generation)
            except OSError as error:
                pause = next(pauses)
                log.warning("no child process can be started, trying again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)

    async def _start(self, generation: int) -> Child:
        child = await Child.start(self._begin, self._owner)
        child.generation = generation
        return child


class Generations:
    """How often the application was loaded again, and which children have it as it was before."""

    def __init__(self) -> None:
        self.latest = 0
        #: Children of an earlier one shall not stay.
        self._stale_before = 0
        #: As of which one the worker knows the application, and how it learns of another.
        self._known = 0
        self._adopt: Callable[[Manifest], None] = lambda _: None

    def begin(self, adopt: Callable[[Manifest], None]) -> None:
        self.latest += 1
        self._stale_before = self.latest
        self._adopt = adopt

    def give_up(self) -> None:
        """The children that are there go on."""
        self._stale_before = 0

    def is_stale(self, child: Child) -> bool:
        return child.generation < self._stale_before

    def know(self, child: Child) -> None:
        """The worker is told of the application as the first child has it."""
        self._known = child.generation

    def introduce(self, child: Child) -> None:
        """Before it runs anything, the worker must know the application as that child has it."""
        if child.generation > self._known:
            self._known = child.generation
            self._adopt(child.manifest)


class Backlog:
    """The jobs that no child has, and what is known of jobs wherever they are.

    ``report``: called with what is to be told of them.
    """

    def __init__(self, report: Callable[[Sequence[ExecutorEvent]], None]) -> None:
        self._report = report
        self.waiting: deque[RunRequest] = deque()
        #: Jobs that run alone, each in an isolated child.
        self.suspects: deque[RunRequest] = deque()
        #: Jobs that shall not run: with a child, or waiting here when it gave them back.
        self._unwanted: set[int] = set()
        #: How often each job was taken back from a child that was blocked.
        self._moves: dict[int, int] = {}
        self._killers: OrderedDict[str, None] = OrderedDict()

    def add(self, jobs: Sequence[RunRequest]) -> None:
        for job in jobs:
            (self.suspects if job.envelope.id in self._killers else self.waiting).append(job)

    def cancel(self, keys: Sequence[int]) -> None:
        self._unwanted.update(keys)

    def may_run_again(self, job: RunRequest) -> bool:
        return not job.once and job.key not in self._unwanted

    def patience(self, key: int) -> float:
        """How long a child may take to begin that job (seconds)."""
        return _PATIENCE * 2.0 ** self._moves.get(key, 0)

    def hear(self, reports: Sequence[Report]) -> None:
        """Children tell of their jobs."""
        if self._unwanted:
            for one in reports:
                keys = one.keys if isinstance(one, Returned) else [one.key] if isinstance(one, Finished) else ()
                self._unwanted.difference_update(keys)
        if self._moves:
            for one in reports:
                for key in one.keys if isinstance(one, Started) else ():
                    self._moves.pop(key, None)

    def withdraw(self) -> None:
        """Report on waiting jobs that shall not run."""
        if not self._unwanted:
            return
        keys = [job.key for job in (*self.waiting, *self.suspects) if job.key in self._unwanted]
        if keys:
            self.waiting = deque(job for job in self.waiting if job.key not in self._unwanted)
            self.suspects = deque(job for job in self.suspects if job.key not in self._unwanted)
            self._unwanted.difference_update(keys)
            for key in keys:
                self._moves.pop(key, None)
            self._report([Finished(key, Cancelled("cancelled before it ran")) for key in keys])

    def take_back(self, jobs: Sequence[RunRequest], *, is_blocked: bool) -> None:
        """A child has not started these, and does not any more."""
        for job in reversed(jobs):
            if is_blocked and self._count_move(job) >= _MOST_MOVES:
                self.suspects.appendleft(job)
            else:
                self.waiting.appendleft(job)

    def inherit(
        self, child: Child, unstarted: Sequence[RunRequest], *, is_known: bool
    ) -> tuple[list[Started], list[Died | Overran]]:
        """Take the jobs of a child that died, but for the guilty ones: what is told of these.

        ``is_known``: whether the only one that ran is the guilty one, for nobody before it can have been.
        """
        condemned = None if child.condemned is None else child.condemned[0]
        never_begun = [job for job in unstarted if job.key == condemned]
        self.waiting.extendleft(job for job in reversed(unstarted) if job.key != condemned)
        charged = self._charge(child, is_known=is_known)
        belated: list[Started] = []
        if child.condemned is not None and never_begun:
            belated = [Started([child.condemned[0]])]
            charged = [Died(*child.condemned), *charged]
            self.remember(never_begun[0])
        self._unwanted.difference_update(verdict.key for verdict in charged)
        return belated, charged

    def remember(self, job: RunRequest) -> None:
        """Its next attempt is made in an isolated child, if it comes here."""
        self._killers[job.envelope.id] = None
        if len(self._killers) > _KILLERS:
            self._killers.popitem(last=False)

    def _charge(self, child: Child, *, is_known: bool) -> list[Died | Overran]:
        """Who is guilty of a child's death; the others run again, those that may be guilty alone."""
        cause = f"the task ended when its child process (pid {child.pid}) {child.cause()}"
        verdicts: dict[int, Died | Overran] = {}
        shelter = self.suspects
        if child.condemned is not None:
            key, reason = child.condemned
            verdicts[key] = Overran(key, reason)
            shelter = self.waiting
        elif len(child.jobs.started) == 1 and is_known:
            (key,) = child.jobs.started
            verdicts[key] = Died(key, cause)
            self.remember(child.jobs.started[key].job)
        for key, begun in reversed(child.jobs.started.items()):
            if key in verdicts:
                continue
            if begun.job.once:
                verdicts[key] = Died(key, cause)
            else:
                shelter.appendleft(begun.job)
        return [verdict for verdict in verdicts.values() if verdict.key in child.jobs.started]

    def _count_move(self, job: RunRequest) -> int:
        moves = self._moves.get(job.key, 0) + 1
        if moves < _MOST_MOVES:
            self._moves[job.key] = moves
        else:
            self._moves.pop(job.key, None)
        return moves


class Watchdog:
    """Looks at children that have jobs: one that is spoilt, blocked or held up is replaced, and ended if it must be."""

    def __init__(self, pool: Pool, backlog: Backlog, report: Callable[[Sequence[ExecutorEvent]], None]) -> None:
        self._pool = pool
        self._backlog = backlog
        self._report = report

    def look(self, child: Child) -> None:
        if child.unfit is not None:
            self.replace_unfit(child)
        blocked = child.jobs.blocked_for()
        if child.unfit is None or blocked is None or self._pool.is_alone(child):
            for key, begun in list(child.jobs.started.items()):
                self._check_time(child, key, begun)
        elif blocked > _STUCK:
            child.end_for(f"was ended, as it was spoilt and its event loop did not turn any more ({child.unfit})")
        self._check_unstarted(child)

    def replace_unfit(self, child: Child) -> None:
        if child in self._pool.serving and self._pool.has_room():
            log.error("a child process (pid %d) is replaced, as others would fail in it: %s", child.pid, child.unfit)
            self._report([ChildReplaced(child.pid, "unfit")])
            self._pool.retire(child)

    def _check_time(self, child: Child, key: int, begun: Begun) -> None:
        """A task that outlasts its timeout costs its child, which first may finish the neighbours."""
        over = begun.overtime(time.monotonic())
        if over <= _LATE or child.condemned is not None:
            return
        if child.jobs.blockers and key not in child.jobs.blockers:
            return  # it can't end while another one blocks, which runs on
        if over > OVERTIME and len(child.jobs.blockers) > 1:
            log.warning(
                "a child process (pid %d) is killed: one of its tasks blocks it and outlasts its timeout", child.pid
            )
            child.kill()
        elif over > OVERTIME:
            child.condemn(
                key,
                f"the task ran longer than its timeout of {begun.timeout:g} s and did not end, "
                f"so its child process (pid {child.pid}) was killed",
            )
        elif child in self._pool.serving and self._pool.has_room():
            log.warning("a child process (pid %d) is replaced: a task outlasts its timeout", child.pid)
            self._report([ChildReplaced(child.pid, "overran")])
            self._pool.retire(child)

    def _check_unstarted(self, child: Child) -> None:
        """A child that has a slot for a job and does not begin it is left, or ended where it is the last resort."""
        oldest = child.oldest_unstarted()
        if oldest is None:
            return
        key, waits = oldest
        if len(child.jobs.started) >= self._pool.concurrency:  # they wait for a slot, until they are recalled
            waits = child.jobs.recalled_for()
        if child in self._pool.serving:
            if waits > self._backlog.patience(key) and self._pool.has_room():
                self._leave_blocked(child)
        elif waits > _LAST_PATIENCE and not child.jobs.blockers:
            if child in self._pool.isolated:
                child.condemn(key, f"{_MOST_MOVES} child processes and one of its own did not begin the task in time")
            else:
                child.end_for(f"was ended, as it did not begin {len(child.jobs)} tasks that it has, and gave none back")

    def _leave_blocked(self, child: Child) -> None:
        jobs = self._pool.retire(child, is_blocked=True)
        self._report([ChildReplaced(child.pid, "blocked")])
        log.warning("a child process (pid %d) is blocked: %d tasks that waited go to another", child.pid, jobs)
