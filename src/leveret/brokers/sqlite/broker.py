"""The embedded broker: tasks in one SQLite file, nothing to install. For processes of one machine."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote_to_bytes, urlsplit

from leveret.brokers.backoff import backoff
from leveret.brokers.base import Capabilities
from leveret.brokers.deadlines import Deadlines
from leveret.brokers.sqlite.consumer import Lease, SQLiteConsumer
from leveret.brokers.sqlite.facets import (
    SQLiteControl,
    SQLiteDeadLetters,
    SQLiteLimits,
    SQLiteQueues,
    SQLiteSchedules,
    SQLiteStatuses,
    SQLiteUniqueKeys,
)
from leveret.brokers.sqlite.problems import translate
from leveret.brokers.sqlite.settling import Settling
from leveret.brokers.sqlite.wakeup import WakeUps
from leveret.brokers.sqlite.writer import Writer
from leveret.brokers.urls import MEMORY, absolute, censor
from leveret.errors import BrokerUnavailable, ConfigurationError, EnqueueTimeout, LeaseLost, QueueNotFound
from leveret.model import KEEP, enqueued

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence
    from typing import Self

    from leveret.brokers.base import OnConflict
    from leveret.brokers.sqlite.store import Store
    from leveret.model import Describe, Envelope, Queue, Settlement, Status

log = logging.getLogger("leveret.sqlite")


class SQLiteBroker:
    """See `leveret.brokers.Broker`. ``timeout``: seconds a publish may take before it raises."""

    capabilities = Capabilities(shared=True, blocking=True)

    def __init__(self, path: Path, *, timeout: float, keep: float = KEEP) -> None:
        self._path = path.absolute()
        self._timeout = timeout
        self._deadlines = Deadlines(timeout)
        self._wake_ups = WakeUps(self._path.resolve())
        self._writer = Writer(self._path, self._wake_ups, timeout=timeout, keep=keep)
        self._settling = Settling(self._writer)
        self.queues = SQLiteQueues(self._writer, self._wake_ups)
        self.statuses = SQLiteStatuses(self._writer, self._wake_ups)
        self.dead_letters = SQLiteDeadLetters(self._writer, self._wake_ups)
        self.schedules = SQLiteSchedules(self._writer, self._wake_ups)
        self.limits = SQLiteLimits(self._writer, self._wake_ups)
        self.control = SQLiteControl(self._writer, self._wake_ups)
        self.unique = SQLiteUniqueKeys(self._writer, self._wake_ups)
        self._queues: dict[str, Queue] = {}
        self._consumers: set[SQLiteConsumer] = set()

    @classmethod
    def from_url(cls, url: str, *, timeout: float, keep: float = KEEP) -> Self:
        """``sqlite:///relative.db`` or ``sqlite:////absolute/path.db``."""
        parts = urlsplit(absolute(url))
        path = os.fsdecode(unquote_to_bytes(parts.path.removeprefix("/")))
        if path == MEMORY:
            raise ConfigurationError(f"{censor(url)!r} is no file; a store in this process's own memory is memory://")
        if parts.netloc or parts.fragment or not path or path.endswith("/") or "\0" in path:
            raise ConfigurationError(
                f"{censor(url)!r} names no file: write sqlite:///tasks.db (in the working directory) or sqlite:////var/lib/tasks.db"
            )
        if parts.query:
            raise ConfigurationError(
                f"{censor(url)!r}: the SQLite broker takes no parameters. App(enqueue_timeout=..., keep_results=...) "
                "sets its times; write %3F for a ? in the file's name"
            )
        return cls(Path(path), timeout=timeout, keep=keep)

    async def declare(self, queues: Sequence[Queue]) -> None:
        try:
            # A lock is waited for as long as that and says so; the second more is for what else may be slow.
            async with asyncio.timeout(self._timeout + 1.0):
                await self._writer.do(lambda store: store.queues.declare(queues))
                self._queues.update((queue.name, queue) for queue in queues)
        except TimeoutError as error:
            raise BrokerUnavailable(f"{self._path} did not answer within {self._timeout:g} s") from error

    async def publish(
        self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        def insert(store: Store) -> tuple[Mapping[str, str] | None, bool]:
            return self._insert(store, envelopes, on_conflict), store.watches.is_watched()

        try:
            with self._deadlines.begin():
                existing, self.statuses.is_watched = await self._writer.do(insert)
        except TimeoutError as error:
            raise self._why_late(envelopes) from error
        return existing

    def publish_blocking(
        self, envelopes: Sequence[Envelope], *, notify: bool, on_conflict: OnConflict = "raise"
    ) -> Mapping[str, str] | None:
        def insert(store: Store) -> Mapping[str, str] | None:
            existing = self._insert(store, envelopes, on_conflict)
            if notify and store.watches.is_watched():
                now = time.time()
                store.records.note(
                    [enqueued(one, now) for one in envelopes if existing is None or one.id not in existing]
                )
            return existing

        try:
            return self._writer.do_here(insert)
        except TimeoutError as error:
            raise self._why_late(envelopes) from error

    def _insert(self, store: Store, envelopes: Sequence[Envelope], on_conflict: OnConflict) -> Mapping[str, str] | None:
        try:
            return store.insert(envelopes, on_conflict)
        except QueueNotFound:
            # One that was deleted after it was declared is made again, unless it is the operator's to make.
            mine = [self._queues.get(name) for name in {envelope.queue for envelope in envelopes}]
            ours = [queue for queue in mine if queue is not None and queue.create]
            if len(ours) < len(mine):
                raise
            store.queues.declare(ours)
            return store.insert(envelopes, on_conflict)

    def _why_late(self, envelopes: Sequence[Envelope]) -> EnqueueTimeout:
        ids = [envelope.id for envelope in envelopes]
        return EnqueueTimeout(
            f"{self._path} did not confirm {len(ids)} tasks within {self._timeout:g} s; they may be stored later", ids
        )

    @asynccontextmanager
    async def consume(
        self,
        queues: Sequence[Queue],
        *,
        credit: int | None,
        most: int | None = None,
        describe: Describe | None = None,
    ) -> AsyncGenerator[SQLiteConsumer]:
        del most  # what is asked for later is had then
        consumer = SQLiteConsumer(self._writer, self._wake_ups, queues, credit, describe)
        await self._start(consumer)
        self._consumers.add(consumer)
        try:
            yield consumer
        finally:
            self._consumers.discard(consumer)
            await consumer.close()

    async def _start(self, consumer: SQLiteConsumer) -> None:
        """Register it; a file that another process keeps locked is waited for, as a broker that is away."""
        for pause in backoff():
            try:
                await consumer.start()
            except BrokerUnavailable as error:
                log.warning("%s; trying again in %.1f s", error, pause)
                await asyncio.sleep(pause)
            except OSError as error:
                raise translate(error, self._path) from error
            else:
                return

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        by_lease: dict[Lease, list[Settlement]] = {}
        holders: dict[str, Lease] = {}
        lost: list[str] = []
        for settlement in settlements:
            lease, id_ = settlement[0].lease, settlement[0].envelope.id
            if isinstance(lease, Lease) and lease.held:
                by_lease.setdefault(lease, []).append(settlement)
                holders[id_] = lease
            else:
                lost.append(id_)
        # An update goes with its task's outcome; of what was lost, whoever has it tells.
        told: dict[Lease | None, list[Status]] = {}
        for update in updates:
            if update.id in holders or update.id not in lost:
                told.setdefault(holders.get(update.id), []).append(update)
        for lease, mine in by_lease.items():
            lost += await self._settling.settle(lease, mine, told.get(lease, []))
        await self.statuses.notify(told.get(None, []))
        if lost:
            raise LeaseLost(lost)

    def abandon(self) -> None:
        self._writer.abandon()

    async def close(self) -> None:
        await self.statuses.close()
        await self._settling.finish()
        await asyncio.gather(*(consumer.close() for consumer in self._consumers), return_exceptions=True)
        await self._writer.close()
