"""The users' connections and sessions: which driver's one is, and how a statement is run in its transaction.

They are told by the module of their class: none of these packages is imported here, unless the user has.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model import Queue
from leveret.model.durations import show
from leveret.outbox.statements import INSERT, known_dialect

if TYPE_CHECKING:
    from leveret.outbox.message import StoredTask

#: The databases of DB-API drivers, by the package of their connections.
_DRIVERS = {
    "sqlite3": "sqlite",
    "_sqlite3": "sqlite",
    "psycopg": "postgresql",
    "psycopg2": "postgresql",
    "pg8000": "postgresql",
    "pymysql": "mysql",
    "MySQLdb": "mysql",
    "mysql": "mysql",
    "mariadb": "mysql",
    "sqlean": "sqlite",
}
_ACCEPTED = (
    "give a session or connection of SQLAlchemy, a connection of psycopg, asyncpg, sqlite3, aiosqlite, PyMySQL, "
    "mysqlclient or psycopg2, or Django's django.db.connection"
)
_PLACEHOLDERS = {"qmark": "?", "format": "%s", "pyformat": "%s"}
_FILES = "PRAGMA database_list"

#: Runs a statement with values; how many rows it changed, and those that it gave.
Answer: TypeAlias = "tuple[int, Sequence[Sequence[Any]]]"


class SameFile(msgspec.Struct, frozen=True):
    """The file of the application's broker: a transaction in it stores tasks without an outbox."""

    #: None: the broker is none on SQLite.
    path: Path | None
    queues: Mapping[str, Queue]
    #: How long results are kept (seconds).
    keep: float

    def insert(self, tasks: Sequence[StoredTask], database: Any) -> None:
        """In the transaction of a sqlite3.Connection to the file. Raises BrokerError."""
        from leveret.brokers.sqlite import insert_within

        assert self.path is not None
        plain = [(one.envelope, one.on_conflict, one.notify) for one in tasks]
        insert_within(database, plain, self.queues, self.path, self.keep)


class Given(msgspec.Struct, frozen=True):
    """A connection of the user's."""

    #: postgresql, mysql or sqlite.
    dialect: str
    #: Runs a statement with such placeholders; where ``is_async``, it gives what is to be awaited.
    run: Callable[[str, Sequence[Any]], Any]
    places: Callable[[int], Sequence[str]]
    is_async: bool = False
    #: Calls a function with the sqlite3.Connection below it, in the thread that may use it; None: there is none.
    raw: Callable[[Callable[[Any], Any]], Any] | None = None


def given(connection: object) -> Given:
    """What the user has given. Raises ConfigurationError for what is no connection that is known."""
    packages = [cls.__module__.partition(".")[0] for cls in type(connection).__mro__]
    for package in packages:
        if package == "sqlalchemy":
            return _sqlalchemy(connection)
        if package == "django":
            return _django(connection)
        if package == "asyncpg":
            return Given("postgresql", partial(_asyncpg, connection), _numbered, is_async=True)
        if package == "aiosqlite":
            raw = partial(_in_thread, connection)
            return Given("sqlite", partial(_awaited, connection), _marks("?"), is_async=True, raw=raw)
        if package == "psycopg" and inspect.iscoroutinefunction(getattr(connection, "execute", None)):
            return Given("postgresql", partial(_awaited, connection), _marks("%s"), is_async=True)
        if package in _DRIVERS:
            return _db_api(connection, package)
    raise ConfigurationError(f"{show(connection)} is no connection that enqueue_in knows: {_ACCEPTED}")


async def insert(connection: object, tasks: Sequence[StoredTask], same_file: SameFile) -> None:
    """Store tasks in the user's transaction. Raises ConfigurationError, and what the driver raises."""
    found = given(connection)
    if found.is_async:
        if await _is_brokers(found, same_file) and found.raw is not None:
            await found.raw(partial(same_file.insert, tasks))
            return
        for sql, row in _inserts(found, tasks):
            await found.run(sql, row)
    else:
        insert_sync(connection, tasks, same_file)


def insert_sync(connection: object, tasks: Sequence[StoredTask], same_file: SameFile) -> None:
    """`insert` for connections that are not asynchronous. Raises ConfigurationError for those that are."""
    found = given(connection)
    if found.is_async:
        raise ConfigurationError(f"{show(connection)} is asynchronous: use 'await task.enqueue_in(...)'")
    if found.raw is not None and same_file.path is not None:
        _, files = found.run(_FILES, ())
        if _leads_to(files, same_file.path):
            found.raw(partial(same_file.insert, tasks))
            return
    for sql, row in _inserts(found, tasks):
        found.run(sql, row)


async def _is_brokers(found: Given, same_file: SameFile) -> bool:
    if found.raw is None or same_file.path is None:
        return False
    _, files = await found.run(_FILES, ())
    return _leads_to(files, same_file.path)


def _leads_to(files: Sequence[Sequence[Any]], path: Path) -> bool:
    """Whether the connection's main database is the file."""
    for _, name, file in files:
        if name == "main" and file:
            try:
                return os.path.samefile(file, path)  # noqa: PTH121 - text of SQLite's
            except OSError:
                return False
    return False


def _inserts(found: Given, tasks: Sequence[StoredTask]) -> list[tuple[str, Sequence[Any]]]:
    sql = f"{INSERT} ({', '.join(found.places(5))})"
    return [(sql, one.row()) for one in tasks]


def _marks(placeholder: str) -> Callable[[int], Sequence[str]]:
    return lambda count: [placeholder] * count


def _numbered(count: int) -> Sequence[str]:
    return [f"${number}" for number in range(1, count + 1)]


def _named(count: int) -> Sequence[str]:
    return [f":p{number}" for number in range(count)]


def _sqlalchemy(connection: Any) -> Given:
    """A Connection, an AsyncConnection, a session of either kind, or a scoped session."""
    import sqlalchemy

    execute = getattr(connection, "execute", None)
    if execute is None:
        raise ConfigurationError(
            f"{show(connection)} has no transaction: give what 'with engine.begin() as connection' or "
            "'with Session.begin() as session' gives"
        )
    dialect = connection.dialect if hasattr(connection, "dialect") else connection.get_bind().dialect
    name = known_dialect(dialect.name)
    is_async = inspect.iscoroutinefunction(execute)

    def statement(sql: str, values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
        return sqlalchemy.text(sql), {f"p{number}": value for number, value in enumerate(values)}

    async def run_async(sql: str, values: Sequence[Any]) -> Answer:
        return _result(await execute(*statement(sql, values)))

    def run(sql: str, values: Sequence[Any]) -> Answer:
        return _result(execute(*statement(sql, values)))

    def raw(work: Callable[[Any], Any], of: Any = connection) -> Any:
        below = of.connection() if callable(getattr(of, "connection", None)) else of
        fairy = below.connection
        if hasattr(fairy.dbapi_connection, "run_async"):
            return fairy.dbapi_connection.run_async(lambda driver: _in_thread(driver, work))
        return work(fairy.driver_connection)

    async def raw_async(work: Callable[[Any], Any]) -> Any:
        return await connection.run_sync(lambda below: raw(work, below))

    lower: Any = raw_async if is_async else raw
    way: Any = run_async if is_async else run
    return Given(name, way, _named, is_async=is_async, raw=lower if name == "sqlite" else None)


def _result(result: Any) -> Answer:
    return result.rowcount, result.fetchall() if result.returns_rows else ()


def _django(connection: Any) -> Given:
    """``django.db.connection``, or one of ``connections``: its SQL has the same placeholders for every database."""

    def raw(work: Callable[[Any], Any]) -> Any:
        connection.ensure_connection()
        return work(connection.connection)

    dialect = known_dialect(connection.vendor)
    run = partial(_with_cursor, connection)
    return Given(dialect, run, _marks("%s"), raw=raw if dialect == "sqlite" else None)


def _db_api(connection: Any, package: str) -> Given:
    style = getattr(sys.modules.get(package.lstrip("_")), "paramstyle", "format")
    if package == "mysql":
        style = "pyformat"
    dialect = _DRIVERS[package]
    placeholder = _PLACEHOLDERS.get(style, "%s")
    run = partial(_with_cursor, connection)
    raw: Any = (lambda work: work(connection)) if dialect == "sqlite" else None
    return Given(dialect, run, _marks(placeholder), raw=raw)


def _with_cursor(connection: Any, sql: str, values: Sequence[Any]) -> Answer:
    cursor = connection.cursor()
    try:
        cursor.execute(sql, tuple(values))
        return cursor.rowcount, cursor.fetchall() if cursor.description else ()
    finally:
        cursor.close()


async def _asyncpg(connection: Any, sql: str, values: Sequence[Any]) -> Answer:
    """asyncpg tells how many rows a statement changed in a text: ``INSERT 0 1``."""
    if sql.startswith("SELECT"):
        return 0, await connection.fetch(sql, *values)
    told: str = await connection.execute(sql, *values)
    return int(told.rpartition(" ")[2]), ()


async def _awaited(connection: Any, sql: str, values: Sequence[Any]) -> Answer:
    """psycopg's asynchronous connections, and aiosqlite's."""
    cursor = await connection.execute(sql, tuple(values))
    try:
        return cursor.rowcount, await cursor.fetchall() if cursor.description else ()
    finally:
        await cursor.close()


def _in_thread(connection: Any, work: Callable[[Any], Any]) -> Awaitable[Any]:
    """aiosqlite has a thread for each connection, and no public way to call a function there."""
    found: Awaitable[Any] = connection._execute(work, connection._conn)  # noqa: SLF001
    return found
