"""The permissions that docs/operations.md gives are enough."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import ledger_app
from tests.support.client import Client
from tests.support.workers import Ledger, Program, Worker, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node

OPERATIONS = Path(__file__).parents[2] / "docs/operations.md"


def permissions(who: str) -> list[str]:
    """The documented expressions to configure, write and read, for the queues of the tests' application."""
    (row,) = [line for line in OPERATIONS.read_text().splitlines() if line.startswith(f"| {who} | `")]
    found = [
        text.replace("\\|", "|").replace("mail|images", "work|other|raw") for text in re.findall(r"`([^`]+)`", row)
    ]
    assert len(found) == 3
    return found


def test_workers_and_producers_get_by(node: Node, ledger: Ledger) -> None:
    for who in ("worker", "producer"):
        node.ctl("add_user", who, who)
    try:
        node.ctl("set_permissions", "worker", *permissions("a worker"))
        node.ctl("set_permissions", "producer", *permissions("a producer"))
        urls = {who: node.url.replace("guest:guest", f"{who}:{who}") for who in ("worker", "producer")}
        with Worker(urls["worker"], ledger).ready() as worker:
            client = Client(urls["producer"])
            client.enqueue(ledger_app.say, "a")
            client.enqueue(ledger_app.not_now, "b")
            client.enqueue(ledger_app.give_up, "c")
            ledger.wait_for("said a")
            ledger.wait_for("end b")
            worker.wait_for("gave up: c")
            leveret("queues", "pause", "work", "--url", urls["worker"])
            worker.wait_for("paused queues, of which nothing is started: work")
            leveret("queues", "resume", "work", "--url", urls["worker"])
            worker.wait_for("none any more")
            done = client.enqueue(ledger_app.measure, 1, 2)
            url = ("--url", urls["producer"])
            assert leveret("result", done, "--wait", *url) == '{"width":1,"height":2}\n'
            later = client.enqueue(ledger_app.say.options(delay=60), "later")
            assert "cancelled before it ran" in leveret("cancel", later, *url)
            assert "ermission" not in worker.output
            assert "REFUSED" not in worker.output
        assert Client(node.url).stats("work").dead == 1
    finally:
        for who in ("worker", "producer"):
            node.ctl("delete_user", who)


def test_an_operator_gets_by(node: Node, ledger: Ledger) -> None:
    """Each command of one, on a queue with a dead letter."""
    node.ctl("add_user", "operator", "operator")
    url = ("--url", node.url.replace("guest:guest", "operator:operator"))
    try:
        node.ctl("set_permissions", "operator", *permissions("an operator"))
        client = Client(node.url)
        with Worker(node.url, ledger).ready() as worker:
            first, second = (client.enqueue(ledger_app.give_up, text) for text in "ab")
            client.wait_until_dead("work", 2)
            assert "work" in leveret("queues", "-q", "work", *url)
            assert first in leveret("dead", "list", "work", *url)
            assert "gave up" in leveret("dead", "show", "work", first, *url)
            leveret("queues", "pause", "work", *url)
            worker.wait_for("paused queues, of which nothing is started: work")
            leveret("dead", "retry", "work", first, *url)
            leveret("dead", "drop", "work", second, *url)
            client.wait_until_counts("work", ready=1, dead=0)
            leveret("queues", "resume", "work", *url)
            client.wait_until_dead("work", 1)
    finally:
        node.ctl("delete_user", "operator")


def test_a_producer_may_delay(node: Node, ledger: Ledger) -> None:
    node.ctl("add_user", "producer", "producer")
    try:
        Client(node.url).enqueue(ledger_app.say, "a")  # the worker's part: the queue is there
        node.ctl("set_permissions", "producer", *permissions("a producer"))
        app = ledger.path.with_name("delaying.py")
        app.write_text(
            "import asyncio\nfrom tests.support import ledger_app\n"
            "asyncio.run(ledger_app.say.options(delay=1).enqueue('b'))\n"
        )
        url = node.url.replace("guest:guest", "producer:producer")
        environment = {"LEVERET_URL": url, "PYTHONPATH": str(OPERATIONS.parents[1]), "LEDGER": str(ledger.path)}
        with Program([str(app)], ledger.path.with_name("delaying.log"), environment) as program:
            assert program.exit_code() == 0, program.output
        with Worker(node.url, ledger):
            ledger.wait_for("said b")
    finally:
        node.ctl("delete_user", "producer")
