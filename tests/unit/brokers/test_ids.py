"""Ids that the user chose: what they may be, and that a broker that can know refuses one that is taken."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, ConfigurationError, DuplicateTask, StoreError
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.brokers.sqlite import SQLiteBroker
from leveret.brokers.sqlite.queues import Queues
from leveret.model import (
    ID_FOR,
    ID_TOKEN,
    DeadLettered,
    Released,
    Retrying,
    Succeeded,
    id_key,
    new_ids,
    own_headers,
)
from leveret.testing.bench import Bench, becomes, settle_all
from tests.support.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from leveret.brokers import Broker
    from leveret.model import Envelope


@pytest.fixture
def outbox() -> Outbox:
    return Outbox()


@pytest.fixture(params=["memory", "sqlite"])
def open_broker(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], Broker]:
    store = MemoryStore()
    openers: dict[str, Callable[[], Broker]] = {
        "memory": lambda: MemoryBroker(store),
        "sqlite": lambda: SQLiteBroker(tmp_path / "leveret.db", timeout=20.0),
    }
    return openers[request.param]


@asynccontextmanager
async def bench_on(open_broker: Callable[[], Broker]) -> AsyncGenerator[Bench]:
    async with asyncio.timeout(60), AsyncExitStack() as stack:
        yield Bench(open_broker, stack)


async def is_refused(broker: Broker, envelope: Envelope) -> bool:
    try:
        await broker.publish([envelope])
    except DuplicateTask as error:
        return error.ids == (envelope.id,)
    return False


# What an id may be


@pytest.mark.parametrize("id_", ["", "a\nb", "\ud800", "x" * 256, "é" * 128, "\u200b", 7])
def test_an_id_that_cannot_be_is_refused(outbox: Outbox, id_: Any) -> None:
    task = outbox.task(name="say")(lambda: None)
    with pytest.raises(ConfigurationError, match="must be printable text of 1 to 255 bytes"):
        task.options(id=id_)


@pytest.mark.parametrize("id_", ["invoice-42", " ", "x" * 255, "é" * 127, "-", "✓ 1/2"])
async def test_other_ids_are_the_tasks(outbox: Outbox, id_: str) -> None:
    task = outbox.task(name="say")(lambda: None)
    handle = await task.options(id=id_).options(priority=3).enqueue()
    await task.enqueue()
    assert [envelope.id == id_ for envelope in outbox.sent] == [True, False]
    assert handle.id == id_


def test_ids_of_one_call_ascend() -> None:
    """Or a claim of 64 tasks out of a million touches 51 pages of their index."""
    ids = new_ids(1_000)
    assert ids == sorted(ids)
    assert len(set(ids)) == 1_000
    assert {len(id_) for id_ in ids} == {32}


async def test_many_have_an_id_each(outbox: Outbox) -> None:
    @outbox.task
    def say(text: str) -> None: ...

    handles = await say.options(priority=3).enqueue_many([("x",), ("y",)], ids=["one", "two"])
    assert [handle.id for handle in handles] == ["one", "two"]
    assert [(envelope.id, envelope.priority) for envelope in outbox.sent] == [("one", 3), ("two", 3)]
    with pytest.raises(ConfigurationError, match="has 2 calls and 1 ids; give one for each"):
        await say.enqueue_many([("x",), ("y",)], ids=["one"])
    assert await say.enqueue_many([], ids=[]) == []


async def test_an_id_given_twice_in_one_call_is_refused_before_anything_is_sent(outbox: Outbox) -> None:
    @outbox.task
    def say(text: str) -> None: ...

    for task, ids in ((say.options(id="one"), None), (say, ["one", "one"])):
        with pytest.raises(DuplicateTask, match="'one'") as caught:
            await task.enqueue_many([("x",), ("y",)], ids=ids)
        assert caught.value.ids == ("one",)
    assert outbox.sent == []


def test_the_error_names_the_ids_and_the_remedy() -> None:
    text = str(DuplicateTask([f"id-{number}" for number in range(7)]))
    assert "'id-0'" in text
    assert "'id-4' and 2 more; nothing was stored" in text
    assert "choose another id" in text


# What a priority may be


@pytest.mark.parametrize("priority", [-1, 10, True, 3.0, "7"])
def test_a_priority_that_cannot_be_is_refused(outbox: Outbox, priority: Any) -> None:
    task = outbox.task(name="say")(lambda: None)
    with pytest.raises(ConfigurationError, match="must be an integer from 0 to 9"):
        task.options(priority=priority)
    with pytest.raises(ConfigurationError, match="must be an integer from 0 to 9"):
        outbox.task(name="shout", priority=priority)(lambda: None)
    assert outbox.tasks == (task,)


async def test_a_tasks_own_priority_is_its_default(outbox: Outbox) -> None:
    """And tells its queue, so that a worker can say what becomes of it."""
    urgent = outbox.task(name="urgent", priority=7)(lambda: None)
    plain = outbox.task(name="plain", queue="other")(lambda: None)
    for task in (urgent, urgent.options(priority=0), plain, plain.options(priority=9)):
        await task.enqueue()
    assert [envelope.priority for envelope in outbox.sent] == [7, 0, None, 9]
    assert {queue.name: queue.priorities for queue in outbox.queues} == {"default": True, "other": False}


# Taken ids


async def test_an_id_is_taken_until_its_task_has_ended(open_broker: Callable[[], Broker]) -> None:
    """Ready, delayed, running, handed back, tried again, dead and alive again; free after success."""
    async with bench_on(open_broker) as bench:
        broker = await bench.declared()
        twin, later = bench.envelope("x", id="twin"), bench.envelope("y", id="later", due=time.time() + 3600)
        await broker.publish([twin, later])
        assert await is_refused(broker, later)
        assert await is_refused(bench.broker(), twin)
        taken = await bench.consumer(broker)
        for outcome in (Released(), Retrying("no"), Retrying("no", delay=0.1), DeadLettered("no")):
            running = await taken.next()
            assert await is_refused(broker, twin)
            await settle_all(broker, running, outcome)
            assert await is_refused(broker, twin)
        await broker.dead_letters.retry(bench.queue.name, ["twin"])
        assert await is_refused(broker, twin)
        await settle_all(broker, await taken.next(), Succeeded())
        assert not await is_refused(broker, twin)
        await settle_all(broker, await taken.next(), DeadLettered("no"))
        await broker.dead_letters.drop(bench.queue.name, ["twin"])
        assert not await is_refused(broker, twin)


async def test_an_id_is_taken_in_every_queue(open_broker: Callable[[], Broker]) -> None:
    async with bench_on(open_broker) as bench:
        other = bench.other_queue()
        broker = await bench.declared()
        await broker.declare([other])
        await broker.publish([bench.envelope("x", id="twin")])
        assert await is_refused(broker, bench.envelope("x", id="twin", queue=other.name))


@pytest.mark.parametrize(
    ("ids", "taken"), [(["a", "twin", "b"], ["twin"]), (["a", "b", "a"], ["a"]), (["a", "a", "twin"], ["twin", "a"])]
)
async def test_nothing_of_a_call_with_a_taken_id_is_stored(
    open_broker: Callable[[], Broker], ids: list[str], taken: list[str]
) -> None:
    async with bench_on(open_broker) as bench:
        broker = await bench.declared()
        await broker.publish([bench.envelope("x", id="twin")])
        with pytest.raises(DuplicateTask) as caught:
            await broker.publish([bench.envelope("y", id=id_) for id_ in ids])
        assert caught.value.ids == tuple(taken)
        await becomes(broker, bench.queue, ready=1)
        await broker.publish([bench.envelope("y", id=id_) for id_ in ("a", "b")])
        await becomes(broker, bench.queue, ready=3)


async def test_a_taken_id_is_refused_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that share its transaction are stored, and none is taken for its own twin when a neighbour fails."""

    def fail(self: Queues, *_: object, **__: object) -> None:
        self.execute("INSERT INTO nowhere VALUES (1)")

    monkeypatch.setattr(Queues, "set_paused", fail)
    async with bench_on(lambda: SQLiteBroker(tmp_path / "leveret.db", timeout=20.0)) as bench:
        broker = await bench.declared()
        twin = bench.envelope("x", id="twin")
        calls = [[twin], [bench.envelope("y", id="a"), twin], [bench.envelope("z", id="b")]]
        results = await asyncio.gather(
            *(broker.publish(call) for call in calls), broker.queues.pause(bench.queue.name), return_exceptions=True
        )
        assert [type(result) for result in results] == [type(None), DuplicateTask, type(None), StoreError]
        await becomes(broker, bench.queue, ready=2)


# An id of one's own, from an application


@pytest.fixture(params=["memory", "sqlite"])
def app(request: pytest.FixtureRequest, tmp_path: Path) -> App:
    return App("memory://" if request.param == "memory" else f"sqlite:///{tmp_path / 'leveret.db'}")


async def test_an_id_that_is_taken_is_an_error_or_ignored(app: App) -> None:
    @app.task
    async def say(text: str) -> None: ...

    async with app:
        first = await say.options(id="greeting").enqueue("a")
        assert not first.existing
        with pytest.raises(DuplicateTask, match="'greeting'") as caught:
            await say.options(id="greeting").enqueue("b")
        assert (caught.value.ids, caught.value.existing) == (("greeting",), {})
        again = await say.options(id="greeting", on_conflict="ignore").enqueue("b")
        assert (again.id, again.existing) == ("greeting", True)
        many = await say.options(id_for=60, on_conflict="ignore").enqueue_many([("c",), ("d",)], ids=["greeting", "2"])
        assert [(one.id, one.existing) for one in many] == [("greeting", True), ("2", False)]
        with pytest.raises(DuplicateTask) as caught:
            await say.enqueue_many([("e",), ("f",)], ids=["3", "2"])
        assert caught.value.ids == ("2",)
        assert not (await say.options(id="3").enqueue("e")).existing


async def test_an_id_is_taken_for_a_while(app: App) -> None:
    @app.task
    async def say(text: str) -> None: ...

    async with app:
        daily = say.options(id="daily", id_for=timedelta(days=1))
        await daily.enqueue("a")
        await app.client.broker.queues.purge("default")
        with pytest.raises(DuplicateTask):
            await daily.enqueue("b")
        assert (await daily.options(on_conflict="ignore").enqueue("b")).existing
        assert [one.key for one in await app.unique.holders()] == ["id=daily"]
        assert await app.unique.release("id=daily")
        assert not (await daily.enqueue("c")).existing


async def test_what_is_said_of_an_id_needs_an_id(outbox: Outbox) -> None:
    task = outbox.task(name="say")(lambda: None)
    with pytest.raises(ConfigurationError, match="no unique key and no id"):
        task.options(on_conflict="ignore")
    with pytest.raises(ConfigurationError, match=r"id_for is given.*without an id"):
        await task.options(id_for=60).enqueue()
    for wrong in (0, -1, "1d", float("nan")):
        with pytest.raises(ConfigurationError, match="id_for"):
            task.options(id="x", id_for=wrong)  # type: ignore[arg-type]
    assert outbox.sent == []


async def test_a_task_does_not_see_what_marks_its_id(outbox: Outbox) -> None:
    task = outbox.task(name="say")(lambda: None)
    await task.options(id="x", id_for=1.5, headers={"tenant": "a"}).enqueue()
    (sent,) = outbox.sent
    assert own_headers(sent.headers) == {"tenant": "a"}
    assert sent.headers[ID_FOR] == 1_500
    await task.options(id="y").enqueue()
    assert outbox.sent[1].headers.keys() == {ID_TOKEN}
    assert outbox.sent[1].headers[ID_TOKEN] != sent.headers[ID_TOKEN]
    assert (id_key("x" * 252), len(id_key("x" * 253))) == (f"id={'x' * 252}", 67)
