"""``Task[P, R]``: a function that can be enqueued."""

from __future__ import annotations

import time
from copy import copy
from math import ceil
from typing import TYPE_CHECKING, Any, Generic, Literal, ParamSpec, Protocol, TypeAlias, TypeVar

import msgspec

from leveret.client.chains import Step
from leveret.client.client import Conflicts
from leveret.client.handle import Handle, Source
from leveret.client.limits import Limit, Limiting, headers_of_step, limiting, limits_of
from leveret.client.payload import Returns, Signature, makes_coroutines
from leveret.client.unique import Policy, Unique, checked_policy, debounced, unique_of
from leveret.errors import ConfigurationError, DuplicateTask, InvalidArguments, TaskTooLarge
from leveret.model import (
    FLOW,
    ID_FOR,
    ID_TOKEN,
    LIMITS,
    MAX_LIMITS,
    MAX_TIMEOUT,
    STEP,
    STEPS,
    Envelope,
    Schedule,
    TaskOptions,
    carrying,
    check_headers,
    check_id,
    check_overrides,
    check_schedule_name,
    limit_header,
    new_id,
    new_ids,
    own_headers,
    repeated,
)
from leveret.model import Step as SlipStep
from leveret.model.arguments import moment, seconds
from leveret.model.durations import MAX_DELAY, show
from leveret.outbox import StoredTask

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
    from datetime import datetime, timedelta
    from typing import Self

    from leveret.client.limits import LimitsGiven
    from leveret.client.unique import UniqueBy
    from leveret.model import Acknowledge, Cron, Every, Header, Queue, RetryRules

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class Producer(Source, Protocol):
    """What a task needs of its application in order to be enqueued."""

    @property
    def max_message_size(self) -> int: ...
    def queue(self, name: str, /) -> Queue | None: ...
    def publish(
        self, envelopes: Sequence[Envelope], /, *, notify: bool, conflicts: Conflicts | None = None
    ) -> Coroutine[Any, Any, None]: ...
    def publish_sync(
        self, envelopes: Sequence[Envelope], /, *, notify: bool, conflicts: Conflicts | None = None
    ) -> None: ...
    async def require(self, queues: Collection[str], /) -> None: ...
    def wait(self, coroutine: Coroutine[Any, Any, T], /) -> T: ...
    async def store_within(self, connection: object, task: StoredTask, /) -> None: ...
    def store_within_sync(self, connection: object, task: StoredTask, /) -> None: ...


#: No task is kept for a hundred years (seconds).
_MAX_EXPIRES = 100 * MAX_DELAY


class _Given(msgspec.Struct, frozen=True):
    """The arguments of a step."""

    args: list[msgspec.Raw]
    kwargs: dict[str, msgspec.Raw]


class EnqueueOptions(msgspec.Struct, frozen=True):
    """What ``Task.options`` says of an enqueue, besides what it says in place of its task's options."""

    #: Seconds from the enqueueing, or a Unix time, before which it must not run.
    delay: float = 0.0
    at: float | None = None
    #: Seconds from the enqueueing after which it must not start any more.
    expires: float | None = None
    #: Of the next task; None: a new one.
    id: str | None = None
    #: For how long such an id is taken, though its task has ended (seconds); and what becomes of one that is taken.
    id_for: float | None = None
    on_conflict: Policy = "raise"
    #: Those that carry options which are not what the decorator says are among them.
    headers: dict[str, Any] = {}
    #: How it gets its unique key; None: it has none.
    unique: Unique | None = None
    #: What it waits for; None: nothing.
    limiting: Limiting | None = None

    def limits(
        self, key: str | None, signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Mapping[str, str]:
        """What says what one call waits for. ``key``: its unique key. Raises InvalidArguments."""
        own = self.unique.limits(key) if self.unique is not None and key is not None else []
        if self.limiting is None:
            return {LIMITS: limit_header(own)} if own else {}
        return self.limiting.headers(signature, args, kwargs, own)

    def __post_init__(self) -> None:
        if self.id is not None:
            check_id(self.id)
        if self.unique is not None and self.unique.debounce is not None and (self.delay or self.at is not None):
            raise ConfigurationError("debounce says when the task is due: give no delay or at with it")
        reruns = self.unique is not None and self.unique.on_conflict == "rerun"
        if reruns and self.limiting is not None and len(self.limiting.limits) >= MAX_LIMITS:
            raise ConfigurationError(
                f"a task has at most {MAX_LIMITS} limits, and on_conflict='rerun' is one of them: give one less"
            )

    def ids(self, count: int) -> list[str]:
        return new_ids(count) if self.id is None else [self.id] * count

    def id_headers(self) -> dict[str, str | int]:
        """What says that a task's id was chosen."""
        token: dict[str, str | int] = {ID_TOKEN: new_id()}
        return token if self.id_for is None else {**token, ID_FOR: ceil(self.id_for * 1000)}


#: What tasks of other queues are asked to do, and how it is done here.
_ENQUEUE = "'await {task}.enqueue(...)' enqueues it, '{task}.enqueue_sync(...)' does without an event loop"
_LATER = "'await {task}.options(delay=60).enqueue(...)' enqueues it for later (also: at=, expires=, priority=, queue=)"
_ELSEWHERE = {
    **dict.fromkeys(("delay", "kiq", "send", "submit", "defer", "defer_async", "push", "enqueue_async"), _ENQUEUE),
    **dict.fromkeys(("apply_async", "send_with_options", "schedule", "configure", "kicker", "enqueue_at"), _LATER),
    **dict.fromkeys(("apply", "run", "call_local"), "calling it, '{task}(...)', runs it here and now"),
    **dict.fromkeys(("map", "starmap", "chunks"), "'await {task}.enqueue_many([(1,), (2,)])' enqueues many"),
    "AsyncResult": "'{task}.handle(id)' is the handle of a task by its id",
    "request": "leveret.current_task() tells a running task about itself",
}


class Call(Generic[P]):
    """The arguments of one call of a task; made by `Task.call`."""

    __slots__ = ("args", "kwargs", "task")

    def __init__(self, task: Task[P, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        #: With what ``options`` said.
        self.task = task
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        arguments = [*map(show, self.args), *(f"{name}={show(value)}" for name, value in self.kwargs.items())]
        return f"<Call {self.task.name}({', '.join(arguments)})>"


_Arguments: TypeAlias = "tuple[tuple[Any, ...], Mapping[str, Any]]"
_NO_KEYWORDS: Mapping[str, Any] = {}


def _arguments(task: str, call: Call[Any] | Sequence[Any]) -> _Arguments:
    """What `Task.enqueue_many` was given for one call."""
    if isinstance(call, Call):
        if call.task.name != task:
            raise InvalidArguments(f"a call of task {call.task.name!r} was given to {task!r}.enqueue_many")
        return call.args, call.kwargs
    if not isinstance(call, (tuple, list)):
        raise InvalidArguments(
            f"{show(call)} is no call of task {task!r}: give enqueue_many a tuple of arguments for each, "
            f"as [(1,), (2,)], or {task}.call(...)"
        )
    return tuple(call), _NO_KEYWORDS


class Task(Generic[P, R]):
    """A function registered with an application: calling it runs it here and now, ``enqueue`` sends it to a worker.

    ``App.task`` makes it.
    """

    def __init__(
        self,
        function: Callable[P, Awaitable[R] | R],
        name: str,
        options: TaskOptions,
        producer: Producer,
        unique: Unique | None = None,
        limits: tuple[Limit, ...] = (),
    ) -> None:
        #: The function itself.
        self.function = function
        #: The name on the wire.
        self.name = name
        self._is_async = makes_coroutines(function)
        #: For programs that extend Leveret: how a call becomes a body and back.
        self.signature = Signature(function, name)
        #: For programs that extend Leveret: how a result becomes JSON and back.
        self.returns = Returns(function, name)
        self._options = options
        self._producer = producer
        self._enqueue = EnqueueOptions(unique=unique, limiting=self._limiting(limits, options))
        if unique is not None:
            unique.check(self.signature, name, options)
        self.__doc__ = function.__doc__

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Call the function itself, without any queue (an ``async def`` one gives its coroutine)."""
        return self.function(*args, **kwargs)

    if not TYPE_CHECKING:  # which would take any name

        def __getattr__(self, name: str) -> Any:
            hint = _ELSEWHERE.get(name, "").format(task=self.__dict__.get("name", "task"))
            raise AttributeError(f"a Leveret task has no {name!r}{hint and ': '}{hint}", name=name, obj=self)

    def __repr__(self) -> str:
        return f"<Task {self.name} on {self._options.queue}>"

    @property
    def is_async(self) -> bool:
        """Whether calling the function only makes a coroutine, so that it is called on the event loop."""
        return self._is_async

    @property
    def task_options(self) -> TaskOptions:
        """All that the decorator says, and ``options`` in its place."""
        return self._options

    @property
    def queue(self) -> str:
        """The queue in which it is enqueued."""
        return self._options.queue

    @property
    def acknowledge(self) -> Acknowledge:
        """Whether it is acknowledged "after" or "before" the run."""
        return self._options.acknowledge

    @property
    def retry(self) -> RetryRules:
        """When a failed attempt is tried again."""
        return self._options.rules

    @property
    def timeout(self) -> float | None:
        """How long an attempt may run (seconds); None: no limit."""
        return self._options.timeout

    @property
    def store_result(self) -> bool:
        """Whether the broker keeps what becomes of it."""
        return self._options.store_result

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What it waits for, besides what its queue says."""
        return () if self._enqueue.limiting is None else self._enqueue.limiting.limits

    def options(
        self,
        *,
        queue: str | None = None,
        delay: float | timedelta | None = None,
        at: datetime | None = None,
        expires: float | timedelta | None = None,
        priority: int | None = None,
        id: str | None = None,  # noqa: A002 - the user's word for it
        id_for: float | timedelta | None = None,
        timeout: float | timedelta | None = None,
        max_attempts: int | None = None,
        store_result: bool | None = None,
        headers: Mapping[str, Header] | None = None,
        unique: UniqueBy | Literal[False] | None = None,
        on_conflict: Policy | None = None,
        limits: LimitsGiven | None = None,
        debounce: float | timedelta | None = None,
        max_wait: float | timedelta | None = None,
    ) -> Self:
        """The same task, enqueued differently: ``task.options(delay=60).enqueue(...)``.

        Options never mix with the task's own arguments. None leaves an option as it is.

        ``timeout``, ``max_attempts`` and ``store_result`` replace what the decorator says. They travel with the
        message, so that each attempt has them, whichever worker runs it.

        Args:
            queue: The queue, in place of the task's own.
            delay: How long the task waits before it may run (seconds, or a timedelta), at most a year. The broker keeps
                it until then, durably.
            at: The moment before which the task must not run: an aware datetime, at most a year ahead. The broker keeps
                it until then, durably.
            expires: How long after the enqueueing the task may still start (seconds, or a timedelta), at most a hundred
                years. One that has not started by then is dead.
            priority: 0 to 9, the higher first; a task without one is like 4. RabbitMQ keeps it strictly since 4.3, or
                with ``Queue(kind="classic")``; see docs/guarantees.md.
            id: The task's own id, for one enqueue, as "invoice-42": printable, at most 255 bytes. It is refused
                (DuplicateTask) while a task with that id is ready, delayed, running or dead; see ``on_conflict``.
            id_for: How long the id is taken from the enqueueing on, also when its task has ended (seconds, or a
                timedelta): a task at most in that time. None: while its task is there.
            timeout: How long an attempt may run (seconds, or a timedelta): more than 0, at most a hundred years.
            max_attempts: The most attempts, at least 1.
            store_result: Whether the broker keeps what becomes of the task, and what it returns.
            headers: The message's own headers, which the task reads from ``current_task().headers``. Names are text
                that does not begin with ``leveret-`` or ``x-``. Values are str, int (64 bits), finite float, bool or
                None; 32 KiB in all.
            unique: A key for the next enqueue, as "repo:7", or what ``@app.task(unique=...)`` takes. It is the task's
                own: another task's key of the same text is another one. False: none.
            on_conflict: What becomes of an enqueue whose unique key, or own id, is taken, "ignore", "raise",
                "replace" or "rerun": see ``by``. None: what the unique key says; "raise" where there is none.
            limits: The limits that the task waits for, in place of the decorator's. Empty: none.
            debounce: How long after the last call with the unique key the task runs: see ``by``.
            max_wait: How long after the first one it runs at the latest: see ``by``.

        Returns:
            The task with these options. The task itself is not changed.

        Raises:
            ConfigurationError: An option is not what it must be: a duration that is none, negative or too long, both
                ``delay`` and ``at``, a datetime without a time zone, another priority, an id that is empty, not
                printable or too long, headers that do not fit, ``on_conflict`` of a task without a unique key and an
                id, "replace", "rerun" or ``debounce`` of a task without a unique key, ``debounce`` with ``delay``,
                ``at`` or what ``by`` does not take with it, a limit that is none of the application's, or a queue or a
                limit that parts its tasks by a parameter which this one does not have.
        """
        if delay is not None and at is not None:
            raise ConfigurationError("delay and at are two ways to say the same: give one of them")
        overrides = check_overrides({"timeout": timeout, "max_attempts": max_attempts, "store_result": store_result})
        chosen = {name: value for name, value in (("queue", queue), ("priority", priority)) if value is not None}
        own = own_headers(self._enqueue.headers)
        carried = {name: value for name, value in self._enqueue.headers.items() if name not in own}
        if headers is not None:
            own = check_headers(headers)
        enqueue: dict[str, Any] = {"headers": {**own, **carried, **carrying(overrides)}}
        if delay is not None:
            enqueue |= {"delay": seconds("delay", delay, most=MAX_DELAY), "at": None}
        if at is not None:
            enqueue |= {"at": moment("at", at), "delay": 0.0}
        if expires is not None:
            enqueue["expires"] = seconds("expires", expires, most=_MAX_EXPIRES)
        if id is not None:
            enqueue["id"] = id
        if id_for is not None:
            enqueue["id_for"] = seconds("id_for", id_for, above_zero=True, most=MAX_TIMEOUT)
        policy: dict[str, Any] = {} if on_conflict is None else {"on_conflict": checked_policy(on_conflict)}
        waits = zip(("debounce", "max_wait"), debounced(debounce, max_wait), strict=True)
        policy |= {name: value for name, value in waits if value is not None}
        if unique is not None or policy:
            before = self._enqueue
            has_id = any(one is not None for one in (id, id_for, before.id, before.id_for))
            enqueue["unique"] = self._unique(unique, policy, has_id=has_id)
        if on_conflict is not None:
            enqueue["on_conflict"] = on_conflict
        options = msgspec.structs.replace(self._options, **chosen, **overrides)
        enqueue["limiting"] = self._limiting(limits, options)
        return self._with(options, msgspec.structs.replace(self._enqueue, **enqueue))

    def _limiting(self, given: LimitsGiven | None, options: TaskOptions) -> Limiting | None:
        if given is None and options.queue == self._options.queue:
            return self._enqueue.limiting
        limits = self.limits if given is None else limits_of(given)
        queue = self._producer.queue(options.queue)
        return limiting(limits, queue, self.name, self.signature, options, self._producer)

    def _unique(
        self, given: UniqueBy | Literal[False] | None, policy: dict[str, Any], *, has_id: bool
    ) -> Unique | None:
        unique = self._enqueue.unique if given is None else None if given is False else unique_of(given)
        if unique is not None:
            unique.check(self.signature, self.name, self._options)
            return msgspec.structs.replace(unique, **policy) if policy else unique
        for name, value in policy.items():
            if name != "on_conflict" or value in {"replace", "rerun"}:
                raise ConfigurationError(f"{name} is given, and task {self.name!r} has no unique key: give unique=...")
            if not has_id:
                raise ConfigurationError(
                    f"on_conflict is given, and task {self.name!r} has no unique key and no id: "
                    "give unique=... or id=..."
                )
        return None

    def for_message(self, headers: Mapping[str, Any]) -> Self:
        """The same task with the options that a message's headers carry. For Leveret itself."""
        options = self._options.for_message(headers) if headers else self._options
        return self if options is self._options else self._with(options, self._enqueue)

    def _with(self, options: TaskOptions, enqueue: EnqueueOptions) -> Self:
        changed = copy(self)
        changed._options, changed._enqueue = options, enqueue  # noqa: SLF001 - one class
        return changed

    def call(self, *args: P.args, **kwargs: P.kwargs) -> Call[P]:
        """One call for ``enqueue_many``, with any arguments.

        Args:
            *args: The task's arguments, checked as those of ``enqueue`` are.
            **kwargs: The same, by name.

        Returns:
            The call.
        """
        return Call(self, args, kwargs)

    def scheduled(self, name: str, timing: Cron | Every) -> Schedule:
        """A schedule of this task, with the arguments of the timing. For Leveret itself.

        Raises InvalidArguments, NotSerializable, TaskTooLarge or ConfigurationError.
        """
        check_schedule_name(name)
        enqueue = self._enqueue
        if enqueue.id is not None or enqueue.delay or enqueue.at is not None:
            raise ConfigurationError(
                f"schedule {name!r}: options(id=...), delay and at are for one enqueue: leave them out"
            )
        # Whether one more may be there is said by `overlap`.
        task = self._with(self._options, msgspec.structs.replace(enqueue, unique=None))
        if timing.overlap != "allow" and not self.store_result:
            task = task.options(store_result=True)  # whether it is finished must be known
        elif not self.store_result:
            task = task.options(store_result=False)  # whoever stores it does not know the decorator
        (message,) = task._envelopes([""], [(timing.args, timing.kwargs)])  # noqa: SLF001 - one class
        message = msgspec.structs.replace(message, enqueued_at=None, expires_at=enqueue.expires)
        return Schedule(name, timing.without_args(), message)

    async def enqueue(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Store the task durably, to be run by a worker. When it returns, the task is safe.

        Args:
            *args: The task's arguments.
            **kwargs: The same, by name.

        Returns:
            The handle of the stored task; of the one that is there if the unique key is taken (``handle.existing``).

        Raises:
            InvalidArguments: The arguments do not fit the task. Nothing was sent.
            NotSerializable: An argument is not JSON, and its annotation does not carry it either. Nothing was sent.
            TaskTooLarge: The encoded arguments are over ``max_message_size``. Nothing was sent.
            DuplicateTask: The chosen id is taken (not on RabbitMQ), or the unique key of a task with
                ``on_conflict="raise"``. Nothing was stored.
            EnqueueError: The broker did not confirm the task, so it may not be stored.
            BrokerError: The broker cannot be reached or used, so the task may not be stored. Both come at most the
                application's ``enqueue_timeout`` (seconds) and one second later.
            ConfigurationError: No broker knows the URL, or the queue is there with other settings (QueueMismatch).
        """
        envelopes = self._envelopes(self._enqueue.ids(1), [(args, kwargs)])
        conflicts = self._conflicts()
        await self._producer.publish(envelopes, notify=self.store_result, conflicts=conflicts)
        return self._handles(envelopes, conflicts)[0]

    async def enqueue_many(
        self,
        calls: Iterable[Call[P] | tuple[Any, ...]],
        *,
        ids: Iterable[str] | None = None,
        over: float | timedelta | None = None,
    ) -> list[Handle[R]]:
        """Store many calls in one round trip: ``enqueue_many([task.call(5, text="a"), (6,)])``.

        On SQLite all are stored or none. On RabbitMQ each is stored by itself: the error's ``ids`` are those that are
        not known to be stored.

        Args:
            calls: Each is ``task.call(...)``, whose arguments a type checker sees, or a tuple of positional arguments,
                which are checked here alone.
            ids: One chosen id for each call. None: new ones.
            over: Spread them evenly over so much time (seconds, or a timedelta), from now on, or from what ``delay`` or
                ``at`` says; at most a year with that. The first of n is due then, the next one an nth of the time
                later. None: all at once.

        Returns:
            The handles, in the order of the calls.

        Raises:
            DuplicateTask: An id is given twice, and nothing was sent; or one is taken, as with ``enqueue``.
            ConfigurationError: There are not as many ids as calls, or one of them cannot be an id; ``over`` is no
                duration, too long, or not over when they expire; or as with ``enqueue``.
            InvalidArguments: What is given is no call of this task, or its arguments do not fit. Nothing was sent.
            LeveretError: As with ``enqueue``.
        """
        every = [(call, _NO_KEYWORDS) if type(call) is tuple else _arguments(self.name, call) for call in calls]
        chosen = self._enqueue.ids(len(every)) if ids is None else list(ids)
        if len(chosen) != len(every):
            raise ConfigurationError(f"enqueue_many has {len(every)} calls and {len(chosen)} ids; give one for each")
        for id_ in () if ids is None else chosen:
            check_id(id_)
        envelopes = self._envelopes(chosen, every, are_chosen=ids is not None)
        if over is not None:
            envelopes = self._spread(envelopes, seconds("over", over, most=MAX_DELAY))
        twice = repeated(chosen)
        if twice:
            raise DuplicateTask(twice)
        conflicts = self._conflicts()
        if envelopes:
            await self._producer.publish(envelopes, notify=self.store_result, conflicts=conflicts)
        return self._handles(envelopes, conflicts)

    def enqueue_sync(self, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """``enqueue`` for code without an event loop: Flask, Django views, scripts, threads. See ``App.wait``.

        Args:
            *args: The task's arguments.
            **kwargs: The same, by name.

        Returns:
            The handle of the stored task.

        Raises:
            RuntimeError: This thread runs an event loop, which the call would block.
            LeveretError: As with ``enqueue``.
        """
        envelopes = self._envelopes(self._enqueue.ids(1), [(args, kwargs)])
        conflicts = self._conflicts()
        self._producer.publish_sync(envelopes, notify=self.store_result, conflicts=conflicts)
        return self._handles(envelopes, conflicts)[0]

    def step(self, *args: Any, **kwargs: Any) -> Step[R]:
        """This task as a step of a chain: ``await (fetch.step(url) | parse.step()).enqueue()``.

        Args:
            *args: The task's arguments. A step behind another one gets that one's result before them, unless it is
                ``immutable()``.
            **kwargs: The same, by name.

        Returns:
            The step. Its arguments are checked when the chain is enqueued.
        """
        return Step(self, args, kwargs)

    @property
    def producer(self) -> Producer:
        """What enqueues it. For Leveret itself."""
        return self._producer

    def beginning(
        self, id_: str, args: tuple[Any, ...], kwargs: dict[str, Any], flow: str, steps: str | None
    ) -> Envelope:
        """The task as the first step of a chain. ``steps``: those that follow. For Leveret itself."""
        self._check_step()
        (envelope,) = self._envelopes([id_], [(args, kwargs)])
        slip = {} if steps is None else {STEPS: steps}
        return envelope.with_headers({FLOW: flow, STEP: "1", **slip})

    def following(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, immutable: bool) -> SlipStep:
        """The task as a later step of a chain. For Leveret itself.

        Raises InvalidArguments, NotSerializable or ConfigurationError.
        """
        self._check_step()
        if self.signature.raw:
            raise ConfigurationError(
                f"task {self.name!r} takes the raw body, so it can be the first step of a chain alone"
            )
        enqueue, headers = self._enqueue, self._enqueue.headers.copy()
        if immutable:
            body, _ = self.signature.encode(args, kwargs)
            given = msgspec.json.decode(body, type=_Given)
            if enqueue.limiting is not None:
                headers |= enqueue.limiting.headers(self.signature, args, kwargs)
        else:
            given = _Given(*self.signature.encode_after(args, kwargs))
            if enqueue.limiting is not None:
                headers |= headers_of_step(enqueue.limiting, self.name, self.signature, args, kwargs)
        if not self.store_result:
            # Whoever stores it does not know the decorator. As text, which is read fastest.
            headers |= dict.fromkeys(carrying({"store_result": False}), "false")
        return SlipStep(
            *(self.name, self.queue, given.args, given.kwargs, immutable, self._options.priority),
            *(enqueue.delay, enqueue.at, enqueue.expires, headers),
        )

    def _check_step(self) -> None:
        if self._enqueue.unique is not None or self._enqueue.id is not None or self._enqueue.id_for is not None:
            raise ConfigurationError(
                f"task {self.name!r} has an id or a unique key, and a step has none of its own: "
                "say options(unique=False), and give no id"
            )

    async def enqueue_in(self, connection: object, /, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """Store the task with your own database's transaction: it is enqueued if that commits, else never was.

        No broker is waited for: a row is inserted into the table ``leveret_outbox``, and ``leveret relay`` publishes it
        after the commit. A connection to the file of an SQLite broker needs neither: the task is there at the commit.

        Args:
            connection: A session or connection with the transaction: SQLAlchemy's, psycopg's, asyncpg's, aiosqlite's,
                or one that is not asynchronous (see ``enqueue_in_sync``).
            *args: The task's arguments.
            **kwargs: The same, by name.

        Returns:
            The handle of the task.

        Raises:
            InvalidArguments: The arguments do not fit the task.
            NotSerializable: An argument is not JSON, and its annotation does not carry it either.
            TaskTooLarge: The encoded arguments are over ``max_message_size``.
            ConfigurationError: What is given is no connection that is known here.
            Exception: What the database's driver raises, as if there is no table ``leveret_outbox``.
        """
        stored = self._stored_task(args, kwargs)
        await self._producer.store_within(connection, stored)
        return self._handles([stored.envelope])[0]

    def enqueue_in_sync(self, connection: object, /, *args: P.args, **kwargs: P.kwargs) -> Handle[R]:
        """``enqueue_in`` for connections and sessions that are not asynchronous, in the calling thread.

        Args:
            connection: A session or connection with the transaction: SQLAlchemy's, psycopg's, sqlite3's, PyMySQL's or
                another DB-API driver's, or ``django.db.connection``.
            *args: The task's arguments.
            **kwargs: The same, by name.

        Returns:
            The handle of the task.

        Raises:
            LeveretError: As with ``enqueue_in``.
            Exception: What the database's driver raises.
        """
        stored = self._stored_task(args, kwargs)
        self._producer.store_within_sync(connection, stored)
        return self._handles([stored.envelope])[0]

    def _stored_task(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> StoredTask:
        (envelope,) = self._envelopes(self._enqueue.ids(1), [(args, kwargs)])
        conflicts = self._conflicts()
        return StoredTask(envelope, "raise" if conflicts is None else conflicts.policy, self.store_result)

    def prepared(self, *args: P.args, **kwargs: P.kwargs) -> tuple[Envelope, Callable[[], None]]:
        """The message of a task, and what stores it as ``enqueue_sync`` does, to be called later. For Leveret itself.

        Raises InvalidArguments, NotSerializable, TaskTooLarge or ConfigurationError.
        """
        envelopes = self._envelopes(self._enqueue.ids(1), [(args, kwargs)])

        def store() -> None:
            self._producer.publish_sync(envelopes, notify=self.store_result, conflicts=self._conflicts())

        return envelopes[0], store

    def handle(self, id_: str, /) -> Handle[R]:
        """The handle of a task of this kind that any program enqueued.

        Args:
            id_: The task's id.

        Returns:
            The handle. Nothing is asked of the broker yet.
        """
        return Handle(id_, self._producer, self.name, None, self.store_result)

    def _spread(self, envelopes: Sequence[Envelope], over: float) -> list[Envelope]:
        """The tasks, each due a part of ``over`` (seconds) after the one before. Raises ConfigurationError."""
        spread = []
        for number, one in enumerate(envelopes):
            assert one.enqueued_at is not None
            later = over * number / len(envelopes)
            due = (one.enqueued_at if one.due is None else one.due) + later
            if due > one.enqueued_at + MAX_DELAY:
                raise ConfigurationError(f"over is {over:g}: with the delay before it that is more than a year")
            if one.expires_at is not None and due > one.expires_at:
                raise ConfigurationError(
                    f"over is {over:g}: some tasks would have expired before they are due; expires counts from now on"
                )
            spread.append(msgspec.structs.replace(one, due=due) if later else one)
        return spread

    def _conflicts(self) -> Conflicts | None:
        unique, policy = self._enqueue.unique, self._enqueue.on_conflict
        if unique is not None:
            return Conflicts(unique.for_broker)
        return None if policy == "raise" else Conflicts("replace" if policy == "rerun" else policy)

    def _handles(self, envelopes: Sequence[Envelope], conflicts: Conflicts | None = None) -> list[Handle[R]]:
        producer, name, stored = self._producer, self.name, self.store_result
        existing = {} if conflicts is None else conflicts.existing
        if existing:
            return [
                Handle(existing[one.id], producer, name, None, stored, existing=True)
                if one.id in existing
                else Handle(one.id, producer, name, one.queue, stored, one.enqueued_at)
                for one in envelopes
            ]
        return [Handle(one.id, producer, name, one.queue, stored, one.enqueued_at) for one in envelopes]

    def _envelopes(
        self, ids: Iterable[str], calls: Iterable[_Arguments], *, are_chosen: bool = False
    ) -> list[Envelope]:
        """The tasks, all enqueued now. Raises InvalidArguments, NotSerializable, TaskTooLarge or ConfigurationError."""
        encode, most = self.signature.encode, self._producer.max_message_size
        name, queue, priority = self.name, self._options.queue, self._options.priority
        now, enqueue = time.time(), self._enqueue
        unique, waits = enqueue.unique, enqueue.limiting is not None or enqueue.unique is not None
        are_chosen = are_chosen or enqueue.id is not None
        if enqueue.id_for is not None and not are_chosen:
            raise ConfigurationError(f"id_for is given, and task {name!r} is enqueued without an id: give id=...")
        due = enqueue.at if enqueue.at is not None else now + enqueue.delay if enqueue.delay else None
        expires_at = None if enqueue.expires is None else now + enqueue.expires
        envelopes = []
        for id_, (args, kwargs) in zip(ids, calls, strict=True):
            body, content_type = encode(args, kwargs)
            if len(body) > most:
                raise TaskTooLarge(
                    f"the arguments of task {name!r} are {len(body)} bytes, over the limit of {most}; store the "
                    "data elsewhere and pass a reference, or raise App(max_message_size=...)"
                )
            headers, when = enqueue.headers.copy(), due
            key = None if unique is None else unique.key_of(self.signature, name, args, kwargs)
            if unique is not None and key is not None:
                headers |= unique.headers(key, now)
                when = due if unique.debounce is None else now + unique.debounce
            if waits:
                headers |= enqueue.limits(key, self.signature, args, kwargs)
            if are_chosen:
                headers |= enqueue.id_headers()
            envelopes.append(
                Envelope(id_, queue, name, body, content_type, 1, now, None, when, expires_at, headers, priority)
            )
        return envelopes


if TYPE_CHECKING:

    class AsyncTask(Task[P, R]):
        """A task of an ``async def`` function. For type checkers: a call gives its coroutine."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]: ...

    class PlainTask(Task[P, R]):
        """A task of a plain ``def`` function. For type checkers: a call gives what it returns."""

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

else:
    AsyncTask = PlainTask = Task
