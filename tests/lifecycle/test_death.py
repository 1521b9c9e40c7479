"""Whatever dies, nothing is lost: a worker, its child, its whole group, the node, everything that holds the file."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, is_alive

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.nodes import Node

#: The promise is two seconds; alone on its cores this takes 0.5 on SQLite and 0.03 on RabbitMQ. With others at work:
#: less than any timeout that would come to the same end (seconds). `make chaos` reports how long tasks waited.
TAKEN_OVER = 15.0


def pid_in(line: str) -> int:
    return int(line.split()[-1])


@pytest.mark.parametrize("how", ["worker", "group"])
def test_a_killed_workers_task_is_taken_over(place: Place, client: Client, ledger: Ledger, how: str) -> None:
    client.enqueue(ledger_app.pause, "long", 60)
    with Worker(place.url, ledger) as victim:
        child = pid_in(ledger.wait_for("start long"))
        with Worker(place.url, ledger).ready() as other:
            if how == "worker":
                victim.kill()
            else:
                victim.kill_group()
            second = pid_in(ledger.wait_for("start long", 2, within=TAKEN_OVER))
            wait_until(lambda: not is_alive(child), "the killed worker's child is gone")
            assert is_alive(second)
            other.kill()
            wait_until(lambda: not is_alive(second), "the other worker's child is gone")


def test_only_the_child_dies(place: Place, client: Client, ledger: Ledger) -> None:
    """Its task is charged an attempt and runs again, by the same worker; the connection does not notice."""
    with Worker(place.url, ledger, "--processes", "1").ready() as worker:
        client.enqueue(ledger_app.pause, "a", 1.5)
        child = pid_in(ledger.wait_for("start a"))
        os.kill(child, signal.SIGKILL)
        assert pid_in(ledger.wait_for("start a", 2)) != child
        ledger.wait_for("end a")
        client.wait_until_empty("work")
        worker.wait_for("was killed by SIGKILL")
        worker.wait_for("attempt 1 failed")
        assert "lost" not in worker.output
    assert ledger.count("end a") == 1


def test_a_busy_survivor_notices_too(place: Place, client: Client, ledger: Ledger) -> None:
    """Not only one that has time to look around: under steady load it never has."""
    client.enqueue(ledger_app.pause, "long", 60)
    with Worker(place.url, ledger, "--concurrency", "1") as victim:
        ledger.wait_for("start long")
        with Worker(place.url, ledger, "--concurrency", "2").ready() as survivor:
            client.enqueue_many(ledger_app.pause, [(f"load {number}", 0.05) for number in range(400)])
            ledger.wait_for("start load", 20)
            victim.kill()
            ledger.wait_for("start long", 2, within=TAKEN_OVER)
            survivor.kill_group()


def test_a_child_that_forked_is_missed_at_once(place: Place, client: Client, ledger: Ledger) -> None:
    """Its death is seen though the process that it left behind holds its socket open; that one ends with it."""
    with Worker(place.url, ledger).ready() as worker:
        client.enqueue(ledger_app.fork_and_wait, "a")
        *_, orphan, child = ledger.wait_for("start a").split()
        os.kill(int(child), signal.SIGKILL)
        *_, second_orphan, _ = ledger.wait_for("start a", 2).split()
        assert not is_alive(int(orphan))
        worker.kill()
        wait_until(lambda: not is_alive(int(second_orphan)), "the second one is gone, too")


def test_a_dead_workers_waiting_tasks_go_to_others(place: Place, client: Client, ledger: Ledger) -> None:
    """Not only what it ran, also what it had been given and not started."""
    client.enqueue_many(ledger_app.pause, [(f"t{number}", 0.3) for number in range(6)])
    with Worker(place.url, ledger, "--concurrency", "1", "--prefetch", "unlimited") as victim:
        ledger.wait_for("start")
        victim.kill()
    with Worker(place.url, ledger, "--concurrency", "6"):
        for number in range(6):
            ledger.wait_for(f"end t{number}")
        client.wait_until_empty("work")


def test_tasks_survive_the_broker(place: Place, client: Client, ledger: Ledger) -> None:
    """kill -9 of the RabbitMQ node; of every process that holds the SQLite file."""
    client.enqueue_many(ledger_app.say, [(str(number),) for number in range(50)])
    client.enqueue(ledger_app.pause, "held", 60)
    with Worker(place.url, ledger, "--concurrency", "1", "--prefetch", "unlimited") as worker:
        ledger.wait_for("start held")
        worker.kill_group()
    left = 51 - ledger.count("said")
    if place.node is not None:
        place.node.restart()

    def kept() -> bool:
        stats = client.stats("work")
        return stats.ready + stats.running >= left

    wait_until(kept, f"the queue counts the {left} tasks that are left")
    client.enqueue(ledger_app.say, "after")
    with Worker(place.url, ledger):
        ledger.wait_for("said after")
        ledger.wait_for("start held", 2)
    assert {f"said {number}" for number in range(50)} <= set(ledger.lines())


def test_a_long_task_is_not_delivered_twice(place: Place, client: Client, ledger: Ledger) -> None:
    """Longer than three heartbeats and than any round of looking for dead workers, blocked all the while."""
    url = place.url + ("?heartbeat=1" if place.node else "")
    with Worker(url, ledger).ready() as one, Worker(url, ledger).ready() as two:
        client.enqueue(ledger_app.block_the_loop, "long", 7)
        ledger.wait_for("end long")
        client.wait_until_empty("work")
        assert "lost" not in one.output + two.output
    assert ledger.count("start long") == 1


def test_work_goes_on_through_a_restart_of_the_node(node: Node, ledger: Ledger) -> None:
    """The worker waits for the node, with one log line a try, and goes on."""
    client = Client(node.url)
    with Worker(node.url, ledger, "--concurrency", "2").ready() as worker:
        client.enqueue_many(ledger_app.pause, [(f"t{number}", 0.2) for number in range(20)])
        ledger.wait_for("end", 5)
        node.restart()
        for number in range(20):
            ledger.wait_for(f"end t{number}")
        client.wait_until_empty("work")
        worker.wait_for("trying again in")
        assert "Traceback" not in worker.output
        assert "guest:guest" not in worker.output
