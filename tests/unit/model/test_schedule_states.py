"""What is said of a schedule: when it comes, in words, and what it does now."""

from __future__ import annotations

import msgspec
import pytest

from leveret import ConfigurationError, cron, every
from leveret.model import Cron, Declare, Envelope, Put, Schedule, ScheduleRow, asked

NOW = 1_767_225_600.0
NOWHERE = Cron(expression="30 2 * * *", tz="Nowhere/At_all")


def schedule(timing: object = None, origin: str | None = None) -> Schedule:
    return Schedule("a", timing or every(days=1), Envelope("", "work", "say", b""), origin)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("timing", "words"),
    [
        (every(days=1), "every day"),
        (every(seconds=1), "every second"),
        (every(hours=10), "every 10 hours"),
        (every(1.5), "every 1.5 seconds"),
        (every(minutes=5, jitter=20), "every 5 minutes, up to 20 seconds later"),
        (cron("30 2 * * *", tz="Europe/Berlin", jitter=60), "30 2 * * * (Europe/Berlin), up to 1 minute later"),
    ],
)
def test_when_in_words(timing: object, words: str) -> None:
    assert ScheduleRow(schedule(timing), NOW).when == words


def test_states() -> None:
    """Only of one that goes on an instant is to be expected."""
    active = ScheduleRow(schedule(), NOW + 5)
    assert (active.state(NOW), active.coming(NOW)) == ("active", NOW + 5)
    paused = msgspec.structs.replace(active, paused=True)
    assert (paused.state(NOW), paused.coming(NOW)) == ("paused", None)
    resting = ScheduleRow(schedule(origin="shop:app"), NOW + 5, declared=NOW - 61)
    assert (resting.state(NOW), resting.coming(NOW)) == ("resting", None)
    assert resting.state(NOW - 2) == "active"
    assert msgspec.structs.replace(resting, paused=True).state(NOW) == "paused"
    assert ScheduleRow(schedule(), None).state(NOW) == "ended"


def test_a_zone_that_only_others_know_pauses_one_schedule() -> None:
    """Not all of the application's: whoever keeps them may be a worker of another one, with fewer zones."""
    good = msgspec.structs.replace(schedule(origin="shop:app"), name="good")
    change = asked(Declare("shop:app", NOW, [schedule(NOWHERE, "shop:app"), good]), {}, NOW)
    assert change is not None
    lost, kept = change.rows["a"], change.rows["good"]
    assert lost is not None
    assert kept is not None
    assert (lost.state(NOW), kept.state(NOW)) == ("paused", "active")
    assert "Nowhere/At_all" in lost.problem
    # It is declared again and again, and stays as it is.
    again = asked(Declare("shop:app", NOW, [lost.schedule, good]), {"a": lost, "good": kept}, NOW + 1)
    assert again is not None
    assert again.rows == {}
    with pytest.raises(ConfigurationError, match="Nowhere/At_all"):
        asked(Put(schedule(NOWHERE)), {}, NOW)
