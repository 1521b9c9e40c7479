"""Limits on RabbitMQ: rows of a fenced table, whose holder admits tasks and answers who asks. See docs/adr/0042."""

from __future__ import annotations

import asyncio
import logging
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.base import no_limit
from leveret.brokers.rabbitmq.admission import (
    Admission,
    Answer,
    AskAlive,
    AskHeld,
    AskUses,
    Clear,
    Emptied,
    Ended,
    Serve,
    uses_of,
)
from leveret.brokers.rabbitmq.coordination import TenureLost
from leveret.errors import BrokerError, BrokerUnavailable, ConfigurationError, LimitNotFound
from leveret.model import DeclareLimits, LimitUse

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Collection, Mapping, Sequence

    from leveret.brokers.rabbitmq.admission import Asked, LookInto
    from leveret.brokers.rabbitmq.coordination import FencedTable
    from leveret.brokers.rabbitmq.queues import DelayedPublisher
    from leveret.model import LimitRequest

log = logging.getLogger("leveret.rabbitmq.limits")

#: The table's name.
TABLE = "limits"
#: Requests that are handed to whoever holds the table and not done; each end of some tasks is one for a while.
REQUESTS = 10_000
#: How long whoever admits tasks may take to answer (seconds).
_ANSWER = 3.0
#: How often it is asked, and looked whether nobody does.
_TRIES = 4
#: A program that would admit tasks looks so often whether there are limits at all; and tries again (seconds).
_LOOK = 10.0
#: Where nobody could be told that a queue has limited tasks, that is tried again after so long (seconds).
_UNTOLD = 5.0
#: A task that was cancelled and has not ended is cancelled again after so long (seconds).
_CANCEL_AGAIN = 0.2
_REFUSALS: dict[str, type[Exception]] = {one.__name__: one for one in (LimitNotFound, ConfigurationError)}
_pack = msgspec.msgpack.Encoder().encode
_answer_of = msgspec.msgpack.Decoder(Answer).decode
_uses_of = msgspec.msgpack.Decoder(list[LimitUse]).decode


class RabbitMQLimits:
    """See `leveret.brokers.Limits`."""

    def __init__(self, table: FencedTable, delayed: DelayedPublisher, look: LookInto) -> None:
        self._table = table
        self._delayed = delayed
        self._look = look
        #: There may be limits now.
        self._made = asyncio.Event()
        #: Queues that whoever admits tasks knows of.
        self._served: set[str] = set()
        #: Until then nobody is asked to admit tasks of the others (the loop's time).
        self._untold_until = float("-inf")

    async def read(self) -> Sequence[LimitUse]:
        if not await self._table.exists():
            return ()
        answer = await self._table.ask(_pack(AskUses()), _ANSWER)
        return uses_of(await self._table.read()) if answer is None else _uses_of(answer)

    async def ask(self, request: LimitRequest) -> None:
        if isinstance(request, DeclareLimits):
            if request.queues:
                await self._delayed.make_gates(request.queues)
                self._served.update(request.queues)
            elif not request.rules and not await self._table.exists():
                return
        elif not await self._table.exists():
            raise no_limit(request)
        await self._ask(request)

    async def serve(self, queues: Collection[str]) -> None:
        """Have the tasks of these queues that wait be admitted, now and later."""
        if unknown := [queue for queue in queues if queue not in self._served]:
            await self._ask(Serve(unknown))
            self._served.update(unknown)

    async def tell(self, queues: Collection[str]) -> None:
        """Have whoever admits tasks know of these queues. If nobody does, or may be asked, see `are_served`."""
        now = asyncio.get_running_loop().time()
        unknown = [queue for queue in queues if queue not in self._served]
        if not unknown or now < self._untold_until:
            return
        with suppress(BrokerError):
            answer = await self._table.ask(_pack(Serve(unknown)), _ANSWER)
            if answer is not None and not _answer_of(answer).refusal:
                self._served.update(unknown)
                return
        self._untold_until = now + _UNTOLD

    def are_served(self, queue: str) -> bool:
        """Whether tasks of a queue may be stored where they wait: somebody admits them, now or later."""
        return queue in self._served

    async def end(self, permits: Sequence[str]) -> None:
        """Give permits back. Returned means durable. Raises BrokerError."""
        await self._table.post(_pack(Ended(list(permits))))

    async def alive(self, permits: Sequence[str]) -> Collection[str]:
        """Those of the permits that have not been given back. Raises BrokerError."""
        return (await self._ask(AskAlive(list(permits)))).alive

    async def held(self) -> Mapping[str, int]:
        """How many tasks of each queue that wait are with whoever admits them. Raises BrokerError."""
        answer = await self._table.ask(_pack(AskHeld()), _ANSWER)
        return {} if answer is None else _checked(_answer_of(answer)).held

    async def clear(self, queue: str) -> int:
        """Have whoever admits tasks let those of a queue go that wait; how many these were."""
        if not await self._table.exists():
            return 0
        return (await self._ask(Clear(queue))).held.get(queue, 0)

    async def emptied(self, queue: str, taken: int, running: Sequence[str]) -> None:
        """Free the permits of tasks that were deleted.

        ``taken``: how many of the queue workers have. ``running``: the ids of tasks that are known to run.
        """
        if await self._table.exists():
            await self._ask(Emptied(queue, taken, list(running)))

    @asynccontextmanager
    async def keep(self) -> AsyncGenerator[None]:
        task = asyncio.get_running_loop().create_task(self._keep())
        try:
            yield
        finally:
            while not task.done():
                task.cancel()  # more than once, since aiormq may swallow it
                await asyncio.wait([task], timeout=_CANCEL_AGAIN)

    async def _ask(self, request: Asked) -> Answer:
        encoded = _pack(request)
        for _ in range(_TRIES):
            answer = await self._table.ask(encoded, _ANSWER)
            if answer is not None:
                return _checked(_answer_of(answer))
            found = await self._do_here(request)
            if found is not None:
                self._made.set()
                return found
        raise BrokerUnavailable(
            f"whoever admits tasks did not answer {_TRIES} times; what was asked may be done or not"
        )

    async def _do_here(self, request: Asked) -> Answer | None:
        """Where nobody holds the table, this program does for a moment; None: somebody does."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER), self._table.tenures() as tenures:
                async for tenure in tenures:
                    with suppress(TenureLost):
                        return await Admission(tenure, self._delayed.count).answer(request)
        return None

    async def _keep(self) -> None:
        """Stand by, and admit tasks while this program holds the table."""
        while True:
            try:
                if await self._table.exists():
                    await self._admit()
            except (BrokerError, ExceptionGroup) as error:
                is_unexpected = isinstance(error, ExceptionGroup)
                doing = "this program cannot admit tasks that wait for limits; it tries again: %s"
                log.warning(doing, error, exc_info=error if is_unexpected else None)
            self._made.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK):
                    await self._made.wait()

    async def _admit(self) -> None:
        async with self._table.tenures() as tenures:
            async for tenure in tenures:
                try:
                    await Admission(tenure, self._delayed.count, self._look).run()
                except* TenureLost as lost:
                    log.debug("tasks are admitted by another program: %s", lost.exceptions[0])


def _checked(answer: Answer) -> Answer:
    if not answer.refusal:
        return answer
    raise _REFUSALS.get(answer.refusal, BrokerUnavailable)(answer.problem)
