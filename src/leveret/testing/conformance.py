"""What every broker must do, as checks that need no test framework.

For the author of another broker: give `CHECKS` a callable that opens a new `Broker` on the same store each time it
is called, and run each check with it::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    def test_conformance(check): asyncio.run(check(lambda: MyBroker(...)))

A check uses queues of its own, closes every broker that it opened, and raises AssertionError when the promise in its
docstring is broken.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from typing import TYPE_CHECKING

from leveret.errors import DuplicateTask, LeaseLost, QueueFull, QueueMismatch, QueueNotFound
from leveret.model import DeadLettered, Queue, Released, Retrying, Succeeded
from leveret.testing import (
    chaining,
    following,
    inspecting,
    limiting,
    pausing,
    peeking,
    removing,
    scheduling,
    uniqueness,
)
from leveret.testing.bench import (
    CHECKS,
    PATIENCE,
    Bench,
    Check,
    Taken,
    becomes,
    check,
    refused,
    settle_all,
    text,
    text_of,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker

__all__ = [
    "CHECKS",
    "Check",
    "chaining",
    "following",
    "inspecting",
    "limiting",
    "pausing",
    "peeking",
    "removing",
    "scheduling",
    "uniqueness",
]


@check
async def delivers_what_was_published(bench: Bench) -> None:
    """Every part of an envelope arrives, in order of publishing."""
    broker = await bench.declared()
    sent = [bench.envelope("a", headers={"trace": "1", "n": 2}), bench.envelope("b", task=None, content_type=None)]
    for envelope in sent:
        await broker.publish([envelope])
    taken = await bench.consumer(bench.broker())
    got = [delivery.envelope for delivery in await taken.next(2)]
    assert [(e.id, e.queue, e.task, e.body, e.attempt, e.headers) for e in got] == [
        (e.id, e.queue, e.task, e.body, e.attempt, e.headers) for e in sent
    ]
    assert got[1].content_type is None


@check
async def bodies_are_bytes(bench: Bench) -> None:
    """A body is kept byte for byte: empty, binary, and a mebibyte of it."""
    broker = await bench.declared()
    bodies = [b"", bytes(range(256)), secrets.token_bytes(1024 * 1024)]
    await broker.publish([bench.envelope("", body=body) for body in bodies])
    taken = await bench.consumer(broker)
    assert [delivery.envelope.body for delivery in await taken.next(3)] == bodies


@check
async def success_removes_the_task(bench: Bench) -> None:
    """A settled success is gone for good, and the counts say so at each step."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b"))
    await becomes(broker, bench.queue, ready=2, running=0, consumers=0)
    async with bench.broker().consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        (first,) = await taken.next()
        await becomes(broker, bench.queue, ready=1, running=1, consumers=1)
        await broker.settle([(first, Succeeded())])
        (second,) = await taken.next()
        await broker.settle([(second, Succeeded())])
        await becomes(broker, bench.queue, ready=0, running=0, dead=0, consumers=1)
        taken.abandon()
    await becomes(broker, bench.queue, ready=0, running=0, dead=0, consumers=0)


@check
async def what_is_ready_is_counted_cheaply(bench: Bench) -> None:
    """Of several queues together: not what a consumer holds, and not what is delayed. A queue may not be there."""
    broker, later = await bench.declared(), time.time() + 3600
    asked = [bench.queue.name, f"{bench.queue.name}-not-there"]
    await broker.publish([*bench.envelopes(*"abc"), bench.envelope("later", due=later)])
    await counts(broker, asked, 3)
    taken = await bench.consumer(bench.broker(), credit=2)
    await taken.next(2)
    await counts(broker, asked, 1)


async def counts(broker: Broker, queues: Sequence[str], count: int) -> None:
    """Wait until so many are ready."""
    for _ in range(200):
        ready = await broker.queues.ready(queues)
        if ready == count:
            return
        await asyncio.sleep(0.05)
    raise AssertionError(f"{ready} are ready, not {count}")


@check
async def credit_bounds_what_is_unsettled(bench: Bench) -> None:
    """A consumer never holds more than its credit; each settlement frees one."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcdef"))
    taken = await bench.consumer(broker, credit=2)
    first = await taken.next(2)
    await taken.nothing()
    await broker.settle([(first[0], Succeeded())])
    assert await taken.texts(1) == ["c"]
    await taken.nothing()


@check
async def credit_may_grow(bench: Bench) -> None:
    """A consumer gets more at once, and no more than that."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcdefgh"))
    taken = await bench.consumer(broker, credit=2)
    first = await taken.next(2)
    await taken.consumer.set_credit(5)
    more = await taken.next(3)
    await taken.nothing()
    await settle_all(broker, [*first, *more], Succeeded())
    assert len(await taken.next(3)) == 3


@check
async def credit_may_shrink(bench: Bench) -> None:
    """A consumer gets nothing until it holds less than the new credit."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes(*"abcdefgh"))
    taken = await bench.consumer(broker, credit=4)
    held = await taken.next(4)
    await taken.consumer.set_credit(2)
    for delivery in held[:2]:
        await broker.settle([(delivery, Succeeded())])
        await taken.nothing()
    await broker.settle([(held[2], Released())])
    # A quorum queue of RabbitMQ 3.10 puts last what is handed back.
    (one,) = await taken.texts(1)
    assert one in ("c", "e")
    await taken.nothing()
    other = await bench.consumer(bench.broker(), credit=9)
    assert sorted([one, *await other.texts(4)]) == ["c", "e", "f", "g", "h"]


@check
async def idle_consumers_take_turns(bench: Bench) -> None:
    """Round-robin: two consumers without a limit share five messages as the tutorial prints."""
    broker = await bench.declared()
    one = await bench.consumer(bench.broker(), credit=None)
    two = await bench.consumer(bench.broker(), credit=None)
    for message in ("First", "Second", "Third", "Fourth", "Fifth"):
        await broker.publish(bench.envelopes(message))
    assert sorted([await one.texts(2), await two.texts(2)]) == [["First", "Third"], ["Second", "Fourth"]]
    await asyncio.wait([asyncio.ensure_future(taken.nothing()) for taken in (one, two)])


@check
async def a_busy_consumer_is_passed_over(bench: Bench) -> None:
    """Fair dispatch: with a credit of one, what is light does not wait behind what is heavy."""
    broker = await bench.declared()
    one = await bench.consumer(bench.broker(), credit=1)
    two = await bench.consumer(bench.broker(), credit=1)
    await broker.publish(bench.envelopes("heavy", "light", "heavy", "light"))
    (first,), (second,) = await one.next(), await two.next()
    heavy, light = (one, two) if text(first) == "heavy" else (two, one)
    done = second if text(first) == "heavy" else first
    for _ in range(2):
        await broker.settle([(done, Succeeded())])
        (done,) = await light.next()
    await heavy.nothing()


@check
async def a_retry_is_charged_and_goes_to_the_end(bench: Bench) -> None:
    """The attempt and the last error travel with the task; the tasks behind it have their turn first."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b"))
    taken = await bench.consumer(broker, credit=1)
    (first,) = await taken.next()
    await broker.settle([(first, Retrying("ValueError: no", "traceback"))])
    (second,) = await taken.next()
    assert text(second) == "b"
    await broker.settle([(second, Succeeded())])
    (again,) = await taken.next()
    assert (again.envelope.id, again.envelope.attempt) == (first.envelope.id, 2)
    assert again.envelope.last_error == "ValueError: no"
    await broker.settle([(again, Succeeded())])
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)


@check
async def a_delayed_task_is_not_early(bench: Bench) -> None:
    """It is counted as delayed, comes when it is due and never before, and then at most a second late."""
    broker = await bench.declared()
    taken = await bench.consumer(broker)
    for seconds in (0.1, 0.7, 1.3):
        # Twice: a broker may have to make something ready for the first delay of a length.
        for _ in range(2):
            due = time.time() + seconds
            await broker.publish([bench.envelope("later", due=due)])
            (delivery,) = await taken.next()
            late = time.time() - due
            await broker.settle([(delivery, Succeeded())])
        assert 0 <= late < 1, f"a task delayed by {seconds} s came {late:.3f} s late"


@check
async def what_is_due_is_ready_though_nobody_consumes(bench: Bench) -> None:
    """Else whoever starts workers by what is ready would never start the first."""
    broker, other = await bench.declared(), bench.broker()
    await broker.publish([bench.envelope("a", due=time.time() + 0.3), bench.envelope("b", due=time.time() + 3_600)])
    await counts(other, [bench.queue.name], 1)
    await becomes(other, bench.queue, ready=1, delayed=1, running=0)


@check
async def a_long_delay_is_not_in_the_way(bench: Bench) -> None:
    """Neither of a shorter one nor of what is ready; delayed tasks take no credit and are counted."""
    broker = await bench.declared()
    now = time.time()
    await broker.publish([bench.envelope(f"in an hour {number}", due=now + 3600) for number in range(20)])
    await broker.publish([bench.envelope("in a year", due=now + 365 * 86_400)])
    await becomes(broker, bench.queue, delayed=21, ready=0)
    taken = await bench.consumer(broker, credit=1)
    await broker.publish([bench.envelope("soon", due=time.time() + 1.5), bench.envelope("now")])
    for expected in ("now", "soon"):
        (delivery,) = await taken.next()
        assert text(delivery) == expected
        await broker.settle([(delivery, Succeeded())])
    await becomes(broker, bench.queue, delayed=21, ready=0, running=0)


@check
async def a_retry_may_be_delayed(bench: Bench) -> None:
    """It is charged, waits with the broker, and others have their turn; so does one that came from a dead consumer."""
    broker = await bench.declared()
    taken = await bench.consumer(broker, credit=1)
    await broker.publish(bench.envelopes("a", "b"))
    (first,) = await taken.next()
    settled = time.time()
    await broker.settle([(first, Retrying("no", delay=1.2))])
    (second,) = await taken.next()
    assert text(second) == "b"
    await broker.settle([(second, Succeeded())])
    (again,) = await taken.next()
    assert time.time() >= settled + 1.2
    assert (text(again), again.envelope.attempt, again.envelope.last_error) == ("a", 2, "no")
    await broker.settle([(again, Succeeded())])
    await becomes(broker, bench.queue, ready=0, running=0, delayed=0)


@check
async def a_dead_letter_is_kept_with_its_reason(bench: Bench) -> None:
    """A dead task leaves the queue, is counted, and can be looked at again and again, unchanged."""
    broker = await bench.declared()
    body = bytes(range(256))
    await broker.publish([bench.envelope("", body=body, task=None, headers={"kept": "yes"}), bench.envelope("b")])
    taken = await bench.consumer(broker)
    first, second = await taken.next(2)
    await broker.settle([(first, DeadLettered("why", "where")), (second, DeadLettered("why too"))])
    await becomes(broker, bench.queue, ready=0, running=0, dead=2)
    for _ in range(3):
        letters = await broker.dead_letters.read(bench.queue.name, limit=10)
        assert [(letter.envelope.id, letter.reason, letter.traceback) for letter in letters] == [
            (first.envelope.id, "why", "where"),
            (second.envelope.id, "why too", ""),
        ]
    assert (letters[0].envelope.body, letters[0].envelope.task) == (body, None)
    assert letters[0].envelope.headers["kept"] == "yes"
    assert letters[0].died_at is not None
    assert letters[0].worker is not None
    assert letters[0].worker.endswith(f":{os.getpid()}")
    assert len(await broker.dead_letters.read(bench.queue.name, limit=1)) == 1
    await becomes(broker, bench.queue, dead=2)


@check
async def a_dead_letter_may_live_again(bench: Bench) -> None:
    """Revived, it is a first attempt with its body and headers as they came; discarded, it is gone; others stay."""
    broker = await bench.declared()
    body = bytes(range(256))
    sent = [bench.envelope(str(number), body=body, headers={"kept": "yes"}) for number in range(4)]
    await broker.publish(sent)
    taken = await bench.consumer(broker)
    first = await taken.next(4)
    await broker.settle([(first[0], Retrying("once"))])
    (again,) = await taken.next()
    await settle_all(broker, [again, *first[1:]], DeadLettered("why"))
    await becomes(broker, bench.queue, dead=4)
    ids = [envelope.id for envelope in sent]
    found = await broker.dead_letters.retry(bench.queue.name, [ids[0], ids[2], "nobody"])
    assert sorted(found) == sorted([ids[0], ids[2]])
    revived = await taken.next(2)
    assert {delivery.envelope.id for delivery in revived} == {ids[0], ids[2]}
    assert all(
        (delivery.envelope.attempt, delivery.envelope.body, delivery.envelope.headers) == (1, body, {"kept": "yes"})
        for delivery in revived
    )
    await settle_all(broker, revived, Succeeded())
    assert list(await broker.dead_letters.drop(bench.queue.name, [ids[1]])) == [ids[1]]
    await becomes(broker, bench.queue, ready=0, running=0, dead=1)
    (left,) = await broker.dead_letters.read(bench.queue.name, limit=10)
    assert left.envelope.id == ids[3]


@check
async def headers_are_kept_on_every_copy(bench: Bench) -> None:
    """Delayed, tried again, dead and revived, a task has the headers that it came with, of the same types.

    Among them are those that carry options of one enqueue: a copy without them would run as its decorator says.
    """
    broker = await bench.declared()
    headers = {"text": "é", "large": 2**40, "double": 0.1, "yes": True, "no": False, "nothing": None}
    headers |= {"leveret-timeout": 1500, "leveret-max-attempts": 3, "leveret-store-result": False}
    await broker.publish([bench.envelope("a", headers=headers, due=time.time() + 0.5)])
    taken = await bench.consumer(broker)
    (first,) = await taken.next()
    await broker.settle([(first, Retrying("once", delay=0.5))])
    (second,) = await taken.next()
    await broker.settle([(second, DeadLettered("why"))])
    await becomes(broker, bench.queue, dead=1)
    (letter,) = await broker.dead_letters.read(bench.queue.name, limit=10)
    await broker.dead_letters.retry(bench.queue.name, [first.envelope.id])
    (third,) = await taken.next()
    for envelope in (first.envelope, second.envelope, letter.envelope, third.envelope):
        assert envelope.headers == headers, f"attempt {envelope.attempt} has {envelope.headers}"
        kinds = {name: type(value) for name, value in envelope.headers.items()}
        assert kinds == {name: type(value) for name, value in headers.items()}


@check
async def a_released_task_is_not_charged(bench: Bench) -> None:
    """Handed back, it is another consumer's at once, at the same attempt, before what stood behind it."""
    broker = await bench.declared()
    one = await bench.consumer(broker, credit=1)
    await broker.publish(bench.envelopes("a", "b"))
    (first,) = await one.next()
    await one.consumer.stop()
    two = await bench.consumer(bench.broker(), credit=1)
    (other,) = await two.next()
    assert text(other) == "b"
    await broker.settle([(first, Released())])
    await broker.settle([(other, Succeeded())])
    (again,) = await two.next()
    assert (text(again), again.envelope.attempt) == ("a", 1)


@check
async def what_is_unsettled_goes_back(bench: Bench) -> None:
    """A consumer that leaves without settling loses nothing; the return is told, the attempt is not charged."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b"))
    async with bench.broker().consume([bench.queue], credit=10) as consumer:
        taken = Taken(consumer)
        before = await taken.next(2)
        taken.abandon()
    other = await bench.consumer(broker)
    again = await other.next(2)
    assert [text(delivery) for delivery in again] == ["a", "b"]
    assert all(delivery.envelope.attempt == 1 and delivery.returns >= 1 for delivery in again)
    assert not any(delivery.lease.held for delivery in before)


@check
async def a_lost_lease_settles_nothing(bench: Bench) -> None:
    """The fence: who lost a delivery cannot settle it, whatever the outcome; the others of the batch are done."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b"))
    async with bench.broker().consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        (stale,) = await taken.next()
        taken.abandon()
    other = await bench.consumer(broker)
    now, second = await other.next(2)
    assert text(now) == text(stale)
    for outcome in (Succeeded(), Retrying("x"), DeadLettered("x"), Released()):
        with refused(LeaseLost) as refusal:
            await broker.settle([(stale, outcome), *([(second, Succeeded())] if outcome == Released() else [])])
        assert getattr(refusal[0], "ids", ()) == (stale.envelope.id,)
    await becomes(broker, bench.queue, ready=0, running=1, dead=0)
    await broker.settle([(now, Succeeded())])
    await becomes(broker, bench.queue, ready=0, running=0, dead=0)


@check
async def settling_twice_settles_once(bench: Bench) -> None:
    """The second time is a lost lease, and harms neither the task nor the consumer."""
    broker = await bench.declared()
    taken = await bench.consumer(broker)
    await broker.publish(bench.envelopes("a", "b"))
    first, second = await taken.next(2)
    await broker.settle([(first, Retrying("once"))])
    with refused(LeaseLost):
        await broker.settle([(first, Succeeded())])
    await broker.settle([(second, Succeeded())])
    assert await taken.texts(1) == ["a"]


@check
async def stopping_ends_the_deliveries(bench: Bench) -> None:
    """Stopped, a consumer gets nothing more; what it has it can still settle. Left, its iteration ends."""
    broker = await bench.declared()
    await broker.publish(bench.envelopes("a", "b", "c"))
    async with asyncio.timeout(PATIENCE), bench.broker().consume([bench.queue], credit=1) as consumer:
        taken = Taken(consumer)
        (first,) = await taken.next()
        await consumer.stop()
        await broker.settle([(first, Succeeded())])
        await taken.nothing()
        await becomes(broker, bench.queue, ready=2, running=0)
    assert [arrival async for arrival in consumer] == []


@check
async def one_consumer_takes_from_many_queues(bench: Bench) -> None:
    """Each queue has its own credit, so that a full one does not stop the others."""
    other = bench.other_queue()
    broker = await bench.declared()
    await broker.declare([other])
    await broker.publish([*bench.envelopes("a", "b"), bench.envelope("c", queue=other.name)])
    taken = await bench.consumer(broker, bench.queue, other, credit=1)
    deliveries = await taken.next(2)
    assert sorted((delivery.envelope.queue, text(delivery)) for delivery in deliveries) == sorted(
        [(bench.queue.name, "a"), (other.name, "c")]
    )
    await taken.nothing()


@check
async def many_are_published_in_one_call(bench: Bench) -> None:
    """A thousand in one call, and hundreds of calls at once: each is stored exactly once."""
    broker = await bench.declared()
    many = [bench.envelope(str(number)) for number in range(1000)]
    single = [bench.envelope(str(number)) for number in range(1000, 1200)]
    await broker.publish(many)
    await asyncio.gather(*(broker.publish([envelope]) for envelope in single))
    taken = await bench.consumer(broker, credit=None)
    assert sorted(map(int, await taken.texts(1200))) == list(range(1200))
    await taken.nothing()


@check
async def an_id_published_twice_at_once_is_told_truly(bench: Bench) -> None:
    """An id of one's own is stored once at most; what is confirmed is there, what is refused is not."""
    broker = await bench.declared()
    twin, other = uniqueness.own_id(bench, "twin"), bench.envelope("other")
    again = [uniqueness.own_id(bench, "twin", id=twin.id) for _ in range(3)]
    calls = [[twin], [other, again[0]], again[1:]]
    results = await asyncio.gather(*(broker.publish(call) for call in calls), return_exceptions=True)
    stored = [text_of(one) for call, result in zip(calls, results, strict=True) if result is None for one in call]
    for result in results:
        assert result is None or (isinstance(result, DuplicateTask) and result.ids == (twin.id,)), result
    assert stored.count("twin") == 1
    taken = await bench.consumer(broker)
    assert sorted(await taken.texts(len(stored))) == sorted(stored)
    await taken.nothing()


@check
async def the_higher_priority_is_first(bench: Bench) -> None:
    """Then whoever came first; none is like 4. (On RabbitMQ in a classic queue: there in every version.)"""
    queue = bench.other_queue(kind="classic", priorities=True)
    broker = await bench.declared(queue)
    for name, priority in {"a": None, "b": 9, "c": 0, "d": 5, "e": 4, "f": 9, "g": 3, "h": None}.items():
        await broker.publish([bench.envelope(name, queue=queue.name, priority=priority)])
    taken = await bench.consumer(bench.broker(), queue, credit=1)
    seen = ""
    while len(seen) < 8:
        (delivery,) = await taken.next()
        seen += text(delivery)
        await broker.settle([(delivery, Succeeded())])
    assert seen == "bfdaehgc"


@check
async def a_task_keeps_its_priority(bench: Bench) -> None:
    """Delayed, tried again at once and later, handed back, dead and alive again; and one that has none gets none."""
    broker = await bench.declared()
    wanted = {"none": None, "low": 0, "high": 9}
    due = time.time() + 0.5
    for name, priority in wanted.items():
        await broker.publish([bench.envelope(name, priority=priority, due=due)])
    taken = await bench.consumer(broker)
    for outcome in (Retrying("no"), Retrying("no", delay=0.5), Released(), DeadLettered("no")):
        deliveries = await taken.next(3)
        assert {text(delivery): delivery.envelope.priority for delivery in deliveries} == wanted
        await settle_all(broker, deliveries, outcome)
    await becomes(broker, bench.queue, dead=3)
    letters = await broker.dead_letters.read(bench.queue.name, limit=3)
    assert {text_of(letter.envelope): letter.envelope.priority for letter in letters} == wanted
    assert [letter.envelope.id for letter in letters] == [delivery.envelope.id for delivery in deliveries]
    await broker.dead_letters.retry(bench.queue.name, [letter.envelope.id for letter in letters])
    assert {text(delivery): delivery.envelope.priority for delivery in await taken.next(3)} == wanted


@check
async def a_cancelled_publish_harms_nothing(bench: Bench) -> None:
    """Cancelled, a task is stored or it is not; the broker goes on, and later confirms are not mixed up."""
    broker = await bench.declared()
    for turns in range(20):
        publishing = asyncio.ensure_future(broker.publish([bench.envelope(f"cancelled {turns}")]))
        for _ in range(turns):
            await asyncio.sleep(0)
        publishing.cancel()
        await asyncio.wait([publishing])
        await broker.publish([bench.envelope(f"kept {turns}")])
    taken = await bench.consumer(broker, credit=None)
    seen: list[str] = []
    while sum(item.startswith("kept") for item in seen) < 20:
        seen += await taken.texts(1)
    await taken.nothing()
    assert len(seen) == len(set(seen))


@check
async def a_queue_that_is_not_there_is_an_error(bench: Bench) -> None:
    """Nothing is published into the void, and the error names the tasks; it has no dead letters to decide about."""
    broker = bench.broker()
    envelopes = bench.envelopes("a", "b")
    with refused(QueueNotFound) as refusal:
        await broker.publish(envelopes)
    assert set(getattr(refusal[0], "ids", ())) == {envelope.id for envelope in envelopes}
    for decide in (broker.dead_letters.retry, broker.dead_letters.drop):
        with refused(QueueNotFound):
            await decide(bench.queue.name, ["a"])


@check
async def a_queue_that_may_not_be_made_is_not_made(bench: Bench) -> None:
    """create=False leaves the making to the operator; with it, a missing queue half-declares nothing."""
    broker = bench.broker()
    absent, made = bench.other_queue(create=False), bench.other_queue()
    for _ in range(2):
        with refused(QueueNotFound):
            await broker.declare([made, absent])
    assert not [stats for stats in await broker.queues.stats([made.name]) if stats.name == made.name]
    await broker.declare([Queue(absent.name)])
    await broker.declare([absent, made])
    await becomes(broker, made, ready=0)


@check
async def a_full_queue_refuses(bench: Bench) -> None:
    """At its max_length a queue takes no more and drops nothing; when there is room, it does."""
    queue = bench.other_queue(max_length=3)
    broker = await bench.declared(queue)
    refused = None
    stored: list[str] = []
    for number in range(50):
        envelope = bench.envelope(str(number), queue=queue.name)
        try:
            await broker.publish([envelope])
        except QueueFull as error:
            refused = error
            assert error.ids == (envelope.id,)
            break
        stored.append(str(number))
    assert refused is not None, "50 tasks were stored in a queue of at most 3"
    assert len(stored) >= 3
    taken = await bench.consumer(broker, queue, credit=None)
    deliveries = await taken.next(len(stored))
    assert [text(delivery) for delivery in deliveries] == stored
    await settle_all(broker, deliveries, Succeeded())
    await becomes(broker, queue, ready=0, running=0)
    await broker.publish([bench.envelope("room", queue=queue.name)])
    assert await taken.texts(1) == ["room"]


@check
async def a_retry_into_a_full_queue_is_not_lost(bench: Bench) -> None:
    """When the queue has filled up behind a running task, its retry still finds a place."""
    queue = bench.other_queue(max_length=1)
    broker = await bench.declared(queue)
    await broker.publish([bench.envelope("a", queue=queue.name)])
    taken = await bench.consumer(broker, queue, credit=1)
    (first,) = await taken.next()
    try:
        for number in range(50):
            await broker.publish([bench.envelope(str(number), queue=queue.name)])
    except QueueFull:
        pass
    await broker.settle([(first, Retrying("again"))])
    seen = []
    while "a" not in seen:
        (delivery,) = await taken.next()
        seen.append(text(delivery))
        await broker.settle([(delivery, Succeeded())])


@check
async def another_limit_is_a_mismatch(bench: Bench) -> None:
    """A queue with another max_length cannot be used: both are named, and nothing is half-declared."""
    queue, made = bench.other_queue(max_length=5), bench.other_queue()
    broker = await bench.declared(queue)
    await broker.declare([queue, Queue(queue.name)])
    with refused(QueueMismatch) as refusal:
        await bench.broker().declare([made, Queue(queue.name, max_length=6)])
    assert "5" in str(refusal[0])
    assert "6" in str(refusal[0])
    assert not [stats for stats in await broker.queues.stats([made.name]) if stats.name == made.name]
