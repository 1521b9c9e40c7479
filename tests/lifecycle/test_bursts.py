"""Many who want the same thing that is not there yet: one makes it, and the others wait for that."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, Queue, QueueMismatch
from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.control import ControlBus
from tests.support.waiting import until

if TYPE_CHECKING:
    from leveret.client.task import Task
    from tests.conftest import Place
    from tests.support.nodes import Node

MANY = 5_000


class Declared:
    """How often each queue was asked for, by whoever asked RabbitMQ."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def times(self, name: str) -> int:
        return self.names.count(name)


@pytest.fixture
def declared(monkeypatch: pytest.MonkeyPatch) -> Declared:
    declared = Declared()
    declare = amqp.Channel.queue_declare

    async def noted(channel: amqp.Channel, queue: str = "", **options: Any) -> Any:
        declared.names.append(queue)
        return await declare(channel, queue, **options)

    monkeypatch.setattr(amqp.Channel, "queue_declare", noted)
    return declared


def app_on(url: str, *queues: Queue, timeout: float = 60.0) -> tuple[App, Task[[str], None]]:
    app = App(url, enqueue_timeout=timeout, queues=queues or [Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    return app, say


async def test_first_enqueues_declare_once(node: Node, declared: Declared, caplog: pytest.LogCaptureFixture) -> None:
    """The queue and the stream of what becomes of tasks; and nobody warns of what is only new."""
    app, say = app_on(node.url)
    await asyncio.gather(*(say.enqueue(str(number)) for number in range(MANY)))
    assert declared.times("work") <= 3
    assert declared.times("leveret.events") <= 3
    assert caplog.text == ""
    (stats,) = await app.client.broker.queues.stats(["work"])
    assert stats.ready == MANY
    await app.close()


async def test_first_delays_make_each_queue_once(node: Node, declared: Declared) -> None:
    """Of several lengths, whose queues overlap."""
    app, say = app_on(node.url)
    delays = [0.2, 0.5, 4.0, 8.0, 60.0]
    await asyncio.gather(*(say.options(delay=delays[n % 5] + 600).enqueue("x") for n in range(500)))
    await asyncio.gather(*(say.options(delay=delays[n % 5] + 60).enqueue("x") for n in range(500)))
    assert declared.times("work.delay.125") <= 2
    assert max(map(declared.times, set(declared.names))) <= 4
    await app.close()


async def test_many_cancellations_make_the_stream_once(node: Node, declared: Declared) -> None:
    app, say = app_on(node.url)
    handles = await asyncio.gather(*(say.enqueue("x") for _ in range(50)))
    declared.names.clear()
    await asyncio.gather(*(app.client.cancel(handle.id) for handle in handles))
    assert declared.times("leveret.cancelled") <= 2 * len(handles) / 5
    await app.close()


async def test_many_cancellations_are_told_together(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each notice has every worker look, so those that come together are one."""
    announced: list[object] = []
    announce = ControlBus.announce

    async def counted(*arguments: Any) -> None:
        announced.append(arguments)
        await announce(*arguments)

    monkeypatch.setattr(ControlBus, "announce", counted)
    app, say = app_on(node.url)
    handles = await asyncio.gather(*(say.enqueue("x") for _ in range(300)))
    states = await asyncio.gather(*(app.client.cancel(handle.id) for handle in handles))
    assert {state.state for state in states if state is not None} == {"cancelled"}
    assert len(states) == 300
    # One for the first, and one for each 200 that came meanwhile; some may have come late.
    assert len(announced) <= 10
    await app.close()


async def test_enqueue_many_to_many_queues(place: Place) -> None:
    """Concurrently, each to some of the same queues."""
    app = App(place.url, enqueue_timeout=60.0)

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    async def to(queue: str) -> None:
        await say.options(queue=queue).enqueue_many([("a",), ("b",)])

    await asyncio.gather(*(to(queue) for _ in range(20) for queue in ("work", "other", "raw", "default")))
    stats = await app.client.broker.queues.stats(["work", "other", "raw", "default"])
    assert [one.ready for one in stats] == [40] * 4
    await app.close()


async def test_a_caller_that_gives_up_leaves_it_to_the_others(node: Node, declared: Declared) -> None:
    """The first of all, by whom the declaring was begun."""
    app, say = app_on(node.url)
    enqueuing = [asyncio.create_task(say.enqueue(str(number))) for number in range(100)]
    await until(lambda: declared.times("work") > 0, "they declare")
    assert not any(one.done() for one in enqueuing)
    for one in enqueuing[:50]:
        one.cancel()
    results = await asyncio.gather(*enqueuing, return_exceptions=True)
    assert not any(isinstance(result, BaseException) for result in results[50:])
    (stats,) = await app.client.broker.queues.stats(["work"])
    assert stats.ready == 50
    await app.close()


async def test_a_queue_that_cannot_be_is_an_error_for_all(node: Node) -> None:
    broker = connect(node.url, timeout=20.0)
    await broker.declare([Queue("work")])
    await broker.close()
    app, say = app_on(node.url, Queue("work", max_length=5))
    results = await asyncio.gather(*(say.enqueue("x") for _ in range(200)), return_exceptions=True)
    assert {type(result) for result in results} == {QueueMismatch}
    await app.close()


async def test_a_server_that_comes_late_is_in_time_for_all(node: Node) -> None:
    """The declaration fails and is tried again behind them."""
    node.kill()
    app, say = app_on(node.url, timeout=90.0)
    enqueuing = asyncio.gather(*(say.enqueue(str(number)) for number in range(200)))
    node.start()
    await asyncio.to_thread(node.wait)
    await enqueuing
    await app.close()
