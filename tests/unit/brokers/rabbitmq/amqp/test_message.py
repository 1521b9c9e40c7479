"""Messages as frames: the same bytes as pamqp's, made of cached pieces."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import Message
from leveret.brokers.rabbitmq.amqp.message import Encoder, TaskProperties
from leveret.brokers.rabbitmq.amqp.sanitize import marshal
from leveret.brokers.rabbitmq.amqp.splice import SplicedProperties
from leveret.brokers.rabbitmq.queues.codec import fitted, to_message
from leveret.model import Envelope, new_id

if TYPE_CHECKING:
    from pamqp.frame import FrameTypes

Properties = commands.Basic.Properties
CHANNEL = 3
FRAME_MAX = 4_096


def by_pamqp(message: Message, *, mandatory: bool) -> bytes:
    most = FRAME_MAX - 8
    pieces = [message.body[at : at + most] for at in range(0, len(message.body), most)]
    publish = commands.Basic.Publish(routing_key=message.queue, mandatory=mandatory)
    parts: list[FrameTypes] = [publish, *map(body.ContentBody, pieces)]
    frames = [frame.marshal(part, CHANNEL) for part in parts]
    frames.insert(1, content_header(message))
    return b"".join(frames)


def content_header(message: Message) -> bytes:
    """By pamqp, but for headers, whose types are ours (see `test_codec`)."""
    assert not isinstance(message.properties, SplicedProperties)
    properties = by_name(message.properties)
    if not properties.headers:
        return frame.marshal(ContentHeader(0, len(message.body), properties), CHANNEL)
    payload = b"\x00\x3c\x00\x00" + len(message.body).to_bytes(8, "big") + marshal(properties)
    return b"\x02" + CHANNEL.to_bytes(2, "big") + len(payload).to_bytes(4, "big") + payload + b"\xce"


def by_name(properties: Properties | TaskProperties) -> Properties:
    """As pamqp has them."""
    if not isinstance(properties, TaskProperties):
        return properties
    known = {**msgspec.structs.asdict(properties), "timestamp": dt.datetime.fromtimestamp(properties.timestamp, dt.UTC)}
    return Properties(**known, delivery_mode=2)


names = st.text(max_size=60)
envelopes = st.builds(
    Envelope,
    id=names.filter(bool),
    queue=names,
    task=st.none() | names,
    body=st.binary(max_size=3 * FRAME_MAX),
    content_type=st.none() | names,
    enqueued_at=st.none() | st.floats(0, 4e9),
    attempt=st.integers(1, 3),
    due=st.none() | st.floats(0, 4e9),
    priority=st.none() | st.integers(0, 255),
)


@given(envelopes, st.booleans())
def test_every_task_is_as_pamqp_encodes_it(envelope: Envelope, mandatory: bool) -> None:
    encoder, message = Encoder(CHANNEL, FRAME_MAX, fitted), to_message(envelope)
    for _ in range(2):  # the second time from the cache
        assert encoder.encode(message, mandatory=mandatory) == by_pamqp(message, mandatory=mandatory)


@pytest.mark.parametrize(
    "changed",
    [
        {"delivery_mode": 1},
        {"message_id": None},
        {"timestamp": None},
        {"headers": {"a": [1, "b"]}},
        {"correlation_id": "x"},
        {"reply_to": "x"},
        {"expiration": "1000"},
        {"content_encoding": "gzip"},
        {"app_id": "x"},
        {"user_id": "x"},
    ],
)
def test_what_is_not_plain_is_as_pamqp_encodes_it(changed: dict[str, Any]) -> None:
    plain = {
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": new_id(),
        "message_type": "say",
        "timestamp": dt.datetime(2024, 1, 1, tzinfo=dt.UTC),
    }
    message = Message("work", b"x", Properties(**{**plain, **changed}))
    assert Encoder(CHANNEL, FRAME_MAX, fitted).encode(message, mandatory=True) == by_pamqp(message, mandatory=True)


@pytest.mark.parametrize("size", [0, 1, FRAME_MAX - 8, FRAME_MAX - 7, 10 * FRAME_MAX])
def test_no_frame_is_larger_than_agreed(size: int) -> None:
    encoded = Encoder(CHANNEL, FRAME_MAX, fitted).encode(
        to_message(Envelope(new_id(), "work", "say", b"x" * size)), mandatory=True
    )
    total = 0
    while encoded:
        consumed, _, part = frame.unmarshal(encoded)
        assert consumed <= FRAME_MAX
        total += len(part.value) if isinstance(part, body.ContentBody) else 0
        encoded = encoded[consumed:]
    assert total == size


def test_without_a_limit_a_body_is_one_frame() -> None:
    message = to_message(Envelope(new_id(), "work", "say", b"x" * 200_000))
    assert (
        Encoder(CHANNEL, 0, fitted)
        .encode(message, mandatory=True)
        .endswith(frame.marshal(body.ContentBody(message.body), CHANNEL))
    )


@pytest.mark.parametrize("field", ["id", "task", "content_type", "queue"])
def test_what_is_too_long_for_amqp_is_an_error(field: str) -> None:
    envelope: dict[str, Any] = {"id": new_id(), "queue": "work", "task": "say", "body": b"", "enqueued_at": 1.0}
    with pytest.raises((ValueError, TypeError)):  # pamqp has words of its own for one of them
        Encoder(CHANNEL, 0, fitted).encode(to_message(Envelope(**{**envelope, field: "x" * 256})), mandatory=True)
