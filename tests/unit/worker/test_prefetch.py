"""prefetch="auto": what is held ahead is worth a moment's work, and nothing when tasks are slow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leveret.worker.prefetch import AHEAD, FIRST_REST, LONGEST_REST, MOST_AHEAD, Pace, Rest, credit

times = st.floats(0, 1e5)
counts = st.integers(1, 1_000)


@given(times, counts, counts, counts)
def test_what_is_held_ahead_is_worth_a_moment(run_time: float, slots: int, queues: int, more: int) -> None:
    """Of all queues together, when it is a decision; else it is near to what it was."""
    present = slots + more
    decided = credit(run_time, slots=slots, queues=queues, present=present)
    ahead = max(0, decided - slots) * queues
    assert decided == present or ahead * run_time <= AHEAD * slots * 1.001
    assert decided == present or slots <= decided <= max(slots + MOST_AHEAD, 2 * present)


@given(counts, counts, counts)
def test_nothing_is_held_ahead_of_slow_tasks(slots: int, queues: int, present: int) -> None:
    assert credit(AHEAD * slots * 1.01, slots=slots, queues=queues, present=present) == slots


@given(times, st.integers(1, 100), st.integers(1, 5))
def test_it_comes_to_rest(run_time: float, slots: int, queues: int) -> None:
    held = slots
    for _ in range(20):
        before, held = held, credit(run_time, slots=slots, queues=queues, present=held)
    assert held == before


@pytest.mark.parametrize(
    ("run_time", "present", "decided"),
    [
        (0.001, 10, 20),  # tasks of a millisecond: 400 ahead would be worth it, but it grows twofold
        (0.001, 20, 40),
        (0.001, 160, 266),
        (0.001, 266, 266),
        (0.0, 266, 266),
        (0.01, 20, 40),
        (0.01, 40, 40),  # 50 would be right: not worth a word
        (0.02, 50, 50),  # nor would 30
        (0.05, 50, 18),  # all of the way down at once
        (1.0, 266, 10),
        (1.0, 11, 10),
        (1.0, 10, 10),
    ],
)
def test_ten_slots(run_time: float, present: int, decided: int) -> None:
    assert credit(run_time, slots=10, queues=1, present=present) == decided


def test_queues_share_what_is_held_ahead() -> None:
    assert credit(0.01, slots=10, queues=3, present=14) == 23


def test_a_pace() -> None:
    pace = Pace(0.0)
    assert pace.run_time(1.0, []) is None
    pace.ended(1.0, 1.25)
    pace.ended(1.0, 1.75)
    assert pace.run_time(2.0, []) == 0.5
    assert pace.run_time(3.0, []) is None


def test_a_task_that_does_not_end_counts_as_it_goes_on() -> None:
    pace = Pace(0.0)
    assert pace.run_time(0.5, [0.0]) == 0.5
    pace.ended(0.0, 0.75)
    assert pace.run_time(1.0, []) == 0.25  # of this time


def test_one_slow_task_among_fast_ones_is_one_slot_of_many() -> None:
    pace = Pace(0.0)
    for _ in range(9):
        pace.ended(0.0, 0.5)
    assert pace.run_time(0.5, [0.0]) == 5 / 9


@pytest.mark.parametrize("slots", [11, 40])
def test_more_slots_are_used_at_once(slots: int) -> None:
    assert credit(0.001, slots=slots, queues=1, present=10) >= slots
    assert credit(0.1, slots=slots, queues=4, present=slots - 1) >= slots


def test_each_turn_has_a_longer_rest_until_a_calm_time() -> None:
    rest = Rest()
    assert not rest.lasts(0.0)
    now = 0.0
    for seconds in (0.25, 0.5, 1.0):
        rest.begin(now)
        assert rest.lasts(now + seconds - 0.01)
        now += seconds
        assert not rest.lasts(now)
    now += 11.0
    rest.begin(now)
    assert not rest.lasts(now + FIRST_REST)


def test_a_rest_has_an_end() -> None:
    rest = Rest()
    for _ in range(20):
        rest.begin(0.0)
    assert not rest.lasts(LONGEST_REST)
