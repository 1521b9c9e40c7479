"""A bad task costs itself, not its neighbours: one that blocks, kills its process, takes too long, or leaks."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import ledger_app
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, is_alive

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client


def pid_in(line: str) -> int:
    return int(line.split()[-1])


def test_what_waits_behind_a_blocked_loop_is_moved(place: Place, client: Client, ledger: Ledger) -> None:
    """The blocking task runs once, for longer than any heartbeat; the watchdog names it, with the line it is at."""
    url = place.url + ("?heartbeat=2" if place.node else "")
    with Worker(url, ledger).ready() as worker:
        bad = client.enqueue(ledger_app.block_the_loop, "bad", 15)
        child = pid_in(ledger.wait_for("start bad"))
        client.enqueue_many(ledger_app.whose, [(str(number),) for number in range(20)])
        ledger.wait_for("by ", 20)
        assert ledger.count("end bad") == 0
        assert all(pid_in(line) != child for line in ledger.lines() if line.startswith("by "))
        worker.wait_for(f"block_the_loop {bad}: blocks the event loop")
        worker.wait_for("time.sleep(seconds)")
        ledger.wait_for("end bad")
        client.wait_until_empty("work")
        wait_until(lambda: not is_alive(child), "the blocked child leaves")
        client.enqueue(ledger_app.whose, "later")
        ledger.wait_for("by later")
        assert "lost" not in worker.output
    assert ledger.count("start bad") == 1
    assert [ledger.count(f"by {number} ") for number in range(20)] == [1] * 20


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_task_that_holds_the_interpreter(place: Place, client: Client, ledger: Ledger) -> None:
    """No thread of its process can help: the worker takes the others back without it."""
    with Worker(place.url, ledger).ready() as worker:
        client.enqueue(ledger_app.hold_the_interpreter, "bad")
        child = pid_in(ledger.wait_for("start bad"))
        client.enqueue_many(ledger_app.whose, [(str(number),) for number in range(20)])
        ledger.wait_for("by ", 20)
        assert ledger.count("end bad") == 0
        worker.wait_for(f"a child process (pid {child}) is blocked: ")
        ledger.wait_for("end bad")
        client.wait_until_empty("work")
    assert ledger.count("start bad") == 1
    assert [ledger.count(f"by {number} ") for number in range(20)] == [1] * 20


@pytest.mark.parametrize("place", ["sqlite", "rabbitmq-4"], indirect=True)
def test_the_neighbours_of_a_poisonous_task(place: Place, client: Client, ledger: Ledger) -> None:
    """Charged is the guilty one alone: of those that were running, each runs again by itself, uncharged."""
    client.enqueue_many(ledger_app.pause, [(f"before{number}", 1.0) for number in range(5)])
    bad = client.enqueue(ledger_app.kill_the_child, "bad")
    client.enqueue_many(ledger_app.pause, [(f"after{number}", 0.2) for number in range(15)])
    with Worker(place.url, ledger) as worker:
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
        for number in range(15):
            ledger.wait_for(f"end after{number}")
        for number in range(5):
            ledger.wait_for(f"end before{number}")
        assert "lost" not in worker.output
        assert worker.output.count(", next try in ") == 2
    assert letter.envelope.id == bad
    assert "was killed by SIGKILL" in letter.reason
    assert "attempt 3 of 3 failed" in letter.reason
    assert ledger.count("try bad") == 4  # its three attempts, and the one whose death had several suspects
    for line in (line for line in ledger.lines() if line.startswith("start ")):
        assert ledger.count(line.rpartition(" ")[0] + " ") <= 2


@pytest.mark.parametrize("place", ["sqlite", "rabbitmq-4"], indirect=True)
def test_an_at_most_once_neighbour_is_not_run_again(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger).ready():
        client.enqueue(ledger_app.at_most_once, "once", 60)
        client.enqueue(ledger_app.pause, "again", 2)
        ledger.wait_for("start once")
        ledger.wait_for("start again")
        client.enqueue(ledger_app.kill_the_child, "bad")
        client.wait_until_dead("work", 1)
        ledger.wait_for("end again")
        client.wait_until_empty("work")
    assert ledger.count("start once") == 1


def test_a_timeout_cancels_a_coroutine(place: Place, client: Client, ledger: Ledger) -> None:
    """It is a failed attempt like others, and costs no child."""
    client.enqueue(ledger_app.overrun, "in time", 0.1)
    bad = client.enqueue(ledger_app.overrun, "bad", 60)
    with Worker(place.url, ledger) as worker:
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
        ledger.wait_for("end in time")
        assert "child process" not in worker.output
    assert letter.envelope.id == bad
    assert "TimedOut: task 'overrun' ran longer than its timeout of 0.5 s; attempt 2 of 2 failed" in letter.reason
    assert "await asyncio.sleep(seconds)" in letter.traceback
    assert ledger.count("try bad") == 2


@pytest.mark.parametrize("kind", ["thread", "stubborn"])
def test_a_timeout_that_is_not_heeded_costs_the_child(place: Place, client: Client, ledger: Ledger, kind: str) -> None:
    """Charged is that task alone. Its neighbours may finish first; one that does not runs again, uncharged."""
    with Worker(place.url, ledger).ready() as worker:
        client.enqueue(ledger_app.pause, "short", 2)
        client.enqueue(ledger_app.pause, "long", 12)
        child = pid_in(ledger.wait_for("start long"))
        if kind == "thread":
            bad = client.enqueue(ledger_app.overrun_in_thread, "bad", 60)
        else:
            bad = client.enqueue(ledger_app.overrun_stubbornly, "bad")
        worker.wait_for("a task outlasts its timeout")
        client.enqueue(ledger_app.whose, "meanwhile")
        assert pid_in(ledger.wait_for("by meanwhile")) != child
        (letter,) = client.wait_until_dead("work", 1)
        ledger.wait_for("end long")
        client.wait_until_empty("work")
        assert " long " not in worker.output
    assert letter.envelope.id == bad
    assert "ran longer than its timeout of 0.5 s and did not end, so its child process" in letter.reason
    assert "attempt 2 of 2 failed" in letter.reason
    assert (ledger.count("try bad"), ledger.count("start short"), ledger.count("end short")) == (2, 1, 1)
    assert 2 <= ledger.count("start long") <= 3


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_task_that_ends_in_overtime_has_succeeded(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue(ledger_app.overrun_in_thread, "late", 1.5)
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("end late")
        client.wait_until_empty("work")
        assert "failed" not in worker.output
    assert client.stats("work").dead == 0


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_children_are_recycled_by_tasks(place: Place, client: Client, ledger: Ledger) -> None:
    """One that runs a long task leaves when it is done; nothing is lost or charged."""
    sent = 0

    def children() -> set[int]:
        return {pid_in(line) for line in ledger.lines() if line.startswith("by ")}

    def four_had_some() -> bool:
        nonlocal sent
        client.enqueue_many(ledger_app.whose, [(f"{number}",) for number in range(sent, sent + 20)])
        sent += 20
        ledger.wait_for("by ", sent)
        return len(children()) >= 4

    with Worker(place.url, ledger, "--max-tasks-per-child", "10", "--processes", "2").ready() as worker:
        client.enqueue(ledger_app.pause, "long", 3)
        first = pid_in(ledger.wait_for("start long"))
        wait_until(four_had_some, "four children ran some of the tasks")
        worker.wait_for("is recycled after")
        wait_until(lambda: ledger.count("end long") == 1 and not is_alive(first), "the first child leaves")
        assert "failed" not in worker.output
        client.wait_until_empty("work")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    assert ledger.count("by ") == sent
    assert not [pid for pid in children() if is_alive(pid)]


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_children_are_recycled_by_memory(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, "--max-rss", "150").ready() as worker:
        client.enqueue(ledger_app.leak, "small", 1)
        first = pid_in(ledger.wait_for("by small"))
        client.enqueue(ledger_app.leak, "large", 200)
        assert pid_in(ledger.wait_for("by large")) == first
        worker.wait_for(f"(pid {first}) is recycled after")
        wait_until(lambda: not is_alive(first), "the child that leaked leaves")
        client.enqueue(ledger_app.whose, "next")
        assert pid_in(ledger.wait_for("by next")) != first
