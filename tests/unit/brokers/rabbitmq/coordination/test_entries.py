"""Rows and hellos as messages."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from leveret.brokers.rabbitmq.amqp import Incoming, Message, Properties, TaskProperties, content_of, marshal
from leveret.brokers.rabbitmq.coordination import entries
from leveret.brokers.rabbitmq.coordination.entries import (
    Foreign,
    Hello,
    Row,
    Version,
    entry_of,
    hello_message,
    is_own,
    row_message,
    with_row,
)

VERSION = Version(7, 12, "host:4711:5ad3")


def delivered(message: Message, **more: Any) -> Incoming:
    """As RabbitMQ delivers it: without `BCC`, and with a header of its own behind the others (``more``)."""
    assert isinstance(message.properties, Properties)
    headers = {name: value for name, value in (message.properties.headers or {}).items() if name != "BCC"}
    message.properties.headers = {**headers, **more} or None
    head = struct.pack(">HHQ", 60, 0, len(message.body))
    return Incoming(
        b"leveret-rows", tag=1, redelivered=False, header=head + marshal(message.properties), body=message.body
    )


@pytest.mark.parametrize("key", ["", "a", "caf\u00e9:\u2603", 'quote"d'])
@pytest.mark.parametrize("value", [b"", b"value", bytes(1_000), None])
@pytest.mark.parametrize("more", [{}, {"x-delivery-count": 3}])
def test_a_row_comes_back_as_it_went(key: str, value: bytes | None, more: dict[str, int]) -> None:
    row = Row(key, VERSION, value)
    assert entry_of(delivered(row_message("table", row, "id"), **more)) == row


def test_both_ways_to_read_a_row_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("a", VERSION, b"v")
    message = delivered(row_message("table", row, "id"))
    assert entries._plain_row(message.header, message.body) == row
    monkeypatch.setattr(entries, "_plain_row", lambda *_: None)
    assert entry_of(message) == row


def test_a_hello_comes_back_as_it_went() -> None:
    hello = Hello("host:4711:5ad3", 3)
    assert entry_of(delivered(hello_message("table", hello, "id"))) == hello


@pytest.mark.parametrize(
    "properties",
    [
        TaskProperties("task-1", "say", "application/json", 4, 1_700_000_000),
        Properties(message_id="task-1", message_type="say", headers={"own": "x"}, delivery_mode=2),
        Properties(message_id="task-1", delivery_mode=2),
    ],
)
def test_a_row_rides_on_a_task_which_stays_as_it_is(properties: Properties | TaskProperties) -> None:
    task = Message("work", b'{"args": []}', properties, "work")
    row = Row("a", VERSION, b"\x00 last", rides=True)
    message = with_row("leveret.table.x", task, row)
    assert (message.queue, message.body, message.id) == ("work", task.body, "task-1")
    assert isinstance(message.properties, Properties)
    assert (message.properties.headers or {})["BCC"] == ["leveret.table.x"]
    assert not is_own(message)
    incoming = delivered(message, **{"x-delivery-count": 1})
    assert entry_of(incoming) == row
    found = content_of(incoming.header).properties
    assert (found.message_id, found.message_type) == ("task-1", properties.message_type)
    assert (found.headers or {}).get("own") == (getattr(properties, "headers", None) or {}).get("own")
    assert isinstance(properties, TaskProperties) or "BCC" not in (properties.headers or {}), (
        "the caller's is as it was"
    )


@pytest.mark.parametrize("order", [1, -1])
def test_a_row_on_a_task_is_read_as_bytes_wherever_it_stands_among_the_headers(order: int) -> None:
    """RabbitMQ 4 does not keep the order of headers."""
    row = Row("a", VERSION, b"\x00 last", rides=True)
    properties = Properties(message_id="1", message_type="say", headers={"own": "x", "count": 7}, delivery_mode=2)
    message = with_row("leveret.table.x", Message("work", b"{}", properties, "work"), row)
    assert isinstance(message.properties, Properties)
    message.properties.headers = dict(list((message.properties.headers or {}).items())[::order])
    assert entries._riding_row(delivered(message).header) == row


@pytest.mark.parametrize(
    ("properties", "body", "is_kept"),
    [
        (Properties(), b"what is this", False),
        (Properties(message_type="leveret.hello"), b"{}", False),
        (Properties(message_type="leveret.hello"), b"\xff", False),
        (Properties(headers={"own": 1}), b"", False),
        (Properties(message_type="leveret.row", headers={"leveret-row": "no JSON"}), b"", True),
        (Properties(message_type="leveret.row", headers={"leveret-row": 7}), b"", True),
        (
            Properties(
                message_type="leveret.row", headers={"leveret-row": '{"v":2,"key":"a","epoch":1,"number":1,"by":"b"}'}
            ),
            b"",
            True,
        ),
        (
            Properties(message_type="leveret.row", message_id="x", delivery_mode=2, headers={"leveret-row": ""}),
            b"",
            True,
        ),
    ],
)
def test_what_is_not_ours_is_told_apart(properties: Properties, body: bytes, is_kept: object) -> None:
    assert entry_of(delivered(Message("t", body, properties))) == Foreign(is_kept=bool(is_kept))


def test_a_task_s_copies_do_not_carry_its_row() -> None:
    from leveret.brokers.rabbitmq.queues import received, retry_message
    from leveret.model import Retrying

    row = Row("a", VERSION, b"v", rides=True)
    task = Message("work", b"{}", Properties(message_id="1", message_type="say", headers={"own": "x"}), "work")
    incoming = delivered(with_row("leveret.table.x", task, row))

    class Lease:
        held = True

    delivery = received(incoming, "work", Lease())
    assert delivery.envelope.headers == {"own": "x"}
    copy = retry_message(delivery, Retrying("it failed"), 1_700_000_000.0)
    assert isinstance(copy.properties, Properties)
    assert "leveret-row" not in (copy.properties.headers or {})
