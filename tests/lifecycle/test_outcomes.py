"""How a run ends, and what becomes of its task: on every broker, by a real worker."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import PATIENCE, wait_until
from tests.support.workers import LEDGER_APP, Ledger, Worker, leveret

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Place


def test_a_raised_exception_returns_the_task(place: Place, client: Client, ledger: Ledger) -> None:
    """At once, counted; SystemExit is no exception to that, and ends no child."""
    client.enqueue(ledger_app.fail_until, "a", 2)
    client.enqueue(ledger_app.leave, "b")
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("end a")
        ledger.wait_for("end b")
        client.wait_until_empty("work")
        worker.wait_for("next try in 0.0 s: ValueError: not yet: a", 2)
        assert "attempt 2 failed after " in worker.output
        worker.wait_for("SystemExit: 3")
        assert "child process" not in worker.output
    assert (ledger.count("try a"), ledger.count("try b")) == (3, 2)
    assert client.stats("work").dead == 0


def test_acknowledged_before_the_run_is_at_most_once(place: Place, client: Client, ledger: Ledger) -> None:
    """A worker that dies loses the task, and a failed one does not run again: as the tutorial's no_ack."""
    client.enqueue(ledger_app.at_most_once, "a", 60)
    client.enqueue(ledger_app.fail_at_most_once, "b")
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("start a")
        worker.wait_for(", and does not run again")
        client.wait_until_empty("work")
        worker.kill_group()
    client.enqueue(ledger_app.say, "after")
    with Worker(place.url, ledger, "--concurrency", "1"):
        ledger.wait_for("said after")
        client.wait_until_empty("work")
    assert (ledger.count("start a"), ledger.count("end a"), ledger.count("try b")) == (1, 0, 1)
    assert client.stats("work").dead == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_line_that_a_task_prints_is_one_write(ledger: Ledger, tmp_path: Path, unbuffered: str) -> None:
    """Lines of several children do not run into each other, in a container either, where Python is often unbuffered."""
    url = f"sqlite:///{tmp_path / 'tasks.db'}"
    Client(url).enqueue(ledger_app.announce, "Invoice", "7")
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # which keeps writes apart
    environment = {**os.environ, "LEDGER": str(ledger.path), "PYTHONUNBUFFERED": unbuffered}
    arguments = [sys.executable, "-m", "leveret", "worker", LEDGER_APP, "--url", url, "--processes", "1"]
    with (
        ours,
        subprocess.Popen(arguments, stdout=theirs.fileno(), stderr=subprocess.DEVNULL, env=environment) as worker,
    ):
        theirs.close()
        ours.settimeout(PATIENCE)
        written = ours.recv(1_024)
        worker.terminate()
    assert written == b"Invoice 7 is on its way\n"


def said_dead(worker: Worker) -> int:
    """How many deaths its log tells of; the run time is there where it began to run."""
    return len(re.findall(r" dead(?: after [0-9.]+ s)?: ", worker.output))


def test_what_cannot_run_is_dead_with_the_reason(place: Place, client: Client, ledger: Ledger) -> None:
    """Unknown task, unreadable body, arguments that do not fit, no task at all: kept, counted, never run again."""
    expected = {
        client.publish(b'{"args": []}', queue="work", task="nobody"): "no task is registered as 'nobody'",
        client.publish(b"\xff\x00 not JSON", queue="work", task="say"): "not JSON",
        client.publish(b"[1, 2]", queue="work", task="say"): "not JSON of the form",
        client.publish(b'{"args": [1, 2, 3]}', queue="work", task="say"): "too many positional arguments",
        client.publish(b'{"args": [7]}', queue="work", task="say"): "argument 'text' of task 'say' does not fit str",
        client.publish(b"raw", queue="work"): "queue 'work' has no default task",
        client.enqueue(ledger_app.give_up, "x"): "gave up: x",
    }
    client.enqueue(ledger_app.say, "the neighbour")
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("said the neighbour")
        letters = client.wait_until_dead("work", len(expected))
        client.wait_until_empty("work")
        wait_until(lambda: said_dead(worker) >= len(expected), "each death is told")
        assert said_dead(worker) == len(expected)
    assert {letter.envelope.id for letter in letters} == expected.keys()
    for letter in letters:
        assert expected[letter.envelope.id] in letter.reason
        assert letter.died_at is not None
    client.wait_until_counts("work", dead=len(expected))
    (given_up,) = (letter for letter in letters if letter.envelope.task == "give_up")
    assert "raise Dead" in given_up.traceback
    assert [letter.envelope.body for letter in letters if b"\xff" in letter.envelope.body] == [b"\xff\x00 not JSON"]


def test_many_queues_in_one_worker_and_typed_tasks(place: Place, client: Client, ledger: Ledger) -> None:
    """As patterns.Master: many tasks in a queue, many queues in a worker, or only those named."""
    client.enqueue(ledger_app.say, "a")
    client.enqueue(ledger_app.say_elsewhere, "b")
    client.publish(b"\x00\xff", queue="raw")
    with Worker(place.url, ledger, "-q", "other", "-q", "raw"):
        ledger.wait_for("said b")
        ledger.wait_for(r"raw b'\x00\xff'")
        client.wait_until_empty("other")
    assert ledger.count("said a") == 0
    with Worker(place.url, ledger):
        ledger.wait_for("said a")


def test_a_task_may_enqueue_another(place: Place, client: Client, ledger: Ledger) -> None:
    """A child uses the broker that its worker was told to use."""
    client.enqueue(ledger_app.enqueue_another, "from a task")
    with Worker(place.url, ledger):
        ledger.wait_for("said from a task")


def test_the_queues_command_counts(place: Place, client: Client, ledger: Ledger) -> None:
    """`leveret queues`: ready, running, dead and consumers, as JSON and as a table; no plugin on RabbitMQ."""
    client.enqueue(ledger_app.give_up, "x")
    client.enqueue_many(ledger_app.pause, [(str(number), 60) for number in range(5)])
    with Worker(place.url, ledger, "--concurrency", "2"):
        ledger.wait_for("start", 2)
        client.wait_until_dead("work", 1)
        client.wait_until_counts("work", ready=3, running=2, dead=1, consumers=1)
        (counted,) = json.loads(leveret("queues", "-q", "work", "--json", "--url", place.url))
        assert counted == {
            "name": "work",
            "ready": 3,
            "running": 2,
            "dead": 1,
            "consumers": 1,
            "delayed": 0,
            "silent_consumers": 0,
            "paused": False,
            "missing": [],
            "limited": 0,
        }
        table = leveret("queues", "--url", place.url).splitlines()
        assert table[0].split() == ["name", "ready", "limited", "running", "delayed", "dead", "consumers"]
        assert ["work", "3", "0", "2", "0", "1", "1"] in [line.split() for line in table]
    assert "gave up: x" in leveret("dead", "list", "work", "--url", place.url)
    (letter,) = json.loads(leveret("dead", "list", "work", "--json", "--url", place.url))
    assert (letter["task"], letter["reason"]) == ("give_up", "gave up: x")
