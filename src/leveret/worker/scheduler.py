"""Has the tasks of schedules stored when they fall due: each worker does, beside its work."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

from leveret.brokers import backoff
from leveret.errors import LeveretError
from leveret.model import scheduled_for
from leveret.observe import LimitedLog, ScheduleAdvanced
from leveret.worker.stopping import ended, first_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from leveret.brokers import Broker, ScheduleKeeper
    from leveret.model import Change, Declare, ScheduleRow
    from leveret.worker.application import Application
    from leveret.worker.reporter import Listeners

log = logging.getLogger("leveret.schedules")

#: The longest time between two looks at what is due, and two words that this worker is there (seconds).
LOOK = 15.0
#: What could not be done is tried again after so long (seconds).
_AGAIN = 1.0
#: So many are stored at once.
_MOST = 256


class Scheduler:
    """Declares the schedules of the application's code, and stores what falls due of any schedule."""

    def __init__(self, broker: Broker, application: Application, listeners: Listeners) -> None:
        self._broker = broker
        self._application = application
        self._listeners = listeners
        self._warnings = LimitedLog(log)
        #: Of the schedules that another program declares otherwise, those that were told of.
        self._outdated: frozenset[str] = frozenset()

    async def run(self) -> None:
        """Until it is cancelled."""
        # Whoever keeps the schedules may be slow to answer, and that must keep up nothing here.
        both = [asyncio.create_task(self._keep_declared()), asyncio.create_task(self._keep())]
        try:
            await first_of(*both)
            for task in both:
                if task.done():
                    task.result()
        finally:
            await ended(both)

    async def _keep(self) -> None:
        pauses = backoff()
        while True:
            try:
                async with self._broker.schedules.keep() as keeper:
                    while True:
                        await self._round(keeper)
                        pauses = backoff()
            except LeveretError as error:
                self._warnings.warning("schedules cannot be kept: %s", error)
                await asyncio.sleep(next(pauses))

    async def _keep_declared(self) -> None:
        """Say what the application's code has: at the start, now and then, and when it was loaded again."""
        declared, until = None, 0.0
        while True:
            declaration, now = self._application.declaration, asyncio.get_running_loop().time()
            if declaration is not declared or now >= until:
                try:
                    await self._declare(declaration)
                    declared, until = declaration, now + LOOK
                except LeveretError as error:
                    self._warnings.warning("the schedules of %s cannot be declared: %s", declaration.origin, error)
            await asyncio.sleep(_AGAIN)

    async def _round(self, keeper: ScheduleKeeper) -> None:
        rows, following = await keeper.due()
        if not rows:
            await keeper.wait(LOOK if following is None else min(LOOK, following))
            return
        # What is due next is known once these have moved on.
        stored = [await self._store(keeper, rows[start : start + _MOST]) for start in range(0, len(rows), _MOST)]
        if not all(stored):
            await keeper.wait(_AGAIN)

    async def _declare(self, declaration: Declare) -> None:
        change = await self._broker.schedules.ask(declaration)
        outdated = frozenset(change.outdated)
        for name in sorted(outdated - self._outdated):
            log.warning(
                "schedule %r of %s is another one here than what is in force, which a newer program or data says: this "
                "worker's does not count",
                name,
                declaration.origin,
            )
        self._outdated = outdated

    async def _store(self, keeper: ScheduleKeeper, rows: Sequence[ScheduleRow]) -> bool:
        """Whether all that was due could be stored."""
        unfinished = await self._unfinished(rows)
        stored = await asyncio.gather(*(self._advance(keeper, row, unfinished) for row in rows))
        return all(stored)

    async def _unfinished(self, rows: Sequence[ScheduleRow]) -> Mapping[str, bool]:
        """Of the tasks that a next one must not overlap those that are not finished, and whether each runs."""
        asked = [id_ for row in rows if row.schedule.timing.overlap != "allow" for id_ in row.recent]
        statuses = await self._broker.statuses.read(asked) if asked else ()
        return {status.id: status.state == "running" for status in statuses if not status.is_final}

    async def _advance(self, keeper: ScheduleKeeper, row: ScheduleRow, unfinished: Mapping[str, bool]) -> bool:
        mine = {id_: unfinished[id_] for id_ in row.recent if id_ in unfinished}
        try:
            change = await keeper.advance(row.name, mine)
        except LeveretError as error:
            self._warnings.warning("schedule %r: its task could not be stored, and is tried again: %s", row.name, error)
            return False
        self._tell(row, change)
        return True

    def _tell(self, before: ScheduleRow, change: Change) -> None:
        for task in change.tasks:
            log.debug("schedule %r: task %s is stored", before.name, task.id)
        after = change.rows.get(before.name)
        if after is None:
            return
        self._listeners.notify(_advanced(before, after, change))
        if after.problem:
            log.error("schedule %r is paused: %s", after.name, after.problem)
        if after.missed > before.missed:
            log.warning("schedule %r: %d instants passed without a task", after.name, after.missed - before.missed)
        if after.skipped > before.skipped:
            log.info("schedule %r: the last task is not finished, so no new one is enqueued", after.name)


def _advanced(before: ScheduleRow, after: ScheduleRow, change: Change) -> ScheduleAdvanced:
    now, timing = time.time(), before.schedule.timing
    instants = [instant for task in change.tasks if (instant := scheduled_for(task.headers)) is not None]
    return ScheduleAdvanced(
        before.name,
        before.schedule.origin,
        [max(0.0, now - timing.due(before.name, instant.timestamp())) for instant in instants],
        max(0, after.missed - before.missed),
        max(0, after.skipped - before.skipped),
    )
