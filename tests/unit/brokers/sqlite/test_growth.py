"""What an operation on an SQLite file costs does not grow with what is beside it: counted in SQLite's own steps."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest

from leveret.brokers.feeds import Feed, Feeds, Watch
from leveret.brokers.sqlite.consumer import Lease
from leveret.brokers.sqlite.opening import open_database
from leveret.brokers.sqlite.sql import Statements
from leveret.brokers.sqlite.store import Settled, Store
from leveret.errors import QueueFull
from leveret.model import Queue, Released, Succeeded
from leveret.model.status import enqueued, settled, started
from leveret.testing.bench import batches_of
from tests.unit.brokers.sqlite.test_sqlite import WORK, envelope, next_batch, opened

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from leveret.model import Delivery, Outcome
    from leveret.model.status import Status


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


def steps(path: Path, work: Callable[[Store], Any]) -> int:
    """How many steps of SQLite's machine the work on that file takes."""
    taken = count()
    database, _ = open_database(path, timeout=20.0)
    with closing(database):
        database.execute("BEGIN IMMEDIATE")
        database.set_progress_handler(lambda: next(taken) and 0, 1)
        work(Store(database))
        database.set_progress_handler(None, 0)
        database.execute("COMMIT")
    return next(taken)


async def test_counting_delayed_tasks_costs_the_same_in_many_queues(path: Path) -> None:
    queues = [Queue(f"q{number}") for number in range(20)]
    due = time.time() + 3_600
    costs = []
    for used in (1, 20):
        async with opened(path.with_name(f"{used}.db"), *queues) as broker:
            names = [queues[number % used].name for number in range(2_000)]
            await broker.publish([envelope(name, due=due) for name in names])
            costs.append(steps(path.with_name(f"{used}.db"), lambda store: store.queues.stats()))
            assert [stats.delayed for stats in await broker.queues.stats()][:1] == [2_000 // used]
    assert costs[1] < 2 * costs[0]
    async with opened(path, WORK) as broker:
        await broker.publish([envelope(due=due) for _ in range(2_000)])
        costs.append(steps(path, lambda store: store.queues.stats()))
    assert costs[0] < 2 * costs[2]


async def test_reading_news_costs_what_is_less_of_what_changed_and_what_is_followed(path: Path) -> None:
    """And what was read is not read again, though nothing of it was followed."""
    costs = []
    for followed, changed in ((10, 1), (2_000, 1), (1, 10), (1, 1_999)):
        file = path.with_name(f"{followed}-{changed}.db")
        async with opened(file, WORK) as broker:
            tasks = [envelope() for _ in range(2_000)]
            now = time.time()
            await broker.statuses.notify([settled(task, "task", Succeeded(), now) for task in tasks])
            async with broker.statuses.follow([task.id for task in tasks[:followed]]):
                costs.append(steps(file, partial(last_changes, changed, followed)))
    assert costs[1] < 2 * costs[0]
    assert costs[3] < 2 * costs[2]


def last_changes(changed: int, followed: int, store: Store) -> None:
    (watcher,) = store.execute("SELECT consumer FROM watch LIMIT 1").fetchone()
    (last,) = store.execute("SELECT tick FROM clock").fetchone()
    news = store.watches.changes(watcher, last - changed, followed)
    assert news is not None
    assert len(news.statuses) == (followed == 2_000)
    assert news.last == last


async def test_enqueuing_to_a_limited_queue_costs_the_same_however_long_it_is(path: Path) -> None:
    """And in each case exactly as many are let in as there is room for."""
    costs = []
    for waiting in (10, 2_900):
        file = path.with_name(f"{waiting}.db")
        async with opened(file, Queue("work", max_length=3_000), Queue("other")) as broker:
            tasks = [envelope() for _ in range(waiting)]
            await broker.publish(tasks)
            one = envelope()
            costs.append(steps(file, lambda store, one=one: store.insert([one])))  # type: ignore[misc]
            await broker.publish([envelope("other") for _ in range(3_000)])  # what is between them is none of them
            await broker.publish([envelope(priority=number % 12) for number in range(2_999 - waiting)])
            with pytest.raises(QueueFull, match="3000 ready tasks of at most 3000"):
                await broker.publish([envelope()])
            await broker.control.cancel(tasks[0].id)
            await broker.publish([envelope()])
            with pytest.raises(QueueFull):
                await broker.publish([envelope()])
    assert costs[1] < 2 * costs[0]


@pytest.mark.parametrize("outcome", [Succeeded(), Released()])
async def test_settling_costs_the_same_whatever_else_is_held(path: Path, outcome: Outcome) -> None:
    """With some of it cancelled, and without."""
    costs = []
    for held, marked in ((100, 0), (2_000, 0), (100, 5), (2_000, 5)):
        file = path.with_name(f"{held}-{marked}.db")
        async with opened(file, WORK) as broker:
            await broker.publish([envelope() for _ in range(held)])
            async with broker.consume([WORK], credit=None) as consumer:
                batches = batches_of(consumer)
                deliveries: list[Delivery] = []
                while len(deliveries) < held:
                    deliveries += await next_batch(batches)
                for delivery in deliveries[:marked]:
                    await broker.control.cancel(delivery.envelope.id)
                last = deliveries[-1]
                assert isinstance(last.lease, Lease)
                settle = partial(
                    Store.settle,
                    consumer=last.lease.consumer,
                    settled=[Settled(last.tag, last.envelope.id, outcome)],
                )
                costs.append(steps(file, settle))
    assert costs[1] < 2 * costs[0]
    assert costs[3] < 2 * costs[2]


class CountedFeed(Feed):
    told = 0

    def notify(self, updates: Sequence[Status]) -> None:  # type: ignore[override]
        type(self).told += len(updates)
        super().notify(updates)


async def test_an_update_is_told_to_those_who_follow_it() -> None:
    """And costs the others nothing."""
    feeds, watch = Feeds(), Watch()
    tasks = [envelope() for _ in range(100)]
    followers = [CountedFeed([task.id]) for task in tasks]
    both = CountedFeed([tasks[0].id, tasks[1].id])
    for feed in (*followers, both, watch):
        feeds.add(feed)
    update = enqueued(tasks[0], 1.0)
    feeds.notify([update])
    assert CountedFeed.told == 2
    for feed in (followers[0], both, watch):
        assert await anext(aiter(feed)) == [update]
    assert feeds.remove(both) == []
    assert feeds.remove(both) == ()
    assert feeds.remove(followers[1]) == [tasks[1].id]
    assert tasks[1].id not in feeds.ids
    feeds.notify([enqueued(tasks[1], 1.0)])
    assert CountedFeed.told == 2


async def test_what_became_of_many_tasks_is_recorded_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two updates of one task too: the later one counts."""
    asked: list[str] = []
    execute = Statements.execute

    def counted(self: Statements, sql: str, *values: Any) -> sqlite3.Cursor:
        asked.append(sql)
        return execute(self, sql, *values)

    async with opened(path, WORK) as broker:
        costs = []
        for number in (1, 100):
            tasks, now = [envelope() for _ in range(number)], time.time()
            updates = [
                *(started(task, "task", now) for task in tasks),
                *(settled(task, "task", Succeeded(b"1"), now) for task in tasks),
            ]
            with monkeypatch.context() as patch:
                patch.setattr(Statements, "execute", counted)
                asked.clear()
                await broker.statuses.notify(updates)
                costs.append(len(asked))
            found = await broker.statuses.read([task.id for task in tasks])
            assert [status.state for status in found] == ["succeeded"] * number
            assert {status.started_at for status in found} == {now}
    assert costs[0] == costs[1]
