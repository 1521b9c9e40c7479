"""The connection to RabbitMQ is cut in every state: nothing is lost and nothing hangs."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import aio_pika
import pytest

from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import confirm_channel
from leveret.brokers.rabbitmq.consumer import RabbitMQConsumer, Session
from leveret.brokers.rabbitmq.queues import Publisher
from leveret.errors import BrokerRefused, LeaseLost, QueueFull
from leveret.model import DeadLettered, Envelope, Outcome, Queue, Released, Retrying, Succeeded, new_id
from leveret.testing.bench import batches_of
from tests.support.proxy import Proxy
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker, Consumer
    from leveret.brokers.rabbitmq.amqp import Message
    from leveret.model import Delivery
    from tests.support.nodes import Node

QUEUE = Queue("work")


def envelopes(count: int) -> list[Envelope]:
    return [Envelope(new_id(), QUEUE.name, "say", str(number).encode()) for number in range(count)]


class Reader:
    """Collects a consumer's deliveries in the background."""

    def __init__(self, consumer: Consumer) -> None:
        self.deliveries: list[Delivery] = []
        self.task = asyncio.create_task(self._read(consumer))

    async def _read(self, consumer: Consumer) -> None:
        async for batch in batches_of(consumer):
            self.deliveries.extend(batch)

    async def has(self, count: int) -> Sequence[Delivery]:
        async def enough() -> bool:
            return len(self.deliveries) >= count

        await until(enough, f"{count} deliveries came")
        return self.deliveries

    async def has_task(self, envelope: Envelope) -> Delivery:
        """The latest delivery of the task."""

        async def came() -> Delivery | None:
            return next((one for one in reversed(self.deliveries) if one.envelope.id == envelope.id), None)

        delivery = await until(came, "the task came")
        assert delivery is not None
        return delivery


async def counts(broker: Broker, **expected: int) -> None:
    seen: dict[str, int] = {}

    async def counted() -> bool:
        (stats,) = await broker.queues.stats([QUEUE.name])
        seen.update((name, getattr(stats, name)) for name in expected)
        return seen == expected

    try:
        await until(counted, f"the queue has {expected}")
    except AssertionError as error:
        raise AssertionError(f"{error}; it has {seen}") from None


async def test_cut_while_idle(node: Node) -> None:
    """Both a producer and a consumer mend it, and the next task arrives."""
    with Proxy(node.port) as proxy:
        broker = connect(proxy.url)
        await broker.declare([QUEUE])
        async with broker.consume([QUEUE], credit=10) as consumer:
            reader = Reader(consumer)
            for _ in range(3):
                proxy.cut()
                (envelope,) = envelopes(1)
                await broker.publish([envelope])
                await broker.settle([(await reader.has_task(envelope), Succeeded())])
            # An acknowledgment that was on the way when the connection was cut may be lost: then its task comes again.
            await settle_the_rest(broker, reader, 0)
            reader.task.cancel()
        await counts(broker, ready=0, running=0)
        await broker.close()


async def test_cut_while_publishing(node: Node) -> None:
    """What was confirmed is there; what was not is sent again. A task may be stored twice, none is lost."""
    with Proxy(node.port) as proxy:
        broker = connect(proxy.url, timeout=60.0)
        await broker.declare([QUEUE])
        sent = envelopes(3000)

        async def publish(part: Sequence[Envelope]) -> None:
            for start in range(0, len(part), 50):
                await broker.publish(part[start : start + 50])

        publishing = [asyncio.create_task(publish(sent[start::3])) for start in range(3)]
        for _ in range(5):
            before = proxy.accepted
            proxy.cut()

            async def mended(before: int = before) -> bool:
                return proxy.accepted > before or all(task.done() for task in publishing)

            await until(mended, "the producer connected again")
        await asyncio.gather(*publishing)
        async with broker.consume([QUEUE], credit=None) as consumer:
            # A quorum queue delivers 2,000 at most to a consumer without a limit, so they are settled as they come.
            reader = Reader(consumer)
            await settle_the_rest(broker, reader, 0)
            reader.task.cancel()
        assert {delivery.envelope.id for delivery in reader.deliveries} == {envelope.id for envelope in sent}
        await broker.close()


async def test_cut_while_consuming(node: Node) -> None:
    """What was delivered is delivered again, under a new lease; the old one settles nothing."""
    with Proxy(node.port) as proxy:
        broker, direct = connect(proxy.url), connect(node.url)
        await broker.declare([QUEUE])
        await broker.publish(envelopes(20))
        async with broker.consume([QUEUE], credit=20) as consumer:
            reader = Reader(consumer)
            stale = list(await reader.has(20))
            proxy.cut()
            fresh = list(await reader.has(40))[20:]
            assert not any(delivery.lease.held for delivery in stale)
            assert all(delivery.lease.held and delivery.returns == 1 for delivery in fresh)
            with pytest.raises(LeaseLost) as caught:
                await broker.settle([(delivery, Succeeded()) for delivery in stale])
            assert len(caught.value.ids) == 20
            await counts(direct, running=20)
            await broker.settle([(delivery, Succeeded()) for delivery in fresh])
            await counts(direct, ready=0, running=0)
            reader.task.cancel()
        await broker.close()
        await direct.close()


@pytest.mark.parametrize(
    "outcome",
    [Succeeded(), Retrying("again"), DeadLettered("why"), Released()],
    ids=lambda outcome: type(outcome).__name__,
)
async def test_cut_while_settling(node: Node, outcome: Outcome) -> None:
    """An outcome is recorded, or the task runs again; it is never lost and no settle hangs."""
    with Proxy(node.port) as proxy:
        broker, direct = connect(proxy.url), connect(node.url)
        await broker.declare([QUEUE])
        sent = envelopes(50)
        await broker.publish(sent)
        async with broker.consume([QUEUE], credit=None) as consumer:
            reader = Reader(consumer)
            first = list(await reader.has(50))
            settling = [asyncio.create_task(broker.settle([(delivery, outcome)])) for delivery in first]
            await asyncio.sleep(0)
            proxy.cut()
            async with asyncio.timeout(60):
                results = await asyncio.gather(*settling, return_exceptions=True)
            assert all(result is None or isinstance(result, LeaseLost) for result in results)
            # An acknowledgment has no answer in AMQP: one that was on the way when the connection was cut is not known
            # to have arrived. So what counts is that each task is somewhere: done, dead, or here again.
            await settle_the_rest(broker, reader, len(first))
            reader.task.cancel()
        letters = await direct.dead_letters.read(QUEUE.name, limit=200)
        dead = {letter.envelope.id for letter in letters}
        again = {delivery.envelope.id for delivery in reader.deliveries[50:]}
        kept = {delivery.envelope.id for delivery, result in zip(first, results, strict=True) if result is None}
        assert dead | again | kept >= {envelope.id for envelope in sent}
        if isinstance(outcome, DeadLettered):
            assert kept <= dead
        await counts(direct, ready=0, running=0)
        await broker.close()
        await direct.close()


async def settle_the_rest(broker: Broker, reader: Reader, settled: int) -> None:
    """Settle all deliveries but the first ``settled``, until the queue is empty."""

    async def none_left() -> bool:
        nonlocal settled
        held = [delivery for delivery in reader.deliveries[settled:] if delivery.lease.held]
        settled = len(reader.deliveries)
        with suppress(LeaseLost):
            await broker.settle([(delivery, Succeeded()) for delivery in held])
        (stats,) = await broker.queues.stats([QUEUE.name])
        return stats.ready == stats.running == 0 and stats.consumers == 1 and stats.silent_consumers == 0

    await until(none_left, "all that came is settled")


async def test_a_silent_peer_is_noticed_by_heartbeats(node: Node) -> None:
    """Half-open: no reset ever comes. Within (heartbeat + 1) x 3 seconds the consumer connects again."""
    with Proxy(node.port) as proxy:
        broker = connect(f"{proxy.url}?heartbeat=1")
        direct = connect(node.url)
        await direct.declare([QUEUE])
        async with broker.consume([QUEUE], credit=5) as consumer:
            reader = Reader(consumer)
            proxy.swallow()
            await direct.publish(envelopes(1))
            before = proxy.accepted

            async def noticed() -> bool:
                return proxy.accepted > before

            await until(noticed, "the consumer tried to connect again", within=20)
            proxy.resume()
            await reader.has(1)
            reader.task.cancel()
        await broker.close()
        await direct.close()


#: The server's confirm: class 60, method 80.
BASIC_ACK = b"\x00\x3c\x00\x50"
#: The method that opens a channel: class 20, method 10.
CHANNEL_OPEN = b"\x00\x14\x00\x0a"


async def test_a_connection_that_falls_silent_while_it_is_opened_is_opened_again(node: Node) -> None:
    """aiormq cancels what waits on a connection that it gives up: that is no cancellation of the caller's."""
    with Proxy(node.port) as proxy:
        direct = connect(node.url)
        await direct.declare([QUEUE])
        producer, worker = connect(f"{proxy.url}?heartbeat=1"), connect(f"{proxy.url}?heartbeat=1")
        async with worker.consume([QUEUE], credit=5) as consumer:
            reader = Reader(consumer)
            proxy.swallow_from(CHANNEL_OPEN)
            publishing = asyncio.create_task(producer.publish(envelopes(1)))
            await until(lambda: proxy.swallows, "the producer opens its channel")
            before = proxy.accepted
            await until(lambda: proxy.accepted >= before + 2, "both connect again")
            proxy.resume()
            await publishing
            await reader.has(1)
            reader.task.cancel()
        await producer.close()
        await worker.close()
        await direct.close()


async def test_a_worker_whose_connection_falls_silent_while_it_is_opened_goes_on(node: Node) -> None:
    with Proxy(node.port) as proxy:
        direct, worker = connect(node.url), connect(f"{proxy.url}?heartbeat=1")
        await direct.declare([QUEUE])
        async with worker.consume([QUEUE], credit=5) as consumer:
            reader = Reader(consumer)
            proxy.swallow_from(CHANNEL_OPEN)
            proxy.cut()
            await until(lambda: proxy.swallows, "the worker opens its channel again")
            before = proxy.accepted
            await until(lambda: proxy.accepted > before, "it connects once more")
            proxy.resume()
            await direct.publish(envelopes(1))
            await reader.has(1)
            reader.task.cancel()
        await worker.close()
        await direct.close()


async def test_a_connection_that_confirms_nothing_is_replaced(node: Node) -> None:
    """It answers, as a node without its cluster's majority does. What it left unconfirmed is sent again."""
    with Proxy(node.port) as proxy:
        producer = connect(proxy.url)
        await producer.declare([QUEUE])
        await producer.publish(envelopes(1))
        proxy.keep_back(BASIC_ACK)
        before = proxy.accepted
        publishing = [asyncio.create_task(producer.publish(envelopes(1))) for _ in range(3)]
        await until(lambda: proxy.accepted > before, "the producer connects again")
        proxy.keep_back(None)
        await asyncio.gather(*publishing)
        await counts(producer, ready=7)
        await producer.close()


async def test_a_large_task_has_its_time_on_a_slow_line(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer than a silent connection has: what leaves is a sign of life."""
    monkeypatch.setattr(confirm_channel, "SILENCE", 1.0)
    with Proxy(node.port) as proxy:
        producer = connect(proxy.url)
        await producer.declare([QUEUE])
        await producer.publish(envelopes(1))
        before = proxy.accepted
        proxy.slow(0.2)
        await producer.publish([Envelope(new_id(), QUEUE.name, "say", bytes(1_000_000))])
        assert proxy.accepted == before
        proxy.slow(0)
        await producer.close()


async def test_a_refusal_is_asked_for_again_on_a_new_connection(node: Node) -> None:
    """A channel of RabbitMQ 3.10 may refuse for ever what another would take; at most once in five seconds."""
    with Proxy(node.port) as proxy:
        producer = connect(proxy.url)
        await producer.declare([Queue("other", max_length=1)])
        refused = 0
        while not refused:  # the limit is approximate
            try:
                await producer.publish([Envelope(new_id(), "other", "say", b"")])
            except QueueFull:
                refused += 1
        assert proxy.accepted == 2
        with pytest.raises(QueueFull):
            await producer.publish([Envelope(new_id(), "other", "say", b"")])
        assert proxy.accepted == 2
        await producer.close()


async def test_the_queue_is_deleted_under_its_consumer(node: Node) -> None:
    """It is declared again, and work goes on."""
    broker = connect(node.url)
    await broker.declare([QUEUE])
    async with await aio_pika.connect(node.url) as operator, broker.consume([QUEUE], credit=5) as consumer:
        reader = Reader(consumer)
        channel = await operator.channel()
        for round_ in range(1, 4):
            await channel.queue_delete(QUEUE.name)
            await broker.publish(envelopes(1))
            (*_, delivery) = await reader.has(round_)
            await broker.settle([(delivery, Succeeded())])
        reader.task.cancel()
    await broker.close()


async def test_a_queue_that_is_made_again_is_not_consumed_after_a_stop(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """A new queue is left alone for a moment, and the stop comes in that."""
    broker, queue = connect(node.url), Queue(QUEUE.name, kind="classic")
    async with await aio_pika.connect(node.url) as operator, broker.consume([queue], credit=5) as consumer:
        assert isinstance(consumer, RabbitMQConsumer)
        assert consumer._session is not None
        session = consumer._session
        always = len(session.repairs.running)
        channel = await operator.channel()
        await channel.queue_delete(QUEUE.name)
        await until(lambda: "making it again" in caplog.text, "the deletion is seen")
        await consumer.stop()
        await until(lambda: len(session.repairs.running) <= always, "the queue is there again")
        await broker.publish(envelopes(3))
        await counts(broker, ready=3, running=0)
        assert (await channel.declare_queue(QUEUE.name, passive=True)).declaration_result.consumer_count == 0
    assert [arrival async for arrival in consumer] == []
    await broker.close()


async def test_a_copy_that_is_being_stored_is_waited_for(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker leaves while it puts off what is not due yet: that is not in its queue and delayed as well."""
    broker, producer = connect(node.url), connect(node.url)
    publish, stored = Publisher.publish, asyncio.Event()

    async def publish_slowly(publisher: Publisher, messages: Sequence[Message]) -> None:
        await publish(publisher, messages)
        stored.set()
        await asyncio.sleep(0.3)

    await producer.declare([QUEUE])
    async with await aio_pika.connect(node.url) as operator, broker.consume([QUEUE], credit=5):
        monkeypatch.setattr(Publisher, "publish", publish_slowly)
        channel = await operator.channel()
        headers: dict[str, aio_pika.abc.FieldValue] = {"leveret-due": int((time.time() + 600) * 1000)}
        early = aio_pika.Message(b"{}", message_id="early", type="say", delivery_mode=2, headers=headers)
        await channel.default_exchange.publish(early, QUEUE.name)
        await stored.wait()
    await counts(producer, ready=0, running=0, delayed=1)
    await broker.close()
    await producer.close()


async def test_a_session_that_could_not_begin_leaves_nothing_to_do(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notice may have come before it was refused."""
    begun: list[Session] = []

    async def begin(session: Session, *_: object) -> None:
        async def work(_: Queue) -> None:
            await asyncio.Event().wait()

        begun.append(session)
        session.repairs.mend(QUEUE, work)
        raise BrokerRefused("no")

    monkeypatch.setattr(Session, "begin", begin)
    broker = connect(node.url)
    with pytest.raises(BrokerRefused, match="no"):
        async with broker.consume([QUEUE], credit=5):
            pass
    assert begun
    assert not any(session.repairs.running for session in begun)
    await broker.close()
