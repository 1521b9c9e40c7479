"""Limits: how many tasks may be under way, and how many may start in a time. Values, and the pure rules.

A task names its limits in its headers, each with a key: `limit_refs`. It waits until all of them let it go, and is then
*admitted*: it has a permit of each until it has ended, is to be tried again, or is put off.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.arguments import count, seconds
from leveret.model.bounds import LATEST, decoded
from leveret.model.durations import MAX_DELAY, show, spell_seconds
from leveret.model.names import fits

if TYPE_CHECKING:
    from datetime import timedelta

#: A limit's name, and the key that parts it (a tenant, an account); "" for a limit without keys.
LimitRef: TypeAlias = tuple[str, str]

LimitState: TypeAlias = Literal["active", "paused", "resting"]

#: The header that names a task's limits, as JSON: `[["stripe", ""], ["tenant", "acme"]]`.
LIMITS = "leveret-limits"
#: The header that says for whom a task is, in a queue that serves several in turn.
FAIR_KEY = "leveret-fair"
#: The longest name and key of a limit (bytes).
MAX_LIMIT_NAME = 128
MAX_LIMIT_KEY = 255
#: The most limits of one task.
MAX_LIMITS = 8
#: The limit of a whole queue has this and the queue's name.
_QUEUE = "queue:"
#: The limit of tasks that never run beside one with the same unique key: every broker has it, with that key.
RERUN = "unique:rerun"
_decode_refs = msgspec.json.Decoder(list[tuple[str, str]]).decode
_encode = msgspec.json.Encoder().encode


class Rate(msgspec.Struct, frozen=True):
    """So many starts in so much time: ``Rate(100, per=60)``.

    Starts are spread evenly, one every ``per / count`` seconds, and after a pause up to ``burst`` come at once. So no
    stretch of ``per`` seconds has more than ``count + burst - 1`` starts; with ``burst=1`` none has more than
    ``count``.

    Args:
        count: How many.
        per: In which time (seconds, or a timedelta).
        burst: How many may start at once when none has started lately. None: a twentieth of ``count``, at least 1.

    Raises:
        ConfigurationError: A value is not what it must be.
    """

    count: int
    per: float = 1.0
    burst: int | None = None

    if TYPE_CHECKING:

        def __init__(self, count: int, per: float | timedelta = 1.0, burst: int | None = None) -> None: ...

    def __post_init__(self) -> None:
        number = count("Rate: count", self.count)
        burst = max(1, number // 20) if self.burst is None else count("Rate: burst", self.burst, none="a twentieth")
        for name, value in (
            ("count", number),
            ("per", seconds("Rate: per", self.per, above_zero=True, most=MAX_DELAY)),
            ("burst", burst),
        ):
            msgspec.structs.force_setattr(self, name, value)

    def __str__(self) -> str:
        per = {1.0: "second", 60.0: "minute", 3_600.0: "hour", 86_400.0: "day"}.get(self.per)
        return f"{self.count}/{per or spell_seconds(self.per)}"

    @property
    def interval(self) -> float:
        """From one start to the next, in the long run (seconds)."""
        return self.per / self.count

    def may_start_at(self, full_at: float) -> float:
        """When the next one may start (Unix time). ``full_at``: see `started`."""
        return full_at - ((self.burst or 1) - 1) * self.interval

    def started(self, full_at: float, now: float) -> float:
        """When a whole burst may start again, now that one has started. 0: none has for long."""
        return max(full_at, now) + self.interval

    def spent(self, now: float) -> float:
        """As `started` after a whole burst: for whoever does not know what has started lately."""
        return now + (self.burst or 1) * self.interval


class LimitRule(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a limit allows: of each key, if it has keys."""

    #: The most tasks that are admitted and have not ended; None: any number.
    concurrency: int | None = None
    rate: Rate | None = None

    def __str__(self) -> str:
        parts = [] if self.concurrency is None else [f"{self.concurrency} at once"]
        return ", ".join([*parts, *([] if self.rate is None else [str(self.rate)])]) or "no limit"


class LimitRow(msgspec.Struct, frozen=True, omit_defaults=True):
    """A limit as a broker keeps it."""

    name: str
    #: What the application's code says.
    declared: LimitRule
    #: What an operator has set in its place.
    changed: LimitRule | None = None
    #: Nothing is admitted.
    paused: bool = False
    #: Keys of which nothing is admitted until then (Unix time).
    resting: dict[str, float] = {}
    #: When the program that declared it began (Unix time): of two that differ the newer is right.
    started: float = 0.0

    @property
    def rule(self) -> LimitRule:
        """What is in force."""
        return self.declared if self.changed is None else self.changed

    def rest(self, now: float) -> Mapping[str, float]:
        """The keys that rest, and until when (Unix time)."""
        return {key: until for key, until in self.resting.items() if until > now}

    def state(self, now: float) -> LimitState:
        """In one word, for people. resting: keys of it do."""
        return "paused" if self.paused else "resting" if self.rest(now) else "active"

    def held_until(self, key: str, admitted: int, full_at: float, now: float) -> float | None:
        """Until when it has no room for a key (Unix time; 0: that does not depend on the time); None: it has room.

        ``full_at``: see `Rate.started`.
        """
        rule = self.rule
        if self.paused or (rule.concurrency is not None and admitted >= rule.concurrency):
            return 0.0
        until = self.rests_until(key, now)
        if rule.rate is not None and (start := rule.rate.may_start_at(full_at)) > now:
            return max(start, until or 0.0)
        return until

    def rests_until(self, key: str, now: float) -> float | None:
        """Until when nothing of a key is admitted (Unix time); None: it does not rest."""
        until = self.resting.get(key)
        return until if until is not None and until > now else None


#: Limits that are in force though nobody has declared them.
BUILT_IN: Mapping[str, LimitRow] = {RERUN: LimitRow(RERUN, LimitRule(concurrency=1))}


class LimitUse(msgspec.Struct, frozen=True):
    """A limit, and what it does now."""

    row: LimitRow
    #: Tasks that have a permit of it, and that wait for one; of all its keys.
    admitted: int = 0
    waiting: int = 0
    #: How many of its keys have such tasks.
    keys: int = 0


class DeclareLimits(msgspec.Struct, frozen=True, tag=True):
    """An application's code has these limits, and these queues have tasks of them."""

    #: When the program that says so began (Unix time, seconds).
    started: float
    rules: dict[str, LimitRule]
    queues: Sequence[str] = ()


class SetLimit(msgspec.Struct, frozen=True, tag=True):
    """An operator's rule in place of the code's; None: the code's again."""

    name: str
    rule: LimitRule | None


class PauseLimit(msgspec.Struct, frozen=True, tag=True):
    """Nothing of it is admitted until it is resumed."""

    name: str


class ResumeLimit(msgspec.Struct, frozen=True, tag=True):
    """Tasks are admitted again, of the keys that rest too."""

    name: str


class RestLimit(msgspec.Struct, frozen=True, tag=True):
    """Nothing of a key is admitted until then (Unix time)."""

    name: str
    key: str
    until: float


class RemoveLimit(msgspec.Struct, frozen=True, tag=True):
    """The limit goes: what waits for it is admitted."""

    name: str


LimitRequest: TypeAlias = DeclareLimits | SetLimit | PauseLimit | ResumeLimit | RestLimit | RemoveLimit


def limits_after(
    request: LimitRequest, rows: Mapping[str, LimitRow], now: float
) -> Mapping[str, LimitRow | None] | None:
    """The rows that a request changes (None: it goes). None: there is no limit of that name.

    ``rows``: those that it names.
    """
    if isinstance(request, DeclareLimits):
        fresh = {name: _declared(rows.get(name), name, rule, request.started) for name, rule in request.rules.items()}
        return {name: row for name, row in fresh.items() if row != rows.get(name)}
    row = rows.get(request.name)
    if row is None:
        return None
    return {request.name: _changed(request, row, now)}


def _declared(row: LimitRow | None, name: str, rule: LimitRule, started: float) -> LimitRow:
    if row is None:
        return LimitRow(name, rule, started=started)
    if started < row.started:
        return row
    return msgspec.structs.replace(row, declared=rule, started=started)


def _changed(
    request: SetLimit | PauseLimit | ResumeLimit | RestLimit | RemoveLimit, row: LimitRow, now: float
) -> LimitRow | None:
    replace = msgspec.structs.replace
    match request:
        case SetLimit(_, rule):
            return replace(row, changed=rule)
        case PauseLimit():
            return replace(row, paused=True)
        case ResumeLimit():
            return replace(row, paused=False, resting={})
        case RestLimit(_, key, until):
            resting = {one: end for one, end in row.resting.items() if end > now}
            resting[key] = max(until, resting.get(key, 0.0))
            return replace(row, resting=resting)
        case RemoveLimit():
            return None


def limit_refs(headers: Mapping[str, Any]) -> tuple[LimitRef, ...]:
    """The limits that a message names; what is no such list names none."""
    given = headers.get(LIMITS)
    found = decoded(_decode_refs, given) if isinstance(given, str) else None
    if not found:
        return ()
    refs = [(name, key) for name, key in found if fits(name, MAX_LIMIT_NAME) and len(key.encode()) <= MAX_LIMIT_KEY]
    return tuple(dict.fromkeys(refs[:MAX_LIMITS]))


def is_limited(headers: Mapping[str, Any]) -> bool:
    """Whether a message says that its task waits for its turn, whatever its queue says."""
    return FAIR_KEY in headers or LIMITS in headers


def limit_header(refs: Sequence[LimitRef]) -> str:
    """What names limits in a message."""
    return _encode(refs).decode()


def fair_key(headers: Mapping[str, Any]) -> str | None:
    """For whom a message is, in a queue that serves several in turn."""
    key = headers.get(FAIR_KEY)
    return key if isinstance(key, str) and len(key.encode(errors="replace")) <= MAX_LIMIT_KEY else None


def queue_limit(queue: str) -> str:
    """The name of the limit of a whole queue."""
    return f"{_QUEUE}{queue}"


def check_limit_name(name: object) -> None:
    """Raises ConfigurationError for a name that no limit of an application's own may have."""
    if not isinstance(name, str) or not name.isprintable() or not fits(name, MAX_LIMIT_NAME) or _QUEUE in name:
        raise ConfigurationError(
            f"limit name {show(name)} must be printable text of 1 to {MAX_LIMIT_NAME} bytes, without {_QUEUE!r}, which "
            "names the limits of queues"
        )
    if name in BUILT_IN:
        raise ConfigurationError(f"limit name {name!r} is Leveret's own: it is what on_conflict='rerun' rests on")


def checked_rule(what: str, concurrency: object, rate: object) -> LimitRule:
    """What a limit allows. Raises ConfigurationError, which begins with ``what``."""
    if rate is not None and not isinstance(rate, Rate):
        raise ConfigurationError(f"{what}: rate is {show(rate)}; it must be a Rate, as Rate(100, per=60)")
    number = None if concurrency is None else count(f"{what}: concurrency", concurrency, none="any number")
    return LimitRule(number, rate)


#: A time that never comes (Unix time).
NEVER = LATEST
