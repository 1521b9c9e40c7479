"""When a schedule's tasks are due: `cron` and `every`. Pure; the parsing of expressions is cronsim's.

The rules of the clock are here. An expression is read by the wall clock of a named zone:

- a time that does not exist, since the clocks are set forward, counts as the first moment after the gap, and several of
  one gap as one;
- a time that exists twice, since the clocks are set back, counts once, the first time;
- with ``*`` in the hour field it goes by elapsed time instead, as cronie does: each moment whose wall clock matches.
"""

from __future__ import annotations

import math
import zlib
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import msgspec

from leveret.errors import ConfigurationError
from leveret.model import arguments
from leveret.model.durations import MAX_DELAY, show, spell_seconds

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self
    from zoneinfo import ZoneInfo

#: What becomes of instants that have passed while no worker was there.
CatchUp: TypeAlias = Literal["latest", "none", "all"]
#: What becomes of an instant while a task of the one before is not finished.
Overlap: TypeAlias = Literal["skip", "allow", "one_waiting"]

#: An instant that is at most so late is on time, whatever ``catch_up`` says (seconds).
ON_TIME = 2.0
#: So many missed instants are made up for at once, at most.
MOST_CAUGHT_UP = 100
#: The shortest period (seconds).
SHORTEST = 1.0
#: What the fields are called that everybody knows by these names.
_MACROS = {
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
    "@monthly": "0 0 1 * *",
    "@weekly": "0 0 * * 0",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@hourly": "0 * * * *",
}
#: No clock is set back further than this, or twice within it (seconds).
_SET_BACK = 4 * 3_600
#: No clock is set forward further: some lands have skipped a day (seconds).
_SET_FORWARD = 25 * 3_600
#: How many instants are looked at to find the shortest gap between two.
_LOOKED_AT = 50


class Timing(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", omit_defaults=True):
    """When a schedule's tasks are due, and what becomes of those that were missed or would overlap."""

    jitter: float = 0.0
    catch_up: CatchUp = "latest"
    grace: float | None = None
    overlap: Overlap = "skip"
    #: Of the task, where the timing is given to its decorator.
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}

    def with_args(self, *args: Any, **kwargs: Any) -> Self:
        """The same, with arguments for the task: ``schedule=cron("0 7 * * *").with_args("morning")``.

        Args:
            *args: The task's arguments, checked as those of ``enqueue`` are.
            **kwargs: The same, by name.

        Returns:
            The timing with these arguments.
        """
        return msgspec.structs.replace(self, args=args, kwargs=kwargs)

    def without_args(self) -> Self:
        return msgspec.structs.replace(self, args=(), kwargs={}) if self.args or self.kwargs else self

    def after(self, moment: float) -> float | None:
        """The first instant after that moment (Unix time, seconds); None: there is none."""
        return next(self.instants(moment), None)

    def instants(self, after: float) -> Iterator[float]:
        """All instants after that moment, ascending (Unix times)."""
        raise NotImplementedError

    def due(self, name: str, instant: float) -> float:
        """When the task of an instant is enqueued: some of the jitter later, the same for everybody who asks."""
        if not self.jitter:
            return instant
        return instant + self.jitter * zlib.crc32(f"{name}@{instant:.3f}".encode()) / 2**32

    def check_jitter(self, shortest: float) -> None:
        """Raises ConfigurationError. ``shortest``: the shortest time between two instants (seconds)."""
        if self.jitter >= shortest:
            raise ConfigurationError(
                f"jitter is {spell_seconds(self.jitter)}, and two instants may be {spell_seconds(shortest)} apart: it "
                "must be less, or one task would overtake the next"
            )


class Every(Timing, frozen=True, tag="every"):
    """At a steady pace, counted from the beginning of 1970 in UTC, so that everybody counts alike."""

    #: Seconds.
    period: float

    def __str__(self) -> str:
        return f"every {spell_seconds(self.period).removeprefix('1 ')}"

    def instants(self, after: float) -> Iterator[float]:
        count = math.floor(after / self.period)
        while True:
            count += 1
            if count * self.period > after:  # a quotient may be rounded
                yield round(count * self.period, 3)


class Cron(Timing, frozen=True, tag="cron"):
    """By the wall clock of a zone."""

    expression: str
    tz: str = "UTC"

    def __str__(self) -> str:
        return f"{self.expression} ({self.tz})"

    def instants(self, after: float) -> Iterator[float]:
        zone = _zone(self.tz)
        start = math.floor(after)
        by_elapsed = _fields(self.expression)[-4].startswith("*")
        found = _elapsed(self.expression, start, zone) if by_elapsed else _wall(self.expression, start, zone)
        last = after
        for instant in found:
            if instant > last:
                yield float(instant)
                last = instant


def cron(
    expression: str,
    *,
    tz: str = "UTC",
    jitter: float | timedelta = 0.0,
    catch_up: CatchUp = "latest",
    grace: float | timedelta | None = None,
    overlap: Overlap = "skip",
) -> Cron:
    """When a schedule's tasks are due, by the wall clock: ``@app.task(schedule=cron("0 7 * * *", tz="Asia/Tokyo"))``.

    A time that does not exist in spring counts as the first moment after the gap. One that exists twice in autumn
    counts once, the first time. With ``*`` in the hour field it goes by elapsed time instead.

    Args:
        expression: Minute, hour, day of the month, month, day of the week, as in a crontab; six fields begin with the
            second. Or one of ``@hourly``, ``@daily``, ``@weekly``, ``@monthly``, ``@yearly``.
        tz: The time zone, as "Europe/Berlin".
        jitter: Each task is up to so much later than its instant (seconds, or a timedelta), by chance that is the same
            in every worker. Less than the shortest time between two instants.
        catch_up: What becomes of instants that passed while no worker was there. "latest": one task for all of them.
            "none": they are left out. "all": a task for each, at most 100.
        grace: How late an instant may be made up for (seconds, or a timedelta). None: as late as it may be; with
            ``catch_up="none"`` not at all.
        overlap: What becomes of an instant while the task of an earlier one is not finished. "skip": it is left out.
            "allow": both run. "one_waiting": one waits while the other runs, and more are left out.

    Returns:
        The timing.

    Raises:
        ConfigurationError: The expression cannot be read or never comes, the zone is not known, or another argument is
            not what it must be.
    """
    _zone(tz)
    _check_expression(expression)
    found = Cron(expression=expression, tz=tz, **_checked(jitter, catch_up, grace, overlap))
    instants = list(islice(found.instants(_SOME_DAY), _LOOKED_AT))
    if not instants:
        raise ConfigurationError(f"cron {expression!r} never comes: no day of fifty years is in all of its fields")
    gaps = [later - earlier for earlier, later in pairwise(instants)]
    found.check_jitter(min(gaps, default=MAX_DELAY))
    return found


def every(
    period: float | timedelta | None = None,
    *,
    seconds: float = 0.0,
    minutes: float = 0.0,
    hours: float = 0.0,
    days: float = 0.0,
    jitter: float | timedelta = 0.0,
    catch_up: CatchUp = "latest",
    grace: float | timedelta | None = None,
    overlap: Overlap = "skip",
) -> Every:
    """When a schedule's tasks are due, at a steady pace: ``@app.task(schedule=every(minutes=5, jitter=20))``.

    It is counted from the beginning of 1970 in UTC, so that all workers count alike: ``every(hours=1)`` is each full
    hour of UTC. It goes by elapsed time, and knows no time zones.

    Args:
        period: Seconds, or a timedelta, in place of the four that follow; at least a second.
        seconds: The seconds of the period; it is the sum of these four.
        minutes: The minutes of the period.
        hours: The hours of the period.
        days: The days of the period, of 24 hours each.
        jitter: As with ``cron``; less than the period.
        catch_up: As with ``cron``.
        grace: As with ``cron``.
        overlap: As with ``cron``.

    Returns:
        The timing.

    Raises:
        ConfigurationError: The period is shorter than a second or longer than a year, or another argument is not what
            it must be.
    """
    parts = {"seconds": seconds, "minutes": minutes, "hours": hours, "days": days}
    given = [name for name, value in parts.items() if value != 0.0]
    if period is None and not given:
        raise ConfigurationError("every() needs a period: every(minutes=5), or every(300)")
    if period is not None and given:
        raise ConfigurationError(f"every({show(period)}, {given[0]}=...) says the period twice: give one of them")
    if period is None:
        try:
            period = timedelta(**parts).total_seconds()
        except (TypeError, OverflowError) as error:
            raise ConfigurationError(f"every() has a period that is none: {error}") from error
    length = arguments.seconds("every", period, above_zero=True, most=MAX_DELAY)
    if length < SHORTEST:
        raise ConfigurationError(
            f"every is {spell_seconds(length)}; it must be at least {SHORTEST:g} second: let one task do more"
        )
    found = Every(period=length, **_checked(jitter, catch_up, grace, overlap))
    found.check_jitter(length)
    return found


def _checked(jitter: object, catch_up: object, grace: object, overlap: object) -> dict[str, Any]:
    """What both have. Raises ConfigurationError."""
    for argument, value, known in (
        ("catch_up", catch_up, get_args(CatchUp)),
        ("overlap", overlap, get_args(Overlap)),
    ):
        if value not in known:
            raise ConfigurationError(f"{argument} is {show(value)}; it must be one of {', '.join(map(repr, known))}")
    return {
        "jitter": arguments.seconds("jitter", jitter, most=MAX_DELAY),
        "grace": arguments.seconds_or_none("grace", grace, none="as late as it may be", most=MAX_DELAY),
        "catch_up": catch_up,
        "overlap": overlap,
    }


def moment_text(instant: float) -> str:
    """An instant in an id: ``20260329T010000Z``, with milliseconds where it has some."""
    found = datetime.fromtimestamp(instant, UTC)
    thousandths = round(instant * 1000) % 1000
    return f"{found:%Y%m%dT%H%M%S}{f'.{thousandths:03d}' if thousandths else ''}Z"


#: Where the shortest gap of an expression is looked for: any day does, and the same one gives the same answer.
_SOME_DAY = 1_767_225_600.0


def _fields(expression: str) -> list[str]:
    return _MACROS.get(expression.strip().lower(), expression).upper().split()


def _check_expression(expression: object) -> None:
    if not isinstance(expression, str):
        raise ConfigurationError(f"cron is {show(expression)}; it must be text, as '30 2 * * *'")
    fields = _fields(expression)
    if len(fields) == 1 and fields[0].startswith("@"):
        raise ConfigurationError(f"cron {expression!r} is not known; there are {', '.join(_MACROS)}")
    if len(fields) not in (5, 6):
        raise ConfigurationError(
            f"cron {expression!r} has {len(fields)} fields; it must have five (minute, hour, day of the month, month, "
            "day of the week), or six with the second before them"
        )
    from cronsim import CronSimError

    try:
        _naive(expression, datetime(2026, 1, 1))  # noqa: DTZ001 - a wall clock's
    except CronSimError as error:
        raise ConfigurationError(
            f"cron {expression!r} cannot be read: {str(error).lower()} field; as '30 2 * * *' (at 02:30), "
            "'*/5 * * * *' (each five minutes), '0 9 * * mon-fri'"
        ) from error
    except (AssertionError, ValueError, RecursionError, TypeError) as error:
        raise ConfigurationError(f"cron {expression!r} cannot be read; as '30 2 * * *' (at 02:30)") from error


@lru_cache(maxsize=1024)
def _zone(name: str) -> ZoneInfo:
    from zoneinfo import ZoneInfo

    try:
        return ZoneInfo(name)
    except Exception as error:
        raise ConfigurationError(
            f"tz is {show(name)}, which is no time zone that this system knows, as 'Europe/Berlin'; a system without "
            "any has them after 'pip install tzdata'"
        ) from error


def _naive(expression: str, start: datetime) -> Iterator[datetime]:
    """What the wall clock shows when the expression matches, after ``start``, as if no clock was ever set."""
    from cronsim import CronSim

    return iter(CronSim(" ".join(_fields(expression)), start))


def _offset(at: int, zone: ZoneInfo) -> timedelta:
    return datetime.fromtimestamp(at, zone).utcoffset() or timedelta()


def _unix(naive: datetime, zone: ZoneInfo, fold: int) -> int:
    return int(naive.replace(tzinfo=zone, fold=fold).timestamp())


def _wall_clock(at: int, zone: ZoneInfo) -> datetime:
    return datetime.fromtimestamp(at, zone).replace(tzinfo=None, fold=0)


def _change(before: int, after: int, zone: ZoneInfo) -> int:
    """The first moment at which the clock goes as it does at ``after``; it is set once between the two."""
    old = _offset(before, zone)
    while after - before > 1:
        middle = (before + after) // 2
        if _offset(middle, zone) == old:
            before = middle
        else:
            after = middle
    return after


def _wall(expression: str, start: int, zone: ZoneInfo) -> Iterator[int]:
    """Each time of the wall clock once; several in one gap are the same moment, which the caller takes once."""
    for naive in _naive(expression, _wall_clock(start, zone)):
        moment = _unix(naive, zone, 0)
        if _wall_clock(moment, zone) != naive:  # it is in a gap
            moment = _change(moment - _SET_FORWARD, moment, zone)
        yield moment


def _elapsed(expression: str, start: int, zone: ZoneInfo) -> Iterator[int]:
    """Each moment whose wall clock matches: none in a gap, and both of a time that exists twice."""
    at = start
    while True:
        found = _next_elapsed(expression, at, zone)
        if found is None:
            return
        yield found
        at = found


def _next_elapsed(expression: str, at: int, zone: ZoneInfo) -> int | None:
    if _offset(at + _SET_BACK, zone) < _offset(at, zone):
        # What the wall clock has shown already it soon shows again.
        back = _change(at, at + _SET_BACK, zone)
        naive = next(_naive(expression, _wall_clock(at, zone)), None)
        moment = None if naive is None else at + round((naive - _wall_clock(at, zone)).total_seconds())
        if moment is not None and moment < back:
            return moment
        return _first_at(expression, _wall_clock(back, zone) - timedelta(seconds=1), back - 1, zone)
    return _first_at(expression, _wall_clock(at, zone), at, zone)


def _first_at(expression: str, wall_clock: datetime, after: int, zone: ZoneInfo) -> int | None:
    for naive in _naive(expression, wall_clock):
        for fold in (0, 1):
            moment = _unix(naive, zone, fold)
            if moment > after and _wall_clock(moment, zone) == naive:
                return moment
    return None
