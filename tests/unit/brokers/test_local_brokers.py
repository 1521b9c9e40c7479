"""What the brokers that need no server promise alike: each test runs on the memory and on the SQLite broker."""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from leveret.errors import LeaseLost, QueueFull, QueueNotFound
from leveret.model import DeadLettered, Retrying, Succeeded
from leveret.model.status import settled, started
from leveret.testing.bench import Bench, batches_of, becomes, text
from leveret.testing.following import ended, published, sent, status_of
from tests.support.waiting import until

if TYPE_CHECKING:
    from tests.conftest import Place

pytestmark = pytest.mark.parametrize("any_place", ["memory", "sqlite"], indirect=True)


async def test_who_lost_a_task_changes_nothing_of_what_is_known(any_place: Place) -> None:
    """Another one has run it: its word stays. What the same call tells of others is kept."""
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        broker = await bench.declared()
        first, second, early = (sent(bench, text) for text in ("first", "second", "early"))
        await broker.publish([first])
        async with bench.broker().consume([bench.queue], credit=1) as consumer:
            (stale,) = await anext(batches_of(consumer))
        taken = await bench.consumer(broker)
        (delivery,) = await taken.next()
        await ended(broker, delivery, Succeeded(b"1"))
        await broker.publish([second])
        (other,) = await taken.next()
        with pytest.raises(LeaseLost):
            await broker.settle(
                [(stale, DeadLettered("no")), (other, Succeeded(b"2"))],
                [
                    settled(first, "check", DeadLettered("no"), time.time()),
                    settled(second, "check", Succeeded(b"2"), time.time()),
                    settled(early, "check", Succeeded(b"3"), time.time()),  # acknowledged before it ran
                ],
            )
        assert bytes((await status_of(broker, first.id, "succeeded")).encoded_result) == b"1"
        assert bytes((await status_of(broker, second.id, "succeeded")).encoded_result) == b"2"
        assert bytes((await status_of(broker, early.id, "succeeded")).encoded_result) == b"3"


async def test_what_is_due_is_queued_though_nobody_consumes(any_place: Place) -> None:
    """Nobody has to look before: whoever asks is told so."""
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        broker, other = await bench.declared(), bench.broker()
        told, untold = (sent(bench, text, due=time.time() + 0.2) for text in ("told", "untold"))
        async with broker.statuses.watch():
            await published(broker, told)
            await broker.publish([untold])
        assert (await status_of(other, told.id, "delayed")).due == told.due
        for envelope in (told, untold):
            assert (await status_of(other, envelope.id, "queued")).due is None
        (stats,) = await other.queues.stats()
        assert (stats.ready, stats.delayed) == (2, 0)


async def test_what_is_due_fills_its_queue(any_place: Place) -> None:
    """Whoever enqueues is told so, though nobody has counted or consumed since."""
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        queue = bench.other_queue(max_length=1)
        broker = await bench.declared(queue)
        due = time.time() + 0.2
        await broker.publish([sent(bench, "later", queue=queue.name, due=due)])

        async def is_due() -> bool:
            return time.time() > due + 0.01

        await until(is_due, "it is due")
        with pytest.raises(QueueFull):
            await broker.publish([sent(bench, "one too many", queue=queue.name)])


async def test_what_becomes_due_goes_to_the_end(any_place: Place) -> None:
    """What was enqueued while it was not due stands before it; of several the first that is due comes first."""
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        broker = await bench.declared()
        await broker.publish([bench.envelope("retried")])
        taken = await bench.consumer(broker, credit=1)
        (delivery,) = await taken.next()
        await broker.publish([bench.envelope("runs")])
        await broker.settle([(delivery, Retrying("no", delay=0.2))])
        await broker.publish([bench.envelope("last", due=time.time() + 0.3)])
        (delivery,) = await taken.next()
        assert text(delivery) == "runs"
        await broker.publish([bench.envelope("meanwhile")])
        await becomes(broker, bench.queue, ready=3, delayed=0)
        order: list[str] = []
        while len(order) < 3:
            await broker.settle([(delivery, Succeeded())])
            (delivery,) = await taken.next()
            order.append(text(delivery))
        await broker.settle([(delivery, Succeeded())])
        assert order == ["meanwhile", "retried", "last"]


async def test_an_id_that_is_used_again_has_no_past(any_place: Place) -> None:
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        broker = await bench.declared()
        taken = await bench.consumer(broker)
        for age, result in ((3_000.0, b"1"), (0.0, b"2")):
            envelope = bench.envelope(result.decode(), id="invoice-42", enqueued_at=time.time() - age)
            await published(broker, envelope)
            (delivery,) = await taken.next()
            await broker.statuses.notify([started(envelope, "check", time.time())])
            await ended(broker, delivery, Succeeded(result))
        status = await status_of(broker, envelope.id, "succeeded")
        assert (status.enqueued_at, bytes(status.encoded_result)) == (envelope.enqueued_at, b"2")
        assert [moment.state for moment in status.history] in (["running"], ["queued", "running"])


async def test_a_revived_task_keeps_its_history(any_place: Place) -> None:
    async with AsyncExitStack() as stack:
        bench = Bench(any_place.open, stack)
        broker = await bench.declared()
        envelope = bench.envelope("a", enqueued_at=time.time() - 3_000)
        await published(broker, envelope)
        taken = await bench.consumer(broker)
        (delivery,) = await taken.next()
        await ended(broker, delivery, DeadLettered("broken"))
        await broker.dead_letters.retry(bench.queue.name, [envelope.id])
        (delivery,) = await taken.next()
        await ended(broker, delivery, Succeeded(b"1"))
        status = await status_of(broker, envelope.id, "succeeded")
        assert [moment.state for moment in status.history][-2:] == ["dead", "queued"]


async def test_deciding_about_the_dead_of_a_queue_that_is_not_there_is_refused(any_place: Place) -> None:
    """It is misspelt: that nothing was found would look as if nothing were dead."""
    async with AsyncExitStack() as stack:
        broker = await Bench(any_place.open, stack).declared()
        for decide in (broker.dead_letters.retry, broker.dead_letters.drop):
            with pytest.raises(QueueNotFound, match="misspelt"):
                await decide("misspelt", ["1"])
