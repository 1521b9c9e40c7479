"""A worker sends short tasks ahead to its children; of others nothing waits where it cannot run."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.waiting import wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.nodes import Node

SHORT = [(f"{number}",) for number in range(3_000)]
SLOTS = 20


def enqueue_short_and_held(client: Client) -> list[str]:
    names = [f"held{number}" for number in range(SLOTS)]
    client.enqueue_many(ledger_app.say, SHORT)
    client.enqueue_many(ledger_app.held, [(name,) for name in names])
    return names


def started(ledger: Ledger) -> set[str]:
    return {line.split()[1] for line in ledger.lines_of("start held")}


def ended_of(ledger: Ledger) -> set[str]:
    return {line.split()[1] for line in ledger.lines_of("end held")}


def test_nothing_waits_behind_a_task_while_a_slot_is_free_elsewhere(
    place: Place, client: Client, ledger: Ledger
) -> None:
    """As many slots in two workers as there are tasks that end only when all of them have begun."""
    names = enqueue_short_and_held(client)
    with Worker(place.url, ledger):
        wait_until(lambda: len(started(ledger)) == SLOTS / 2, "the first worker has come to the end of the short ones")
        with Worker(place.url, ledger):
            wait_until(lambda: started(ledger) == set(names), "every slot of both has a task that waits for all")
            for name in names:
                ledger.release(name)
            client.wait_until_empty("work")
    assert (ledger.count("said"), ledger.count("end held")) == (len(SHORT), SLOTS)


def test_nothing_waits_in_a_child_while_another_has_a_free_slot(place: Place, client: Client, ledger: Ledger) -> None:
    names = enqueue_short_and_held(client)
    with Worker(place.url, ledger, "--processes", "2"):
        wait_until(lambda: started(ledger) == set(names), "every slot of both children has a task that waits for all")
        for name in names:
            ledger.release(name)
        client.wait_until_empty("work")


def test_a_stop_gives_back_what_was_sent_ahead(place: Place, client: Client, ledger: Ledger) -> None:
    """What has not begun is with the broker, and runs in the next worker, once."""
    names = enqueue_short_and_held(client)
    with Worker(place.url, ledger, "--grace", "1") as worker:
        ledger.wait_for("said", 500)
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    stats = client.stats("work")
    assert (stats.ready + ledger.count("said"), stats.running, stats.dead) == (len(SHORT) + SLOTS, 0, 0)
    for name in names:
        ledger.release(name)
    with Worker(place.url, ledger):
        client.wait_until_empty("work")
    assert (ledger.count("said"), ledger.count("end held")) == (len(SHORT), SLOTS)


def test_a_pause_stops_what_was_sent_ahead(place: Place, client: Client, ledger: Ledger) -> None:
    client.enqueue_many(ledger_app.say, SHORT * 3)
    with Worker(place.url, ledger) as worker:
        ledger.wait_for("said", 500)
        leveret("queues", "pause", "work", "--url", place.url)
        worker.wait_for("paused queues, of which nothing is started: work")
        wait_until(lambda: client.stats("work").running == 0, "what had not begun is handed back")
        said = ledger.count("said")
        assert client.stats("work").ready + said == 3 * len(SHORT)
        leveret("queues", "resume", "work", "--url", place.url)
        client.wait_until_empty("work")
    assert ledger.count("said") == 3 * len(SHORT)


def test_each_slot_takes_the_next_task_at_once_after_a_turn(place: Place, client: Client, ledger: Ledger) -> None:
    """What was held from before the turn keeps its part of the credit, and gives it back one by one."""
    names = enqueue_short_and_held(client)
    with Worker(place.url, ledger):
        for begun in range(SLOTS // 2, SLOTS + 1):
            ledger.wait_for("start held", begun)
            if begun < SLOTS:
                wait_until(lambda: client.stats("work").running == SLOTS // 2, "no more than have slots are held")
            ledger.release(next(name for name in names if name in started(ledger) - ended_of(ledger)))
            ledger.wait_for("end held", begun - SLOTS // 2 + 1)
        for name in names:
            ledger.release(name)
        client.wait_until_empty("work")


def test_turn_after_turn(place: Place, client: Client, ledger: Ledger) -> None:
    """What is handed back again and again runs once in the end, and never seems to be what kills its workers."""
    for turn in range(8):
        client.enqueue_many(ledger_app.say, [(f"{turn}-{number}",) for number in range(400)])
        client.enqueue_many(ledger_app.pause, [(f"{turn}-{number}", 0.3) for number in range(SLOTS)])
    with Worker(place.url, ledger), Worker(place.url, ledger):
        client.wait_until_empty("work")
    assert (ledger.count("said"), ledger.count("end")) == (8 * 400, 8 * SLOTS)
    assert client.stats("work").dead == 0


def test_a_connection_is_lost_with_what_was_ahead(node: Node, ledger: Ledger) -> None:
    """The next one begins with as much, and a turn is a turn there too."""
    client = Client(node.url)
    client.enqueue_many(ledger_app.say, SHORT * 9)
    names = enqueue_short_and_held(client)
    with Worker(node.url, ledger) as worker:
        ledger.wait_for("said", 500)
        node.ctl("close_all_connections", "a test")
        worker.wait_for("connected to RabbitMQ again")
        wait_until(lambda: len(started(ledger)) == SLOTS / 2, "the first worker has come to the end of the short ones")
        with Worker(node.url, ledger):
            wait_until(lambda: started(ledger) == set(names), "every slot of both has a task that waits for all")
            for name in names:
                ledger.release(name)
            client.wait_until_empty("work")
    said = {line.split()[1] for line in ledger.lines_of("said")}
    assert (len(said), ledger.count("end held")) == (len(SHORT), SLOTS)
