"""Limits in the file: the counts are right after whatever happened, nothing waits for nothing, and turns are exact."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import time
from collections import Counter
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING

import msgspec
import pytest

from leveret.brokers.sqlite import SQLiteBroker
from leveret.model import (
    FAIR_KEY,
    LIMITS,
    Cancelled,
    DeadLettered,
    DeclareLimits,
    Envelope,
    LimitRule,
    PutOff,
    Queue,
    Rate,
    Released,
    Retrying,
    SetLimit,
    Succeeded,
    limit_header,
    new_id,
    queue_limit,
)
from leveret.testing.bench import Taken, text

if TYPE_CHECKING:
    from pathlib import Path

    from leveret.model import Delivery, Outcome

RULES = {"one": LimitRule(1), "keyed": LimitRule(2), "fast": LimitRule(3, Rate(500, per=1.0, burst=2))}
QUEUES = [Queue("plain"), Queue("ruled", concurrency=4), Queue("fair", fair_by="tenant")]
OUTCOMES: list[Outcome] = [
    *[Succeeded()] * 4,
    Released(),
    Retrying("again"),
    Retrying("later", delay=0.01),
    DeadLettered("no"),
    Cancelled("no"),
    PutOff("keyed", "a", 0.02),
    PutOff("one", "", 0.02),
]


def task(choose: random.Random) -> Envelope:
    refs = choose.choice(
        [
            [],
            [("one", "")],
            [("keyed", "a")],
            [("keyed", "b")],
            [("keyed", "a"), ("one", "")],
            [("fast", "")],
            [("no", "")],
        ]
    )
    headers: dict[str, str] = {LIMITS: limit_header(refs)} if refs else {}
    if choose.random() < 0.4:
        headers[FAIR_KEY] = choose.choice("xyz")
    due = time.time() + 0.01 if choose.random() < 0.1 else None
    queue = choose.choice(QUEUES).name
    return Envelope(new_id(), queue, "t", b"", headers=headers, due=due, priority=choose.choice([None, None, 1, 9]))


def check_counts(path: Path) -> None:
    """What is admitted of each limit is what runs, or came back with its permit, and no more than is allowed."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("BEGIN")  # one look at all of it: a rate may let tasks go at any time
        used = {lane: msgspec.json.decode(uses) for lane, uses in database.execute("SELECT id, uses FROM lane")}
        counted: Counter[int] = Counter()
        for (lane,) in database.execute("SELECT lane FROM task WHERE lane NOT NULL AND state IN ('ready', 'running')"):
            counted.update(used[lane])
        for id_, name, admitted in database.execute("SELECT id, name, admitted FROM limit_use").fetchall():
            assert admitted == counted[id_], (name, admitted, counted[id_])
            rule = RULES.get(name)
            assert rule is None or rule.concurrency is None or admitted <= rule.concurrency


class Programs:
    """What programs do with the file, in any order."""

    def __init__(self, broker: SQLiteBroker, choose: random.Random) -> None:
        self.broker = broker
        self.choose = choose
        self.ids: list[str] = []
        self.takers: list[tuple[Taken, AsyncExitStack]] = []
        self.held: list[Delivery] = []

    async def join(self) -> None:
        leaving = AsyncExitStack()
        consumer = await leaving.enter_async_context(self.broker.consume(QUEUES, credit=self.choose.choice([1, 3, 8])))
        self.takers.append((Taken(consumer), leaving))

    async def leave(self) -> None:
        taken, leaving = self.takers.pop(0)
        taken.abandon()
        await leaving.aclose()
        self.held = [one for one in self.held if one.lease.held]

    async def publish(self) -> None:
        made = [task(self.choose) for _ in range(self.choose.randrange(1, 5))]
        self.ids += [one.id for one in made]
        await self.broker.publish(made)

    async def cancel(self) -> None:
        await self.broker.control.cancel(self.choose.choice([*self.ids, "nobody"]))

    async def purge(self) -> None:
        await self.broker.queues.purge(self.choose.choice(QUEUES).name, force=True)

    async def replace(self) -> None:
        await self.leave()
        await self.join()

    async def set_limit(self) -> None:
        await self.broker.limits.ask(SetLimit("keyed", self.choose.choice([None, LimitRule(2), LimitRule(1)])))

    async def settle(self) -> None:
        for taken, _ in self.takers:
            self.held += await taken.next_within(0.005)
        chosen = self.choose.sample(self.held, min(len(self.held), self.choose.randrange(4)))
        self.held = [one for one in self.held if one not in chosen]
        await self.broker.settle([(one, self.choose.choice(OUTCOMES)) for one in chosen])

    async def finish(self) -> None:
        """Until nothing is left; fails when something waits for nothing."""
        until = time.monotonic() + 30
        while any(one.ready + one.limited + one.delayed + one.running for one in await self.broker.queues.stats()):
            assert time.monotonic() < until, await self.broker.queues.stats()
            await self.broker.settle([(one, Succeeded()) for one in self.held])
            self.held.clear()
            for taken, _ in self.takers:
                while more := await taken.next_within(0.01):
                    self.held += more


@pytest.mark.parametrize("seed", range(4))
async def test_counts_are_right_whatever_happens(tmp_path: Path, seed: int) -> None:
    """Tasks come, end in all ways, are cancelled and purged, consumers die. At last all are done, and none is held."""
    choose, path = random.Random(seed), tmp_path / "tasks.db"
    broker = SQLiteBroker(path, timeout=10)
    await broker.declare(QUEUES)
    rules = RULES | {queue_limit(queue.name): queue.rule for queue in QUEUES if queue.rule is not None}
    await broker.limits.ask(DeclareLimits(time.time(), rules, [queue.name for queue in QUEUES]))
    programs = Programs(broker, choose)
    await programs.join()
    await programs.join()
    often, seldom = [programs.publish, programs.settle], [programs.cancel, programs.replace, programs.set_limit]
    for _ in range(150):
        await choose.choice([*often * 6, *seldom * 2, programs.purge])()
        check_counts(path)
    await broker.limits.ask(SetLimit("keyed", None))
    await programs.finish()
    assert {use.admitted + use.waiting for use in await broker.limits.read()} == {0}
    await programs.leave()
    await programs.leave()
    await broker.close()


async def test_turns_are_exact(tmp_path: Path) -> None:
    """Admission follows the workers: who has few tasks is served at once, though another one's were all there first."""
    broker = SQLiteBroker(tmp_path / "tasks.db", timeout=10)
    queue = Queue("fair", fair_by="tenant")
    await broker.declare([queue])

    def of(tenant: str, number: int) -> Envelope:
        return Envelope(new_id(), queue.name, "t", f"{tenant}{number}".encode(), headers={FAIR_KEY: tenant})

    await broker.publish([of("noisy", number) for number in range(500)])
    await broker.publish([of(tenant, number) for tenant in "abc" for number in range(3)])
    async with broker.consume([queue], credit=1) as consumer:
        taken = Taken(consumer)
        came = []
        for _ in range(12):
            (delivery,) = await taken.next()
            came.append(text(delivery))
            await broker.settle([(delivery, Succeeded())])
        taken.abandon()
    assert came == [f"{tenant}{number}" for number in range(3) for tenant in ("noisy", "a", "b", "c")]
    await broker.close()


async def test_a_rate_is_kept_by_all_programs_together(tmp_path: Path) -> None:
    """It is counted in the file: two programs have no more than one, and wait for it."""
    path = tmp_path / "tasks.db"
    brokers = [SQLiteBroker(path, timeout=10) for _ in range(2)]
    queue = Queue("q")
    await brokers[0].declare([queue])
    await brokers[0].limits.ask(DeclareLimits(time.time(), {"fast": LimitRule(rate=Rate(20, per=1, burst=1))}))
    headers = {LIMITS: limit_header([("fast", "")])}
    await brokers[0].publish([Envelope(new_id(), queue.name, "t", b"", headers=headers) for _ in range(21)])
    began = time.monotonic()
    starts: list[float] = []

    async def work(broker: SQLiteBroker) -> None:
        async with broker.consume([queue], credit=2) as consumer:
            taken = Taken(consumer)
            while len(starts) < 21:
                for delivery in await taken.next_within(0.05):
                    starts.append(time.monotonic())
                    await broker.settle([(delivery, Succeeded())])
            taken.abandon()

    await asyncio.gather(*map(work, brokers))
    assert starts[-1] - began >= 0.95
    assert starts[-1] - began < 4
    for broker in brokers:
        await broker.close()
