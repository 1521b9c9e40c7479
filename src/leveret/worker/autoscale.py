"""``--processes MIN-MAX``: how many child processes a worker has, by what waits and by how long it takes to run."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Protocol, TypeAlias

import msgspec

from leveret.errors import BrokerError, ConfigurationError
from leveret.model.arguments import count

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from typing import Self

log = logging.getLogger("leveret.worker")

#: What ``--processes`` takes: a number, or the fewest and the most.
Processes: TypeAlias = "int | tuple[int, int]"

#: What waits and is done within this time anyhow is not worth another child (seconds): so long one takes to come.
HORIZON = 1.0
#: How often it is decided (seconds). More children are started when two decisions in a row want them.
TICK = 0.25
#: How long fewer children must have been enough before one of them leaves, and then the next (seconds).
SHRINK_AFTER = 15.0
#: How often the broker is asked what waits there, while all slots are busy (seconds).
ASK_AFTER = 1.0
#: Over which time the run time is averaged (seconds).
_MEMORY = 2.0


class Bounds(msgspec.Struct, frozen=True):
    """The fewest and the most child processes.

    Args:
        least: The fewest, at least 1.
        most: The most, at least ``least``.

    Raises:
        ConfigurationError: The numbers are not so.
    """

    least: int
    most: int

    def __post_init__(self) -> None:
        for number in (self.least, self.most):
            count("processes", number, least=-(2**31))
        if not 1 <= self.least <= self.most:
            raise ConfigurationError(
                f"processes are {self.least} to {self.most}: there must be at least 1, and MIN must not be over MAX"
            )

    @classmethod
    def of(cls, processes: Processes) -> Self:
        """The bounds that ``processes`` means.

        Args:
            processes: A number of processes, or (fewest, most).

        Returns:
            The bounds.

        Raises:
            ConfigurationError: ``processes`` is neither, or the numbers are no bounds.
        """
        if isinstance(processes, (tuple, list)) and len(processes) == 2:
            return cls(*processes)
        number = count("processes", processes, least=-(2**31))  # what is too few is said above
        return cls(number, number)


class Work(msgspec.Struct, frozen=True):
    """What a worker has to do, and has done."""

    #: Tasks that take a slot.
    running: int
    #: Tasks that it holds and that wait for one.
    waiting: int
    #: How many have run, since it began.
    ended: int


def wanted(*, running: int, waiting: int, run_time: float, concurrency: int, bounds: Bounds) -> int:
    """How many children are right for so many tasks, of which one takes ``run_time`` seconds of a slot.

    One slot for each task that runs, and as many for those that wait as it takes to be done with them within the
    horizon; but no task needs more than one.
    """
    ahead = waiting * min(1.0, run_time / HORIZON)
    return max(bounds.least, min(bounds.most, math.ceil((running + ahead) / concurrency)))


class Trend:
    """From what was wanted now and before to how many there shall be: up fast, down slowly and one by one."""

    def __init__(self, shrink_after: float) -> None:
        self._shrink_after = shrink_after
        self._before = 0
        #: Since when fewer are enough.
        self._fewer: float | None = None

    def follow(self, wish: int, *, present: int, now: float) -> int:
        """How many children there shall be."""
        steady, self._before = min(wish, self._before), wish
        if wish >= present:
            self._fewer = None
            return max(present, steady)
        if self._fewer is None:
            self._fewer = now
        if now - self._fewer < self._shrink_after:
            return present
        self._fewer = now
        return present - 1


class RunTime:
    """What a task takes of a slot, seen from outside: the slots in use, by the tasks that end meanwhile."""

    def __init__(self) -> None:
        self._used = 0.0
        self._ended = 0.0
        self._all_ended = 0
        self._running = 0

    def note(self, seconds: float, *, running: int, ended: int) -> float:
        """So much later, so many run and so many have ended since the beginning; the average of late (seconds).

        While none has ended it is all that they have used: at least so long does one take.
        """
        keep = math.exp(-seconds / _MEMORY)
        self._used = self._used * keep + (self._running + running) / 2 * seconds
        self._ended = self._ended * keep + ended - self._all_ended
        self._running, self._all_ended = running, ended
        return self._used / max(1.0, self._ended)


class Workforce(Protocol):
    """Whose number is changed."""

    @property
    def processes(self) -> int: ...
    @property
    def concurrency(self) -> int: ...
    def resize(self, processes: int, /) -> None: ...


class Scaler:
    """Has the number of a worker's child processes follow its work, between bounds.

    Args:
        workforce: The executor whose number of processes is changed: a ``ProcessExecutor``.
        bounds: The fewest and the most child processes.
        shrink_after: How long fewer children must have been enough before one of them leaves, and then the next
            (seconds).
    """

    def __init__(self, workforce: Workforce, bounds: Bounds, *, shrink_after: float = SHRINK_AFTER) -> None:
        self._workforce = workforce
        self._bounds = bounds
        self._trend = Trend(shrink_after)
        self._run_time = RunTime()
        #: What waited with the broker, and when it was asked.
        self._ready = 0
        self._asked = -math.inf

    @property
    def most_slots(self) -> int:
        """With as many children as there may be."""
        return self._bounds.most * self._workforce.concurrency

    async def run(
        self, look: Callable[[], Work], ready: Callable[[], Awaitable[int]], resized: Callable[[], None]
    ) -> None:
        """Until it is cancelled. ``ready``: what waits with the broker; ``resized``: there are other slots now."""
        then = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            now, work = time.monotonic(), look()
            run_time = self._run_time.note(now - then, running=work.running, ended=work.ended)
            then = now
            wish = self._wanted(work.running, work.waiting, run_time)
            present = self._workforce.processes
            if wish < self._bounds.most and present < self._bounds.most and self._is_busy(work):
                wish = self._wanted(work.running, work.waiting + await self._with_broker(ready), run_time)
            children = self._trend.follow(wish, present=present, now=now)
            if children != present:
                log.info("%d child processes from now on, not %d: %d tasks run", children, present, work.running)
                self._workforce.resize(children)
                resized()

    def _is_busy(self, work: Work) -> bool:
        return work.running >= self._workforce.processes * self._workforce.concurrency

    def _wanted(self, running: int, waiting: int, run_time: float) -> int:
        return wanted(
            running=running,
            waiting=waiting,
            run_time=run_time,
            concurrency=self._workforce.concurrency,
            bounds=self._bounds,
        )

    async def _with_broker(self, ready: Callable[[], Awaitable[int]]) -> int:
        """What waited there a moment ago."""
        if time.monotonic() - self._asked >= ASK_AFTER:
            try:
                self._ready = await ready()
            except BrokerError as error:
                self._ready = 0
                log.debug("what waits with the broker is not known: %s", error)
            self._asked = time.monotonic()
        return self._ready
