"""The edge to aio-pika: opening connections and channels, and its exceptions as Leveret's.

Plain connections under our own supervision, not the robust ones: see docs/adr/0003. Channels are those of the aiormq
connection beneath aio-pika's.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import aio_pika
import aio_pika.abc
import aiormq.channel
from aio_pika.exceptions import AMQPChannelError, AMQPConnectionError, AMQPError, ChannelInvalidStateError
from aiormq import spec
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.exceptions import (
    AuthenticationError,
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionNotAllowed,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from yarl import URL

from leveret.brokers import HARMLESS, censor
from leveret.brokers.rabbitmq import reading, tls
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

Connection: TypeAlias = aio_pika.abc.AbstractConnection
Channel: TypeAlias = aiormq.channel.Channel
T = TypeVar("T")
Properties = spec.Basic.Properties
Cancel = spec.Basic.Cancel
GetEmpty = spec.Basic.GetEmpty

__all__ = [
    "CONNECTION_LOST",
    "MOST_PREFETCH",
    "AMQPChannelError",
    "AMQPError",
    "Cancel",
    "Channel",
    "ChannelAccessRefused",
    "ChannelLockedResource",
    "ChannelNotFoundEntity",
    "ChannelPreconditionFailed",
    "Connection",
    "DeliveredMessage",
    "GetEmpty",
    "Line",
    "LineLost",
    "Properties",
    "close",
    "close_channel",
    "connect",
    "is_cancelled",
    "is_lost",
    "open_channel",
    "quieten_drivers",
    "server_version",
    "told",
    "translate",
]


def quieten_drivers() -> None:
    """What these say of lost connections and refusals, Leveret says itself. A program that has given one of their
    loggers a level or a handler has asked for it.
    """
    for logger in map(logging.getLogger, _DRIVERS):
        if logger.level == logging.NOTSET and not logger.handlers:
            logger.setLevel(logging.CRITICAL + 1)


class LineLost(Exception):
    """The connection or the channel went away under an operation; whether it arrived is unknown."""


#: What an operation raises when its connection or channel goes away under it.
CONNECTION_LOST = (LineLost, AMQPError, ChannelInvalidStateError, ConnectionError, RuntimeError)
_DRIVERS = ("aio_pika", "aiormq", "pamqp")
#: basic.qos carries it in 16 bits; 0 is no limit.
MOST_PREFETCH = 65_535
#: Seconds. A dead peer is noticed after three missed heartbeats: (10 + 1) x 3 s, not aiormq's default 183 s.
_HEARTBEAT = 10
#: How long one try to connect may take (seconds).
_CONNECT_TIMEOUT = 10.0
#: How long an orderly close may take (seconds).
_CLOSE_TIMEOUT = 3.0


class Line:
    """A connection and a channel of it, and all that waits on them.

    aiormq leaves some operations waiting for ever when their connection is lost (for room in its write queue, say);
    what is started through a line ends with it.
    """

    def __init__(self, connection: Connection, channel: Channel) -> None:
        self.connection = connection
        self.channel = channel
        self._running: set[asyncio.Task[Any]] = set()
        #: How the server, or aiormq, closed the channel or the connection.
        self.parting: AMQPError | None = None
        self._unwritten = b""
        self._writing: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._release_when_lost())

    @classmethod
    async def open(cls, urls: Sequence[str], *, purpose: str, confirms: bool) -> Self:
        """Connect and open a channel. Raises BrokerUnavailable or BrokerRefused."""
        connection = await connect(urls, purpose=purpose)
        try:
            return cls(connection, await told(open_channel(connection, confirms=confirms)))
        except CONNECTION_LOST as error:
            await close(connection)
            raise translate(error, "the connection was lost while it was opened") from error
        except asyncio.CancelledError as error:
            await close(connection)
            if is_cancelled():
                raise
            raise BrokerUnavailable("the connection to RabbitMQ was lost while it was opened") from error
        except BaseException:
            await close(connection)
            raise

    @property
    def is_lost(self) -> bool:
        return self._watch.done() or self.channel.is_closed or is_lost(self.connection)

    @property
    def farewell(self) -> str:
        """What the server said when it closed the channel or the connection."""
        return "" if self.parting is None else _reason(self.parting)

    def when_lost(self, call: Callable[[], None]) -> None:
        """Have a function called when the connection or the channel is closed, by whichever side."""
        self._watch.add_done_callback(lambda _: call())

    async def lost(self) -> None:
        """Wait until the connection or the channel is closed, by whichever side."""
        await asyncio.wait([self._watch])

    def start(self, operation: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run an operation that is cancelled when the line is lost."""
        task = asyncio.create_task(told(operation))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        if self._watch.done():
            task.cancel()
        return task

    async def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end. Raises LineLost when the line is lost first."""
        try:
            return await self.start(operation)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise LineLost("the connection to RabbitMQ was lost") from error

    def take_deliveries(self, take: reading.Take) -> None:
        """Have each delivery of the channel from now on, in place of its consumers' callbacks."""
        assert isinstance(self.connection, reading.Connection)
        self.connection.take_deliveries(self.channel.number, take)

    async def write(self, data: bytes) -> None:
        """Send whole frames of the channel, in the order of the calls. Raises LineLost.

        Returns when aiormq's writer has them, as its own methods do without ``wait``.
        """
        self._unwritten += data
        if self._writing is None:
            if not self.channel.write_queue.full():
                self.channel.write_queue.put_nowait(self._frames())
                return
            self._writing = self.start(self._write_all())
        try:
            await asyncio.shield(self._writing)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise LineLost("the connection to RabbitMQ was lost") from error

    async def _write_all(self) -> None:
        while self._unwritten:
            await self.channel.write_queue.put(self._frames())
        self._writing = None

    def _frames(self) -> ChannelFrame:
        data, self._unwritten = self._unwritten, b""
        return ChannelFrame(payload=data, should_close=False)

    async def close(self) -> None:
        await close(self.connection)
        # aiormq may never tell: a server that reads nothing any more keeps it waiting to send its farewell.
        await asyncio.wait([self._watch], timeout=_CLOSE_TIMEOUT)
        self._watch.cancel()

    async def _release_when_lost(self) -> None:
        transport = self.connection.transport
        if transport is not None:
            closings = [transport.connection.closing, self.channel.closing]
            try:
                await asyncio.wait(closings, return_when=asyncio.FIRST_COMPLETED)
            finally:
                said = [_forget(closing) for closing in closings]
                self.parting = next((error for error in said if isinstance(error, AMQPError)), None)
                self._release()

    def _release(self) -> None:
        for task in list(self._running):
            task.cancel()


async def told(operation: Awaitable[T]) -> T:
    """The operation, with LineLost for what means the same: the bare Exception that aiormq gives to what waits on a
    line that we close, and the system's errors that are no ConnectionError (no route to the host, a timeout of TCP's).
    """
    try:
        return await operation
    except Exception as error:
        if type(error) is Exception:
            raise LineLost("the connection to RabbitMQ was closed before the answer came") from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise LineLost(f"the connection to RabbitMQ was lost: {error}") from error
        raise


def is_cancelled() -> bool:
    """Whether a CancelledError is this task's own: aiormq also cancels what waits on a connection that it gives up."""
    current = asyncio.current_task()
    return current is None or current.cancelling() > 0


async def connect(urls: Sequence[str], *, purpose: str) -> Connection:
    """A connection to the first host that answers. Raises BrokerRefused, or BrokerUnavailable with every reason."""
    failures: list[BrokerError] = []
    for url in urls:
        try:
            return await _connect(url, purpose)
        except (AMQPError, OSError, TimeoutError, RuntimeError, tls.UnreadableFile) as error:
            failures.append(translate(error, f"cannot connect to {censor(url)}"))
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            failures.append(translate(error, f"cannot connect to {censor(url)}: the connection was lost"))
    refused = next((failure for failure in failures if isinstance(failure, BrokerRefused)), None)
    if refused is not None:
        raise refused
    raise BrokerUnavailable("; ".join(str(failure) for failure in failures)) from failures[-1].__cause__


async def _connect(url: str, purpose: str) -> Connection:
    context = await asyncio.to_thread(tls.context, url)
    try:
        return await aio_pika.connect(
            _with_defaults(url, purpose),
            timeout=_CONNECT_TIMEOUT,
            ssl_context=context,
            connection_class=reading.Connection,
        )
    except (AMQPConnectionError, ConnectionError) as error:
        words = None if context is None or tls.explain(error) else await tls.last_words(url, context)
        if words is None or not tls.explain(words):
            raise
        raise words from error


async def open_channel(connection: Connection, *, confirms: bool) -> Channel:
    """A channel as aiormq has it. A message that no queue takes raises PublishError instead of counting as stored.

    Not by way of aio-pika: each of its channels leaves callbacks on the connection for as long as that lives, and a
    question takes a channel of its own.
    """
    if connection.transport is None:
        raise LineLost("the connection to RabbitMQ was closed")
    channel = await connection.transport.connection.channel(publisher_confirms=confirms, on_return_raises=confirms)
    assert isinstance(channel, Channel)
    return channel


def server_version(connection: Connection) -> tuple[int, ...]:
    """As the server told in the handshake; (0,) when it is lost or told none."""
    transport = connection.transport
    properties: dict[str, Any] = dict(transport.connection.server_properties) if transport is not None else {}
    version = properties.get("version", b"")
    text = version.decode(errors="replace") if isinstance(version, bytes) else str(version)
    return tuple(int(part) for part in text.split("-")[0].split(".") if part.isdigit()) or (0,)


def is_lost(connection: Connection) -> bool:
    """Whether the connection is closed, by whichever side."""
    return connection.transport is None or connection.transport.connection.is_closed


async def close(connection: Connection) -> None:
    """Close the connection; one that is lost, or does not answer, is let go all the same."""
    await _let_go(connection.close())


async def close_channel(channel: Channel) -> None:
    """The same for a channel."""
    await _let_go(channel.close())


async def _let_go(farewell: Coroutine[Any, Any, None]) -> None:
    closing = asyncio.ensure_future(farewell)
    closing.add_done_callback(_forget)
    done, _ = await asyncio.wait([closing], timeout=_CLOSE_TIMEOUT)
    if not done:
        closing.cancel()


def _forget(closing: asyncio.Future[None]) -> BaseException | None:
    """Stop watching a closing (a future of our own, see aiormq's `Base.closing`), and take its exception."""
    if not closing.done():
        closing.cancel()
        return None
    return None if closing.cancelled() else closing.exception()


def translate(error: BaseException, doing: str) -> BrokerError:
    """An exception of aio-pika's as Leveret's, with what was being done."""
    translated: BrokerError
    reason = _reason(error)
    distrust = tls.explain(error)
    if distrust is not None:
        translated = BrokerRefused(f"{doing}: {distrust}")
    elif isinstance(error, (ProbableAuthenticationError, AuthenticationError)):
        translated = BrokerRefused(f"{doing}: the user name or password is wrong, or the user may not use this host")
    elif isinstance(error, InvalidFrameError) and "Connection.Close" in reason:
        # aiormq loses the server's words here (it expects Connection.Open-Ok), so the usual cause is named.
        translated = BrokerRefused(
            f"{doing}: the server closed the connection at its virtual host (the URL's path, %2F for /); "
            "does it exist, and may this user use it?"
        )
    elif isinstance(error.__cause__ or error, ConnectionRefusedError):
        translated = BrokerUnavailable(f"{doing}: nothing listens there; is RabbitMQ running, and is this its port?")
    elif isinstance(error, (ConnectionNotAllowed, ChannelAccessRefused)):
        translated = BrokerRefused(f"{doing}: {reason}")
    else:
        translated = BrokerUnavailable(f"{doing}: {reason}")
    translated.__cause__ = error
    return translated


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {_CONNECT_TIMEOUT:g} s"
    text = " ".join(str(argument) for argument in error.args) or type(error).__name__
    return text if isinstance(error, (AMQPConnectionError, AMQPChannelError)) else f"{type(error).__name__}: {text}"


def _with_defaults(url: str, purpose: str) -> URL:
    parsed = URL(url)
    defaults = {"heartbeat": str(_HEARTBEAT), "name": f"leveret {purpose}"}
    # What aio-pika does not know may be a secret, and it logs its URLs.
    known = {key: value for key, value in parsed.query.items() if key in HARMLESS - tls.PARAMETERS}
    return parsed.with_query({**defaults, **known})
