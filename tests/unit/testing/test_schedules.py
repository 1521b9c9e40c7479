"""Schedules in the test kit: by the test's clock, and when the test wants them."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from leveret import App, ConfigurationError, cron, current_task, every
from leveret.testing import under_test

app = App("memory://")
seen: list[tuple[str, datetime | None]] = []


@app.task(schedule=every(minutes=5, catch_up="all", overlap="allow"))
async def sync() -> None:
    seen.append(("sync", current_task().scheduled_for))


@app.task(queue="reports", schedule={"nightly": cron("30 2 * * *", tz="Europe/Berlin").with_args("all")})
async def report(kind: str) -> None:
    seen.append((kind, current_task().scheduled_for))


@app.task
async def other() -> None: ...


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    seen.clear()


async def test_nothing_is_due_unless_the_test_wants_it() -> None:
    with under_test(app) as test:
        test.clock.advance(3600)
        await other.enqueue()
        assert [run.task for run in await test.drain()] == ["other"]


async def test_what_is_due_runs_by_the_tests_clock() -> None:
    with under_test(app) as test:
        assert await test.drain(schedules=True) == []
        test.clock.advance(3600)
        runs = await test.drain(schedules=True)
        assert len([run for run in runs if run.task == "sync"]) == 12
        instants = [instant for name, instant in seen if name == "sync"]
        assert instants == sorted(instants, key=str)
        assert await test.drain(schedules=True) == []


async def test_a_night_in_which_clocks_are_set() -> None:
    """To a moment by name: there are as many nights as the zone says."""
    with under_test(app) as test:
        year = datetime.now(UTC).year + 1
        for day, hour in ((1, 0), (2, 12)):
            seen.clear()
            test.clock.advance_to(datetime(year, 7, day, hour, tzinfo=UTC))
            await test.drain(schedules=True)
        assert [one for one in seen if one[0] == "all"] == [("all", datetime(year, 7, 2, 0, 30, tzinfo=UTC))]


async def test_schedules_that_are_data() -> None:
    with under_test(app) as test:
        await app.schedules.put("digest:1", report.call("one"), every(hours=1))
        rows = {row.name: row async for row in app.schedules}
        assert sorted(rows) == ["digest:1", "nightly", "sync"]
        handle = await app.schedules.trigger("digest:1")
        assert [run.id for run in await test.drain()] == [handle.id]
        assert seen[0][0] == "one"
        await app.schedules.pause("sync")
        test.clock.advance(3600)
        assert {run.task for run in await test.drain(schedules=True)} <= {"report"}
        await app.schedules.remove("digest:1")
        assert sorted([row.name async for row in app.schedules]) == ["nightly", "sync"]


def test_what_is_no_moment() -> None:
    with under_test(app) as test, pytest.raises(ConfigurationError, match="has no time zone"):
        test.clock.advance_to(datetime(2030, 1, 1))  # noqa: DTZ001 - that is the mistake
