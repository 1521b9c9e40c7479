"""Deliveries are put together from frames, in whatever pieces they come, and aiormq gets every other frame."""

from __future__ import annotations

import asyncio
import datetime as dt
from typing import TYPE_CHECKING

import pytest
from aiormq.abc import ChannelFrame
from aiormq.connection import FrameReceiver
from aiormq.exceptions import AMQPConnectionError
from hypothesis import given, settings
from hypothesis import strategies as st
from pamqp import body, commands, frame, heartbeat
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import frame_reader as reading
from leveret.brokers.rabbitmq.amqp.frame_reader import FrameReader, Incoming, acks, nack
from leveret.brokers.rabbitmq.queues.codec import received
from tests.unit.brokers.rabbitmq.queues.test_codec import LEASE

if TYPE_CHECKING:
    from collections.abc import Sequence

Properties = commands.Basic.Properties
TAKEN, OTHER = 1, 2
#: The last frame of a connection.
FAREWELL = frame.marshal(commands.Connection.CloseOk(), 0)


def message(tag: int, text: bytes, *, channel: int = TAKEN, pieces: int = 1, again: bool = False) -> bytes:
    size = -(-len(text) // pieces) or 1
    bodies = [body.ContentBody(text[at : at + size]) for at in range(0, len(text), size)]
    frames: list[frame.FrameTypes] = [
        commands.Basic.Deliver("leveret-1", tag, again, "", "work"),
        ContentHeader(0, len(text), Properties(message_id=f"id-{tag}")),
        *bodies,
    ]
    return b"".join(frame.marshal(one, channel) for one in frames)


async def read(data: bytes, sizes: Sequence[int] = ()) -> tuple[list[Incoming], list[frame.FrameTypes]]:
    """What is taken, and what aiormq gets, of bytes that come in pieces of those sizes."""
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    taken: list[Incoming] = []
    frames.take_deliveries(TAKEN, taken.extend)

    async def send() -> None:
        at = 0
        for size in sizes:
            source.feed_data(data[at : at + size])
            at += size
            await asyncio.sleep(0)
        source.feed_data(data[at:] + FAREWELL)
        source.feed_eof()

    sending = asyncio.create_task(send())
    others = [one async for _, _, one in FrameReceiver(frames) if not isinstance(one, commands.Connection.CloseOk)]
    await sending
    return taken, others


async def test_deliveries_are_taken_and_aiormq_gets_the_rest() -> None:
    """This fails when aiormq reads a stream in another way than `FrameReader` serves."""
    rest = frame.marshal(commands.Basic.CancelOk("leveret-1"), TAKEN)
    data = message(1, b"one") + message(7, b"other", channel=OTHER) + rest + message(2, b"", again=True)
    taken, others = await read(data)
    assert [(one.consumer, one.tag, one.redelivered, one.body) for one in taken] == [
        (b"leveret-1", 1, False, b"one"),
        (b"leveret-1", 2, True, b""),
    ]
    kinds = [type(one) for one in others]
    assert kinds == [commands.Basic.Deliver, ContentHeader, body.ContentBody, commands.Basic.CancelOk]


async def test_a_delivery_is_handed_on_before_what_came_after_it() -> None:
    """A worker that stops waits for the server's answer, and has then every delivery that was on its way."""
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    order: list[object] = []
    frames.take_deliveries(TAKEN, lambda taken: order.extend(one.tag for one in taken))
    source.feed_data(message(1, b"a") + message(2, b"b") + frame.marshal(commands.Basic.CancelOk("leveret-1"), TAKEN))
    source.feed_data(message(3, b"c") + FAREWELL)
    source.feed_eof()
    async for _, _, one in FrameReceiver(frames):
        order.append(type(one))
    assert order == [1, 2, commands.Basic.CancelOk, 3, commands.Connection.CloseOk]


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), max_size=40), st.integers(1, 5))
def test_it_does_not_matter_in_which_pieces_they_come(sizes: list[int], pieces: int) -> None:
    texts = [b"x" * 30, b"", b"abc", b"y" * 17]
    data = b"".join(
        message(tag, text, pieces=pieces) + frame.marshal(heartbeat.Heartbeat(), 0) for tag, text in enumerate(texts, 1)
    )
    taken, others = asyncio.run(read(data, sizes))
    assert [(one.tag, one.body) for one in taken] == list(enumerate(texts, 1))
    assert len(others) == len(texts)


async def test_aiormq_hears_that_a_connection_lives_on_which_only_deliveries_come(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """RabbitMQ sends no heartbeats while it sends anything, and aiormq ends a connection that is silent."""
    monkeypatch.setattr(reading, "_SILENCE", -1.0)
    taken, others = await read(message(1, b"a") + message(2, b"b"), [len(message(1, b"a"))])
    assert len(taken) == 2
    assert others
    assert {type(one) for one in others} == {heartbeat.Heartbeat}


async def test_a_connection_that_ends_within_a_message_is_lost() -> None:
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    frames.take_deliveries(TAKEN, list[Incoming]().extend)
    source.feed_data(message(1, b"a") + message(2, b"b")[:-3])
    source.feed_eof()
    with pytest.raises(AMQPConnectionError):
        await FrameReceiver(frames).get_frame()


common = st.builds(
    Properties,
    content_type=st.none() | st.sampled_from(["application/json", "text/plain"]),
    delivery_mode=st.none() | st.just(2),
    priority=st.none() | st.integers(0, 255),
    message_id=st.text(min_size=1, max_size=40),
    timestamp=st.none() | st.datetimes(dt.datetime(1980, 1, 1), dt.datetime(2100, 1, 1), timezones=st.just(dt.UTC)),  # noqa: DTZ001 - given a zone
    message_type=st.none() | st.text(max_size=40),
    headers=st.none() | st.just({"leveret-attempt": 3}),
    app_id=st.none() | st.just("shop"),
)


@settings(deadline=None)
@given(common, st.booleans())
def test_what_is_read_is_what_aiormq_reads(properties: Properties, again: bool) -> None:
    if properties.timestamp is not None:
        properties.timestamp = properties.timestamp.replace(microsecond=0)
    header = ContentHeader(0, 2, properties).marshal()
    mine = received(Incoming(b"leveret-1", 4, again, header, b"{}"), "work", LEASE)
    decoded = ContentHeader()
    decoded.unmarshal(header)
    theirs = decoded.properties
    envelope = mine.envelope
    assert (envelope.task, envelope.content_type, envelope.priority) == (
        theirs.message_type or None,
        theirs.content_type,
        theirs.priority,
    )
    assert envelope.id == theirs.message_id
    assert envelope.enqueued_at == (theirs.timestamp.timestamp() if theirs.timestamp else None)
    assert envelope.attempt == (theirs.headers or {}).get("leveret-attempt", 1)
    assert (mine.tag, mine.returns, mine.defect, mine.lease) == (4, int(again), "", LEASE)
    assert mine.content.properties.marshal() == theirs.marshal()


@pytest.mark.parametrize("header", [b"", b"\x04", b"\x04abc", b"\x04id-1\x00"])
def test_nonsense_is_told(header: bytes) -> None:
    """Properties that end too soon, or too late: no server sends them."""
    flags = (1 << 7).to_bytes(2, "big")
    incoming = Incoming(b"leveret-1", 1, False, b"\x00\x3c\x00\x00" + bytes(8) + flags + header, b"")  # noqa: FBT003
    assert received(incoming, "work", LEASE).envelope.id


@given(st.sets(st.integers(1, 30), min_size=1), st.sets(st.integers(1, 30)))
def test_acknowledged_is_what_was_meant(tags: set[int], unsettled: set[int]) -> None:
    """As a server reads the frames: those of many include all that was delivered before."""
    unsettled -= tags
    data, settled, open_ = acks(7, list(tags), min(unsettled, default=None)), set[int](), tags | unsettled
    while data:
        size, channel, one = frame.unmarshal(data)
        assert isinstance(one, commands.Basic.Ack)
        assert channel == 7
        tag = one.delivery_tag
        assert tag is not None
        assert tag in open_, "RabbitMQ would close the channel"
        now = {other for other in open_ if other <= tag} if one.multiple else {tag}
        settled |= now
        open_ -= now
        data = data[size:]
    assert settled == tags


def test_what_settles_is_what_aiormq_would_send() -> None:
    ack, back = commands.Basic.Ack(5, multiple=True), commands.Basic.Nack(2**40, requeue=True)
    assert acks(3, [4, 5], None) == ChannelFrame.marshall(3, [ack]).payload
    assert nack(3, 2**40) == ChannelFrame.marshall(3, [back]).payload


async def test_two_channels_are_taken_side_by_side() -> None:
    """Their frames come mixed; a channel that is left is aiormq's again."""
    one, two = ([frame.marshal(part, channel) for part in parts(channel)] for channel in (TAKEN, OTHER))
    source = asyncio.StreamReader()
    frames = FrameReader(source)
    taken: dict[int, list[Incoming]] = {TAKEN: [], OTHER: []}
    takers = {channel: messages.extend for channel, messages in taken.items()}
    for channel, take in takers.items():
        frames.take_deliveries(channel, take)
    source.feed_data(b"".join(piece for pair in zip(one, two, strict=True) for piece in pair))
    source.feed_data(frame.marshal(commands.Basic.CancelOk("leveret-1"), OTHER))
    receiver = FrameReceiver(frames)
    assert isinstance((await anext(receiver))[2], commands.Basic.CancelOk)
    assert [message.body for message in taken[TAKEN]] == [b"text of 1"]
    assert [message.body for message in taken[OTHER]] == [b"text of 2"]
    frames.leave_deliveries(TAKEN, takers[OTHER])
    frames.leave_deliveries(OTHER, takers[OTHER])
    source.feed_data(message(5, b"a") + message(6, b"b", channel=OTHER) + FAREWELL)
    source.feed_eof()
    kinds = [type(kind) async for _, _, kind in receiver]
    assert kinds == [commands.Basic.Deliver, ContentHeader, body.ContentBody, commands.Connection.CloseOk]
    assert [message.body for message in taken[TAKEN]] == [b"text of 1", b"a"], "only its own taker leaves it"


def parts(channel: int) -> list[frame.FrameTypes]:
    text = b"text of %d" % channel
    return [
        commands.Basic.Deliver("leveret-1", 1, redelivered=False, exchange="", routing_key="work"),
        ContentHeader(0, len(text), Properties()),
        body.ContentBody(text[:4]),
        body.ContentBody(text[4:]),
    ]
