"""Where tasks are kept during a measurement: a RabbitMQ node, or a folder for SQLite files."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import aio_pika
from aio_pika.exceptions import ChannelNotFoundEntity

from tests.support.nodes import Node

if TYPE_CHECKING:
    from collections.abc import Iterator

#: How long a queue may take to be empty after its last task ran (seconds).
_PATIENCE = 10.0
#: The tables of waiting tasks: Leveret's and Huey's, which have one name, and potatoq's.
_WAITING = {"task", "potatoq_jobs"}


class Place(Protocol):
    """A broker. ``url`` names a store of its own for each measurement on SQLite, the node on RabbitMQ."""

    name: str
    #: "rabbitmq" or "sqlite".
    kind: str

    def url(self, queue: str) -> str: ...
    def remaining(self, queue: str) -> int:
        """Tasks that are still stored there."""

    def forget(self, queue: str) -> None:
        """Delete what a measurement left."""


class RabbitMQ:
    """One node, used by all in turn."""

    kind = "rabbitmq"

    def __init__(self, node: Node) -> None:
        self._node = node
        self.name = f"RabbitMQ {node.version}"

    def url(self, queue: str) -> str:
        del queue
        return self._node.url

    def remaining(self, queue: str) -> int:
        deadline = time.monotonic() + _PATIENCE
        # Twice: what workers held goes back a moment after they ended, and a busy quorum queue answers 0.
        while (count := asyncio.run(self._ready(queue))) and time.monotonic() < deadline:
            time.sleep(0.2)
        return count

    def forget(self, queue: str) -> None:
        asyncio.run(self._delete(queue))

    async def _ready(self, queue: str) -> int:
        async with await aio_pika.connect(self._node.url) as connection:
            channel = await connection.channel()
            try:
                declared = await channel.declare_queue(queue, passive=True)
            except ChannelNotFoundEntity:
                return 0
            return declared.declaration_result.message_count or 0

    async def _delete(self, queue: str) -> None:
        async with await aio_pika.connect(self._node.url) as connection:
            for name in (queue, f"{queue}.gate", f"{queue}.dead", f"{queue}.DQ", f"{queue}.XQ"):
                await (await connection.channel()).queue_delete(name)


class SQLite:
    """A folder with a file for each measurement."""

    kind = "sqlite"
    name = f"SQLite {sqlite3.sqlite_version}"

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, queue: str) -> Path:
        return self._folder / f"{queue}.db"

    def url(self, queue: str) -> str:
        return f"sqlite:///{self.path(queue)}"

    def remaining(self, queue: str) -> int:
        database = sqlite3.connect(self.path(queue))
        try:
            names = {name for (name,) in database.execute("SELECT name FROM sqlite_schema")}
            (table,) = names.intersection(_WAITING)
            (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
            return int(count)
        finally:
            database.close()

    def forget(self, queue: str) -> None:
        for left in self._folder.glob(f"{queue}.db*"):
            with suppress(OSError):
                shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def rabbitmq(version: str) -> Iterator[RabbitMQ]:
    node = Node(version)
    try:
        node.start()
        node.wait()
        yield RabbitMQ(node)
    finally:
        node.close()


@contextmanager
def sqlite() -> Iterator[SQLite]:
    with tempfile.TemporaryDirectory(prefix="leveret-bench-") as folder:
        yield SQLite(Path(folder))
