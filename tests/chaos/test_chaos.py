"""Each fault once, with few tasks, on one of its brokers in turn. `make chaos` plays all on all, for longer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from chaos.faults import FAULTS
from chaos.faults.limits import most_at_once
from chaos.run import QUICK, Theatre
from chaos.stage import Stage, Target

if TYPE_CHECKING:
    from pathlib import Path

    from chaos.faults.fault import Fault
    from tests.conftest import Nodes

_CASES = [(fault, fault.brokers[index % len(fault.brokers)]) for index, fault in enumerate(FAULTS)]


@pytest.mark.timeout(600)  # three nodes of a cluster start on two busy cores
@pytest.mark.parametrize(("fault", "broker"), _CASES, ids=[f"{fault.name}-{broker}" for fault, broker in _CASES])
def test_nothing_is_lost(fault: Fault, broker: str, nodes: Nodes) -> None:
    result = Theatre(QUICK, 1, nodes.get).play(fault, broker)
    if result.skipped:
        pytest.skip(result.note)
    assert not result.failed, result.note
    assert result.lost == 0, result.note
    assert result.tasks > 0


def test_a_loss_is_seen(tmp_path: Path) -> None:
    """What the verdict rests on: safe, and neither run to the end nor a dead letter, is lost."""
    stage = Stage(Target("sqlite", f"sqlite:///{tmp_path / 'leveret.db'}"), tmp_path, QUICK, "seed")
    stage.book.sent.write_text("".join(f"safe {id_} 1.0 7\n" for id_ in "abcd") + "unknown e 1.0 7\n")
    stage.book.runs.write_text("start a 2.0 8\nstart a 3.0 8\nend a 4.0 8\nstart b 2.0 8\nstart e 2.0 8\nhalf a li")
    stage.dead.add("c")
    result = stage.result("none")
    assert (result.tasks, result.lost, result.doubled, result.dead, result.unknown) == (4, 2, 1, 1, 1)
    assert result.longest == 3.0


def test_a_task_whose_worker_was_killed_counts_until_it_has_run_again() -> None:
    lines = ["start a 1 7", "start b 1 7", "end b 2 7", "start c 2 8", "start a 3 8", "end a 4 8", "start d 5 8"]
    assert most_at_once(lines) == 2
    assert most_at_once([*lines, "start e 6 8"]) == 3
