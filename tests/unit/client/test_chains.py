"""Chains as an application writes them: what is refused before anything is sent, and how they run."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, Dead, InvalidArguments, Queue, ResultTimeout, TaskFailed, current_task
from leveret.model import STEPS, Envelope
from leveret.testing import AppUnderTest, under_test

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from leveret import Chain

app = App("memory://", queues=[Queue("default"), Queue("fair", fair_by="tenant")])
by_text = app.limit("texts", concurrency=1, by="text")
by_extra = app.limit("extras", concurrency=1, by="extra")


@app.task
async def add(number: int, more: int = 1) -> int:
    return number + more


@app.task
def shown(number: int, *, end: str = "") -> str:
    return f"{number}{end}"


@app.task(store_result=False)
def silent(number: int) -> int:
    return number * 2


@app.task
async def nothing() -> None:
    assert current_task().attempt == 1


@app.task
async def strange() -> object:
    return object()


@app.task(acknowledge="before")
async def at_most_once(number: int) -> int:
    return number


@app.task
def raw(body: bytes) -> int:
    return len(body)


@app.task(unique="text")
async def unique(text: str) -> None: ...


@app.task(limits=by_text)
async def limited(text: str, extra: str = "") -> str:
    return text + extra


@app.task(limits=by_extra)
async def limited_by_more(text: str, extra: str = "") -> str:
    return text + extra


@app.task(queue="fair")
async def for_tenant(tenant: str, text: str) -> str:
    return tenant + text


@app.task(max_attempts=1)
async def fail(number: int) -> int:
    raise ValueError(number)


@pytest.fixture
def kit() -> Iterator[AppUnderTest]:
    with under_test(app) as kit:
        yield kit


async def test_each_step_gets_the_result_of_the_one_before(kit: AppUnderTest) -> None:
    chain = add.step(1) | add.step(more=10) | silent.step() | shown.step(end="!")
    assert repr(chain) == f"<Chain {add.name} | {add.name} | {silent.name} | {shown.name}>"
    handle = await chain.enqueue()
    await kit.drain()
    assert await handle.result(5) == "24!"
    assert [step.id for step in handle.steps] == [f"{handle.id}.{number}" for number in range(1, 5)]
    assert (await handle.status()).id == f"{handle.id}.4"
    kit.assert_enqueued(add, 2, 10)
    kit.assert_enqueued(shown, 24, end="!")


async def test_a_step_without_the_result_of_the_one_before(kit: AppUnderTest) -> None:
    handle = await (strange.step() | nothing.step().immutable() | add.step(5).immutable()).enqueue()
    await kit.drain()
    assert await handle.result(5) == 6


async def test_what_cannot_travel_is_a_dead_letter(kit: AppUnderTest) -> None:
    handle = await (strange.step() | shown.step()).enqueue()
    await kit.drain(expect=Exception)
    with pytest.raises(TaskFailed, match=f"next step, {shown.name}, cannot have it"):
        await handle.result(5)


async def test_none_is_a_result(kit: AppUnderTest) -> None:
    handle = await (nothing.step() | limited_by_more.step("x")).enqueue()
    await kit.drain(expect=Dead)
    (letter,) = await kit.dead_letters()
    assert letter.envelope.id == f"{handle.id}.2"  # None is no text
    assert "argument 'text'" in letter.reason


async def test_a_dead_step_is_told_and_the_chain_waits(kit: AppUnderTest) -> None:
    handle = await (add.step(1) | fail.step() | add.step()).enqueue()
    with pytest.raises(ResultTimeout, match="goes on"):
        await handle.result(0.01)
    await kit.drain(expect=ValueError)
    with pytest.raises(TaskFailed, match="ValueError"):
        await handle.result(5)
    status = await handle.status()
    assert (status.state, status.id) == ("dead", f"{handle.id}.2")


async def test_a_crash_before_the_outcome_runs_the_step_again(kit: AppUnderTest) -> None:
    kit.faults.crash_before_settle(add)
    handle = await (add.step(1) | shown.step()).enqueue()
    runs = await kit.drain()
    assert [run.task for run in runs if run.kept] == [add.name, shown.name]
    assert await handle.result(5) == "2"


async def test_a_delayed_step_waits(kit: AppUnderTest) -> None:
    handle = await (add.step(1) | add.options(delay=60, priority=7, headers={"a": "b"}).step()).enqueue()
    await kit.drain()
    (one,) = [one for one in kit.enqueued(add) if one.id == f"{handle.id}.2"]
    assert (round(one.delay), one.priority, one.headers) == (60, 7, {"a": "b"})
    assert (await handle.status()).state == "delayed"
    kit.clock.advance(61)
    await kit.drain()
    assert await handle.result(5) == 3


async def test_cancel_ends_the_chain(kit: AppUnderTest) -> None:
    handle = await (add.step(1) | shown.step()).enqueue()
    assert (await handle.cancel()).state == "cancelled"
    assert await kit.drain() == []


async def test_a_limit_by_a_steps_own_argument(kit: AppUnderTest) -> None:
    handle = await (shown.step(1) | limited_by_more.step("b") | limited.step("c").immutable()).enqueue()
    await kit.drain()
    assert await handle.result(5) == "c"


def chains() -> list[tuple[Callable[[], Chain[Any]], str]]:
    return [
        (lambda: add.step(1) | limited.step(), "by 'text', which step"),
        (lambda: add.step(1) | for_tenant.step("x"), "fair_by='tenant'"),
        (lambda: add.step(1) | unique.step(), "unique key"),
        (lambda: add.options(id="mine").step(1) | add.step(), "has an id"),
        (lambda: at_most_once.step(1) | add.step(), "acknowledge='before'"),
        (lambda: add.step(1) | raw.step().immutable(), "raw body"),
        (lambda: add.step(1) | shown.step(end="x" * 70_000), "over the limit of 65536"),
        (lambda: add.step(1) | add, "is no step of a chain"),  # type: ignore[operator]
    ]


@pytest.mark.parametrize("number", range(8))
async def test_what_is_refused(kit: AppUnderTest, number: int) -> None:
    chain, why = chains()[number]
    with pytest.raises(ConfigurationError, match=why):
        await chain().enqueue()
    assert kit.enqueued() == []


async def test_arguments_are_checked_before_anything_is_sent(kit: AppUnderTest) -> None:
    for chain in (
        add.step("x"),
        add.step(1) | add.step("x"),
        add.step(1) | add.step(1, 2),
        add.step(1) | nothing.step(),
    ):
        with pytest.raises(InvalidArguments):
            await chain.enqueue()
    assert kit.enqueued() == []


async def test_steps_are_of_one_application(kit: AppUnderTest) -> None:
    other = App("memory://")
    with pytest.raises(ConfigurationError, match="another application's"):
        await (add.step(1) | other.task(name="other")(lambda number: number).step()).enqueue()
    assert kit.enqueued() == []


def test_without_an_event_loop() -> None:
    with under_test(app) as kit:
        handle = (add.step(1) | at_most_once.step()).enqueue_sync()
        kit.drain_sync()
        assert app.wait(handle.result(5)) == 2


async def test_a_chain_may_be_stopped_while_a_step_runs(kit: AppUnderTest) -> None:
    """One that was told to end, and succeeds all the same, is followed by nothing."""
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def stubborn() -> int:
        begun.set()
        while not go_on.is_set():
            try:
                await go_on.wait()
            except asyncio.CancelledError:
                go_on.set()
        return 1

    own = App("memory://")
    task = own.task(name="stubborn")(stubborn)
    after = own.task(name="after")(stubborn)
    with under_test(own) as mine:
        handle = await (task.step() | after.step().immutable()).enqueue()
        draining = asyncio.create_task(mine.drain())
        await begun.wait()
        assert (await handle.cancel()).state == "cancelled"
        await draining
        assert [one.task for one in mine.enqueued()] == ["stubborn"]
    assert kit.enqueued() == []


async def test_a_foreign_chain_through_a_task_that_may_be_lost(kit: AppUnderTest) -> None:
    """It does not run: what follows could be lost with it."""
    steps = f'[{{"task": "{add.name}", "queue": "default"}}]'
    await app.client.require({"default"})
    await app.client.broker.publish(
        [Envelope("one", "default", at_most_once.name, b'{"args":[1]}', headers={STEPS: steps})]
    )
    await kit.drain(expect=Dead)
    (letter,) = await kit.dead_letters()
    assert "acknowledge='before'" in letter.reason
