"""Hostile messages by the dozen: bodies, properties and headers that no honest producer sends, from a seed."""

from __future__ import annotations

import random
import struct
import time
from typing import Any

import msgspec

from tests.support.foreign import Raw, nested_arrays, nested_tables, number, sized, table, text
from tests.support.foreign import time as moment

TASKS = (b"swallow", b"swallow", b"swallow_in_thread", b"particular", b"fail", b"give_up", b"fail_later")
OURS = (
    b"leveret-attempt",
    b"leveret-error",
    b"leveret-due",
    b"leveret-expires-at",
    b"leveret-reason",
    b"leveret-traceback",
    b"leveret-died-at",
    b"leveret-unreadable",
    b"leveret-left-out",
    b"leveret-priority",
)
BROKERS = (b"x-death", b"x-first-death-queue", b"x-last-death-reason", b"x-delivery-count", b"x-acquired-count")
#: All headers must fit a frame (bytes); with so many, what a dead letter adds to them does not fit any more.
MOST_HEADERS = 130_000
#: JSON, or nearly, in the place of an argument.
VALUES = (
    b"1",
    b"NaN",
    b"-Infinity",
    b"1e999",
    b"-0.0",
    b"9" * 400,
    b"-" + b"9" * 5_000,
    b"0." + b"1" * 5_000,
    b'"\\ud800"',
    b'"\\u0000\\u001b[2J"',
    b'"' + b"x" * 300_000 + b'"',
    b"[" * 100_000,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 50_000,
    b'{"a":1,"a":[2]}',
    b'{"a":[1,2.5],"b":["1"]}',
    b'{"__class__":"os.system","py/reduce":["ls"]}',
    b'"\xff\xfe"',
    b"[1,]",
    b"'single'",
    b"null",
    b"tru",
)
#: Around the value and the number.
SHAPES = (
    b'{"args":[%b],"kwargs":{"number":%d}}',
    b'{"args":[%b,%d]}',
    b'{"kwargs":{"value":%b,"number":%d},"args":[],"more":{}}',
    b'{"args":[0],"args":[%b],"kwargs":{"number":%d}}',
    b'{"args":{"0":%b},"kwargs":{"number":%d}}',
    b'{"args":null,"value":%b,"kwargs":{"number":%d}}',
    b'{"args":[%b,%d,3,4,5]}',
    b'{"args":[],"kwargs":[%b,%d]}',
    b'{"kwargs":{"value":%b,"nummer":%d}}',
    b'\xef\xbb\xbf{"args":[%b],"kwargs":{"number":%d}}',
    b"[%b,%d]",
    b'"%b %d"',
    b'{"args":[%b],"kwargs":{"number":%d}} trailing',
    b'{"args":[%b],"kwargs":{"number":%d.0}}',
)


class Hostile(msgspec.Struct, frozen=True):
    """A message and its number. Its body has the number in it, so that no two are the same."""

    number: int
    properties: Raw
    body: bytes


def hostile(seed: int, count: int) -> list[Hostile]:
    """That many messages, the same for the same seed (but for the times in them, which are from now on)."""
    chance = random.Random(seed)
    return [Hostile(each, _properties(chance), body(chance, each)) for each in range(count)]


def body(chance: random.Random, each: int) -> bytes:
    if chance.random() < 0.1:
        return chance.randbytes(chance.choice((0, 1, 100, 200_000))) + b"%d" % each
    # Half of them sound but for what else is wrong with the message.
    shape = SHAPES[0] if chance.random() < 0.5 else chance.choice(SHAPES)
    return shape % (chance.choice(VALUES[:1] * 20 + VALUES), each)


def _properties(chance: random.Random) -> Raw:
    given: dict[str, Any] = {"type": chance.choice(TASKS)}
    strange: dict[str, Any] = {
        "type": _bytes(chance),
        "content_type": chance.choice((b"application/json; charset=utf-16", b"text/plain", _bytes(chance))),
        "content_encoding": chance.choice((b"gzip", b"deflate", _bytes(chance))),
        "priority": chance.randrange(256),
        "delivery_mode": chance.choice((1, 2)),  # RabbitMQ 3.10 takes no other
        "correlation_id": _bytes(chance),
        "reply_to": chance.choice((b"work", b"", _bytes(chance))),
        "expiration": b"3600000",
        "message_id": chance.choice((b"", b"the same", _bytes(chance))),
        "timestamp": chance.choice((0, 2**32, 2**53, 2**63, 2**64 - 1, chance.getrandbits(64))),
        "app_id": _bytes(chance),
        "cluster_id": _bytes(chance),
    }
    for name in chance.sample(sorted(strange), chance.choice((0, 1, 1, 2, 5))):
        given[name] = strange[name]
    if chance.random() < 0.7:
        given["headers"] = table(_headers(chance))
    return Raw(**given)


def _bytes(chance: random.Random) -> bytes:
    return chance.choice((b"", b"\xff", "é\x00\n\x1b[31m".encode(), b"y" * 255, chance.randbytes(20)))


def _headers(chance: random.Random) -> dict[bytes, bytes]:
    names = chance.choices((*OURS, *OURS, *BROKERS, b"tenant", _bytes(chance)), k=chance.choice((1, 2, 3, 8)))
    headers = {name: _value(chance) for name in names}
    for name in (b"leveret-due", b"leveret-expires-at"):  # later is no harm, but the test would have to wait
        if headers.get(name, b"").startswith(b"l"):
            soon = int((time.time() + chance.uniform(-10, 5)) * 1_000)
            headers[name] = number(chance.choice((-1, 0, soon, 2**62)))
    while len(table(headers)) > MOST_HEADERS:
        del headers[max(headers, key=lambda name: len(headers[name]))]
    return headers


def _value(chance: random.Random) -> bytes:
    return chance.choice(
        (
            number(chance.choice((0, -1, 1, 2, 7, 2**31, 2**63 - 1, -(2**63)))),
            number(chance.randrange(-5, 5)),
            text(b"7"),
            text(chance.choice((b"\xff", b"z" * 20_000, b"z" * 90_000, "é".encode() * 5_000))),
            b"t\x01",
            b"V",
            b"d" + struct.pack(">d", chance.choice((1e300, 3.0))),  # RabbitMQ itself fails on NaN and Infinity
            b"f" + struct.pack(">f", -0.5),
            b"D\xff" + chance.randbytes(4),
            b"x" + sized(chance.randbytes(9)),
            b"A" + sized(b"V" + number(1) + text(b"a")),
            b"A" + sized(b"F" + table({b"count": number(-1), b"queue": text(b"work"), b"reason": text(b"expired")})),
            b"F" + table({b"": number(1), b"\xff": b"V"}),
            moment(chance.choice((0, 2**40, 2**60, 2**64 - 1))),
            chance.choice((nested_arrays, nested_tables))(chance.choice((3, 33, 300, 3_000))),
        )
    )
