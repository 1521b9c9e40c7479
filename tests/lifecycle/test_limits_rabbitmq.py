"""Limits on RabbitMQ: real workers that are killed, and whoever admits tasks is among them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import limited_app
from tests.support.limited_app import app, few, free, serve, step, tick
from tests.support.waiting import PATIENCE, until
from tests.support.workers import READY, Ledger, Worker

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(limited_app.__file__)}:app"
#: How many there may be at once, and how often a worker is killed (seconds).
MOST, BETWEEN = 5, 2.0
#: How long all may take (seconds).
LONG = 150.0


def most_at_once(ledger: Ledger) -> int:
    """How many tasks ran at once, by what they wrote. One whose worker was killed runs until it has run again."""
    running: set[str] = set()
    most = 0
    for line in ledger.lines():
        word, number, *_ = line.split()
        if word == "began":
            running.add(number)
            most = max(most, len(running))
        elif word == "ended":
            running.discard(number)
    return most


class Workers:
    """Some at once; the oldest one is killed with its children, and another one begins."""

    def __init__(self, url: str, ledger: Ledger, count: int) -> None:
        self._url, self._ledger = url, ledger
        self._running = [self._start() for _ in range(count)]
        for worker in self._running:
            worker.ready()

    def _start(self) -> Worker:
        return Worker(self._url, self._ledger, "--concurrency", "4", app=APP)

    def add(self) -> None:
        self._running.append(self._start().ready())

    @property
    def are_ready(self) -> bool:
        """Killed before they are, on a busy machine none would ever run a task."""
        return all(READY in worker.output for worker in self._running)

    def kill(self) -> None:
        self._running.pop(0).kill_group()
        self._running.append(self._start())

    def close(self) -> None:
        for worker in self._running:
            worker.kill_group()


async def test_never_more_than_allowed_whoever_is_killed(place: Place, ledger: Ledger) -> None:
    count = 1_500
    app.client.connect_to(place.url)
    workers = Workers(place.url, ledger, 4)
    try:
        await step.enqueue_many([(number,) for number in range(count)])
        kill_at = time.monotonic() + BETWEEN
        deadline = time.monotonic() + LONG
        while len({line.split()[1] for line in ledger.lines_of("ended")}) < count:
            assert time.monotonic() < deadline, f"{ledger.count('ended')} have ended: {await few.use()}"
            if time.monotonic() >= kill_at and workers.are_ready:
                workers.kill()
                kill_at = time.monotonic() + BETWEEN
            await asyncio.sleep(0.1)

        async def none_are_left() -> bool:
            use = await few.use()
            return (use.admitted, use.waiting) == (0, 0)

        await until(none_are_left, "no permit is left")
    finally:
        workers.close()
        await app.close()
    assert most_at_once(ledger) == MOST


async def test_limits_that_only_the_producer_knows_of(place: Place, ledger: Ledger) -> None:
    """Of a queue whose tasks have none in the code: before a worker is there, and when one is."""
    app.client.connect_to(place.url)
    limited = free.options(limits=few)
    workers = Workers(place.url, ledger, 0)
    try:
        early = await limited.enqueue(1)
        workers.add()
        late = await limited.enqueue(2)
        assert [await early.result(timeout=PATIENCE), await late.result(timeout=PATIENCE)] == [1, 2]
    finally:
        workers.close()
        await app.close()


async def test_a_rate_is_kept_whoever_is_killed(place: Place, ledger: Ledger) -> None:
    """20 a second. A task that ran when its worker was killed may run again, and is the same one."""
    count = 120
    app.client.connect_to(place.url)
    workers = Workers(place.url, ledger, 2)
    try:
        await tick.enqueue_many([(number,) for number in range(count)])
        for part in (1, 2):
            await asyncio.to_thread(ledger.wait_for, "tick", part * count // 3, LONG)
            workers.kill()
        await until(lambda: len({line.split()[1] for line in ledger.lines_of("tick")}) == count, "all have run", LONG)
    finally:
        workers.close()
        await app.close()
    first: dict[str, float] = {}
    for line in ledger.lines_of("tick"):
        _, number, at = line.split()
        first.setdefault(number, float(at))
    times = sorted(first.values())
    most = max(sum(start <= other < start + 1.0 for other in times) for start in times)
    # What is admitted starts a little later, one time more than another.
    assert most <= 24, f"{most} of 20 started within a second"


async def test_who_has_few_tasks_does_not_wait_for_who_has_many(place: Place, ledger: Ledger) -> None:
    many, tenants, each = 1_500, 20, 5
    app.client.connect_to(place.url)
    workers = Workers(place.url, ledger, 0)
    try:
        await serve.enqueue_many([("many", number) for number in range(many)])
        await serve.enqueue_many([(f"t{tenant}", number) for number in range(each) for tenant in range(tenants)])
        workers.add()
        await until(lambda: len(ledger.lines_of("serve t")) == tenants * each, "the small ones have run", LONG)
        before = ledger.count("serve many")
    finally:
        workers.close()
        await app.close()
    # In turn, each round has one of "many"; and 200 are admitted ahead of them all on RabbitMQ.
    assert before <= 200 + 2 * tenants * each
