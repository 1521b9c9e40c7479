"""Messages that no Python client can decode: a worker must not end by them, and they must not be lost."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from leveret.model import Envelope, new_id
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.foreign import (
    WIRE_VALUES,
    Raw,
    headers_in,
    nested_arrays,
    nested_tables,
    number,
    publish,
    table,
    text,
    time,
)
from tests.support.waiting import wait_until
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

MICROSECONDS = 1_700_000_000_000_000
SAY = b'{"args": ["%s"]}'
#: What a foreign producer may send, and what must be told of it.
UNREADABLE = {
    "microseconds": (Raw(type=b"say", timestamp=MICROSECONDS), f"timestamp {MICROSECONDS} is no time"),
    "nanoseconds": (Raw(type=b"say", timestamp=MICROSECONDS * 1_000), f"timestamp {MICROSECONDS}000 is no time"),
    "the last timestamp": (Raw(type=b"say", timestamp=2**64 - 1), "timestamp 18446744073709551615 is no time"),
    "Latin-1 type": (Raw(type=b"caf\xe9"), r"type b'caf\xe9' is not UTF-8"),
    "Latin-1 id": (Raw(type=b"say", message_id=b"\xff" * 255), r"message_id b'\xff"),
    "Latin-1 others": (
        Raw(type=b"say", content_type=b"\xe4", content_encoding=b"\xe4", correlation_id=b"\xe4", app_id=b"\xe4"),
        "content_type b'\\xe4' is not UTF-8, and was read as Latin-1; content_encoding",
    ),
    "Latin-1 header": (Raw(type=b"say", headers=table({b"caf\xe9": text(b"\xe9")})), r"header b'caf\xe9'"),
    "a long Latin-1 header": (
        Raw(type=b"say", headers=table({b"\xe9" * 255: text(b"v"), b"t": b"F" + table({b"\xe9" * 255: text(b"v")})})),
        r"header b'\xe9",
    ),
    "a time in a header": (Raw(type=b"say", headers=table({b"at": time(2**63)})), "header 'at': 9223372036854775808"),
    "deep arrays": (Raw(type=b"say", headers=table({b"deep": nested_arrays(5_000)})), "'deep' is nested more than 32"),
    "deep tables": (Raw(type=b"say", headers=table({b"deep": nested_tables(40)})), "'k' is nested more than 32 deep"),
}


def test_what_cannot_be_read_is_dead_and_its_neighbours_run(node: Node, ledger: Ledger) -> None:
    """Test of every kind at once: each is dead, with its body as it came; before, one of them ended all workers."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "before")
    publish(node, "work", [(raw, SAY % name.encode()) for name, (raw, _) in UNREADABLE.items()])
    client.enqueue(ledger_app.say, "after")
    with Worker(node.url, ledger, "-q", "work") as worker:
        ledger.wait_for("said before")
        ledger.wait_for("said after")
        letters = client.wait_until_dead("work", len(UNREADABLE))
        client.wait_until_empty("work")
        worker.wait_for(" dead: its properties cannot be read", len(UNREADABLE))
        assert "lost" not in worker.output
        assert "Traceback" not in worker.output
        reasons = {letter.envelope.body: letter.reason for letter in letters}
        for name, (_, told) in UNREADABLE.items():
            assert told in reasons[SAY % name.encode()], name
        assert leveret("dead", "retry", "work", "--error", "timestamp", "--url", node.url).startswith("3 dead letters")
        for name in ("microseconds", "nanoseconds", "the last timestamp"):
            ledger.wait_for(f"said {name}")
    assert len(ledger.lines()) == 5


def test_an_unreadable_message_keeps_what_can_be_read(node: Node, ledger: Ledger) -> None:
    client = Client(node.url)
    headers = table({b"tenant": text(b"a"), b"caf\xe9": number(7), b"leveret-attempt": number(3)})
    raw = Raw(type=b"say", message_id=b"m-1", timestamp=MICROSECONDS, headers=headers, correlation_id=b"c-1")
    publish(node, "work", [(raw, b"\x00\xff")])
    with Worker(node.url, ledger, "-q", "work"):
        (letter,) = client.wait_until_dead("work", 1)
    envelope = letter.envelope
    assert (envelope.id, envelope.task, envelope.body, envelope.attempt) == ("m-1", "say", b"\x00\xff", 3)
    assert envelope.headers == {"tenant": "a", "café": 7}


def test_a_foreign_routing_key_is_nobodys_business(node: Node, ledger: Ledger) -> None:
    """It comes with every delivery, and nothing depends on it: the task runs."""
    client = Client(node.url)
    publish(node, "work", [(Raw(type=b"say"), SAY % b"by a fanout")], routing_key=b"\xff" * 255)
    with Worker(node.url, ledger, "-q", "work") as worker:
        ledger.wait_for("said by a fanout")
        client.wait_until_empty("work")
        assert "lost" not in worker.output
    assert client.dead("work") == []


def test_dead_letters_of_others_can_be_looked_at(node: Node, ledger: Ledger) -> None:
    """Written into the dead-letter queue by another program, unreadable, without an id, two of them the same."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "one that runs")
    with Worker(node.url, ledger):
        ledger.wait_for("said one that runs")
    same = (Raw(type=b"say"), SAY % b"twice")
    publish_dead(node, [(Raw(type=b"say", timestamp=MICROSECONDS), SAY % b"once"), same, same])
    listed = [json.loads(leveret("dead", "list", "work", "--json", "--url", node.url)) for _ in range(2)]
    assert listed[0] == listed[1]
    once, *twice = listed[0]
    assert "timestamp" in once["reason"]
    assert twice[0] == twice[1]
    assert "timestamp" in leveret("dead", "show", "work", once["id"], "--url", node.url)
    leveret("dead", "retry", "work", once["id"], "--url", node.url)
    assert leveret("dead", "retry", "work", twice[0]["id"], "--url", node.url).startswith("2 dead letters")
    with Worker(node.url, ledger):
        ledger.wait_for("said once")
        ledger.wait_for("said twice", 2)
        client.wait_until_empty("work")
    assert client.dead("work") == []


def publish_dead(node: Node, messages: list[tuple[Raw, bytes]]) -> None:
    publish(node, "work.dead", messages, declare=False)


@pytest.mark.parametrize("size", [100_000, 130_900])
def test_large_headers_leave_room_for_the_reason(node: Node, ledger: Ledger, size: int) -> None:
    """A retry and a dead letter add headers, and all must fit one frame: RabbitMQ cuts whoever sends a larger one."""
    client = Client(node.url)
    headers = table({b"large": text(b"x" * size), b"small": text(b"y")})
    publish(node, "work", [(Raw(type=b"fail_loudly", headers=headers), b'{"args": ["a"]}')])
    client.enqueue(ledger_app.say, "after")
    with Worker(node.url, ledger, "-q", "work") as worker:
        ledger.wait_for("said after")
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
        assert "lost" not in worker.output
    assert ledger.count("try a") == 2
    assert "é" * 50 in letter.traceback
    assert letter.envelope.headers == {"small": "y"} | ({"large": "x" * size} if size == 100_000 else {})


def test_a_copy_is_not_routed_again(node: Node, ledger: Ledger) -> None:
    """A header CC names further queues to RabbitMQ. With it, a dead letter comes back and dies for ever."""
    client = Client(node.url)
    array = b"A" + (len(text(b"work"))).to_bytes(4, "big") + text(b"work")
    publish(node, "work", [(Raw(type=b"fail_always", headers=table({b"CC": array})), b'{"args": ["a"]}')])
    with Worker(node.url, ledger, "-q", "work"):
        client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
    assert ledger.count("try a") == 3
    assert len(client.dead("work")) == 1


def test_thousands_of_dead_letters_can_be_put_back(node: Node, ledger: Ledger) -> None:
    """One by one, a round trip or two each, they took longer than a command may."""
    client = Client(node.url)
    with Worker(node.url, ledger, "-q", "work") as worker:
        worker.ready()
    letters = [Envelope(new_id(), "work.dead", "say", b"{}") for _ in range(1_000)]
    client.publish_many(letters)
    listed = json.loads(leveret("dead", "list", "work", "--limit", "10000", "--json", "--url", node.url))
    assert [letter["id"] for letter in listed] == [letter.id for letter in letters]
    assert leveret("dead", "retry", "work", "--all", "--url", node.url).startswith("1000 dead letters")
    wait_until(lambda: client.stats("work").ready == 1_000, "all are back")  # counted by RabbitMQ 3.10 now and then
    assert client.dead("work") == []


def test_a_copy_keeps_the_types_of_headers(node: Node, ledger: Ledger) -> None:
    """Through a retry with a delay, a dead letter and another life, each value is what its producer wrote."""
    client = Client(node.url)
    headers = {name.encode(): value for name, value in WIRE_VALUES.items()}
    message = Raw(type=b"fail_always", message_id=b"m-1", headers=table(headers)), b'{"args": ["a"]}'
    publish(node, "work", [message])
    publish(node, "as it came", [message])
    (came,) = headers_in(node, "as it came")
    assert came.keys() >= headers.keys()
    with Worker(node.url, ledger, "-q", "work"):
        client.wait_until_dead("work", 1)
        ledger.wait_for("try a", 3)
    (dead,) = headers_in(node, "work.dead")
    assert {name: dead[name] for name in headers} == {name: came[name] for name in headers}
    assert leveret("dead", "retry", "work", "m-1", "--url", node.url).startswith("1 dead letter")
    (again,) = headers_in(node, "work")
    assert {name: again[name] for name in headers} == {name: came[name] for name in headers}
