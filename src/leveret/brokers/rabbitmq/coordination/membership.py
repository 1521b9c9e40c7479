"""One connection's stay at a table's queue: carries out what `machine` decides, all of it on one channel."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from leveret.brokers.rabbitmq.amqp import ConfirmChannel, Limits, Message, Properties, acks, content_of
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.coordination import machine
from leveret.brokers.rabbitmq.coordination.entries import (
    MOST_RIDING,
    Foreign,
    Row,
    entry_of,
    hello_message,
    is_own,
    requests_queue,
    row_message,
    table_queue,
    with_row,
)
from leveret.brokers.rabbitmq.queues import fitted, steady_arguments
from leveret.errors import BrokerError
from leveret.model import this_process

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
    from typing import Self

    from leveret.brokers.rabbitmq.amqp import Hosts, Incoming, PublishCall
    from leveret.errors import EnqueueError

log = logging.getLogger("leveret.rabbitmq.table")

#: Most rows of a table: with a takeover of less than two seconds.
MOST_ROWS = 12_000
#: Unacknowledged messages of the table: each row, its next version, tombstones and hellos.
_PREFETCH = 20_000
#: Requests that are handed to the holder and not done.
REQUESTS = 100
_LOOK = machine.HELLO / 2
#: Most tasks with a row that are sent as one call.
_CHUNK = 100
#: About how many bytes of rows one answer has.
_PIECE = 256 * 1024
#: The question for all rows, which is answered here.
READ = "leveret.read"
_ROWS_TAG, _REQUESTS_TAG = "leveret-rows", "leveret-requests"


class TenureLost(BrokerError):
    """This one holds the table no more, or cannot be sure of it. What was not done by then may be done or not."""


class Ride(NamedTuple):
    """A task, and the row that goes with it. ``told``: called when both are stored, or with why neither is."""

    message: Message
    key: str
    value: bytes
    told: Callable[[EnqueueError | None], None]


class _Changes:
    """Changes that are on the way, by the numbers of their rows, and who waits for each."""

    def __init__(self) -> None:
        self._waiting: dict[int, asyncio.Future[None]] = {}
        #: Who is told of each ride, in place of a future.
        self._told: dict[int, Callable[[EnqueueError | None], None]] = {}
        #: Those of rows that ride on a task: they are done when both are stored.
        self._rides: set[int] = set()
        self._refusals: dict[int, EnqueueError] = {}

    def expect(self, number: int, *, rides: bool = False) -> asyncio.Future[None]:
        change = self._waiting[number] = _new_future()
        if rides:
            self._rides.add(number)
        return change

    def tell(self, number: int, told: Callable[[EnqueueError | None], None]) -> None:
        self._rides.add(number)
        self._told[number] = told

    def applied(self, number: int) -> None:
        """The row was delivered back."""
        if number not in self._rides:
            _resolve(self._waiting.pop(number, None))

    def stored(self, number: int) -> None:
        """The row was delivered back, and the task that it rides on is confirmed."""
        self._rides.discard(number)
        _resolve(self._waiting.pop(number, None))
        if (told := self._told.pop(number, None)) is not None:
            told(None)

    def will_be_refused(self, number: int, why: EnqueueError) -> None:
        self._refusals[number] = why

    def refused(self, number: int) -> None:
        """Neither the task nor the row is stored."""
        self._rides.discard(number)
        why = self._refusals.pop(number)
        _fail(self._waiting.pop(number, None), why)
        if (told := self._told.pop(number, None)) is not None:
            told(why)

    def lose(self, reason: str) -> None:
        """Nothing is known of what is still on the way."""
        for waiting in self._waiting.values():
            _fail(waiting, TenureLost(reason))
        self._waiting.clear()
        self._told.clear()


class Side:
    """A queue that the holder consumes besides the table, on a channel of its own of the same connection."""

    def __init__(self, line: amqp.Link, channel: amqp.Channel) -> None:
        self._line = line
        self._channel = channel

    @property
    def is_closed(self) -> bool:
        return self._line.is_lost or self._channel.is_closed

    def acknowledge(self, tags: Sequence[int], oldest: int | None) -> None:
        """``oldest``: see `acks`."""
        if tags and not self.is_closed:
            self._line.connection.writer.write(acks(self._channel.number, tags, oldest))

    async def close(self) -> None:
        """What is not acknowledged goes back to its queue."""
        if not self.is_closed:
            await amqp.close_channel(self._channel)


class Membership:
    """A candidate's connection, until it is over. `held` tells when it has become the holder's."""

    def __init__(self, channel: ConfirmChannel, name: str, *, reads: bool, requests: int = REQUESTS) -> None:
        loop = asyncio.get_running_loop()
        self._clock = loop.time
        self._channel = channel
        self._line = channel.line
        self._name = name
        self._queue = table_queue(name)
        self.me = f"{this_process()}:{secrets.token_hex(6)}"
        self.candidate = machine.Candidate(self.me, loop.time(), time.time(), reads=reads)
        self._reads = reads
        self._most_requests = requests
        #: Done when this one holds the table.
        self._holding = _new_future()
        self._over: asyncio.Future[str] = loop.create_future()
        self._changes = _Changes()
        #: Done when something of ours comes back; None: nobody waits for it.
        self._proof: asyncio.Future[None] | None = None
        #: None: there are no more.
        self.requests: asyncio.Queue[Incoming | None] = asyncio.Queue()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._line.when_lost(lambda: self._end(self._line.farewell or "the connection was lost"))

    @classmethod
    async def join(cls, hosts: Hosts, name: str, *, reads: bool = False, requests: int = REQUESTS) -> Self:
        """``requests``: how many may be handed to the holder and not done.

        Raises BrokerUnavailable or BrokerRefused; the queues must be there.
        """
        channel = await ConfirmChannel.open(hosts, Limits(), _fit, purpose="table")
        membership = cls(channel, name, reads=reads, requests=requests)
        try:
            await channel.line.run(membership._begin())
        except BaseException as error:
            await membership.leave()
            if isinstance(error, amqp.CONNECTION_LOST):
                raise amqp.translate(error, f"joining the table {name!r}") from error
            raise
        return membership

    async def _begin(self) -> None:
        channel = self._line.channel
        channel.on_consumer_cancel_callbacks.add(lambda _: self._end("RabbitMQ cancelled the consumer"))
        self._line.take_deliveries(self._on_messages)
        await channel.basic_qos(prefetch_count=_PREFETCH)
        await self._consume(self._queue, _ROWS_TAG)
        self._do(self.candidate.begin(self._clock()))
        self._start(self._look())

    async def _consume(self, queue: str, tag: str) -> None:
        arguments = steady_arguments(self._line.connection)
        await self._line.channel.basic_consume(queue, _not_called, consumer_tag=tag, arguments=arguments)

    @property
    def is_over(self) -> bool:
        return self._over.done()

    async def held(self) -> None:
        """Wait until this one holds the table. Raises TenureLost."""
        self._check()
        await asyncio.shield(self._holding)

    async def over(self) -> str:
        """Wait until it is over, and why."""
        return await asyncio.shield(self._over)

    async def leave(self) -> None:
        """Close the connection: the next candidate gets the rows."""
        self._end("this program left it")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._closing is not None:
            await asyncio.shield(self._closing)

    async def prove(self) -> None:
        """Return when it was just seen that this one is active. Raises TenureLost."""
        while not self.candidate.is_fresh(self._clock()):
            self._check()
            if self._proof is None:
                self._proof = _new_future()
                self._do(self.candidate.prove(self._clock()))
            await asyncio.shield(self._proof)
        self._check()

    async def change(self, rows: Mapping[str, bytes | None]) -> None:
        """Returned means that each row came back. Raises TenureLost, then each may be changed or not."""
        await self.prove()
        now = self._clock()
        sends = [self.candidate.change(key, value, now) for key, value in rows.items()]
        changes = [self._changes.expect(send.number) for send in sends]
        self._do(sends)
        await asyncio.gather(*changes)

    async def enqueue(self, message: Message, key: str, value: bytes) -> None:
        """Store a task and its row by one publish. Raises TenureLost, QueueFull."""
        if len(value) > MOST_RIDING:
            raise ValueError(
                f"a row of {len(value)} bytes does not fit the headers of a task, at most {MOST_RIDING} do"
            )
        await self.prove()
        send = self.candidate.change(key, value, self._clock(), rides=True)
        change = self._changes.expect(send.number, rides=True)
        assert isinstance(send.entry, Row)
        self._publish(send.number, with_row(self._queue, message, send.entry))
        await change

    async def enqueue_all(self, rides: Sequence[Ride]) -> None:
        """Have each task be stored with a row of a new key; returned means sent. Raises TenureLost."""
        await self.prove()
        now = self._clock()
        for start in range(0, len(rides), _CHUNK):
            numbers, messages = [], []
            for ride in rides[start : start + _CHUNK]:
                send = self.candidate.change(ride.key, ride.value, now, rides=True)
                assert isinstance(send.entry, Row)
                self._changes.tell(send.number, ride.told)
                numbers.append(send.number)
                messages.append(with_row(self._queue, ride.message, send.entry))
            call = self._channel.tracker.post(messages)
            call.done.add_done_callback(partial(self._on_outcomes, numbers, call))

    def drop(self, keys: Iterable[str]) -> None:
        """See `machine.Candidate.drop`."""
        self._do(self.candidate.drop(keys))

    async def consume_besides(self, queue: str, prefetch: int, take: Callable[[list[Incoming]], None]) -> Side:
        """Consume a queue that is there. Raises what aio-pika raises."""
        channel = await amqp.open_channel(self._line.connection, confirms=False)
        self._line.connection.take_deliveries(channel.number, take)
        channel.on_consumer_cancel_callbacks.add(lambda _: self._line.start(amqp.close_channel(channel)))
        await channel.basic_qos(prefetch_count=prefetch)
        await channel.basic_consume(queue, _not_called, arguments=steady_arguments(self._line.connection))
        return Side(self._line, channel)

    def acknowledge(self, tags: Sequence[int]) -> None:
        if tags and not self._line.is_lost and not self.is_over:
            self._line.connection.writer.write(acks(self._line.channel.number, tags, 0))

    def answer(self, question: Incoming, body: bytes, *, more: bool = False) -> None:
        """To whoever asked, who may not wait any more."""
        asked = content_of(question.header).properties
        if asked.reply_to and not self.is_over:
            properties = Properties(
                correlation_id=asked.correlation_id, delivery_mode=1, message_type="more" if more else None
            )
            self._channel.tracker.post([Message(asked.reply_to, body, properties)], mandatory=False)

    # What comes in

    def _on_messages(self, messages: list[Incoming]) -> None:
        rows = []
        for message in messages:
            if message.consumer == _REQUESTS_TAG.encode():
                self._take_request(message)
            else:
                entry = entry_of(message)
                if isinstance(entry, Foreign):
                    log.warning("what is in %s is no row that this release knows: %r", self._queue, message.body[:100])
                rows.append((entry, message.tag, message.redelivered))
        if rows:
            self._do(self.candidate.delivered(rows, self._clock()))

    def _take_request(self, message: Incoming) -> None:
        if content_of(message.header).properties.message_type != READ:
            self.requests.put_nowait(message)
            return
        piece: dict[str, bytes] = {}
        size = 0
        for key, value in self.candidate.rows().items():
            if size > _PIECE:
                self.answer(message, msgspec.msgpack.encode(piece), more=True)
                piece, size = {}, 0
            piece[key] = value
            size += len(key) + len(value)
        self.answer(message, msgspec.msgpack.encode(piece))
        self.acknowledge([message.tag])

    async def _look(self) -> None:
        while not self.is_over:
            await asyncio.sleep(_LOOK)
            if self._channel.tracker.is_blocked:
                self.candidate.rest(self._clock())
            else:
                self._do(self.candidate.look(self._clock(), time.time()))

    # What goes out

    def _do(self, actions: Sequence[machine.Action]) -> None:
        for action in actions:
            if isinstance(action, machine.Send):
                self._send(action)
            elif isinstance(action, machine.Acknowledge):
                self.acknowledge(action.tags)
            elif isinstance(action, machine.Proved):
                proof, self._proof = self._proof, None
                _resolve(proof)
            elif isinstance(action, machine.Applied):
                self._changes.applied(action.version.number)
            elif isinstance(action, machine.Stored):
                self._changes.stored(action.version.number)
            elif isinstance(action, machine.Refused):
                self._changes.refused(action.version.number)
            elif isinstance(action, machine.Holding):
                self._hold()
            else:
                self._end(action.reason)

    def _send(self, send: machine.Send) -> None:
        id_ = f"{self.me}:{send.number}"
        if isinstance(send.entry, Row):
            self._publish(send.number, row_message(self._queue, send.entry, id_))
        else:
            self._publish(send.number, hello_message(self._queue, send.entry, id_))

    def _publish(self, number: int, message: Message) -> None:
        call = self._channel.tracker.post([message])
        call.done.add_done_callback(partial(self._on_outcomes, [number], call))

    def _on_outcomes(self, numbers: Sequence[int], call: PublishCall, done: asyncio.Future[None]) -> None:
        if self.is_over or done.cancelled():
            return
        if error := done.exception():
            self._end(f"a row could not be sent: {error}")
            return
        if call.pending:
            self._end("the connection was lost, or silent, before the confirm came")
            return
        now = self._clock()
        for place, number in enumerate(numbers):
            if (refusal := call.refusals.get(place)) is not None:
                self._changes.will_be_refused(number, refusal)
                self._do(self.candidate.refused(number, now))
            else:
                self._do(self.candidate.confirmed(number, now))

    def _hold(self) -> None:
        _resolve(self._holding)
        if not self._reads:
            self._start(self._take_requests())

    async def _take_requests(self) -> None:
        await self._line.channel.basic_qos(prefetch_count=self._most_requests)
        await self._consume(requests_queue(self._name), _REQUESTS_TAG)

    def _start(self, operation: Coroutine[object, object, None]) -> None:
        task = self._line.start(operation)
        self._tasks.add(task)
        task.add_done_callback(self._on_task)

    def _on_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._end(f"{type(error).__name__}: {error}")

    # How it ends

    def _check(self) -> None:
        if self._over.done():
            raise TenureLost(f"table {self._name!r}: {self._over.result()}")

    def _end(self, reason: str) -> None:
        if self._over.done():
            return
        self._over.set_result(reason)
        why = f"table {self._name!r}: {reason}"
        for waiting in (self._holding, self._proof):
            _fail(waiting, TenureLost(why))
        self._changes.lose(why)
        self.requests.put_nowait(None)
        # At once: as long as it is open, no other candidate gets the rows.
        self._closing = asyncio.get_running_loop().create_task(self._line.close())


def _new_future() -> asyncio.Future[None]:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.add_done_callback(_forget)
    return future


def _fit(message: Message, frame_max: int) -> Message:
    """Tasks alone have headers that may not fit."""
    return message if is_own(message) else fitted(message, frame_max)


def _resolve(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)


def _fail(waiting: asyncio.Future[None] | None, error: Exception) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_exception(error)


def _forget(waiting: asyncio.Future[None]) -> None:
    """Nobody may be waiting for it, and its exception is no news then."""
    if not waiting.cancelled():
        waiting.exception()


async def _not_called(message: amqp.DeliveredMessage) -> None:
    """aiormq wants a callback for each consumer."""
    raise AssertionError(f"delivery {message.delivery_tag} came by way of aiormq")
