"""The tests clean up after themselves, whatever ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.nodes import TREES, Node
from tests.support.reaper import FOLDER, MARK, is_over, mark_of, marked, reap
from tests.support.waiting import wait_until
from tests.support.workers import Program

HOLD = Path(__file__).parents[1] / "support" / "hold.py"


@pytest.mark.rabbitmq
@pytest.mark.parametrize(
    ("number", "options"), [(signal.SIGKILL, ()), (signal.SIGTERM, ("-n", "1"))], ids=["SIGKILL", "SIGTERM to xdist"]
)
def test_a_killed_run_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, options: tuple[str, ...]
) -> None:
    """A worker, its child, what that forked, the nodes, their epmd and their data: all gone."""
    monkeypatch.delenv(MARK)  # a run of its own
    holding = tmp_path / "holding"
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", *options, str(HOLD)]
    with Program(arguments, tmp_path / "output", {"HOLDING": str(holding)}) as run:
        wait_until(
            lambda: holding.exists() or run.process.poll() is not None, "it holds a node and a worker", within=90
        )
        assert holding.exists(), run.output
        mark = mark_of(run.pid)
        carried = [name for _, name in marked(lambda other: other == mark)]
        for program in ("epmd", "beam.smp", "leveret worker"):
            assert program in "".join(carried)
        run.signal(number)
        assert run.exit_code() == -number
    wait_until(lambda: not list(marked(lambda other: other == mark)), f"{carried} are gone")
    wait_until(lambda: not left_folders(f"{mark}"), "the nodes' folders are gone")


def left_folders(mark: str) -> list[Path]:
    return [folder for tree in TREES.values() for folder in (tree / "tmp").glob(f"{FOLDER}{mark}-*")]


def test_what_a_killed_reaper_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """The mark of a run whose process is gone is found again; what belongs to a run that goes on is let be."""
    ended = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    mark = mark_of(ended.pid)
    assert mark is not None
    assert not is_over(mark)
    ended.communicate()
    assert is_over(mark)
    gone, living = (tmp_path / f"{FOLDER}{one}-abc" for one in (mark, mark_of(os.getpid())))
    for folder in (gone, living):
        folder.mkdir()
    with subprocess.Popen(["sleep", "100"], env={MARK: mark}) as orphan:
        (name,) = reap(lambda other: other == mark and is_over(other), [tmp_path])
        assert name.startswith(f"{orphan.pid} sleep")
    assert not gone.exists()
    assert living.exists()


@pytest.mark.rabbitmq
def test_a_nodes_port_stays_its_own() -> None:
    """Nobody else is given it, not even while the node is down."""
    node = Node("3.10")
    try:
        assert subprocess.run(
            [sys.executable, "-c", f"import socket; socket.socket().bind(('127.0.0.1', {node.port}))"],
            stderr=subprocess.DEVNULL,
            check=False,
        ).returncode
    finally:
        node.close()
