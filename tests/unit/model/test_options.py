"""A task's options, and what one enqueue says in their place."""

from __future__ import annotations

import math
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, ConfigurationError, CurrentTask, current_task
from leveret.executors import Manifest
from leveret.model import DeadLettered, Envelope, Retrying, Succeeded, TaskOptions, new_id, wrong_headers
from leveret.model.options import MAX_TIMEOUT
from leveret.testing import under_test
from tests.support.bench import Bench
from tests.support.outbox import sent_by

if TYPE_CHECKING:
    from collections.abc import Mapping

    from leveret.model import Header, Status

app = App("memory://")


@app.task(timeout=10, max_attempts=3)
async def work() -> None: ...


async def headers_of(task: Any) -> dict[str, Any]:
    """Of the message that an enqueue sends."""
    return (await sent_by(app, task)).headers


# On their way to the worker


def test_a_worker_gets_all_but_what_only_the_child_can_use() -> None:
    other = App("memory://")

    @other.task(
        queue="mail",
        acknowledge="before",
        max_attempts=7,
        backoff=2,
        timeout=timedelta(minutes=1),
        store_result=False,
        retry_on=OSError,
        give_up_on=[ValueError],
        retry=lambda attempt, _: float(attempt),
    )
    async def send() -> None: ...

    assert send.retry.retry_on == (OSError,)
    assert send.retry.give_up_on == (ValueError,)
    assert send.retry.decide is not None
    manifest = msgspec.msgpack.decode(msgspec.msgpack.encode(Manifest.of(other)), type=Manifest)
    assert manifest.tasks == {
        "send": TaskOptions("mail", "before", 7, backoff=2.0, timeout=60.0, store_result=False),
    }
    assert manifest.tasks["send"].policy == send.retry.policy


def test_a_message_of_a_task_that_is_not_known_has_the_defaults() -> None:
    manifest = Manifest("memory://", [], {"mail": "send"}, {"send": TaskOptions("mail", max_attempts=2)}, 1.0)
    assert manifest.options_of(Envelope("a", "mail", None, b"")).max_attempts == 2
    assert manifest.options_of(Envelope("a", "mail", "other", b"")) == TaskOptions()
    assert manifest.options_of(Envelope("a", "work", None, b"")) == TaskOptions()


# In a message


async def test_a_message_carries_what_its_enqueue_says_and_nothing_else() -> None:
    assert await headers_of(work) == {}
    assert await headers_of(work.options(queue="other", priority=3, expires=60)) == {}
    assert await headers_of(work.options(timeout=timedelta(seconds=1.5))) == {"leveret-timeout": 1500}
    assert await headers_of(work.options(max_attempts=1)) == {"leveret-max-attempts": 1}
    assert await headers_of(work.options(store_result=True)) == {"leveret-store-result": True}
    own: dict[str, Header] = {"tenant": "acme", "retries": 3, "ratio": 0.1, "is_test": False, "nothing": None}
    assert await headers_of(work.options(headers=own)) == own


async def test_options_add_up_and_headers_are_replaced() -> None:
    changed = work.options(timeout=5, headers={"a": "1"}).options(max_attempts=2, headers={"b": "2"}, delay=3)
    assert (changed.timeout, changed.retry.policy.max_attempts, changed.store_result) == (5.0, 2, True)
    assert await headers_of(changed) == {"leveret-timeout": 5000, "leveret-max-attempts": 2, "b": "2"}
    assert await headers_of(changed.options(headers={}, timeout=6)) == {
        "leveret-timeout": 6000,
        "leveret-max-attempts": 2,
    }
    assert (work.timeout, work.retry.policy.max_attempts) == (10.0, 3)


async def test_a_timeout_is_never_shorter_on_its_way() -> None:
    assert await headers_of(work.options(timeout=0.000_1)) == {"leveret-timeout": 1}
    longest = await headers_of(work.options(timeout=MAX_TIMEOUT))
    assert wrong_headers(longest) == ""
    assert work.task_options.for_message(longest).timeout == MAX_TIMEOUT


async def test_the_headers_are_a_copy() -> None:
    given = {"tenant": "acme"}
    changed = work.options(headers=given)
    given["tenant"] = "other"
    assert await headers_of(changed) == {"tenant": "acme"}


def test_options_that_a_message_does_not_replace_cost_nothing() -> None:
    options = work.task_options
    assert options.for_message({}) is options
    assert options.for_message({"tenant": "acme"}) is options
    assert work.for_message({"tenant": "acme"}) is work


# What users give


@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan, True, "5", MAX_TIMEOUT * 2, timedelta(0)], ids=repr)
def test_a_timeout_of_one_enqueue_is_a_duration(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"timeout is .*; it must be more than 0 seconds"):
        work.options(timeout=value)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "5", 2**31], ids=repr)
def test_the_attempts_of_one_enqueue_are_a_count(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"max_attempts is .*; it must be a whole number, at least 1"):
        work.options(max_attempts=value)


@pytest.mark.parametrize("value", [0, 1, "no", []], ids=repr)
def test_whether_a_result_is_stored_is_a_bool(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"store_result is .*; it must be True or False"):
        work.options(store_result=value)
    with pytest.raises(ConfigurationError, match=r"store_result is .*; it must be True or False"):
        App("memory://").task(store_result=value)


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [b"x", [], {}, 1j, Decimal(1), math.nan, math.inf, 2**63, -(2**63) - 1, "\ud800", "x" * 40_000, Text("x"), object],
    ids=lambda value: repr(value)[:20],
)
def test_a_header_that_does_not_fit_is_named(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"headers\['tenant'\] is "):
        work.options(headers={"fine": 1, "tenant": value})


@pytest.mark.parametrize(
    "name",
    ["leveret-timeout", "Leveret-Mine", "x-death", "X-Request-Id", "CC", "BCC", "", "n" * 256, "\ud800", 5, None],
)
def test_a_headers_name_that_is_not_the_users_is_named(name: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"headers has the name "):
        work.options(headers={name: "x"})


@pytest.mark.parametrize("value", ["tenant", [("tenant", "acme")], 5, b""], ids=repr)
def test_headers_are_a_dict(value: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"headers is .*; it must be a dict"):
        work.options(headers=value)


def test_headers_have_room_in_a_frame() -> None:
    many = {f"header-{number}": "x" * 1_000 for number in range(32)}
    with pytest.raises(ConfigurationError, match=r"over the limit of 32768; the largest is 'large'"):
        work.options(headers={**many, "large": "y" * 2_000})
    work.options(headers={f"header-{number}": "x" * 1_000 for number in range(30)})


# What comes from elsewhere


@pytest.mark.parametrize(
    ("header", "value", "options"),
    [
        ("leveret-timeout", 1500, {"timeout": 1.5}),
        ("leveret-timeout", "1500", {"timeout": 1.5}),
        ("leveret-timeout", Decimal(1500), {"timeout": 1.5}),
        ("leveret-timeout", 0.5, {"timeout": 0.0005}),
        ("leveret-timeout", None, {}),
        ("leveret-max-attempts", " 7 ", {"max_attempts": 7}),
        ("leveret-max-attempts", 7.0, {"max_attempts": 7}),
        ("leveret-max-attempts", 2**31 - 1, {"max_attempts": 2**31 - 1}),
        ("leveret-store-result", "False", {"store_result": False}),
        ("leveret-store-result", True, {"store_result": True}),
    ],
    ids=repr,
)
def test_another_language_may_say_it_in_its_own_way(header: str, value: Any, options: dict[str, Any]) -> None:
    assert wrong_headers({header: value}) == ""
    assert TaskOptions().for_message({header: value}) == TaskOptions(**options)


WRONG: dict[str, list[Any]] = {
    "leveret-timeout": ["soon", "", 0, -1, True, [1], b"\xff", math.nan, 2**62, {}],
    "leveret-max-attempts": ["many", 0, -1, 1.5, True, 2**31, [], {}],
    "leveret-store-result": ["perhaps", 0, 1, "", [], {}],
}


@pytest.mark.parametrize(
    ("header", "value"), [(name, value) for name, values in WRONG.items() for value in values], ids=repr
)
async def test_what_does_not_fit_is_a_dead_letter(header: str, value: Any) -> None:
    """It does not run with other options than its producer meant, and is not lost."""
    bench = Bench()
    await bench.put("say", "fine")
    wrong = Envelope(new_id(), "work", "say", b'{"args":["wrong"]}', headers={header: value, "tenant": "acme"})
    await bench.broker.publish([wrong])
    async with bench.working():
        await bench.wait_until_settled(2)
    assert bench.done == ["fine"]
    (letter,) = await bench.broker.dead_letters.read("work", limit=10)
    assert letter.reason.startswith(f"its header {header} is {value!r}: it must be ")
    assert letter.envelope.headers["tenant"] == "acme"


def test_all_that_is_wrong_is_told() -> None:
    reason = wrong_headers({"leveret-timeout": "soon", "leveret-max-attempts": 0, "leveret-store-result": True})
    assert "its header leveret-timeout is 'soon'" in reason
    assert "its header leveret-max-attempts is 0" in reason
    assert "leveret-store-result" not in reason


# What acts on them


async def enqueued(bench: Bench, task: str, headers: Mapping[str, Any]) -> str:
    await bench.put(task)
    envelope = Envelope(new_id(), "work", task, b'{"args":["a"]}', headers=dict(headers))
    await bench.broker.publish([envelope])
    return envelope.id


async def test_the_attempts_of_one_enqueue() -> None:
    bench = Bench()
    await enqueued(bench, "fail_once", {"leveret-max-attempts": 1})
    async with bench.working():
        (settled,) = await bench.wait_until_settled(1)
    assert isinstance(settled.outcome, DeadLettered)
    assert settled.outcome.reason == "ValueError: a; attempt 1 of 1 failed"


async def test_more_attempts_than_the_decorator_says() -> None:
    bench = Bench()

    @bench.app.task(queue="work", max_attempts=1, backoff=0)
    async def stubborn(text: str) -> None:
        bench.done.append(text)
        assert current_task().max_attempts == 3
        raise ValueError(text)

    await enqueued(bench, "stubborn", {"leveret-max-attempts": 3})
    async with bench.working():
        settled = await bench.wait_until_settled(3)
    assert [type(event.outcome) for event in settled] == [Retrying, Retrying, DeadLettered]
    assert len(bench.done) == 3


async def test_the_timeout_of_one_enqueue() -> None:
    bench = Bench()
    await enqueued(bench, "wait", {"leveret-max-attempts": 1, "leveret-timeout": 50})
    async with bench.working():
        (settled,) = await bench.wait_until_settled(1)
    assert isinstance(settled.outcome, DeadLettered)
    assert "ran longer than its timeout of 0.05 s" in settled.outcome.reason


async def told(bench: Bench, id_: str) -> list[Status]:
    async with bench.working():
        await bench.wait_until_settled(1)
    return list(await bench.broker.statuses.read([id_]))


async def test_one_enqueue_whose_result_is_not_stored() -> None:
    bench = Bench()
    id_ = await enqueued(bench, "count", {"leveret-store-result": False})
    assert await told(bench, id_) == []
    (settled,) = await bench.wait_until_settled(1)
    assert settled.outcome == Succeeded()


async def test_one_enqueue_whose_result_is_stored() -> None:
    """Also where no task of the application has a result to store."""
    bench = Bench()
    bench.app = App("memory://")

    @bench.app.task(queue="work", store_result=False)
    async def silent(text: str) -> int:
        return len(text)

    id_ = await enqueued(bench, "silent", {"leveret-store-result": True})
    (status,) = await told(bench, id_)
    assert (status.state, status.result) == ("succeeded", 1)
    assert status.started_at is None or status.started_at > 0


async def test_a_handle_knows_whether_its_result_is_stored() -> None:
    with under_test(app) as test:
        handle = await work.options(store_result=False).enqueue()
        await test.drain()
        with pytest.raises(ConfigurationError, match="store_result=False"):
            await handle.result(1)


async def test_a_task_reads_the_users_headers() -> None:
    """On each attempt. It cannot write them, and does not see what carries options."""
    other = App("memory://")
    seen: list[CurrentTask] = []

    @other.task(backoff=0)
    async def look() -> None:
        seen.append(current_task())
        if len(seen) == 1:
            raise ValueError("again")

    with under_test(other) as test:
        await look.options(headers={"tenant": "acme", "n": 5}, timeout=60).enqueue()
        await test.drain(expect=ValueError)
        await test.drain()
    assert [current.attempt for current in seen] == [1, 2]
    for current in seen:
        assert current.headers == {"tenant": "acme", "n": 5}
        assert current.deadline is not None
        with pytest.raises(TypeError):
            current.headers["tenant"] = "other"  # type: ignore[index]
