"""How many deliveries a worker holds; with ``prefetch="auto"``: what it can run, and a moment's work ahead."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import TYPE_CHECKING, Literal, TypeAlias

from leveret.errors import BrokerError, ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from leveret.brokers import Consumer
    from leveret.worker.job import Job, Jobs
    from leveret.worker.stopping import Background, Stop

log = logging.getLogger("leveret.worker")

Prefetch: TypeAlias = int | Literal["auto", "unlimited"]
#: AMQP carries it in 16 bits.
MOST_PREFETCH = 65_535
#: What waits in a worker is worth at most so much work: it hides the way to the broker and back (seconds).
AHEAD = 0.04
#: However short the tasks are.
MOST_AHEAD = 256
#: How often it is decided while tasks run: a slow one is noticed after so long (seconds).
TICK = 0.05
#: After less was wanted, more is not asked for within so long, twice as long each time, at most so long (seconds):
#: RabbitMQ before 4.3 counts what is handed back, and puts it last.
FIRST_REST, LONGEST_REST = 0.25, 30.0
#: A worker that went on for so many times its last rest begins with the first again.
_CALM = 10


def first_credit(prefetch: object, slots: int) -> int | None:
    """The credit to begin with; None: no limit. Raises ConfigurationError."""
    if prefetch == "unlimited":
        return None
    credit = slots if prefetch == "auto" else prefetch
    if not isinstance(credit, int) or not 1 <= credit <= MOST_PREFETCH:
        raise ConfigurationError(f"prefetch is {prefetch!r}; it must be 1 to {MOST_PREFETCH}, 'auto' or 'unlimited'")
    return credit


def credit(run_time: float, *, slots: int, queues: int, present: int) -> int:
    """The credit of each queue, when a task takes ``run_time`` seconds of a slot.

    It grows twofold at most, and small changes are not worth a transaction; but when nothing is to wait, nothing does.
    """
    worth = AHEAD * slots / run_time if run_time > 0 else MOST_AHEAD
    wanted = slots + int(min(worth, MOST_AHEAD) / queues)
    if wanted == slots or wanted * 2 <= present:
        return wanted
    return max(slots, min(wanted, 2 * present) if wanted * 2 >= present * 3 else present)


class Rest:
    """How long not to ask for more: tasks that are short and slow in turn are not worth what each turn costs."""

    def __init__(self) -> None:
        self._seconds = FIRST_REST
        self._until = -math.inf

    def begin(self, now: float) -> None:
        """Less is wanted."""
        is_calm = now - self._until > _CALM * self._seconds
        self._seconds = FIRST_REST if is_calm else min(2 * self._seconds, LONGEST_REST)
        self._until = now + self._seconds

    def lasts(self, now: float) -> bool:
        return now < self._until


class Pace:
    """What a task takes of a slot, measured from one decision to the next (seconds)."""

    def __init__(self, now: float) -> None:
        self._since = now
        self._used = 0.0
        self._ended = 0

    def ended(self, began: float, now: float) -> None:
        """A task has given its slot back, that it got then."""
        self._used += now - max(began, self._since)
        self._ended += 1

    def run_time(self, now: float, running: Iterable[float]) -> float | None:
        """Since this was asked last. None: nothing ran. ``running``: when each task that runs still got its slot.

        While none has ended it is all that they have used: at least so long does one take.
        """
        used = self._used + sum(now - max(began, self._since) for began in running)
        ended = self._ended
        self._since, self._used, self._ended = now, 0.0, 0
        return used / max(1, ended) if used or ended else None


class AdaptiveCredit:
    """Has a consumer's credit follow the pace of the tasks.

    ``queues``: their number. ``shrunk``: called with a new credit, since more than that may be held.
    """

    def __init__(
        self,
        present: int,
        *,
        consumer: Consumer,
        queues: int,
        slots: Callable[[], int],
        jobs: Jobs,
        background: Background,
        stop: Stop,
        shrunk: Callable[[int], None],
    ) -> None:
        self._present = present
        self._consumer = consumer
        self._queues = queues
        self._slots = slots
        self._jobs = jobs
        self._background = background
        self._stop = stop
        self._shrunk = shrunk
        self._pace = Pace(time.monotonic())
        self._rest = Rest()
        self._deciding: asyncio.TimerHandle | None = None

    def ended(self, jobs: Iterable[Job], now: float) -> None:
        """These have given their slots back."""
        for job in jobs:
            self._pace.ended(job.began_at or now, now)

    def ahead(self, slots: int) -> int:
        """How many more than there are slots may wait where they are to run: what is held beyond the slots."""
        return min(MOST_AHEAD, max(0, self._present - slots) * self._queues)

    def decide_soon(self) -> None:
        """Decide on the credit in a moment, and again as long as anything runs."""
        if self._deciding is None:
            self._deciding = asyncio.get_running_loop().call_later(TICK, self._decide)

    def stop(self) -> None:
        if self._deciding is not None:
            self._deciding.cancel()

    def _decide(self) -> None:
        now = time.monotonic()
        run_time = self._pace.run_time(now, [job.began_at for job in self._jobs.begun.values() if job.began_at])
        if run_time is not None and not self._stop.is_set():
            slots = self._slots()
            wanted = credit(run_time, slots=slots, queues=self._queues, present=self._present)
            if wanted < self._present:
                self._rest.begin(now)
            elif self._rest.lasts(now):
                wanted = max(slots, self._present)
            if wanted != self._present:
                self._background.start(self._change(wanted))
                return
        self._decide_again()

    def _decide_again(self) -> None:
        self._deciding = None
        if self._jobs.begun:
            self.decide_soon()

    async def _change(self, wanted: int) -> None:
        try:
            await self._consumer.set_credit(wanted)
        except BrokerError as error:
            log.info("still holding %d deliveries of each queue, not %d: %s", self._present, wanted, error)
        else:
            self._present = wanted
            self._shrunk(wanted)
        self._decide_again()
