"""``Client``: an application's way to its broker, with a producer on each event loop. Tasks and handles use it."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import time
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec

from leveret.brokers import Broker, Deadlines, Flights, absolute, connect, file_of
from leveret.client.settings import resolve_url
from leveret.client.sync_bridge import SyncBridge
from leveret.errors import BrokerError, BrokerUnavailable, EnqueueTimeout, UnknownTask
from leveret.model import Queue, awaited, enqueued
from leveret.model.suggest import did_you_mean
from leveret.observe import LimitedLog
from leveret.outbox import SameFile, StoredTask, insert, insert_sync

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Collection, Coroutine, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.brokers import OnConflict
    from leveret.client.registration import Registry
    from leveret.model import EnqueueLayer, Envelope, Status, Store

T = TypeVar("T")

log = logging.getLogger("leveret.app")

#: Rounds of a loop that a closing takes to be over.
_ROUNDS = 10
#: How much longer than its timeout an enqueue may take (seconds).
_MORE = 1.0
_Producers: TypeAlias = "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopProducer]"


class Conflicts:
    """What becomes of the tasks of one enqueue whose unique keys are taken. What is around it returns nothing."""

    def __init__(self, policy: OnConflict) -> None:
        self.policy = policy
        #: The ids of those that were not stored, each with the id of the one that is there.
        self.existing: Mapping[str, str] = {}


class ClientSettings(msgspec.Struct, frozen=True):
    """What an application says of its way to the broker."""

    #: The broker's; None: from the environment, see `resolve_url`.
    url: str | None
    #: Where a relative path in $LEVERET_URL, or in the default, is; None: there was no working directory.
    folder: Path | None
    #: Seconds after which an enqueue that is not confirmed raises.
    enqueue_timeout: float
    #: The most bytes of an encoded task.
    max_message_size: int
    #: How long the broker keeps what became of a task (seconds).
    keep_results: float


class Client:
    """An application's connections, one for each event loop, opened when they are used first."""

    def __init__(self, registry: Registry, settings: ClientSettings, layers: Sequence[EnqueueLayer] = ()) -> None:
        self._registry = registry
        self.settings = settings
        #: What is around each enqueue, the outermost first.
        self._layers = layers
        self._producers: _Producers = weakref.WeakKeyDictionary()
        self._given_broker: Broker | None = None
        self._bridge = SyncBridge()
        #: Queues that were enqueued to and are not the application's own: each is told of once.
        self._unknown: set[str] = set()
        self._abandoned: list[object] = []
        _after_fork(self)
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def url(self) -> str:
        return resolve_url(self.settings.url, self.settings.folder)

    def queue(self, name: str, /) -> Queue | None:
        """A queue as the application wants it; None: it says nothing of it."""
        return self._registry.queues.get(name)

    @property
    def max_message_size(self) -> int:
        return self.settings.max_message_size

    @property
    def keep_results(self) -> float:
        return self.settings.keep_results

    def connect_to(self, url: str) -> None:
        """Use another broker from now on (the command line's ``--url``)."""
        self.settings = msgspec.structs.replace(self.settings, url=absolute(url))

    @contextmanager
    def enqueuing_to(self, broker: Broker) -> Iterator[None]:
        """Inside the block, enqueue to this broker from every loop and thread, whatever the URL. For tests."""
        before = self._given_broker, self._producers
        self._given_broker, self._producers = broker, weakref.WeakKeyDictionary()
        try:
            yield
        finally:
            self._given_broker, self._producers = before

    @property
    def broker(self) -> Broker:
        """This loop's broker, for views that ask more than a producer does; opened when it is used first."""
        return self._producer().broker

    async def require(self, queues: Collection[str], /) -> None:
        """Declare those of the queues that this loop's broker has not declared yet. Raises BrokerError."""
        await self._producer().require(queues)

    def publish(
        self, envelopes: Sequence[Envelope], /, *, notify: bool = True, conflicts: Conflicts | None = None
    ) -> Coroutine[Any, Any, None]:
        """Store tasks on this loop's connection, opening it first if need be. ``notify``: let those who follow know.

        ``conflicts``: of tasks with unique keys.
        """
        return self._within_layers(partial(self._publish, notify=notify, conflicts=conflicts))(envelopes)

    def _within_layers(self, store: Store) -> Store:
        for layer in reversed(self._layers):
            store = layer(store)
        return store

    def publish_sync(
        self, envelopes: Sequence[Envelope], /, *, notify: bool, conflicts: Conflicts | None = None
    ) -> None:
        """`publish` for code without an event loop, as `wait` is.

        In the calling thread where the broker can: each hand-over to another one takes longer than a write to a file.
        """
        loop = self._bridge.loop
        producer = None if loop is None else self._producers.get(loop)
        if loop is None or producer is None or self._layers or not producer.has_declared(envelopes):
            self.wait(self.publish(envelopes, notify=notify, conflicts=conflicts))
            return
        _refuse_in_a_loop()
        try:
            producer.publish_blocking(envelopes, notify=notify, conflicts=conflicts)
        except BrokerUnavailable:
            if self._producers.get(loop) is producer:
                raise
            # Another thread has closed it meanwhile.
            self.wait(self.publish(envelopes, notify=notify, conflicts=conflicts))

    async def publish_stored(self, envelopes: Sequence[Envelope], /, *, notify: bool, on_conflict: OnConflict) -> None:
        """`publish` for tasks that have been through what is around an enqueue: the relay's."""
        await self._publish(envelopes, notify=notify, conflicts=Conflicts(on_conflict))

    async def store_within(self, connection: object, task: StoredTask, /) -> None:
        """Store a task in the transaction of a user's connection, with what is around each enqueue."""

        async def store(envelopes: Sequence[Envelope]) -> None:
            tasks = [msgspec.structs.replace(task, envelope=one) for one in envelopes]
            await insert(connection, tasks, self._same_file())

        await self._within_layers(store)([task.envelope])

    def store_within_sync(self, connection: object, task: StoredTask, /) -> None:
        """`store_within` in the calling thread, whose connection no other thread may use."""
        stored = [task.envelope]
        if self._layers:

            async def store(envelopes: Sequence[Envelope]) -> None:
                stored[:] = envelopes

            self.wait(self._within_layers(store)([task.envelope]))
        tasks = [msgspec.structs.replace(task, envelope=one) for one in stored]
        insert_sync(connection, tasks, self._same_file())

    def _same_file(self) -> SameFile:
        return SameFile(file_of(self.url), self._registry.queues, self.keep_results)

    async def _publish(self, envelopes: Sequence[Envelope], *, notify: bool, conflicts: Conflicts | None) -> None:
        try:
            await self._producer().publish(envelopes, notify=notify, conflicts=conflicts)
        except TimeoutError as error:
            if isinstance(error, EnqueueTimeout):
                raise
            ids = [envelope.id for envelope in envelopes]
            raise EnqueueTimeout(
                f"{len(ids)} tasks were not confirmed within {self.settings.enqueue_timeout:g} s", ids
            ) from error

    async def statuses(self, ids: Sequence[str], /) -> Sequence[Status]:
        """What is known of tasks now, by their ids; nothing of those that are not known. Raises BrokerError."""
        return await self._producer().broker.statuses.read(ids)

    def follow(self, ids: Sequence[str], /) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
        """News of tasks, by their ids: what is known now, then each change. Raises BrokerError."""
        return awaited(self._producer().broker.statuses.follow(ids), ids)

    def on_their_way(self, ids: Collection[str], /) -> frozenset[str]:
        """Those of these tasks that this program is storing now."""
        producers = list(self._producers.values())
        return frozenset(id_ for one in producers for id_ in one.on_their_way() if id_ in ids)

    async def cancel(self, id_: str, /) -> Status | None:
        """See `leveret.brokers.Control.cancel`; `Handle.cancel` waits for what comes of it."""
        return await self._producer().broker.control.cancel(id_)

    def restore(self, task: str | None, queue: str, result: msgspec.Raw, /) -> Any:
        """An encoded result as its task returned it; plain JSON when the task is not registered here."""
        try:
            return self._registry.find(task, queue).returns.decode(result)
        except UnknownTask:
            return msgspec.json.decode(result)

    def wait(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine of this application (``enqueue_many``, ...) and return its result.

        For code without an event loop, from any thread, before and after ``os.fork``. Inside a running loop it
        raises RuntimeError, since it would block that loop.
        """
        try:
            _refuse_in_a_loop()
        except RuntimeError:
            coroutine.close()
            raise
        return self._bridge.wait(coroutine)

    async def open(self) -> None:
        """Open this loop's connection, and declare the application's queues. Raises BrokerError."""
        await self._producer().declare()

    async def close(self) -> None:
        """Close this loop's connection. A later enqueue opens it again."""
        producer = self._producers.pop(asyncio.get_running_loop(), None)
        if producer is not None:
            await producer.end.aclose()

    def close_sync(self) -> None:
        """Close the synchronous door's connection and its thread."""
        self._bridge.close(self.close)

    def abandon_connections(self) -> None:
        """Leave the parent process's connections alone: kept, so that they are never closed from here."""
        self._abandoned.append((self._bridge, list(self._producers.items())))
        self._producers = weakref.WeakKeyDictionary()
        self._bridge = SyncBridge()

    def _producer(self) -> LoopProducer:
        loop = asyncio.get_running_loop()
        producer = self._producers.get(loop)
        if producer is None:
            for other in [reference() for reference in self._producers.keyrefs()]:
                # Another thread may take out the same one, or put in its own.
                ended = self._producers.pop(other, None) if other is not None and other.is_closed() else None
                if ended is not None:
                    ended.broker.abandon()
            broker = self._given_broker or connect(
                self.url, timeout=self.settings.enqueue_timeout, keep=self.keep_results
            )
            # The broker's own timeout comes first, since its errors say more: this one bounds all steps together.
            producer = LoopProducer(
                broker, self._registry.queues, Deadlines(self.settings.enqueue_timeout + _MORE), self._unknown
            )
            self._producers[loop] = producer
        return producer


class LoopProducer:
    """One loop's broker, and which queues it has declared."""

    def __init__(self, broker: Broker, queues: dict[str, Queue], deadlines: Deadlines, unknown: set[str]) -> None:
        self.broker = broker
        self._deadlines = deadlines
        self._warnings = LimitedLog(log)
        self.end = _closed_with_the_loop(broker, self._warnings)
        self._queues = queues
        self._declared: set[str] = set()
        self._declaring: Flights[str] = Flights()
        #: Why that was not possible when it was tried last.
        self._trouble: BrokerUnavailable | None = None
        self._unknown = unknown
        #: What is being stored and told of, by any key.
        self._sending: dict[int, Sequence[Envelope]] = {}

    async def declare(self) -> None:
        await self._declare(self._queues)

    async def require(self, queues: Collection[str]) -> None:
        """Declare those of the queues that it has not declared yet. Raises BrokerError."""
        with self._deadlines.begin():
            wanted = frozenset(queues) - self._declared
            if wanted:
                await self._declare(wanted)

    async def publish(self, envelopes: Sequence[Envelope], *, notify: bool, conflicts: Conflicts | None = None) -> None:
        stored, wanted = False, frozenset[str]()
        key = id(envelopes)
        self._sending[key] = envelopes
        try:
            with self._deadlines.begin():
                wanted = frozenset([envelope.queue for envelope in envelopes]) - self._declared
                if wanted:
                    await self._declare(wanted)
                if conflicts is None:
                    await self.broker.publish(envelopes)
                else:
                    conflicts.existing = await self.broker.publish(envelopes, on_conflict=conflicts.policy) or {}
                    envelopes = [one for one in envelopes if one.id not in conflicts.existing]
                stored = True
                if notify:
                    now = time.time()
                    await self.broker.statuses.notify([enqueued(envelope, now) for envelope in envelopes])
        except (BrokerError, TimeoutError) as error:
            if not stored and isinstance(error, TimeoutError) and wanted - self._declared:
                names = ", ".join(map(repr, sorted(wanted)))
                within = f"{self._deadlines.seconds - _MORE:g} s"
                why = f"; the try before said: {self._trouble}" if self._trouble else ""
                raise BrokerUnavailable(
                    f"queue {names} could not be declared within {within}; nothing was stored{why}"
                ) from error
            if not stored:
                raise
            # No error: who got one would enqueue again what is stored, and it would run twice.
            self._warnings.warning(
                "%d tasks are stored, and those who watch are not told: %s",
                len(envelopes),
                str(error) or "it took too long",
            )
        finally:
            del self._sending[key]

    def has_declared(self, envelopes: Sequence[Envelope]) -> bool:
        """Whether `publish_blocking` may be called for these."""
        return self.broker.capabilities.blocking and all(one.queue in self._declared for one in envelopes)

    def publish_blocking(
        self, envelopes: Sequence[Envelope], *, notify: bool, conflicts: Conflicts | None = None
    ) -> None:
        """Store them from another thread than the loop's."""
        self._sending[id(envelopes)] = envelopes
        try:
            if conflicts is None:
                self.broker.publish_blocking(envelopes, notify=notify)
            else:
                existing = self.broker.publish_blocking(envelopes, notify=notify, on_conflict=conflicts.policy)
                conflicts.existing = existing or {}
        finally:
            del self._sending[id(envelopes)]

    def on_their_way(self) -> Iterator[str]:
        """The ids of what is being stored now."""
        for envelopes in list(self._sending.values()):
            for envelope in envelopes:
                yield envelope.id

    async def _declare(self, names: Collection[str]) -> None:
        """Once, for however many want to enqueue there now."""
        await self._declaring.join(names, self._declare_now)

    async def _declare_now(self, names: Sequence[str]) -> None:
        try:
            await self.broker.declare([self._queues.get(name, Queue(name)) for name in names])
        except BrokerUnavailable as error:
            self._trouble = error
            raise
        self._trouble = None
        self._declared.update(names)
        for name in names:
            if name not in self._queues and name not in self._unknown:
                self._unknown.add(name)
                log.warning(
                    "queue %r is none of the application's, so its workers take nothing from it unless started with "
                    "-q; if that is meant, name it: App(queues=[Queue(%r)])%s",
                    name,
                    name,
                    did_you_mean(name, self._queues),
                )


def _refuse_in_a_loop() -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError("this thread runs an event loop: await the asynchronous method instead, it would be blocked")


def _closed_with_the_loop(broker: Broker, warnings: LimitedLog) -> AsyncGenerator[None]:
    """A generator that closes the broker when it ends: `asyncio.run` ends those that live when its program does.

    So a program that never closes its application ends without losing connections or warnings about them.
    """

    async def live() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await broker.close()
            warnings.flush()
            # The drivers' own callbacks of the closing run in the loop's next rounds.
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)

    generator = live()
    with suppress(StopIteration):
        generator.__anext__().send(None)  # its first step, in which the loop gets to know it, waits for nothing
    return generator


def _after_fork(client: Client) -> None:
    """In a forked child, have the client begin anew."""
    reference = weakref.ref(client)

    def renew() -> None:
        client = reference()
        if client is not None:
            client.abandon_connections()

    os.register_at_fork(after_in_child=renew)


def _close_at_exit(reference: weakref.ref[Client]) -> None:
    client = reference()
    if client is not None:
        with suppress(Exception):
            client.close_sync()
