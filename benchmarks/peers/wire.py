"""The upper bound: a raw socket that writes ready-made frames and looks at no message. Nobody could work like this.

Publishing: 1,024 unconfirmed messages, of the size and with the properties of Leveret's own. Consuming: one
acknowledgment for 64 deliveries.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import sys
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from pamqp import body, commands, frame, header

from benchmarks.peers.ledger import note_run, own_ledger
from benchmarks.peers.producing import Order, Stopwatch, queue, url

_QUORUM = {"x-queue-type": "quorum"}
_CHANNEL = 1
_OUTSTANDING = 1_024
_ACKS_BY = 64
_READ = 1 << 18
#: basic.ack: type, channel, length, class 60, method 80, delivery tag, multiple, end.
_ACK = struct.Struct(">BHIHHQBB")
#: Class and method of basic.deliver, and where the delivery tag is after the consumer tag "w".
_DELIVER = b"\x00\x3c\x00\x3c\x01w"


class Wire:
    """A connection with one channel."""

    def __init__(self) -> None:
        where = urlsplit(url())
        self.socket = socket.create_connection((where.hostname or "localhost", where.port or 5672))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.rest = b""
        self.socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._expect(commands.Connection.Start)
        self._send(0, commands.Connection.StartOk(response=f"\0{where.username}\0{where.password}"))
        tune = self._expect(commands.Connection.Tune)
        self._send(0, commands.Connection.TuneOk(tune.channel_max, tune.frame_max, 0))
        self.ask(0, commands.Connection.Open("/"), commands.Connection.OpenOk)
        self.ask(_CHANNEL, commands.Channel.Open(), commands.Channel.OpenOk)
        declare = commands.Queue.Declare(queue=queue(), durable=True, arguments=dict(_QUORUM))
        self.ask(_CHANNEL, declare, commands.Queue.DeclareOk)

    def ask(self, channel: int, method: Any, answer: type) -> Any:
        self._send(channel, method)
        return self._expect(answer)

    def _send(self, channel: int, method: Any) -> None:
        self.socket.sendall(frame.marshal(method, channel))

    def _expect(self, answer: type) -> Any:
        while True:
            try:
                size, _, method = frame.unmarshal(self.rest)
            except Exception:  # noqa: BLE001 - not a whole frame yet
                more = self.socket.recv(_READ)
                if not more:
                    raise ConnectionError("the server closed the connection") from None
                self.rest += more
                continue
            self.rest = self.rest[size:]
            if isinstance(method, answer):
                return method


def message() -> bytes:
    content = b'{"args":[12345],"kwargs":{}}'
    properties = commands.Basic.Properties(
        content_type="application/json",
        message_id=secrets.token_hex(16),
        message_type="noop",
        delivery_mode=2,
        timestamp=datetime.now(UTC),
    )
    publish = commands.Basic.Publish(routing_key=queue(), mandatory=True)
    parts = (publish, header.ContentHeader(body_size=len(content), properties=properties), body.ContentBody(content))
    return b"".join(frame.marshal(part, _CHANNEL) for part in parts)


def enqueue(tasks: range) -> None:
    wire = Wire()
    wire.ask(_CHANNEL, commands.Confirm.Select(), commands.Confirm.SelectOk)
    ready, count = message(), len(tasks)
    watch = Stopwatch()
    sent = confirmed = 0
    rest = b""
    while confirmed < count:
        room = min(_OUTSTANDING - (sent - confirmed), count - sent)
        if room:
            wire.socket.sendall(ready * room)
            sent += room
        rest += wire.socket.recv(_READ)
        whole = len(rest) - len(rest) % _ACK.size
        for *_, method, tag, multiple, _end in _ACK.iter_unpack(rest[:whole]):
            assert method == commands.Basic.Ack.frame_id, "a publish was refused"
            confirmed = max(confirmed, tag) if multiple else confirmed + 1
        rest = rest[whole:]
    watch.report()


def consume(count: int) -> None:
    """All deliveries have one size but for the first digits of nothing: their number follows from the bytes."""
    wire = Wire()
    wire.ask(_CHANNEL, commands.Basic.Qos(prefetch_count=_OUTSTANDING), commands.Basic.QosOk)
    wire.ask(_CHANNEL, commands.Basic.Consume(queue=queue(), consumer_tag="w"), commands.Basic.ConsumeOk)
    data, size = wire.rest, 0
    received = acknowledged = 0
    while received < count:
        if not size:
            second = data.find(_DELIVER, 7 + len(_DELIVER))
            size = second - data.find(_DELIVER) if second > 0 else 0
        if size:
            whole = len(data) // size
            for task in range(received, received + whole):
                note_run(task)
            received, data = received + whole, data[whole * size :]
        due = received - received % _ACKS_BY if received < count else count
        if due > acknowledged:
            wire.socket.sendall(frame.marshal(commands.Basic.Ack(due, multiple=True), _CHANNEL))
            acknowledged = due
        if received < count:
            data += wire.socket.recv(_READ)
    wire.ask(_CHANNEL, commands.Channel.Close(200, "", 0, 0), commands.Channel.CloseOk)


async def work() -> None:
    await asyncio.to_thread(consume, len(own_ledger().runs))
    await asyncio.Future()


if __name__ == "__main__":
    if sys.argv[1] == "work":
        asyncio.run(work())
    else:
        enqueue(Order.read().tasks)
