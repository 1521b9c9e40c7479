"""RabbitMQ queues at their limit: who gives a task to one that is full, and who has something else to do meanwhile."""

from __future__ import annotations

import asyncio
import importlib
import time
from functools import partial
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.errors import QueueFull
from leveret.model import DeadLettered, Envelope, Queue, Succeeded, new_id
from leveret.model.status import settled
from leveret.testing.bench import Taken
from tests.support.cluster import Cluster
from tests.support.waiting import until

if TYPE_CHECKING:
    from leveret.brokers import Broker
    from tests.support.nodes import Node

SMALL = Queue("work", max_length=1)
OTHER = Queue("other")
#: Fewer than the 2,000 that a quorum queue delivers to a consumer without a limit before any is settled.
COUNT = 1_800


def envelope(queue: Queue = SMALL) -> Envelope:
    return Envelope(new_id(), queue.name, "say", b"{}", enqueued_at=time.time())


async def fill(broker: Broker, queue: Queue) -> None:
    """Until it refuses: a quorum queue takes a few more than its limit."""
    try:
        while True:
            await broker.publish([envelope(queue)])
    except QueueFull:
        pass


async def test_a_task_that_is_not_due_yet_finds_its_queue_full(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its delay queues take longer to make than it has to wait, so it would go back to its queue: it runs when due."""
    declare = importlib.import_module("leveret.brokers.rabbitmq.queues.declare")
    monkeypatch.setattr(declare, "have_names_written", lambda *_: asyncio.sleep(2.0))
    broker, producer = connect(node.url), connect(node.url)
    await producer.declare([SMALL])
    async with await aio_pika.connect(node.url) as operator, broker.consume([SMALL], credit=1) as consumer:
        channel = await operator.channel()
        due = time.time() + 1.5
        headers: dict[str, aio_pika.abc.FieldValue] = {"leveret-due": int(due * 1000)}
        early = aio_pika.Message(b"{}", message_id="early", type="say", delivery_mode=2, headers=headers)
        await channel.default_exchange.publish(early, SMALL.name)
        await fill(producer, SMALL)
        taken = Taken(consumer)
        (delivery,) = await taken.next()
        assert delivery.envelope.id == "early"
        assert time.time() >= due
        await broker.settle([(delivery, Succeeded())])
        (delivery,) = await taken.next()
        assert delivery.envelope.id != "early"
        taken.abandon()
    await broker.close()
    await producer.close()


async def test_what_is_on_the_way_elsewhere_is_stored_once(node: Node) -> None:
    """A refusal is asked for again on a new connection; whoever publishes to another queue does not notice."""
    broker = RabbitMQBroker(node.url, timeout=20.0)
    await broker.declare([SMALL, OTHER])
    await fill(broker, SMALL)
    broker._publisher._doubted_at = float("-inf")
    before = await broker._publisher.connection()
    others = broker.publish([envelope(OTHER) for _ in range(COUNT)])
    refused, stored = await asyncio.gather(broker.publish([envelope()]), others, return_exceptions=True)
    assert isinstance(refused, QueueFull)
    assert stored is None
    assert await broker._publisher.connection() is not before
    await until(lambda: amqp.is_lost(before), "the old connection is closed")
    async with broker.consume([OTHER], credit=None) as consumer:
        taken = Taken(consumer)
        assert len({delivery.envelope.id for delivery in await taken.next(COUNT)}) == COUNT
        await taken.nothing()
        taken.abandon()
    await broker.close()


async def test_dead_letters_for_which_there_is_room_are_put_back(node: Node) -> None:
    """Those alone: what is stored is dead no more, or it would be put back, and run, again."""
    queue = Queue("work", kind="classic", max_length=3)
    broker = connect(node.url)
    await broker.declare([queue])
    ids: list[str] = []
    async with broker.consume([queue], credit=10) as consumer:
        taken = Taken(consumer)
        for _ in range(8):
            await broker.publish([envelope(queue)])
            (delivery,) = await taken.next()
            outcome = DeadLettered("no")
            await broker.settle([(delivery, outcome)], [settled(delivery.envelope, "say", outcome, time.time())])
            ids.append(delivery.envelope.id)
        taken.abandon()
    with pytest.raises(QueueFull) as caught:
        await broker.dead_letters.retry(queue.name, ids)
    refused = set(caught.value.ids)
    assert 0 < len(refused) < len(ids)
    assert {letter.envelope.id for letter in await broker.dead_letters.read(queue.name, limit=100)} == refused
    states = {status.id: status.state for status in await broker.statuses.read(ids)}
    assert states == {id_: "dead" if id_ in refused else "queued" for id_ in ids}
    await broker.close()


async def overshoot(node: Node, limit: int, how: str) -> int:
    """How many more than its limit a queue holds after one program has given it far too many."""
    queue = Queue("work", max_length=limit)
    broker = connect(node.url, timeout=60.0)
    await broker.declare([queue])
    if how == "single":
        await fill(broker, queue)
    elif how == "concurrent":
        await asyncio.gather(*(broker.publish([envelope(queue)]) for _ in range(1_000)), return_exceptions=True)
    else:
        for _ in range(3):
            with pytest.raises(QueueFull):
                await broker.publish([envelope(queue) for _ in range(1_000)])
    (stats,) = await broker.queues.stats(["work"])
    await broker.close()
    return stats.ready - limit


@pytest.mark.parametrize("limit", [1, 10, 50])
@pytest.mark.parametrize("how", ["single", "concurrent", "many"])
async def test_the_limit_is_held_but_for_a_few(node: Node, limit: int, how: str) -> None:
    """As docs/guarantees.md says."""
    assert 0 <= await overshoot(node, limit, how) <= 32


async def test_a_limit_that_others_gave_a_queue_is_held_too(node: Node) -> None:
    """It is in the queue's arguments, and not in the application."""
    async with await aio_pika.connect(node.url) as operator:
        channel = await operator.channel()
        arguments: dict[str, aio_pika.abc.FieldValue] = {
            "x-queue-type": "quorum",
            "x-max-length": 10,
            "x-overflow": "reject-publish",
        }
        await channel.declare_queue("work", durable=True, arguments=arguments)
    broker = connect(node.url, timeout=60.0)
    await broker.declare([Queue("work")])
    publishing = (broker.publish([envelope(Queue("work"))]) for _ in range(1_000))
    refused = [one for one in await asyncio.gather(*publishing, return_exceptions=True) if one is not None]
    assert {type(one) for one in refused} == {QueueFull}
    assert 1_000 - len(refused) <= 10 + 32
    await broker.close()


async def test_a_limit_of_a_policy_is_found_out(node: Node) -> None:
    """A queue without a limit may refuse for want of a leader, so it takes a moment; from then on it is known."""
    broker = connect(node.url, timeout=60.0)
    await broker.declare([Queue("work")])
    policy = '{"max-length": 3, "overflow": "reject-publish"}'
    await asyncio.to_thread(node.ctl, "set_policy", "small", "^work$", policy, "--apply-to", "queues")
    try:
        await fill(broker, Queue("work"))
        assert "work" in broker._publisher.limits  # type: ignore[attr-defined]
        with pytest.raises(QueueFull):
            await broker.publish([envelope(Queue("work"))])
    finally:
        await asyncio.to_thread(node.ctl, "clear_policy", "small")
    await broker.close()


@pytest.mark.rabbitmq
@pytest.mark.timeout(400)
def test_an_election_is_no_limit() -> None:
    """RabbitMQ 3.10 refuses what is published while a queue elects its leader: nobody is told that it is full."""
    with Cluster("3.10") as cluster:
        asyncio.run(enqueue_while_leaders_die(cluster))


async def enqueue_while_leaders_die(cluster: Cluster) -> None:
    broker = RabbitMQBroker(cluster.url, timeout=60.0)
    await broker.declare([OTHER])
    stored, is_over = 0, asyncio.Event()

    async def produce() -> None:
        nonlocal stored
        while not is_over.is_set():
            await broker.publish([envelope(OTHER)])  # raises nothing
            stored += 1

    async def has_stored(count: int) -> bool:
        return stored > count

    async with asyncio.TaskGroup() as producers:
        for _ in range(20):
            producers.create_task(produce())
        for _ in range(2):
            node = await asyncio.to_thread(cluster.leader, OTHER.name)
            node.kill()
            enough = stored + 100
            await until(partial(has_stored, enough), "another leader takes what is published")
            node.start()
            await asyncio.to_thread(node.wait)
            await asyncio.to_thread(cluster.wait_for_running, 3)
        is_over.set()
    await broker.close()
