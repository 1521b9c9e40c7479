"""Tasks that outlast their connection, or the time for which RabbitMQ lets a consumer hold a delivery."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.conftest import RABBITMQ
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import Node
from tests.support.proxy import Proxy
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Five seconds, looked at every second.
SHORT_TIMEOUT = (
    """[{rabbit, [{consumer_timeout, 5000}, {channel_tick_interval, 1000}, {quorum_tick_interval, 1000}]}]."""
)


@pytest.fixture(scope="module", params=RABBITMQ)
def impatient(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node that lets no consumer hold a delivery for more than five seconds."""
    node = Node(request.param, advanced=SHORT_TIMEOUT)
    try:
        node.start()
        node.wait()
        yield node
    finally:
        node.close()


def test_a_task_longer_than_the_consumer_timeout_runs_once(impatient: Node, ledger: Ledger) -> None:
    """RabbitMQ 4.3: the consumer asks for more time. Before: the redelivery joins the run, which settles it."""
    client = Client(impatient.url)
    with Worker(impatient.url, ledger, "--concurrency", "3").ready() as worker:
        client.enqueue(ledger_app.pause, "long", 14)
        client.enqueue(ledger_app.pause_in_thread, "threaded", 14)
        ledger.wait_for("start threaded")
        if impatient.version != "4":
            worker.wait_for("set consumer_timeout (milliseconds)")
            worker.wait_for("delivery acknowledgement on channel")
        client.enqueue(ledger_app.say, "meanwhile")
        ledger.wait_for("said meanwhile")
        ledger.wait_for("end long")
        ledger.wait_for("end threaded")
        client.wait_until_empty("work")
        if impatient.version == "4":
            assert "consumer_timeout" not in worker.output
            assert "lost" not in worker.output
    assert (ledger.count("start long"), ledger.count("start threaded")) == (1, 1)


def test_a_task_that_waits_longer_than_the_consumer_timeout(impatient: Node, ledger: Ledger) -> None:
    """What was fetched and waits its turn is in time's way too; each runs once."""
    client = Client(impatient.url)
    client.enqueue_many(ledger_app.pause, [(f"t{number}", 4) for number in range(3)])
    with Worker(impatient.url, ledger, "--concurrency", "1", "--prefetch", "unlimited"):
        for number in range(3):
            ledger.wait_for(f"end t{number}")
        client.wait_until_empty("work")
    assert [ledger.count(f"start t{number}") for number in range(3)] == [1, 1, 1]


def test_a_task_outlasts_its_connection(node: Node, ledger: Ledger) -> None:
    """It is delivered again to the worker that runs it still: joined, and settled once it ends."""
    with Proxy(node.port) as proxy:
        client = Client(node.url)
        with Worker(proxy.url, ledger).ready() as worker:
            client.enqueue(ledger_app.pause, "long", 5)
            ledger.wait_for("start long")
            proxy.cut()
            worker.wait_for("connected to RabbitMQ again")
            ledger.wait_for("end long")
            client.wait_until_empty("work")
        assert ledger.count("start long") == 1


def test_a_task_that_ends_while_the_broker_is_away(node: Node, ledger: Ledger) -> None:
    """Its outcome waits for its delivery to come again, and is recorded then."""
    client = Client(node.url)
    with Worker(node.url, ledger).ready() as worker:
        client.enqueue(ledger_app.pause, "short", 2)
        client.enqueue(ledger_app.fail_until, "failing", 1)
        ledger.wait_for("start short")
        node.kill()
        worker.wait_for("the connection to RabbitMQ was lost")
        ledger.wait_for("end short")
        worker.wait_for("its delivery was lost before its outcome was recorded")
        node.start()
        node.wait()
        worker.wait_for("connected to RabbitMQ again")
        ledger.wait_for("end failing")
        client.wait_until_empty("work")
    assert ledger.count("start short") == 1
