"""Child processes that run the tasks, so that user code can block, leak or crash without harm to the connection.

Children serve (they are given jobs), or leave (they finish what they run and are given no more: recycled, blocked, or
overrun), or are wards (they run one job alone, to learn whether it is what kills its process). A child that dies is
replaced. What it had not started goes to another child, uncharged. Of what it had started the guilty job is charged:
the only one, or the one that it was killed for; of several suspects each runs again, uncharged, alone in a ward.

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
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import absolute, backoff
from leveret.errors import AppNotLoaded, ConfigurationError
from leveret.executors.base import (
    OVERTIME,
    Died,
    ExecutorEvent,
    Finished,
    Manifest,
    Overran,
    Report,
    RunRequest,
    Started,
    resident,
)
from leveret.executors.loops import check_loop
from leveret.executors.spawn import Begun, Child
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
#: So many suspects run at once, each in a ward.
_WARDS = 2
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
        if self.max_tasks is not None and child.finished >= self.max_tasks:
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
    ) -> None:
        check_loop(loop)
        # Whole: the application's module may change the directory while it is imported.
        self._begin = Begin(app, None if url is None else absolute(url), concurrency, logs, loop)
        self._processes = processes
        self._recycling = recycling
        #: How often it was reloaded, and of which generations the children are that shall not stay.
        self._generation = 0
        self._stale_before = 0
        #: Of which generation the worker knows the application, and how it learns of another.
        self._known = 0
        self._adopt: Callable[[Manifest], None] = lambda _: None
        self._serving: list[Child] = []
        self._leaving: set[Child] = set()
        self._wards: set[Child] = set()
        #: Births of serving children, each with the child that leaves when it has come.
        self._births: dict[asyncio.Task[None], Child | None] = {}
        self._ward_births: set[asyncio.Task[None]] = set()
        self._farewells: set[asyncio.Task[None]] = set()
        self._waiting: deque[RunRequest] = deque()
        self._suspects: deque[RunRequest] = deque()
        #: Jobs that shall not run: with a child, or waiting here when it gave them back.
        self._unwanted: set[int] = set()
        #: How often each job was taken back from a child that was blocked.
        self._moves: dict[int, int] = {}
        self._killers: OrderedDict[str, None] = OrderedDict()
        self._stopping = False
        self._report: Callable[[Sequence[ExecutorEvent]], None] = lambda _: None
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def processes(self) -> int:
        """How many children serve, or are about to."""
        return self._processes

    @property
    def concurrency(self) -> int:
        return self._begin.concurrency

    @property
    def slots(self) -> int:
        return self._processes * self._begin.concurrency

    @property
    def broken(self) -> asyncio.Future[None]:
        return self._broken

    @property
    def pids(self) -> list[int]:
        """The children that are given jobs."""
        return [child.pid for child in self._serving]

    @property
    def sources(self) -> frozenset[str]:
        """The files of the application that the children had imported when they were ready."""
        return frozenset(path for child in self._serving for path in child.sources)

    async def start(self, report: Callable[[Sequence[ExecutorEvent]], None]) -> Manifest:
        self._report = report
        generation = self._generation
        first = await Child.start(self._begin, self)
        first.generation = self._known = generation
        self._serving.append(first)
        if self._is_stale(first):  # there was a reload while it was born
            self._births[asyncio.create_task(self._bear())] = first
        self._restock()
        return first.manifest

    def submit(self, jobs: Sequence[RunRequest]) -> None:
        if self._stopping:
            return
        for job in jobs:
            (self._suspects if job.envelope.id in self._killers else self._waiting).append(job)
        if self._suspects:
            self._restock()
        self._assign()

    def cancel(self, keys: Sequence[int]) -> None:
        self._unwanted.update(keys)
        for child in (*self._serving, *self._leaving, *self._wards):
            child.cancel(keys)
        self._withdraw()

    def children(self) -> Sequence[ChildReport]:
        return [child.report() for child in (*self._serving, *self._leaving, *self._wards)]

    def resize(self, processes: int) -> None:
        """Have so many children from now on. Those that are too many finish what they run, and then leave."""
        self._processes = processes
        self._trim()
        self._restock()

    async def reload(self, adopt: Callable[[Manifest], None]) -> int:
        """Replace the children, each when a fresh one is ready: how many. Not to be called again before it has ended.

        Those that are being born are not waited for, nor counted, but do not stay either. ``adopt`` is called with what
        the application is now, before it runs anything. Raises AppNotLoaded when it can't be imported any more; then
        the children that are there go on.
        """
        self._generation += 1
        self._stale_before = self._generation
        self._adopt = adopt
        count = 0
        while self._stale() is not None:
            try:
                fresh = await self._started()
            except AppNotLoaded:
                self._stale_before = 0
                raise
            if self._stopping:
                await fresh.stop()
                break
            self._introduce(fresh)
            self._serving.append(fresh)
            stale = self._stale()
            if stale is not None:
                self._retire(stale)
                count += 1
            self._trim()
            self._assign()
        return count

    async def stop(self) -> None:
        self._stopping = True
        self._waiting.clear()
        births = [*self._births, *self._ward_births]
        for birth in births:
            birth.cancel()
        await asyncio.gather(*births, return_exceptions=True)
        await asyncio.gather(*(child.stop() for child in [*self._serving, *self._leaving, *self._wards]))
        await asyncio.gather(*self._farewells)

    # What the children tell.

    def reported(self, child: Child, reports: Sequence[Report]) -> None:
        if self._unwanted:
            self._unwanted.difference_update(one.key for one in reports if isinstance(one, Finished))
        if self._moves:
            for one in reports:
                if isinstance(one, Started):
                    self._moves.pop(one.key, None)
        self._report(reports)
        if self._stopping:
            return
        if child.unfit is not None:
            self._replace_unfit(child)
        if child in self._serving:
            self._recycle_if_due(child)
        elif not child.load():
            self._has_finished(child)
        self._assign()

    def doubts(self, child: Child, job: RunRequest) -> bool:
        """It runs again, uncharged, alone; but what fails alone is to blame, and what may not run again is not run."""
        is_alone = self._is_alone(child)
        if self._stopping or is_alone or job.once or job.key in self._unwanted:
            if is_alone:
                self._remember(job)
            return False
        self._suspects.append(job)
        self._restock()
        return True

    def looked(self, child: Child) -> None:
        if self._stopping:
            return
        if child.unfit is not None:
            self._replace_unfit(child)
        blocked = child.blocked_for()
        if child.unfit is None or blocked is None or self._is_alone(child):
            for key, begun in list(child.started.items()):
                self._check_time(child, key, begun)
        elif blocked > _STUCK:
            child.end_for(f"was ended, as it was spoilt and its event loop did not turn any more ({child.unfit})")
        self._check_unstarted(child)
        if child in self._serving:
            self._recycle_if_due(child)

    def died(self, child: Child, unstarted: Sequence[RunRequest], belated: Sequence[Started]) -> None:
        was_replaced, was_alone = child in self._leaving, self._is_alone(child)
        if self._stopping or not self._forget(child):
            return
        log.error("a child process (pid %d) %s; it ran %d tasks", child.pid, child.cause(), len(child.started))
        condemned = None if child.condemned is None else child.condemned[0]
        never_begun = [job for job in unstarted if job.key == condemned]
        self._waiting.extendleft(job for job in reversed(unstarted) if job.key != condemned)
        charged = self._charge(child, is_known=child.unfit is None or was_alone)
        if child.condemned is not None and never_begun:
            belated = [*belated, Started(child.condemned[0])]
            charged = [Died(*child.condemned), *charged]
            self._remember(never_begun[0])
        self._unwanted.difference_update(verdict.key for verdict in charged)
        self._restock()
        replaced = [] if was_replaced else [ChildReplaced(child.pid, "died" if child.condemned is None else "overran")]
        self._report([*belated, *replaced, *charged])
        self._assign()

    # What follows from it.

    def _assign(self) -> None:
        """Give waiting jobs to the children with free slots, the idlest first."""
        self._withdraw()
        loads = {child: child.load() for child in self._serving} if self._waiting else {}
        batches: dict[Child, list[RunRequest]] = {}
        while self._waiting and loads:
            child = min(loads, key=loads.__getitem__)
            if loads[child] >= self._begin.concurrency:
                break
            loads[child] += 1
            batches.setdefault(child, []).append(self._waiting.popleft())
        for child, jobs in batches.items():
            child.send(jobs)

    def _withdraw(self) -> None:
        """Report on waiting jobs that shall not run."""
        if not self._unwanted:
            return
        keys = [job.key for job in (*self._waiting, *self._suspects) if job.key in self._unwanted]
        if keys:
            self._waiting = deque(job for job in self._waiting if job.key not in self._unwanted)
            self._suspects = deque(job for job in self._suspects if job.key not in self._unwanted)
            self._unwanted.difference_update(keys)
            for key in keys:
                self._moves.pop(key, None)
            self._report([Finished(key, Cancelled("cancelled before it ran")) for key in keys])

    def _check_time(self, child: Child, key: int, begun: Begun) -> None:
        """A task that outlasts its timeout costs its child, which first may finish the neighbours."""
        over = begun.overtime(time.monotonic())
        if over <= _LATE or child.condemned is not None:
            return
        if child.blockers and key not in child.blockers:
            return  # it can't end while another one blocks, which runs on
        if over > OVERTIME and len(child.blockers) > 1:
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
        elif child in self._serving and self._has_room():
            log.warning("a child process (pid %d) is replaced: a task outlasts its timeout", child.pid)
            self._report([ChildReplaced(child.pid, "overran")])
            self._retire(child)

    def _check_unstarted(self, child: Child) -> None:
        """A child that has a slot for a job and does not begin it is left, or ended where it is the last resort."""
        oldest = child.oldest_unstarted()
        if oldest is None:
            return
        key, waits = oldest
        if child in self._serving:
            if waits > _PATIENCE * 2 ** self._moves.get(key, 0) and self._has_room():
                self._leave_blocked(child)
        elif waits > _LAST_PATIENCE and not child.blockers:
            if child in self._wards:
                child.condemn(key, f"{_MOST_MOVES} child processes and one of its own did not begin the task in time")
            else:
                child.end_for(f"was ended, as it did not begin {child.load()} tasks that it has, and gave none back")

    def _leave_blocked(self, child: Child) -> None:
        jobs = self._retire(child, is_blocked=True)
        self._report([ChildReplaced(child.pid, "blocked")])
        log.warning("a child process (pid %d) is blocked: %d tasks that waited go to another", child.pid, jobs)

    def _replace_unfit(self, child: Child) -> None:
        if child in self._serving and self._has_room():
            log.error("a child process (pid %d) is replaced, as others would fail in it: %s", child.pid, child.unfit)
            self._report([ChildReplaced(child.pid, "unfit")])
            self._retire(child)

    def _is_alone(self, child: Child) -> bool:
        """Whether what that child runs is the first that it runs, and the only one: nobody else can have spoilt it."""
        return child in self._wards and not child.finished

    def _charge(self, child: Child, *, is_known: bool) -> list[Report]:
        """Who is guilty of a child's death; the others run again, those that may be guilty alone.

        ``is_known``: whether the only one that ran is the guilty one, for nobody before it can have been.
        """
        cause = f"the task ended when its child process (pid {child.pid}) {child.cause()}"
        verdicts: dict[int, Report] = {}
        shelter = self._suspects
        if child.condemned is not None:
            key, reason = child.condemned
            verdicts[key] = Overran(key, reason)
            shelter = self._waiting
        elif len(child.started) == 1 and is_known:
            (key,) = child.started
            verdicts[key] = Died(key, cause)
            self._remember(child.started[key].job)
        for key, begun in reversed(child.started.items()):
            if key in verdicts:
                continue
            if begun.job.once:
                verdicts[key] = Died(key, cause)
            else:
                shelter.appendleft(begun.job)
        return [verdict for verdict in verdicts.values() if verdict.key in child.started]

    def _remember(self, job: RunRequest) -> None:
        """Its next attempt is made in a ward, if it comes here."""
        self._killers[job.envelope.id] = None
        if len(self._killers) > _KILLERS:
            self._killers.popitem(last=False)

    def _retire(self, child: Child, *, is_blocked: bool = False) -> int:
        """Give a serving child no more jobs, and take back those that it has not started: how many."""
        self._forget(child)
        self._leaving.add(child)
        jobs = child.take_back()
        for job in reversed(jobs):
            if is_blocked and self._count_move(job) >= _MOST_MOVES:
                self._suspects.appendleft(job)
            else:
                self._waiting.appendleft(job)
        if not child.load():
            self._dismiss(child)
        self._restock()
        self._assign()
        return len(jobs)

    def _count_move(self, job: RunRequest) -> int:
        moves = self._moves.get(job.key, 0) + 1
        if moves < _MOST_MOVES:
            self._moves[job.key] = moves
        else:
            self._moves.pop(job.key, None)
        return moves

    def _stale(self) -> Child | None:
        return next((child for child in self._serving if self._is_stale(child)), None)

    def _is_stale(self, child: Child) -> bool:
        return child.generation < self._stale_before

    def _introduce(self, child: Child) -> None:
        """Before it runs anything, the worker must know the application as that child has it."""
        if child.generation > self._known:
            self._known = child.generation
            self._adopt(child.manifest)

    def _trim(self) -> None:
        """Have the children leave that are too many: those of an earlier generation first, then the idlest."""
        for _ in range(len(self._serving) - self._processes):
            self._retire(min(self._serving, key=lambda child: (not self._is_stale(child), child.load())))

    def _recycle_if_due(self, child: Child) -> None:
        """One at a time, and the next child is ready before this one leaves."""
        if not any(self._births.values()) and self._recycling.is_due(child):
            log.info("a child process (pid %d) is recycled after %d tasks", child.pid, child.finished)
            self._births[asyncio.create_task(self._bear())] = child

    def _has_finished(self, child: Child) -> None:
        """A child that does not serve runs nothing: a ward takes its next suspect, any other ends."""
        if child in self._wards and self._suspects and child.unfit is None and not self._is_stale(child):
            child.send([self._suspects.popleft()])
        else:
            self._dismiss(child)
            self._restock()

    def _dismiss(self, child: Child) -> None:
        if self._forget(child):
            farewell = asyncio.create_task(child.stop())
            self._farewells.add(farewell)
            farewell.add_done_callback(self._farewells.discard)

    def _forget(self, child: Child) -> bool:
        """Whether it was still one of ours."""
        for birth, leaver in self._births.items():
            if leaver is child:
                self._births[birth] = None
        known = child in self._serving or child in self._leaving or child in self._wards
        if child in self._serving:
            self._serving.remove(child)
        self._leaving.discard(child)
        self._wards.discard(child)
        return known

    def _has_room(self) -> bool:
        """Children that leave take memory too: when many do, no more are replaced before some have gone."""
        return len(self._serving) + len(self._leaving) + len(self._births) < 2 * self._processes + 2

    def _restock(self) -> None:
        """Start the children that are wanted and not there."""
        coming = sum(leaver is None for leaver in self._births.values())
        for _ in range(self._processes - len(self._serving) - coming):
            self._births[asyncio.create_task(self._bear())] = None
        wanted = min(_WARDS - len(self._wards), len(self._suspects)) - len(self._ward_births)
        for _ in range(wanted):
            self._ward_births.add(asyncio.create_task(self._bear_ward()))

    async def _bear(self) -> None:
        this = asyncio.current_task()
        assert this is not None
        try:
            child = await self._newborn()
        finally:
            leaver = self._births.pop(this)
        if child is None:
            return
        if self._is_stale(child):  # there was a reload while it was born
            self._leaving.add(child)
            self._dismiss(child)
            self._restock()
            return
        self._introduce(child)
        self._serving.append(child)
        if leaver is not None:
            self._retire(leaver)
            if not self._is_stale(leaver):
                self._report([ChildReplaced(leaver.pid, "recycled")])
        self._trim()
        self._assign()

    async def _bear_ward(self) -> None:
        this = asyncio.current_task()
        assert this is not None
        try:
            child = await self._newborn()
        finally:
            # Not when this task is done: if this ward is sent away, another one is wanted at once.
            self._ward_births.discard(this)
        if child is not None:
            self._wards.add(child)
            if not self._is_stale(child):
                self._introduce(child)
            self._has_finished(child)

    async def _newborn(self) -> Child | None:
        """A child, however long that takes; None when the application can't be imported and no child is there."""
        for pause in backoff(*_NOT_LOADED):
            try:
                return await self._started()
            except AppNotLoaded as error:
                if not self._serving:
                    if not self._broken.done():
                        self._broken.set_exception(error)
                    return None
                message = "no fresh child process, so those that are there go on; trying again in %.0f s: %s"
                write(log, logging.ERROR, message, pause, error, traceback=error.traceback)
            await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")

    async def _started(self) -> Child:
        """A child, however long that takes. Raises AppNotLoaded."""
        generation = self._generation
        for pause in backoff():
            try:
                child = await Child.start(self._begin, self)
                child.generation = generation
                return child
            except OSError as error:
                log.warning("no child process can be started, trying again in %.1f s: %s", pause, error)
                await asyncio.sleep(pause)
        raise AssertionError("backoff() never ends")
