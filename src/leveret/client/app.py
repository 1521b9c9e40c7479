"""``App``: an application's tasks, queues and settings."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar, overload

import msgspec

from leveret.brokers import DEFAULT_TIMEOUT, absolute
from leveret.client.client import Client, ClientSettings
from leveret.client.handle import Handle
from leveret.client.limits import limit_of, limits_of, module_name
from leveret.client.middleware import functions, storing_within, thread_functions
from leveret.client.payload import Returns, makes_coroutines
from leveret.client.registration import Registry, TaskFunction, module_run, task_function
from leveret.client.schedules import Schedules
from leveret.client.settings import number
from leveret.client.unique import UniqueKeys, unique_of
from leveret.errors import ConfigurationError
from leveret.model import DEFAULT_QUEUE, KEEP, Queue, TaskOptions
from leveret.model.arguments import count, exceptions, seconds, seconds_or_none
from leveret.model.durations import show
from leveret.observe import attempting_within, sending_within
from leveret.outbox import Results, within_inbox

if TYPE_CHECKING:
    from collections.abc import Awaitable, Coroutine, Sequence
    from datetime import timedelta
    from typing import Self

    from leveret.client.limits import Limit, LimitsGiven
    from leveret.client.registration import Scheduling
    from leveret.client.task import AsyncTask, P, PlainTask, R, Task
    from leveret.client.unique import UniqueBy
    from leveret.model import (
        Acknowledge,
        AttemptLayer,
        Decide,
        EnqueueLayer,
        EnqueueMiddleware,
        Middleware,
        Rate,
        ThreadMiddleware,
    )
    from leveret.model.arguments import Exceptions
    from leveret.observe import Telemetry

T = TypeVar("T")
#: Called with the application in each process that runs its tasks; what it yields is their ``current_task().state``.
LifespanFunction: TypeAlias = Callable[["App"], AbstractAsyncContextManager[Any]]

#: The default limit of an encoded task (bytes).
MAX_MESSAGE_SIZE = 1024 * 1024
#: The default limit of an encoded result (bytes).
MAX_RESULT_SIZE = 1024 * 1024


class App:
    """An application: its tasks, its queues and the URL of its broker.

    ``async with app:`` opens the connection, declares the queues, and closes the connection at the end. Without it the
    first ``enqueue`` opens the connection.

    None for ``enqueue_timeout``, ``max_message_size``, ``keep_results`` or ``max_result_size``: the environment's value
    holds (as ``$LEVERET_KEEP_RESULTS``), else that of ``[tool.leveret]`` in pyproject.toml, else what the table says.

    Args:
        url: The URL of the broker. None: ``$LEVERET_URL``, else the ``url`` in pyproject.toml, else
            ``sqlite:///leveret.db``. A relative path of an SQLite file is resolved in the directory where the
            application is made, wherever the program goes later; in pyproject.toml it is relative to that file.
        queues: Queues with settings of their own. A queue that only a task names has the defaults of ``Queue``.
        enqueue_timeout: Time (seconds, or a timedelta) after which an enqueue that is not confirmed raises. None: 30
            seconds.
        max_message_size: The most bytes of an encoded task. None: 1 MiB.
        middleware: Functions that wrap each run in a worker, the first one outermost: for logging, or an asynchronous
            session. Each is ``async def (current, inner)``, awaits ``inner()`` once and returns what that returns. They
            run on the event loop, also around a plain ``def`` task, which itself runs in a thread.
        thread_middleware: Functions that wrap the plain ``def`` tasks alone, in the thread of each: for a database
            session or connection of a thread, the locale, the logging context. Each is ``def (current, inner)``, calls
            ``inner()`` once and returns what that returns.
        enqueue_middleware: Functions that wrap each enqueue in the program that enqueues, the first one outermost: to
            add headers, or to refuse tasks. Each is ``async def (envelopes, store)`` and awaits ``store(envelopes)``
            once, with the same tasks, which may have other headers; or it raises, and nothing is stored.
        telemetry: Traces and measures each enqueue and each run, as ``leveret.observe.opentelemetry.OpenTelemetry``
            does: around all middleware, and its mistakes are logged and change nothing.
        lifespan: An async context manager function (``@contextlib.asynccontextmanager``) that is called with the
            application, as those of Starlette and FastAPI are: entered in each child process before its first task, and
            left after its last one. What it yields is ``current_task().state``. Programs that only enqueue do not enter
            it.
        keep_results: How long the broker keeps what became of a task (seconds, or a timedelta). None: 3600 seconds.
        max_result_size: The most bytes of an encoded result. A larger one is not kept, and ``Handle.result`` raises
            NoResult. None: 1 MiB.

    Raises:
        ConfigurationError: An argument, or a setting in its place, is not what it must be.
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
        enqueue_middleware: Sequence[EnqueueMiddleware] = (),
        telemetry: Telemetry | None = None,
        lifespan: LifespanFunction | None = None,
        keep_results: float | timedelta | None = None,
        max_result_size: int | None = None,
    ) -> None:
        #: The name of the module that made it.
        self.module: str = sys._getframe(1).f_globals.get("__name__", "")  # noqa: SLF001 - documented
        #: Where a relative path in $LEVERET_URL, or in the default, is from now on.
        folder = _working_directory()
        enqueue_timeout = number("enqueue_timeout", enqueue_timeout, DEFAULT_TIMEOUT, folder)
        keep_results = number("keep_results", keep_results, KEEP, folder)
        max_message_size = number("max_message_size", max_message_size, MAX_MESSAGE_SIZE, folder)
        max_result_size = number("max_result_size", max_result_size, MAX_RESULT_SIZE, folder)
        #: The most bytes of an encoded result.
        self.max_result_size = count("max_result_size", max_result_size, least=0)
        if url is not None and not isinstance(url, str):
            raise ConfigurationError(f"url is {url!r}; it must be text, as 'sqlite:////whole/path.db'")
        #: Functions that wrap each run, the first one outermost.
        self.middleware = functions("middleware", middleware)
        #: Functions that wrap the plain ``def`` tasks in their threads, the first one outermost.
        self.thread_middleware = thread_functions("thread_middleware", thread_middleware)
        #: Functions that wrap each enqueue, the first one outermost.
        self.enqueue_middleware = functions("enqueue_middleware", enqueue_middleware)
        #: What traces and measures each enqueue and each run.
        self.telemetry = telemetry
        #: What each process that runs tasks enters before the first one.
        self.lifespan = None if lifespan is None else _checked_lifespan(lifespan)
        enqueue_layers: list[EnqueueLayer] = [partial(storing_within, layer) for layer in self.enqueue_middleware]
        #: For programs that extend Leveret: what is around each attempt and looks on, the outermost first.
        self.attempt_layers: list[AttemptLayer] = []
        if telemetry is not None:
            enqueue_layers.insert(0, partial(sending_within, telemetry, self._url))
            self.attempt_layers.append(partial(attempting_within, telemetry, self._url))
        #: For programs that extend Leveret: the tasks and queues, by their names.
        self.registry = Registry(_checked_queues(queues))
        #: For programs that extend Leveret: what tasks and handles use.
        self.client = Client(
            self.registry,
            ClientSettings(
                None if url is None else absolute(url, folder),
                folder,
                seconds("enqueue_timeout", enqueue_timeout, above_zero=True),
                count("max_message_size", max_message_size),
                seconds("keep_results", keep_results, above_zero=True),
            ),
            enqueue_layers,
        )

    @property
    def url(self) -> str:
        """The broker's. An SQLite file's path is whole: a relative one was meant when the application was made."""
        return self._url()

    def _url(self) -> str:
        return self.client.url

    @property
    def enqueue_timeout(self) -> float:
        """Seconds after which an enqueue that is not confirmed raises."""
        return self.client.settings.enqueue_timeout

    @property
    def max_message_size(self) -> int:
        """The most bytes of an encoded task."""
        return self.client.max_message_size

    @property
    def keep_results(self) -> float:
        """How long the broker keeps what became of a task (seconds)."""
        return self.client.keep_results

    @property
    def queues(self) -> Sequence[Queue]:
        """All queues: those that were given, and those that tasks name."""
        return tuple(self.registry.queues.values())

    @property
    def unique(self) -> UniqueKeys:
        """Which unique keys are taken."""
        return UniqueKeys(self.client)

    def limit(
        self,
        name: str,
        /,
        *,
        concurrency: int | None = None,
        rate: Rate | None = None,
        by: str | Sequence[str] | None = None,
    ) -> Limit:
        """Make a limit that tasks may share: ``app.limit("stripe", concurrency=20, rate=Rate(100, per=60))``.

        A task with ``limits=[stripe]`` waits in its queue until all its limits let it go, and keeps its place in each
        until it has ended, is to be tried again, or was put off. While it waits it takes no slot of a worker, and other
        tasks pass it.

        Args:
            name: The name, by which the command line and the dashboard know it: printable, at most 128 bytes.
            concurrency: The most tasks of it that are under way, over all workers. None: any number.
            rate: How many tasks of it may start in a time. None: any number.
            by: The parameter whose argument is the key, as "tenant": the limit holds for each key by itself. Several in
                a list. None: one limit for all.

        Returns:
            The limit, for ``limits=[...]`` of any tasks of this application.

        Raises:
            ConfigurationError: There is a limit of that name, or a value is not what it must be.
        """
        limit = limit_of(name, concurrency, rate, by, self.client)
        self.registry.add_limit(limit, module_name(), module_run())
        return limit

    @property
    def limits(self) -> Sequence[Limit]:
        """The limits that were made; those of whole queues are in ``queues``."""
        return tuple(self.registry.limits.values())

    @property
    def tasks(self) -> Sequence[Task[..., Any]]:
        """The tasks that are registered."""
        return tuple(self.registry.tasks.values())

    @property
    def default_tasks(self) -> dict[str, str]:
        """The task of each queue that takes the messages without a task's name."""
        return dict(self.registry.default_tasks)

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
        schedule: Scheduling = ...,
        unique: UniqueBy | None = ...,
        limits: LimitsGiven = ...,
        inbox: object = ...,
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
        schedule: Scheduling = None,
        unique: UniqueBy | None = None,
        limits: LimitsGiven = (),
        inbox: object = None,
    ) -> Any:
        """Register a function as a task: ``@app.task``, or ``@app.task(queue="mail")``.

        A failed attempt is tried again until there were ``max_attempts``. The wait before the next one is random, up to
        ``backoff`` seconds, doubled with each attempt up to ``max_backoff``.

        The same function again, because its module was reloaded or its notebook cell was run again, replaces the first.

        A plain function that returns a coroutine, as many decorators do, is called in a thread, and what it returns is
        awaited on the event loop as an ``async def`` task is.

        Args:
            function: The function, where the decorator has no options.
            name: The name on the wire. None: the function's name.
            queue: The queue in which the task is enqueued.
            acknowledge: "after": a run that is interrupted is started again, so it may run twice. "before": at most
                once, for tasks that must not run twice and may be lost.
            default: True: the task takes the queue's messages that name no task, as foreign producers send them.
            max_attempts: The most attempts, at least 1. None: no limit.
            backoff: The longest wait after the first attempt (seconds, or a timedelta).
            max_backoff: The longest wait after any attempt (seconds, or a timedelta).
            retry_on: The exceptions that are tried again: one class, or some in a tuple, list or set. None: every
                exception.
            give_up_on: The exceptions that are never tried again: one class, or some in a tuple, list or set.
            retry: Called with the attempt's number and the exception. Returns how long to wait (seconds, or a
                timedelta), or None to give up. It is asked last: for an exception that may be tried again, while
                attempts are left.
            timeout: How long an attempt may run (seconds, or a timedelta). None: no limit. An ``async def`` task is
                cancelled then and has failed with TimedOut. A plain ``def`` task cannot be interrupted: it may end by
                itself (see ``current_task().deadline``), and ``leveret.executors.OVERTIME`` (5 seconds) later its child
                process is replaced by a fresh one.
            priority: 0 to 9, the higher first. ``options(priority=...)`` replaces it, and says which brokers keep
                priorities. A worker of the queue says at its start if the broker does not keep them, as with
                ``Queue(priorities=True)``.
            store_result: Whether the broker keeps what becomes of the task, and what it returns, for those who ask.
            schedule: When the application's workers enqueue it by themselves: ``cron(...)`` or ``every(...)``. Several
                in a list, or in a dict by the schedules' names; the name of a single one is the task's. See `schedules`
                for those that are data.
            unique: The task's unique key: ``by("customer")``, or a function that is called with the task's arguments
                and returns the key (None: none). While a task with the key has not ended, no other is stored.
            limits: The limits that the task waits for, made by `limit`: one, or several in a list, all of which must
                let it go.
            inbox: The task runs in a transaction of this database, which also holds the mark that it was done, so its
                effects there are exactly once: an engine or a sessionmaker of SQLAlchemy, or a function that gives the
                context manager of a transaction. ``leveret.outbox.current_transaction()`` is its connection or session.

        Returns:
            The task in place of the function; with options, the decorator that makes it.

        Raises:
            ConfigurationError: Another function has the name, the queue has a default task already, what is given
                cannot be a task, an option is not what it must be, or a limit or the queue's ``fair_by`` names a
                parameter that the function does not have.
            InvalidArguments: The arguments of a schedule do not fit the task.
        """
        options = TaskOptions(
            queue=queue,
            acknowledge=acknowledge,
            max_attempts=max_attempts,
            backoff=seconds("backoff", backoff),
            max_backoff=seconds("max_backoff", max_backoff),
            timeout=seconds_or_none("timeout", timeout, above_zero=True, none="no limit"),
            priority=priority,
            store_result=store_result,
            retry_on=None if retry_on is None else exceptions("retry_on", retry_on),
            give_up_on=exceptions("give_up_on", give_up_on),
            retry=retry,
        )
        run = module_run()
        key = None if unique is None else unique_of(unique)
        waits_for = limits_of(limits)

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            found = task_function(function, name)
            if inbox is not None:
                returns = Returns(found.function, found.name)
                results = Results(
                    lambda value: returns.encode(value, self.max_result_size),
                    lambda kept: returns.decode(msgspec.Raw(kept)),
                )
                is_async = makes_coroutines(found.function)
                found = TaskFunction(within_inbox(found.function, inbox, results, is_async=is_async), found.name)
            return self.registry.register(
                found, options, run, self.client, default=default, schedule=schedule, unique=key, limits=waits_for
            )

        return register if function is None else register(function)

    @property
    def schedules(self) -> Schedules:
        """The schedules of this application's broker: those of the code, and those that are data."""
        return Schedules(self.client)

    def handle(self, id_: str, /) -> Handle[Any]:
        """The handle of a task that any program enqueued. See ``Task.handle`` for a typed one.

        Args:
            id_: The task's id.

        Returns:
            The handle. Nothing is asked of the broker yet.
        """
        return Handle(id_, self.client)

    def wait(self, coroutine: Coroutine[Any, Any, T], /) -> T:
        """Run a coroutine of this application (``enqueue_many``, ...) from code without an event loop.

        It works from any thread, before and after ``os.fork``.

        Args:
            coroutine: The coroutine, not yet awaited.

        Returns:
            The coroutine's result.

        Raises:
            RuntimeError: This thread runs an event loop, which the call would block.
        """
        return self.client.wait(coroutine)

    async def __aenter__(self) -> Self:
        await self.client.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close this loop's connection. A later enqueue opens it again."""
        await self.client.close()

    def close_sync(self) -> None:
        """Close the connection of ``enqueue_sync`` and `wait`, and their thread."""
        self.client.close_sync()


def _checked_queues(queues: Sequence[Queue]) -> Sequence[Queue]:
    given: object = queues
    every = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    wrong = [queue for queue in every if not isinstance(queue, Queue)]
    if wrong or isinstance(given, Queue):
        raise ConfigurationError(
            f"queues has {show((wrong or [given])[0])}; it must be a list of leveret.Queue, as queues=[Queue('mail')]"
        )
    return [queue for queue in every if isinstance(queue, Queue)]


def _checked_lifespan(given: LifespanFunction) -> LifespanFunction:
    """Raises ConfigurationError for what cannot be called with the application, or gives no context manager then."""
    problem = ""
    function: object = given
    if not callable(function):
        problem = "it must be a function"
    elif inspect.isasyncgenfunction(given) or inspect.iscoroutinefunction(given):
        problem = "decorate it with @contextlib.asynccontextmanager, and have it yield once"
    else:
        try:
            inspect.signature(given).bind(None)
        except TypeError:
            problem = "it is called with the application: give it that parameter, as 'async def lifespan(app)'"
        except ValueError:  # of a builtin nothing is known
            pass
    if problem:
        raise ConfigurationError(f"lifespan is {show(given)}; {problem}")
    return given


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
