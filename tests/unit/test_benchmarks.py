"""What the benchmarks conclude from their numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import entrants, programme
from benchmarks.goals import Duel, Goal
from benchmarks.measures import Incorrect, Setting, TooFew, rate
from benchmarks.peers.ledger import Ledger
from benchmarks.places import SQLite
from benchmarks.programs import ProgramFailed
from benchmarks.results import Bout, Results

if TYPE_CHECKING:
    from pathlib import Path


def _goal(*, at_least: bool) -> Goal:
    return Goal("a goal", "run", 2, at_least=at_least)


def test_a_bound_may_be_a_least_or_a_most() -> None:
    assert [_goal(at_least=True).is_met(value) for value in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [_goal(at_least=False).is_met(value) for value in (1.9, 2.0, 2.1)] == [True, True, False]


def test_a_ratio_is_of_pairs() -> None:
    """A minute in which the machine is slow changes both sides of a pair, and no ratio."""
    bout = Bout(Duel(entrants.OURS, entrants.MASTER, (_goal(at_least=True),)))
    for slowness in (1.0, 10.0, 3.0):
        bout.ours.append({"run": 3000 / slowness})
        bout.peer.append({"run": 1000 / slowness})
    results = Results("a place", [bout])
    results.judge_bouts()
    (verdict,) = results.verdicts
    assert verdict.is_met
    assert verdict.reached is not None
    assert (verdict.reached.low, verdict.reached.high) == (3.0, 3.0)


def test_a_goal_whose_peer_failed_is_not_met() -> None:
    results = Results("a place", [Bout(Duel(entrants.OURS, entrants.MASTER, (_goal(at_least=False),)))])
    results.judge_bouts()
    assert not results.verdicts[0].is_met


def test_a_pair_is_measured_again_when_its_peer_fails() -> None:
    """As a server may drop the peer's connection; how often is told. Ours must not fail."""
    results, failures = Results("a place"), 2

    def measure() -> dict[str, float]:
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise ProgramFailed("INTERNAL_ERROR")
        return {"run": 1.0}

    peer = entrants.MASTER
    assert programme.repeated(results, peer, lambda: programme.measured(peer, measure)) == {"run": 1.0}
    assert results.repeats == {peer.name: 2}
    failures = 1
    with pytest.raises(ProgramFailed):
        programme.repeated(results, peer, lambda: programme.measured(entrants.OURS, measure))


@pytest.mark.parametrize("runs", [[], [0, 0], [0, 1, 1]], ids=["none", "one missing", "one twice"])
def test_a_task_that_did_not_run_once_fails_the_measurement(tmp_path: Path, runs: list[int]) -> None:
    setting = Setting(entrants.OURS, SQLite(tmp_path), tmp_path / "ledger", tasks=2)
    for task in runs:
        setting.ledger.note_run(task)
    with pytest.raises(Incorrect, match="more or less than once"):
        setting.check(2)


def test_a_rate_needs_all_processes_at_work(tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger", tasks=100)
    for task in range(100):
        ledger.note_run(task)
    assert rate(ledger, processes=1) > 0
    with pytest.raises(TooFew, match="2 processes were to run tasks, 1 did"):
        rate(ledger, processes=2)
