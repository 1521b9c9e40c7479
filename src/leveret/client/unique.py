"""Unique tasks: how a call gets its key, and what becomes of one whose key is taken."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from math import ceil
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from leveret.brokers import OnConflict
from leveret.client.payload import makes_coroutines
from leveret.errors import ConfigurationError, NotSerializable
from leveret.model import (
    MAX_TIMEOUT,
    MAX_UNIQUE_KEY,
    RERUN,
    UNIQUE_CONFLICT,
    UNIQUE_FOR,
    UNIQUE_KEY,
    UNIQUE_LATEST,
    UNIQUE_SCOPE,
)
from leveret.model.arguments import seconds_or_none
from leveret.model.durations import MAX_DELAY, show
from leveret.model.names import fits
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import timedelta

    from leveret.client.client import Client
    from leveret.client.payload import Signature
    from leveret.model import KeyHolder, LimitRef, TaskOptions

_encode = msgspec.json.Encoder(order="sorted").encode
_POLICIES = ("ignore", "raise", "replace", "rerun")
#: What becomes of a call whose unique key is taken, as users say it.
Policy: TypeAlias = OnConflict | Literal["rerun"]
_SCOPES = ("unfinished", "waiting")
#: Until when a task has its key.
Scope: TypeAlias = Literal["unfinished", "waiting"]


class Unique(msgspec.Struct, frozen=True):
    """How a task's enqueues get their keys; made by `by`."""

    #: The parameters whose arguments make the key; none: the task's name alone does.
    parameters: tuple[str, ...] = ()
    #: In their place: called with the call's arguments.
    function: Callable[..., Any] | None = None
    #: In their place: of the next enqueue.
    key: str | None = None
    on_conflict: Policy = "ignore"
    #: For so long from the enqueueing on, whatever becomes of the task (seconds); None: until it has ended.
    period: float | None = None
    #: "waiting": until a worker has taken it.
    scope: Scope = "unfinished"
    #: So long after the last call it runs, and at the latest so long after the first (seconds; None: no such limit).
    debounce: float | None = None
    max_wait: float | None = None

    def __post_init__(self) -> None:
        if self.replaces and self.period is not None:
            raise ConfigurationError(
                "for_ keeps the key when there is nothing to replace any more: "
                f"give no on_conflict={self.on_conflict!r}"
            )
        if self.on_conflict == "rerun":
            msgspec.structs.force_setattr(self, "scope", "waiting")
        if self.debounce is None:
            if self.max_wait is not None:
                raise ConfigurationError("max_wait says how long debounce may put a task off: give debounce, too")
            return
        if self.period is not None:
            raise ConfigurationError("debounce and for_ are two answers to how long a key is taken: give one of them")
        if self.on_conflict == "raise":
            raise ConfigurationError("a debounced call replaces the one before: give no on_conflict='raise'")
        if self.max_wait is not None and self.max_wait < self.debounce:
            raise ConfigurationError(
                f"max_wait is {self.max_wait:g} s, and must be at least debounce, {self.debounce:g} s"
            )
        if not self.replaces:
            msgspec.structs.force_setattr(self, "on_conflict", "replace")
        msgspec.structs.force_setattr(self, "scope", "waiting")

    @property
    def replaces(self) -> bool:
        """Whether a later call's arguments are what runs, while its task waits."""
        return self.on_conflict in {"replace", "rerun"}

    @property
    def for_broker(self) -> OnConflict:
        """What a broker is told of it."""
        return "replace" if self.on_conflict == "rerun" else self.on_conflict

    def headers(self, key: str, now: float) -> dict[str, str | int]:
        """What carries the key of one call."""
        headers: dict[str, str | int] = {UNIQUE_KEY: key}
        if self.scope == "waiting":
            headers[UNIQUE_SCOPE] = self.scope
        if self.period is not None:
            headers[UNIQUE_FOR] = ceil(self.period * 1000)
        if self.replaces:
            headers[UNIQUE_CONFLICT] = "replace"
        if self.max_wait is not None:
            headers[UNIQUE_LATEST] = ceil((now + self.max_wait) * 1000)
        return headers

    def limits(self, key: str) -> list[LimitRef]:
        """Those of a task with that key: one that runs again does so after the one before."""
        return [(RERUN, key)] if self.on_conflict == "rerun" else []

    def check(self, signature: Signature, task: str, options: TaskOptions) -> None:
        """Raises ConfigurationError for a parameter that the task does not have, and for what cannot be counted."""
        if self.on_conflict == "rerun" and options.acknowledge == "before":
            raise ConfigurationError(
                f"task {task!r} has acknowledge='before', so the broker has forgotten it while it runs, and "
                "on_conflict='rerun' cannot wait for its end; 'replace' with scope='waiting' does not wait"
            )
        for name in self.parameters:
            if name not in signature.parameters:
                known = ", ".join(signature.parameters) or "none"
                raise ConfigurationError(
                    f"unique=by({name!r}): task {task!r} has no parameter {name!r}"
                    f"{did_you_mean(name, signature.parameters) or f'; it has: {known}'}"
                )

    def key_of(self, signature: Signature, task: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str | None:
        """The key of one call; None: it has none.

        Raises InvalidArguments, NotSerializable or ConfigurationError.
        """
        value: Any = self.key
        if self.function is not None:
            value = self.function(*args, **kwargs)
            if value is None:
                return None
        elif value is None and self.parameters:
            value = signature.canonical(args, kwargs, self.parameters)
            return _key(task, _text(task, value[0] if len(value) == 1 else value))
        elif value is None:
            return _key(task, "")
        return _key(task, value if isinstance(value, str) else _text(task, value))


#: What ``unique=`` may be.
UniqueBy: TypeAlias = "Unique | Callable[..., Any] | str"


def by(
    *parameters: str,
    scope: Scope = "unfinished",
    for_: float | timedelta | None = None,
    on_conflict: Policy = "ignore",
    debounce: float | timedelta | None = None,
    max_wait: float | timedelta | None = None,
) -> Unique:
    """A unique key for ``@app.task(unique=by("customer"))``: the task's name and the arguments of these parameters.

    While a task with the key is there and has not ended, no other with that key is stored. Calls by position, by name
    and by default that mean the same have the same key.

    Args:
        *parameters: The names of the parameters. None: the key is the task's name, so there is one such task at most.
        scope: How long a task has its key. "unfinished": until it has ended. "waiting": until a worker has taken it, so
            that what is enqueued while it runs is stored.
        on_conflict: "ignore": ``enqueue`` gives the handle of the task that is there, with ``existing``. "raise": it
            raises DuplicateTask, which names that task. "replace": as "ignore", and while that task waits it gets this
            call's arguments. "rerun": as "replace", and a call that comes while the task runs is stored as one more
            run, which begins when that one has ended, with the arguments of the last such call.
        for_: How long a task has its key from its enqueueing on (seconds, or a timedelta), whatever becomes of it: one
            such task in that time. None: until it has ended.
        debounce: The task runs so long after the last call (seconds, or a timedelta), with that call's arguments: each
            call while it waits replaces them and puts it off. It has its key until a worker has taken it.
        max_wait: At most so long after the first call (seconds, or a timedelta). None: without such a limit.

    Returns:
        What ``unique=`` takes.

    Raises:
        ConfigurationError: A parameter's name is no text, the scope or the conflict's policy is not known, a duration
            is none, ``for_`` is given with ``scope``, ``debounce``, "replace" or "rerun", ``debounce`` with "raise",
            ``max_wait`` without ``debounce``, or it is the shorter of them.
    """
    for name in parameters:
        if not isinstance(name, str):
            raise ConfigurationError(f"by({show(name)}): it takes the names of parameters, as by('customer')")
    period = seconds_or_none("for_", for_, above_zero=True, most=MAX_TIMEOUT, none="until it has ended")
    if scope not in _SCOPES:
        raise ConfigurationError(f"scope is {show(scope)}; it must be one of {', '.join(map(repr, _SCOPES))}")
    if scope == "waiting" and period is not None:
        raise ConfigurationError(
            "scope='waiting' and for_ are two answers to how long a key is taken: give one of them"
        )
    return Unique(
        *(tuple(dict.fromkeys(parameters)), None, None, checked_policy(on_conflict), period, scope),
        *debounced(debounce, max_wait),
    )


def debounced(
    debounce: float | timedelta | None, max_wait: float | timedelta | None
) -> tuple[float | None, float | None]:
    """Both in seconds. Raises ConfigurationError."""
    return (
        seconds_or_none("debounce", debounce, above_zero=True, most=MAX_DELAY, none="at once"),
        seconds_or_none("max_wait", max_wait, above_zero=True, most=MAX_DELAY, none="no limit"),
    )


def unique_of(given: object) -> Unique:
    """What ``unique=`` was given. Raises ConfigurationError."""
    if isinstance(given, Unique):
        return given
    if isinstance(given, str):
        if not given:
            raise ConfigurationError("unique is ''; a key is text of at least one character")
        return Unique(key=given)
    if callable(given) and not isinstance(given, type):
        if makes_coroutines(given) or inspect.isgeneratorfunction(given):
            raise ConfigurationError(f"unique is {show(given)}, which is asynchronous: write it as a plain 'def'")
        return Unique(function=given)
    raise ConfigurationError(
        f"unique is {show(given)}; it must be by('a parameter'), a function of the task's arguments, or a key as text"
    )


def checked_policy(on_conflict: object) -> Policy:
    """Raises ConfigurationError."""
    if on_conflict in _POLICIES:
        return on_conflict  # type: ignore[return-value]
    raise ConfigurationError(f"on_conflict is {show(on_conflict)}; it must be one of {', '.join(map(repr, _POLICIES))}")


def _text(task: str, value: Any) -> str:
    try:
        return _encode(value).decode()
    except (TypeError, ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        raise NotSerializable(
            f"the unique key of task {task!r} is {show(value)}, which is not JSON: give text, a number or a list"
        ) from None


def _key(task: str, text: str) -> str:
    """The task's name and what tells its keys apart; a long one by its hash."""
    key = f"{task}:{text}" if text else task
    if fits(key, MAX_UNIQUE_KEY):
        return key
    try:
        digest = hashlib.sha256(text.encode()).hexdigest()
    except UnicodeEncodeError:
        raise NotSerializable(f"the unique key of task {task!r} holds a lone surrogate: {show(text)}") from None
    name = task if len(task.encode()) < MAX_UNIQUE_KEY - len(digest) else hashlib.sha256(task.encode()).hexdigest()
    return f"{name}:{digest}"


class UniqueKeys:
    """The unique keys of an application's broker; made by ``App.unique``."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def release(self, key: str, /) -> bool:
        """Free a unique key, though its task has not ended: an operator's last resort. The task itself stays.

        Args:
            key: The whole key, with the task's name, as "sync:42".

        Returns:
            Whether a task had it.

        Raises:
            BrokerError: The broker cannot be asked.
        """
        return await self._client.broker.unique.release(key) is not None

    async def holders(self, limit: int = 1_000, /) -> Sequence[KeyHolder]:
        """The keys that are taken.

        Args:
            limit: At most so many.

        Returns:
            Each with the id and the queue of the task that has it, in the keys' order.

        Raises:
            BrokerError: The broker cannot be asked.
        """
        return await self._client.broker.unique.holders(limit)
