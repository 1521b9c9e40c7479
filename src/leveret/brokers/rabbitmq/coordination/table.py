"""The fenced table: some thousand rows that one program at a time changes, kept by RabbitMQ alone.

The rows are the messages of a queue with a single active consumer, which holds them unacknowledged: the election of
the holder and the table are one thing. See docs/adr/0038 for the protocol and for what a fault can do.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers.backoff import backoff
from leveret.brokers.flights import Flights
from leveret.brokers.rabbitmq.amqp import PERSISTENT, Message, Properties
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.coordination.entries import (
    requests_declaration,
    requests_queue,
    table_declaration,
    table_queue,
)
from leveret.brokers.rabbitmq.coordination.membership import (
    MOST_ROWS,
    READ,
    REQUESTS,
    Membership,
    Ride,
    Side,
    TenureLost,
)
from leveret.brokers.rabbitmq.queues import Look, examine, make_queues, message_count
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable, QueueMismatch, QueueNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping, Sequence

    from leveret.brokers.rabbitmq.amqp import Hosts, Incoming
    from leveret.brokers.rabbitmq.queues import Declaration, Publisher, Requester

log = logging.getLogger("leveret.rabbitmq.table")

_REPLY_TO = "amq.rabbitmq.reply-to"
_REQUEST = "leveret.request"
#: RabbitMQ gives the table to another when its holder has said nothing for about twice so long (seconds).
_HEARTBEAT = 3
#: How long whoever holds the table may take to answer, before a reader looks for itself (seconds).
_ANSWER = 2.0
#: How many queues are looked for at once, each on a channel of its own.
_AT_ONCE = 4
#: A node that is starting may refuse for a moment; one that refuses so often means it.
_REFUSALS = 3
#: A queue that was seen so lately need not be looked for before each of many tasks (seconds).
_SEEN = 0.25
#: How long joining and reading may take (seconds).
_READING = 20.0


class Request:
    """Something that was posted, or asked. It comes again, to the next holder, until it is `done`."""

    def __init__(self, membership: Membership, message: Incoming) -> None:
        self._membership = membership
        self._message = message
        self.body = message.body

    def answer(self, body: bytes) -> None:
        """To whoever asked; of what was posted, nobody did."""
        self._membership.answer(self._message, body)

    def done(self) -> None:
        """What it led to is durable."""
        self._membership.acknowledge([self._message.tag])


class Tenure:
    """The table while this program holds it. What waits in it raises TenureLost when that ends."""

    def __init__(self, membership: Membership, queues: _QueueLook) -> None:
        self._membership = membership
        self._candidate = membership.candidate
        self._queues = queues

    @property
    def rows(self) -> Mapping[str, bytes]:
        """All rows as they are now, by key: a copy."""
        return self._candidate.rows()

    def get(self, key: str) -> bytes | None:
        return self._candidate.value(key)

    @property
    def uncertain(self) -> frozenset[str]:
        """Keys whose row was enqueued with a task by a holder that ended before it knew that both are stored.

        The row is. The task is too, but for the death of a broker node in that moment. Until the row is changed.
        """
        return self._candidate.uncertain()

    @property
    def epoch(self) -> int:
        """Each tenure's is higher than those before."""
        return self._candidate.epoch

    @property
    def is_over(self) -> bool:
        return self._membership.is_over

    async def over(self) -> str:
        """Wait until it is over, and why."""
        return await self._membership.over()

    async def change(self, rows: Mapping[str, bytes | None]) -> None:
        """Set rows, or remove them (None). Each is changed for itself. Returned means that all are, and durable.

        Raises TenureLost, when each may be changed or not; ValueError for too many rows.
        """
        fresh = sum(1 for key, value in rows.items() if value is not None and self._candidate.value(key) is None)
        if "" in rows or (fresh and len(self._candidate) + fresh > MOST_ROWS + 1):
            raise ValueError(f"a table has at most {MOST_ROWS} rows, and no empty key")
        await self._membership.change(rows)

    async def enqueue(self, message: Message, key: str, value: bytes) -> None:
        """Store a task and set a row that is there already, both or neither, by one publish.

        Raises QueueNotFound, QueueFull or BrokerUnavailable when neither was; TenureLost when that is not known: see
        `uncertain`.
        """
        if self._candidate.value(key) is None:
            raise ValueError(f"there is no row {key!r} to go with the task")
        # One that is missing would not show: the row alone is stored then. One that goes later takes its tasks along.
        await self._queues.require(message.queue)
        await self._membership.enqueue(message, key, value)

    async def enqueue_all(self, rides: Sequence[Ride]) -> None:
        """Store tasks of one queue, each with a row of a new key; returned means sent: see `Ride.told`.

        Raises QueueNotFound or BrokerUnavailable when none was sent; TenureLost when that is not known.
        """
        await self._queues.require(rides[0].message.queue, within=_SEEN)
        await self._membership.enqueue_all(rides)

    def drop(self, keys: Iterable[str]) -> None:
        """Forget rows whose keys never come again. It costs nothing, and is durable a moment later: until then the next
        holder may find them. See docs/adr/0042.
        """
        self._membership.drop(keys)

    async def consume(self, queue: str, prefetch: int, take: Callable[[list[Incoming]], None]) -> Side:
        """Have what is in another queue as long as this lasts. Raises BrokerError."""
        try:
            return await self._membership.consume_besides(queue, prefetch, take)
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, f"consuming {queue!r}") from error

    async def __aiter__(self) -> AsyncIterator[Request]:
        """What is posted and asked, until this is over: then it raises TenureLost."""
        while True:
            message = await self._membership.requests.get()
            if message is None:
                self._membership.requests.put_nowait(None)
                raise TenureLost(await self._membership.over())
            yield Request(self._membership, message)


class _QueueLook:
    """Whether queues are there, asked on channels that are kept."""

    def __init__(self, publisher: Publisher) -> None:
        self._publisher = publisher
        self._flights: Flights[str] = Flights()
        self._connection: amqp.Connection | None = None
        self._look: Look | None = None
        self._slots = asyncio.Semaphore(_AT_ONCE)
        #: When a queue was last seen (the loop's time).
        self._seen: dict[str, float] = {}

    async def require(self, queue: str, *, within: float = 0.0) -> None:
        """``within``: to have seen it so lately is enough (seconds). Raises QueueNotFound, BrokerUnavailable."""
        now = asyncio.get_running_loop().time()
        if now - self._seen.get(queue, float("-inf")) < within:
            return
        try:
            await self._flights.join([queue], self._ask)
            self._seen[queue] = now
        except amqp.CONNECTION_LOST as error:
            raise amqp.translate(error, f"looking for queue {queue!r}") from error

    async def _ask(self, names: Sequence[str]) -> None:
        async with self._slots:
            connection = await self._publisher.connection()
            if self._look is None or self._connection is not connection:
                self._connection, self._look = connection, Look(connection)
            for name in names:
                if await amqp.told(self._look.message_count(name)) is None:
                    raise QueueNotFound(f"queue {name!r} does not exist")

    def close(self) -> None:
        self._flights.close(BrokerUnavailable("the connection was closed by this program"))


class FencedTable:
    """A table by its name. ``requests``: how many may be handed to its holder and not done."""

    def __init__(
        self, hosts: Hosts, publisher: Publisher, requester: Requester, name: str, requests: int = REQUESTS
    ) -> None:
        self._hosts = hosts.with_heartbeat(_HEARTBEAT)
        self._publisher = publisher
        self._requester = requester
        self.name = name
        self._requests = requests
        self._queues = _QueueLook(publisher)
        self._is_made = False

    async def exists(self) -> bool:
        """Whether somebody has made it. Raises BrokerError."""
        return self._is_made or await self._consumers() is not None

    async def post(self, request: bytes) -> None:
        """Have whoever holds the table get this, now or later. Returned means stored. Raises BrokerError."""
        properties = Properties(message_type=_REQUEST, message_id=secrets.token_hex(16), delivery_mode=PERSISTENT)
        message = Message(requests_queue(self.name), request, properties)
        try:
            await self._publisher.publish([message])
        except QueueNotFound:
            self._is_made = False
            await self._make()
            await self._publisher.publish([message])

    async def ask(self, question: bytes, timeout: float) -> bytes | None:
        """Ask whoever holds the table; None: nobody does, or answers in time (seconds). Raises BrokerError."""
        pieces = await self._ask(_REQUEST, question, timeout)
        return None if pieces is None else b"".join(pieces)

    async def read(self) -> Mapping[str, bytes]:
        """All rows: those of a table that nobody has made are none. Raises BrokerError.

        Whoever holds the table answers. When nobody does, this program takes that place for a moment, and changes
        nothing.
        """
        until = asyncio.get_running_loop().time() + _READING
        while asyncio.get_running_loop().time() < until:
            pieces = await self._ask(READ, b"", _ANSWER)
            if pieces is not None:
                return {key: value for piece in pieces for key, value in _decode_rows(piece).items()}
            if await self._consumers() is None:
                return {}
            # Whoever holds it by now has not been asked, if it changed hands meanwhile: then it is asked again.
            with suppress(TenureLost, TimeoutError):
                async with asyncio.timeout(_ANSWER):
                    return await self._read_itself()
        raise BrokerUnavailable(f"the table {self.name!r} could not be read within {_READING:g} s")

    async def _read_itself(self) -> Mapping[str, bytes]:
        membership = await Membership.join(self._hosts, self.name, reads=True)
        try:
            await membership.held()
            return membership.candidate.rows()
        finally:
            await membership.leave()

    @asynccontextmanager
    async def tenures(self) -> AsyncGenerator[AsyncIterator[Tenure]]:
        """Stand by, and get a tenure each time this program has become the holder. Who asks for the next gives it up.

        Raises BrokerRefused, and QueueMismatch for a queue that is no table's.
        """
        async with aclosing(self._tenures()) as tenures:
            yield tenures

    async def _tenures(self) -> AsyncGenerator[Tenure]:
        pauses = backoff()
        refusals = 0
        while True:
            try:
                await self._make()
                membership = await Membership.join(self._hosts, self.name, requests=self._requests)
            except BrokerError as error:
                refusals += isinstance(error, BrokerRefused)
                if refusals >= _REFUSALS:
                    raise
                log.debug("the table %r cannot be joined: %s", self.name, error)
                self._is_made = False
                await asyncio.sleep(next(pauses))
                continue
            refusals = 0
            try:
                await membership.held()
                pauses = backoff()
                log.info("this program holds the table %r: epoch %d", self.name, membership.candidate.epoch)
                yield Tenure(membership, self._queues)
            except TenureLost as error:
                log.debug("%s", error)
            finally:
                await membership.leave()
            self._is_made = False  # a queue that was deleted may be why
            log.info("standing by for the table %r again: %s", self.name, await membership.over())
            await asyncio.sleep(next(pauses))

    async def close(self) -> None:
        self._queues.close()

    async def _make(self) -> None:
        if self._is_made:
            return

        async def ask() -> None:
            declarations = [table_declaration(self.name), requests_declaration(self.name)]
            connection = await self._publisher.connection()
            await make_queues(connection, declarations)
            with suppress(amqp.ChannelAccessRefused):
                _judge(await examine(connection, declarations[0]))

        await self._requester.ask(f"making the table {self.name!r}", ask, patience=None)
        self._is_made = True

    async def _consumers(self) -> int | None:
        """How many hold or read the table (RabbitMQ counts the active consumer alone); None: there is no table."""

        async def ask() -> int | None:
            found = await message_count(await self._publisher.connection(), table_queue(self.name))
            return None if found is None else found[1]

        return await self._requester.ask(f"looking for the table {self.name!r}", ask, patience=None)

    async def _ask(self, kind: str, question: bytes, timeout: float) -> list[bytes] | None:
        if not await self._consumers():
            return None

        async def ask() -> list[bytes] | None:
            return await self._ask_holder(await self._publisher.connection(), kind, question, timeout)

        return await self._requester.once(f"asking for the table {self.name!r}", ask, timeout + _ANSWER)

    async def _ask_holder(
        self, connection: amqp.Connection, kind: str, question: bytes, timeout: float
    ) -> list[bytes] | None:
        channel = await amqp.open_channel(connection, confirms=False)
        pieces: list[bytes] = []
        came = asyncio.Event()

        async def hear(answer: amqp.DeliveredMessage) -> None:
            pieces.append(answer.body)
            if answer.header.properties.message_type != "more":
                came.set()

        try:
            await channel.basic_consume(_REPLY_TO, hear, no_ack=True)
            # A question that nobody takes in time goes away by itself.
            properties = Properties(
                message_type=kind, reply_to=_REPLY_TO, delivery_mode=1, expiration=str(int(timeout * 1_000))
            )
            await channel.basic_publish(
                question, exchange="", routing_key=requests_queue(self.name), properties=properties, wait=False
            )
            with suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await came.wait()
                    return pieces
            return None
        finally:
            await amqp.close_channel(channel)


def _judge(found: Declaration) -> None:
    """Raises QueueMismatch for a queue with several active consumers: each would take itself for the holder."""
    if not found.arguments.get("x-single-active-consumer"):
        wanted = {"x-single-active-consumer": True}
        raise QueueMismatch(found.name, found=found.described(), wanted=wanted, remedy="delete it, and it is made anew")


_decode_rows = msgspec.msgpack.Decoder(dict[str, bytes]).decode
