"""One thread a process that uses the file: concurrent requests share a transaction, and so one sync to the disk."""

from __future__ import annotations

import asyncio
import queue
import random
import sqlite3
import threading
import time
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from leveret.brokers.sqlite.opening import open_database
from leveret.brokers.sqlite.store import Store
from leveret.errors import BrokerError, BrokerUnavailable, LeveretError, StoreError
from leveret.status import KEEP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from leveret.brokers.sqlite.bells import Bells

T = TypeVar("T")

#: Most requests in one transaction: bounds how long a first one waits for the last one's work.
_MOST = 512


#: Between two looks at a lock that another process holds (seconds): a commit takes about a millisecond.
_LOCKED = (0.0002, 0.001)


class _Request(Generic[T]):
    """Work for the thread, and who waits for it."""

    def __init__(self, work: Callable[[Store], T]) -> None:
        self.work = work
        self.loop = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self.loop.create_future()
        self.result: T | None = None
        self.error: BaseException | None = None

    @property
    def abandoned(self) -> bool:
        return self.future.cancelled()

    def run(self, store: Store) -> None:
        """Do the work; a refusal of Leveret's own has written nothing, so the transaction goes on."""
        self.error = None
        try:
            self.result = self.work(store)
        except LeveretError as error:
            self.error = error

    def answer(self) -> None:
        """On its loop."""
        if self.future.done():
            return
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.result)  # type: ignore[arg-type]


def call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    with suppress(RuntimeError):  # the loop has ended, and with it whoever waited
        loop.call_soon_threadsafe(callback)


class Writer:
    """Runs requests in the order they come."""

    def __init__(self, path: Path, bells: Bells, *, timeout: float, keep: float = KEEP) -> None:
        self.path = path
        self._bells = bells
        self._timeout = timeout
        self._keep = keep
        self._requests: queue.SimpleQueue[_Request[Any] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed = False
        self._database: sqlite3.Connection | None = None
        self._store: Store | None = None

    @property
    def has_file(self) -> bool:
        """Whether there is a file with anything in it; True as well where none can be, which opening it tells."""
        try:
            return self.path.stat().st_size > 0
        except FileNotFoundError:
            return not self.path.parent.is_dir()
        except OSError:
            return True

    async def do(self, work: Callable[[Store], T]) -> T:
        """Run the work in a transaction; returned means committed and on the disk.

        Cancelled while it waits, it is not done at all; cancelled later, it is done whole.
        """
        if self._closed:
            raise BrokerUnavailable(f"{self.path} was closed by this program")
        request = _Request(work)
        self._requests.put(request)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="leveret-sqlite", daemon=True)
            self._thread.start()
        return await request.future

    async def close(self) -> None:
        """Do what was asked for, then close the file."""
        self.abandon()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def abandon(self) -> None:
        """The same, without waiting for it."""
        if not self._closed:
            self._closed = True
            self._requests.put(None)

    def _serve(self) -> None:
        while True:
            batch = self._batch()
            asked = [request for request in batch if request is not None]
            if asked:
                self._commit([request for request in asked if not request.abandoned])
            if len(asked) < len(batch):
                break
        if self._database is not None:
            self._database.close()
            self._database = self._store = None

    def _batch(self) -> list[_Request[Any] | None]:
        batch = [self._requests.get()]
        while batch[-1] is not None and len(batch) < _MOST and not self._requests.empty():
            batch.append(self._requests.get())
        return batch

    def _commit(self, requests: Sequence[_Request[Any]]) -> None:
        try:
            self._transaction(requests)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the requests'; the thread must go on
            if len(requests) > 1 and not is_locked(error):
                # One request's failure must not be its neighbours': each has a transaction of its own now.
                for request in requests:
                    self._commit([request])
                return
            for request in requests:
                request.error = translate(error, self.path)
        _answer(requests)

    def _transaction(self, requests: Sequence[_Request[Any]]) -> None:
        store = self._opened()
        database = self._database
        assert database is not None
        self._begin(database)
        try:
            for request in requests:
                request.run(store)
            letters = store.letters()
            database.execute("COMMIT")
        except BaseException:
            store.rolled_back()
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        store.committed()
        for receive, dealt in letters.own:
            receive(dealt)
        for name in letters.bells:
            self._bells.ring(name)

    def _begin(self, database: sqlite3.Connection) -> None:
        """Wait for the lock: SQLite's own way sleeps far longer than others hold it, and so lets it lie idle."""
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(*_LOCKED))  # noqa: S311 - so that none is always last
            else:
                return

    def _opened(self) -> Store:
        if self._store is None:
            self._database = open_database(self.path, timeout=self._timeout)
            self._store = Store(self._database, keep=self._keep)
        return self._store


def _answer(requests: Sequence[_Request[Any]]) -> None:
    """All of a loop's with one call: each wakes it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Request[Any]]] = {}
    for request in requests:
        by_loop.setdefault(request.loop, []).append(request)
    for loop, mine in by_loop.items():
        call_soon(loop, partial(_answer_each, mine))


def _answer_each(requests: Sequence[_Request[Any]]) -> None:
    for request in requests:
        request.answer()


def is_locked(error: BaseException) -> bool:
    """Whether another process held the file for all of the time that it was waited for."""
    text = str(error)
    return isinstance(error, sqlite3.OperationalError) and ("locked" in text or "busy" in text)


def translate(error: BaseException, path: Path) -> BrokerError:
    """sqlite3's and the file system's exceptions as Leveret's, with the remedy."""
    if isinstance(error, BrokerError):
        return error
    text = str(error)
    translated: BrokerError
    if isinstance(error, FileNotFoundError) or "unable to open" in text:
        translated = StoreError(f"{path} cannot be opened: does its folder exist, and may this user write there?")
    elif is_locked(error):
        translated = BrokerUnavailable(f"{path} is being written by another process and stayed locked; try again")
    elif isinstance(error, OSError):
        translated = StoreError(f"{path} cannot be used: {error.strerror or error}")
    elif "readonly" in text:
        translated = StoreError(f"{path} is read-only for this user; make the file and its folder writable")
    elif "full" in text:
        translated = StoreError(f"the disk of {path} is full; nothing was stored")
    elif "malformed" in text or "not a database" in text:
        translated = StoreError(f"{path} is damaged or not an SQLite file ({text}); it was left as it is")
    else:
        translated = StoreError(f"{path}: {type(error).__name__}: {text}")
    translated.__cause__ = error
    return translated
