"""Who admits tasks, on a table of paper: what it stores, what it acknowledges, and what a next one finds."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.rabbitmq.admission import Admission, AskAlive, Clear, Emptied
from leveret.brokers.rabbitmq.amqp import Incoming, Properties
from leveret.brokers.rabbitmq.amqp.sanitize import marshal
from leveret.brokers.rabbitmq.queues import to_message, to_wait
from leveret.errors import QueueFull
from leveret.model import LIMITS, DeclareLimits, Envelope, LimitRule, Rate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from leveret.brokers.rabbitmq.coordination import Ride
    from leveret.errors import EnqueueError


class Paper:
    """A tenure whose rows outlive it."""

    def __init__(self, epoch: int = 1, rows: Mapping[str, bytes] | None = None) -> None:
        self.epoch = epoch
        self.rows = dict(rows or {})
        self.rides: list[Ride] = []
        self.take: Callable[[list[Incoming]], None] | None = None
        self.acknowledged: list[int] = []
        self.is_closed = False

    async def change(self, rows: Mapping[str, bytes | None]) -> None:
        for key, value in rows.items():
            if value is None:
                self.rows.pop(key, None)
            else:
                self.rows[key] = value

    async def enqueue_all(self, rides: Sequence[Ride]) -> None:
        self.rides += rides

    def store(self, refusal: EnqueueError | None = None) -> list[str]:
        """What is on the way is stored, or refused; the ids."""
        rides, self.rides = self.rides, []
        for ride in rides:
            if refusal is None:
                self.rows[ride.key] = ride.value
            ride.told(refusal)
        return [ride.message.id for ride in rides]

    def drop(self, keys: Iterable[str]) -> None:
        for key in keys:
            self.rows.pop(key, None)

    async def consume(self, queue: str, prefetch: int, take: Callable[[list[Incoming]], None]) -> Paper:  # noqa: ARG002
        self.take = take
        return self

    def acknowledge(self, tags: Sequence[int], oldest: int | None) -> None:  # noqa: ARG002
        self.acknowledged += tags


class Driven:
    """Who admits, with one queue and a limit of two."""

    def __init__(self, paper: Paper) -> None:
        self.paper = paper
        self.admission = Admission(paper, self._count)  # type: ignore[arg-type]

    async def _count(self, queue: str) -> tuple[int, int]:  # noqa: ARG002
        return 0, 1

    async def begin(self) -> None:
        await self.admission.do(DeclareLimits(1.0, {"few": LimitRule(concurrency=2)}, ["work"]))
        await self.admission.admitting.windows.open("work")
        window = self.admission.admitting.windows.get("work")
        assert window is not None
        window.is_taken = True

    async def admit(self) -> list[str]:
        """The ids of what is on the way now."""
        await self.admission.admitting.admit("work", 2.0)
        return [ride.message.id for ride in self.paper.rides]

    def deliver(self, *messages: Incoming) -> None:
        assert self.paper.take is not None
        self.paper.take(list(messages))

    @property
    def permits(self) -> list[str]:
        return [key[1:] for key in self.paper.rows if key.startswith("p")]

    async def settled(self) -> list[int]:
        await asyncio.sleep(0)
        return sorted(self.paper.acknowledged)


def task(id_: str, tag: int) -> Incoming:
    envelope = Envelope(id_, "work", "resize", b"{}", headers={LIMITS: '[["few",""]]'}, enqueued_at=1.0)
    properties = to_wait(to_message(envelope)).properties
    encoded = marshal(properties) if isinstance(properties, Properties) else properties.encode()
    return Incoming(b"c", tag, redelivered=False, header=b"\x00\x3c" + bytes(10) + encoded, body=b"{}")


async def held(*rows: Paper) -> Driven:
    one = Driven(rows[0] if rows else Paper())
    await one.begin()
    return one


async def test_what_is_stored_leaves_the_gate_and_its_end_lets_the_next_one_go() -> None:
    one = await held()
    one.deliver(task("a", 1), task("b", 2), task("c", 3))
    assert await one.admit() == ["a", "b"]
    assert await one.settled() == [], "not before it is stored"
    one.paper.store()
    assert await one.settled() == [1, 2]
    assert await one.admit() == []
    one.admission.admitting.end(one.permits[:1])
    assert await one.admit() == ["c"]
    assert len(one.permits) == 1


async def test_an_end_may_come_before_it_is_known_that_the_task_is_stored() -> None:
    one = await held()
    one.deliver(task("a", 1))
    await one.admit()
    (permit,) = [ride.key[1:] for ride in one.paper.rides]
    one.admission.admitting.end([permit])
    assert await one.settled() == [1]
    one.paper.store()
    assert (await one.admission.answer(AskAlive([permit]))).alive == []


async def test_what_is_refused_waits_on() -> None:
    one = await held()
    one.deliver(task("a", 1))
    await one.admit()
    one.paper.store(QueueFull("full", ["a"]))
    assert await one.admit() == ["a"]
    one.paper.store()
    assert await one.settled() == [1]
    assert len(one.permits) == 1


async def test_the_next_one_counts_what_was_admitted_and_keeps_its_messages_until_the_end() -> None:
    first = await held()
    a, b, c = task("a", 1), task("b", 2), task("c", 3)
    first.deliver(a, b, c)
    await first.admit()
    first.paper.store()
    # It dies before its acknowledgments are applied.
    other = await held(Paper(2, first.paper.rows))
    other.deliver(a, b, c)
    assert await other.admit() == []
    assert await other.settled() == []
    other.admission.admitting.end(other.permits[:1])
    assert await other.settled() == [1]
    assert await other.admit() == ["c"]


async def test_a_task_that_was_admitted_and_is_nowhere_waits_anew() -> None:
    first = await held()
    a = task("a", 1)
    first.deliver(a)
    await first.admit()
    first.paper.store()
    other = await held(Paper(2, first.paper.rows))
    other.deliver(a)
    gone = other.admission.admitting.admitted.missing(other.permits, Emptied("work", 0, []))
    assert len(gone) == 1
    other.admission.admitting.lose("work", gone)
    assert await other.admit() == ["a"]
    assert other.permits == []


@pytest.mark.parametrize(
    ("taken", "running", "gone"), [(0, [], 2), (1, ["a"], 1), (1, [], 0), (2, ["a", "b"], 0), (2, [], 0)]
)
async def test_a_permit_is_missing_only_where_nothing_else_can_be_meant(
    taken: int, running: list[str], gone: int
) -> None:
    one = await held()
    one.deliver(task("a", 1), task("b", 2))
    await one.admit()
    one.paper.store()
    assert len(one.admission.admitting.admitted.missing(one.permits, Emptied("work", taken, running))) == gone
    assert one.admission.admitting.admitted.missing(one.permits, None) == frozenset()


async def test_what_is_cleared_leaves_the_gate() -> None:
    one = await held()
    one.deliver(*(task(f"{number}", number) for number in range(1, 5)))
    await one.admit()
    assert (await one.admission.answer(Clear("work"))).held == {"work": 2}
    assert await one.settled() == [3, 4]


async def test_tasks_with_a_rate_are_not_admitted_to_stand_in_their_queue() -> None:
    """And a rate of others' tasks is nothing to them."""
    one = await held()
    slow = {"few": LimitRule(rate=Rate(10, per=1.0, burst=100)), "other": LimitRule(rate=Rate(1))}
    await one.admission.do(DeclareLimits(2.0, slow, ["work"]))
    window = one.admission.admitting.windows.get("work")
    assert window is not None
    one.deliver(*(task(f"{number}", number) for number in range(1, 60)))
    window.ready = 15
    assert one.admission.admitting.room("work") == 5
    await one.admission.do(DeclareLimits(3.0, {"few": LimitRule(concurrency=100)}, ["work"]))
    assert one.admission.admitting.room("work") == 2_000
