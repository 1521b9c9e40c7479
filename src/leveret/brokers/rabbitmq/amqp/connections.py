"""The edge to aio-pika: opening connections and channels, and its exceptions as Leveret's.

Plain connections under our own supervision, not the robust ones: see docs/adr/0003. Channels are those of the aiormq
connection beneath aio-pika's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from functools import partial
from typing import TYPE_CHECKING, Any, Self, TypeAlias, TypeVar

import aio_pika
import aio_pika.abc
import aiormq.channel
from aio_pika.exceptions import AMQPChannelError, AMQPConnectionError, AMQPError, ChannelInvalidStateError
from aiormq import spec
from aiormq.abc import ChannelFrame, DeliveredMessage
from aiormq.connection import exception_by_code
from aiormq.exceptions import (
    AuthenticationError,
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
    ConnectionNotAllowed,
    DeliveryError,
    InvalidFrameError,
    ProbableAuthenticationError,
)
from yarl import URL

from leveret.brokers.rabbitmq.amqp import frame_reader as reading
from leveret.brokers.rabbitmq.amqp import tls
from leveret.brokers.rabbitmq.amqp.hosts import Hosts, addresses, first
from leveret.brokers.urls import censor
from leveret.errors import BrokerError, BrokerRefused, BrokerUnavailable

if TYPE_CHECKING:
    import ssl
    from collections.abc import Awaitable, Callable, Coroutine, Sequence

    from leveret.brokers.rabbitmq.amqp.parameters import Parameters

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
    "DeliveryError",
    "GetEmpty",
    "Link",
    "LinkLost",
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


class LinkLost(Exception):
    """The connection or the channel went away under an operation; whether it arrived is unknown."""


#: What an operation raises when its connection or channel goes away under it.
CONNECTION_LOST = (LinkLost, AMQPError, ChannelInvalidStateError, ConnectionError, RuntimeError)
_DRIVERS = ("aio_pika", "aiormq", "pamqp")
#: basic.qos carries it in 16 bits; 0 is no limit.
MOST_PREFETCH = 65_535
#: What RabbitMQ says when a limit is reached: of connections, channels or queues, of a virtual host, a user, a node or
#: a connection. Others may leave, or an operator may raise it.
_LIMIT = re.compile(r"\blimit\b.*\breached\b|\breached\b.*\blimit\b|exceed.*\bmax|reached the negotiated channel_max")
#: How long an orderly close may take (seconds).
_CLOSE_TIMEOUT = 3.0
_CANCEL_AGAIN = 0.2


class Link:
    """A connection and a channel of it, and all that waits on them.

    aiormq leaves some operations waiting for ever when their connection is lost (for room in its write queue, say);
    what is started through a line ends with it.
    """

    def __init__(
        self, connection: reading.Connection, channel: Channel, *, lost: Callable[[], None] | None = None
    ) -> None:
        self.connection = connection
        self.channel = channel
        #: Called when it is closed by the other side.
        self._lost = lost
        self._is_closing = False
        self._running: set[asyncio.Task[Any]] = set()
        #: How the server, or aiormq, closed the channel or the connection.
        self.parting: AMQPError | None = None
        self._unwritten = b""
        self._writing: asyncio.Task[None] | None = None
        self._watch = asyncio.create_task(self._release_when_lost())

    @classmethod
    async def open(cls, hosts: Hosts, *, purpose: str, confirms: bool) -> Self:
        """Connect and open a channel. Raises BrokerUnavailable or BrokerRefused."""
        url, connection = await connect(hosts, purpose=purpose)
        lost = partial(hosts.failed, url)
        try:
            async with asyncio.timeout(hosts.parameters.timeout):
                channel = await told(open_channel(connection, confirms=confirms))
            return cls(connection, channel, lost=lost)
        except (*CONNECTION_LOST, TimeoutError) as error:
            lost()
            connection.abort()
            await close(connection)
            said = _last_words(connection) or error
            raise translate(said, f"the connection to {censor(url)} was lost while it was opened") from error
        except asyncio.CancelledError as error:
            connection.abort()
            await close(connection)
            if is_cancelled():
                raise
            lost()
            said = _last_words(connection) or LinkLost("RabbitMQ closed it")
            raise translate(said, f"the connection to {censor(url)} was lost while it was opened") from error
        except BaseException:
            await close(connection)
            raise

    @property
    def is_lost(self) -> bool:
        return self._watch.done() or self.channel.is_closed or is_lost(self.connection)

    @property
    def farewell(self) -> str:
        """What the server said when it closed the channel or the connection."""
        return "" if self.parting is None else _reason(self.parting, None)

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
        # Of a task that is cancelled before its first step Python would say that the operation "was never awaited".
        task.add_done_callback(lambda _: operation.close())
        if self._watch.done():
            task.cancel()
        return task

    async def run(self, operation: Coroutine[Any, Any, T]) -> T:
        """Run an operation to its end. Raises LinkLost when the line is lost first."""
        try:
            return await self.start(operation)
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            raise LinkLost("the connection to RabbitMQ was lost") from error

    def take_deliveries(self, take: reading.Take) -> None:
        """Have each delivery of the channel from now on, in place of its consumers' callbacks."""
        self.connection.take_deliveries(self.channel.number, take)

    def keep_headers(self) -> Callable[[DeliveredMessage], reading.Incoming]:
        """Keep the content headers of what comes from now on; how to have a message that came with its own."""
        self.connection.frames.keep_headers()
        return self.connection.as_delivered

    async def write(self, data: bytes) -> None:
        """Send whole frames of the channel, in the order of the calls. Raises LinkLost.

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
            raise LinkLost("the connection to RabbitMQ was lost") from error

    async def _write_all(self) -> None:
        while self._unwritten:
            await self.channel.write_queue.put(self._frames())
        self._writing = None

    def _frames(self) -> ChannelFrame:
        data, self._unwritten = self._unwritten, b""
        return ChannelFrame(payload=data, should_close=False)

    def host_failed(self) -> None:
        """Have the next connection go to another host if there is one: this one does not answer."""
        if self._lost is not None:
            self._lost()

    def abort(self) -> None:
        """End it without a word: the other side does not answer. `close` follows."""
        self.connection.abort()

    async def close(self) -> None:
        self._is_closing = True
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
                if self._lost is not None and not self._is_closing and is_lost(self.connection):
                    self._lost()
                self._release()

    def _release(self) -> None:
        for task in list(self._running):
            task.cancel()


async def told(operation: Awaitable[T]) -> T:
    """The operation, with LinkLost for what means the same: the bare Exception that aiormq gives to what waits on a
    line that we close, and the system's errors that are no ConnectionError (no route to the host, a timeout of TCP's).
    """
    try:
        return await operation
    except Exception as error:
        if type(error) is Exception:
            raise LinkLost("the connection to RabbitMQ was closed before the answer came") from error
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise LinkLost(f"the connection to RabbitMQ was lost: {error}") from error
        raise


def is_cancelled() -> bool:
    """Whether a CancelledError is this task's own: aiormq also cancels what waits on a connection that it gives up."""
    current = asyncio.current_task()
    return current is None or current.cancelling() > 0


async def connect(hosts: Hosts, *, purpose: str) -> tuple[str, reading.Connection]:
    """A connection to the host that answers first, and its URL.

    Raises BrokerRefused, or BrokerUnavailable with every reason. A host that is silent costs a moment, and not all the
    time that there is: see `Hosts`.
    """
    attempts = [partial(_reach, hosts, url, purpose) for url in hosts.in_order()]
    found = await first(attempts, hosts.beside, lambda late: _let_fall(late[1]))
    if not isinstance(found, list):
        hosts.succeeded(found[0])
        return found
    raise _worst(found)


def _worst(failures: Sequence[BrokerError]) -> BrokerError:
    """One error for all hosts, or all addresses of one."""
    refused = next((failure for failure in failures if isinstance(failure, BrokerRefused)), None)
    if refused is not None:
        return refused
    error = BrokerUnavailable("; ".join(dict.fromkeys(map(str, failures))))
    error.__cause__ = failures[-1].__cause__
    return error


async def _reach(hosts: Hosts, url: str, purpose: str) -> tuple[str, reading.Connection]:
    """One host, at whichever of its addresses answers first."""
    try:
        return url, await _reach_host(hosts, url, purpose)
    except BaseException:  # what is cancelled has been overtaken
        hosts.failed(url)
        raise


async def _reach_host(hosts: Hosts, url: str, purpose: str) -> reading.Connection:
    doing, limit = f"cannot connect to {censor(url)}", hosts.parameters.timeout
    try:
        async with asyncio.timeout(limit):
            context = await asyncio.to_thread(tls.context, url)
            found = await addresses(url)
    except TimeoutError as error:
        raise translate(error, f"{doing}: its name could not be looked up", limit) from error
    except (OSError, tls.UnreadableFile) as error:
        raise translate(error, doing) from error
    attempts = [partial(_try, url, address, context, hosts.parameters, purpose) for address in found]
    connected = await first(attempts, hosts.beside / len(found), _let_fall)
    if isinstance(connected, list):
        raise _worst(connected)
    return connected


async def _try(
    url: str, address: str, context: ssl.SSLContext | None, parameters: Parameters, purpose: str
) -> reading.Connection:
    doing = f"cannot connect to {censor(url)}"
    try:
        return await _connect(url, address, context, parameters, purpose)
    except (AMQPError, OSError, TimeoutError, RuntimeError, tls.UnreadableFile) as error:
        raise translate(error, doing, parameters.timeout) from error
    except asyncio.CancelledError as error:
        if is_cancelled():
            raise
        raise translate(error, f"{doing}: the connection was lost") from error


async def _connect(
    url: str, address: str, context: ssl.SSLContext | None, parameters: Parameters, purpose: str
) -> reading.Connection:
    connection = reading.Connection(_with_parameters(url, parameters, purpose), ssl_context=context)
    # A task of its own: aiormq may take as long again to close a connection that does not answer.
    connecting = asyncio.ensure_future(connection.connect_to(address))
    try:
        done, _ = await asyncio.wait([connecting], timeout=parameters.timeout)
        if not done:
            raise TimeoutError  # noqa: TRY301 - the same farewell as for other errors
        connecting.result()
    except BaseException as error:
        if not connecting.done():
            connecting.add_done_callback(_forget)
            connecting.cancel()
        _let_fall(connection)
        said = _last_words(connection)
        if said is not None and isinstance(error, InvalidFrameError):
            # aiormq does not expect Connection.Close here, and loses the words in it.
            raise said from error
        if not isinstance(error, (AMQPConnectionError, ConnectionError)):
            raise
        words = None if context is None or tls.explain(error) else await tls.last_words(url, context)
        if words is None or not tls.explain(words):
            raise
        raise words from error
    return connection


def _let_fall(connection: reading.Connection) -> None:
    """End a connection that nobody uses, without waiting for it."""
    connection.abort()


def _last_words(connection: reading.Connection) -> AMQPError | None:
    """Why the server closed the connection, if it has."""
    words = connection.last_words
    return None if words is None else exception_by_code(spec.Connection.Close(reply_code=words[0], reply_text=words[1]))


async def open_channel(connection: Connection, *, confirms: bool) -> Channel:
    """A channel as aiormq has it. A message that no queue takes raises PublishError instead of counting as stored.

    Not by way of aio-pika: each of its channels leaves callbacks on the connection for as long as that lives, and a
    question takes a channel of its own.
    """
    if connection.transport is None:
        raise LinkLost("the connection to RabbitMQ was closed")
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
    if not await _let_go(connection.close()) and isinstance(connection, reading.Connection):
        connection.abort()


async def close_channel(channel: Channel) -> None:
    """The same for a channel."""
    await _let_go(channel.close())


async def _let_go(farewell: Coroutine[Any, Any, None]) -> bool:
    """Whether it ended in time."""
    closing = asyncio.get_running_loop().create_task(farewell)
    closing.add_done_callback(_forget)
    try:
        done, _ = await asyncio.wait([closing], timeout=_CLOSE_TIMEOUT)
    except asyncio.CancelledError:
        _end(closing)
        raise
    if not done:
        _end(closing)
    return bool(done)


def _end(closing: asyncio.Task[None]) -> None:
    """Cancel it until it has ended: aiormq's swallows a cancellation, and a program that waits for it never ends."""
    if not closing.done():
        closing.cancel()
        asyncio.get_running_loop().call_later(_CANCEL_AGAIN, _end, closing)


def _forget(closing: asyncio.Future[None]) -> BaseException | None:
    """Stop watching a closing (a future of our own, see aiormq's `Base.closing`), and take its exception."""
    if not closing.done():
        closing.cancel()
        return None
    return None if closing.cancelled() else closing.exception()


def translate(error: BaseException, doing: str, limit: float | None = None) -> BrokerError:
    """An exception of aio-pika's as Leveret's, with what was being done, and how long that might take (seconds)."""
    translated: BrokerError
    reason = _reason(error, limit)
    distrust = tls.explain(error)
    if distrust is not None:
        translated = BrokerRefused(f"{doing}: {distrust}")
    elif _LIMIT.search(reason):
        translated = BrokerUnavailable(
            f"{doing}: {reason}; close other connections, or have the limit raised (rabbitmqctl set_vhost_limits, "
            "set_user_limits; connection_max and channel_max in rabbitmq.conf)"
        )
    elif isinstance(error, (ProbableAuthenticationError, AuthenticationError)):
        translated = BrokerRefused(f"{doing}: the user name or password is wrong, or the user may not use this host")
    elif isinstance(error, ConnectionNotAllowed) and "vhost" in reason:
        translated = BrokerRefused(
            f"{doing}: {reason}; the virtual host is the URL's path (%2F for /): it must exist, and this user must "
            "have permissions there"
        )
    elif isinstance(error.__cause__ or error, ConnectionRefusedError):
        translated = BrokerUnavailable(f"{doing}: nothing listens there; is RabbitMQ running, and is this its port?")
    elif isinstance(error, (ConnectionNotAllowed, ChannelAccessRefused)):
        translated = BrokerRefused(f"{doing}: {reason}")
    else:
        translated = BrokerUnavailable(f"{doing}: {reason}")
    translated.__cause__ = error
    return translated


def _reason(error: BaseException, limit: float | None) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time" if limit is None else f"no answer within {limit:g} s"
    text = " ".join(str(argument) for argument in error.args) or type(error).__name__
    return text if isinstance(error, (AMQPConnectionError, AMQPChannelError)) else f"{type(error).__name__}: {text}"


def _with_parameters(url: str, parameters: Parameters, purpose: str) -> URL:
    """For aiormq, without what is not for it: what it does not know may be a secret, and it logs its URLs."""
    return URL(url).with_query(
        heartbeat=str(parameters.heartbeat), name=parameters.name or f"leveret {purpose}", auth=parameters.auth
    )
