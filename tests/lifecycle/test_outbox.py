"""Tasks that are stored with a user's own transaction: each driver, the relay, the inbox, the same file."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing, contextmanager
from typing import TYPE_CHECKING, Any

import aiosqlite
import asyncpg
import psycopg
import pymysql
import pytest
import sqlalchemy
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from leveret import App, Queue
from leveret.outbox import Relay, create_outbox, open_database
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from tests.support.databases import Databases


def application(folder: Path) -> App:
    app = App(f"sqlite:///{folder / 'broker.db'}", queues=[Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None:
        """Nobody runs it."""

    return app


def make_table(url: str, statements: str) -> None:
    """As a migration does it."""
    dialect = make_url(url).get_backend_name()
    if dialect == "postgresql":
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(statements.encode())
    elif dialect == "sqlite":
        with closing(sqlite3.connect(make_url(url).database or "")) as connection:
            connection.executescript(statements)
    else:
        with mysql(url) as connection:
            for statement in statements.split(";\n"):
                if statement.strip():
                    connection.cursor().execute(statement)


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
