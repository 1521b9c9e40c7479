"""One formula for the rates of ``leveret top`` and of the dashboard."""

from __future__ import annotations

from leveret.model import QueueStats
from leveret.observe import WINDOW, QueueRates, Rate, Rates


def stats(name: str, ready: int) -> QueueStats:
    return QueueStats(name, ready, 0, 0, 0, 0)


def test_rates_are_those_of_the_last_seconds() -> None:
    """In: what ended and what there is more; never below nothing, and old looks are forgotten."""
    rates = QueueRates()
    assert rates.look(100.0, [stats("work", 10)]) == {}
    for _ in range(20):
        rates.ended("work")
    assert rates.look(102.0, [stats("work", 14), stats("new", 3)]) == {"work": Rate(12.0, 10.0), "new": Rate(0.0, 0.0)}
    assert rates.look(104.0, [stats("work", 0)]) == {"work": Rate(2.5, 5.0)}
    for seconds in range(1, 20):
        now = rates.look(104.0 + seconds, [stats("work", 0)])
        assert seconds <= WINDOW or now == {"work": Rate(0.0, 0.0)}


def test_what_is_not_counted_for_a_while_is_not_new_afterwards() -> None:
    rates = Rates()
    assert rates.look(100.0, {"a": 10}, {}) is None
    assert rates.look(101.0, {}, {}) == {}
    assert rates.look(102.0, {"a": 14, "b": 3, "c": 2}, {"b": 1}) == {"a": 4.0, "b": 2.0}
    assert rates.look(102.0, {"a": 99}, {}) is None, "no time has passed"
    assert rates.look(50.0, {"a": 100}, {}) is None, "the clock was set back"
    assert rates.look(51.0, {"a": 107}, {}) == {"a": 7.0}
