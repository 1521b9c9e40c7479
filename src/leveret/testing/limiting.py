"""Checks of limits, rates and turns; see `conformance`."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.errors import LimitNotFound
from leveret.model import (
    FAIR_KEY,
    LIMITS,
    RERUN,
    UNIQUE_CONFLICT,
    UNIQUE_KEY,
    UNIQUE_SCOPE,
    Cancelled,
    DeadLettered,
    DeclareLimits,
    LimitRule,
    PauseLimit,
    PutOff,
    Rate,
    Released,
    RemoveLimit,
    RestLimit,
    ResumeLimit,
    Retrying,
    SetLimit,
    Succeeded,
    limit_header,
    queue_limit,
)
from leveret.testing.bench import PATIENCE, Bench, Taken, becomes, check, refused, settle_all, text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.brokers import Broker
    from leveret.model import Delivery, Envelope, LimitRef, LimitRequest, LimitUse, Outcome, Queue

#: A changed limit is in force so soon (seconds).
IN_FORCE = 1.0
ONE = LimitRule(concurrency=1)


class Limited:
    """A queue's tasks with limits of the check's own, and a program that has them admitted."""

    def __init__(self, bench: Bench, broker: Broker, queue: Queue) -> None:
        self.bench = bench
        self.broker = broker
        self.queue = queue
        self._mark = secrets.token_hex(4)

    @classmethod
    async def of(cls, bench: Bench, queue: Queue | None = None, **rules: LimitRule) -> Limited:
        """``rules``: the limits, by what is to be unlike in their names. The queue's own rule is declared with them."""
        queue = queue or bench.queue
        made = cls(bench, await bench.declared(queue), queue)
        await made.declare(**rules)
        await bench.enter(bench.broker().limits.keep())
        return made

    async def declare(self, **rules: LimitRule) -> None:
        named = {self.name(word): rule for word, rule in rules.items()}
        if self.queue.rule is not None:
            named[queue_limit(self.queue.name)] = self.queue.rule
        await self.broker.limits.ask(DeclareLimits(time.time(), named, [self.queue.name]))

    def name(self, word: str = "limit") -> str:
        return f"check-{self._mark}-{word}"

    def task(self, said: str, *refs: LimitRef, **changes: object) -> Envelope:
        """A task with limits, each given as `name` has them, and its key; ("limit", "") if none is given."""
        named = [(self.name(word), key) for word, key in refs or [("limit", "")]]
        changes.setdefault("headers", {LIMITS: limit_header(named)})
        return self.bench.envelope(said, queue=self.queue.name, **changes)

    async def publish(self, *tasks: Envelope) -> None:
        """One after the other, so that they have this order."""
        for task in tasks:
            await self.broker.publish([task])

    async def consumer(self, credit: int | None = 10) -> Taken:
        return await self.bench.consumer(self.bench.broker(), self.queue, credit=credit)

    async def settle(self, deliveries: Sequence[Delivery], outcome: Outcome | None = None) -> None:
        await settle_all(self.broker, deliveries, outcome or Succeeded())

    async def ask(self, request: LimitRequest) -> None:
        await self.broker.limits.ask(request)

    async def use(self, name: str | None = None) -> LimitUse:
        uses = [use for use in await self.broker.limits.read() if use.row.name == (name or self.name())]
        assert len(uses) == 1
        return uses[0]

    async def uses(self, name: str | None = None, **expected: int) -> None:
        """Wait until a limit's counts are so."""
        deadline = time.monotonic() + PATIENCE
        while True:
            use = await self.use(name)
            if all(getattr(use, field) == value for field, value in expected.items()):
                return
            assert time.monotonic() < deadline, f"expected {expected}, counted {use}"
            await asyncio.sleep(0.05)

    async def drained(self, taken: Taken, count: int, most: int) -> list[str]:
        """Settle so many, of which at most ``most`` come before one of them is settled; what they say, in order."""
        said: list[str] = []
        while len(said) < count:
            due = min(most, count - len(said))
            deliveries = await taken.next(due)
            if len(said) + due < count:
                await taken.nothing()
            said += [text(delivery) for delivery in deliveries]
            await self.settle(deliveries)
        return said


@check
async def concurrency_is_never_exceeded(bench: Bench) -> None:
    """So many are admitted and have not ended, whoever consumes, and with however much credit."""
    limited = await Limited.of(bench, limit=LimitRule(concurrency=3))
    await limited.publish(*(limited.task(f"{number}") for number in range(10)))
    both = [await limited.consumer(), await limited.consumer()]
    held: list[Delivery] = []
    for left in range(10, 0, -1):
        while len(held) < min(3, left):
            held += await one_of(both)
        await asyncio.gather(*(taken.nothing() for taken in both))
        if left > 3:
            await limited.uses(admitted=3, waiting=left - 3, keys=1)
            await becomes(limited.broker, limited.queue, limited=left - 3, running=3, ready=0)
        await limited.settle([held.pop(0)])
    await limited.uses(admitted=0, waiting=0, keys=0)
    await becomes(limited.broker, limited.queue, limited=0, running=0, ready=0)


async def one_of(several: Sequence[Taken]) -> list[Delivery]:
    """The next delivery, whoever gets it."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        for taken in several:
            if deliveries := await taken.next_within(0.02):
                return deliveries
    raise AssertionError("a delivery was due, and none came")


@check
async def a_permit_ends_with_each_settlement(bench: Bench) -> None:
    """Whatever the end, the next one is admitted; and so is the first, when it is to run again."""
    limited = await Limited.of(bench, limit=ONE)
    outcomes: list[Outcome] = [
        Succeeded(),
        DeadLettered("no"),
        Cancelled("unwanted"),
        Retrying("once more"),
        Retrying("later", delay=0.5),
        PutOff(limited.name(), "", 0.5),
    ]
    tasks = [limited.task(f"{number}") for number in range(len(outcomes))]
    await limited.publish(*tasks)
    taken = await limited.consumer()
    for outcome in outcomes:
        deliveries = await taken.next()
        await taken.nothing()
        await limited.settle(deliveries, outcome)
    again = await limited.drained(taken, 3, 1)
    assert sorted(again) == ["3", "4", "5"]
    await limited.uses(admitted=0, waiting=0)


@check
async def a_task_that_comes_back_has_its_permit(bench: Bench) -> None:
    """Handed back, or left by a consumer that died: it comes again, and nothing comes in its place."""
    limited = await Limited.of(bench, limit=ONE)
    await limited.publish(limited.task("first"), limited.task("second"))
    worker = bench.broker()
    async with worker.consume([limited.queue], credit=10) as consumer:
        taken = Taken(consumer)
        (delivery,) = await taken.next()
        await settle_all(worker, [delivery], Released())
        (delivery,) = await taken.next()
        assert (text(delivery), delivery.envelope.attempt) == ("first", 1)
        await taken.nothing()
        taken.abandon()
    await limited.uses(admitted=1, waiting=1)
    other = await limited.consumer()
    (delivery,) = await other.next()
    assert text(delivery) == "first"
    await other.nothing()
    await limited.settle([delivery])
    assert await limited.drained(other, 1, 1) == ["second"]
    await limited.uses(admitted=0, waiting=0)


@check
async def a_rate_bounds_the_starts_of_any_stretch(bench: Bench) -> None:
    """At most count + burst - 1 in a time of ``per``, and no fewer in the long run. Tolerance: how late one is told."""
    rate = Rate(5, per=1.0, burst=2)
    limited = await Limited.of(bench, limit=LimitRule(rate=rate))
    await limited.publish(*(limited.task(f"{number}") for number in range(12)))
    taken = await limited.consumer(credit=50)
    came: list[float] = []
    while len(came) < 12:
        deliveries = await taken.next()
        came.append(time.monotonic())
        await limited.settle(deliveries)
    late = 0.15
    most = max(sum(start <= other < start + rate.per - late for other in came) for start in came)
    assert most <= rate.count + 1, f"{most} started within {rate.per} s"
    assert came[-1] - came[0] >= 10 * rate.interval - late
    assert came[-1] - came[0] <= 10 * rate.interval + 2


@check
async def keys_of_a_limit_do_not_hold_each_other_up(bench: Bench) -> None:
    """Each key has the limit for itself; what waits for one takes no credit, and what has no limit passes it."""
    limited = await Limited.of(bench, limit=ONE)
    texts = ("a1", "a2", "a3", "b1", "b2", "c1")
    await limited.publish(*(limited.task(said, ("limit", said[0])) for said in texts))
    await limited.publish(limited.task("free", headers={}))
    taken = await limited.consumer(credit=4)
    first = {text(delivery): delivery for delivery in await taken.next(4)}
    assert sorted(first) == ["a1", "b1", "c1", "free"]
    await limited.uses(admitted=3, waiting=3, keys=3)
    await limited.settle([first["b1"]])
    (second,) = await taken.next()
    assert text(second) == "b2"
    await taken.nothing()
    await limited.settle([second, first["a1"], first["c1"], first["free"]])
    assert await limited.drained(taken, 2, 1) == ["a2", "a3"]


@check
async def two_limits_are_taken_together(bench: Bench) -> None:
    """Or not at all: what waits for one of its limits takes nothing of the other."""
    limited = await Limited.of(bench, one=ONE, two=ONE)
    both = (("one", ""), ("two", ""))
    await limited.publish(limited.task("one", both[0]))
    taken = await limited.consumer()
    (one,) = await taken.next()
    await limited.publish(limited.task("both", *both))
    await taken.nothing()
    await limited.publish(limited.task("two", both[1]))
    (two,) = await taken.next()
    assert text(two) == "two"
    await limited.uses(limited.name("one"), admitted=1, waiting=1)
    await limited.settle([one])
    await taken.nothing()
    await limited.settle([two])
    (last,) = await taken.next()
    assert text(last) == "both"
    for word in ("one", "two"):
        await limited.uses(limited.name(word), admitted=1, waiting=0)
    await limited.settle([last])
    for word in ("one", "two"):
        await limited.uses(limited.name(word), admitted=0, waiting=0)


@check
async def those_for_whom_tasks_wait_take_turns(bench: Bench) -> None:
    """However many one of them has, the tasks of the others come after one each."""
    limited = await Limited.of(bench, bench.other_queue(concurrency=1, fair_by="tenant"))
    await limited.publish(*(limited.task(f"noisy{number}", headers={FAIR_KEY: "noisy"}) for number in range(12)))
    small = [f"{tenant}{number}" for number in range(2) for tenant in "abc"]
    await limited.publish(*(limited.task(said, headers={FAIR_KEY: said[0]}) for said in small))
    taken = await limited.consumer(credit=1)
    came = []
    for _ in range(9):
        deliveries = await taken.next()
        came += [text(delivery) for delivery in deliveries]
        await limited.settle(deliveries)
    assert set(small) <= set(came), f"{came} came first"


@check
async def what_waits_goes_by_priority(bench: Bench) -> None:
    """And then in order."""
    limited = await Limited.of(bench, limit=ONE)
    await limited.publish(limited.task("first"))
    taken = await limited.consumer()
    deliveries = await taken.next()
    waiting = {"low": 0, "middle": None, "high": 9, "after": 9}
    await limited.publish(*(limited.task(said, priority=priority) for said, priority in waiting.items()))
    await limited.uses(waiting=4)
    await limited.settle(deliveries)
    assert await limited.drained(taken, 4, 1) == ["high", "after", "middle", "low"]


async def in_force(taken: Taken, count: int) -> list[Delivery]:
    began = time.monotonic()
    deliveries = await taken.next(count)
    took = time.monotonic() - began
    assert took < IN_FORCE, f"it took {took:.2f} s until the change was in force"
    return deliveries


@check
async def a_limit_is_changed_while_it_is_used(bench: Bench) -> None:
    """Set, paused, resumed and removed, each is in force within a second; what is admitted stays so."""
    limited = await Limited.of(bench, limit=ONE)
    name = limited.name()
    await limited.publish(*(limited.task(f"{number}") for number in range(9)))
    taken = await limited.consumer(credit=20)
    held = await taken.next()
    await taken.nothing()
    await limited.ask(SetLimit(name, LimitRule(concurrency=3)))
    held += await in_force(taken, 2)
    await taken.nothing()
    await limited.ask(SetLimit(name, None))
    await limited.settle(held[:2])
    await taken.nothing()
    await limited.settle(held[2:])
    held = await taken.next()
    await limited.ask(PauseLimit(name))
    assert (await limited.use()).row.paused
    await limited.settle(held)
    await taken.nothing()
    await limited.ask(ResumeLimit(name))
    held = await in_force(taken, 1)
    await taken.nothing()
    await limited.ask(RemoveLimit(name))
    held += await in_force(taken, 4)
    assert name not in {use.row.name for use in await limited.broker.limits.read()}
    await limited.settle(held)
    await limited.declare(limit=ONE)
    await limited.uses(admitted=0, waiting=0)
    await limited.publish(*(limited.task(said) for said in "ab"))
    assert await limited.drained(taken, 2, 1) == ["a", "b"]


@check
async def an_operators_rule_wins_over_the_codes(bench: Bench) -> None:
    """Until it is taken back; of two programs that declare a limit the newer is right."""
    limited = await Limited.of(bench, limit=ONE)
    name, now = limited.name(), time.time()
    await limited.ask(SetLimit(name, LimitRule(concurrency=7)))
    newer = LimitRule(2, Rate(3))
    await limited.ask(DeclareLimits(now + 5, {name: newer}))
    await limited.ask(DeclareLimits(now, {name: ONE}))
    row = (await limited.use()).row
    assert (row.declared, row.changed, row.rule) == (newer, LimitRule(concurrency=7), LimitRule(concurrency=7))
    await limited.ask(SetLimit(name, None))
    assert (await limited.use()).row.rule == newer


@check
async def what_is_asked_of_a_limit_that_is_not_there_is_refused(bench: Bench) -> None:
    """By name, and nothing is made of it."""
    limited = await Limited.of(bench)
    name = limited.name("nosuch")
    rest = RestLimit(name, "", time.time() + 1)
    for request in (SetLimit(name, ONE), PauseLimit(name), ResumeLimit(name), RemoveLimit(name), rest):
        with refused(LimitNotFound):
            await limited.ask(request)
    assert name not in {use.row.name for use in await limited.broker.limits.read()}


@check
async def a_limit_that_nobody_has_declared_lets_go(bench: Bench) -> None:
    """A message of another release may name it."""
    limited = await Limited.of(bench)
    await limited.publish(*(limited.task(said, ("nosuch", "")) for said in "abc"))
    taken = await limited.consumer()
    assert sorted(await taken.texts(3)) == ["a", "b", "c"]


@check
async def a_key_rests_when_a_task_says_so(bench: Bench) -> None:
    """Nothing of it is admitted for a while, and that task is not charged. Other keys go on."""
    limited = await Limited.of(bench, limit=LimitRule(concurrency=5))
    await limited.publish(limited.task("a1", ("limit", "a")))
    taken = await limited.consumer()
    (first,) = await taken.next()
    settled = time.time()
    await limited.settle([first], PutOff(limited.name(), "a", 1.5))
    await limited.publish(limited.task("a2", ("limit", "a")), limited.task("b1", ("limit", "b")))
    (other,) = await taken.next()
    assert text(other) == "b1"
    both = await taken.next(2)
    assert time.time() >= settled + 1.5
    assert sorted(text(delivery) for delivery in both) == ["a1", "a2"]
    again = next(delivery.envelope for delivery in both if text(delivery) == "a1")
    assert (again.id, again.attempt) == (first.envelope.id, 1)
    await limited.settle([other, *both])
    await limited.uses(admitted=0, waiting=0)


@check
async def a_rest_ends_when_the_limit_is_resumed(bench: Bench) -> None:
    """Whoever asked for the rest: a program, or a task."""
    limited = await Limited.of(bench, limit=ONE)
    await limited.ask(RestLimit(limited.name(), "a", time.time() + 3_600))
    taken = await limited.consumer()
    await limited.publish(limited.task("a1", ("limit", "a")))
    await taken.nothing()
    await limited.ask(ResumeLimit(limited.name()))
    assert [text(delivery) for delivery in await in_force(taken, 1)] == ["a1"]


@check
async def a_task_may_put_off_what_is_no_limit_of_its_own(bench: Bench) -> None:
    """It waits by itself then, as long."""
    limited = await Limited.of(bench, limit=ONE)
    taken = await limited.consumer()
    for said, limit in (("plain", "limit"), ("unknown", "nosuch")):
        task = limited.task(said, (limit, ""))
        task = msgspec.structs.replace(task, headers={}) if said == "plain" else task
        await limited.publish(task)
        settled = time.time()
        await limited.settle(await taken.next(), PutOff(limited.name(limit), "", 0.7))
        (again,) = await taken.next()
        assert time.time() >= settled + 0.7
        assert (text(again), again.envelope.attempt) == (said, 1)
        await limited.settle([again])


@check
async def what_is_delayed_waits_for_its_limits_when_it_is_due(bench: Bench) -> None:
    """A task that is due later, or is tried again later, has no permit until then, and is not among the limited."""
    limited = await Limited.of(bench, limit=ONE)
    taken = await limited.consumer()
    await limited.publish(limited.task("first"), limited.task("later", due=time.time() + 1))
    (first,) = await taken.next()
    await limited.uses(admitted=1, waiting=1)
    await becomes(limited.broker, limited.queue, limited=1, delayed=0, running=1)
    await taken.nothing()
    await limited.settle([first], Retrying("once more", delay=0.5))
    (later,) = await taken.next()
    assert text(later) == "later"
    await limited.uses(admitted=1, waiting=1)
    await taken.nothing()
    await limited.settle([later])
    (again,) = await taken.next()
    assert (text(again), again.envelope.attempt) == ("first", 2)
    await limited.settle([again])
    await limited.uses(admitted=0, waiting=0)


@check
async def a_dead_letter_that_lives_again_waits_for_its_limits(bench: Bench) -> None:
    """It gave its permit back when it died."""
    limited = await Limited.of(bench, limit=ONE)
    taken = await limited.consumer()
    await limited.publish(limited.task("dead"))
    (dead,) = await taken.next()
    await limited.settle([dead], DeadLettered("no"))
    await limited.uses(admitted=0, waiting=0)
    await limited.publish(limited.task("other"))
    other = await taken.next()
    await becomes(limited.broker, limited.queue, dead=1)
    assert await limited.broker.dead_letters.retry(limited.queue.name, [dead.envelope.id]) == [dead.envelope.id]
    await taken.nothing()
    await limited.uses(admitted=1, waiting=1)
    await limited.settle(other)
    assert await limited.drained(taken, 1, 1) == ["dead"]
    await limited.uses(admitted=0, waiting=0)


@check
async def what_is_purged_waits_no_more(bench: Bench) -> None:
    """It is removed with what is ready; what runs keeps its permit until it has ended."""
    limited = await Limited.of(bench, limit=LimitRule(concurrency=2))
    await limited.publish(*(limited.task(f"{number}") for number in range(6)))
    taken = await limited.consumer()
    held = await taken.next(2)
    await limited.uses(admitted=2, waiting=4)
    removed = await limited.broker.queues.purge(limited.queue.name, force=True)
    assert (removed.ready, removed.delayed) == (4, 0)
    await limited.uses(admitted=2, waiting=0)
    await becomes(limited.broker, limited.queue, limited=0, ready=0, running=2)
    await limited.publish(limited.task("after"))
    await taken.nothing()
    await limited.settle(held)
    assert await limited.drained(taken, 1, 1) == ["after"]
    await limited.uses(admitted=0, waiting=0)


@check
async def what_is_deleted_with_a_permit_gives_it_back(bench: Bench) -> None:
    """A task that its worker left has a permit, and is purged, or its queue deleted."""
    limited = await Limited.of(bench, limit=ONE)
    for said in ("purged", "deleted"):
        await limited.publish(limited.task(said), limited.task(f"{said} too"))
        async with bench.broker().consume([limited.queue], credit=10) as consumer:
            taken = Taken(consumer)
            assert await taken.texts(1) == [said]
            taken.abandon()
        await becomes(limited.broker, limited.queue, ready=1, limited=1, running=0, consumers=0)
        if said == "purged":
            await limited.broker.queues.purge(limited.queue.name)
        else:
            await limited.broker.queues.delete(limited.queue.name)
            await limited.broker.declare([limited.queue])
        await limited.uses(admitted=0, waiting=0)
    await limited.publish(limited.task("after"))
    assert await limited.drained(await limited.consumer(), 1, 1) == ["after"]


@check
async def a_cancelled_task_holds_nobody_up(bench: Bench) -> None:
    """One that waits for a limit, and one that came back with its permit: what waits behind them is admitted."""
    limited = await Limited.of(bench, limit=ONE)
    tasks = [limited.task(said) for said in ("left", "unwanted", "last")]
    await limited.publish(*tasks)
    async with bench.broker().consume([limited.queue], credit=10) as consumer:
        taken = Taken(consumer)
        assert await taken.texts(1) == ["left"]
        taken.abandon()
    for task in tasks[:2]:
        await limited.broker.control.cancel(task.id)
    other = await limited.consumer()
    came: list[str] = []
    # Where a task that waits cannot be reached its worker hears that it was cancelled.
    while "last" not in came:
        deliveries = await other.next()
        came += [text(delivery) for delivery in deliveries]
        await limited.settle(deliveries, Succeeded() if came[-1] == "last" else Cancelled("unwanted"))
    await limited.uses(admitted=0, waiting=0)
    await becomes(limited.broker, limited.queue, ready=0, limited=0, running=0)


@check
async def a_queue_with_a_limit_counts_each_task(bench: Bench) -> None:
    """Those too that name no limit: another program's, and those that were there before the queue had one."""
    queue = bench.other_queue(concurrency=2)
    plain = msgspec.structs.replace(queue, concurrency=None)
    before = await bench.declared(plain)
    await before.publish([bench.envelope(said, queue=queue.name) for said in ("before1", "before2", "before3")])
    limited = await Limited.of(bench, queue)
    taken = await limited.consumer()
    came = await taken.next(2)
    await taken.nothing()
    await limited.publish(limited.task("after", headers={"tenant": "acme"}))
    await limited.uses(queue_limit(queue.name), admitted=2, waiting=2)
    await becomes(limited.broker, queue, limited=2, running=2, ready=0)
    await limited.settle(came)
    assert sorted(await limited.drained(taken, 2, 2)) == ["after", "before3"]
    await limited.uses(queue_limit(queue.name), admitted=0, waiting=0)
    await limited.ask(RemoveLimit(queue_limit(queue.name)))


@check
async def a_limit_is_shared_by_queues(bench: Bench) -> None:
    """What one queue's task gives back another queue's may have, whoever consumes them."""
    limited = await Limited.of(bench, limit=ONE)
    other = Limited(bench, limited.broker, bench.other_queue())
    await limited.broker.declare([other.queue])
    await limited.ask(DeclareLimits(time.time(), {}, [other.queue.name]))
    header = limited.task("").headers
    await limited.publish(limited.task("one"))
    one, two = await limited.consumer(), await other.consumer()
    held = await one.next()
    await other.publish(other.task("two", headers=header))
    await two.nothing()
    await limited.uses(admitted=1, waiting=1, keys=1)
    await limited.settle(held)
    held = await two.next()
    await limited.publish(limited.task("three"))
    await one.nothing()
    await limited.settle(held)
    assert await limited.drained(one, 1, 1) == ["three"]


def _replaceable(limited: Limited, said: str, **changes: object) -> Envelope:
    task = limited.task(said, **changes)
    return task.with_headers({UNIQUE_KEY: f"{limited.queue.name}:1", UNIQUE_CONFLICT: "replace"})


@check
async def what_waits_for_a_limit_gets_newer_arguments(bench: Bench) -> None:
    """It stays where it waits, and counts once. Its key is free when it has ended."""
    limited = await Limited.of(bench, limit=ONE)
    first, second, third = limited.task("first"), _replaceable(limited, "second"), limited.task("third")
    await limited.publish(first, second, third)
    taken = await limited.consumer()
    running = await taken.next()
    newest = _replaceable(limited, "newest")
    assert await limited.broker.publish([newest], on_conflict="replace") == {newest.id: second.id}
    await limited.settle(running)
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (second.id, newest.body)
    await limited.uses(admitted=1)
    await limited.settle([delivery])
    await limited.settle(await taken.next())
    await limited.uses(admitted=0)
    fresh = _replaceable(limited, "fresh")
    assert await limited.broker.publish([fresh], on_conflict="replace") is None


@check
async def what_runs_again_does_so_after_the_run_before(bench: Bench) -> None:
    """`RERUN` is in force though nobody has declared it. Of the calls while a task runs the last one counts."""
    broker = await bench.declared(bench.queue)
    await bench.enter(bench.broker().limits.keep())
    key = f"{bench.queue.name}:1"
    headers = {
        UNIQUE_KEY: key,
        UNIQUE_SCOPE: "waiting",
        UNIQUE_CONFLICT: "replace",
        LIMITS: limit_header([(RERUN, key)]),
    }

    async def call(said: str) -> tuple[Envelope, str | None]:
        task = bench.envelope(said, headers=headers)
        existing = await broker.publish([task], on_conflict="replace")
        return task, (existing or {}).get(task.id)

    first, _ = await call("first")
    taken = await bench.consumer(bench.broker(), bench.queue, credit=10)
    running = await taken.next()
    second, taken_by = await call("second")
    assert taken_by is None
    assert (await call("third"))[1] == second.id
    await taken.nothing()
    await settle_all(broker, running, Succeeded())
    again = await taken.next()
    assert [(one.envelope.id, text(one)) for one in [*running, *again]] == [(first.id, "first"), (second.id, "third")]
    await taken.nothing()
    await settle_all(broker, again, Succeeded())
    await becomes(broker, bench.queue, ready=0, limited=0, running=0)


@check
async def what_is_put_off_counts_for_no_limit(bench: Bench) -> None:
    """A later call says when it is due: until then others run."""
    limited = await Limited.of(bench, limit=ONE)
    first, second = limited.task("first"), _replaceable(limited, "second")
    await limited.publish(first, second)
    taken = await limited.consumer()
    running = await taken.next()
    newest = _replaceable(limited, "newest", due=time.time() + 4)
    assert await limited.broker.publish([newest], on_conflict="replace") == {newest.id: second.id}
    third = limited.task("third")
    await limited.publish(third)
    await limited.settle(running)
    (delivery,) = await taken.next()
    assert delivery.envelope.id == third.id
    await limited.settle([delivery])
    (delivery,) = await taken.next()
    assert (delivery.envelope.id, delivery.envelope.body) == (second.id, newest.body)
    await limited.settle([delivery])
    await limited.uses(admitted=0)
