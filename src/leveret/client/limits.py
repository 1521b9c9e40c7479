"""Limits: which of them a task has, with which keys, and what an application does with one that is in force."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec
from msgspec import UNSET, UnsetType

from leveret.errors import ConfigurationError, LimitNotFound
from leveret.model import (
    FAIR_KEY,
    LIMITS,
    MAX_LIMIT_KEY,
    MAX_LIMITS,
    DeclareLimits,
    LimitRow,
    LimitRule,
    LimitUse,
    PauseLimit,
    Queue,
    Rate,
    ResumeLimit,
    SetLimit,
    check_limit_name,
    checked_rule,
    limit_header,
)
from leveret.model.durations import show
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from leveret.client.client import Client
    from leveret.client.payload import Signature
    from leveret.model import LimitRef, LimitRequest, TaskOptions

_encode = msgspec.json.Encoder(order="sorted").encode


class Limit:
    """How many tasks may be under way, and how many may start in a time; ``App.limit`` makes it.

    Any number of tasks may have it, of any queues: ``@app.task(limits=[stripe])``. The broker keeps it, so it holds for
    all workers together, and what is changed here is in force within a second.
    """

    def __init__(self, name: str, rule: LimitRule, by: tuple[str, ...], client: Client) -> None:
        #: Its name, by which the command line and the dashboard know it.
        self.name = name
        #: What the code says of it.
        self.rule = rule
        #: The parameters whose arguments make the key; empty: it has no keys.
        self.by = by
        #: For Leveret itself: the way to the broker.
        self.client = client

    def __repr__(self) -> str:
        return f"<Limit {self.name}: {self.rule}{' by ' + ', '.join(self.by) if self.by else ''}>"

    async def set(self, *, concurrency: int | UnsetType | None = UNSET, rate: Rate | UnsetType | None = UNSET) -> None:
        """Put another rule in place of the code's, until `reset`: ``await stripe.set(concurrency=5)``.

        What is not given stays as it is in force. Tasks that are under way are finished; of a lower concurrency the
        next one is admitted when there is room.

        Args:
            concurrency: The most tasks under way. None: any number.
            rate: How many may start in a time. None: any number.

        Raises:
            ConfigurationError: Nothing is given, or a value is not what it must be.
            BrokerError: The broker cannot be reached or used.
        """
        if concurrency is UNSET and rate is UNSET:
            raise ConfigurationError(f"limit {self.name!r}: set() changes nothing; reset() brings back the code's")
        now = (await self.use()).row.rule
        rule = checked_rule(
            f"limit {self.name!r}",
            now.concurrency if concurrency is UNSET else concurrency,
            now.rate if rate is UNSET else rate,
        )
        await self._ask(SetLimit(self.name, rule))

    async def reset(self) -> None:
        """Have the code's rule in force again.

        Raises:
            BrokerError: The broker cannot be reached or used.
        """
        await self._ask(SetLimit(self.name, None))

    async def pause(self) -> None:
        """Admit nothing of it until it is resumed. Tasks that are under way are finished.

        Raises:
            BrokerError: The broker cannot be reached or used.
        """
        await self._ask(PauseLimit(self.name))

    async def resume(self) -> None:
        """End its pause, and what ``raise Limited(...)`` said of its keys.

        Raises:
            BrokerError: The broker cannot be reached or used.
        """
        await self._ask(ResumeLimit(self.name))

    async def use(self) -> LimitUse:
        """What it does now.

        Returns:
            How many tasks are ``admitted``, how many are ``waiting``, of how many ``keys``; ``row`` has the rule that
            is in force.

        Raises:
            BrokerError: The broker cannot be reached or used.
        """
        for one in await self.client.broker.limits.read():
            if one.row.name == self.name:
                return one
        return LimitUse(LimitRow(self.name, self.rule))

    async def _ask(self, request: LimitRequest) -> None:
        limits = self.client.broker.limits
        try:
            await limits.ask(request)
        except LimitNotFound:
            # No worker has declared it yet. Any that does is newer.
            await limits.ask(DeclareLimits(0.0, {self.name: self.rule}))
            await limits.ask(request)


#: What ``limits=`` may be.
LimitsGiven: TypeAlias = "Limit | Sequence[Limit]"


def limit_of(
    name: str, concurrency: int | None, rate: Rate | None, by: str | Sequence[str] | None, client: Client
) -> Limit:
    """Raises ConfigurationError."""
    check_limit_name(name)
    parameters = () if by is None else (by,) if isinstance(by, str) else by
    if not isinstance(parameters, (tuple, list)) or not all(one and isinstance(one, str) for one in parameters):
        raise ConfigurationError(f"limit {name!r}: by is {show(by)}; it must be the name of a parameter, as 'tenant'")
    return Limit(name, checked_rule(f"limit {name!r}", concurrency, rate), tuple(parameters), client)


def limits_of(given: object) -> tuple[Limit, ...]:
    """What ``limits=`` was given. Raises ConfigurationError."""
    every = given if isinstance(given, (list, tuple)) else [given]
    for one in every:
        if not isinstance(one, Limit):
            hint = f"what app.limit({one!r}, ...) returned" if isinstance(one, str) else "limits of app.limit(...)"
            raise ConfigurationError(f"limits has {show(one)}; give it a list of {hint}")
    limits = tuple(dict.fromkeys(every))
    if len(limits) > MAX_LIMITS:
        raise ConfigurationError(f"limits has {len(limits)} limits; a task has {MAX_LIMITS} at most")
    return limits


class Limiting(msgspec.Struct, frozen=True):
    """What a task waits for: its limits, and its turn in its queue; made by `limiting`."""

    limits: tuple[Limit, ...]
    #: The parameter that says for whom a task is.
    fair_by: str | None
    #: The headers, where no argument is in them.
    same: Mapping[str, str] | None

    def headers(
        self,
        signature: Signature,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        besides: Sequence[LimitRef] = (),
    ) -> Mapping[str, str]:
        """What one call's message says of them, and of those that it has ``besides``. Raises InvalidArguments."""
        if self.same is not None and not besides:
            return self.same
        found = {}
        if self.limits or besides:
            named = (
                (one.name, _key(signature.canonical(args, kwargs, one.by)) if one.by else "") for one in self.limits
            )
            found[LIMITS] = limit_header([*besides, *named])
        if self.fair_by is not None:
            found[FAIR_KEY] = _key(signature.canonical(args, kwargs, (self.fair_by,)))
        return found


def headers_of_step(
    limiting: Limiting, task: str, signature: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, str]:
    """What a step's message says of them; its first argument is the result of the step before.

    Raises ConfigurationError where that argument is asked for.
    """
    first = next(iter(signature.parameters), None)
    for limit in limiting.limits:
        if first in limit.by:
            raise ConfigurationError(
                f"limit {limit.name!r} is by {first!r}, which step {task!r} gets as the result of the step before; "
                "make it another parameter, or have a task without the limit enqueue it"
            )
    if limiting.fair_by == first:
        raise ConfigurationError(
            f"the queue of step {task!r} has fair_by={first!r}, which the step gets as the result of the step before; "
            "make it another parameter, or give the step another queue"
        )
    return limiting.headers(signature, (None, *args), kwargs)


def limiting(
    limits: tuple[Limit, ...],
    queue: Queue | None,
    task: str,
    signature: Signature,
    options: TaskOptions,
    client: object,
) -> Limiting | None:
    """What a task waits for; None: nothing. ``queue``: its queue, as the application has it.

    Raises ConfigurationError for a limit that the task cannot have.
    """
    fair_by = None if queue is None else queue.fair_by
    for limit in limits:
        if limit.client is not client:
            raise ConfigurationError(f"task {task!r}: limit {limit.name!r} is another application's")
        for name in limit.by:
            _check_parameter(name, task, signature, f"limit {limit.name!r} is by {name!r}")
    if fair_by is not None and queue is not None:
        _check_parameter(fair_by, task, signature, f"queue {queue.name!r} has fair_by={fair_by!r}")
    if options.acknowledge == "before":
        counted = [f"limit {limit.name!r}" for limit in limits if limit.rule.concurrency is not None]
        counted += [f"queue {queue.name!r}"] if queue is not None and queue.concurrency is not None else []
        if counted:
            raise ConfigurationError(
                f"task {task!r} has acknowledge='before', so the broker has forgotten it while it runs, and the "
                f"concurrency of {counted[0]} cannot count it; a rate can"
            )
    if not limits and fair_by is None:
        return None
    has_keys = fair_by is not None or any(limit.by for limit in limits)
    same = None if has_keys else {LIMITS: limit_header([(limit.name, "") for limit in limits])}
    return Limiting(limits, fair_by, same)


def _check_parameter(name: str, task: str, signature: Signature, why: str) -> None:
    if name not in signature.parameters:
        known = ", ".join(signature.parameters) or "none"
        hint = did_you_mean(name, signature.parameters) or f"; it has: {known}"
        raise ConfigurationError(f"{why}, and task {task!r} has no parameter {name!r}{hint}")


def _key(values: Sequence[Any]) -> str:
    """Text as it is, anything else as JSON; a long one by its hash."""
    value = values[0] if len(values) == 1 else values
    text = value if isinstance(value, str) else _encode(value).decode()
    encoded = text.encode()
    return text if len(encoded) <= MAX_LIMIT_KEY else hashlib.sha256(encoded).hexdigest()


def module_name(depth: int = 2) -> str:
    """Of the module that calls whoever calls this."""
    name = sys._getframe(depth).f_globals.get("__name__", "")  # noqa: SLF001 - documented
    return name if isinstance(name, str) else ""
