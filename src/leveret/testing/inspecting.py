"""The checks of `conformance` for who looks on: what the workers do, what changed last, and all that changes."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from leveret.model import ChildReport, DeadLettered, RunningTask, Succeeded, WorkerReport, newer, started
from leveret.testing.bench import PATIENCE, Bench, check
from leveret.testing.following import ended, published, sent

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from leveret.brokers import Broker
    from leveret.model import Status


class Self:
    """A worker that describes itself, and notes how often it was asked."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.asked = 0
        self._queue = bench.queue.name
        self._name = f"{name} of {self._queue}"

    def __call__(self) -> WorkerReport:
        self.asked += 1
        return self.told(self.asked)

    def told(self, count: int) -> WorkerReport:
        """What it tells when it is asked for the so many-th time."""
        running = [RunningTask("1", "check", self._queue, 2, 1e9 + 0.5), RunningTask("ü", None, self._queue, 1, 1e9)]
        children = [ChildReport(17, running, 3, 1 << 40), ChildReport(18, [], 0, 0)]
        return WorkerReport(self._name, 1e9, [self._queue], children, 5, count, 1)


async def workers_of(broker: Broker, bench: Bench) -> list[WorkerReport]:
    """Those of this check, by their names."""
    found = [report for report in await broker.control.workers() if bench.queue.name in report.queues]
    return sorted(found, key=lambda report: report.name)


@check
async def workers_say_what_they_do(bench: Bench) -> None:
    """Whoever asks is told by each, and each time anew; consumers that describe nothing are left out, and the gone."""
    broker, other = await bench.declared(), bench.broker()
    one, two = Self(bench, "1"), Self(bench, "2")
    await bench.consumer(broker)
    async with _working(bench, one), _working(bench, two):
        last = 0
        for _ in range(2):
            reports = await workers_of(other, bench)
            assert reports == [worker.told(report.finished) for worker, report in zip((one, two), reports, strict=True)]
            assert all(last < report.finished for report in reports)
            last = min(one.asked, two.asked)
    assert await workers_of(other, bench) == []


@check
async def a_worker_that_stops_still_says_what_it_does(bench: Bench) -> None:
    """It takes no more, and what it runs may take long."""
    broker, other = await bench.declared(), bench.broker()
    one = Self(bench, "1")
    async with broker.consume([bench.queue], credit=1, describe=one) as consumer:
        reading = asyncio.ensure_future(_read_out(aiter(consumer)))
        await consumer.stop()
        (report,) = await workers_of(other, bench)
        assert report == one.told(report.finished)
    await reading


@check
async def what_changed_last_comes_first(bench: Bench) -> None:
    """Another program sees the tasks that were enqueued, run or given up last, with what is known of them."""
    broker, other = await bench.declared(), bench.broker()
    envelopes = [sent(bench, text) for text in "abc"]
    for envelope in envelopes:
        await published(broker, envelope)
    taken = await bench.consumer(broker, credit=3)
    a, b, c = await taken.next(3)
    await ended(broker, c, DeadLettered("broken", "where"))
    await ended(broker, a, Succeeded(b"1"))
    await broker.statuses.notify([started(b.envelope, "check", time.time())])
    deadline = asyncio.get_running_loop().time() + PATIENCE
    while True:
        recent = [status for status in await other.statuses.recent(1_000) if status.queue == bench.queue.name]
        if [status.state for status in recent] == ["running", "succeeded", "dead"]:
            break
        assert asyncio.get_running_loop().time() < deadline, recent
        await asyncio.sleep(0.05)
    assert [status.id for status in recent] == [d.envelope.id for d in (b, a, c)]
    assert (recent[2].error, recent[2].traceback) == ("broken", "where")
    assert bytes(recent[1].encoded_result) == b"1"
    assert len(await other.statuses.recent(2)) == 2


@check
async def who_watches_sees_all_that_changes(bench: Bench) -> None:
    """Each task whose results are kept, from its enqueueing to its end, without being asked for by its id."""
    broker, other = await bench.declared(), bench.broker()
    before = sent(bench, "before")
    await published(broker, before)
    taken = await bench.consumer(broker)
    (first,) = await taken.next()
    await ended(broker, first, Succeeded(b"0"))
    async with other.statuses.watch() as updates:
        seen = _Seen(updates, bench)
        envelope = sent(bench, "a")
        await published(broker, envelope)
        await seen.until(envelope.id, "queued")
        (delivery,) = await taken.next()
        await broker.statuses.notify([started(envelope, "check", time.time())])
        assert (await seen.until(envelope.id, "running")).task == "check"
        await ended(broker, delivery, Succeeded(b'"done"'))
        assert bytes((await seen.until(envelope.id, "succeeded")).encoded_result) == b'"done"'
    assert before.id not in seen.known


@check
async def who_watches_slowly_misses_no_task(bench: Bench) -> None:
    """Many updates that wait to be read are added up; two may watch at once."""
    broker, other = await bench.declared(), bench.broker()
    taken = await bench.consumer(broker, credit=None)
    async with other.statuses.watch() as updates, other.statuses.watch() as more:
        envelopes = [sent(bench, str(number)) for number in range(200)]
        for envelope in envelopes:
            await published(broker, envelope)
        for delivery in await taken.next(len(envelopes)):
            await ended(broker, delivery, Succeeded(delivery.envelope.body))
        for seen in (_Seen(updates, bench), _Seen(more, bench)):
            for envelope in envelopes:
                assert (
                    bytes((await seen.until(envelope.id, "succeeded")).encoded_result).decode()
                    == envelope.body.decode()
                )


class _Seen:
    """The updates that came, added up."""

    def __init__(self, updates: AsyncIterator[Sequence[Status]], bench: Bench) -> None:
        self.known: dict[str, Status] = {}
        self._updates = updates
        self._queue = bench.queue.name

    async def until(self, id_: str, state: str) -> Status:
        async with asyncio.timeout(PATIENCE):
            while id_ not in self.known or self.known[id_].state != state:
                for update in await anext(self._updates):
                    if update.queue == self._queue:
                        self.known[update.id] = newer(self.known.get(update.id), update)
        return self.known[id_]


@asynccontextmanager
async def _working(bench: Bench, describe: Self) -> AsyncGenerator[None]:
    async with bench.broker().consume([bench.queue], credit=1, describe=describe) as consumer:
        reading = asyncio.ensure_future(_read_out(aiter(consumer)))
        yield
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


async def _read_out(arriving: AsyncIterator[object]) -> None:
    async for _ in arriving:
        pass
