"""Retries, delays and expiry with real workers, on every broker that outlives a process."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from tests.support import ledger_app
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client


def test_attempts_end(place: Place, client: Client, ledger: Ledger) -> None:
    """A task that always fails is dead after its attempts, with the last error and its traceback."""
    client.enqueue(ledger_app.fail_always, "a")
    with Worker(place.url, ledger):
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
    assert ledger.count("try a") == 3
    assert letter.reason == "ValueError: a; attempt 3 of 3 failed"
    assert letter.envelope.attempt == 3
    assert "raise ValueError(text)" in letter.traceback


def test_poison_ends(place: Place, client: Client, ledger: Ledger) -> None:
    """A task that kills its process is charged and then dead, with the signal; its neighbours run, once each."""
    client.enqueue(ledger_app.kill_the_child, "poison")
    client.enqueue_many(ledger_app.say, [(str(number),) for number in range(20)])
    with Worker(place.url, ledger, "--concurrency", "1") as worker:
        (letter,) = client.wait_until_dead("work", 1)
        client.wait_until_empty("work")
        assert "the connection" not in worker.output
    assert ledger.count("try poison") == 3
    assert "was killed by SIGKILL; attempt 3 of 3 failed" in letter.reason
    assert sorted(ledger.lines()) == sorted(["try poison"] * 3 + [f"said {number}" for number in range(20)])


def test_a_delay_outlives_the_broker(place: Place, client: Client, ledger: Ledger) -> None:
    """Enqueued for later, with nobody running: kept through a restart of the node, never early, and then run."""
    client.enqueue(ledger_app.say.options(delay=0.3), "first of its kind")
    due = time.time() + 9
    client.enqueue(ledger_app.say.options(delay=9), "later")
    wait_until(lambda: client.stats("work").delayed >= 1, "the delayed task is counted")
    if place.node is not None:
        place.node.restart()
    with Worker(place.url, ledger):
        ledger.wait_for("said first of its kind")
        if time.time() < due - 0.5:
            assert ledger.count("said later") == 0
        ledger.wait_for("said later")
        assert time.time() >= due
        client.wait_until_empty("work")
    client.wait_until_counts("work", delayed=0)


def test_what_expired_is_dead(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue(ledger_app.say.options(expires=0), "too late")
    client.enqueue(ledger_app.say.options(expires=3600), "in time")
    with Worker(place.url, ledger):
        (letter,) = client.wait_until_dead("work", 1)
        ledger.wait_for("said in time")
    assert letter.reason.startswith("it expired ")
    assert ledger.count("said too late") == 0


def test_a_task_says_when(place: Place, client: Client, ledger: Ledger) -> None:
    """raise Retry(delay=...): not before then, and the attempt is counted."""
    client.enqueue(ledger_app.not_now, "a")
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("end a")
        worker.wait_for("next try in 1.5 s: leveret.Retry: not now")
    first, second = (float(line.split()[-1]) for line in ledger.lines() if line.startswith("at a"))
    assert second - first >= 1.5


def test_dead_letters_are_decided_about(place: Place, client: Client, ledger: Ledger) -> None:
    """leveret dead list, show, retry, drop; by id, by task, by error, by age, or all."""
    wrong = client.publish(b'{"args": [7]}', queue="work", task="say")
    unknown = client.publish(b"{}", queue="work", task="nobody")
    given_up = client.enqueue(ledger_app.give_up, "x")
    url = ("--url", place.url)
    with Worker(place.url, ledger):
        client.wait_until_dead("work", 3)
        client.wait_until_empty("work")
    assert listed(*url, "--task", "say") == [wrong]
    assert listed(*url, "--error", "gave up") == [given_up]
    assert listed(*url, "--older", "3600") == []
    assert "no dead letters that match" in leveret("dead", "list", "work", *url, "--task", "other")
    shown = leveret("dead", "show", "work", given_up, *url)
    assert "reason: gave up: x" in shown
    assert "raise Dead" in shown
    assert "has no dead letter 'none'" in leveret("dead", "show", "work", "none", *url, fails=True)
    assert "say which" in leveret("dead", "retry", "work", *url, fails=True)
    assert "not among the dead letters" in leveret("dead", "drop", "work", "none", *url, fails=True)
    assert leveret("dead", "drop", "work", unknown, *url) == "1 dead letter of queue 'work' deleted\n"
    assert leveret("dead", "retry", "work", "--all", *url) == "2 dead letters of queue 'work' put back\n"
    client.wait_until_counts("work", ready=2, dead=0)
    with Worker(place.url, ledger):
        client.wait_until_dead("work", 2)
    assert sorted(listed(*url)) == sorted([wrong, given_up])


def listed(*options: str) -> list[str]:
    return [letter["id"] for letter in json.loads(leveret("dead", "list", "work", "--json", *options))]
