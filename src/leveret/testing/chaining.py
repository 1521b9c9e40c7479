"""What every broker must do with what an outcome sets going; see `leveret.testing.conformance`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.errors import LeaseLost
from leveret.model import Queue, Succeeded, new_id
from leveret.testing.bench import Taken, becomes, check, refused, text

if TYPE_CHECKING:
    from leveret.testing.bench import Bench


@check
async def what_follows_is_stored_with_the_outcome(bench: Bench) -> None:
    """In a queue that is not there yet, too; all that the envelope says arrives, and it is known by its id."""
    broker = await bench.declared()
    other = Queue(f"{bench.queue.name}-next-{new_id()[-8:]}")
    await broker.publish(bench.envelopes("a"))
    taken = await bench.consumer(broker)
    (first,) = await taken.next()
    here = bench.envelope("here", headers={"n": 2}, enqueued_at=float(int(time.time())))
    there = msgspec.structs.replace(bench.envelope("there"), queue=other.name)
    await broker.settle([(first, Succeeded(follow_ups=(here, there)))])
    (second,) = await taken.next()
    found = second.envelope
    assert (found.id, found.task, found.body, found.headers) == (here.id, here.task, here.body, here.headers)
    assert [status.is_final for status in await broker.statuses.read([found.id])] == [False]
    await broker.settle([(second, Succeeded())])
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)
    await becomes(broker, other, ready=1)
    await broker.queues.delete(other.name)


@check
async def what_follows_may_be_delayed(bench: Bench) -> None:
    """It is not handed out before it is due."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a"))
    taken = await bench.consumer(broker)
    (first,) = await taken.next()
    due = time.time() + 0.6
    await broker.settle([(first, Succeeded(follow_ups=(bench.envelope("later", due=due),)))])
    (later,) = await taken.next()
    assert text(later) == "later"
    assert time.time() >= due - 0.01


@check
async def a_lost_lease_sets_nothing_going(bench: Bench) -> None:
    """Who lost a delivery stores nothing behind it: whoever has it now does."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a"))
    async with broker.consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        (stale,) = await taken.next()
        taken.abandon()
    other = await bench.consumer(broker)
    (now,) = await other.next()
    after = bench.envelope("after")
    with refused(LeaseLost):
        await broker.settle([(stale, Succeeded(follow_ups=(after,)))])
    await other.nothing()
    await broker.settle([(now, Succeeded(follow_ups=(after,)))])
    assert await other.texts(1) == ["after"]


@check
async def many_follow_each_other(bench: Bench) -> None:
    """Several outcomes at once, some of which set something going."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcd"))
    taken = await bench.consumer(broker, credit=4)
    held = await taken.next(4)
    follow_ups = {one: (bench.envelope(f"{text(one)}2"),) if text(one) in "bd" else () for one in held}
    await broker.settle([(one, Succeeded(follow_ups=follow_ups[one])) for one in held])
    following = await taken.next(2)
    assert sorted(map(text, following)) == ["b2", "d2"]
    await asyncio.gather(*(broker.settle([(one, Succeeded())]) for one in following))
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)
