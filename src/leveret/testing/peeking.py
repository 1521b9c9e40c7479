"""Checks of looking at tasks that wait; see `conformance`."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from leveret.errors import PeekRefused, QueueNotFound
from leveret.model import DeadLettered, Released, Succeeded
from leveret.testing.bench import Bench, becomes, check, refused, settle_all, text, text_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker, WaitingState
    from leveret.model import Envelope, Queue

#: More looks than a broker lets a message come back: RabbitMQ's limit is 20.
LOOKS = 25


async def looked(broker: Broker, queue: Queue, state: WaitingState, limit: int = 10) -> Sequence[Envelope] | None:
    """What waits, as the broker shows it; None: it refuses to look, so that nothing is moved or counted."""
    try:
        return await broker.queues.peek(queue.name, state, limit=limit)
    except PeekRefused:
        return None


@check
async def what_is_ready_is_shown_as_it_will_be_taken(bench: Bench) -> None:
    """By priority, then whoever came first; at most so many. (On RabbitMQ in a classic queue: in every version.)"""
    queue = bench.other_queue(kind="classic", priorities=True)
    broker = await bench.declared(queue)
    assert await broker.queues.peek(queue.name, "ready", limit=10) == []
    tasks = [
        bench.envelope(name, queue=queue.name, priority=priority, headers={"tenant": name})
        for name, priority in {"a": None, "b": 9, "c": 0, "d": None}.items()
    ]
    for task in tasks:
        await broker.publish([task])
    await becomes(broker, queue, ready=4)
    for _ in range(2):
        shown = await broker.queues.peek(queue.name, "ready", limit=10)
        assert [text_of(one) for one in shown] == ["b", "a", "d", "c"]
        assert [(one.id, one.queue, one.task, one.attempt, one.headers) for one in shown] == [
            (one.id, queue.name, "check", 1, one.headers) for one in (tasks[number] for number in (1, 0, 3, 2))
        ]
        assert shown[0].priority == 9
    assert [text_of(one) for one in await broker.queues.peek(queue.name, "ready", limit=2)] == ["b", "a"]
    await becomes(broker, queue, ready=4)
    taken = await bench.consumer(broker, queue, credit=1)
    seen = ""
    while len(seen) < 4:
        (delivery,) = await taken.next()
        seen += text(delivery)
        await broker.settle([(delivery, Succeeded())])
    assert seen == "badc"
    assert await broker.queues.peek(queue.name, "ready", limit=10) == []


@check
async def a_look_moves_and_counts_nothing(bench: Bench) -> None:
    """However often somebody looks, at a part of it too: the tasks come in their order, as if nobody had looked."""
    broker = await bench.declared()
    names = [*"abcde"]
    await broker.publish(bench.envelopes(*names))
    await becomes(broker, bench.queue, ready=5)
    for limit in range(LOOKS):
        shown = await looked(broker, bench.queue, "ready", 1 + limit % 3)
        assert shown is None or [text_of(one) for one in shown] == names[: 1 + limit % 3]
    await becomes(broker, bench.queue, ready=5)
    taken = await bench.consumer(bench.broker())
    deliveries = await taken.next(5)
    assert [text(one) for one in deliveries] == names
    assert max(one.returns for one in deliveries) <= 1
    assert await looked(broker, bench.queue, "ready") in ([], None)
    await settle_all(broker, deliveries, Succeeded())


@check
async def what_is_delayed_is_shown_and_comes_in_time(bench: Bench) -> None:
    """What is due next is first. A look makes nothing early or late, or ready."""
    broker = await bench.declared()
    now = time.time()
    dues = {"later": now + 900, "soon": now + 3.0, "much later": now + 1_000}
    for name, due in dues.items():
        await broker.publish([bench.envelope(name, due=due)])
    await becomes(broker, bench.queue, ready=0, delayed=3)
    while time.time() < now + 1.5:
        shown = await looked(broker, bench.queue, "delayed")
        if shown is not None:
            assert [text_of(one) for one in shown] == ["soon", "later", "much later"]
            assert [round((one.due or 0.0) - dues[text_of(one)], 2) for one in shown] == [0.0] * 3
            assert [text_of(one) for one in await broker.queues.peek(bench.queue.name, "delayed", limit=1)] == ["soon"]
    # On RabbitMQ what has waited on one step is ready for its next one.
    assert {text_of(one) for one in await looked(broker, bench.queue, "ready") or ()} <= {"soon"}
    taken = await bench.consumer(bench.broker())
    (delivery,) = await taken.next()
    assert text(delivery) == "soon"
    assert dues["soon"] <= time.time()
    await broker.settle([(delivery, Succeeded())])
    await becomes(broker, bench.queue, ready=0, delayed=2)


@check
async def what_does_not_wait_is_not_shown(bench: Bench) -> None:
    """What runs, and what is dead; of a paused queue what waits is. What was handed back waits again."""
    queue = bench.other_queue(kind="classic")
    broker = await bench.declared(queue)
    await broker.publish([bench.envelope(name, queue=queue.name) for name in "abc"])
    taken = await bench.consumer(bench.broker(), queue, credit=2)
    first, second = await taken.next(2)
    assert [text_of(one) for one in await broker.queues.peek(queue.name, "ready", limit=10)] == ["c"]
    await broker.queues.pause(queue.name)
    await taken.sees_paused(queue)
    await taken.consumer.stop()
    await settle_all(broker, [first], DeadLettered("no"))
    await settle_all(broker, [second], Released())
    await becomes(broker, queue, ready=2, running=0, dead=1)
    assert sorted(text_of(one) for one in await broker.queues.peek(queue.name, "ready", limit=10)) == ["b", "c"]


@check
async def a_queue_that_is_not_there_has_nothing_to_show(bench: Bench) -> None:
    broker = bench.broker()
    states: tuple[WaitingState, ...] = ("ready", "delayed")
    for state in states:
        with refused(QueueNotFound):
            await broker.queues.peek(bench.queue.name, state, limit=10)
