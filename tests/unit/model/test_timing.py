"""When schedules are due: the rules of the wall clock, against an oracle that looks at each minute."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import islice, pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple
from zoneinfo import ZoneInfo, available_timezones

import pytest

from leveret import ConfigurationError, cron, every
from leveret.model.timing import moment_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from leveret.model import Timing

BERLIN = "Europe/Berlin"
FIRST, LAST = datetime(2024, 1, 1, tzinfo=UTC), datetime(2028, 1, 1, tzinfo=UTC)


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


def following(timing: Timing, start: str, count: int) -> list[str]:
    found = islice(timing.instants(at(start)), count)
    return [f"{datetime.fromtimestamp(one, UTC):%m-%d %H:%M:%S}" for one in found]


# By name


def test_a_time_in_a_gap_counts_as_the_first_moment_after_it() -> None:
    nightly = cron("30 2 * * *", tz=BERLIN)
    assert following(nightly, "2026-03-28T00:00", 3) == ["03-28 01:30:00", "03-29 01:00:00", "03-30 00:30:00"]


def test_many_times_in_a_gap_count_once() -> None:
    often = cron("*/20 2 * * *", tz=BERLIN)
    assert following(often, "2026-03-29T00:00", 2) == ["03-29 01:00:00", "03-30 00:00:00"]


def test_a_time_that_exists_twice_counts_the_first_time() -> None:
    nightly = cron("30 2 * * *", tz=BERLIN)
    assert following(nightly, "2026-10-24T12:00", 2) == ["10-25 00:30:00", "10-26 01:30:00"]
    # Asked in the hour that comes again, it does not come again.
    assert following(nightly, "2026-10-25T01:10", 1) == ["10-26 01:30:00"]


def test_with_a_star_in_the_hour_it_goes_by_elapsed_time() -> None:
    hourly = cron("0 * * * *", tz=BERLIN)
    assert following(hourly, "2026-10-24T23:30", 4) == [f"10-25 0{hour}:00:00" for hour in range(4)]
    assert following(hourly, "2026-03-28T23:30", 4) == [f"03-29 0{hour}:00:00" for hour in range(4)]
    every_other = cron("0 */2 * * *", tz=BERLIN)
    assert following(every_other, "2026-10-24T23:30", 3) == ["10-25 00:00:00", "10-25 01:00:00", "10-25 03:00:00"]


def test_a_zone_that_skipped_a_day() -> None:
    assert following(cron("0 12 30 12 *", tz="Pacific/Apia"), "2011-12-01T00:00", 1) == ["12-30 10:00:00"]


def test_seconds_names_and_macros() -> None:
    assert following(cron("*/15 * * * * *"), "2026-01-01T00:00", 2) == ["01-01 00:00:15", "01-01 00:00:30"]
    assert following(cron("0 9 * jan MON-fri"), "2026-01-02T10:00", 1) == ["01-05 09:00:00"]
    assert following(cron("@daily", tz="Asia/Tokyo"), "2026-01-01T00:00", 1) == ["01-01 15:00:00"]


def test_every_counts_from_the_same_beginning_whoever_asks() -> None:
    pace = every(minutes=5)
    assert following(pace, "2026-01-01T00:01:07", 2) == ["01-01 00:05:00", "01-01 00:10:00"]
    assert pace.after(at("2026-01-01T00:05")) == at("2026-01-01T00:10")
    assert [one % 1.5 for one in islice(every(1.5).instants(1_700_000_000.1), 3)] == [0.0] * 3
    assert every(timedelta(hours=1)) == every(hours=1) == every(3600)


def test_jitter_is_the_same_for_everybody_and_within_its_bound() -> None:
    pace = every(minutes=1, jitter=30)
    instants = list(islice(pace.instants(at("2026-01-01T00:00")), 200))
    late = [pace.due("one", instant) - instant for instant in instants]
    assert late == [pace.due("one", instant) - instant for instant in instants]
    assert 0.0 <= min(late) < 3.0
    assert 27.0 < max(late) < 30.0
    assert late != [pace.due("another", instant) - instant for instant in instants]


def test_an_instant_in_an_id() -> None:
    assert moment_text(at("2026-03-29T01:00:00")) == "20260329T010000Z"
    assert moment_text(at("2026-03-29T01:00:00") + 0.25) == "20260329T010000.250Z"


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: cron("0 0 30 2 *"), "'0 0 30 2 [*]' cannot be read: bad day-of-month field"),
        (lambda: cron("0 0 31 4,6 *"), "bad day-of-month"),
        (lambda: cron("61 * * * *"), "bad minute field; as '30 2 [*] [*] [*]'"),
        (lambda: cron("* * * *"), "has 4 fields; it must have five"),
        (lambda: cron("@reboot"), "'@reboot' is not known; there are @yearly"),
        (lambda: cron("0 0 * * mon-frx"), "bad day-of-week"),
        (lambda: cron("0 0 * * 5L/2"), "cannot be read"),
        (lambda: cron(5), "cron is 5; it must be text"),  # type: ignore[arg-type]
        (lambda: cron("0 0 * * *", tz="Mars/Base"), "'Mars/Base', which is no time zone .* 'pip install tzdata'"),
        (lambda: cron("0 0 * * *", tz="../etc"), "no time zone"),
        (lambda: cron("0 0 * * *", jitter=86_400), "jitter is 1 day, and two instants may be 1 day apart"),
        (lambda: cron("0 0 * * *", jitter=-1), "jitter is -1"),
        (lambda: cron("0 0 * * *", catch_up="first"), "catch_up is 'first'; it must be one of 'latest', 'none', 'all'"),  # type: ignore[arg-type]
        (lambda: cron("0 0 * * *", overlap=True), "overlap is True; it must be one of 'skip'"),  # type: ignore[arg-type]
        (lambda: cron("0 0 * * *", grace="5"), "grace is '5'"),  # type: ignore[arg-type]
        (lambda: every(), "needs a period"),
        (lambda: every(0), "every is 0"),
        (lambda: every(seconds=0.5), "every is 0.5 seconds; it must be at least 1 second"),
        (lambda: every(5, minutes=1), "says the period twice"),
        (lambda: every(minutes="5"), "a period that is none"),  # type: ignore[arg-type]
        (lambda: every(minutes=5, jitter=300), "jitter is 5 minutes, and two instants may be 5 minutes apart"),
        (lambda: every(float("nan")), "every is nan"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_written(make: Any, why: str) -> None:
    with pytest.raises(ConfigurationError, match=why):
        make()


# Against an oracle: all zones, each minute around each time that a clock is set


class Change(NamedTuple):
    """A clock is set: the first minute that goes by the new offset."""

    minute: int
    before: timedelta
    after: timedelta


def changes(zone: ZoneInfo) -> Iterator[Change]:
    """When the zone's clock is set: looked for day by day, then minute by minute."""

    def offset(minute: int) -> timedelta:
        return datetime.fromtimestamp(minute * 60, zone).utcoffset() or timedelta()

    day = 24 * 60
    for start in range(int(FIRST.timestamp()) // 60, int(LAST.timestamp()) // 60, day):
        before, after = offset(start), offset(start + day)
        if before != after:
            first = next(minute for minute in range(start, start + day + 1) if offset(minute) == after)
            yield Change(first, before, after)


def zones_that_differ() -> dict[tuple[Change, ...], str]:
    """One zone of those whose clocks are set alike, and at least one that is never set."""
    found: dict[tuple[Change, ...], str] = {}
    for name in sorted(available_timezones()):
        found.setdefault(tuple(changes(ZoneInfo(name))), name)
    return found


class Fields(NamedTuple):
    """An expression, and what it means to the oracle."""

    expression: str
    minutes: range | tuple[int, ...]
    hours: range | tuple[int, ...]
    #: How far around each change it is looked at (hours).
    around: int = 27

    @property
    def by_elapsed(self) -> bool:
        return self.expression.split()[1].startswith("*")


ALL = range(60)
EXPRESSIONS = (
    Fields("30 2 * * *", (30,), (2,)),
    Fields("0 0 * * *", (0,), (0,)),
    Fields("59 23 * * *", (59,), (23,)),
    Fields("0,15,45 1-3 * * *", (0, 15, 45), (1, 2, 3)),
    Fields("* 2 * * *", ALL, (2,)),
    Fields("*/7 0-4 * * *", range(0, 60, 7), range(5)),
    Fields("5 0-23 * * *", (5,), range(24)),
    Fields("0 * * * *", (0,), range(24)),
    Fields("30 */2 * * *", (30,), range(0, 24, 2)),
    Fields("*/20 */3 * * *", range(0, 60, 20), range(0, 24, 3)),
    Fields("* * * * *", ALL, range(24), 3),
)


def wall_clock(zone: ZoneInfo, first: int, last: int) -> list[datetime]:
    """What the wall clock shows at each of these minutes (since 1970)."""
    return [datetime.fromtimestamp(minute * 60, zone).replace(tzinfo=None, fold=0) for minute in range(first, last)]


def oracle(fields: Fields, first: int, clock: Sequence[datetime]) -> list[int]:
    """Each minute (since 1970) at which it is due: by what the wall clock shows, minute by minute."""
    matching = [one.minute in fields.minutes and one.hour in fields.hours for one in clock]
    if fields.by_elapsed:
        return [first + place for place, matches in enumerate(matching) if matches]
    seen: set[datetime] = set()
    due = set()
    for place, (shown, matches) in enumerate(zip(clock, matching, strict=True)):
        if matches and shown not in seen:
            due.add(first + place)
        skipped = clock[place - 1] + timedelta(minutes=1) if place else shown
        while skipped < shown:  # what the clock never showed
            if skipped.minute in fields.minutes and skipped.hour in fields.hours:
                due.add(first + place)
            skipped += timedelta(minutes=1)
        seen.add(shown)
    return sorted(due)


def test_all_zones_against_each_minute() -> None:
    zones = zones_that_differ()
    assert len(zones) > 30
    assert sum(map(len, zones)) > 200
    for found, name in zones.items():
        zone = ZoneInfo(name)
        for change in found[:2] + found[-1:]:
            start, end = change.minute - 50 * 60, change.minute + 27 * 60
            clock = wall_clock(zone, start, end)
            for fields in EXPRESSIONS:
                first, last = change.minute - fields.around * 60, change.minute + fields.around * 60
                timing = cron(fields.expression, tz=name)
                expected = [one for one in oracle(fields, start, clock) if first <= one < last]
                instants = takewhile(lambda one, end=last: one < end * 60, timing.instants(first * 60 - 1))  # type: ignore[misc]
                assert [int(one) // 60 for one in instants] == expected, (name, fields.expression, change)


def test_no_day_is_lost_and_none_comes_twice() -> None:
    """Four years of a nightly schedule in each zone."""
    for name in zones_that_differ().values():
        zone = ZoneInfo(name)
        timing = cron("30 2 * * *", tz=name)
        instants = list(takewhile(lambda one: one < LAST.timestamp(), timing.instants(FIRST.timestamp())))
        days = [datetime.fromtimestamp(one, zone).date() for one in instants]
        assert all((later - earlier).days == 1 for earlier, later in pairwise(days)), name
