"""``App``: the registry of tasks, and where a program's producer comes from."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import importlib
import importlib.util
import logging
import os
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload

import msgspec

from leveret.brokers import DEFAULT_TIMEOUT, Broker, Deadlines, Flights, absolute, connect
from leveret.client.handle import Handle
from leveret.client.payload import makes_coroutines
from leveret.client.registration import TaskFunction, module_run, task_function
from leveret.client.settings import number, resolve_url
from leveret.client.task import AsyncTask, P, PlainTask, R, Task
from leveret.errors import (
    AppNotLoaded,
    BrokerError,
    BrokerUnavailable,
    ConfigurationError,
    EnqueueTimeout,
    UnknownTask,
)
from leveret.model import DEFAULT_QUEUE, KEEP, Queue, TaskOptions, awaited, enqueued, shorten
from leveret.model.arguments import count, seconds
from leveret.model.durations import show
from leveret.model.suggest import did_you_mean
from leveret.observe import LimitedLog

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Coroutine,
        Iterator,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager
    from datetime import timedelta
    from types import ModuleType
    from typing import Self

    from leveret.model import Acknowledge, Decide, Envelope, Middleware, Status, ThreadMiddleware
    from leveret.model.arguments import Exceptions
    from leveret.observe import Telemetry

T = TypeVar("T")

log = logging.getLogger("leveret.app")

#: Rounds of a loop that a closing takes to be over.
_ROUNDS = 10
#: How long closing the synchronous door's connection may take (seconds).
_CLOSE_TIMEOUT = 5.0
#: How much longer than its timeout an enqueue may take (seconds).
_MORE = 1.0
_Producers: TypeAlias = "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Producer]"
#: The default limit of an encoded task (bytes).
MAX_MESSAGE_SIZE = 1024 * 1024
#: The default limit of an encoded result (bytes).
MAX_RESULT_SIZE = 1024 * 1024


class App:
    """An application: its tasks, its queues and the URL of its broker.

    ``url``: the broker's; else $LEVERET_URL, else ``sqlite:///leveret.db``. A relative path of an SQLite file is one in
    the directory where the application is made, wherever the program goes later. ``queues``: those that want settings
    of their own; a queue that only a task names has the defaults. ``enqueue_timeout``: seconds (or a timedelta) after
    which an enqueue that is not confirmed raises. ``max_message_size``: bytes of an encoded task.

    ``middleware``: what is wrapped around each run in a worker, the first one outermost: logging, an asynchronous
    session. Each is ``async def (current, inner)``, awaits ``inner()`` once and returns what that returns. They run on
    the event loop, also around a plain ``def`` task, which itself runs in a thread. ``thread_middleware``: what is
    wrapped around the plain ``def`` tasks alone, in the thread of each: a database session or connection of a thread,
    locale, logging context. Each is ``def (current, inner)``, calls ``inner()`` once and returns what that returns.

    ``telemetry``: what traces and measures each enqueue and each run, as
    `leveret.observe.opentelemetry.OpenTelemetry` does.
    ``keep_results``: how long the broker keeps what became of a task (seconds, or a timedelta). ``max_result_size``:
    bytes of an encoded result; a larger one is not kept, and whoever asks for it is told.

    ``async with app:`` opens the connection at once and closes it at the end; a first ``enqueue`` opens it too.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queues: Sequence[Queue] = (),
        enqueue_timeout: float | timedelta | None = None,
        max_message_size: int | None = None,
        middleware: Sequence[Middleware] = (),
        thread_middleware: Sequence[ThreadMiddleware] = (),
        telemetry: Telemetry | None = None,
        keep_results: float | timedelta | None = None,
        max_result_size: int | None = None,
    ) -> None:
        #: Where a relative path in $LEVERET_URL, or in the default, is from now on.
        self._folder = folder = _working_directory()
        enqueue_timeout = number("enqueue_timeout", enqueue_timeout, DEFAULT_TIMEOUT, folder)
        keep_results = number("keep_results", keep_results, KEEP, folder)
        max_message_size = number("max_message_size", max_message_size, MAX_MESSAGE_SIZE, folder)
        max_result_size = number("max_result_size", max_result_size, MAX_RESULT_SIZE, folder)
        self.keep_results = seconds("keep_results", keep_results, above_zero=True)
        self.max_result_size = count("max_result_size", max_result_size, least=0)
        if url is not None and not isinstance(url, str):
            raise ConfigurationError(f"url is {url!r}; it must be text, as 'sqlite:////whole/path.db'")
        self._url = None if url is None else absolute(url, folder)
        self.enqueue_timeout = seconds("enqueue_timeout", enqueue_timeout, above_zero=True)
        self.max_message_size = count("max_message_size", max_message_size)
        self.middleware = _layers("middleware", middleware)
        self.thread_middleware = _layers("thread_middleware", thread_middleware)
        for layer in self.thread_middleware:
            if makes_coroutines(layer):
                raise ConfigurationError(
                    f"thread_middleware has {show(layer)}, which is asynchronous: a task's thread has no event loop. "
                    "Give it to middleware=[...], or write it as a plain 'def'"
                )
        self.telemetry = telemetry
        self._queues = {queue.name: queue for queue in _checked_queues(queues)}
        self._own_queues = frozenset(self._queues)
        self._tasks: dict[str, Task[..., Any]] = {}
        #: The run of a module, or of a notebook's cell, that registered each of them.
        self._runs: dict[str, object] = {}
        self._default_tasks: dict[str, str] = {}
        self._producers: _Producers = weakref.WeakKeyDictionary()
        self._given_broker: Broker | None = None
        self._door = SyncBridge()
        #: Queues that were enqueued to and are not its own: each is told of once.
        self._unknown: set[str] = set()
        self._abandoned: list[object] = []
        _after_fork(self)
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def url(self) -> str:
        """The broker's. An SQLite file's path is whole: a relative one was meant when the application was made."""
        return resolve_url(self._url, self._folder)

    def connect_to(self, url: str) -> None:
        """Use another broker from now on (the command line's ``--url``)."""
        self._url = absolute(url)

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

    @property
    def queues(self) -> Sequence[Queue]:
        return tuple(self._queues.values())

    @property
    def tasks(self) -> Sequence[Task[..., Any]]:
        return tuple(self._tasks.values())

    @property
    def default_tasks(self) -> dict[str, str]:
        """The task of each queue that takes the messages without a task's name."""
        return dict(self._default_tasks)

    @overload
    def task(  # type: ignore[overload-overlap]  # a plain function's R may be a coroutine; these come first
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def task(self, function: Callable[P, R], /) -> PlainTask[P, R]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        name: str | None = None,
        queue: str = ...,
        acknowledge: Acknowledge = ...,
        default: bool = ...,
        max_attempts: int | None = ...,
        backoff: float | timedelta = ...,
        max_backoff: float | timedelta = ...,
        retry_on: Exceptions | None = ...,
        give_up_on: Exceptions = ...,
        retry: Decide | None = ...,
        timeout: float | timedelta | None = ...,
        priority: int | None = ...,
        store_result: bool = ...,
    ) -> _Decorator: ...

    def task(
        self,
        function: Any = None,
        /,
        *,
        name: str | None = None,
        queue: str = DEFAULT_QUEUE,
        acknowledge: Acknowledge = "after",
        default: bool = False,
        max_attempts: int | None = 5,
        backoff: float | timedelta = 15.0,
        max_backoff: float | timedelta = 600.0,
        retry_on: Exceptions | None = None,
        give_up_on: Exceptions = (),
        retry: Decide | None = None,
        timeout: float | timedelta | None = None,
        priority: int | None = None,
        store_result: bool = True,
    ) -> Any:
        """Register a function as a task.

        ``name``: what it is called on the wire (the function's name). ``queue``: where it is enqueued.
        ``acknowledge="before"``: at most once, for tasks that must not run twice and may be lost.
        ``default=True``: it takes the queue's messages that name no task, as foreign producers send them.
        ``priority``: 0 to 9, the higher first, unless ``options(priority=...)`` says another; see there. A worker of
        its queue says at its start if the broker does not keep priorities, as with ``Queue(priorities=True)``.

        A failed attempt is tried again until there were ``max_attempts`` (None: for ever), each time after a chance
        wait of at most ``backoff`` (seconds, or a timedelta), doubled with each attempt up to ``max_backoff``.
        ``retry_on`` and ``give_up_on`` choose by the exception's type: one class, or some in a tuple, list or set.
        ``retry`` is called with the attempt's number and the exception and returns how long to wait (seconds, or a
        timedelta), or None to give up.

        ``timeout``: how long an attempt may run (seconds, or a timedelta). An ``async def`` task is cancelled then and
        has failed with TimedOut. A plain ``def`` task cannot be interrupted: it may end by itself (see
        ``current_task().deadline``), and `leveret.executors.OVERTIME` seconds later its child process is replaced by a
        fresh one. A plain function that returns a coroutine, as many decorators do, is called in a thread, and what it
        returns is awaited on the event loop as an ``async def`` task is.

        The same function again, because its module was reloaded or its notebook cell was run again, replaces the first.
        Raises ConfigurationError for another function of the same name, for what is no function, and for options that
        cannot be.
        """
        options = TaskOptions(
            queue,
            acknowledge,
            max_attempts,
            backoff,  # type: ignore[arg-type]  # which it reads, as it does the others
            max_backoff,  # type: ignore[arg-type]
            timeout,  # type: ignore[arg-type]
            priority,
            store_result,
            retry_on,  # type: ignore[arg-type]
            give_up_on,  # type: ignore[arg-type]
            retry,
        )
        run = module_run()

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            found = task_function(function, name)
            return self._register(found, options, run, default=default)

        return register if function is None else register(function)

    def find(self, name: str | None, queue: str) -> Task[..., Any]:
        """The task for a message. Raises UnknownTask with what is known."""
        wanted = name if name is not None else self._default_tasks.get(queue)
        if wanted is None:
            raise UnknownTask(
                f"the message names no task (AMQP property 'type') and queue {queue!r} has no default task; "
                "register one with @app.task(queue=..., default=True)"
            )
        task = self._tasks.get(wanted)
        if task is None:
            known = ", ".join(sorted(self._tasks)) or "none"
            hint = did_you_mean(wanted, self._tasks)
            raise UnknownTask(f"no task is registered as {wanted!r}{hint}{'' if hint else ';'} known: {known}")
        return task

    def publish(self, envelopes: Sequence[Envelope], /, *, told: bool = True) -> Coroutine[Any, Any, None]:
        """Store tasks on this loop's connection, opening it first if need be. ``told``: let those who follow know."""
        if self.telemetry is None:
            return self._publish(envelopes, told=told)
        return self._publish_within(self.telemetry, envelopes, told=told)

    async def _publish_within(self, telemetry: Telemetry, envelopes: Sequence[Envelope], *, told: bool) -> None:
        with telemetry.sending(envelopes, self.url) as marked:
            await self._publish(marked, told=told)

    async def _publish(self, envelopes: Sequence[Envelope], *, told: bool) -> None:
        try:
            await self._producer().publish(envelopes, told=told)
        except TimeoutError as error:
            if isinstance(error, EnqueueTimeout):
                raise
            ids = [envelope.id for envelope in envelopes]
            raise EnqueueTimeout(
                f"{len(ids)} tasks were not confirmed within {self.enqueue_timeout:g} s", ids
            ) from error

    def handle(self, id_: str, /) -> Handle[Any]:
        """The handle of a task that any program enqueued, by its id. See `Task.handle` for a typed one."""
        return Handle(id_, self)

    async def statuses(self, ids: Sequence[str], /) -> Sequence[Status]:
        """What is known of tasks now, by their ids; nothing of those that are not known. Raises BrokerError."""
        return await self._producer().broker.statuses(ids)

    def follow(self, ids: Sequence[str], /) -> AbstractAsyncContextManager[AsyncIterator[Sequence[Status]]]:
        """News of tasks, by their ids: what is known now, then each change. Raises BrokerError."""
        return awaited(self._producer().broker.follow(ids), ids)

    def on_their_way(self, ids: Collection[str], /) -> frozenset[str]:
        """Those of these tasks that this program is storing now."""
        producers = list(self._producers.values())
        return frozenset(id_ for one in producers for id_ in one.on_their_way() if id_ in ids)

    async def cancel(self, id_: str, /) -> Status | None:
        """See `leveret.brokers.Broker.cancel`; `Handle.cancel` waits for what comes of it."""
        return await self._producer().broker.cancel(id_)

    def restore(self, task: str | None, queue: str, result: msgspec.Raw, /) -> Any:
        """An encoded result as its task returned it; plain JSON when the task is not registered here."""
        try:
            return self.find(task, queue).returns.decode(result)
        except UnknownTask:
            return msgspec.json.decode(result)

    def wait(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """The synchronous door: run a coroutine of this application (``enqueue_many``, ...) and return its result.

        For code without an event loop, from any thread, before and after ``os.fork``. Inside a running loop it
        raises RuntimeError, since it would block that loop.
        """
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return self._door.wait(coroutine)
        coroutine.close()
        raise RuntimeError("this thread runs an event loop: await the asynchronous method instead, it would be blocked")

    async def __aenter__(self) -> Self:
        await self._producer().declare()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close this loop's connection. A later enqueue opens it again."""
        producer = self._producers.pop(asyncio.get_running_loop(), None)
        if producer is not None:
            await producer.end.aclose()

    def close_sync(self) -> None:
        """Close the synchronous door's connection and its thread."""
        self._door.close(self.close)

    def _abandon_connections(self) -> None:
        """Leave the parent process's connections alone: kept, so that they are never closed from here."""
        self._abandoned.append((self._door, list(self._producers.items())))
        self._producers = weakref.WeakKeyDictionary()
        self._door = SyncBridge()

    def _register(self, function: TaskFunction, options: TaskOptions, run: object, *, default: bool) -> Task[..., Any]:
        name = function.name
        before = self._tasks.get(name)
        if before is not None and not function.replaces(before.function, self._runs.get(name), run):
            raise ConfigurationError(f"two tasks are called {name!r}; give one another name with @app.task(name=...)")
        holder = self._default_tasks.get(options.queue)
        if default and holder not in (None, name):
            raise ConfigurationError(f"queue {options.queue!r} has a default task already: {holder!r}")
        task: Task[..., Any] = Task(function.function, name, options, self)
        declared = self._queues.get(options.queue, Queue(options.queue))
        if options.priority is not None:
            declared = msgspec.structs.replace(declared, priorities=True)
        if before is not None:
            self._forget(before)
        self._queues[options.queue] = declared
        self._tasks[name] = task
        self._runs[name] = run
        if default:
            self._default_tasks[options.queue] = name
        return task

    def _forget(self, task: Task[..., Any]) -> None:
        """A task that another one replaces."""
        del self._tasks[task.name]
        for queue in [queue for queue, name in self._default_tasks.items() if name == task.name]:
            del self._default_tasks[queue]
        if task.queue not in self._own_queues and all(other.queue != task.queue for other in self._tasks.values()):
            self._queues.pop(task.queue, None)

    def _producer(self) -> _Producer:
        loop = asyncio.get_running_loop()
        producer = self._producers.get(loop)
        if producer is None:
            for other in [reference() for reference in self._producers.keyrefs()]:
                # Another thread may take out the same one, or put in its own.
                ended = self._producers.pop(other, None) if other is not None and other.is_closed() else None
                if ended is not None:
                    ended.broker.abandon()
            broker = self._given_broker or connect(self.url, timeout=self.enqueue_timeout, keep=self.keep_results)
            # The broker's own timeout comes first, since its errors say more: this one bounds all steps together.
            producer = _Producer(broker, self._queues, Deadlines(self.enqueue_timeout + _MORE), self._unknown)
            self._producers[loop] = producer
        return producer


def _checked_queues(queues: Sequence[Queue]) -> Sequence[Queue]:
    given: object = queues
    every = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    wrong = [queue for queue in every if not isinstance(queue, Queue)]
    if wrong or isinstance(given, Queue):
        raise ConfigurationError(
            f"queues has {show((wrong or [given])[0])}; it must be a list of leveret.Queue, as queues=[Queue('mail')]"
        )
    return [queue for queue in every if isinstance(queue, Queue)]


def _layers(argument: str, layers: Sequence[Callable[..., Any]]) -> tuple[Any, ...]:
    wrong = [layer for layer in (layers if isinstance(layers, (list, tuple)) else [layers]) if not callable(layer)]
    if wrong or callable(layers):
        raise ConfigurationError(
            f"{argument} is {show(layers)}; it must be a list of functions, as {argument}=[with_session]"
        )
    return tuple(layers)


def _working_directory() -> Path | None:
    try:
        return Path.cwd()
    except OSError:  # it was deleted, which is no matter to whoever needs none
        return None


class _Decorator(Protocol):
    """The type of ``@app.task(...)``: keeps the parameters and gives the awaited result."""

    @overload
    def __call__(  # type: ignore[overload-overlap]  # a plain function's R may be a coroutine; these come first
        self, function: Callable[P, Coroutine[Any, Any, R]], /
    ) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...  # type: ignore[overload-overlap]
    @overload
    def __call__(self, function: Callable[P, R], /) -> PlainTask[P, R]: ...


class _Producer:
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

    async def publish(self, envelopes: Sequence[Envelope], *, told: bool) -> None:
        stored, wanted = False, frozenset[str]()
        self._sending[id(envelopes)] = envelopes
        try:
            with self._deadlines.begin():
                wanted = frozenset(envelope.queue for envelope in envelopes) - self._declared
                if wanted:
                    await self._declare(wanted)
                await self.broker.publish(envelopes)
                stored = True
                if told:
                    now = time.time()
                    await self.broker.tell([enqueued(envelope, now) for envelope in envelopes])
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


class SyncBridge:
    """A thread with a loop of its own, started at its first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: tuple[asyncio.AbstractEventLoop, threading.Thread] | None = None
        #: What other threads wait for now.
        self._waited_for: set[concurrent.futures.Future[Any]] = set()

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._lock:
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop())
            self._waited_for.add(future)
        future.add_done_callback(self._waited_for.discard)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self, closer: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with self._lock:
            opened, self._open = self._open, None
            waited_for = set(self._waited_for)
        if opened is None:
            return
        loop, thread = opened
        for late in concurrent.futures.wait(waited_for, timeout=_CLOSE_TIMEOUT).not_done:
            late.cancel()
        asyncio.run_coroutine_threadsafe(closer(), loop).result(_CLOSE_TIMEOUT)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

    def _loop(self) -> asyncio.AbstractEventLoop:
        if self._open is None:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, name="leveret-door", daemon=True)
            thread.start()
            self._open = loop, thread
        return self._open[0]


def _after_fork(app: App) -> None:
    """In a forked child, have the application begin anew."""
    reference = weakref.ref(app)

    def renew() -> None:
        app = reference()
        if app is not None:
            app._abandon_connections()  # noqa: SLF001 - one class in two parts

    os.register_at_fork(after_in_child=renew)


def _close_at_exit(reference: weakref.ref[App]) -> None:
    app = reference()
    if app is not None:
        with suppress(Exception):
            app.close_sync()


def load_app(reference: str) -> App:
    """Import the application of a ``MODULE:APP`` or ``FILE.py:APP``. Raises AppNotLoaded with the reason."""
    module_name, separator, attribute = reference.rpartition(":")
    if not separator or not module_name or not attribute:
        raise AppNotLoaded(f"{reference!r} is not of the form MODULE:APP (as in tasks:app) or FILE.py:APP")
    module = _load_file(module_name) if module_name.endswith(".py") else _load_module(module_name)
    app = getattr(module, attribute, None)
    if not isinstance(app, App):
        found = [name for name, value in vars(module).items() if isinstance(value, App)]
        hint = did_you_mean(attribute, found) or (
            f"; it has: {', '.join(found)}" if found else "; it has no leveret.App at its top level"
        )
        raise AppNotLoaded(f"{module_name!r} has no application {attribute!r}{hint}")
    _check_imported_once(module, attribute, app)
    return app


def _check_imported_once(module: ModuleType, attribute: str, app: App) -> None:
    """Raises AppNotLoaded when tasks were registered with the application of the same file under another name."""
    file = getattr(module, "__file__", None)
    for name, other in list(sys.modules.items()):
        if other is module or file is None or not _is_of_file(other, file):
            continue
        twin = getattr(other, attribute, None)
        if not isinstance(twin, App) or twin is app:
            continue
        missing = sorted({task.name for task in twin.tasks} - {task.name for task in app.tasks})
        if missing:
            raise AppNotLoaded(
                f"{file} was imported twice, as {module.__name__!r} and as {name!r}, which makes two applications; "
                f"the second has the tasks that the first lacks ({', '.join(missing)}): use {name}:{attribute}, from "
                "the folder that its imports begin in"
            )


def _is_of_file(module: object, file: str) -> bool:
    found = getattr(module, "__file__", None)
    return isinstance(found, str) and Path(found).resolve() == Path(file).resolve()


def _load_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            raise AppNotLoaded(
                f"there is no module {error.name!r} in {Path.cwd()} or in the installed packages"
            ) from error
        raise _not_loaded(repr(name), error) from error
    except (Exception, SystemExit) as error:
        raise _not_loaded(repr(name), error) from error


def _load_file(name: str) -> ModuleType:
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise AppNotLoaded(f"there is no file {path}")
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(path.stem, None)
        raise _not_loaded(str(path), error) from error
    return module


def _not_loaded(name: str, error: BaseException) -> AppNotLoaded:
    """With the line that raised, and the traceback of what is not Python's or Leveret's way there."""
    at = error.__traceback__
    while at is not None and _is_on_the_way(at.tb_frame.f_code.co_filename):
        at = at.tb_next
    frames = traceback.extract_tb(at)
    if isinstance(error, SyntaxError) and error.filename:
        place = f" ({error.filename}, line {error.lineno})"
        message = f"{type(error).__name__}: {error.msg}"
    else:
        ours = [frame for frame in frames if not _is_on_the_way(frame.filename)]
        place = f" ({ours[-1].filename}, line {ours[-1].lineno})" if ours else ""
        message = f"{type(error).__name__}: {error}"
    whole = "".join(traceback.format_exception(type(error), error, at))
    return AppNotLoaded(f"importing {name} failed: {message}{place}", shorten(whole))


def _is_on_the_way(filename: str) -> bool:
    return filename.startswith("<frozen importlib") or filename in (__file__, importlib.__file__)
