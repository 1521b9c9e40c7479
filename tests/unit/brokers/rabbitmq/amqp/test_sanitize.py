"""FrameReader as aiormq reads them: none that a server can deliver ends the reading."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING, Any, cast

import pytest
from aiormq.connection import FrameReceiver
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import body, commands, frame, heartbeat
from pamqp.exceptions import PAMQPException
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp.frame_reader import FrameReader
from leveret.brokers.rabbitmq.amqp.sanitize import UNREADABLE, marshal, readable, sendable
from leveret.model.bounds import MAX_HEADERS_DEPTH as MAX_DEPTH
from tests.support.foreign import Raw, nested_arrays, nested_tables, number, short, table, text, time

if TYPE_CHECKING:
    from collections.abc import Mapping

Properties = commands.Basic.Properties


def content_header(raw: Raw, size: int = 5) -> bytes:
    payload = b"\x00\x3c\x00\x00" + size.to_bytes(8, "big") + raw.encoded
    return b"\x02\x00\x01" + len(payload).to_bytes(4, "big") + payload + b"\xce"


def method(payload: bytes) -> bytes:
    return b"\x01\x00\x01" + len(payload).to_bytes(4, "big") + payload + b"\xce"


def read(raw: Raw) -> Properties:
    consumed, channel, content = frame.unmarshal(readable(content_header(raw)))
    assert isinstance(content, ContentHeader)
    assert (channel, content.body_size) == (1, 5)
    assert consumed
    return content.properties


def headers_of(properties: Properties) -> dict[str, Any]:
    headers: Mapping[str, Any] = properties.headers or {}
    return dict(headers)


@pytest.mark.parametrize(
    "properties",
    [
        pytest.param(Properties(), id="none"),
        pytest.param(Properties(message_id="é", message_type="say", delivery_mode=2, priority=255), id="texts"),
        pytest.param(Properties(timestamp=dt.datetime(2024, 1, 1, tzinfo=dt.UTC)), id="a time"),
        pytest.param(Properties(headers={"a": [1, {"b": None}], "é": bytearray(b"\xff")}), id="headers"),
    ],
)
def test_a_readable_message_is_handed_on_as_it_came(properties: Properties) -> None:
    data = frame.marshal(ContentHeader(0, 7, properties), 3)
    assert readable(data) is data


def test_milliseconds_are_a_time() -> None:
    read_at = read(Raw(timestamp=1_700_000_000_123)).timestamp
    assert read_at == dt.datetime.fromtimestamp(1_700_000_000.123, dt.UTC)


@pytest.mark.parametrize(
    ("raw", "kept", "headers", "told"),
    [
        (Raw(type=b"caf\xe9"), {"message_type": "café"}, {}, "type b'caf\\xe9' is not UTF-8, and was read as Latin-1"),
        (Raw(message_id=b"\xe9" * 255), {"message_id": "é" * 127}, {}, "message_id b'\\xe9"),
        (Raw(type=b"say", timestamp=2**60, app_id=b"shop"), {"message_type": "say", "app_id": "shop"}, {}, str(2**60)),
        (Raw(timestamp=2**64 - 1), {"timestamp": None}, {}, str(2**64 - 1)),
        (Raw(headers=table({b"\xe9": number(7)})), {}, {"é": 7}, "header b'\\xe9'"),
        (Raw(headers=table({b"\xe9" * 255: number(7)})), {}, {"é" * 127: 7}, "header b'\\xe9"),
        (Raw(headers=table({b"at": time(2**60)})), {}, {"at": 2**60}, "header 'at'"),
        (Raw(headers=table({b"at": time(2**64 - 1)})), {}, {"at": str(2**64 - 1)}, "header 'at'"),
        (Raw(headers=table({b"a": b"?what", b"b": b"V"})), {}, {"a": bytearray(b"what\x01bV")}, "unknown type b'?'"),
    ],
)
def test_what_can_be_read_is_kept(raw: Raw, kept: dict[str, Any], headers: dict[str, Any], told: str) -> None:
    properties = read(raw)
    found = headers_of(properties)
    complaint = found.pop(UNREADABLE)
    assert told in complaint
    assert found == headers
    assert {name: getattr(properties, name) for name in kept} == kept


@pytest.mark.parametrize("nested", [nested_arrays, nested_tables])
def test_depth_is_bounded(nested: Any) -> None:
    """What is deeper is kept as bytes: whoever handles a value calls itself for each level."""
    assert UNREADABLE not in headers_of(read(Raw(headers=table({b"a": nested(MAX_DEPTH - 1)}))))
    for depth in (MAX_DEPTH, 300, 10_000):
        value = headers_of(read(Raw(headers=table({b"a": nested(depth)}))))
        assert "nested more than" in value.pop(UNREADABLE)
        value = value["a"]
        for _ in range(MAX_DEPTH - 1):
            value = value[0] if isinstance(value, list) else value["k"]
        assert nested(depth - MAX_DEPTH + 1)[5:] == value


def test_nonsense_is_still_a_message() -> None:
    """(A server lets no such table through.)"""
    headers = headers_of(read(Raw(headers=b"\x7f\xff\xff\xff\x01a")))
    assert "cannot be read at all" in headers[UNREADABLE]


def test_names_are_made_readable() -> None:
    """The exchange and the routing key that a producer chose come with every delivery."""
    head = commands.Basic.Deliver.index.to_bytes(4, "big") + short(b"tag") + b"\0" * 7 + b"\xff" + b"\x01"
    _, _, deliver = frame.unmarshal(readable(method(head + short(b"caf\xe9") + short(b"\xff" * 255))))
    assert isinstance(deliver, commands.Basic.Deliver)
    assert (deliver.consumer_tag, deliver.delivery_tag, deliver.redelivered) == ("tag", 255, True)
    assert (deliver.exchange, deliver.routing_key) == ("café", "ÿ" * 127)
    get_ok = commands.Basic.GetOk.index.to_bytes(4, "big") + b"\0" * 7 + b"\xff\x00"
    _, _, got = frame.unmarshal(readable(method(get_ok + short(b"caf\xe9") + short(b"\xe9") + b"\x00\x00\x00\xff")))
    assert isinstance(got, commands.Basic.GetOk)
    assert (got.exchange, got.routing_key, got.message_count) == ("café", "é", 255)
    untouched = method(head + short("café".encode()) + short(b"work"))
    assert readable(untouched) == untouched


fields = st.dictionaries(
    st.binary(max_size=20),
    st.recursive(
        st.binary(max_size=8).map(text)
        | st.integers(0, 2**64 - 1).map(time)
        | st.sampled_from(
            [b"V", b"t\x02", b"b\xff", b"D\xff\xff\xff\xff\xff", b"D\x00\x7f\xff\xff\xff", b"d" + b"\xff" * 8]
        )
        | st.binary(max_size=8).map(lambda raw: b"x" + text(raw)[1:]),
        lambda inner: (
            st.lists(inner, max_size=3).map(lambda items: b"A" + text(b"".join(items))[1:])
            | st.dictionaries(st.binary(max_size=5), inner, max_size=3).map(lambda inner: b"F" + table(inner))
        ),
        max_leaves=8,
    ),
    max_size=5,
).map(table)
raws: st.SearchStrategy[Raw] = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            ("content_type", "content_encoding", "correlation_id", "reply_to", "message_id", "type", "app_id"),
            st.binary(max_size=255),
        ),
        "headers": fields,
        "timestamp": st.integers(0, 2**64 - 1),
        "priority": st.integers(0, 255),
        "delivery_mode": st.integers(0, 255),
    },
).map(lambda properties: Raw(**cast("dict[str, Any]", properties)))


@settings(deadline=None)
@given(raws)
@example(Raw(headers=table({b"": text(b"\x80")})))  # pamqp reads it as bytes, and sends no bytes
def test_whatever_is_sent_is_read_and_can_be_sent_on(raw: Raw) -> None:
    properties = read(raw)
    properties.headers = sendable(properties.headers)
    marshal(properties)


async def test_aiormq_reads_through_it() -> None:
    """This fails when aiormq reads a stream in another way than `FrameReader` serves."""
    source = asyncio.StreamReader()
    deliver = frame.marshal(commands.Basic.Deliver("tag", 1, False, "", "work"), 1)  # noqa: FBT003 - pamqp's
    source.feed_data(b"\x08\x00\x00\x00\x00\x00\x00\xce" + deliver + content_header(Raw(type=b"\xff", timestamp=2**60)))
    source.feed_data(frame.marshal(body.ContentBody(b"hello"), 1))
    source.feed_eof()
    found = [one async for _, _, one in FrameReceiver(FrameReader(source))]
    beat, delivered, content, hello = found
    assert isinstance(beat, heartbeat.Heartbeat)
    assert isinstance(delivered, commands.Basic.Deliver)
    assert isinstance(content, ContentHeader)
    assert isinstance(hello, body.ContentBody)
    assert (delivered.routing_key, content.properties.message_type, hello.value) == ("work", "ÿ", b"hello")


def test_other_connections_in_the_process_are_left_alone() -> None:
    """Nothing of the libraries' is replaced: pamqp by itself still fails, and would have ended the connection."""
    with pytest.raises(PAMQPException):
        frame.unmarshal(content_header(Raw(type=b"\xff")))


async def test_what_is_taken_does_not_come_to_aiormq() -> None:
    """All else does, in order; `test_reading` tells of the signs of life in its place."""
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    seen = []

    def take(data: bytes) -> bool:
        seen.append(data)
        return data == ack

    frames.take = take
    ack = frame.marshal(commands.Basic.Ack(7), 2)
    deliver = frame.marshal(commands.Basic.Deliver("tag", 1, False, "", "work"), 1)  # noqa: FBT003 - pamqp's
    source.feed_data(ack * 1_000 + deliver)
    source.feed_eof()
    rest = [one async for _, _, one in FrameReceiver(frames)]
    assert seen == [ack] * 1_000 + [deliver]
    assert [type(one) for one in rest] == [commands.Basic.Deliver]
