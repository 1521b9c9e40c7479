"""Checks of unique keys; see `conformance`."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from leveret.errors import DuplicateTask, QueueNotFound
from leveret.model import (
    ID_FOR,
    ID_TOKEN,
    UNIQUE_CONFLICT,
    UNIQUE_FOR,
    UNIQUE_KEY,
    UNIQUE_LATEST,
    UNIQUE_SCOPE,
    Cancelled,
    DeadLettered,
    KeyHolder,
    Released,
    Retrying,
    Succeeded,
    enqueued,
    id_key,
    new_id,
)
from leveret.testing.bench import Bench, Taken, becomes, check, refused, settle_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker
    from leveret.model import Envelope, Outcome

#: A key is free so soon after its task has ended (seconds).
FREE = 1.0


def keyed(bench: Bench, text: str, key: str = "", **changes: object) -> Envelope:
    """A task with a unique key of this check's own."""
    return bench.envelope(text, headers={UNIQUE_KEY: f"{bench.queue.name}:{key}"}, **changes)


async def admitted(broker: Broker, envelope: Envelope) -> str:
    """The id of the task that has the key now."""
    return (await broker.publish([envelope], on_conflict="ignore") or {}).get(envelope.id, envelope.id)


async def becomes_free(broker: Broker, envelope: Envelope) -> None:
    """Wait until the task is admitted; fails when that takes too long."""
    ended = time.monotonic()
    while (holder := await admitted(broker, envelope)) != envelope.id:
        assert time.monotonic() < ended + FREE, f"{FREE:g} s after the end the key is still that of {holder}"
        await asyncio.sleep(0.02)


@check
async def a_unique_key_admits_one(bench: Bench) -> None:
    """Whoever publishes: the first with a key is stored, and the others are told its id. Other keys are not minded."""
    brokers = [await bench.declared() for _ in range(3)]
    first = keyed(bench, "first")
    assert not await brokers[0].publish([first], on_conflict="ignore")
    others = [keyed(bench, f"{number}") for number in range(30)]
    found = await asyncio.gather(*(admitted(brokers[n % 3], one) for n, one in enumerate(others)))
    assert set(found) == {first.id}
    assert await admitted(brokers[1], keyed(bench, "another", key="2")) != first.id
    await becomes(brokers[0], bench.queue, ready=2)


@check
async def at_once_exactly_one_is_admitted(bench: Bench) -> None:
    """Several publish with one key at the same time: one is stored, and all are told of the same one."""
    brokers = [await bench.declared() for _ in range(3)]
    for turn in range(5):
        racing = [keyed(bench, f"{number}", key=f"{turn}") for number in range(9)]
        holders = await asyncio.gather(*(admitted(brokers[n % 3], one) for n, one in enumerate(racing)))
        assert len(set(holders)) == 1
        assert holders[0] in {one.id for one in racing}
    await becomes(brokers[0], bench.queue, ready=5)


@check
async def a_taken_key_may_be_an_error(bench: Bench) -> None:
    """ "raise": DuplicateTask names the refused and the one that is there, and nothing of the call is stored."""
    broker = await bench.declared()
    first, plain, again = keyed(bench, "first"), bench.envelope("plain"), keyed(bench, "again")
    await broker.publish([first])
    fresh = keyed(bench, "fresh", key="2")
    with refused(DuplicateTask) as caught:
        await broker.publish([plain, fresh, again])
    error = caught[0]
    assert isinstance(error, DuplicateTask)
    assert (error.ids, error.existing) == ((again.id,), {again.id: first.id})
    await becomes(broker, bench.queue, ready=1)
    await becomes_free(broker, keyed(bench, "later", key="2"))


@check
async def many_of_one_call_are_told_apart(bench: Bench) -> None:
    """Of one call's tasks with the same key the first is stored; what has no key, or another one, is stored beside."""
    broker = await bench.declared()
    tasks = [keyed(bench, "a"), bench.envelope("b"), keyed(bench, "c"), keyed(bench, "d", key="2")]
    assert await broker.publish(tasks, on_conflict="ignore") == {tasks[2].id: tasks[0].id}
    await becomes(broker, bench.queue, ready=3)


@check
async def the_end_of_a_task_frees_its_key(bench: Bench) -> None:
    """Whatever the end: a success, a dead letter, a cancellation. Until then the key is taken, while it runs too."""
    broker, worker = await bench.declared(), bench.broker()
    taken = await bench.consumer(worker, credit=1)
    holder = keyed(bench, "0")
    await broker.publish([holder])
    outcomes: list[Outcome] = [Succeeded(), DeadLettered("no"), Cancelled("unwanted"), Succeeded()]
    for number, outcome in enumerate(outcomes):
        deliveries = await taken.next()
        assert await admitted(broker, keyed(bench, "too soon")) == holder.id
        await settle_all(worker, deliveries, outcome)
        holder = keyed(bench, f"{number + 1}")
        await becomes_free(broker, holder)


@check
async def a_key_outlasts_retries_and_hand_backs(bench: Bench) -> None:
    """A task that is delayed, tried again or handed back keeps its key."""
    broker, worker = await bench.declared(), bench.broker()
    holder = keyed(bench, "task", due=time.time() + 0.5)
    await broker.publish([holder])
    taken = await bench.consumer(worker)
    for outcome in (Retrying("once more", delay=0.1), Released(), Retrying("again")):
        assert await admitted(broker, keyed(bench, "other")) == holder.id
        (delivery,) = await taken.next()
        assert delivery.envelope.headers == holder.headers
        await settle_all(worker, [delivery], outcome)
    assert await admitted(broker, keyed(bench, "other")) == holder.id
    await settle_all(worker, await taken.next(), Succeeded())
    await becomes_free(broker, keyed(bench, "next"))


@check
async def a_dead_letter_that_lives_again_takes_its_key(bench: Bench) -> None:
    """A dead letter holds no key. It takes it when it is put back; while another task has it, it stays dead."""
    broker, worker = await bench.declared(), bench.broker()
    taken = await bench.consumer(worker)
    dead = keyed(bench, "dead")
    await broker.publish([dead])
    await settle_all(worker, await taken.next(), DeadLettered("no"))
    other = keyed(bench, "other")
    await becomes_free(broker, other)
    assert await broker.dead_letters.retry(bench.queue.name, [dead.id]) == []
    assert [one.envelope.id for one in await broker.dead_letters.read(bench.queue.name, limit=9)] == [dead.id]
    await settle_all(worker, await taken.next(), Succeeded())
    assert await _revived(broker, bench, dead.id) == [dead.id]
    assert await admitted(broker, keyed(bench, "too soon")) == dead.id
    (again,) = await taken.next()
    assert again.envelope.id == dead.id
    await settle_all(worker, [again], Succeeded())
    await becomes_free(broker, keyed(bench, "next"))


async def _revived(broker: Broker, bench: Bench, id_: str) -> Sequence[str]:
    for _ in range(20):
        if found := await broker.dead_letters.retry(bench.queue.name, [id_]):
            return found
        await asyncio.sleep(0.05)
    return []


@check
async def a_cancelled_task_frees_its_key(bench: Bench) -> None:
    """One that waits, and is cancelled, has ended: its key is free, though nobody consumes."""
    broker = await bench.declared()
    waiting = keyed(bench, "waiting")
    await broker.publish([waiting])
    await broker.statuses.notify([enqueued(waiting, time.time())])
    status = await broker.control.cancel(waiting.id)
    assert status is not None
    assert status.state == "cancelled"
    await becomes_free(broker, keyed(bench, "next"))


@check
async def a_key_may_be_taken_for_a_while(bench: Bench) -> None:
    """From the enqueueing on for so long, whatever becomes of the task: a success, a purge, a cancellation."""
    broker, worker = await bench.declared(), bench.broker()

    def brief(text: str, key: str) -> Envelope:
        one = keyed(bench, text, key)
        return one.with_headers({UNIQUE_FOR: 3_000})

    began = time.monotonic()
    first = [brief(text, text) for text in "abc"]
    await broker.publish(first)
    taken = await bench.consumer(worker, credit=1)
    await settle_all(worker, await taken.next(), Succeeded())
    await broker.control.cancel(first[1].id)
    await broker.queues.purge(bench.queue.name, force=True)
    holders = [await admitted(broker, brief("too soon", text)) for text in "abc"]
    if time.monotonic() - began < 3:
        assert holders == [one.id for one in first]
    await asyncio.sleep(max(0.0, began + 3.1 - time.monotonic()))
    # Those of a slow machine are there by now, and have the keys for as long.
    after = brief("after", "a")
    for _ in range(400):
        if (holder := await admitted(broker, after)) == after.id:
            break
        await asyncio.sleep(0.02)
    assert holder == after.id


@check
async def a_key_may_be_freed_while_its_task_runs(bench: Bench) -> None:
    """By whoever has the task. Its end is not the next one's, and retried it takes no key again."""
    broker, worker = await bench.declared(), bench.broker()
    first, second = keyed(bench, "first"), keyed(bench, "second")
    key = first.headers[UNIQUE_KEY]
    await broker.publish([first])
    taken = await bench.consumer(worker, credit=2)
    (delivery,) = await taken.next()
    await worker.unique.free([(key, second.id), (f"{key}?", first.id)])
    assert await admitted(broker, keyed(bench, "too soon")) == first.id
    await worker.unique.free([(key, first.id)])
    assert await admitted(broker, second) == second.id
    await settle_all(worker, [delivery], Retrying("again"))
    again = {one.envelope.id: one for one in await taken.next(2)}
    await settle_all(worker, [again[first.id]], Succeeded())
    assert await admitted(broker, keyed(bench, "third")) == second.id


@check
async def a_key_may_be_released(bench: Bench) -> None:
    """It is listed with its task while it is taken. Released, it is the next one's, whatever becomes of the first."""
    broker, worker = await bench.declared(), bench.broker()
    first, second = keyed(bench, "first"), keyed(bench, "second")
    key = first.headers[UNIQUE_KEY]
    assert await broker.unique.release(key) is None
    await broker.publish([first])
    mine = [one for one in await broker.unique.holders(1_000_000) if one.key == key]
    assert mine == [KeyHolder(key, first.id, bench.queue.name)]
    assert await broker.unique.release(key) == first.id
    assert await admitted(broker, second) == second.id
    taken = await bench.consumer(worker, credit=2)
    (delivery, _) = await taken.next(2)
    assert delivery.envelope.id == first.id
    await settle_all(worker, [delivery], Succeeded())
    assert await admitted(broker, keyed(bench, "third")) == second.id


@check
async def a_purged_task_frees_its_key(bench: Bench) -> None:
    """What is deleted with its queue's tasks has ended."""
    broker = await bench.declared()
    await broker.publish([keyed(bench, "a"), keyed(bench, "b", key="2", due=time.time() + 600)])
    await broker.queues.purge(bench.queue.name)
    await becomes_free(broker, keyed(bench, "next"))
    await becomes_free(broker, keyed(bench, "next", key="2"))
    await broker.queues.delete(bench.queue.name)
    await broker.declare([bench.queue])
    await becomes_free(broker, keyed(bench, "last"))


def own_id(bench: Bench, text: str, /, **changes: object) -> Envelope:
    """A task with an id that its producer chose; ``id``: the same as another one's."""
    one = bench.envelope(text, **{"id": f"{bench.queue.name}:own", **changes})
    return one.with_headers({ID_TOKEN: new_id()})


async def is_stored(broker: Broker, envelope: Envelope) -> bool:
    """Whether it is stored, and not another task with its id there."""
    existing = await broker.publish([envelope], on_conflict="ignore")
    assert existing in (None, {envelope.id: envelope.id})
    return existing is None


async def id_becomes_free(broker: Broker, envelope: Envelope) -> None:
    """Wait until the task is stored; fails when that takes too long."""
    ended = time.monotonic()
    while not await is_stored(broker, envelope):
        assert time.monotonic() < ended + FREE, f"{FREE:g} s after the end the id is still taken"
        await asyncio.sleep(0.02)


@check
async def an_id_of_ones_own_is_there_once(bench: Bench) -> None:
    """While its task waits, runs, and is tried again; in every queue. The error names it, and nothing is stored."""
    other = bench.other_queue()
    broker, worker = await bench.declared(), await bench.declared(other)
    await worker.declare([bench.queue])
    taken = await bench.consumer(worker, credit=1)
    await broker.publish([own_id(bench, "first", due=time.time() + 0.5)])
    outcomes: list[Outcome | None] = [Retrying("again", delay=0.1), Released(), Retrying("again"), None]
    for outcome in outcomes:
        fresh = bench.envelope("fresh")
        with refused(DuplicateTask) as caught:
            await worker.publish([fresh, own_id(bench, "again", queue=other.name)])
        error = caught[0]
        assert isinstance(error, DuplicateTask)
        assert (error.ids, error.existing) == ((f"{bench.queue.name}:own",), {})
        assert not await is_stored(broker, own_id(bench, "again"))
        if outcome is not None:
            await settle_all(worker, await taken.next(), outcome)
    await settle_all(worker, await taken.next(), Succeeded())
    await id_becomes_free(broker, own_id(bench, "next"))
    await becomes(broker, other, ready=0)


@check
async def at_once_one_id_is_stored_once(bench: Bench) -> None:
    """Whoever publishes it, and whatever else is in the call."""
    brokers = [await bench.declared() for _ in range(3)]
    for turn in range(5):
        racing = [own_id(bench, f"{turn}", id=f"{bench.queue.name}:{turn}") for _ in range(9)]
        calls = [
            brokers[number % 3].publish([bench.envelope("beside"), one], on_conflict="ignore")
            for number, one in enumerate(racing)
        ]
        existing = [one for one in await asyncio.gather(*calls) if one is not None]
        assert existing == [{racing[0].id: racing[0].id}] * 8
    await becomes(brokers[0], bench.queue, ready=5 * 10)


@check
async def a_dead_letter_has_its_id_still(bench: Bench) -> None:
    """Until it is dropped; a purge leaves it. Put back, it has it as well."""
    broker, worker = await bench.declared(), bench.broker()
    taken = await bench.consumer(worker, credit=1)
    first = own_id(bench, "first")
    await broker.publish([first])
    await settle_all(worker, await taken.next(), DeadLettered("no"))
    await becomes(broker, bench.queue, dead=1)
    await broker.queues.purge(bench.queue.name, force=True)
    assert not await is_stored(broker, own_id(bench, "too soon"))
    assert await _revived(broker, bench, first.id) == [first.id]
    assert not await is_stored(broker, own_id(bench, "too soon"))
    await settle_all(worker, await taken.next(), DeadLettered("no"))
    await becomes(broker, bench.queue, dead=1)
    assert not await is_stored(broker, own_id(bench, "too soon"))
    assert await broker.dead_letters.drop(bench.queue.name, [first.id]) == [first.id]
    await id_becomes_free(broker, own_id(bench, "next"))


@check
async def an_id_is_free_when_its_task_is_gone(bench: Bench) -> None:
    """Cancelled before it ran, or while it did; purged; deleted with its queue, a dead letter too."""
    broker, worker = await bench.declared(), bench.broker()
    waiting = own_id(bench, "waiting")
    await broker.publish([waiting])
    await broker.statuses.notify([enqueued(waiting, time.time())])
    await broker.control.cancel(waiting.id)
    other = own_id(bench, "purged", id=f"{bench.queue.name}:other")
    await broker.publish([other])
    await broker.queues.purge(bench.queue.name)
    await id_becomes_free(broker, own_id(bench, "running", id=other.id))
    async with worker.consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        await settle_all(worker, await taken.next(), Cancelled("unwanted"))
        await id_becomes_free(broker, own_id(bench, "dead", id=other.id))
        await settle_all(worker, await taken.next(), DeadLettered("no"))
        taken.abandon()
    await becomes(broker, bench.queue, dead=1, consumers=0)
    await broker.queues.delete(bench.queue.name)
    await broker.declare([bench.queue])
    await id_becomes_free(broker, own_id(bench, "next", id=other.id))
    await id_becomes_free(broker, own_id(bench, "after the cancelled one"))


@check
async def an_id_may_be_taken_for_a_while(bench: Bench) -> None:
    """From the enqueueing on for so long, though its task has ended, and longer if that is there still."""
    broker, worker = await bench.declared(), bench.broker()
    taken = await bench.consumer(worker, credit=1)
    short, last = f"{bench.queue.name}:short", f"{bench.queue.name}:last"
    await broker.publish([own_id(bench, "first").with_headers({ID_FOR: 600_000})])
    await settle_all(worker, await taken.next(), Succeeded())
    assert not await is_stored(worker, own_id(bench, "too soon"))
    await broker.publish([own_id(bench, "for a moment", id=short).with_headers({ID_FOR: 500})])
    await settle_all(worker, await taken.next(), Succeeded())
    await id_becomes_free(broker, own_id(bench, "next", id=short))
    await settle_all(worker, await taken.next(), Succeeded())
    await broker.publish([own_id(bench, "last", id=last).with_headers({ID_FOR: 1})])
    await asyncio.sleep(0.05)
    assert not await is_stored(broker, own_id(bench, "too soon", id=last))
    await settle_all(worker, await taken.next(), Succeeded())
    await id_becomes_free(broker, own_id(bench, "at last", id=last))


@check
async def an_id_and_a_unique_key_are_taken_together(bench: Bench) -> None:
    """Whichever of them is taken, the other one stays free."""
    broker, worker = await bench.declared(), bench.broker()

    def both(text: str, id_: str, key: str) -> Envelope:
        one = keyed(bench, text, key, id=f"{bench.queue.name}:{id_}")
        return one.with_headers({ID_TOKEN: new_id()})

    first, other = both("first", "1", "a"), both("same key", "2", "a")
    await broker.publish([first])
    assert await broker.publish([other], on_conflict="ignore") == {other.id: first.id}
    assert not await is_stored(broker, both("same id", "1", "b"))
    await id_becomes_free(broker, both("second", "2", "b"))
    taken = await bench.consumer(worker, credit=1)
    await settle_all(worker, await taken.next(), DeadLettered("no"))
    assert not await is_stored(broker, both("id is taken still", "1", "c"))
    await becomes_free(broker, keyed(bench, "key is free", "a"))
    await settle_all(worker, await taken.next(), Succeeded())
    await id_becomes_free(broker, both("third", "2", "b"))


@check
async def an_id_that_is_not_stored_is_free(bench: Bench) -> None:
    """A refusal takes no id, for a while neither."""
    broker, absent = await bench.declared(), bench.other_queue()
    with refused(QueueNotFound):
        await broker.publish([own_id(bench, "nowhere", queue=absent.name).with_headers({ID_FOR: 600_000})])
    await id_becomes_free(broker, own_id(bench, "here"))


@check
async def an_id_that_is_taken_for_a_while_may_be_released(bench: Bench) -> None:
    """It is listed and freed as a key is: an operator's last resort."""
    broker, worker = await bench.declared(), bench.broker()
    first = own_id(bench, "first").with_headers({ID_FOR: 600_000})
    await broker.publish([first])
    taken = await bench.consumer(worker, credit=1)
    await settle_all(worker, await taken.next(), Succeeded())
    mine = [one.id for one in await broker.unique.holders(1_000_000) if one.key == id_key(first.id)]
    assert mine == [first.id]
    assert await broker.unique.release(id_key(first.id)) == first.id
    await id_becomes_free(broker, own_id(bench, "next"))


def replaceable(bench: Bench, text: str, key: str = "", **changes: object) -> Envelope:
    """A task with a unique key, whose arguments a later one may replace."""
    return keyed(bench, text, key, **changes).with_headers({UNIQUE_CONFLICT: "replace"})


def debounced(bench: Bench, text: str, wait: float, latest: float) -> Envelope:
    """One that runs ``wait`` seconds after the last call, at the latest at that time (Unix time)."""
    own: dict[str, str | float | bool | None] = {UNIQUE_SCOPE: "waiting", UNIQUE_LATEST: int(latest * 1000)}
    return replaceable(bench, text, due=time.time() + wait).with_headers(own)


async def replacing(broker: Broker, *envelopes: Envelope) -> list[str]:
    """The ids of the tasks that stand for these."""
    existing = await broker.publish(envelopes, on_conflict="replace") or {}
    return [existing.get(one.id, one.id) for one in envelopes]


@check
async def a_waiting_task_gets_newer_arguments(bench: Bench) -> None:
    """All but the arguments stays as it was: the id, the priority, when it is due. The newest ones count."""
    broker, other, worker = await bench.declared(), await bench.declared(), bench.broker()
    first = replaceable(bench, "first", priority=3).with_headers({"mine": "first"})
    delayed = replaceable(bench, "delayed", key="2", due=time.time() + 0.5)
    plain = keyed(bench, "plain", key="3")
    assert await replacing(broker, first, delayed) == [first.id, delayed.id]
    await broker.publish([plain])
    for text in "abc":
        given = replaceable(bench, text, priority=5).with_headers({"mine": text})
        later = [given, replaceable(bench, text, key="2"), replaceable(bench, text, key="3")]
        assert await replacing(other, *later) == [first.id, delayed.id, plain.id]
    taken = await bench.consumer(worker, credit=3)
    found = {one.envelope.id: one.envelope for one in await taken.next(3)}
    newest = found[first.id]
    assert (newest.body, newest.headers["mine"], newest.priority) == (given.body, "c", 3)
    assert newest.headers[UNIQUE_KEY] == first.headers[UNIQUE_KEY]
    assert found[delayed.id].body == later[1].body
    assert time.time() >= (delayed.due or 0.0)
    # One that was not enqueued to be replaced keeps its own.
    assert found[plain.id].body == plain.body


@check
async def a_call_that_is_delayed_delays_the_task(bench: Bench) -> None:
    """One that is ready waits then, and one that waits becomes due at another time."""
    broker, worker = await bench.declared(), bench.broker()
    first = replaceable(bench, "first")
    sooner, later = (replaceable(bench, text, due=time.time() + wait) for text, wait in (("a", 600), ("b", 1.5)))
    for one in (first, sooner, later):
        assert await replacing(broker, one) == [first.id]
    taken = await bench.consumer(worker)
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (first.id, later.body)
    assert time.time() >= (later.due or 0.0)


@check
async def a_task_that_runs_again_has_the_newest_arguments(bench: Bench) -> None:
    """What comes while it runs counts if it is tried again; it is dropped when it succeeds, and the key is free."""
    broker, worker = await bench.declared(), bench.broker()
    first = replaceable(bench, "first")
    await replacing(broker, first)
    taken = await bench.consumer(worker)
    for number in range(3):
        (delivery,) = await taken.next()
        newest = replaceable(bench, f"{number}")
        assert await replacing(broker, newest) == [first.id]
        await settle_all(worker, [delivery], Retrying("again") if number < 2 else Released())
    (delivery,) = await taken.next()
    assert (delivery.envelope.body, delivery.envelope.attempt) == (newest.body, 3)
    assert await replacing(broker, replaceable(bench, "too late")) == [first.id]
    await settle_all(worker, [delivery], Succeeded())
    fresh = replaceable(bench, "fresh")
    await becomes_free(broker, fresh)
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (fresh.id, fresh.body)


@check
async def calls_are_debounced(bench: Bench) -> None:
    """Each call puts the task off, but not beyond the first one's last moment. When it is taken its key is free."""
    broker, worker = await bench.declared(), bench.broker()
    taken = await bench.consumer(worker, credit=2)
    latest = time.time() + 2.5
    first = newest = debounced(bench, "first", 1.0, latest)
    assert await replacing(broker, first) == [first.id]
    calls = 0
    while time.time() < latest - 0.8:
        newest = debounced(bench, f"{calls}", 1.0, latest + 600)
        assert await replacing(broker, newest) == [first.id]
        calls += 1
        await asyncio.sleep(0.05)  # a call that comes before the task is due
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (first.id, newest.body)
    assert latest <= time.time() + 0.001
    fresh = debounced(bench, "fresh", 0.1, time.time() + 600)
    assert await replacing(broker, fresh) == [fresh.id]
    await settle_all(worker, [delivery], Succeeded())
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (fresh.id, fresh.body)


@check
async def calls_of_one_batch_replace_each_other(bench: Bench) -> None:
    """Of one call's tasks with the same key the first is stored, with the arguments of the last."""
    broker, worker = await bench.declared(), bench.broker()
    tasks = [replaceable(bench, text) for text in "abc"]
    assert await replacing(broker, *tasks) == [tasks[0].id] * 3
    taken = await bench.consumer(worker)
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (tasks[0].id, tasks[2].body)


@check
async def a_worker_that_dies_leaves_the_newest_arguments(bench: Bench) -> None:
    """The next one has them, whatever the first one did, also of a task whose key is free since it was taken."""
    broker = await bench.declared()
    first, latest = replaceable(bench, "first"), time.time() + 0.3
    second = debounced(bench, "second", 0.2, latest).with_headers({UNIQUE_KEY: f"{bench.queue.name}:2"})
    await replacing(broker, first, second)
    newest = replaceable(bench, "newest")
    newer = debounced(bench, "newer", 0.2, latest).with_headers({UNIQUE_KEY: f"{bench.queue.name}:2"})
    assert await replacing(broker, newest, newer) == [first.id, second.id]
    wanted = {first.id: newest.body, second.id: newer.body}
    for _ in range(3):
        worker = bench.broker()
        async with worker.consume([bench.queue], credit=2) as consumer:
            found = await Taken(consumer).next(2)
            assert {one.envelope.id: one.envelope.body for one in found} == wanted
        await worker.close()
