"""The relay: takes tasks out of the outbox, publishes them, and deletes them when the broker has confirmed them."""

from __future__ import annotations

import asyncio
import importlib
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from leveret.errors import (
    BrokerRefused,
    BrokerUnavailable,
    ConfigurationError,
    EnqueueTimeout,
    LeveretError,
    StoreError,
)
from leveret.outbox.message import StoredTask, stored_task

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from leveret.brokers import OnConflict
    from leveret.model import Envelope
    from leveret.outbox.database import Database

log = logging.getLogger("leveret.outbox")

#: Rows of one transaction.
BATCH = 500
#: Between two looks at an empty table: at first, and at most (seconds).
_SHORTEST, _LONGEST = 0.05, 1.0
#: While the broker or the database is away (seconds).
_MOST_PAUSE = 10.0


class Publisher(Protocol):
    """Stores tasks that have been through the application's middleware before; the application's client is one."""

    async def publish_stored(self, envelopes: Sequence[Envelope], /, *, notify: bool, on_conflict: OnConflict) -> None:
        """Store them durably. Raises LeveretError."""


def open_database(url: str) -> Database:
    """The database of a URL. Raises ConfigurationError, also if SQLAlchemy is missing."""
    try:
        module = importlib.import_module("leveret.outbox.database")
    except ModuleNotFoundError as error:
        if error.name != "sqlalchemy":
            raise
        raise ConfigurationError(
            "the relay needs the package SQLAlchemy: pip install 'leveret[outbox]', and your database's driver"
        ) from error
    found: Database = module.Database(url)
    return found


class Relay:
    """One relay; any number of them may run on one database."""

    def __init__(self, database: Database, publisher: Publisher, *, batch: int = BATCH, poll: bool = False) -> None:
        """``poll``: do not ask the database to tell of new rows, as behind pgbouncer in transaction mode."""
        self._database = database
        self._publisher = publisher
        self._batch = batch
        self._poll = poll
        self._wake = asyncio.Event()
        self._stopping = False
        self._listening: Any = None
        #: How many rows it has published.
        self.published = 0

    def stop(self) -> None:
        """End after what is under way."""
        self._stopping = True
        self._wake.set()

    async def run(self) -> None:
        """Until `stop`. Raises ConfigurationError if there is no table."""
        await self._check()
        pause, trouble = _SHORTEST, 0.0
        try:
            while not self._stopping:
                try:
                    await self._listen()
                    self._wake.clear()
                    taken = await self._round()
                except (LeveretError, TimeoutError) as error:
                    trouble = min(_MOST_PAUSE, 2 * trouble or _SHORTEST)
                    log.warning("the relay waits %.1f s: %s", trouble, str(error) or type(error).__name__)
                    await self._sleep(trouble, only_stop=True)
                    continue
                trouble = 0.0
                if taken:
                    pause = _SHORTEST
                if taken < self._batch:
                    await self._sleep(_LONGEST if self._listening is not None else pause)
                    pause = min(_LONGEST, pause * 2)
        finally:
            self._deafen()

    async def _check(self) -> None:
        """The database may not be up yet."""
        pause = _SHORTEST
        while not self._stopping:
            try:
                await self._database.check()
            except ConfigurationError:
                raise
            except LeveretError as error:
                pause = min(_MOST_PAUSE, pause * 2)
                log.warning("the relay waits %.1f s: %s", pause, error)
                await self._sleep(pause, only_stop=True)
            else:
                return

    async def _round(self) -> int:
        """Publish one batch; how many rows it had."""
        rows = await self._database.take(self._batch)
        if not rows:
            return 0
        done: list[int] = []
        failed: dict[int, str] = {}
        try:
            for group in _groups(rows, failed):
                await self._publish(group, done, failed)
        except BaseException:
            # What is confirmed goes, and the rest is not to blame.
            if done or failed:
                await asyncio.shield(self._database.settle(done, failed))
            settled = {*done, *failed}
            await asyncio.shield(self._database.hand_back([number for number, _ in rows if number not in settled]))
            raise
        await self._database.settle(done, failed)
        self.published += len(done)
        return len(rows)

    async def _publish(self, group: Sequence[tuple[int, StoredTask]], done: list[int], failed: dict[int, str]) -> None:
        """Publish tasks of one queue. Raises what is the broker's trouble, and none of a task's own."""
        first = group[0][1]
        try:
            await self._publisher.publish_stored(
                [task.envelope for _, task in group],
                notify=first.notify,
                on_conflict="ignore" if first.on_conflict == "raise" else first.on_conflict,
            )
        except LeveretError as error:
            if _is_away(error):
                raise
            if len(group) == 1:
                ((number, task),) = group
                failed[number] = f"{type(error).__name__}: {error}"
                log.warning("task %s %s cannot be published: %s", task.envelope.task, task.envelope.id, error)
                return
            ids = set(getattr(error, "ids", ())) or {task.envelope.id for _, task in group}
            done.extend(number for number, task in group if task.envelope.id not in ids)
            for number, task in group:
                if task.envelope.id in ids:
                    await self._publish([(number, task)], done, failed)
        else:
            done.extend(number for number, _ in group)

    async def _listen(self) -> None:
        if self._poll or self._listening is not None:
            return
        try:
            self._listening = await self._database.listener()
        except LeveretError as error:
            log.debug("the database does not tell of new rows, which are looked for: %s", error)
            return
        if self._listening is None:
            self._poll = True
            return
        asyncio.get_running_loop().add_reader(self._listening.fileno(), self._hear)

    def _hear(self) -> None:
        try:
            for _ in self._listening.notifies(timeout=0):
                pass
        except Exception as error:  # noqa: BLE001 - the driver's, whatever it is
            log.warning("the database does not tell of new rows any more: %s", error)
            self._deafen()
        self._wake.set()

    def _deafen(self) -> None:
        listening, self._listening = self._listening, None
        if listening is not None:
            with suppress(Exception):
                asyncio.get_running_loop().remove_reader(listening.fileno())
            listening.close()

    async def _sleep(self, seconds: float, *, only_stop: bool = False) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._wake.wait()
                while only_stop and not self._stopping:
                    self._wake.clear()
                    await self._wake.wait()


def _groups(rows: Sequence[tuple[int, bytes]], failed: dict[int, str]) -> Iterator[list[tuple[int, StoredTask]]]:
    """The tasks by queue and policy, each group in order; what cannot be read is failed."""
    groups: dict[tuple[str, str, bool], list[tuple[int, StoredTask]]] = {}
    for number, message in rows:
        try:
            task = stored_task(message)
        except ValueError as error:
            failed[number] = f"the row cannot be read: {error}"
            continue
        groups.setdefault((task.envelope.queue, task.on_conflict, task.notify), []).append((number, task))
    yield from groups.values()


def _is_away(error: LeveretError) -> bool:
    """Whether the broker is to blame, and no row."""
    return isinstance(error, (BrokerUnavailable, BrokerRefused, EnqueueTimeout, StoreError))
