"""``Client``: an application's way to its broker. Tasks and handles use it, and programs that extend Leveret."""

from __future__ import annotations

import asyncio
import atexit
import os
import weakref
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import msgspec

from leveret.brokers import Broker, Deadlines, absolute, connect
from leveret.client.producer import MORE, LoopProducer
from leveret.client.settings import resolve_url
from leveret.client.sync_bridge import SyncBridge
from leveret.errors import EnqueueTimeout, UnknownTask
from leveret.model import awaited

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Coroutine, Iterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from leveret.client.registration import Registry
    from leveret.model import EnqueueLayer, Envelope, Status, Store

T = TypeVar("T")

_Producers: TypeAlias = "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, LoopProducer]"


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

    def publish(self, envelopes: Sequence[Envelope], /, *, notify: bool = True) -> Coroutine[Any, Any, None]:
        """Store tasks on this loop's connection, opening it first if need be. ``notify``: let those who follow know."""
        store: Store = partial(self._publish, notify=notify)
        for layer in reversed(self._layers):
            store = layer(store)
        return store(envelopes)

    async def _publish(self, envelopes: Sequence[Envelope], *, notify: bool) -> None:
        try:
            await self._producer().publish(envelopes, notify=notify)
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
            asyncio.get_running_loop()
        except RuntimeError:
            return self._bridge.wait(coroutine)
        coroutine.close()
        raise RuntimeError("this thread runs an event loop: await the asynchronous method instead, it would be blocked")

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
                broker, self._registry.queues, Deadlines(self.settings.enqueue_timeout + MORE), self._unknown
            )
            self._producers[loop] = producer
        return producer


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
