"""A channel that publishes past aiormq, on the connection that aiormq opened and keeps alive. See docs/adr/0014.

aiormq takes a task, three futures and three encoded frames for a message, and a scan of all that are on the way for a
confirm of many. Here, frames are written straight to the connection's stream, each write of whole messages, and the
confirms are read from it before aiormq sees them.
"""

from __future__ import annotations

import asyncio
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, Self

from pamqp import commands, constants, frame
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.amqp import frame_reader as reading
from leveret.brokers.rabbitmq.amqp import sanitize as foreign
from leveret.brokers.rabbitmq.amqp.confirm_tracker import ConfirmTracker
from leveret.brokers.rabbitmq.amqp.frames import Encoder

if TYPE_CHECKING:
    from pamqp.base import Frame

    from leveret.brokers.rabbitmq.amqp.confirm_tracker import Limits
    from leveret.brokers.rabbitmq.amqp.hosts import Hosts
    from leveret.brokers.rabbitmq.amqp.message import Fit

#: How much may wait to be sent to a server that does not read (bytes).
_CLOGGED = 1024 * 1024
_INT = struct.Struct("i")
_TYPE_AND_CHANNEL = struct.Struct(">BH")
#: Where a method frame's class and method begin, and its arguments.
_INDEX = constants.FRAME_HEADER_SIZE
_ARGUMENTS = _INDEX + 4


def _index(method: type[Frame]) -> bytes:
    return struct.pack(">I", method.index)


_ACK = _index(commands.Basic.Ack)
_NACK = _index(commands.Basic.Nack)
_ALIVE = _index(commands.Confirm.SelectOk)
_RETURN = _index(commands.Basic.Return)
_CHANNEL_CLOSE = _index(commands.Channel.Close)
_CONNECTION_CLOSE = _index(commands.Connection.Close)
_BLOCKED = _index(commands.Connection.Blocked)
_UNBLOCKED = _index(commands.Connection.Unblocked)
#: A delivery tag, and whether all up to it are meant (the lowest bit).
_TAG = struct.Struct(">QB")


class ConfirmChannel:
    """One line's publishes. Nobody else may publish on its channel: the numbers of the messages are counted here."""

    def __init__(self, line: amqp.Link, limits: Limits, hosts: Hosts, fit: Fit) -> None:
        connection = line.connection
        assert isinstance(connection, reading.Connection)
        assert connection.transport is not None
        self.line = line
        self._writer = connection.writer
        tune = connection.transport.connection.connection_tune
        encoder = Encoder(line.channel.number, tune.frame_max or 0, fit)
        self.outbox = ConfirmTracker(
            encoder,
            self._writer.write,
            self._is_clogged,
            self._unsent,
            limits,
            # Elsewhere the messages may be stored in time. To the same server they would only be sent twice.
            self._challenge if hosts.have_a_choice else None,
            hosts.patience,
        )
        self._select = frame.marshal(commands.Confirm.Select(), line.channel.number)
        self._proof: asyncio.Future[None] | None = None
        self._channel_method = _TYPE_AND_CHANNEL.pack(constants.FRAME_METHOD, line.channel.number)
        self._channel_header = _TYPE_AND_CHANNEL.pack(constants.FRAME_HEADER, line.channel.number)
        self._channel_body = _TYPE_AND_CHANNEL.pack(constants.FRAME_BODY, line.channel.number)
        self._connection_method = _TYPE_AND_CHANNEL.pack(constants.FRAME_METHOD, 0)
        connection.frames.take = self._take
        line.when_lost(self.outbox.abandon)

    @classmethod
    async def open(cls, hosts: Hosts, limits: Limits, fit: Fit) -> Self:
        """Raises BrokerUnavailable or BrokerRefused."""
        return cls(await amqp.Link.open(hosts, purpose="producer", confirms=True), limits, hosts, fit)

    @property
    def is_open(self) -> bool:
        return not (self.outbox.is_over or self.line.is_lost)

    async def answers(self, seconds: float) -> bool:
        """Whether the server gives a sign of life within that time; one that is blocked by an alarm need not."""
        if not self.is_open:
            return False
        if self.outbox.is_blocked:
            return True
        self._challenge()
        proof = self._proof
        assert proof is not None
        await asyncio.wait([proof], timeout=seconds)
        return proof.done() or self.outbox.is_blocked

    def _challenge(self) -> None:
        """Ask what is answered by the channel itself, behind all that was published, and changes nothing."""
        if self._proof is None or self._proof.done():
            self._proof = asyncio.get_running_loop().create_future()
            self._writer.write(self._select)

    def _is_clogged(self) -> bool:
        return self._writer.is_closing() or self._writer.transport.get_write_buffer_size() > _CLOGGED

    def _unsent(self) -> int:
        """Bytes that wait here, and in the system for the other side to have them."""
        waiting = self._writer.transport.get_write_buffer_size()
        socket = self._writer.get_extra_info("socket")
        if socket is None:  # uvloop's of a closed connection
            return waiting
        try:
            queued = fcntl.ioctl(socket.fileno(), termios.TIOCOUTQ, bytes(_INT.size))
        except (OSError, ValueError):  # closed, or a system that does not tell
            return waiting
        return waiting + int(_INT.unpack(queued)[0])

    def _take(self, data: bytes) -> bool:
        """Look at a frame; True when it is about what was published here, and no business of aiormq's."""
        beginning = data[: _TYPE_AND_CHANNEL.size]
        if beginning == self._channel_method:
            return self._take_method(data)
        if beginning == self._channel_header:
            _, _, content = frame.unmarshal(foreign.readable(data))
            if isinstance(content, ContentHeader):
                self.outbox.returned(content.properties.message_id)
            return True
        if beginning == self._connection_method:
            self._look_at_connection(data)
        return beginning == self._channel_body

    def _take_method(self, data: bytes) -> bool:
        index = data[_INDEX:_ARGUMENTS]
        if index == _ACK:
            tag, multiple = _TAG.unpack_from(data, _ARGUMENTS)
            self.outbox.confirmed(tag, multiple=bool(multiple & 1))
        elif index == _NACK:
            tag, multiple = _TAG.unpack_from(data, _ARGUMENTS)
            self.outbox.refused(tag, multiple=bool(multiple & 1))
        elif index == _CHANNEL_CLOSE:
            self.outbox.stop()
        elif index == _ALIVE and self._proof is not None and not self._proof.done():
            self._proof.set_result(None)
            self.outbox.answered()
        return index in (_ACK, _NACK, _RETURN, _ALIVE)

    def _look_at_connection(self, data: bytes) -> None:
        index = data[_INDEX:_ARGUMENTS]
        if index == _BLOCKED:
            self.outbox.block()
        elif index == _UNBLOCKED:
            self.outbox.unblock()
        elif index == _CONNECTION_CLOSE:
            self.outbox.stop()
