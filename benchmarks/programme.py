"""The order of a benchmark: what is measured on one broker, how often, in which order."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from benchmarks import entrants as e
from benchmarks.goals import CHAINS, CLAIM, DUELS, FOOTPRINT, LATENCY, LIMITS, RESULTS, SCHEDULES, STARTUP, UNIQUE
from benchmarks.limits import many_keys, rated, tenants, through, unreached
from benchmarks.measures import (
    Incorrect,
    beside_others,
    chain_rates,
    claim_cost,
    first_unique,
    footprint,
    latency,
    schedules_idle,
    startup,
    throughput,
    unique_rates,
)
from benchmarks.programs import ProgramFailed
from benchmarks.results import Bout, Curve, Results

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.entrants import Entrant
    from benchmarks.places import Place

log = logging.getLogger("benchmarks")

T = TypeVar("T")

#: The rate of the latency goals (a second).
_RATE = 200.0
#: What others do while results are waited for (tasks a second), and how many of ours are.
_OTHERS = 5_000.0
_ASKS = 60
_OPEN = 256
#: Of a chain.
_STEPS = 10
#: So often a pair is measured again, because its peer failed.
_REPEATS = 3


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    rounds: int
    #: No-op tasks of one measurement of throughput.
    tasks: int
    #: How long a latency is measured at one rate (seconds).
    seconds: float
    #: Rates of the curve of latency over load (a second).
    rates: tuple[float, ...]
    is_quick: bool = False
    #: Leave out what no goal is about.
    goals_only: bool = False
    #: Tasks of the memory's growth; how long an idle worker is watched (seconds).
    growth: int = 200_000
    #: How long ago a task ended that another program asks for (seconds).
    age: float = 60.0
    idle: float = 20.0
    #: The large backlog and the small one.
    backlogs: tuple[int, int] = (1_000_000, 1_000)
    windows: int = 20
    starts: int = 15
    #: Unique tasks that are there, and those that have ended before, for a program that begins.
    keys: tuple[int, int] = (100_000, 1_000_000)
    #: Tasks of one tenant before those of others.
    tenant: int = 100_000
    #: Of `SUBJECTS`, what alone is measured; empty: all of the programme.
    about: tuple[str, ...] = ()


FULL = Size(rounds=5, tasks=10_000, seconds=10.0, rates=(50, 100, 200, 400, 800, 1600, 3200))
QUICK = Size(rounds=1, tasks=3_000, seconds=3.0, rates=(), is_quick=True, starts=7, age=5.0)


def run(place: Place, size: Size) -> Results:
    """All measurements on one broker. Raises Incorrect or ProgramFailed when one of ours fails."""
    results = Results(place.name)
    if size.about:
        for subject in size.about:
            SUBJECTS[subject](results, place, size)
        return results
    results.bouts = [
        Bout(duel)
        for duel in DUELS[place.kind]
        if (duel.quick or not size.is_quick) and (duel.goals or not size.goals_only)
    ]
    for number in range(size.rounds):
        for bout in results.bouts:
            _fight(results, bout, place, size.tasks, number)
    results.judge_bouts()
    _latency_goals(results, place, size)
    _results_goals(results, place, size)
    if not size.is_quick:
        _footprint_goals(results, place, size)
        _claim_goal(results, place, size)
        for judge in SUBJECTS.values():
            judge(results, place, size)
    if not (size.is_quick or size.goals_only):
        results.curves = [_curve(entrant, place, size) for entrant in _CURVES[place.kind]]
    return results


def run_startup(size: Size) -> Results:
    results = Results("the program itself")
    took = startup(size.starts)
    for goal in STARTUP:
        results.judge(goal, [took[goal.figure]])
    return results


_CURVES: dict[str, Sequence[Entrant]] = {
    "rabbitmq": (e.OURS, e.BY_HAND, e.TASKIQ, e.FASTSTREAM),
    "sqlite": (e.OURS,),
}


class _PeerFailed(Exception):
    """A measurement of a peer went wrong."""


def measured(entrant: Entrant, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Raises _PeerFailed where a peer fails, and what it raises where ours does."""
    try:
        return measure()
    except (Incorrect, ProgramFailed) as error:
        if entrant.is_ours:
            raise
        log.warning("%s: %s", entrant.name, error)
        raise _PeerFailed(str(error)) from error


def repeated(results: Results, peer: Entrant, pair: Callable[[], T]) -> T:
    """A pair, measured again and counted when its peer fails: RabbitMQ 3.10 drops a peer's connection now and then.

    Raises _PeerFailed when it failed each time.
    """
    for _ in range(_REPEATS):
        with suppress(_PeerFailed):
            return pair()
        results.repeats[peer.name] += 1
    return pair()


def _fight(results: Results, bout: Bout, place: Place, tasks: int, number: int) -> None:
    """One round of a duel. Who begins changes: the second finds the broker's caches warm."""
    if bout.failure:
        return
    duel = bout.duel

    def pair() -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for entrant in (duel.ours, duel.peer) if number % 2 == 0 else (duel.peer, duel.ours):
            count = int(tasks * entrant.share)
            found[entrant.name] = measured(entrant, partial(throughput, entrant, place, count))
            log.info("%s, round %d: %s %s", place.name, number + 1, entrant.name, _words(found[entrant.name]))
        return found

    try:
        found = repeated(results, duel.peer, pair)
    except _PeerFailed as error:
        bout.failure = str(error)
        return
    bout.ours.append(found[duel.ours.name])
    bout.peer.append(found[duel.peer.name])


def _latency_goals(results: Results, place: Place, size: Size) -> None:
    def at_rate(entrant: Entrant) -> dict[str, float]:
        return measured(entrant, partial(latency, entrant, place, rate=_RATE, seconds=size.seconds, outstanding=1))

    def pair() -> tuple[dict[str, float], dict[str, float]]:
        ours = at_rate(e.OURS_AUTO_EACH)
        return ours, at_rate(e.BY_HAND) if place.kind == "rabbitmq" else dict.fromkeys(ours, 1.0)

    rounds = [repeated(results, e.BY_HAND, pair) for _ in range(size.rounds)]
    for ours, bare in rounds:
        log.info("%s: latency, ours %s, bare %s", place.name, _words(ours), _words(bare))
    for goal in LATENCY[place.kind]:
        results.judge(goal, [ours[goal.figure] / bare[goal.figure] for ours, bare in rounds])


def _results_goals(found: Results, place: Place, size: Size) -> None:
    if not RESULTS[place.kind]:
        return
    rounds = [beside_others(place, rate=_OTHERS, asks=_ASKS, age=size.age) for _ in range(min(2, size.rounds))]
    for numbers in rounds:
        log.info("%s: results beside others, %s", place.name, _words(numbers))
    for goal in RESULTS[place.kind]:
        found.judge(goal, [numbers[goal.figure] for numbers in rounds])


def _unique_goals(results: Results, place: Place, size: Size) -> None:
    # First, since all the tasks of a node are in one log.
    numbers = first_unique(place, *size.keys) if place.kind == "rabbitmq" else {}
    numbers |= unique_rates(place, tasks=size.tasks, rounds=size.rounds)
    log.info("%s: unique tasks, %s", place.name, _words(numbers))
    for goal in UNIQUE[place.kind]:
        results.judge(goal, [numbers[goal.figure]])


def _chains_goals(results: Results, place: Place, size: Size) -> None:
    numbers = chain_rates(place, chains=size.tasks // _STEPS, length=_STEPS, rounds=size.rounds)
    log.info("%s: chains, %s", place.name, _words(numbers))
    for goal in CHAINS[place.kind]:
        results.judge(goal, [numbers[goal.figure]])


def _schedules_goals(results: Results, place: Place, size: Size) -> None:
    numbers = schedules_idle(place, idle=size.idle, rounds=min(2, size.rounds))
    log.info("%s: schedules, %s", place.name, ", ".join(f"{name} {value:.3f}" for name, value in numbers.items()))
    for goal in SCHEDULES[place.kind]:
        results.judge(goal, [numbers[goal.figure]])


def _limits_goals(results: Results, place: Place, size: Size) -> None:
    numbers = unreached(place, tasks=size.tasks, rounds=min(3, size.rounds)) | rated(place)
    numbers |= tenants(place, size.tenant)
    if place.kind == "rabbitmq":
        numbers |= through(place, tasks=3 * size.tasks, rounds=min(3, size.rounds)) | many_keys(place)
    log.info("%s: limits, %s", place.name, ", ".join(f"{name} {value:,.2f}" for name, value in numbers.items()))
    for goal in LIMITS[place.kind]:
        results.judge(goal, [numbers[goal.figure]])


def _footprint_goals(results: Results, place: Place, size: Size) -> None:
    numbers = footprint(e.OURS_MANY, place, tasks=size.growth, idle=size.idle)
    log.info("%s: footprint %s", place.name, _words(numbers))
    for goal in FOOTPRINT[place.kind]:
        results.judge(goal, [numbers[goal.figure]])


def _claim_goal(results: Results, place: Place, size: Size) -> None:
    large, small = (claim_cost(e.OURS_MANY, place, backlog=backlog, windows=size.windows) for backlog in size.backlogs)
    log.info(
        "%s: a claim takes %.0f us at %d, %.0f us at %d", place.name, large, size.backlogs[0], small, size.backlogs[1]
    )
    results.judge(CLAIM[place.kind], [large / small])


def _curve(entrant: Entrant, place: Place, size: Size) -> Curve:
    """Until the entrant falls behind: what comes after is a queue, not a latency."""
    curve = Curve(entrant.name)
    for rate in size.rates:
        try:
            point = latency(entrant, place, rate=rate, seconds=size.seconds / 2, outstanding=_OPEN)
        except (Incorrect, ProgramFailed) as error:
            if entrant.is_ours:
                raise
            log.warning("%s at %g/s: %s", entrant.name, rate, error)
            break
        log.info("%s: %s at %g/s %s", place.name, entrant.name, rate, _words(point))
        curve.points[rate] = point
        if point["median"] > _BEHIND:
            break
    return curve


#: A median above this (milliseconds) is of an entrant that does not keep up.
_BEHIND = 500.0


#: What is measured of ours alone, by itself if it is asked for.
SUBJECTS: dict[str, Callable[[Results, Place, Size], None]] = {
    "limits": _limits_goals,
    "chains": _chains_goals,
    "schedules": _schedules_goals,
    "unique": _unique_goals,
}


def _words(numbers: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.1f}" for name, value in numbers.items())
