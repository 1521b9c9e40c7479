"""The SQLite consumers' bells: named pipes that wake whoever holds them."""

from __future__ import annotations

import gc
import os
import select
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from leveret.brokers.sqlite.wakeup import WakeUps
from tests.support.waiting import wait_until
from tests.support.workers import is_alive

if TYPE_CHECKING:
    from pathlib import Path


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


def test_a_bell_is_held_until_it_is_taken_down(path: Path) -> None:
    bells = WakeUps(path)
    bell = bells.make()
    assert bells.is_held(bell.name)
    bell.remove()
    assert not bells.is_held(bell.name)
    assert names(path.parent / "leveret.db-consumers") == []


def test_a_bell_nobody_holds_hangs_until_it_is_taken_down(path: Path) -> None:
    bells = WakeUps(path)
    name = bells.make().name  # let go of at once
    gc.collect()
    assert not bells.is_held(name)
    assert names(path.parent / "leveret.db-consumers") == [name]
    for _ in range(2):
        bells.remove(name)
        assert names(path.parent / "leveret.db-consumers") == []


def test_ringing_wakes_and_hushing_forgets(path: Path) -> None:
    bells = WakeUps(path)
    bell = bells.make()
    assert not is_ringing(bell.reader)
    bells.wake(bell.name)
    assert is_ringing(bell.reader)
    bell.drain()
    assert not is_ringing(bell.reader)
    fill(path.with_name("leveret.db-consumers") / bell.name)
    bells.wake(bell.name)
    assert is_ringing(bell.reader)
    bell.drain()
    assert not is_ringing(bell.reader)
    bell.drain()
    bell.remove()


def fill(pipe: Path) -> None:
    """Ring as often as it holds."""
    descriptor = os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)
    with suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"!" * 4_096)
    os.close(descriptor)


def is_ringing(reader: int) -> bool:
    return bool(select.select([reader], [], [], 0)[0])


def test_ringing_where_nobody_is_does_nothing(path: Path) -> None:
    bells = WakeUps(path)
    bells.wake("nobody")
    name = bells.make().name
    gc.collect()
    bells.wake(name)
    assert not bells.is_held(name)


FORKING = """
import os, signal, sys
from pathlib import Path
from leveret.brokers.sqlite.wakeup import WakeUps

bell = WakeUps(Path(sys.argv[1])).make()
child = os.fork()
if child == 0:
    os.read(0, 1)  # lives until the test ends
    os._exit(0)
print(bell.name, child, flush=True)
signal.pause()
"""


def test_a_forked_child_does_not_keep_its_parents_bell(path: Path) -> None:
    """It would make its dead parent look alive, and nobody would get the parent's tasks."""
    bells = WakeUps(path)
    parent = subprocess.Popen(
        [sys.executable, "-c", FORKING, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    with parent.stdin, parent.stdout:
        name, child = parent.stdout.readline().split()
        assert bells.is_held(name)
        parent.kill()
        parent.wait()
        wait_until(lambda: not bells.is_held(name), "the bell is let go of")
        assert is_alive(int(child))
