"""``App``: the registry of tasks, and where a program's producer comes from."""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import importlib
import importlib.util
import inspect
import logging
import os
import sys
import threading
import time
import weakref
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload

import msgspec

from leveret.brokers import DEFAULT_TIMEOUT, Broker, connect, resolve_url
from leveret.deadlines import Deadlines
from leveret.errors import AppNotLoaded, BrokerError, ConfigurationError, EnqueueTimeout, UnknownTask
from leveret.handle import Handle
from leveret.model import DEFAULT_QUEUE, Queue, check_task_name
from leveret.retry import RetryPolicy, RetryRules
from leveret.status import KEEP, enqueued
from leveret.task import Acknowledge, P, R, Task, TaskOptions

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Awaitable,
        Callable,
        Collection,
        Coroutine,
        Iterable,
        Iterator,
        Sequence,
    )
    from contextlib import AbstractAsyncContextManager
    from types import ModuleType
    from typing import Self

    from leveret.current import Middleware
    from leveret.model import Envelope
    from leveret.retry import Decide
    from leveret.status import Status
    from leveret.telemetry import Telemetry

T = TypeVar("T")
Exceptions: TypeAlias = type[BaseException] | tuple[type[BaseException], ...]

log = logging.getLogger("leveret.app")

#: Rounds of a loop that a closing takes to be over.
_ROUNDS = 10
#: How long closing the synchronous door's connection may take (seconds).
_CLOSE_TIMEOUT = 5.0
_Producers: TypeAlias = "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Producer]"
#: The default limit of an encoded task (bytes).
MAX_MESSAGE_SIZE = 1024 * 1024
#: The default limit of an encoded result (bytes).
MAX_RESULT_SIZE = 1024 * 1024


class App:
    """An application: its tasks, its queues and the URL of its broker.

    ``url``: the broker's; else $LEVERET_URL, else ``sqlite:///leveret.db``. ``queues``: those that want settings
    of their own; a queue that only a task names has the defaults. ``enqueue_timeout``: seconds after which an
    enqueue that is not confirmed raises. ``max_message_size``: bytes of an encoded task. ``middleware``: what is
    wrapped around each run in a worker, the first one outermost: logging, a database session. ``telemetry``: what
    traces and measures each enqueue and each run, as `leveret.opentelemetry.OpenTelemetry` does.
    ``keep_results``: how long the broker keeps what became of a task (seconds). ``max_result_size``: bytes of an
    encoded result; a larger one is not kept, and whoever asks for it is told.

    ``async with app:`` opens the connection at once and closes it at the end; a first ``enqueue`` opens it too.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        queues: Sequence[Queue] = (),
        enqueue_timeout: float = DEFAULT_TIMEOUT,
        max_message_size: int = MAX_MESSAGE_SIZE,
        middleware: Sequence[Middleware] = (),
        telemetry: Telemetry | None = None,
        keep_results: float = KEEP,
        max_result_size: int = MAX_RESULT_SIZE,
    ) -> None:
        for name, seconds in (("enqueue_timeout", enqueue_timeout), ("keep_results", keep_results)):
            if not 0 < seconds < float("inf"):
                raise ConfigurationError(f"{name} is {seconds!r}; it must be more than 0 seconds")
        self.keep_results = keep_results
        self.max_result_size = max_result_size
        self._url = url
        self.enqueue_timeout = enqueue_timeout
        self.max_message_size = max_message_size
        self.middleware = tuple(middleware)
        self.telemetry = telemetry
        self._queues = {queue.name: queue for queue in queues}
        self._tasks: dict[str, Task[..., Any]] = {}
        self._default_tasks: dict[str, str] = {}
        self._producers: _Producers = weakref.WeakKeyDictionary()
        self._given_broker: Broker | None = None
        self._door = _Door()
        self._abandoned: list[object] = []
        _after_fork(self)
        atexit.register(_close_at_exit, weakref.ref(self))

    @property
    def url(self) -> str:
        return resolve_url(self._url)

    def connect_to(self, url: str) -> None:
        """Use another broker from now on (the command line's ``--url``)."""
        self._url = url

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
    def task(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> Task[P, R]: ...
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
        backoff: float = ...,
        max_backoff: float = ...,
        retry_on: Exceptions | None = ...,
        give_up_on: Exceptions = ...,
        retry: Decide | None = ...,
        timeout: float | None = ...,
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
        backoff: float = 15.0,
        max_backoff: float = 600.0,
        retry_on: Exceptions | None = None,
        give_up_on: Exceptions = (),
        retry: Decide | None = None,
        timeout: float | None = None,
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
        wait of at most ``backoff`` seconds, doubled with each attempt up to ``max_backoff``. ``retry_on`` and
        ``give_up_on`` choose by the exception's type; ``retry`` is called with the attempt's number and the exception
        and returns the seconds to wait, or None to give up.

        ``timeout``: seconds that an attempt may run. An ``async def`` task is cancelled then and has failed with
        TimedOut. A plain ``def`` task cannot be interrupted: it may end by itself (see ``current_task().deadline``),
        and `leveret.executors.OVERTIME` seconds later its child process is replaced by a fresh one.
        """
        rules = RetryRules(
            RetryPolicy(max_attempts, backoff, max_backoff),
            None if retry_on is None else _types(retry_on),
            _types(give_up_on),
            retry,
        )

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            return self._register(
                function,
                name or function.__name__,
                TaskOptions(queue, acknowledge, rules, timeout, priority=priority, store_result=store_result),
                default=default,
            )

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
            raise UnknownTask(f"no task is registered as {wanted!r}; known: {known}")
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
        return self._producer().broker.follow(ids)

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
        self._door = _Door()

    def _register(
        self, function: Callable[..., Any], name: str, options: TaskOptions, *, default: bool
    ) -> Task[..., Any]:
        check_task_name(name)
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise ConfigurationError(
                f"task {name!r} has a 'yield': calling it would run none of its code; return instead"
            )
        if name in self._tasks:
            raise ConfigurationError(f"two tasks are called {name!r}; give one another name with @app.task(name=...)")
        if default and options.queue in self._default_tasks:
            raise ConfigurationError(
                f"queue {options.queue!r} has a default task already: {self._default_tasks[options.queue]!r}"
            )
        task: Task[..., Any] = Task(function, name, options, self)
        declared = self._queues.get(options.queue, Queue(options.queue))
        if options.priority is not None:
            declared = msgspec.structs.replace(declared, priorities=True)
        self._queues[options.queue] = declared
        self._tasks[name] = task
        if default:
            self._default_tasks[options.queue] = name
        return task

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
            # A second more than the broker's own timeout, whose errors say more: this one bounds all steps together.
            producer = _Producer(broker, self._queues, Deadlines(self.enqueue_timeout + 1.0))
            self._producers[loop] = producer
        return producer


def _types(exceptions: Exceptions) -> tuple[type[BaseException], ...]:
    return exceptions if isinstance(exceptions, tuple) else (exceptions,)


class _Decorator(Protocol):
    """The type of ``@app.task(...)``: keeps the parameters and gives the awaited result."""

    @overload
    def __call__(self, function: Callable[P, Awaitable[R]], /) -> Task[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> Task[P, R]: ...


class _Producer:
    """One loop's broker, and which queues it has declared."""

    def __init__(self, broker: Broker, queues: dict[str, Queue], deadlines: Deadlines) -> None:
        self.broker = broker
        self._deadlines = deadlines
        self.end = _closed_with_the_loop(broker)
        self._queues = queues
        self._declared: set[str] = set()
        #: What is being stored and told of, by any key.
        self._sending: dict[int, Sequence[Envelope]] = {}

    async def declare(self) -> None:
        await self._declare(self._queues)

    async def publish(self, envelopes: Sequence[Envelope], *, told: bool) -> None:
        stored = False
        self._sending[id(envelopes)] = envelopes
        try:
            with self._deadlines.begin():
                wanted = {envelope.queue for envelope in envelopes} - self._declared
                if wanted:
                    await self._declare(wanted)
                await self.broker.publish(envelopes)
                stored = True
                if told:
                    now = time.time()
                    await self.broker.tell([enqueued(envelope, now) for envelope in envelopes])
        except (BrokerError, TimeoutError) as error:
            if not stored:
                raise
            # No error: who got one would enqueue again what is stored, and it would run twice.
            log.warning(
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

    async def _declare(self, names: Iterable[str]) -> None:
        await self.broker.declare([self._queues.get(name, Queue(name)) for name in names])
        self._declared.update(names)


def _closed_with_the_loop(broker: Broker) -> AsyncGenerator[None]:
    """A generator that closes the broker when it ends: `asyncio.run` ends those that live when its program does.

    So a program that never closes its application ends without losing connections or warnings about them.
    """

    async def live() -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await broker.close()
            # The drivers' own callbacks of the closing run in the loop's next rounds.
            for _ in range(_ROUNDS):
                await asyncio.sleep(0)

    generator = live()
    with suppress(StopIteration):
        generator.__anext__().send(None)  # its first step, in which the loop gets to know it, waits for nothing
    return generator


class _Door:
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
        hint = f"it has: {', '.join(found)}" if found else "it has no leveret.App at its top level"
        raise AppNotLoaded(f"{module_name!r} has no application {attribute!r}; {hint}")
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
        raise AppNotLoaded(f"importing {name!r} failed: {error}") from error
    except (Exception, SystemExit) as error:
        raise AppNotLoaded(f"importing {name!r} failed: {type(error).__name__}: {error}") from error


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
        raise AppNotLoaded(f"importing {path} failed: {type(error).__name__}: {error}") from error
    return module
