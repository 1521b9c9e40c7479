"""Pausing a queue with real workers: all stop at once, it outlives them and the broker, and resumed, all is done."""

from __future__ import annotations

import json
import signal
import time
from typing import TYPE_CHECKING

from leveret.brokers.rabbitmq.queues.topology import pause_marker
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.nodes import Node

PAUSED = "paused queues, of which nothing is started: work"
GOES_ON = "paused queues, of which nothing is started: none any more"


def stays(ledger: Ledger, count: int) -> None:
    """Fails when something more is started."""
    time.sleep(1.0)  # showing that nothing happens
    assert ledger.count("start") == count


def test_a_pause_stops_all_workers(place: Place, client: Client, ledger: Ledger) -> None:
    """What runs ends and is settled; what waited in a worker goes back; later workers and a restart change nothing."""
    client.enqueue_many(ledger_app.held, [(name,) for name in "abcdef"])
    options = ("--concurrency", "1", "--prefetch", "2")
    with Worker(place.url, ledger, *options) as one, Worker(place.url, ledger, *options) as two:
        ledger.wait_for("start", 2)
        assert leveret("queues", "pause", "work", "--url", place.url) == "queue 'work' is paused\n"
        one.wait_for(PAUSED)
        two.wait_for(PAUSED)
        for name in "abcdef":
            ledger.path.with_name(f"{ledger.path.name}.{name}").touch()
        ledger.wait_for("end", 2)
        wait_until(lambda: client.stats("work").running == 0, "what ran is settled, and what waited is handed back")
        assert ledger.count("start") == 2
        client.enqueue(ledger_app.pause, "g", 0.1)
        with Worker(place.url, ledger).ready() as three:
            three.wait_for(PAUSED)
            if place.node is not None:
                place.node.restart()
                for worker in (one, two, three):
                    worker.wait_for("connected to RabbitMQ again")
            stats = wait_until(lambda: (s := client.stats("work")).consumers == 3 and s, "all workers are there")
            assert stats
            assert (stats.ready, stats.running, stats.dead, stats.paused) == (5, 0, 0, True)
            stays(ledger, 2)
            assert leveret("queues", "resume", "work", "--url", place.url) == "queue 'work' goes on\n"
            for worker in (one, two, three):
                worker.wait_for(GOES_ON)
            ledger.wait_for("end", 7)
            client.wait_until_empty("work")
    assert ledger.count("start") == 7
    assert not client.stats("work").paused


def test_a_worker_stops_and_takes_elsewhere_while_a_queue_is_paused(
    place: Place, client: Client, ledger: Ledger
) -> None:
    """Only the paused queue is; a stop in a pause is like any other."""
    client.enqueue(ledger_app.pause, "a", 30)
    with Worker(place.url, ledger, "--grace", "0.5") as worker:
        ledger.wait_for("start a")
        leveret("queues", "pause", "work", "--url", place.url)
        worker.wait_for(PAUSED)
        client.enqueue(ledger_app.say, "paused")
        client.enqueue(ledger_app.say_elsewhere, "elsewhere")
        ledger.wait_for("said elsewhere")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
        assert "Traceback" not in worker.output
    stats = client.stats("work")
    assert (stats.ready, stats.running, stats.dead) == (2, 0, 0)
    assert ledger.count("said paused") == 0
    leveret("queues", "resume", "work", "--url", place.url)


def test_what_the_command_prints(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue(ledger_app.say, "a")
    leveret("queues", "pause", "work", "--app", f"{ledger_app.__file__}:app", "--url", place.url)
    table = leveret("queues", "-q", "work", "--url", place.url)
    assert "work (paused)" in table
    (row,) = json.loads(leveret("queues", "-q", "work", "--json", "--url", place.url))
    assert (row["name"], row["paused"], row["ready"]) == ("work", True, 1)
    for command in ("pause", "resume"):
        printed = leveret("queues", command, "wrok", "--url", place.url, fails=True)
        assert printed.startswith("leveret: queue 'wrok' does not exist")
    leveret("queues", "resume", "work", "--url", place.url)
    assert "(paused)" not in leveret("queues", "-q", "work", "--url", place.url)
    for command in ("pause", "resume"):
        assert "Examples:" in leveret("queues", command, "--help")
    with Worker(place.url, ledger):
        ledger.wait_for("said a")


def test_a_node_that_is_killed_at_once_remembers(node: Node) -> None:
    """When the command has ended, the pause is durable, and it can be ended after a restart."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "a")
    leveret("queues", "pause", "work", "--url", node.url)
    node.restart()
    assert client.stats("work").paused
    leveret("queues", "resume", "work", "--url", node.url)
    assert not client.stats("work").paused
    node.restart()
    assert not client.stats("work").paused


def test_a_deleted_queue_stays_paused(node: Node, ledger: Ledger) -> None:
    """The pause is the name's: a queue that is made again starts nothing until it is resumed."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "gone")
    leveret("queues", "pause", "work", "--url", node.url)
    with Worker(node.url, ledger).ready() as worker:
        node.ctl("delete_queue", "work")
        client.enqueue(ledger_app.say, "later")
        worker.wait_for(PAUSED)
        wait_until(lambda: client.stats("work").ready == 1, "the task waits in the new queue")
        node.ctl("delete_queue", "work")
        leveret("queues", "resume", "work", "--url", node.url)
        worker.wait_for(GOES_ON)
        client.enqueue(ledger_app.say, "last")
        ledger.wait_for("said last")
    assert ledger.lines() == ["said last"]
    assert pause_marker("work").name not in {row["name"] for row in node.queues("name")}


def test_a_policy_cannot_end_a_pause(node: Node, ledger: Ledger) -> None:
    """It expires queues that nobody uses, as the mark of a pause is; `leveret queues` names what is gone."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "a")
    with Worker(node.url, ledger) as worker:
        ledger.wait_for("said a")
        assert "missing" not in leveret("queues", "-q", "work", "--url", node.url)
        node.ctl("set_policy", "sweep", r"\.paused$", '{"expires": 500}', "--apply-to", "queues")
        try:
            leveret("queues", "pause", "work", "--url", node.url)
            worker.wait_for(PAUSED)
            wait_until(lambda: "work.paused" not in {row["name"] for row in node.queues("name")}, "the mark expired")
        finally:
            node.ctl("clear_policy", "sweep")
        node.ctl("delete_queue", "work.dead")
        client.enqueue(ledger_app.say, "b")
        table = leveret("queues", "-q", "work", "--url", node.url)
        assert "work (paused)" in table
        assert "missing: work.dead, work.paused" in table
        with Worker(node.url, ledger) as another:
            another.wait_for(PAUSED)
        stays(ledger, 0)
        assert GOES_ON not in worker.output
        leveret("queues", "resume", "work", "--url", node.url)
        ledger.wait_for("said b")
        client.enqueue(ledger_app.give_up, "c")
        client.wait_until_dead("work", 1)
        assert client.stats("work").missing == ()


def test_a_user_without_the_exchange_still_works(node: Node, ledger: Ledger) -> None:
    """It says once what does not work; it sees a pause when it connects anew, if it may look."""
    client = Client(node.url)
    client.enqueue(ledger_app.say, "a")
    node.ctl("add_user", "limited", "limited")
    try:
        own = r"^(work|other|raw)(\.dead)?$"
        url = node.url.replace("guest:guest", "limited:limited")
        node.ctl("set_permissions", "limited", own, rf"{own}|^amq\.default$", own)
        with Worker(url, ledger) as worker:
            ledger.wait_for("said a")
            if node.version == "4":  # 3.10 lets everybody look
                worker.wait_for("it cannot be seen whether queue 'work' is paused, for want of a permission")
        client.enqueue(ledger_app.say, "a")
        own = r"^(work|other|raw)(\.dead|\.paused)?$"
        node.ctl("set_permissions", "limited", own, rf"{own}|^amq\.default$", own)
        with Worker(url, ledger) as worker:
            ledger.wait_for("said a", 2)
            worker.wait_for("a pause is seen some seconds late")
            node.restart()
            worker.wait_for("connected to RabbitMQ again")
            leveret("queues", "pause", "work", "--url", node.url)
            node.restart()
            worker.wait_for(PAUSED)
            client.enqueue(ledger_app.say, "b")
            leveret("queues", "resume", "work", "--url", node.url)
            node.restart()
            ledger.wait_for("said b")
            assert worker.output.count("a pause is seen some seconds late") == 1
    finally:
        node.ctl("delete_user", "limited")
