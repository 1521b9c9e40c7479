"""`App(lifespan=...)` in real workers: entered by each child before its first task, left at its end."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import lifespan_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(lifespan_app.__file__)}:app"
ON_A_FILE = pytest.mark.parametrize("place", ["sqlite"], indirect=True)


@pytest.fixture
def client(place: Place) -> Client:
    return Client(place.url, lifespan_app.app)


def pids(ledger: Ledger, beginning: str) -> list[int]:
    return sorted(int(line.split()[1]) for line in ledger.lines_of(beginning))


def stopped(worker: Worker) -> None:
    worker.signal(signal.SIGTERM)
    assert worker.exit_code() == 0
    assert "Traceback" not in worker.output


def test_each_child_has_its_own(place: Place, client: Client, ledger: Ledger) -> None:
    """Tasks on the loop and in threads have its value, and the context variables that it has set."""
    assert not ledger.lines(), "who imports the application does not enter it"
    with Worker(place.url, ledger, "--processes", "2", app=APP).ready() as worker:
        ledger.wait_for("enter ", 2)
        client.enqueue(lifespan_app.use, "a")
        client.enqueue(lifespan_app.use_in_a_thread, "b")
        ledger.wait_for("used a")
        ledger.wait_for("used b")
        stopped(worker)
    entered = pids(ledger, "enter ")
    assert len(set(entered)) == 2
    assert pids(ledger, "leave ") == entered
    for line in ledger.lines_of("used "):
        _, _, pid, region = line.split()
        assert int(pid) in entered
        assert region == "north"


@ON_A_FILE
def test_a_child_that_is_killed_has_a_successor_with_a_lifespan(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready() as worker:
        client.enqueue(lifespan_app.die)
        ledger.wait_for("used again")
        client.enqueue(lifespan_app.use, "next")
        ledger.wait_for("used next")
        stopped(worker)
    killed, *others = [int(line.split()[1]) for line in ledger.lines_of("enter ")]
    assert others
    assert killed not in pids(ledger, "leave ")
    assert pids(ledger, "leave ") == sorted(others)


@ON_A_FILE
def test_recycling_and_a_reload_leave_it(place: Place, client: Client, ledger: Ledger) -> None:
    """The next one is entered before the one before is left."""
    with Worker(place.url, ledger, "--max-tasks-per-child", "1", app=APP).ready() as worker:
        client.enqueue(lifespan_app.use, "a")
        ledger.wait_for("leave ")
        worker.signal(signal.SIGHUP)
        ledger.wait_for("leave ", 2)
        stopped(worker)
    assert pids(ledger, "leave ") == pids(ledger, "enter ")
    kinds = [line.split()[0] for line in ledger.lines() if line.startswith(("enter", "leave"))]
    assert kinds == ["enter", "enter", "leave", "enter", "leave", "leave"]


@ON_A_FILE
def test_a_task_that_outlasts_the_grace_ends_before_it(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue(lifespan_app.stay, "a")
    with Worker(place.url, ledger, "--grace", "0.2", app=APP) as worker:
        ledger.wait_for("stay a")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    assert pids(ledger, "leave ") == pids(ledger, "enter ")
    client.wait_until_counts("work", ready=1, running=0)


@ON_A_FILE
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hangs at its end", "did not end within 0.3 s of being told to, and is cut off"),
        ("blocks at its end", "did not leave its application's lifespan, and was killed"),
        ("fails at its end", "RuntimeError: no goodbye"),
    ],
)
def test_one_that_does_not_end_well(place: Place, ledger: Ledger, how: str, said: str) -> None:
    with Worker(place.url, ledger, "--stop-timeout", "0.3", app=APP, environment={"LIFESPAN": how}).ready() as worker:
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert time.monotonic() - began < 60
        assert worker.output.count(said) == 1, worker.output
    assert not ledger.lines_of("leave ")


@ON_A_FILE
def test_one_that_fails_is_an_application_that_cannot_start(place: Place, ledger: Ledger) -> None:
    """Said once, with the traceback of its own code."""
    with Worker(place.url, ledger, "--processes", "3", app=APP, environment={"LIFESPAN": "fails"}) as worker:
        assert worker.exit_code() == 1
        assert worker.output.count("Traceback") == 1
        assert "leveret: the application's lifespan could not be entered: RuntimeError: no database (" in worker.output
        assert "/leveret/executors/" not in worker.output
        assert "contextlib" not in worker.output


@ON_A_FILE
def test_one_that_takes_too_long_to_start(place: Place, ledger: Ledger) -> None:
    with Worker(place.url, ledger, "--start-timeout", "2", app=APP, environment={"LIFESPAN": "hangs"}) as worker:
        assert worker.exit_code() == 1
        assert "entering its lifespan took more than 2 s" in worker.output


@ON_A_FILE
def test_one_that_breaks_while_tasks_run(place: Place, client: Client, ledger: Ledger) -> None:
    """A task group in it fails, so what it gave to the tasks is closed: they run again in another child, uncharged."""
    with Worker(place.url, ledger, app=APP).ready() as worker:
        client.enqueue(lifespan_app.break_the_pool)
        ledger.wait_for("used after the break")
        wait_until(lambda: "ConnectionError: the pool's keeper is gone" in worker.output, worker.output)
        client.enqueue(lifespan_app.use, "next")
        ledger.wait_for("used next")
        client.wait_until_counts("work", ready=0, running=0, dead=0)
        assert worker.output.count("lifespan ended while its process ran tasks") == 1, worker.output
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
