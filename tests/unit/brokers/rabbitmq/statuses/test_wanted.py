"""Messages of the stream are looked through for some tasks without being decoded."""

from __future__ import annotations

import json

import pytest

from leveret.brokers.rabbitmq.amqp import Properties, marshal
from leveret.brokers.rabbitmq.statuses.streams import Batch, Wanted, stream_offset, to_message
from leveret.model import Envelope, new_id
from leveret.model.status import started

IDS = ["order-17", 'a "quoted" one', "über", "a\\b", "01" * 16, "x" * 255]


def message(ids: list[str]) -> bytes:
    return to_message("s", Batch(updates=[started(Envelope(one, "w", "say", b""), "say", 2.0) for one in ids])).body


@pytest.mark.parametrize("id_", IDS)
def test_it_is_found_however_it_is_written(id_: str) -> None:
    others = [new_id() for _ in range(5)]
    for body in (message([*others, id_]), json.dumps(json.loads(message([id_]))).encode()):
        assert [update.id for update in Wanted([id_]).updates(body)] == [id_]
    assert Wanted([id_]).updates(message(others)) == []


def test_many_are_found_too() -> None:
    many = [new_id() for _ in range(100)]
    found = Wanted([*many, *IDS]).updates(message([new_id(), *IDS, many[50]]))
    assert [update.id for update in found] == [*IDS, many[50]]
    assert Wanted(many).updates(message(IDS)) == []


def test_a_name_inside_of_another_is_none() -> None:
    assert Wanted(["order-1"]).updates(message(["order-17"])) == []


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[]", b'{"v": 2, "updates": [{"id": "order-17"}]}'])
def test_what_makes_no_sense_says_nothing(body: bytes) -> None:
    for ids in (["order-17"], [str(number) for number in range(20)]):
        assert Wanted(ids).updates(body) == []


def test_one_bad_update_costs_no_other() -> None:
    batch = json.loads(message(["order-17", *(f"n{number}" for number in range(20))]))
    batch["updates"][1]["state"] = 7
    batch["updates"][2] = {"no": "id"}
    body = json.dumps(batch).encode()
    assert [one.id for one in Wanted(["order-17"]).updates(body)] == ["order-17"]
    assert [one.id for one in Wanted(["order-17", *map(str, range(20))]).updates(body)] == ["order-17"]


def header(headers: dict[str, str | int], message_id: str | None = None) -> bytes:
    return b"\x00\x3c" + bytes(10) + marshal(Properties(headers={**headers}, message_id=message_id))


def test_where_a_message_is() -> None:
    assert stream_offset(header({"x-stream-offset": 2**40})) == 2**40
    assert stream_offset(header({"a": "b", "x-stream-offset": 7, "c": 1})) == 7
    assert stream_offset(header({"a": "b"})) is None
    assert stream_offset(header({})) is None


def test_where_a_message_is_cannot_be_forged() -> None:
    """By what looks like it in another property."""
    forged = "\x0fx-stream-offsetl" + "\x01" * 8
    assert stream_offset(header({"x-stream-offset": 7}, message_id=forged)) == 7
    assert stream_offset(header({"x-stream-offset": 7, "a": forged})) == 7
