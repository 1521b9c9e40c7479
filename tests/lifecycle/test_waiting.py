"""Tasks that wait for other tasks, and what tasks leave unfinished: it is said, and costs a stop no time."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import waiting_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Program, Worker

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(waiting_app.__file__)}:app"
ON_SQLITE = pytest.mark.parametrize("place", ["sqlite"], indirect=True)


@pytest.fixture
def client(place: Place) -> Client:
    return Client(place.url, waiting_app.app)


@pytest.mark.parametrize("place", ["sqlite", "rabbitmq-4"], indirect=True)
@pytest.mark.parametrize("how", ["result", "gather"])
def test_a_task_that_waits_for_one_that_has_no_slot_is_told_of(
    place: Place, client: Client, ledger: Ledger, how: str
) -> None:
    """And a stop does not wait for it: it is handed back, and gets on where there are slots."""
    with Worker(place.url, ledger, "--concurrency", "1", "--grace", "600", app=APP).ready() as worker:
        client.enqueue(waiting_app.whole, "a", how)
        worker.wait_for("all 1 slots are held by tasks that wait for the results of tasks that have not begun")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert "not waiting for 1 tasks" in worker.output
    with Worker(place.url, ledger, "--concurrency", "2", app=APP) as worker:
        ledger.wait_for("got a")
        client.wait_until_empty("work")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert "did not await" not in worker.output, "what an enqueue has started is not the task's"


@ON_SQLITE
def test_a_task_that_waits_for_one_that_runs_elsewhere_is_waited_for(
    place: Place, client: Client, ledger: Ledger
) -> None:
    with Worker(place.url, ledger, "--concurrency", "1", app=APP).ready() as worker:
        client.enqueue(waiting_app.whole, "a", "result")
        ledger.wait_for("whole a")
        worker.signal(signal.SIGTERM)
        with Worker(place.url, ledger, app=APP):
            ledger.wait_for("got a")
        assert worker.exit_code() == 0
        assert "not waiting" not in worker.output or ledger.count("whole a") == 2


@ON_SQLITE
def test_what_a_task_has_not_awaited_gets_a_moment_at_a_stop(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready() as worker:
        client.enqueue(waiting_app.fire_and_forget, "long", 600)
        client.enqueue(waiting_app.fire_and_forget, "short", 0.5)
        ledger.wait_for("fired", 2)
        client.wait_until_empty("work")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert "asyncio tasks that tasks started and did not await are cancelled" in worker.output
        assert "_later" in worker.output
        assert not ledger.count("later long")
    assert ledger.count("later short")


@ON_SQLITE
def test_a_childs_death_by_an_alarm_is_explained(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP):
        client.enqueue(waiting_app.alarm)
        (letter,) = client.wait_until_dead("work", 1)
        assert "was killed by SIGALRM (a timer of a task's, signal.alarm()" in letter.reason


#: A worker that takes in orphans as the first process of a container does.
AS_INIT = """
import ctypes, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
from leveret.cli import main
sys.argv[0] = "leveret"
main()
"""


def zombies_of(pid: int) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                state, parent, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if state == "Z" and int(parent) == pid:
                found.append(entry.name)
    return found


@ON_SQLITE
def test_a_worker_that_is_the_first_process_leaves_no_zombies(place: Place, client: Client, ledger: Ledger) -> None:
    output = ledger.path.with_name("init.log")
    arguments = ["-c", AS_INIT, "worker", APP, "--url", place.url]
    with Program(arguments, output, {"LEDGER": str(ledger.path)}) as worker:
        worker.wait_for("waiting for tasks on")
        client.enqueue(waiting_app.leave_orphans, 20)
        ledger.wait_for("left orphans")
        wait_until(lambda: not zombies_of(worker.pid), "no zombies are left")
        orphans = [int(line.split()[-1]) for line in ledger.lines_of("orphan")]
        assert len(orphans) == 20
        wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in orphans), "the orphans are reaped")
        client.enqueue(waiting_app.part, "after")
        ledger.wait_for("part after")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
