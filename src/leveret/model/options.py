"""A task's options: one value from its decorator to the child that runs it, and what one enqueue says in their place.

What an enqueue says travels in the message, as headers, so that every copy keeps it and every worker reads it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.arguments import count, flag, seconds, seconds_or_none
from leveret.model.bounds import number, unix_time
from leveret.model.durations import MAX_DELAY, show
from leveret.model.limits import FAIR_KEY, LIMITS
from leveret.model.messages import DEFAULT_QUEUE, Envelope, Queue, check_priority
from leveret.model.names import fits
from leveret.model.retry import RetryPolicy, RetryRules
from leveret.model.text import shorten

Acknowledge: TypeAlias = Literal["after", "before"]
#: The types of a header's value.
Header: TypeAlias = str | int | float | bool | None

#: The longest timeout that a message may carry, a hundred years (seconds).
MAX_TIMEOUT = 100 * MAX_DELAY
#: All headers of an enqueue together (bytes, as msgpack): a copy's headers and errors share one AMQP frame with them.
MAX_HEADERS = 32 * 1024
_PREFIX = "leveret-"
#: The header of a task's unique key: every copy keeps it, so that whoever ends the task can free it.
UNIQUE_KEY = f"{_PREFIX}unique-key"
#: For how long a task has it from its enqueueing on, in whole milliseconds, whatever becomes of the task.
UNIQUE_FOR = f"{_PREFIX}unique-for"
#: "waiting": a task has its key until a worker has taken it, and no longer.
UNIQUE_SCOPE = f"{_PREFIX}unique-scope"
#: "replace": a later call with the key may give the task its arguments.
UNIQUE_CONFLICT = f"{_PREFIX}unique-conflict"
#: Later than that no such call moves it: Unix time in whole milliseconds.
UNIQUE_LATEST = f"{_PREFIX}unique-latest"
#: The longest of them (bytes).
MAX_UNIQUE_KEY = 255
#: Of a task whose id its producer chose: what tells this enqueue from another one with the same id.
ID_TOKEN = f"{_PREFIX}id-token"
#: For how long such an id is taken from the enqueueing on, in whole milliseconds, though its task has ended.
ID_FOR = f"{_PREFIX}id-for"
#: The steps that follow a task, as JSON; the id of its chain, and its number there: `leveret.model.chains`.
STEPS = f"{_PREFIX}steps"
FLOW = f"{_PREFIX}flow"
STEP = f"{_PREFIX}step"
#: How much of a wrong value a reason shows (characters).
_MAX_SHOWN = 100
_ACKNOWLEDGE = ("after", "before")
_LARGEST, _SMALLEST = 2**63 - 1, -(2**63)
#: RabbitMQ delivers a message to the queues that these name, too.
_ROUTES = ("CC", "BCC")


class TaskOptions(msgspec.Struct, frozen=True, omit_defaults=True):
    """What ``@app.task`` says of a task. See `leveret.App.task`, which documents each."""

    queue: str = DEFAULT_QUEUE
    acknowledge: Acknowledge = "after"
    max_attempts: int | None = 5
    backoff: float = 15.0
    max_backoff: float = 600.0
    #: Seconds that an attempt may run; None: no limit.
    timeout: float | None = None
    priority: int | None = None
    #: Whether what becomes of it, and what it returns, is kept for those who ask.
    store_result: bool = True
    # Only the process that raised an exception can judge it, so a worker gets none of these: see `for_worker`.
    retry_on: tuple[type[BaseException], ...] | None = None
    give_up_on: tuple[type[BaseException], ...] = ()
    retry: Callable[[int, BaseException], float | timedelta | None] | None = None

    def __post_init__(self) -> None:
        Queue(self.queue)  # whose name is checked there
        check_priority(self.priority)
        if self.acknowledge not in _ACKNOWLEDGE:
            raise ConfigurationError(f"acknowledge is {self.acknowledge!r}; it must be 'after' or 'before' the run")
        flag("store_result", self.store_result)
        rules = self.rules
        checked = {
            "timeout": seconds_or_none("timeout", self.timeout, above_zero=True, none="no limit"),
            "max_attempts": rules.policy.max_attempts,
            "backoff": rules.policy.backoff,
            "max_backoff": rules.policy.max_backoff,
            "retry_on": rules.retry_on,
            "give_up_on": rules.give_up_on,
        }
        for name, value in checked.items():
            msgspec.structs.force_setattr(self, name, value)

    @property
    def policy(self) -> RetryPolicy:
        """How often it is tried, for those who know no more than that an attempt failed."""
        return RetryPolicy(self.max_attempts, self.backoff, self.max_backoff)

    @property
    def rules(self) -> RetryRules:
        """How often it is tried, for those who have the exception."""
        return RetryRules(self.policy, self.retry_on, self.give_up_on, self.retry)

    def for_worker(self) -> TaskOptions:
        """The options without what cannot leave the process that has the task's code."""
        return msgspec.structs.replace(self, retry_on=None, give_up_on=(), retry=None)

    def for_message(self, headers: Mapping[str, Any]) -> TaskOptions:
        """The options with what a message says in their place."""
        found = overrides_in(headers)
        return msgspec.structs.replace(self, **found) if found else self


class _Override(NamedTuple):
    """An option that one enqueue may set."""

    #: Called with the option's name and a value; raises ConfigurationError.
    check: Callable[[str, Any], Any]
    #: To and from the header's value; None: it cannot be read.
    write: Callable[[Any], Any]
    read: Callable[[object], Any]
    #: What its header must be.
    wanted: str


def _milliseconds(value: float) -> int:
    return math.ceil(value * 1000)


def _seconds(value: object) -> float | None:
    found = number(value)
    return None if found is None else float(found) / 1000


def _whole(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and found == int(found) else None


def _truth(value: object) -> bool | None:
    return {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value  # type: ignore[return-value]


#: By the name of a field of `TaskOptions`. The header has the same name, with dashes, behind `_PREFIX`.
_OVERRIDES = {
    "timeout": _Override(
        partial(seconds, above_zero=True, most=MAX_TIMEOUT),
        _milliseconds,
        _seconds,
        "milliseconds, more than 0 and at most a hundred years (an AMQP integer, or decimal text)",
    ),
    "max_attempts": _Override(
        count, int, _whole, "a whole number from 1 to 2147483647 (an AMQP integer, or decimal text)"
    ),
    "store_result": _Override(flag, bool, _truth, "an AMQP boolean, or the text 'true' or 'false'"),
}
#: What a schedule says in a message; `leveret.model.schedules` writes and reads it.
_SCHEDULED = (_PREFIX + "schedule", _PREFIX + "scheduled-for")
_HEADERS = {_PREFIX + name.replace("_", "-"): name for name in _OVERRIDES}
#: Those that are not the producer's own.
_UNIQUE = (UNIQUE_KEY, UNIQUE_FOR, UNIQUE_SCOPE, UNIQUE_CONFLICT, UNIQUE_LATEST)
#: What a task keeps when a later call gives it other arguments.
_KEPT = (*_UNIQUE, ID_TOKEN, ID_FOR, LIMITS, FAIR_KEY)
_CHAINED = (STEPS, FLOW, STEP)
_OURS = frozenset({*_HEADERS, *_SCHEDULED, *_KEPT, *_CHAINED})


def check_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What one enqueue says in place of its task's options, without what is None. Raises ConfigurationError."""
    return {name: _OVERRIDES[name].check(name, value) for name, value in given.items() if value is not None}


def carrying(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that carry overrides."""
    return {header: _OVERRIDES[name].write(overrides[name]) for header, name in _HEADERS.items() if name in overrides}


def overrides_in(headers: Mapping[str, Any]) -> dict[str, Any]:
    """What a message says in place of its task's options; a header that `wrong_headers` names says nothing."""
    return _carried(headers)[0] if headers else {}


def wrong_headers(headers: Mapping[str, Any]) -> str:
    """Why a message cannot run: what is wrong with the headers that carry options; empty if nothing is."""
    return _carried(headers)[1] if headers else ""


def own_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    """The headers that are the producer's own."""
    return {name: value for name, value in headers.items() if name not in _OURS}


def unique_key(headers: Mapping[str, Any]) -> str | None:
    """The unique key that a message carries; None: it has none, or one that nobody could have claimed."""
    key = headers.get(UNIQUE_KEY)
    return key if isinstance(key, str) and fits(key, MAX_UNIQUE_KEY) else None


def unique_for(headers: Mapping[str, Any]) -> float | None:
    """For how long a task has its unique key, whatever becomes of it (seconds); None: until it has ended."""
    return _period(headers.get(UNIQUE_FOR))


def id_token(headers: Mapping[str, Any]) -> str | None:
    """What tells a task from another one with the same id, if its producer chose the id; None: nobody minds it."""
    token = headers.get(ID_TOKEN)
    return token if isinstance(token, str) and fits(token, MAX_UNIQUE_KEY) else None


def id_for(headers: Mapping[str, Any]) -> float | None:
    """For how long an id is taken though its task has ended (seconds); None: no longer than the task is there."""
    return _period(headers.get(ID_FOR))


def id_key(id_: str) -> str:
    """The key that stands for an id that its producer chose, beside the unique keys."""
    key = f"id={id_}"
    return key if fits(key, MAX_UNIQUE_KEY) else f"id={hashlib.sha256(id_.encode()).hexdigest()}"


def _period(value: object) -> float | None:
    found = number(value)
    return None if found is None or not 0 < found <= MAX_TIMEOUT * 1000 else float(found) / 1000


def waiting_key(headers: Mapping[str, Any]) -> str | None:
    """The unique key that is free when a worker has taken the task."""
    return freed_key(headers) if headers.get(UNIQUE_SCOPE) == "waiting" else None


def freed_key(headers: Mapping[str, Any]) -> str | None:
    """The unique key that the end of a task frees."""
    return None if UNIQUE_FOR in headers and unique_for(headers) is not None else unique_key(headers)


def is_replaceable(headers: Mapping[str, Any]) -> bool:
    """Whether a later call with its unique key may give a task its arguments."""
    return headers.get(UNIQUE_CONFLICT) == "replace" and freed_key(headers) is not None


def may_replace(held: Envelope, by: Envelope) -> bool:
    """Whether a later call may give that task its arguments: an own id that both have is not enough."""
    return is_replaceable(held.headers) and unique_key(held.headers) == unique_key(by.headers)


def latest_due(headers: Mapping[str, Any]) -> float | None:
    """Beyond which no later call moves a task (Unix time); None: as far as it says."""
    return unix_time(_seconds(headers.get(UNIQUE_LATEST)))


def replaced(held: Envelope, by: Envelope) -> Envelope:
    """A task with the arguments of a later call. It stays the same one, in its place, unless the call is delayed; and
    waits for the limits that it has waited for.
    """
    mine = {name: value for name, value in held.headers.items() if name in _KEPT}
    theirs = {name: value for name, value in by.headers.items() if name not in _KEPT}
    return msgspec.structs.replace(
        held,
        body=by.body,
        content_type=by.content_type,
        expires_at=by.expires_at,
        headers=theirs | mine,
        due=moved(held.due, by.due, latest_due(held.headers)),
    )


def moved(due: float | None, wanted: float | None, latest: float | None) -> float | None:
    """When a task is due that a later call wants to be due then; None: that call does not mind."""
    if wanted is None:
        return due
    return wanted if latest is None else min(wanted, latest)


def check_headers(given: object, before: Mapping[str, Any] | None = None) -> dict[str, Header]:
    """The headers of one enqueue. Raises ConfigurationError for a name or a value that no broker could carry.

    ``before``: the headers that it has already. Those that are Leveret's must stay.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(f"headers is {show(given)}; it must be a dict, as headers={{'tenant': 'acme'}}")
    known = before or {}
    for name, value in given.items():
        if name not in known or known[name] != value:
            _check_name(name)
            _check_value(name, value)
    for name in known:
        if name in _OURS and name not in given:
            raise ConfigurationError(f"headers is without {show(name)}, which carries an option of the task: keep it")
    headers = dict(given)
    size = len(msgspec.msgpack.encode(headers))
    if size > MAX_HEADERS:
        largest = max(headers, key=lambda name: len(msgspec.msgpack.encode(headers[name])))
        raise ConfigurationError(
            f"headers are {size} bytes, over the limit of {MAX_HEADERS}; the largest is {show(largest)}: "
            "large values belong in the task's arguments"
        )
    return headers


def _check_name(name: object) -> None:
    if type(name) is not str or not fits(name, 255):
        raise ConfigurationError(f"headers has the name {show(name)}; it must be text of 1 to 255 bytes")
    if name.lower().startswith((_PREFIX, "x-")) or name in _ROUTES:
        raise ConfigurationError(
            f"headers has the name {show(name)}; names that begin with 'leveret-' or 'x-' and the names CC and BCC are "
            "Leveret's and the broker's: choose another one"
        )


def _check_value(name: str, value: object) -> None:
    if value is None or type(value) is bool:
        return
    if type(value) is int and _SMALLEST <= value <= _LARGEST:
        return
    if type(value) is float and math.isfinite(value):
        return
    if type(value) is str and (not value or fits(value, MAX_HEADERS)):
        return
    raise ConfigurationError(
        f"headers[{show(name)}] is {show(value)}; it must be text (at most {MAX_HEADERS} bytes), a whole number of 64 "
        "bits, a finite float, True, False or None"
    )


def _carried(headers: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """What a message says in place of its task's options, and what is wrong with it."""
    found: dict[str, Any] = {}
    wrong: list[str] = []
    for header, name in _HEADERS.items():
        override, value = _OVERRIDES[name], headers.get(header)
        if value is None:
            continue
        try:
            found[name] = override.check(name, override.read(value))
        except ConfigurationError:
            wrong.append(f"its header {header} is {shorten(repr(value), _MAX_SHOWN)}: it must be {override.wanted}")
    return found, "; ".join(wrong)
