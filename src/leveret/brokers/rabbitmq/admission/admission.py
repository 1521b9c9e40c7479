"""What whoever holds the table of limits does all the time: admits, answers who asks, and looks for what is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from typing import TYPE_CHECKING, TypeAlias

import msgspec

from leveret.brokers.base import no_limit
from leveret.brokers.rabbitmq.admission.admitting import Admitting
from leveret.brokers.rabbitmq.admission.asked import (
    Answer,
    AskAlive,
    Asked,
    AskHeld,
    AskUses,
    Clear,
    Emptied,
    Ended,
    Serve,
)
from leveret.brokers.rabbitmq.admission.rows import limit_key, limit_value, queue_key
from leveret.brokers.rabbitmq.coordination import TenureLost
from leveret.errors import BrokerError, ConfigurationError, LimitNotFound
from leveret.model import DeclareLimits, decoded, limits_after

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.brokers.rabbitmq.admission.asked import Count, LookInto
    from leveret.brokers.rabbitmq.coordination import Request, Tenure
    from leveret.model import LimitRequest, LimitRow

log = logging.getLogger("leveret.rabbitmq.limits")

#: An end is forgotten so long after its row was dropped (seconds): until then it comes again to the next holder, which
#: may be given the row once more.
_REMEMBERED = 2.0
#: So often permits whose tasks are nowhere are looked for (seconds).
_STOCK = 30.0
#: Most limits, and queues that have some.
_MOST_LIMITS = 1_000
_Inline: TypeAlias = AskAlive | AskUses | AskHeld | Clear | Emptied
_INLINE = (AskAlive, AskUses, AskHeld, Clear, Emptied)
_request_of = msgspec.msgpack.Decoder(Asked).decode
_pack = msgspec.msgpack.Encoder().encode


class Admission:
    """The limits while this program holds the table. ``look``: None: for lost tasks nobody looks."""

    def __init__(self, tenure: Tenure, count: Count, look: LookInto | None = None) -> None:
        self._tenure = tenure
        self._count = count
        self._look = look
        self.admitting = Admitting(tenure, count)
        self._turn = asyncio.Lock()

    async def run(self) -> None:
        """Until the tenure is over: raises an exception group with TenureLost."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.admitting.windows.consume())
            group.create_task(self.admitting.run())
            group.create_task(self.admitting.windows.watch())
            if self._look is not None:
                group.create_task(self._take_stock(self._look))
            group.create_task(self._take_requests(group))

    async def answer(self, request: Asked) -> Answer:
        """For a program that holds the table for this alone. Raises LimitNotFound."""
        if isinstance(request, AskAlive | AskHeld | Clear | Emptied):
            return self._answered(request)
        assert not isinstance(request, AskUses | Ended)
        await self.do(request)
        return Answer()

    async def do(self, request: LimitRequest | Serve) -> None:
        """Raises LimitNotFound, ConfigurationError."""
        windows, limits = self.admitting.windows, self.admitting.permits.rows
        async with self._turn:
            queues = request.queues if isinstance(request, (DeclareLimits, Serve)) else ()
            rows: dict[str, bytes | None] = {queue_key(name): b"" for name in queues if name not in windows}
            changed: Mapping[str, LimitRow | None] = {}
            if not isinstance(request, Serve):
                found = limits_after(request, limits, time.time())
                if found is None:
                    raise no_limit(request)
                changed = found
                rows |= {limit_key(name): limit_value(row) for name, row in changed.items()}
            if len(limits) + len(windows) + len(rows) > _MOST_LIMITS:
                raise ConfigurationError(f"RabbitMQ keeps at most {_MOST_LIMITS} limits, and queues that have some")
            if rows:
                await self._tenure.change(rows)
            self.admitting.gate.define(changed)
        windows.add(queues)
        self.admitting.look_again()

    async def _take_requests(self, group: asyncio.TaskGroup) -> None:
        async for request in self._tenure:
            body = decoded(_request_of, request.body)
            if isinstance(body, Ended):
                self.admitting.end(body.permits)
                asyncio.get_running_loop().call_later(_REMEMBERED, request.done)
            elif isinstance(body, _INLINE):
                request.answer(self._told(body))
                request.done()
            elif body is None:
                log.warning("a request that this release does not know is left out: %r", request.body[:100])
                request.done()
            else:
                group.create_task(self._do_and_answer(request, body))

    async def _do_and_answer(self, request: Request, body: LimitRequest | Serve) -> None:
        with suppress(TenureLost):
            try:
                await self.do(body)
                answer = Answer()
            except (LimitNotFound, ConfigurationError) as error:
                answer = Answer(type(error).__name__, str(error))
            request.answer(_pack(answer))
            request.done()

    def _told(self, question: _Inline) -> bytes:
        if isinstance(question, AskUses):
            return _pack(self.admitting.gate.uses())
        return _pack(self._answered(question))

    def _answered(self, question: AskAlive | AskHeld | Clear | Emptied) -> Answer:
        match question:
            case AskAlive(permits):
                return Answer(alive=[permit for permit in permits if permit in self.admitting.permits.held])
            case AskHeld():
                return Answer(held={window.queue: window.held for window in self.admitting.windows})
            case Clear(queue):
                return Answer(held={queue: self.admitting.clear(queue)})
            case Emptied():
                self.admitting.free(question)
                return Answer()

    async def _take_stock(self, look: LookInto) -> None:
        """Free the permits of tasks that are nowhere: those that are not found at two looks, if it is sure which."""
        admitted = self.admitting.admitted
        suspects: dict[str, frozenset[str]] = {}
        while True:
            await asyncio.sleep(_STOCK)
            for queue in admitted.queues() | suspects.keys():
                before = admitted.of(queue)
                with suppress(BrokerError):
                    ready, _ = await self._count(queue) or (None, 0)
                    # With its queue a task is gone, whoever has it.
                    found = Emptied(queue, 0, []) if ready is None else None if ready else await look(queue)
                    gone = admitted.missing(before, found)
                    self.admitting.lose(queue, gone & suspects.pop(queue, frozenset()))
                    if gone:
                        suspects[queue] = gone
