"""One thread a process that uses the file: concurrent requests share a transaction, and so one sync to the disk.

A thread without an event loop writes itself (`Writer.do_here`), since each hand-over to another one takes longer than
the writing. Whoever has the turn takes along what other such threads want.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import random
import sqlite3
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, NamedTuple, TypeVar

from leveret.brokers.sqlite.identity import FileAway, IndexAway
from leveret.brokers.sqlite.opening import check_there, close_as_it_is, open_database
from leveret.brokers.sqlite.problems import is_damage, is_locked, translate
from leveret.brokers.sqlite.store import Store
from leveret.errors import BrokerUnavailable, LeveretError, StoreError
from leveret.model import KEEP

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from leveret.brokers.sqlite.identity import Change, Identity
    from leveret.brokers.sqlite.wakeup import WakeUps
    from leveret.model import Queue

log = logging.getLogger("leveret.sqlite")

T = TypeVar("T")

#: Most requests in one transaction: bounds how long a first one waits for the last one's work.
_MOST = 512


#: Between two looks at a lock that another process holds (seconds): a commit takes about a millisecond.
_LOCKED = (0.0002, 0.001)


#: Between two looks whether the other connections of this process have let go of a deleted file (seconds).
_DELETED = (0.002, 0.02)


class _Look(Enum):
    LOOK = 0


_LOOK: Final = _Look.LOOK


class _Request(Generic[T]):
    """Work to be done, and the loop that waits for it; None: a thread waits, and looks itself when it has the turn."""

    def __init__(self, work: Callable[[Store], T], loop: asyncio.AbstractEventLoop | None) -> None:
        self.work = work
        self.loop = loop
        self.future: asyncio.Future[T] | None = None if loop is None else loop.create_future()
        #: It is committed, or has failed.
        self.is_done = False
        self.result: T | None = None
        self.error: BaseException | None = None

    @property
    def abandoned(self) -> bool:
        return self.future is not None and self.future.cancelled()

    def run(self, store: Store) -> None:
        """Do the work; a refusal of Leveret's own has written nothing, so the transaction goes on."""
        self.error = None
        try:
            self.result = self.work(store)
        except LeveretError as error:
            self.error = error

    def outcome(self) -> T:
        """For its thread, when it is done. Raises what was in the way."""
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]

    def answer(self) -> None:
        """On its loop."""
        if self.future is None or self.future.done():
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

    def __init__(self, path: Path, wake_ups: WakeUps, *, timeout: float, keep: float = KEEP) -> None:
        self.path = path
        self._wake_ups = wake_ups
        self._timeout = timeout
        self._keep = keep
        #: None: the end. `_LOOK`: another connection of this process has found that files were deleted.
        self._requests: queue.SimpleQueue[_Request[Any] | _Look | None] = queue.SimpleQueue()
        #: Those of threads that wait for their turn.
        self._here: deque[_Request[Any]] = deque()
        #: Held while the file is used, and until when the lock on it may be waited for (`time.monotonic`).
        self._turn = threading.Lock()
        self._deadline = 0.0
        _writers.add(self)
        self._thread: threading.Thread | None = None
        self._closed = False
        #: The queues that were declared, for a file that takes this one's place.
        self._declared: dict[str, Queue] = {}
        self._open: _Open | None = None
        self._was_open = False

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
            raise self._why_closed()
        request = _Request(work, asyncio.get_running_loop())
        self._requests.put(request)
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="leveret-sqlite", daemon=True)
            self._thread.start()
        assert request.future is not None
        return await request.future

    def do_here(self, work: Callable[[Store], T]) -> T:
        """The same in the calling thread, which runs no event loop. Raises TimeoutError: it may be done later.

        The file was used by `do` before.
        """
        deadline = time.monotonic() + self._timeout
        request = _Request(work, None)
        self._here.append(request)
        try:
            if self._turn.acquire(timeout=self._timeout):
                try:
                    self._deadline = deadline
                    while not (request.is_done or self._closed):
                        # A thread that took this one along may have been interrupted.
                        self._commit(self._waiting() or [request])
                finally:
                    self._turn.release()
        finally:
            if not request.is_done:
                with suppress(ValueError):  # it is being done
                    self._here.remove(request)
        if request.is_done:
            return request.outcome()
        raise self._why_closed() if self._closed else TimeoutError

    def _waiting(self) -> list[_Request[Any]]:
        waiting: list[_Request[Any]] = []
        with suppress(IndexError):
            while len(waiting) < _MOST:
                waiting.append(self._here.popleft())
        return waiting

    def _why_closed(self) -> BrokerUnavailable:
        return BrokerUnavailable(f"{self.path} was closed by this program")

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
            asked = [request for request in batch if isinstance(request, _Request)]
            with self._turn:
                self._deadline = time.monotonic() + self._timeout
                if asked:
                    self._commit([request for request in asked if not request.abandoned])
                elif self._open is not None and _LOOK in batch:
                    with suppress(StoreError, sqlite3.Error, OSError):
                        self._opened()
            if None in batch:
                break
        with self._turn:
            if self._open is not None:
                self._open.database.close()
                self._open = None

    def _batch(self) -> list[_Request[Any] | _Look | None]:
        batch = [self._requests.get()]
        while batch[-1] is not None and len(batch) < _MOST and not self._requests.empty():
            batch.append(self._requests.get())
        return batch

    def _commit(self, requests: Sequence[_Request[Any]]) -> None:
        try:
            self._transaction(requests)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the requests'; the thread must go on
            if (
                isinstance(error, sqlite3.OperationalError)
                and "decode to UTF-8" in str(error)
                and self._read_any_text()
            ):
                self._commit(requests)
                return
            if len(requests) > 1 and not (is_locked(error) or isinstance(error, FileAway)):
                # One request's failure must not be its neighbours': each has a transaction of its own now.
                for request in requests:
                    self._commit([request])
                return
            if self._open is not None and is_damage(error):
                self._leave(self._open, "damaged")
            for request in requests:
                request.error = translate(error, self.path)
        _answer(requests)

    def _transaction(self, requests: Sequence[_Request[Any]]) -> None:
        opened = self._begun()
        store, database = opened.store, opened.database
        try:
            for request in requests:
                request.run(store)
            letters = store.recipients.letters()
            database.execute("COMMIT")
            self._check_place_of(opened)
        except BaseException:
            store.end(committed=False)
            if database.in_transaction:
                database.execute("ROLLBACK")
            raise
        store.end(committed=True)
        for receive, dealt in letters.own:
            receive(dealt)
        for name in letters.wake_ups:
            self._wake_ups.wake(name)

    def _begun(self) -> _Open:
        """The file that has the database's name now, in a transaction."""
        while True:
            opened = self._opened()
            self._begin(opened.database)
            try:
                if _schema(opened.database) == opened.schema:
                    return opened
            except BaseException:
                opened.database.execute("ROLLBACK")
                raise
            # A backup was restored into it, say: whatever is known of it may be wrong.
            opened.database.execute("ROLLBACK")
            self._leave(opened, "restored")

    def _check_place_of(self, opened: _Open) -> None:
        """After a commit: whoever is told that it is done shall find it under the database's name."""
        if opened.identity.main_change() is not None:
            raise FileAway(
                f"{self.path} was removed or replaced while it was written: what was asked for is done in the file "
                "that had this name before, and is lost unless that one comes back"
            )

    def _begin(self, database: sqlite3.Connection) -> None:
        """Wait for the lock: SQLite's own way sleeps far longer than others hold it, and so lets it lie idle."""
        while True:
            try:
                database.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError as error:
                if not is_locked(error) or time.monotonic() > self._deadline:
                    raise
                time.sleep(random.uniform(*_LOCKED))  # noqa: S311 - so that none is always last
            else:
                return

    def _opened(self) -> _Open:
        if self._open is not None:
            change = self._open.identity.change()
            if change == "away":
                check_there(self.path)
            elif change is not None:
                self._leave(self._open, change)
        if self._open is None:
            database, identity = self._database()
            self._wake_ups.beside(identity.database)
            store = Store(database, keep=self._keep, declared=self._declared)
            self._open = _Open(database, store, identity, _schema(database))
            self._was_open = True
        return self._open

    def _database(self) -> tuple[sqlite3.Connection, Identity]:
        while True:
            left = max(0.0, self._deadline - time.monotonic())
            try:
                return open_database(self.path, timeout=left, again=self._was_open)
            except IndexAway:
                if not left:
                    raise
                for writer in list(_writers):
                    writer.look()
                time.sleep(random.uniform(*_DELETED))  # noqa: S311 - all of them must have let go at one moment

    def look(self) -> None:
        """From any thread: have it see whether its files are there still."""
        if self._thread is not None and self._thread is not threading.current_thread() and self._requests.empty():
            self._requests.put(_LOOK)

    def _leave(self, opened: _Open, why: Change | Literal["restored", "damaged"]) -> None:
        """Let go of the file as it is, to open what has its name now. The consumers begin anew."""
        self._open = None
        kept = False
        if why == "unlogged" and opened.identity.may_keep_log:
            with suppress(sqlite3.Error):
                kept = opened.database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0] == 0
        close_as_it_is(opened.database)
        text = _LEFT[why]
        if why == "unlogged":
            text += "; nothing was lost" if kept else "; what was stored last may be lost"
        if why == "replaced" and self.path.resolve() == opened.identity.database:
            aside = opened.identity.put_log_aside()
            if aside is not None:
                text += f". What was stored in the other one last is not in it; its log is kept as {aside}"
        if why != "damaged":  # whoever asks says so
            log.warning("%s %s", self.path, text)
        for receive in opened.store.recipients.receivers():
            receive(None)

    def _read_any_text(self) -> bool:
        """Some text in the file is no UTF-8: read it all more slowly, with escapes. False: that is done already."""
        if self._open is None or self._open.database.text_factory is not str:
            return False
        self._open.database.text_factory = _any_text
        return True


#: Of this process.
_writers: weakref.WeakSet[Writer] = weakref.WeakSet()


class _Open(NamedTuple):
    """The file that is open."""

    database: sqlite3.Connection
    store: Store
    identity: Identity
    #: SQLite's own number of its schema, which a restored backup changes too.
    schema: int


_LEFT: dict[str, str] = {
    "replaced": "is another file now, and is used from now on: it was replaced while this program used it",
    "unlogged": "has lost its -wal or -shm file: somebody deleted it while programs used it, which they must not",
    "relogged": "has another -wal or -shm file: somebody deleted those while programs used it, and what was "
    "stored last is lost",
    "restored": "was restored from a backup, or its schema was changed: it is read anew",
}


def _schema(database: sqlite3.Connection) -> int:
    return int(database.execute("PRAGMA schema_version").fetchone()[0])


def _any_text(text: bytes) -> str:
    return text.decode(errors="backslashreplace")


def _answer(requests: Sequence[_Request[Any]]) -> None:
    """All of a loop's with one call: each wakes it."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Request[Any]]] = {}
    for request in requests:
        request.is_done = True
        if request.loop is not None:
            by_loop.setdefault(request.loop, []).append(request)
    for loop, mine in by_loop.items():
        call_soon(loop, partial(_answer_each, mine))


def _answer_each(requests: Sequence[_Request[Any]]) -> None:
    for request in requests:
        request.answer()
