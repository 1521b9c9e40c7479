"""Envelopes as AMQP messages and back, whatever is in a message."""

from __future__ import annotations

import datetime as dt
import decimal
import math
import struct
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import commands as spec
from pamqp.header import ContentHeader

from leveret.brokers.rabbitmq.amqp import SplicedProperties
from leveret.brokers.rabbitmq.amqp.frame_reader import Incoming
from leveret.brokers.rabbitmq.amqp.sanitize import marshal
from leveret.brokers.rabbitmq.queues import codec
from leveret.brokers.rabbitmq.queues.codec import (
    LEFT_OUT,
    PERMIT,
    STAY,
    RabbitMQDelivery,
    admitted,
    buried,
    dead_letter_id,
    fitted,
    postponed,
    received,
    regated,
    retry_message,
    revived_message,
    stored_anew,
    to_dead_letter,
    to_message,
    to_wait,
    unranked,
    waiting,
    writable,
)
from leveret.model import FAIR_KEY, LIMITS, MAX_STEPS, MAX_TRACEBACK, STEPS, DeadLettered, Envelope, Retrying
from tests.support.foreign import WIRE_VALUES, Raw, number, short, table, time

if TYPE_CHECKING:
    from leveret.brokers.rabbitmq.amqp import Message

Properties = spec.Basic.Properties
#: RabbitMQ's default frame_max, without a frame's own eight bytes.
FRAME = 131_072 - 8
NOW = 1_700_000_000.0
BURIED = DeadLettered("gave up", "Traceback: gave up")


class Lease:
    held = True


LEASE = Lease()
FULL = Properties(
    content_type="text/plain",
    content_encoding="gzip",
    headers={"tenant": "a", "tracing": {"id": 7, "flags": [True, None]}},
    delivery_mode=1,
    priority=4,
    correlation_id="c-1",
    reply_to="answers",
    expiration="60000",
    message_id="m-1",
    timestamp=dt.datetime(2024, 2, 29, 12, tzinfo=dt.UTC),
    message_type="resize",
    app_id="shop",
)
#: What a copy keeps. Not user_id: RabbitMQ refuses a message in another user's name.
KEPT = (
    "content_type",
    "content_encoding",
    "priority",
    "correlation_id",
    "reply_to",
    "message_id",
    "timestamp",
    "message_type",
    "app_id",
)


def delivered(properties: Properties, body: bytes = b"{}", tag: int = 7, *, redelivered: bool = False) -> Incoming:
    """A message as it is read from the socket."""
    return Incoming(b"leveret-1", tag, redelivered, content_header(properties), body)


def content_header(properties: Properties) -> bytes:
    return b"\x00\x3c" + bytes(10) + marshal(properties)


def with_headers(**headers: Any) -> Incoming:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return delivered(Properties(message_id="m-1", message_type="resize", headers=named))


def delivery_of(message: Incoming) -> RabbitMQDelivery:
    return received(message, "work", LEASE)


def retry(delivery: RabbitMQDelivery, delay: float = 0.0) -> Message:
    return retry_message(delivery, Retrying("ValueError: no", "Traceback: no", delay), NOW)


def bury(delivery: RabbitMQDelivery) -> Message:
    return buried(delivery, BURIED, NOW)


def through_the_wire(properties: Properties) -> Properties:
    """The properties as another client reads them."""
    data = content_header(properties)
    assert len(data) <= FRAME
    return decoded(data)


def decoded(data: bytes) -> Properties:
    arrived = ContentHeader()
    arrived.unmarshal(data)
    return arrived.properties


def own(message: Message) -> Properties:
    """The properties of a message that is not a plain task's."""
    assert isinstance(message.properties, Properties)
    return message.properties


def headers_of(message: Message) -> dict[str, Any]:
    """The headers as another client reads them."""
    return dict(decoded(content_header(own(message))).headers or {})


# A task on its way


def test_an_envelope_arrives_as_it_was() -> None:
    envelope = Envelope(
        "0123456789abcdef" * 2,
        "work",
        "resize",
        b'{"args":[1]}',
        attempt=3,
        enqueued_at=1_700_000_000.0,
        last_error="ValueError: é",
        due=1_700_000_060.25,
        expires_at=1_700_000_090.5,
        headers={"tenant": "a"},
    )
    message = to_message(envelope)
    assert (message.queue, message.home, message.id) == ("work", "work", envelope.id)
    assert message.due == envelope.due
    delivery = delivery_of(delivered(through_the_wire(own(message)), message.body))
    assert delivery.envelope == envelope
    assert (delivery.tag, delivery.returns, delivery.lease) == (7, 0, LEASE)


def test_a_fresh_task_is_a_plain_persistent_message() -> None:
    """What a producer in any language would send: no header of ours."""
    message = to_message(Envelope("m-1", "work", "resize", b"{}"))
    assert message.body == b"{}"
    assert dict(own(message)) == {
        **dict(Properties()),
        "content_type": "application/json",
        "delivery_mode": 2,
        "message_id": "m-1",
        "message_type": "resize",
    }


def test_a_foreign_message_is_an_envelope_too() -> None:
    """With nothing but a body: it gets an id, and is for the queue's default task."""
    first, second = (delivery_of(delivered(Properties(), b"\xff")).envelope for _ in range(2))
    assert first == Envelope(first.id, "work", None, b"\xff", content_type=None)
    assert len(first.id) == 32
    assert first.id != second.id


@pytest.mark.parametrize(("properties", "task"), [(Properties(message_type=""), None), (FULL, "resize")])
def test_an_empty_type_names_no_task(properties: Properties, task: str | None) -> None:
    assert delivery_of(delivered(properties)).envelope.task == task


def test_the_queue_is_the_one_it_was_taken_from() -> None:
    assert delivery_of(delivered(FULL)).envelope.queue == "work"


@pytest.mark.parametrize(
    ("headers", "redelivered", "returns"),
    [
        ({}, False, 0),
        ({}, True, 1),
        ({"x_delivery_count": 4}, True, 4),
        ({"x_delivery_count": 0}, True, 0),
        ({"x_delivery_count": "4"}, True, 1),
        ({"x_delivery_count": None}, False, 0),
        ({"x_delivery_count": True}, False, 0),
    ],
)
def test_returns_are_the_brokers_count_or_its_mark(headers: dict[str, Any], redelivered: bool, returns: int) -> None:
    """A classic queue only marks that it had a message back."""
    message = msgspec.structs.replace(with_headers(**headers), redelivered=redelivered)
    assert delivery_of(message).returns == returns


@pytest.mark.parametrize(
    ("value", "attempt"),
    [
        (2, 2),
        (1, 1),
        (0, 1),
        (-5, 1),
        (2**40, 2**40),
        (True, 1),
        ("3", 3),
        (2.0, 2),
        (None, 1),
        ([4], 1),
        ({"a": 4}, 1),
    ],
)
def test_an_attempt_is_a_number_of_at_least_one(value: Any, attempt: int) -> None:
    assert delivery_of(with_headers(leveret_attempt=value)).envelope.attempt == attempt


@pytest.mark.parametrize("value", [1, None, True, b"x", ["x"], {"x": "y"}, dt.datetime.now(dt.UTC)])
def test_an_error_is_a_text(value: Any) -> None:
    assert delivery_of(with_headers(leveret_error=value)).envelope.last_error is None


def test_only_foreign_headers_are_handed_on() -> None:
    delivery = delivery_of(
        with_headers(
            tenant="a",
            leveret_attempt=2,
            leveret_error="no",
            leveret_reason="x",
            leveret_traceback="x",
            leveret_died_at=1,
            leveretish=1,
            x_custom=1,
            x_death=[{"count": 3}],
            x_first_death_queue="q",
            x_last_death_reason="expired",
            x_delivery_count=3,
            x_acquired_count=4,
        )
    )
    assert delivery.envelope.headers == {"tenant": "a", "leveretish": 1, "x-custom": 1}


# Copies


def test_a_retry_is_the_same_message_one_attempt_older() -> None:
    delivery = delivery_of(delivered(FULL, b"body"))
    message = retry(delivery)
    assert (message.queue, message.body, message.id) == ("work", b"body", "m-1")
    for name in (*KEPT, "expiration"):
        assert own(message)[name] == FULL[name], name
    assert own(message).delivery_mode == 2
    assert headers_of(message) == {
        **(FULL.headers or {}),
        "leveret-attempt": 2,
        "leveret-error": "ValueError: no",
    }


def test_attempts_are_counted_over_retries() -> None:
    message = delivered(FULL)
    for attempt in range(1, 5):
        delivery = delivery_of(message)
        assert delivery.envelope.attempt == attempt
        message = delivered(through_the_wire(own(retry(delivery))))
    assert delivery_of(message).envelope.last_error == "ValueError: no"


def test_a_burial_keeps_the_message_and_says_why() -> None:
    """And it does not expire in its grave."""
    message = buried(delivery_of(delivered(FULL, b"body")), BURIED, 1_700_000_000.0)
    assert (message.queue, message.body, message.id) == ("work.dead", b"body", "m-1")
    for name in (*KEPT, "expiration"):
        expected = None if name in ("priority", "expiration") else FULL[name]
        assert own(message)[name] == expected, name
    assert headers_of(message)["leveret-priority"] == FULL.priority  # the oldest is first in its grave
    assert own(message).delivery_mode == 2
    letter = to_dead_letter(delivered(through_the_wire(own(message)), b"body"), "work")
    assert (letter.reason, letter.traceback) == ("gave up", "Traceback: gave up")
    assert letter.envelope == msgspec.structs.replace(
        delivery_of(delivered(FULL, b"body")).envelope, headers=FULL.headers or {}
    )


@pytest.mark.parametrize("died_at", [0.0, 1_700_000_001.0, 1_712_345_678.9, 4_000_000_001.0])
def test_a_dead_letter_knows_when_it_died(died_at: float) -> None:
    """To the second, on the other side of the wire too."""
    message = buried(delivery_of(delivered(FULL)), BURIED, died_at)
    letter = to_dead_letter(delivered(through_the_wire(own(message))), "work")
    assert letter.died_at is not None
    assert abs(letter.died_at - died_at) < 1.0


def test_a_dead_letter_keeps_its_attempt_and_the_error_before() -> None:
    delivery = delivery_of(with_headers(leveret_attempt=3, leveret_error="before"))
    letter = to_dead_letter(delivered(own(bury(delivery))), "work")
    assert (letter.envelope.attempt, letter.envelope.last_error) == (3, "before")


def test_the_brokers_record_of_the_past_is_not_copied() -> None:
    """Up to RabbitMQ 3.13 the broker would believe it, and drop the copy for its many returns."""
    delivery = delivery_of(
        with_headers(
            tenant="a",
            x_death=[{"count": 3}],
            x_first_death_exchange="x",
            x_last_death_queue="x",
            x_delivery_count=19,
            x_acquired_count=20,
        )
    )
    for message in (retry(delivery), bury(delivery)):
        names = set(headers_of(message))
        assert "tenant" in names
        assert {name for name in names if name.startswith("x-")} == set()


@pytest.mark.parametrize(("delay", "due"), [(0.0, None), (60.25, NOW + 60.25), (0.0001, NOW + 0.001)])
def test_a_retry_waits_as_long_as_it_shall(delay: float, due: float | None) -> None:
    """To the millisecond, and never shorter."""
    message = retry(delivery_of(with_headers(leveret_due=5_000)), delay)
    assert message.due == (None if due is None else NOW + delay)
    assert delivery_of(delivered(through_the_wire(own(message)))).envelope.due == due


def test_a_postponed_task_is_the_same_message() -> None:
    delivery = delivery_of(with_headers(tenant="a", leveret_due=1_700_000_060_250, leveret_attempt=2, x_death=[]))
    message = postponed(delivery)
    assert (message.queue, message.home, message.due) == ("work", "work", NOW + 60.25)
    assert headers_of(message) == {"tenant": "a", "leveret-due": 1_700_000_060_250, "leveret-attempt": 2}


def test_a_revived_task_is_as_it_first_came() -> None:
    """A first attempt, at once, that does not expire; enqueued now, to the millisecond."""
    delivery = delivery_of(
        with_headers(tenant="a", leveret_attempt=5, leveret_error="no", leveret_due=1, leveret_expires_at=2)
    )
    grave = delivered(through_the_wire(own(bury(delivery))), b"body")
    message = revived_message(grave, "work", NOW + 0.25)
    assert (message.queue, message.home, message.due, message.body) == ("work", "work", None, b"body")
    assert message.id == delivery.envelope.id
    again = delivery_of(delivered(own(message), b"body")).envelope
    assert again == Envelope(
        again.id, "work", "resize", b"body", content_type=None, enqueued_at=NOW + 0.25, headers={"tenant": "a"}
    )
    assert headers_of(message) == {"tenant": "a", "leveret-revived-at": 1_700_000_000_250}
    assert own(message).timestamp == dt.datetime.fromtimestamp(NOW + 0.25, dt.UTC)
    died_again = delivered(through_the_wire(own(bury(delivery_of(delivered(own(message), b""))))), b"")
    assert headers_of(revived_message(died_again, "work", NOW + 9)) == {
        "tenant": "a",
        "leveret-revived-at": 1_700_000_009_000,
    }


@pytest.mark.parametrize("priority", [None, 0, 7, 255])
def test_a_priority_survives_every_copy(priority: int | None) -> None:
    """As the property where the task waits to run, in a header where it would change another order."""
    envelope = Envelope("m-1", "work", "resize", b"{}", priority=priority, headers={"tenant": "a"})
    message = to_message(envelope)
    assert own(message).priority == priority
    header = {} if priority is None else {"leveret-priority": priority}
    for hide in (unranked, lambda message: bury(delivery_of(delivered(own(message))))):
        hidden = hide(message)
        assert own(hidden).priority is None
        assert headers_of(hidden).items() >= {"tenant": "a", **header}.items()
        delivery = delivery_of(delivered(through_the_wire(own(hidden))))
        assert (delivery.envelope.priority, delivery.envelope.headers) == (priority, {"tenant": "a"})
        for copy in (retry(delivery), postponed(delivery)):
            assert own(copy).priority == priority
            assert "leveret-priority" not in headers_of(copy)
    assert own(message).priority == priority


@pytest.mark.parametrize("value", [-1, 256, True, "high", 7.5, None, [7]])
def test_a_priority_in_a_header_is_an_octet(value: Any) -> None:
    delivery = delivery_of(with_headers(leveret_priority=value))
    assert delivery.envelope.priority is None
    through_the_wire(own(retry(delivery)))


def test_a_message_without_an_id_keeps_the_one_it_was_given() -> None:
    delivery = delivery_of(delivered(Properties()))
    assert retry(delivery).id == delivery.envelope.id
    assert bury(delivery).id == delivery.envelope.id


def test_the_original_is_left_alone() -> None:
    properties = Properties(headers={"tenant": "a", "x-death": []}, expiration="1")
    delivery = delivery_of(delivered(properties))
    retry(delivery)
    bury(delivery)
    assert properties.headers == {"tenant": "a", "x-death": []}
    assert properties.expiration == "1"


@pytest.mark.parametrize("character", ["x", "é", "\U0001f407"])
def test_long_texts_fit_a_frame(character: str) -> None:
    """All of a message's headers are in one frame."""
    long = character * 100_000
    delivery = delivery_of(with_headers(leveret_error=character * 1_000))
    again = through_the_wire(own(retry_message(delivery, Retrying(long, long), NOW)))
    dead = through_the_wire(own(buried(delivery, DeadLettered(long, long), NOW)))
    assert len(str((again.headers or {})["leveret-error"])) < 1_100
    letter = to_dead_letter(delivered(dead), "work")
    assert len(letter.reason) < 4_100
    assert len(letter.traceback) < MAX_TRACEBACK + 100


# Hostile headers


def test_a_dead_letter_that_somebody_else_wrote_is_shown() -> None:
    """A message that was moved to the dead-letter queue by hand."""
    letter = to_dead_letter(delivered(Properties(), b"\xff"), "work")
    assert letter.reason == "(its reason is not recorded)"
    assert (letter.traceback, letter.died_at) == ("", None)
    assert letter.envelope.body == b"\xff"


@pytest.mark.parametrize(
    "value",
    [None, "yesterday", True, [], {}, b"x", math.nan, math.inf, 2**63 - 1, -(2**63)],
)
def test_a_time_of_death_is_a_time(value: Any) -> None:
    """One that a calendar has: whoever shows it need not fear for it."""
    assert to_dead_letter(with_headers(leveret_died_at=value), "work").died_at is None


#: What pamqp makes of a header of any AMQP type, in any field of a message.
scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(width=64)
    | st.text(max_size=50)
    | st.binary(max_size=20)
    | st.binary(max_size=20).map(bytearray)
    | st.datetimes(dt.datetime(1970, 1, 1), dt.datetime(2106, 1, 1), timezones=st.just(dt.UTC))  # noqa: DTZ001
    | st.decimals(-1_000, 1_000, places=3)
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=20), inner, max_size=3),
    max_leaves=8,
)
names = st.text(max_size=20) | st.sampled_from(
    [
        "leveret-attempt",
        "leveret-error",
        "leveret-reason",
        "leveret-traceback",
        "leveret-died-at",
        "leveret-worker",
        "leveret-due",
        "leveret-expires-at",
        "leveret-priority",
        "x-death",
        "x-delivery-count",
        "x-acquired-count",
    ]
)
headers = st.none() | st.dictionaries(names, values, max_size=6)
texts = st.none() | st.text(max_size=60)


@settings(deadline=None)
@given(headers, texts, texts, st.binary(max_size=20), st.booleans())
@example({"leveret-attempt": 2**63 - 1}, None, None, b"", False)  # noqa: FBT003 - an example
def test_no_message_raises(
    headers: dict[str, Any] | None, id_: str | None, task: str | None, body: bytes, redelivered: bool
) -> None:
    properties = Properties(headers=headers, message_id=id_, message_type=task, content_type=task)
    message = delivered(properties, body, redelivered=redelivered)
    delivery = delivery_of(message)
    assert delivery.envelope.attempt >= 1
    assert delivery.envelope.id
    assert revived_message(message, "work", NOW).body == body
    for copy in (retry(delivery), bury(delivery), postponed(delivery)):
        assert copy.body == body
        assert copy.id == delivery.envelope.id
    letter = to_dead_letter(message, "work")
    assert isinstance(letter.reason, str)
    assert letter.died_at is None or isinstance(letter.died_at, float)


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(b"\xff", id="a long string that is no UTF-8"),
        pytest.param([{"a": b"\xff"}], id="nested, too"),
        pytest.param(1e300, id="a double beyond a float"),
        pytest.param(decimal.Decimal("1.5"), id="a decimal"),
        pytest.param(bytearray(b"\xff"), id="bytes"),
        pytest.param(2**63 - 1, id="a large integer"),
        pytest.param(None, id="nothing"),
    ],
)
def test_a_copy_can_be_sent_whatever_header_came(value: Any) -> None:
    """A task whose outcome cannot be stored would stay with its worker for ever."""
    delivery = delivery_of(with_headers(tenant=value))
    for message in (retry(delivery), bury(delivery), postponed(delivery)):
        through_the_wire(own(message))


@pytest.mark.parametrize("value", WIRE_VALUES.values(), ids=WIRE_VALUES)
@pytest.mark.parametrize("neighbour", [None, time(2**63)], ids=["readable", "beside what cannot be read"])
def test_a_copy_keeps_the_type_of_each_header(value: bytes, neighbour: bytes | None) -> None:
    """Other clients tell 64 bits from 8, and Java, Go and Ruby cannot decode the types that pamqp picks."""
    headers = {b"tenant": value} if neighbour is None else {b"tenant": value, b"at": neighbour}
    message = Incoming(b"", 7, False, b"\x00\x3c" + bytes(10) + Raw(headers=table(headers)).encoded, b"")  # noqa: FBT003
    delivery = delivery_of(message)
    for copy in (retry(delivery), bury(delivery), postponed(delivery), revived_message(message, "work", NOW)):
        sent = content_header(own(copy))
        assert short(b"tenant") + value in sent
        again = Incoming(b"", 7, False, content_header(own(bury(delivery_of(delivered(own(copy)))))), b"")  # noqa: FBT003
        assert short(b"tenant") + value in content_header(own(revived_message(again, "work", NOW)))


@pytest.mark.parametrize("value", [1, 200, 40_000, 2**31 - 1, -(2**31)])
def test_an_integer_of_ours_is_of_a_type_that_every_client_decodes(value: int) -> None:
    message = to_message(Envelope("id", "work", "resize", b"{}", headers={"n": value, "many": [value]}))
    four = b"I" + struct.pack(">i", value)
    assert marshal(own(message)).count(four) == 2
    large = to_message(Envelope("id", "work", "resize", b"{}", headers={"n": 3_000_000_000}))
    assert number(3_000_000_000) in marshal(own(large))


def test_many_small_headers_are_left_out_without_encoding_all_of_them_each_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Twenty thousand fit a frame: a worker's loop would stand still for seconds."""
    headers = table({b"%05d" % number: b"V" for number in range(18_715)})
    delivery = delivery_of(Incoming(b"", 7, False, b"\x00\x3c" + bytes(10) + Raw(headers=headers).encoded, b""))  # noqa: FBT003
    encoded = 0

    def counted(properties: Properties) -> bytes:
        nonlocal encoded
        encoded += 1
        return marshal(properties)

    monkeypatch.setattr("leveret.brokers.rabbitmq.queues.codec.marshal", counted)
    message = fitted(bury(delivery), 131_072)
    assert 131_000 < len(marshal(own(message))) <= 131_072 - 8
    assert encoded < 10


@pytest.mark.parametrize("value", [2**63, -(2**63) - 1])
def test_an_integer_beyond_64_bits_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        marshal(Properties(headers={"n": value}))


MOMENT = 1_700_000_060.25


@pytest.mark.parametrize("name", ["leveret-due", "leveret-expires-at"])
@pytest.mark.parametrize(
    "value",
    [
        1_700_000_060_250,
        "1700000060250",
        " 1700000060250 ",
        "1700000060250.0",
        1_700_000_060_250.0,
        decimal.Decimal(1700000060250),
        dt.datetime.fromtimestamp(MOMENT, dt.UTC),
    ],
    ids=repr,
)
def test_a_moment_may_come_in_other_types(name: str, value: Any) -> None:
    """An AMQP timestamp is a moment by itself: of whole seconds, or of milliseconds where it is that large."""
    if isinstance(value, decimal.Decimal):
        message = msgspec.structs.replace(with_headers(), header=content_header(Properties()))
        raw = Raw(headers=table({name.encode(): b"D\x00" + struct.pack(">i", 1_700_000_060)}))
        message = msgspec.structs.replace(message, header=b"\x00\x3c" + bytes(10) + raw.encoded)
        assert "in seconds by its size" in delivery_of(message).defect
        return
    envelope = delivery_of(with_headers(**{name: value})).envelope
    found = envelope.due if name == "leveret-due" else envelope.expires_at
    assert found is not None
    assert math.isclose(found, MOMENT, abs_tol=0.5 if isinstance(value, dt.datetime) else 0)


@pytest.mark.parametrize("name", ["leveret-due", "leveret-expires-at", "leveret-revived-at"])
@pytest.mark.parametrize(
    "value",
    [
        "tomorrow",
        "",
        "2026-01-31T12:00:00Z",
        "0x10",
        True,
        [1],
        {"at": 1},
        b"\xff",
        -1,
        2**62,
        1_700_000_060,
        "1700000060",
    ],
    ids=repr,
)
def test_a_moment_that_is_none_is_told(name: str, value: Any) -> None:
    """It counted as missing before: a task of tomorrow ran at once, and one that should expire never did."""
    delivery = delivery_of(with_headers(**{name: value}))
    assert f"its header {name} is " in delivery.defect
    assert (delivery.envelope.due, delivery.envelope.expires_at) == (None, None)


@pytest.mark.parametrize("name", ["leveret-attempt", "leveret-priority"])
def test_a_number_may_come_as_text(name: str) -> None:
    envelope = delivery_of(with_headers(**{name: "3"})).envelope
    assert (envelope.attempt if name == "leveret-attempt" else envelope.priority) == 3
    for value in ("three", True, [3], 1.5):
        assert f"its header {name} is " in delivery_of(with_headers(**{name: value})).defect


def test_a_header_is_copied_as_it_was() -> None:
    delivery = delivery_of(with_headers(nothing=None))
    assert headers_of(retry(delivery)).get("nothing", "gone") is None
    value = {"f": 0.5, "n": 2**40, "t": "é", "l": [1, None, True], "x": bytearray(b"\xff"), "d": 0.1}
    delivery = delivery_of(with_headers(tenant=value))
    arrived = through_the_wire(own(retry(delivery)))
    assert (arrived.headers or {})["tenant"] == value


@pytest.mark.parametrize("attempt", [2**31, 2**63 - 2, 2**63 - 1])
def test_an_attempt_too_many_can_be_sent(attempt: int) -> None:
    delivery = delivery_of(with_headers(leveret_attempt=attempt))
    through_the_wire(own(retry(delivery)))
    through_the_wire(own(bury(delivery)))


def test_a_copy_is_not_routed_again() -> None:
    """RabbitMQ delivers what has a header CC to the queues in it, too: that was done with the first copy."""
    delivery = delivery_of(with_headers(CC=["work"], BCC=["work"], tenant="a"))
    for message in (retry(delivery), bury(delivery), postponed(delivery)):
        assert not {"CC", "BCC"} & headers_of(message).keys()
        assert headers_of(message)["tenant"] == "a"


def test_a_dead_letter_without_an_id_is_known_by_its_content() -> None:
    """Each look returns it, which the broker counts in a header."""
    headers: dict[str, Any] = {"tenant": "a", "x-delivery-count": 1}
    letter = delivered(Properties(headers=headers, message_type="resize"), b"one")
    looked_at = delivered(Properties(headers=headers | {"x-delivery-count": 2}, message_type="resize"), b"one")
    assert dead_letter_id(letter) == dead_letter_id(looked_at)
    assert to_dead_letter(letter, "work").envelope.id == dead_letter_id(letter)
    others = [
        delivered(Properties(headers=headers, message_type="resize"), b"two"),
        delivered(Properties(headers=headers, message_type="other"), b"one"),
        delivered(Properties(headers={"tenant": "b"}, message_type="resize"), b"one"),
        delivered(Properties(headers=headers, message_type="resize", message_id="m-1"), b"one"),
    ]
    assert len({dead_letter_id(one) for one in (letter, *others)}) == 5
    assert dead_letter_id(others[3]) == "m-1"


def test_two_messages_of_the_same_content_are_two_tasks() -> None:
    """An id that both had would let one pass for the other's second delivery."""
    message = delivered(Properties(message_type="resize"), b"one")
    ids = {delivery_of(message).envelope.id, delivery_of(message).envelope.id, revived_message(message, "work", NOW).id}
    assert len(ids) == 3
    assert dead_letter_id(message) not in ids


@pytest.mark.parametrize("frame_max", [4_096, 8_192, 131_072])
@pytest.mark.parametrize("size", [100, 3_900, 8_000, 60_000, 100_000, 130_900])
def test_a_copy_fits_its_frame(frame_max: int, size: int) -> None:
    """A larger one would end the connection, and be sent again on the next one, for ever."""
    headers: dict[str, Any] = {"large": "x" * size, "small": "y", "leveret-error": ["hostile" * (size // 8)]}
    delivery = delivery_of(with_headers(**headers))
    for message in (retry(delivery), buried(delivery, DeadLettered("é" * 9_999, "é" * 99_999), NOW)):
        before: dict[str, Any] = headers_of(message)
        fit = fitted(message, frame_max)
        assert len(content_header(own(fit))) <= frame_max
        kept: dict[str, Any] = headers_of(fit)
        gone = before.keys() - kept.keys()
        assert kept["small"] == "y"
        assert kept["leveret-attempt"] == before["leveret-attempt"]
        assert kept.get("leveret-reason", "")[:50] == before.get("leveret-reason", "")[:50]
        assert all(name in kept[LEFT_OUT] for name in gone)
        assert headers_of(message) == before
        assert gone or LEFT_OUT not in kept


def test_the_steps_that_follow_are_left_out_last() -> None:
    """The largest slip stays in a dead letter beside the largest headers; what lost it does not run."""
    steps = "[" + " " * (MAX_STEPS - 2) + "]"
    headers: dict[str, Any] = {STEPS: steps, "large": "é" * 16_000, "leveret-error": "x" * 999}
    delivery = delivery_of(with_headers(**headers))
    kept: dict[str, Any] = headers_of(fitted(buried(delivery, DeadLettered("é" * 9_999, "é" * 99_999), NOW), 131_072))
    assert kept.keys() >= headers.keys()
    assert kept[STEPS] == headers[STEPS]
    small = fitted(retry(delivery), 8_192)
    kept = headers_of(small)
    assert STEPS not in kept
    assert kept[LEFT_OUT].startswith(f"{STEPS}, ")
    lost = delivery_of(with_headers(**kept))
    assert "did not fit" in lost.defect


def test_a_message_that_fits_is_left_alone() -> None:
    message = to_message(Envelope("id", "work", "resize", b"{}", headers={"tenant": "a"}))
    assert fitted(message, 131_072) is message
    assert fitted(message, 0) is message


def test_an_unreadable_message_is_one_once() -> None:
    """Its dead letter can be read. Put back, it is a task as any other."""
    message = with_headers(**{"leveret-unreadable": "its type", "leveret-due": 32_000_000_000_000})
    delivery = delivery_of(message)
    assert (delivery.defect, delivery.envelope.due) == ("its type", None)
    for copy in (bury(delivery), revived_message(message, "work", NOW)):
        assert "leveret-unreadable" not in headers_of(copy)
    assert to_dead_letter(message, "work").reason == "its type"


def test_an_unreadable_dead_letter_that_is_stored_anew_says_so_still() -> None:
    header = b"\x00\x3c" + bytes(10) + Raw(type=b"say", timestamp=2**60, headers=table({b"tenant": number(7)})).encoded
    letter = Incoming(b"", 7, False, header, b"{}")  # noqa: FBT003
    again = stored_anew(letter, "work.dead")
    found = Incoming(b"", 8, False, content_header(own(again)), b"{}")  # noqa: FBT003
    reason = to_dead_letter(letter, "work").reason
    assert "is no time" in reason
    assert to_dead_letter(found, "work").reason == reason
    assert dead_letter_id(found) == dead_letter_id(letter)
    assert "leveret-unreadable" not in headers_of(revived_message(found, "work", NOW))


# A task that waits for limits

LIMITED = {LIMITS: '[["few","a"]]', FAIR_KEY: "acme"}


def test_each_stay_of_a_task_that_waits_is_marked() -> None:
    message = to_message(Envelope("m-1", "work", "resize", b"{}", headers=LIMITED, enqueued_at=NOW))
    stays = [(as_sent(to_wait(message)).headers or {})[STAY] for _ in range(2)]
    assert stays[0] != stays[1]
    assert to_wait(message).queue == "work.gate"
    assert STAY not in headers_of(message)


def test_a_plain_task_of_a_queue_with_a_limit_waits_as_it_is() -> None:
    message = to_message(Envelope("m-1", "work", "resize", b"{}", enqueued_at=NOW, priority=3))
    found = waiting(delivered(as_sent(to_wait(message))))
    assert (found.id, found.refs, found.fair, found.rank) == ("m-1", (), None, 3)


def as_sent(message: Message) -> Properties:
    """The properties of a message as another client reads them."""
    if isinstance(message.properties, SplicedProperties):
        return message.properties.decoded()
    return through_the_wire(own(message))


@pytest.mark.parametrize(
    ("envelope", "is_spliced"),
    [
        (Envelope("m-1", "work", "resize", b"{}", headers=LIMITED, enqueued_at=NOW), True),
        (Envelope("m-1", "work", "ä" * 100, b"{}", headers={**LIMITED, "ü": "é"}, enqueued_at=NOW, priority=0), True),
        (Envelope("m-1", "work", "resize", b"{}", content_type="", enqueued_at=NOW, priority=9), True),
        (Envelope("m-1", "work", "resize", b"{}", headers={**LIMITED, "count": 7}, enqueued_at=NOW), False),
        (Envelope("m-1", "work", "resize", b"{}", headers={"tenant": "a" * 3_000}, enqueued_at=NOW), False),
        (Envelope("m-1", "work", "resize", b"{}", headers=LIMITED), False),
    ],
)
def test_a_task_that_waits_is_the_same_message_whether_pamqp_encodes_it_or_not(
    envelope: Envelope, is_spliced: bool
) -> None:
    waits = to_wait(to_message(envelope))
    assert isinstance(waits.properties, SplicedProperties) == is_spliced
    found = as_sent(waits)
    wanted = through_the_wire(writable(to_message(envelope).properties))
    assert (found.headers or {}).pop(STAY)
    assert found.headers == (wanted.headers or {})
    names = [name for name in Properties.flags if name != "headers"]
    assert {name: getattr(found, name) for name in names} == {name: getattr(wanted, name) for name in names}


@pytest.mark.parametrize("stay", ["s", "0123456789abcdef"])
@pytest.mark.parametrize("more", [{}, {"x-delivery-count": 1}, {"leveret-row": "old"}], ids=str)
def test_what_waits_is_admitted_with_a_permit_that_no_copy_keeps(stay: str, more: dict[str, Any]) -> None:
    """Whether it is copied as bytes or not."""
    headers = {**LIMITED, **more, STAY: stay}
    properties = Properties(**{name: getattr(FULL, name) for name in KEPT}, headers=headers, delivery_mode=2)
    properties.content_encoding = FULL.content_encoding if more else None
    message = delivered(properties, b"body")
    found = waiting(message)
    assert (found.id, found.stay, found.refs, found.fair, found.rank) == ("m-1", stay, (("few", "a"),), "acme", 4)
    copy = admitted(message, "work", found, "7.12")
    assert (copy.queue, copy.body) == ("work", b"body")
    is_spliced = isinstance(copy.properties, SplicedProperties)
    assert is_spliced == (len(stay) == 16 and not more)
    sent = copy.properties.decoded() if isinstance(copy.properties, SplicedProperties) else through_the_wire(own(copy))
    assert sent.headers == {**LIMITED, PERMIT: "7.12"}
    assert {name: getattr(sent, name) for name in KEPT} == {name: getattr(properties, name) for name in KEPT}
    delivery = delivery_of(delivered(sent, b"body"))
    assert (delivery.permit, delivery.envelope.headers) == ("7.12", LIMITED)
    for other in (retry(delivery), bury(delivery), postponed(delivery), regated(delivery)):
        assert PERMIT not in headers_of(other)


def test_what_names_no_limits_waits_for_none() -> None:
    found = waiting(with_headers(leveret_limits="no JSON", leveret_fair=7, leveret_stay=[1]))
    assert (found.stay, found.refs, found.fair) == ("", (), None)


@pytest.mark.parametrize("names", [(), *[(name,) for name in KEPT], KEPT], ids=str)
@pytest.mark.parametrize("headers", [LIMITED, {**LIMITED, PERMIT: "7.1"}, {"tenant": "é", "x": ""}, {"n": 1}], ids=str)
def test_a_task_with_text_headers_is_read_as_others_are(names: tuple[str, ...], headers: dict[str, Any]) -> None:
    given = {"message_id": "m-1", "delivery_mode": 2, **{name: getattr(FULL, name) for name in names}}
    message = delivered(Properties(headers=headers, **given), redelivered=True)
    one, other = received(message, "work", LEASE), codec._delivery(message, "work", LEASE)
    assert msgspec.structs.asdict(one) == msgspec.structs.asdict(other)
