"""Which delay queue a task takes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from leveret.brokers.rabbitmq.queues.ladder import BUSY, Ladder
from leveret.brokers.rabbitmq.queues.topology import DELAY_STEPS, FEW_STEPS, delay_step, steps_made_with

HOUR, YEAR = 3_600.0, 366 * 86_400.0


@given(st.floats(0, YEAR), st.sets(st.sampled_from(DELAY_STEPS)))
def test_a_step_is_never_too_long(remaining: float, there: set[int]) -> None:
    """And no step that is there is better."""
    ladder = Ladder()
    ladder.steps |= there
    step = ladder.step(remaining, 0.0)
    fitting = [one for one in {*there, *FEW_STEPS} if one <= remaining * 1000]
    assert step == max(fitting, default=None)


@given(st.floats(0.126, 2_000.0))
def test_three_queues_are_enough(delay: float) -> None:
    ladder, remaining, hops = Ladder(), delay, 0
    while (step := ladder.step(remaining, None)) is not None:
        ladder.steps.add(step)
        remaining -= step / 1000
        hops += 1
    assert ladder.steps <= {*FEW_STEPS}
    assert 0 <= remaining < 0.1251
    assert hops <= 2_000 / 512 + 512 / 2 + 2 / 0.125


def test_a_step_that_many_miss_is_made() -> None:
    ladder = Ladder()
    assert [ladder.step(HOUR, 1.0) for _ in range(BUSY - 1)] == [512_000] * (BUSY - 1)
    assert ladder.step(HOUR, None) == 512_000  # the last of them, asked for again
    assert ladder.step(60.0, 1.0) == 2_000  # another step
    assert ladder.step(HOUR, 60.0) == delay_step(HOUR) == 2_048_000


def test_a_step_that_some_miss_in_every_minute_is_not() -> None:
    ladder = Ladder()
    steps = [ladder.step(HOUR, now / 5) for now in range(5 * 3_600)]  # 300 a minute
    assert {*steps} == {512_000}


def test_whoever_makes_a_step_makes_those_that_tell_of_it() -> None:
    assert steps_made_with(125) == (125,)
    assert steps_made_with(512_000) == (512_000, 125)
    assert steps_made_with(250) == (250, 125)
    assert steps_made_with(2_048_000) == (2_048_000, 125, 250)
