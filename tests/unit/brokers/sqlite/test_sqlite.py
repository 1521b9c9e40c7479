"""The SQLite broker: its file and who may use it, shared transactions, locks, and the consumers' bells."""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App
from leveret.brokers.sqlite import SQLiteBroker, writer
from leveret.brokers.sqlite import consumer as consumer_module
from leveret.brokers.sqlite.opening import APPLICATION_ID, SCHEMA_VERSION, open_database
from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.queues import Queues
from leveret.errors import (
    BrokerError,
    BrokerUnavailable,
    EnqueueTimeout,
    LeaseLost,
    QueueFull,
    QueueNotFound,
    StoreError,
)
from leveret.model import Envelope, Queue, Retrying, Succeeded, new_id
from leveret.testing.bench import batches_of
from tests.support.waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterator, Sequence
    from pathlib import Path

    from leveret.brokers import OnConflict
    from leveret.brokers.sqlite.identity import Identity
    from leveret.model import Delivery

WORK = Queue("work")


def envelope(queue: str = "work", body: bytes = b"{}", task: str | None = "task", **others: Any) -> Envelope:
    return Envelope(new_id(), queue, task, body, **others)


@asynccontextmanager
async def opened(
    path: Path, *queues: Queue, timeout: float = 20.0, patience: float = 20.0
) -> AsyncGenerator[SQLiteBroker]:
    """A broker on the file; whoever uses it longer than ``patience`` (seconds) has failed."""
    broker = SQLiteBroker(path, timeout=timeout)
    async with asyncio.timeout(patience):
        try:
            if queues:
                await broker.declare(queues)
            yield broker
        finally:
            await broker.close()


def content(path: Path) -> bytes:
    return path.read_bytes()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def remove(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


@asynccontextmanager
async def busy(broker: SQLiteBroker) -> AsyncGenerator[None]:
    """The broker's thread is busy meanwhile, so that requests queue up."""
    started, go_on = threading.Event(), threading.Event()

    def hold(*_: object) -> int:
        started.set()
        go_on.wait(20)
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Queues, "ready", hold)
        holding = asyncio.create_task(broker.queues.ready([]))
        await asyncio.to_thread(started.wait, 20)
    try:
        yield
    finally:
        go_on.set()
        await holding


async def all_at_once(broker: SQLiteBroker, *calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """What each returned or raised, when all waited for the thread together."""
    async with busy(broker):
        tasks = [asyncio.create_task(call) for call in calls]
        await asyncio.sleep(0)
    return await asyncio.gather(*tasks, return_exceptions=True)


async def counts(broker: SQLiteBroker, queue: str = "work") -> tuple[int, int, int]:
    (stats,) = [stats for stats in await broker.queues.stats() if stats.name == queue]
    return stats.ready, stats.running, stats.dead


async def next_batch(batches: AsyncIterator[Sequence[Delivery]]) -> Sequence[Delivery]:
    async with asyncio.timeout(60):
        return await anext(batches)


# The file


async def test_only_its_owner_can_read_the_file(path: Path) -> None:
    async with opened(path) as broker, broker.consume([WORK], credit=1):
        folder = path.with_name("leveret.db-consumers")
        files = [path, *path.parent.glob("leveret.db-???"), *folder.iterdir()]
        assert len(files) == 4
        assert [mode(file) for file in files] == [0o600] * 4
        assert mode(folder) == 0o700


async def test_an_empty_file_is_taken_and_keeps_its_mode(path: Path) -> None:
    descriptor = os.open(path, os.O_CREAT)
    os.fchmod(descriptor, 0o640)
    os.close(descriptor)
    async with opened(path, WORK):
        assert mode(path) == 0o640


async def test_the_file_says_whose_it_is(path: Path) -> None:
    async with opened(path, WORK):
        pass
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA application_id").fetchone() == (APPLICATION_ID,)
        assert database.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def foreign(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript("CREATE TABLE customers (name); INSERT INTO customers VALUES ('Ada');")


def foreign_in_wal_mode(path: Path) -> None:
    foreign(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA journal_mode = WAL")


def foreign_with_an_identity(path: Path) -> None:
    foreign(path)
    with closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA application_id = 7")


def newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as database:
        database.executescript(
            f"CREATE TABLE task (x); PRAGMA application_id = {APPLICATION_ID};"
            f"PRAGMA user_version = {SCHEMA_VERSION + 1};"
        )


def text(path: Path) -> None:
    path.write_text("Dear diary,\n" * 500)


def short_text(path: Path) -> None:
    path.write_text("no\n")


def cut_off(path: Path) -> None:
    foreign(path)
    path.write_bytes(path.read_bytes()[:1_500])


def random_pages(path: Path) -> None:
    foreign(path)
    path.write_bytes(path.read_bytes()[:100] + b"\xa5" * 8_092)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (foreign, "is another program's SQLite file; name a file of Leveret's own in the URL"),
        (foreign_in_wal_mode, "is another program's SQLite file"),
        (foreign_with_an_identity, "is another program's SQLite file"),
        (newer, f"was written by a newer Leveret (schema {SCHEMA_VERSION + 1}); upgrade this one"),
        (text, "is damaged or not an SQLite file (file is not a database); it was left as it is"),
        (short_text, "is damaged or not an SQLite file"),
        (cut_off, "is damaged or not an SQLite file"),
        (random_pages, "is damaged or not an SQLite file"),
    ],
)
async def test_a_file_that_is_not_leverets_is_left_alone(path: Path, make: Callable[[Path], None], told: str) -> None:
    make(path)
    before = content(path)
    async with opened(path) as broker:
        for attempt in (lambda: broker.declare([WORK]), lambda: broker.publish([envelope()]), broker.queues.stats):
            with pytest.raises(StoreError) as caught:
                await attempt()
            assert str(caught.value).startswith(f"{path} ")
            assert told in str(caught.value)
    assert content(path) == before
    assert names(path.parent) == [path.name]


async def test_a_consumer_of_a_file_that_is_not_leverets_leaves_nothing(path: Path) -> None:
    foreign(path)
    async with opened(path) as broker:
        with pytest.raises(StoreError, match="another program's"):
            async with broker.consume([WORK], credit=1):
                pass
    folder = path.with_name("leveret.db-consumers")
    assert not folder.exists() or names(folder) == []


@pytest.mark.parametrize("place", ["missing/leveret.db", "file/leveret.db", "folder", "x" * 300])
async def test_a_path_that_cannot_be_a_file_says_so(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    async with opened(tmp_path / place) as broker:
        with pytest.raises(StoreError) as caught:
            await broker.declare([WORK])
    assert str(tmp_path / place) in str(caught.value)
    assert names(tmp_path) == ["file", "folder"]


async def test_a_missing_folder_is_named_with_its_remedy(tmp_path: Path) -> None:
    async with opened(tmp_path / "missing" / "leveret.db") as broker:
        with pytest.raises(StoreError, match="folder"):
            await broker.declare([WORK])


@pytest.mark.parametrize("ask", [lambda broker: broker.statuses.follow(["1"]), lambda broker: broker.statuses.watch()])
async def test_who_listens_is_told_of_a_missing_folder_too(tmp_path: Path, ask: Callable[[SQLiteBroker], Any]) -> None:
    async with opened(tmp_path / "missing" / "leveret.db") as broker:
        with pytest.raises(StoreError, match="folder"):
            async with ask(broker):
                pass


async def test_a_folder_that_appears_is_used(tmp_path: Path) -> None:
    """A broker that failed is not broken for good."""
    async with opened(tmp_path / "later" / "leveret.db") as broker:
        with pytest.raises(StoreError):
            await broker.declare([WORK])
        (tmp_path / "later").mkdir()
        await broker.declare([WORK])
        await broker.publish([envelope()])
        assert await counts(broker) == (1, 0, 0)


async def test_a_file_in_the_bells_place_is_an_error_of_the_brokers(path: Path) -> None:
    path.with_name("leveret.db-consumers").touch()
    async with opened(path, WORK) as broker:
        with pytest.raises(BrokerError, match=r"leveret\.db"):
            async with broker.consume([WORK], credit=1):
                pass


@contextmanager
def opened_with(pragma: str) -> Iterator[None]:
    """Whoever opens a file meanwhile sets this for its connection."""

    def opened(*args: Any, **kwargs: Any) -> tuple[sqlite3.Connection, Identity]:
        database, identity = open_database(*args, **kwargs)
        database.execute(f"PRAGMA {pragma}").fetchone()
        return database, identity

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writer, "open_database", opened)
        yield


async def test_a_full_file_stores_nothing_and_breaks_nothing(path: Path) -> None:
    with opened_with("max_page_count = 30"):
        async with opened(path, WORK) as broker:
            with pytest.raises(StoreError, match=r"leveret\.db takes nothing more, though its disk is not full"):
                await broker.publish([envelope(body=b"x" * 1_000_000)])
            await broker.publish([envelope()])
            assert await counts(broker) == (1, 0, 0)


async def test_a_read_only_file_says_what_to_do(path: Path) -> None:
    async with opened(path, WORK):
        with opened_with("query_only = ON"):
            async with opened(path) as broker:
                with pytest.raises(StoreError, match=r"leveret\.db is read-only .* make the file and its folder"):
                    await broker.publish([envelope()])


def test_other_errors_keep_their_words_and_their_cause(path: Path) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    translated = translate(error, path)
    assert isinstance(translated, StoreError)
    assert str(translated) == f"{path}: OperationalError: disk I/O error"
    assert translated.__cause__ is error
    own = QueueFull("full")
    assert translate(own, path) is own


# Transactions


async def test_what_waits_together_is_committed_together(path: Path, transactions: list[int]) -> None:
    """And so shares one sync to the disk."""
    async with opened(path, WORK) as broker:
        transactions.clear()
        results = await all_at_once(broker, *(broker.publish([envelope()]) for _ in range(100)))
        assert results == [None] * 100
        assert transactions == [0, 100]
        assert await counts(broker) == (100, 0, 0)


async def test_a_transaction_is_bounded(path: Path, transactions: list[int]) -> None:
    async with opened(path, WORK) as broker:
        transactions.clear()
        await all_at_once(broker, *(broker.publish([envelope()]) for _ in range(600)))
        assert transactions == [0, 512, 88]
        assert await counts(broker) == (600, 0, 0)


async def test_a_refusal_is_its_own_and_costs_no_second_transaction(path: Path, transactions: list[int]) -> None:
    async with opened(path, WORK, Queue("small", max_length=1)) as broker:
        transactions.clear()
        refused = [envelope("small"), envelope("small")]
        results = await all_at_once(
            broker,
            broker.publish([envelope()]),
            broker.publish(refused),
            broker.publish([envelope("absent")]),
            broker.publish([envelope("small")]),
            broker.publish([envelope()]),
        )
        assert [type(result) for result in results] == [type(None), QueueFull, QueueNotFound, type(None), type(None)]
        assert results[1].ids == tuple(one.id for one in refused)
        assert transactions == [0, 5]
        assert await counts(broker) == (2, 0, 0)
        assert await counts(broker, "small") == (1, 0, 0)


async def test_a_batch_is_stored_whole_or_not_at_all(path: Path) -> None:
    async with opened(path, WORK, Queue("small", max_length=1)) as broker:
        with pytest.raises(QueueFull):
            await broker.publish([envelope(), envelope("small"), envelope("small")])
        assert await counts(broker) == (0, 0, 0)
        assert await counts(broker, "small") == (0, 0, 0)


async def test_a_failure_in_the_file_is_its_own_too(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Queues, *_: object, **__: object) -> None:
        self.execute("INSERT INTO queue (name) VALUES ('half')")
        self.execute("INSERT INTO nowhere VALUES (1)")

    monkeypatch.setattr(Queues, "set_paused", fail)
    async with opened(path, WORK) as broker:
        results = await all_at_once(
            broker, broker.publish([envelope()]), broker.queues.pause("work"), broker.publish([envelope()])
        )
        assert [type(result) for result in results] == [type(None), StoreError, type(None)]
        assert await counts(broker) == (2, 0, 0)
        assert [stats.name for stats in await broker.queues.stats()] == ["work"]


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "\ud800"},
        {"last_error": "\udcff"},
        {"attempt": 2**63},
        {"headers": {"key": print}},
    ],
    ids=repr,
)
async def test_a_task_that_cannot_be_stored_is_refused_alone(path: Path, changes: dict[str, Any]) -> None:
    """The thread lives on, and its neighbours' tasks are stored."""
    odd = Envelope(**{"id": new_id(), "queue": "work", "task": "task", "body": b"{}", **changes})
    async with opened(path, WORK, timeout=1.0, patience=3.0) as broker:
        results = await all_at_once(
            broker, broker.publish([envelope()]), broker.publish([odd]), broker.publish([envelope()])
        )
        assert isinstance(results[1], BrokerError)
        assert not isinstance(results[1], EnqueueTimeout)
        assert (results[0], results[2]) == (None, None)
        assert await counts(broker) == (2, 0, 0)


async def test_what_was_given_up_while_it_waited_is_not_done(path: Path) -> None:
    async with opened(path, WORK) as broker:
        async with busy(broker):
            publish = asyncio.create_task(broker.publish([envelope()]))
            await asyncio.sleep(0)
            publish.cancel()
            await asyncio.wait([publish])
        assert publish.cancelled()
        assert await counts(broker) == (0, 0, 0)


async def test_a_queue_named_twice_is_declared_once(path: Path) -> None:
    async with opened(path) as broker:
        await broker.declare([WORK, WORK])
        assert [stats.name for stats in await broker.queues.stats()] == ["work"]


def test_a_loop_that_ended_before_its_answer_leaves_no_trace(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that gives up and ends shall not end with a thread's traceback."""
    failures: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failures.append)
    broker = SQLiteBroker(path, timeout=20.0)
    go_on = threading.Event()

    async def give_up() -> None:
        started = threading.Event()

        def hold(*_: object) -> int:
            started.set()
            go_on.wait(20)
            return 0

        monkeypatch.setattr(Queues, "ready", hold)
        holding = asyncio.create_task(broker.queues.ready([]))
        await asyncio.to_thread(started.wait, 20)
        holding.cancel()

    asyncio.run(give_up())
    go_on.set()
    asyncio.run(broker.close())
    assert [failure.exc_value for failure in failures] == []


# Locks


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Another program holds the file for itself."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        yield
        other.execute("ROLLBACK")


@pytest.mark.parametrize("known", [True, False], ids=["opened before", "opened now"])
@pytest.mark.parametrize("made", [True, False], ids=["Leveret's", "empty"])
async def test_a_locked_file_is_unavailable_in_time(path: Path, known: bool, made: bool) -> None:
    """And available again when it is not locked any more."""
    if made:
        async with opened(path, WORK):
            pass
    async with opened(path, *([WORK] if known else []), timeout=0.2) as broker:
        with locked(path):
            async with asyncio.timeout(PATIENCE):  # or it waits for the lock's end
                with pytest.raises(BrokerUnavailable, match=r"leveret\.db is being written by another process"):
                    await broker.declare([Queue("other")])
        await broker.declare([Queue("other")])


async def test_publishing_to_a_locked_file_raises_in_time(path: Path) -> None:
    """Which of the two comes first is open; both say that it is not known to be stored."""
    async with opened(path, WORK, timeout=0.2) as broker:
        with locked(path):
            async with asyncio.timeout(PATIENCE):  # or it waits for the lock's end
                with pytest.raises((EnqueueTimeout, BrokerUnavailable)):
                    await broker.publish([envelope()])


@pytest.mark.parametrize("timeout", [0.2, 20.0], ids=["the file says so", "the producer waits no longer"])
async def test_a_stored_task_is_no_error(path: Path, timeout: float, caplog: pytest.LogCaptureFixture) -> None:
    """Nor when those who watch could not be told of it: it would be enqueued twice."""
    app = App(f"sqlite:///{path}", enqueue_timeout=0.2)

    @app.task
    async def task() -> None: ...

    broker = LockedAfterwards(path, timeout=timeout)
    with app.client.enqueuing_to(broker):
        async with opened(path, WORK) as other, other.statuses.watch():
            async with broker.lock:
                await task.enqueue()
            assert [one.ready for one in await other.queues.stats() if one.ready] == [1]
        await broker.close()
    assert "1 tasks are stored, and those who watch are not told" in caplog.text


class LockedAfterwards(SQLiteBroker):
    """Another program takes the file as soon as something is stored."""

    def __init__(self, path: Path, *, timeout: float) -> None:
        super().__init__(path, timeout=timeout)
        self.file = path
        self.lock = AsyncExitStack()

    async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise") -> None:
        await super().publish(envelopes, on_conflict=on_conflict)
        self.lock.enter_context(locked(self.file))


async def test_a_lock_is_waited_for_once(path: Path) -> None:
    """Not by each of those that share a transaction, one after the other."""
    async with opened(path, WORK, timeout=0.2) as broker:
        with locked(path):
            async with asyncio.timeout(PATIENCE):  # a wait of each would take 100 s
                results = await asyncio.gather(
                    *(broker.queues.ready(["work"]) for _ in range(500)), return_exceptions=True
                )
    assert {type(result) for result in results} == {BrokerUnavailable}


async def test_a_lock_that_ends_in_time_is_not_noticed(path: Path) -> None:
    async with opened(path, WORK) as broker:
        with locked(path):
            publish = asyncio.create_task(broker.publish([envelope()]))
            await until(lambda: taken_up(broker), "it is being tried")
        await publish
        assert await counts(broker) == (1, 0, 0)


async def taken_up(broker: SQLiteBroker) -> bool:
    return broker._writer._requests.empty()


# Consumers and their bells


async def test_a_published_task_rings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A consumer that does not look by itself is told, from another connection too."""
    monkeypatch.setattr(consumer_module, "ROUND", 3_600.0)
    async with opened(path, WORK) as broker, opened(path) as producer, broker.consume([WORK], credit=9) as consumer:
        batches = batches_of(consumer)
        for _ in range(10):
            await producer.publish([envelope()])
            (delivery,) = await next_batch(batches)
            await broker.settle([(delivery, Succeeded())])


async def test_an_outcome_is_recorded_once(path: Path) -> None:
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=2) as consumer:
        await broker.publish([envelope(), envelope()])
        first, second = await next_batch(batches_of(consumer))
        await broker.settle([(first, Succeeded())])
        with pytest.raises(LeaseLost) as caught:
            await broker.settle([(first, Retrying("late")), (second, Succeeded())])
        assert caught.value.ids == (first.envelope.id,)
        assert await counts(broker) == (0, 0, 0)


def test_a_file_that_another_program_makes_in_this_moment_is_its_file_too(path: Path) -> None:
    """Several workers start beside a file that is not there yet: each looks at it while another makes the tables."""
    others: list[threading.Thread] = []

    def make() -> None:
        open_database(path, timeout=20.0)[0].close()

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, parameters: Any = (), /) -> sqlite3.Cursor:
            if sql.startswith("PRAGMA user_version") and not others:
                others.append(threading.Thread(target=make))
                others[0].start()
                others[0].join(0.5)  # by then it has made them, or waits for this one's transaction
            return super().execute(sql, parameters)

    connect = partial(sqlite3.connect, factory=Slow)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("leveret.brokers.sqlite.opening.sqlite3.connect", connect)
        open_database(path, timeout=20.0)[0].close()
    others[0].join()
    assert len(others) == 1
