"""The relay's way to the user's database: SQLAlchemy's engine, in a thread of its own. Nothing else imports it."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import sqlalchemy
from sqlalchemy import event
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from leveret.errors import ConfigurationError, LeveretError
from leveret.outbox.statements import CHANNEL, MOST_TRIES, TABLE, known_dialect

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sqlalchemy.engine import URL, Connection, Engine

T = TypeVar("T")

#: The drivers that do not need an event loop, where the URL names none or one that does.
_DRIVERS = {"postgresql": "postgresql+psycopg", "mysql": "mysql+pymysql", "mariadb": "mariadb+pymysql"}
_ASYNCHRONOUS = {
    "postgresql+asyncpg": "postgresql+psycopg",
    "mysql+aiomysql": "mysql+pymysql",
    "mysql+asyncmy": "mysql+pymysql",
    "sqlite+aiosqlite": "sqlite",
}
#: For how long a relay on SQLite has what it took: nobody is locked out meanwhile, and after a crash the rows are taken
#: again then (seconds).
LEASE = 60.0
#: How long SQLite's other writers are waited for (seconds).
_PATIENCE = 30.0
#: A reason is cut there (characters).
_MOST_REASON = 2_000


class DatabaseError(LeveretError):
    """The database cannot be reached or used now."""


class Waiting(msgspec.Struct, frozen=True):
    """A row of the outbox, for people."""

    number: int
    id: str
    task: str | None
    queue: str
    created: float
    tries: int
    error: str | None


class Gauges(msgspec.Struct, frozen=True):
    """How much waits, and since when."""

    rows: int
    #: Of the rows: those that are not tried any more.
    failed: int
    #: The age of the oldest row that is still tried (seconds).
    oldest: float


class Database:
    """The outbox in a user's database. Its methods raise DatabaseError."""

    def __init__(self, url: str) -> None:
        try:
            parsed = _with_driver(sqlalchemy.make_url(url))
            self.dialect = known_dialect(parsed.get_backend_name())
            self._engine = _engine(parsed, self.dialect)
        except (ArgumentError, NoSuchModuleError) as error:
            raise ConfigurationError(
                f"the database's URL cannot be used ({error}); write postgresql://user:password@host/name, mysql://... "
                "or sqlite:////whole/path.db"
            ) from error
        except ModuleNotFoundError as error:
            raise ConfigurationError(
                f"the database needs the package {error.name!r}: pip install {_package(error.name)}"
            ) from error
        self.place = parsed.render_as_string(hide_password=True)
        self._thread = ThreadPoolExecutor(1, "leveret-outbox")
        #: Holds the locks of what was taken.
        self._taken: Connection | None = None

    async def check(self) -> None:
        """Raises ConfigurationError if there is no table."""
        if not await self._do(lambda: sqlalchemy.inspect(self._engine).has_table(TABLE)):
            raise ConfigurationError(
                f"{self.place} has no table {TABLE}; 'leveret outbox sql {self.dialect}' prints the statements"
            )

    async def take(self, limit: int) -> Sequence[tuple[int, bytes]]:
        """The oldest rows that no other relay has, by their numbers; they are this one's until `settle`."""
        return await self._do(partial(self._take, limit))

    async def settle(self, done: Sequence[int], failed: Mapping[int, str]) -> None:
        """Delete what was published, and count a try of what was not; the rest is anybody's again."""
        await self._do(partial(self._settle, done, failed))

    async def gauges(self) -> Gauges:
        """Count the rows."""
        return await self._do(self._gauges)

    async def rows(self, limit: int) -> Sequence[Waiting]:
        """The rows that could not be published first, then the oldest."""
        sql = (
            "SELECT number, id, task, queue, created, tries, error FROM leveret_outbox"
            f" ORDER BY CASE WHEN tries >= {MOST_TRIES} THEN 0 ELSE 1 END, number LIMIT {int(limit)}"
        )
        return [Waiting(*row) for row in await self._do(partial(self._query, sql))]

    async def retry(self, ids: Sequence[str]) -> int:
        """Have rows tried again at once, by their tasks' ids; all that failed if none is named. How many there were."""
        return await self._do(partial(self._retry, ids))

    async def close(self) -> None:
        await self._do(self._let_go)
        self._thread.shutdown()

    async def _do(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, work)
        except SQLAlchemyError as error:
            reason = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise DatabaseError(f"{self.place}: {reason}") from error

    def _take(self, limit: int) -> Sequence[tuple[int, bytes]]:
        where = f"WHERE tries < {MOST_TRIES} AND next_try <= {time.time():.3f} ORDER BY number LIMIT {int(limit)}"
        select = f"SELECT number, message FROM leveret_outbox {where}"
        if self.dialect == "sqlite":
            with self._engine.begin() as connection:
                rows = connection.exec_driver_sql(select).fetchall()
                self._update(connection, [number for number, _ in rows], f"next_try = {time.time() + LEASE:.3f}")
            return [(number, message) for number, message in rows]
        self._taken = connection = self._engine.connect()
        taken: Sequence[Any] = ()
        try:
            taken = connection.exec_driver_sql(f"{select} FOR UPDATE SKIP LOCKED").fetchall()
        finally:
            if not taken:
                self._give_back()
        return [(number, bytes(message)) for number, message in taken]

    def _settle(self, done: Sequence[int], failed: Mapping[int, str]) -> None:
        try:
            connection = self._taken or self._engine.connect()
            self._taken = connection
            if done:
                connection.exec_driver_sql(f"DELETE FROM leveret_outbox WHERE number IN ({_list(done)})")
            for number, reason in failed.items():
                statement = sqlalchemy.text(
                    "UPDATE leveret_outbox SET next_try = :now + power2, tries = tries + 1, error = :error"
                    " WHERE number = :number".replace("power2", "(1 + tries * tries)")
                )
                connection.execute(statement, {"now": time.time(), "error": reason[:_MOST_REASON], "number": number})
            connection.commit()
        finally:
            self._give_back()

    def _release(self, numbers: Sequence[int]) -> None:
        if self._taken is None and numbers and self.dialect == "sqlite":
            with self._engine.begin() as connection:
                self._update(connection, numbers, "next_try = 0")
        self._give_back()

    async def hand_back(self, numbers: Sequence[int]) -> None:
        """What was taken is anybody's again, and nobody's try."""
        await self._do(partial(self._release, numbers))

    def _update(self, connection: Connection, numbers: Sequence[int], change: str) -> None:
        if numbers:
            connection.exec_driver_sql(f"UPDATE leveret_outbox SET {change} WHERE number IN ({_list(numbers)})")

    def _give_back(self) -> None:
        taken, self._taken = self._taken, None
        if taken is not None:
            taken.close()

    def _query(self, sql: str) -> Sequence[Any]:
        with self._engine.connect() as connection:
            return connection.exec_driver_sql(sql).fetchall()

    def _gauges(self) -> Gauges:
        tried = f"tries < {MOST_TRIES}"
        ((rows, failed, first),) = self._query(
            f"SELECT count(*), count(CASE WHEN {tried} THEN NULL ELSE 1 END), min(CASE WHEN {tried} THEN created END)"
            " FROM leveret_outbox"
        )
        return Gauges(rows, failed, 0.0 if first is None else max(0.0, time.time() - first))

    def _retry(self, ids: Sequence[str]) -> int:
        change = sqlalchemy.text(
            "UPDATE leveret_outbox SET tries = 0, next_try = 0 WHERE "
            + ("id IN :ids" if ids else f"tries >= {MOST_TRIES}")
        )
        if ids:
            change = change.bindparams(sqlalchemy.bindparam("ids", list(ids), expanding=True))
        with self._engine.begin() as connection:
            return connection.execute(change).rowcount

    def _let_go(self) -> None:
        with suppress(SQLAlchemyError):
            self._give_back()
        self._engine.dispose()

    async def listener(self) -> Any:
        """A connection of PostgreSQL's driver that hears of new rows; None where there is none."""
        return await self._do(self._listener)

    def _listener(self) -> Any:
        if self.dialect != "postgresql" or self._engine.dialect.driver != "psycopg":
            return None
        try:
            found = self._engine.raw_connection()
            connection: Any = found.driver_connection
            found.detach()
            connection.autocommit = True
            connection.execute(f"LISTEN {CHANNEL}")
        except Exception as error:
            raise DatabaseError(f"{self.place}: {error}") from error
        return connection


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, map(int, numbers)))


def _with_driver(url: URL) -> URL:
    name = _ASYNCHRONOUS.get(url.drivername) or _DRIVERS.get(url.drivername) or url.drivername
    return url.set(drivername=name)


def _engine(url: URL, dialect: str) -> Engine:
    if dialect == "sqlite":
        engine = sqlalchemy.create_engine(url, connect_args={"timeout": _PATIENCE}, poolclass=NullPool)
        event.listen(engine, "connect", _begin_ourselves)
        event.listen(engine, "begin", _begin_immediate)
        return engine
    # MariaDB's and MySQL's own level locks the gaps between rows, too: the users' inserts would wait for the relay.
    return sqlalchemy.create_engine(url, isolation_level="READ COMMITTED", pool_pre_ping=True, pool_size=2)


def _begin_ourselves(connection: Any, _record: object) -> None:
    connection.isolation_level = None


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def _package(module: str | None) -> str:
    return {"psycopg": "'psycopg[binary]'", "MySQLdb": "mysqlclient"}.get(str(module), str(module))
