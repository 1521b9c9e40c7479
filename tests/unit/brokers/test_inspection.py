"""Who looks on: what a worker tells of itself, questions that are left over, and readers that are slow."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from contextlib import closing
from typing import TYPE_CHECKING

import msgspec

from leveret.brokers import feeds as following
from leveret.brokers.feeds import Watch
from leveret.brokers.rabbitmq.control.bus import Report, asks_for_workers
from leveret.brokers.sqlite import SQLiteBroker
from leveret.brokers.sqlite.questions import Questions
from leveret.model import Envelope, Queue, new_id, this_process
from leveret.model.reports import WorkerReport
from leveret.model.status import Progress, Status, enqueued
from tests.support.bench import Bench
from tests.support.waiting import until

if TYPE_CHECKING:
    from pathlib import Path

    import pytest
WORK = Queue("work")


async def test_a_worker_describes_itself() -> None:
    """What runs, since when; what waits; what has ended, and what of that failed."""
    bench = Bench()
    began = time.time()
    async with bench.working(concurrency=2, prefetch=3):
        await bench.put("say", "a")
        await bench.put("give_up", "b")
        await bench.put("fail_once", "c")
        await bench.wait_until_settled(4)
        await bench.put("wait", "d", "e", "f")

        async def report() -> WorkerReport | None:
            (found,) = await bench.broker.control.workers()
            return found if found.waiting == 1 else None

        told = await until(report, "two run and one waits")
        assert told is not None
        (child,) = told.children
        assert (told.name, told.queues, told.finished, told.failed) == (this_process(), ["work"], 4, 2)
        assert began <= told.started_at <= child.running[0].since <= child.running[1].since <= time.time()
        assert [(one.task, one.queue, one.attempt) for one in child.running] == [("wait", "work", 1)] * 2
        assert (child.pid, child.finished) == (os.getpid(), 4)
        assert child.rss > 1_000_000
        bench.gate.set()
        await bench.wait_until_settled(7)
    assert await bench.broker.control.workers() == []


def test_a_slow_reader_of_everything_is_given_the_latest(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update a task, and of too many tasks the last ones."""
    monkeypatch.setattr(following, "_MOST_UNREAD", 3)

    async def read() -> None:
        watch = Watch()
        for number in range(5):
            watch.notify([enqueued(Envelope(str(number), "work", "say", b""), 1.0)])
            running = Status(str(number), "running", 2.0, "work", "say", started_at=2.0, worker="w")
            watch.notify([running, msgspec.structs.replace(running, progress=Progress(number))])
        batch = await anext(aiter(watch))
        assert [(status.id, status.state, status.progress) for status in batch] == [
            (str(number), "running", Progress(number)) for number in (2, 3, 4)
        ]

    asyncio.run(read())


def test_questions_and_answers_that_say_more_or_less() -> None:
    """Old askers send nothing, others may answer without a word of workers; neither minds what it does not know."""
    assert asks_for_workers(b'{"v": 1, "kind": "workers", "new": true}')
    for body in (b"", b"{}", b"hello", b'{"v": 2, "kind": "workers"}', b'{"v": 1, "kind": "weather"}', b"[1]"):
        assert not asks_for_workers(body)
    assert msgspec.json.encode(Report({"work": 1})) == b'{"running":{"work":1}}'
    assert msgspec.json.decode(b'{"running": {"work": 1}, "language": "go"}', type=Report).worker is None


async def test_questions_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the asker, though it was cut off while it waited for an answer; and none is waited for from the dead."""
    path = tmp_path / "leveret.db"
    broker, asker = SQLiteBroker(path, timeout=20), SQLiteBroker(path, timeout=20)

    monkeypatch.setattr(Questions, "answer", lambda *_: None)
    report = WorkerReport("host:1", 1.0, ["work"], [], 0, 0, 0)
    await broker.declare([WORK])
    async with broker.consume([WORK], credit=1, describe=lambda: report):
        asking = asyncio.ensure_future(asker.control.workers())
        await until(lambda: _has(path, "question", 1), "it is asked")
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await until(lambda: _has(path, "question", 0), "the question is gone")
        asking = asyncio.ensure_future(asker.control.workers())
        await until(lambda: _has(path, "question", 1), "it is asked")
    assert await asking == []
    await broker.close()
    await asker.close()
    assert await _has(path, "question", 0)
    assert await _has(path, "consumer", 0)
    assert list((tmp_path / "leveret.db-consumers").iterdir()) == []


async def test_what_is_enqueued_is_recorded_only_for_who_watches(tmp_path: Path) -> None:
    path = tmp_path / "leveret.db"
    broker, other = SQLiteBroker(path, timeout=20), SQLiteBroker(path, timeout=20)
    await broker.declare([WORK])

    async def publish() -> str:
        envelope = Envelope(new_id(), "work", "say", b"{}", enqueued_at=time.time())
        await broker.publish([envelope])
        await broker.statuses.notify([enqueued(envelope, time.time())])
        return envelope.id

    unseen = await publish()
    assert await _has(path, "record", 0)
    async with other.statuses.watch() as updates:
        seen = await publish()
        assert [status.id for status in await anext(updates)] == [seen]
    later = await publish()
    assert await _has(path, "record", 1)
    recent = await other.statuses.recent(5)
    assert {(status.id, status.state) for status in recent} == {(id_, "queued") for id_ in (unseen, seen, later)}
    await broker.close()
    await other.close()


async def _has(path: Path, table: str, count: int) -> bool:
    with closing(sqlite3.connect(path)) as database:
        return bool(database.execute(f"SELECT count(*) FROM {table}").fetchone() == (count,))
