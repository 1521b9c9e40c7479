"""--processes MIN-MAX: up fast, down slowly, and by what the work is worth."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.errors import BrokerUnavailable, ConfigurationError
from leveret.worker.autoscale import (
    ASK_AFTER,
    HORIZON,
    TICK,
    Bounds,
    Processes,
    RunTime,
    Scaler,
    Trend,
    Work,
    wanted,
)
from tests.support.waiting import until

counts = st.integers(0, 100_000)
times = st.floats(0, 1e5)


@given(counts, counts, times, st.integers(1, 100), st.integers(1, 50), st.integers(0, 50))
def test_between_the_bounds_and_no_more_slots_than_tasks(
    running: int, waiting: int, run_time: float, concurrency: int, least: int, more: int
) -> None:
    bounds = Bounds(least, least + more)
    children = wanted(running=running, waiting=waiting, run_time=run_time, concurrency=concurrency, bounds=bounds)
    assert bounds.least <= children <= bounds.most
    assert children <= max(bounds.least, math.ceil((running + waiting) / concurrency))
    assert children == bounds.most or children * concurrency >= running


@pytest.mark.parametrize(
    ("running", "waiting", "run_time", "children"),
    [
        (0, 0, 0.0, 1),
        (10, 0, 60.0, 1),
        (10, 1, 60.0, 2),  # a slow task that waits is worth a child
        (10, 30, HORIZON, 4),
        (10, 1_000, 60.0, 8),
        (10, 1_000, 0.001, 2),  # a thousand short ones are one second's work of one slot
        (10, 100_000, 0.001, 8),
        (11, 0, 0.001, 2),  # what runs has its slots
    ],
)
def test_ten_slots_a_child(running: int, waiting: int, run_time: float, children: int) -> None:
    assert children == wanted(running=running, waiting=waiting, run_time=run_time, concurrency=10, bounds=Bounds(1, 8))


def test_up_at_the_second_wish_and_no_further_than_both_agree() -> None:
    trend = Trend(shrink_after=10.0)
    assert trend.follow(8, present=1, now=0.0) == 1
    assert trend.follow(3, present=1, now=0.2) == 3
    assert trend.follow(8, present=3, now=0.4) == 3
    assert trend.follow(8, present=3, now=0.6) == 8


def test_down_one_by_one_when_fewer_were_enough_for_long() -> None:
    trend = Trend(shrink_after=10.0)
    assert trend.follow(1, present=4, now=0.0) == 4
    assert trend.follow(1, present=4, now=9.9) == 4
    assert trend.follow(1, present=4, now=10.0) == 3
    assert trend.follow(1, present=3, now=19.9) == 3
    assert trend.follow(1, present=3, now=20.0) == 2
    assert trend.follow(2, present=2, now=25.0) == 2
    assert trend.follow(1, present=2, now=30.0) == 2, "they were all wanted in between"
    assert trend.follow(1, present=2, now=40.0) == 1


def test_a_run_time_seen_from_outside() -> None:
    """Ten slots in use, and a hundred tasks a second end: a tenth of a second each."""
    clock, run_time = RunTime(), 0.0
    for second in range(20):
        run_time = clock.note(1.0, running=10, ended=100 * (second + 1))
    assert run_time == pytest.approx(0.1, rel=0.1)


def test_a_task_that_does_not_end_counts_as_it_goes_on() -> None:
    clock = RunTime()
    assert clock.note(0.25, running=0, ended=0) == 0.0
    grown = [clock.note(0.25, running=1, ended=0) for _ in range(40)]
    assert grown == sorted(grown)
    assert grown[-1] > HORIZON


@pytest.mark.parametrize("processes", [0, (0, 2), (3, 2)])
def test_bounds(processes: Processes) -> None:
    with pytest.raises(ConfigurationError, match="there must be at least 1"):
        Bounds.of(processes)
    assert Bounds.of(3) == Bounds(3, 3)
    assert Bounds.of((1, 3)) == Bounds(1, 3)


class Hands:
    """Children by their number alone."""

    concurrency = 2

    def __init__(self) -> None:
        self.processes = 1

    def resize(self, processes: int) -> None:
        self.processes = processes


async def scaled(work: Work, ready: int | None) -> tuple[int, int]:
    """For that work, and so much with the broker (None: it is away): the children, and how often it was asked."""
    hands, asked, looks = Hands(), 0, 0

    def look() -> Work:
        nonlocal looks
        looks += 1
        return work

    async def ask() -> int:
        nonlocal asked
        asked += 1
        if ready is None:
            raise BrokerUnavailable("it is away")
        return ready

    async def enough() -> bool:
        return looks * TICK > 2.5 * ASK_AFTER

    scaler = Scaler(hands, Bounds(1, 4), shrink_after=60.0)
    run = asyncio.create_task(scaler.run(look, ask, lambda: None))
    await until(enough, "it has looked some times")
    run.cancel()
    with suppress(asyncio.CancelledError):
        await run
    return hands.processes, asked


async def test_the_broker_is_asked_now_and_then_while_all_are_busy() -> None:
    children, asked = await scaled(Work(running=2, waiting=0, ended=0), ready=0)
    assert children == 1
    assert 2 <= asked <= 3


async def test_what_waits_with_the_broker_is_work() -> None:
    children, asked = await scaled(Work(running=2, waiting=0, ended=0), ready=100)
    assert children == 4
    assert asked == 1, "there can't be more children"


async def test_the_broker_is_not_asked_while_a_slot_is_free() -> None:
    assert await scaled(Work(running=1, waiting=0, ended=0), ready=100) == (1, 0)


async def test_a_broker_that_is_away_is_no_reason_to_stop() -> None:
    children, asked = await scaled(Work(running=2, waiting=0, ended=0), ready=None)
    assert children == 1
    assert asked >= 2
