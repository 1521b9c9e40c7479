"""Tasks that are stored with a user's own transaction: each driver, the relay, the inbox, the same file."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiosqlite
import asyncpg
import msgspec
import psycopg
import pymysql
import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from leveret import App, Queue
from leveret.errors import StoreError
from leveret.model.current import CurrentTask, running
from leveret.outbox import Relay, create_inbox, create_outbox, open_database
from tests.support.waiting import until, wait_until
from tests.support.workers import Ledger, Program, Worker, leveret

SHOP_APP = f"{Path(__file__).parents[1] / 'support' / 'shop_app.py'}"

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence

    from tests.conftest import Place
    from tests.support.databases import Databases


def application(folder: Path) -> App:
    app = App(f"sqlite:///{folder / 'broker.db'}", queues=[Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None:
        """Nobody runs it."""

    return app


def make_table(url: str, statements: Sequence[str]) -> None:
    """As a migration does it."""
    with engine_of(url).begin() as connection:
        for statement in statements:
            connection.exec_driver_sql(statement)


def engine_of(url: str) -> sqlalchemy.Engine:
    drivers = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "sqlite": "sqlite"}
    whole = make_url(url).set(drivername=drivers[make_url(url).get_backend_name()])
    return sqlalchemy.create_engine(whole, poolclass=sqlalchemy.NullPool)


def mysql(url: str) -> pymysql.Connection[Any]:
    parsed = make_url(url)
    return pymysql.connect(host=parsed.host, port=parsed.port or 0, user="root", database=parsed.database)


@asynccontextmanager
async def in_sqlalchemy(url: str, driver: str) -> AsyncIterator[Any]:
    engine = create_async_engine(make_url(url).set(drivername=driver))
    try:
        async with AsyncSession(engine) as session:
            yield session
    finally:
        await engine.dispose()


@asynccontextmanager
async def in_sqlalchemy_core(url: str, driver: str) -> AsyncIterator[Any]:
    engine = create_async_engine(make_url(url).set(drivername=driver))
    try:
        async with engine.connect() as connection:
            yield connection
    finally:
        await engine.dispose()


@contextmanager
def in_session(url: str, driver: str) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(make_url(url).set(drivername=driver))
    with Session(engine) as session:
        yield session
    engine.dispose()


@contextmanager
def in_core(url: str, driver: str) -> Iterator[Any]:
    engine = sqlalchemy.create_engine(make_url(url).set(drivername=driver))
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@asynccontextmanager
async def in_asyncpg(url: str, _driver: str) -> AsyncIterator[Any]:
    connection = await asyncpg.connect(url)
    transaction = connection.transaction()
    await transaction.start()

    class Open:
        """What the test does with a connection is begun and ended by an object of its own here."""

        commit, rollback = transaction.commit, transaction.rollback

    connection_and_end = connection, Open()
    try:
        yield connection_and_end
    finally:
        await connection.close()


@asynccontextmanager
async def in_psycopg_async(url: str, _driver: str) -> AsyncIterator[Any]:
    async with await psycopg.AsyncConnection.connect(url) as connection:
        yield connection


@asynccontextmanager
async def in_aiosqlite(url: str, _driver: str) -> AsyncIterator[Any]:
    async with aiosqlite.connect(make_url(url).database or "") as connection:
        yield connection


@contextmanager
def in_psycopg(url: str, _driver: str) -> Iterator[Any]:
    with psycopg.connect(url) as connection:
        yield connection


@contextmanager
def in_pymysql(url: str, _driver: str) -> Iterator[Any]:
    with mysql(url) as connection:
        yield connection


@contextmanager
def in_sqlite(url: str, _driver: str) -> Iterator[Any]:
    with closing(sqlite3.connect(make_url(url).database or "")) as connection:
        yield connection


WAYS: dict[str, tuple[str, Callable[[str, str], Any], str]] = {
    "asyncpg": ("postgresql", in_asyncpg, ""),
    "psycopg": ("postgresql", in_psycopg, ""),
    "psycopg-async": ("postgresql", in_psycopg_async, ""),
    "sqlalchemy-asyncpg": ("postgresql", in_sqlalchemy, "postgresql+asyncpg"),
    "sqlalchemy-psycopg-core": ("postgresql", in_sqlalchemy_core, "postgresql+psycopg"),
    "session-psycopg": ("postgresql", in_session, "postgresql+psycopg"),
    "pymysql": ("mysql", in_pymysql, ""),
    "session-pymysql": ("mysql", in_session, "mysql+pymysql"),
    "sqlite3": ("sqlite", in_sqlite, ""),
    "aiosqlite": ("sqlite", in_aiosqlite, ""),
    "core-sqlite": ("sqlite", in_core, "sqlite"),
    "sqlalchemy-aiosqlite": ("sqlite", in_sqlalchemy, "sqlite+aiosqlite"),
}


async def enqueue_twice(app: App, url: str, way: str) -> list[str]:
    """One task in a transaction that is committed, one in another that is rolled back; the first one's id."""
    _, opened, driver = WAYS[way]
    (say,) = app.tasks
    ids = []
    for is_committed in (True, False):
        context = opened(url, driver)
        if hasattr(context, "__aenter__"):
            async with context as found:
                connection, end = found if isinstance(found, tuple) else (found, found)
                handle = await say.options(priority=7, headers={"tenant": "a"}).enqueue_in(connection, "hello")
                await (end.commit() if is_committed else end.rollback())
        else:
            with context as connection:
                handle = say.options(priority=7, headers={"tenant": "a"}).enqueue_in_sync(connection, "hello")
                (connection.commit if is_committed else connection.rollback)()
        ids.append(handle.id)
    return ids[:1]


@asynccontextmanager
async def relaying(app: App, url: str, **options: Any) -> AsyncIterator[Relay]:
    database = open_database(url)
    relay = Relay(database, app.client, **options)
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        relay.stop()
        await task
        await database.close()
        await app.close()


@pytest.mark.parametrize("way", WAYS)
async def test_a_task_is_relayed_if_its_transaction_commits(way: str, tmp_path: Path, databases: Databases) -> None:
    kind = WAYS[way][0]
    url, app = databases.new(kind, tmp_path), application(tmp_path)
    make_table(url, create_outbox(kind))
    committed = await enqueue_twice(app, url, way)
    async with relaying(app, url) as relay:
        await until(lambda: relay.published == 1, "the committed task is published")
        (task,) = await app.client.broker.queues.peek("work", "ready", limit=10)
        rows = await counted(url)
    assert ([task.id], task.task, task.priority, task.headers["tenant"]) == (committed, "say", 7, "a")
    assert rows == 0


async def counted(url: str) -> int:
    database = open_database(url)
    try:
        return (await database.gauges()).rows
    finally:
        await database.close()


def make_shop(url: str) -> None:
    kind = make_url(url).get_backend_name()
    orders = ("CREATE TABLE orders (number INTEGER PRIMARY KEY)", "CREATE TABLE effect (number INTEGER NOT NULL)")
    make_table(url, (*create_outbox(kind), *create_inbox(kind), *orders))


def numbers(url: str, table: str) -> list[int]:
    with engine_of(url).connect() as connection:
        return sorted(row[0] for row in connection.exec_driver_sql(f"SELECT number FROM {table}"))


def produce(shop: str, folder: Path, start: int, count: int, deadly: float = 0.0) -> Program:
    environment = {"SHOP": shop, "DEADLY": str(deadly), "LEDGER": str(folder / "ledger")}
    return Program([SHOP_APP, str(start), str(count)], folder / f"producer-{start}.log", environment)


@pytest.mark.parametrize("place", ["sqlite", "rabbitmq-4"], indirect=True)
def test_a_worker_relays_and_the_inbox_has_each_effect_once(
    place: Place, tmp_path: Path, ledger: Ledger, databases: Databases
) -> None:
    """Producers and relays are killed, the broker is restarted; what was committed runs, and nothing else."""
    shop = databases.new("postgresql", tmp_path)
    make_shop(shop)
    options = ("--relay", shop, "--concurrency", "4")
    app, environment = f"{SHOP_APP}:app", {"SHOP": shop}
    relay = ["-m", "leveret", "relay", app, "--database", shop, "--url", place.url, "--batch", "20"]
    with Worker(place.url, ledger, *options, app=app, environment=environment) as worker:
        worker.ready()
        for turn in range(4):
            killed = Program(relay, tmp_path / f"relay-{turn}.log", {**environment, "LEDGER": str(ledger.path)})
            with killed, produce(shop, tmp_path, turn * 50, 50, deadly=0.05) as producer:
                killed.wait_for("relaying from")
                producer.process.wait()
                killed.kill()
            if turn == 1 and place.node is not None:
                place.node.restart()
        for turn in range(4):  # what the killed ones did not come to
            with produce(shop, tmp_path, turn * 50, 50) as producer:
                assert producer.exit_code() == 0
        committed = numbers(shop, "orders")
        wait_until(lambda: len(numbers(shop, "effect")) >= len(committed), "all that was committed has run")
        worker.signal(15)
        assert worker.exit_code() == 0
    assert committed == list(range(0, 200, 2))
    assert numbers(shop, "effect") == committed
    assert asyncio.run(counted(shop)) == 0


@pytest.mark.parametrize("kind", ["postgresql", "mysql", "sqlite"])
async def test_a_second_delivery_finds_the_mark(kind: str, tmp_path: Path, databases: Databases) -> None:
    url = databases.new(kind, tmp_path)
    make_shop(url)
    script = (
        "from leveret.model.current import CurrentTask, running\n"
        "import tests.support.shop_app as shop\n"
        "for turn in range(2):\n"
        "    running.set(CurrentTask('a', 'charge', 'work', 1, None, None, None, {}))\n"
        "    print('returned', shop.charge(7))\n"
    )
    environment = {"SHOP": url, "LEDGER": str(tmp_path / "ledger")}
    with Program(["-c", script], tmp_path / "out", environment) as program:
        assert program.exit_code() == 0, program.output
    assert program.output.split() == ["returned", "7", "returned", "7"]
    assert numbers(url, "effect") == [7]


class Charged(msgspec.Struct):
    number: int


@pytest.mark.parametrize("way", ["asyncpg", "aiosqlite", "sqlalchemy"])
async def test_a_second_delivery_gives_the_first_ones_result(way: str, tmp_path: Path, databases: Databases) -> None:
    """Of its type; and where the first one cannot be kept, none."""
    kind = "postgresql" if way == "asyncpg" else "sqlite"
    url = databases.new(kind, tmp_path)
    make_shop(url)
    runs: list[int] = []

    @asynccontextmanager
    async def begin() -> AsyncIterator[Any]:
        if way == "asyncpg":
            connection = await asyncpg.connect(url)
            async with connection.transaction():
                yield connection
            await connection.close()
        elif way == "aiosqlite":
            async with aiosqlite.connect(make_url(url).database or "") as lite:
                yield lite
                await lite.commit()
        else:
            engine = create_async_engine(url.replace("sqlite:", "sqlite+aiosqlite:"))
            async with AsyncSession(engine) as session, session.begin():
                yield session
            await engine.dispose()

    app = App("memory://")

    @app.task(inbox=begin)
    async def charge(number: int) -> Charged:
        runs.append(number)
        return Charged(number)

    @app.task(inbox=begin)
    async def strange(number: int) -> object:
        runs.append(number)
        return object()

    async def twice(id_: str, task: Any) -> Any:
        token = running.set(CurrentTask(id_, task.name, "work", 1, None, None, None, {}))
        await task(7)
        again = await task(7)
        running.reset(token)
        return again

    assert [await twice("a", charge), await twice("b", strange)] == [Charged(7), None]
    assert runs == [7, 7]


async def test_what_cannot_be_published_is_kept_with_its_reason(tmp_path: Path, databases: Databases) -> None:
    url, app = databases.new("sqlite", tmp_path), application(tmp_path)
    make_table(url, create_outbox("sqlite"))
    with closing(sqlite3.connect(make_url(url).database or "")) as connection, connection:
        connection.execute(
            "INSERT INTO leveret_outbox (id, task, queue, message, created, tries)"
            " VALUES ('bad', 'say', 'work', x'00', 1, 4)"
        )
        (say,) = app.tasks
        await say.enqueue_in(connection, "good")
    async with relaying(app, url) as relay:
        await until(lambda: relay.published == 1, "the good one is published")
    assert "the row cannot be read" in leveret("outbox", "list", "--database", url)
    database = open_database(url)
    gauges = await database.gauges()
    await database.close()
    assert (gauges.rows, gauges.failed, gauges.oldest) == (1, 1, 0.0)
    assert leveret("outbox", "retry", "--database", url) == "1 rows are tried again\n"


def test_a_missing_table_is_told_with_its_statements(tmp_path: Path) -> None:
    said = leveret("outbox", "list", "--database", f"sqlite:///{tmp_path / 'shop.db'}", fails=True)
    assert "leveret outbox sql sqlite" in said
    assert leveret("outbox", "sql", "sqlite") == f"{create_outbox('sqlite')[0]};\n"


@pytest.mark.parametrize("way", ["sqlite3", "aiosqlite", "core-sqlite", "sqlalchemy-aiosqlite"])
async def test_a_transaction_in_the_brokers_own_file_needs_no_outbox(way: str, tmp_path: Path, ledger: Ledger) -> None:
    """Neither a table nor a relay; and a worker finds the task soon after the commit."""
    app = application(tmp_path)
    with pytest.raises(StoreError, match="has not the tables"):
        await enqueue_twice(app, app.url, way)
    (tmp_path / "broker.db").unlink()
    async with app:
        committed = await enqueue_twice(app, app.url, way)
        with Worker(app.url, ledger) as worker:
            worker.ready()
            await until(lambda: ledger.count("said hello") == 1, "the committed task has run")
            assert await app.handle(committed[0]).result(timeout=20) is None
    assert ledger.lines() == ["said hello"]


async def test_djangos_connection_is_known(tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "from django.conf import settings\n"
        "settings.configure(DATABASES={'default': {'ENGINE': 'django.db.backends.sqlite3', 'NAME': sys.argv[1]}})\n"
        "from django.db import connection, transaction\n"
        "from leveret import App\n"
        "from leveret.outbox import create_outbox\n"
        "app = App('memory://')\n"
        "@app.task\n"
        "def say(text: str) -> None: ...\n"
        "with connection.cursor() as cursor:\n"
        "    cursor.execute(create_outbox('sqlite')[0])\n"
        "with transaction.atomic():\n"
        "    say.enqueue_in_sync(connection, 'kept')\n"
        "try:\n"
        "    with transaction.atomic():\n"
        "        say.enqueue_in_sync(connection, 'lost')\n"
        "        raise KeyError\n"
        "except KeyError: pass\n"
    )
    file = tmp_path / "django.db"
    with Program(["-c", script, str(file)], tmp_path / "out") as program:
        assert program.exit_code() == 0, program.output
    assert await counted(f"sqlite:///{file}") == 1
