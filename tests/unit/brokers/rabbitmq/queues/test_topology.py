"""What is declared on RabbitMQ, what its refusals say, and which existing queues are good enough."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from leveret.brokers.rabbitmq.amqp.hosts import hosts
from leveret.brokers.rabbitmq.queues.topology import (
    DELAY_STEPS,
    Declaration,
    Difference,
    closer,
    dead_declaration,
    dead_queue,
    delay_declaration,
    delay_queue,
    expires_in_order,
    judge,
    judge_dead,
    judge_priorities,
    read_difference,
    scratch_queue,
    task_declaration,
)
from leveret.errors import ConfigurationError, QueueMismatch
from leveret.model import MAX_QUEUE_NAME, Queue

QUORUM = {"x-queue-type": "quorum"}
LIMITED = {**QUORUM, "x-max-length": 5, "x-overflow": "reject-publish"}


def quorum(**arguments: Any) -> Declaration:
    return Declaration("q", arguments={**QUORUM, **{f"x-{k.replace('_', '-')}": v for k, v in arguments.items()}})


# What is declared


def test_a_task_queue_is_the_tutorials() -> None:
    """Durable and quorum and nothing else, so that producers in other languages may declare it too."""
    assert task_declaration(Queue("q")) == Declaration("q", durable=True, auto_delete=False, arguments=QUORUM)


def test_a_length_limit_rejects_and_drops_nothing() -> None:
    assert task_declaration(Queue("q", max_length=5)) == Declaration("q", arguments=LIMITED)
    assert task_declaration(Queue("q", priorities=True)) == task_declaration(Queue("q"))


def test_a_classic_queue_has_priorities() -> None:
    arguments = {"x-queue-type": "classic", "x-max-priority": 9}
    assert task_declaration(Queue("q", kind="classic")) == Declaration("q", arguments=arguments)
    limited = {**arguments, "x-max-length": 5, "x-overflow": "reject-publish"}
    assert task_declaration(Queue("q", kind="classic", max_length=5)) == Declaration("q", arguments=limited)


def test_a_dead_letter_queue_may_be_looked_at_for_ever() -> None:
    declaration = dead_declaration("q")
    assert declaration.name == "q.dead"
    assert declaration.durable
    assert declaration.arguments == {**QUORUM, "x-delivery-limit": 2**31 - 1}


def test_a_delay_queue_returns_what_it_kept_and_drops_nothing() -> None:
    """RabbitMQ dead-letters at least once only with this overflow."""
    declaration = delay_declaration("q", 1_000)
    assert declaration.name == "q.delay.1000"
    assert declaration.durable
    assert declaration.arguments == {
        **QUORUM,
        "x-message-ttl": 1_000,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "q",
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }


def test_the_longest_name_has_room_for_every_ending() -> None:
    name = "x" * MAX_QUEUE_NAME
    assert max(len(dead_queue(name)), *(len(delay_queue(name, step)) for step in DELAY_STEPS)) <= 255
    assert len(scratch_queue(name, 10**9 - 1).name) <= 255


# What a refusal says


@pytest.mark.parametrize(
    ("text", "difference"),
    [
        (
            "inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': "
            "received none but current is the value 'quorum' of type 'longstr'",
            Difference("x-queue-type", "quorum"),
        ),
        (
            "inequivalent arg 'x-queue-type' for queue 'q' in vhost '/': "
            "received the value 'quorum' of type 'longstr' but current is none",
            Difference("x-queue-type", None),
        ),
        (
            "inequivalent arg 'durable' for queue 't' in vhost '/': received 'true' but current is 'false'",
            Difference("durable", False),  # noqa: FBT003 - the property's value
        ),
        (
            "inequivalent arg 'auto_delete' for queue 't' in vhost '/': received 'false' but current is 'true'",
            Difference("auto_delete", True),  # noqa: FBT003 - the property's value
        ),
        (
            "inequivalent arg 'x-max-length' for queue 't' in vhost '/': received '6' but current is '5'",
            Difference("x-max-length", 5),
        ),
        (
            "inequivalent arg 'x-max-length' for queue 't' in vhost '/': "
            "received none but current is the value '5' of type 'byte'",
            Difference("x-max-length", 5),
        ),
        (
            "inequivalent arg 'x-message-ttl' for queue 't' in vhost '/': "
            "received none but current is the value '60000' of type 'signedint'",
            Difference("x-message-ttl", 60000),
        ),
        (
            "inequivalent arg 'x-delivery-limit' for queue 't' in vhost '/': received '-1' but current is '-2'",
            Difference("x-delivery-limit", -2),
        ),
        (
            "inequivalent arg 'x-single-active-consumer' for queue 't' in vhost '/': "
            "received none but current is the value 'true' of type 'bool'",
            Difference("x-single-active-consumer", True),  # noqa: FBT003 - the property's value
        ),
        (
            "inequivalent arg 'x-overflow' for queue 't' in vhost '/': "
            "received 'drop-head' but current is 'reject-publish'",
            Difference("x-overflow", "reject-publish"),
        ),
        (
            "inequivalent arg 'x-dead-letter-routing-key' for queue 't' in vhost '/': "
            "received none but current is the value 'it's of type 'x'' of type 'longstr'",
            Difference("x-dead-letter-routing-key", "it's of type 'x'"),
        ),
        (
            "inequivalent arg 'x-max-priority' for queue 'it's \"mine\"\n' in vhost 'a'b': "
            "received none but current is the value '9' of type 'long'",
            Difference("x-max-priority", 9),
        ),
    ],
)
def test_a_refusal_tells_what_the_queue_has(text: str, difference: Difference) -> None:
    found = read_difference(f"PRECONDITION_FAILED - {text}")
    assert found == difference
    assert found is not None
    assert type(found.current) is type(difference.current)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "PRECONDITION_FAILED",
        "PRECONDITION_FAILED - queue 'q' in vhost '/' in use",
        "PRECONDITION_FAILED - invalid arg 'x-max-length' for queue 'q' in vhost '/': {value_negative,-1}",
        "RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q' in vhost '/'",
    ],
)
def test_other_refusals_tell_no_difference(text: str) -> None:
    assert read_difference(text) is None


# Coming closer to what is there


def test_closer_changes_what_was_told() -> None:
    guess = Declaration("q", arguments=LIMITED)
    assert closer(guess, Difference("x-max-length", 7)).arguments == {**LIMITED, "x-max-length": 7}
    assert closer(guess, Difference("x-queue-type", None)).arguments == {
        "x-max-length": 5,
        "x-overflow": LIMITED["x-overflow"],
    }
    assert closer(guess, Difference("x-expires", 9)).arguments == {**LIMITED, "x-expires": 9}
    assert not closer(guess, Difference("durable", False)).durable  # noqa: FBT003 - the property's value
    assert closer(guess, Difference("auto_delete", True)).auto_delete  # noqa: FBT003 - the property's value
    assert guess == Declaration("q", arguments=LIMITED)


def refusal(guess: Declaration, actual: Declaration) -> str | None:
    """RabbitMQ's answer to a declaration: the first difference, as it writes it."""
    for name in sorted(guess.arguments.keys() | actual.arguments.keys()):
        received, current = guess.arguments.get(name), actual.arguments.get(name)
        if received == current and type(received) is type(current):
            continue
        if received is not None and current is not None:
            values = f"received {_plain(received)} but current is {_plain(current)}"
        else:
            values = f"received {_typed(received)} but current is {_typed(current)}"
        return f"PRECONDITION_FAILED - inequivalent arg '{name}' for queue 'q' in vhost '/': {values}"
    return None


def _plain(value: Any) -> str:
    return f"'{str(value).lower() if isinstance(value, bool) else value}'"


def _typed(value: Any) -> str:
    if value is None:
        return "none"
    kind = {bool: "bool", int: "signedint", str: "longstr"}[type(value)]
    return f"the value {_plain(value)} of type '{kind}'"


texts = st.sampled_from(["quorum", "classic", "reject-publish", "drop-head", "a 'b' c", "lazy"])
arguments = st.dictionaries(
    st.sampled_from(["x-queue-type", "x-max-length", "x-overflow", "x-message-ttl", "x-expires", "x-lazy"]),
    texts | st.integers(0, 2**40) | st.booleans(),
)


@settings(deadline=None)
@given(arguments, st.none() | st.integers(1, 10))
def test_asking_again_and_again_finds_any_queue_out(found: dict[str, Any], max_length: int | None) -> None:
    """One question for each argument that differs."""
    actual, guess = Declaration("q", arguments=found), task_declaration(Queue("q", max_length=max_length))
    for _ in range(9):
        text = refusal(guess, actual)
        if text is None:
            break
        difference = read_difference(text)
        assert difference is not None
        guess = closer(guess, difference)
    assert guess == actual


# Which queue is good enough


@pytest.mark.parametrize(
    ("found", "queue", "remedy"),
    [
        (Declaration("q", durable=False), Queue("q"), "would not survive a restart"),
        (Declaration("q", durable=False, arguments=QUORUM), Queue("q"), "would not survive a restart"),
        (Declaration("q", auto_delete=True), Queue("q"), "deleted with its tasks when the last consumer leaves"),
        (Declaration("q", arguments={"x-queue-type": "stream"}), Queue("q"), "a stream is no work queue"),
        (quorum(), Queue("q", max_length=5), "cannot change a queue's length limit"),
        (quorum(max_length=5), Queue("q", max_length=5), "cannot change a queue's length limit"),
        (quorum(max_length=5, overflow="drop-head"), Queue("q", max_length=5), "cannot change a queue's length limit"),
        (quorum(max_length=6, overflow="reject-publish"), Queue("q", max_length=5), "cannot change"),
        (quorum(max_length_bytes=5, overflow="reject-publish"), Queue("q", max_length=5), "cannot change"),
    ],
)
def test_a_queue_that_cannot_do_what_is_wanted_is_refused(found: Declaration, queue: Queue, remedy: str) -> None:
    with pytest.raises(QueueMismatch) as caught:
        judge(queue, found)
    error = caught.value
    assert error.queue == "q"
    assert error.found == {"durable": found.durable, "auto_delete": found.auto_delete, **found.arguments}
    assert error.wanted == task_declaration(queue).described()
    assert remedy in str(error)
    assert f"durable={found.durable}" in str(error)


@pytest.mark.parametrize(
    ("found", "queue"),
    [
        (quorum(), Queue("q")),
        (quorum(max_length=5, overflow="reject-publish"), Queue("q", max_length=5)),
        (quorum(max_length=5, overflow="reject-publish"), Queue("q")),
        (quorum(max_length_bytes=5, overflow="reject-publish"), Queue("q")),
        (quorum(max_length=5, overflow="reject-publish-dlx"), Queue("q")),
        (quorum(dead_letter_exchange="dlx", max_priority=5), Queue("q")),
        (quorum(delivery_limit=-1), Queue("q")),
        (Declaration("q", arguments={"x-queue-type": "classic", "x-max-priority": 9}), Queue("q", kind="classic")),
        (Declaration("q"), Queue("q", kind="classic")),
    ],
)
def test_a_queue_that_loses_nothing_is_adopted_in_silence(found: Declaration, queue: Queue) -> None:
    assert judge(queue, found) == []


@pytest.mark.parametrize(
    ("found", "lacks"),
    [
        (Declaration("q"), ["it is a classic queue"]),
        (Declaration("q", arguments={"x-queue-type": "classic"}), ["it is a classic queue"]),
        (quorum(message_ttl=1_000), ["x-message-ttl=1000 lets RabbitMQ drop tasks"]),
        (quorum(delivery_limit=20), ["x-delivery-limit=20 lets RabbitMQ drop tasks"]),
        (quorum(expires=1_000), ["x-expires=1000 lets RabbitMQ drop tasks"]),
        (quorum(max_length=5), ["x-max-length=5 lets RabbitMQ drop tasks"]),
        (quorum(max_length_bytes=5, overflow="drop-head"), ["x-max-length-bytes=5 lets RabbitMQ drop tasks"]),
        (quorum(message_ttl=1, overflow="reject-publish"), ["x-message-ttl=1 lets"]),
        (Declaration("q", arguments={"x-max-length": 5, "x-expires": 6}), ["classic", "x-expires=6", "x-max-length=5"]),
    ],
)
def test_a_queue_that_may_lose_tasks_is_adopted_with_a_warning(found: Declaration, lacks: list[str]) -> None:
    told = judge(Queue("q"), found)
    assert len(told) == len(lacks)
    assert all(expected in line for expected, line in zip(lacks, told, strict=True))


def test_a_quorum_queue_in_the_place_of_a_classic_one_is_adopted_with_a_warning() -> None:
    (told,) = judge(Queue("q", kind="classic"), quorum())
    assert told == "it is a quorum queue, and a classic one was asked for"


# Hosts


@pytest.mark.parametrize(
    ("url", "urls"),
    [
        ("amqp://host", ["amqp://host"]),
        ("amqps://user:password@host:5671/vhost", ["amqps://user:password@host:5671/vhost"]),
        (
            "amqp://u:p@one,two:5673,three/v?heartbeat=20",
            ["amqp://u:p@one/v?heartbeat=20", "amqp://u:p@two:5673/v?heartbeat=20", "amqp://u:p@three/v?heartbeat=20"],
        ),
        ("amqp://u:p%40%2F%2C@one,two/%2Fv", ["amqp://u:p%40%2F%2C@one/%2Fv", "amqp://u:p%40%2F%2C@two/%2Fv"]),
        ("amqp://u:a,b@one,two/", ["amqp://u:a,b@one/", "amqp://u:a,b@two/"]),
        ("amqp://[::1]/", ["amqp://[::1]/"]),
        ("amqp://u:p@[::1]:5673,[fe80::2]/v", ["amqp://u:p@[::1]:5673/v", "amqp://u:p@[fe80::2]/v"]),
        ("amqp://u:p@one,[::1],[::2]:5673/v", ["amqp://u:p@one/v", "amqp://u:p@[::1]/v", "amqp://u:p@[::2]:5673/v"]),
        ("amqp://one:1,two:65535", ["amqp://one:1", "amqp://two:65535"]),
    ],
)
def test_each_host_has_a_url_of_its_own(url: str, urls: list[str]) -> None:
    assert hosts(url) == urls


@pytest.mark.parametrize(
    ("arguments", "lack"),
    [
        ({"x-queue-type": "quorum", "x-delivery-limit": 20}, "x-delivery-limit=20 lets RabbitMQ drop dead letters"),
        ({"x-queue-type": "quorum", "x-expires": 5_000}, "x-expires=5000 lets RabbitMQ drop dead letters"),
        ({"x-queue-type": "quorum", "x-max-length": 5}, "x-max-length=5 lets RabbitMQ drop dead letters"),
        ({}, "it is a classic queue: its dead letters are not replicated"),
    ],
)
def test_what_a_dead_letter_queue_lacks(arguments: dict[str, Any], lack: str) -> None:
    assert judge_dead(Declaration("q.dead", arguments=arguments)) == [lack]


def test_a_dead_letter_queue_of_our_own_lacks_nothing() -> None:
    for more in ({}, {"x-max-length": 5, "x-overflow": "reject-publish"}, {"x-delivery-limit": -1}):
        found = Declaration("q.dead", arguments={**dead_declaration("q").arguments, **more})
        assert judge_dead(found) == []


def strict_urlsplit(url: str) -> SplitResult:
    """As in Python 3.12.13 and 3.14: nothing but a port may stand beside an address in brackets."""
    parts = urlsplit(url)
    before, bracket, rest = parts.netloc.rpartition("@")[2].partition("[")
    after = rest.partition("]")[2]
    if bracket and (before or (after and not after.startswith(":"))):
        raise ValueError("Invalid IPv6 URL")
    return parts


def test_several_addresses_in_brackets_are_read_by_a_strict_parser_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.brokers.rabbitmq.amqp.hosts.urlsplit", strict_urlsplit, raising=False)
    assert hosts("amqp://u:p@one,[::1],[::2]:5673/v") == [
        "amqp://u:p@one/v",
        "amqp://u:p@[::1]/v",
        "amqp://u:p@[::2]:5673/v",
    ]


@pytest.mark.parametrize(
    "url",
    [
        "amqp://",
        "amqp:///vhost",
        "amqp://u:secret@/",
        "amqp://u:secret@host,/",
        "amqp://u:secret@,host/",
        "amqp://u:secret@:5672/",
        "amqp://u:secret@host:http/",
        "amqp://u:secret@host:-1/",
        "amqp://u:secret@host:0/",
        "amqp://u:secret@host:65536/",
        "amqp://u:secret@host:1,other:x/",
        "amqp://u:sec/ret@host/",
        "amqp://u:secret@[::1/",
        "amqp://u:secret@::1/",
    ],
)
def test_hosts_that_cannot_be_are_refused_without_the_password(url: str) -> None:
    with pytest.raises(
        ConfigurationError, match="amqp://user:password@host:5672/vhost, with special characters"
    ) as caught:
        hosts(url)
    assert "sec" not in str(caught.value)


# What becomes of priorities


def classic(most: int | None) -> Declaration:
    return Declaration("q", arguments={} if most is None else {"x-queue-type": "classic", "x-max-priority": most})


@pytest.mark.parametrize(
    ("version", "complete", "text"),
    [
        ((3, 10, 8), False, "RabbitMQ 3.10.8 ignores priorities in a quorum queue; upgrade to 4.3, or have a classic"),
        ((3, 13, 7), False, "ignores priorities"),
        ((4, 0, 5), False, "RabbitMQ 4.0.5 knows two priorities in a quorum queue, above 4 and the rest"),
        ((4, 2, 1), False, "knows two priorities"),
        ((4, 3, 0), True, "priorities are strict (a quorum queue on RabbitMQ 4.3.0)"),
        ((4, 10, 0), True, "priorities are strict"),
        ((5, 0), True, "priorities are strict"),
        ((0,), False, "ignores priorities"),
    ],
)
def test_a_quorum_queue_gives_what_its_server_can(version: tuple[int, ...], complete: bool, text: str) -> None:
    priorities = judge_priorities(Queue("q", priorities=True), quorum(), version)
    assert priorities.complete == complete
    assert text in priorities.text


@pytest.mark.parametrize(
    ("queue", "most", "complete", "text"),
    [
        (Queue("q", kind="classic"), 9, True, "priorities are strict (a classic queue with x-max-priority=9)"),
        (Queue("q", kind="classic"), 10, True, "priorities are strict"),
        (Queue("q", kind="classic"), 3, False, "x-max-priority=3, so a higher priority counts as 3"),
        (Queue("q", kind="classic"), None, False, "without x-max-priority, which ignores priorities"),
        (Queue("q", priorities=True), None, False, "without x-max-priority, which ignores priorities"),
        (Queue("q", priorities=True), 9, False, "a task without a priority counts as 0"),
    ],
)
def test_a_classic_queue_gives_what_it_was_made_with(queue: Queue, most: int | None, complete: bool, text: str) -> None:
    """In every version."""
    for version in ((3, 10, 8), (4, 1, 0), (4, 3, 6)):
        priorities = judge_priorities(queue, classic(most), version)
        assert priorities.complete == complete
        assert text in priorities.text


@pytest.mark.parametrize(
    ("version", "in_order"),
    [((3, 10, 8), True), ((3, 13, 7), True), ((4, 0, 0), False), ((4, 2, 9), False), ((4, 3, 0), True)],
)
def test_mixed_priorities_hold_one_another_up_in_some_versions(version: tuple[int, ...], in_order: bool) -> None:
    assert expires_in_order(version) == in_order
