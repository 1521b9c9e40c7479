"""What real workers tell: to Prometheus over HTTP, to OpenTelemetry across processes, and in their logs."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client.parser import text_string_to_metric_families

from tests.support import ledger_app
from tests.support.nodes import free_ports
from tests.support.proxy import Proxy
from tests.support.waiting import wait_until
from tests.support.workers import Program, Worker, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

TRACED_APP = Path(__file__).parents[1] / "support/traced_app.py"


class Scraped:
    """The pages of a worker."""

    def __init__(self) -> None:
        (port,) = free_ports(1)
        self.address = f"127.0.0.1:{port}"

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://{self.address}{path}", timeout=20) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name with these labels; -1 if there is none, or no worker yet."""
        status, text = self.get("/metrics")
        assert status in (0, 200), text
        if not status:
            return -1.0
        found = [
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found) if found else -1.0

    def wait_for(self, count: float, name: str, **labels: str) -> None:
        wait_until(lambda: self.value(name, **labels) == count, f"{name}{labels} is {count}")

    def wait_until_ready(self, status: int = 200) -> None:
        wait_until(lambda: self.get("/ready")[0] == status, f"/ready answers {status}")


def test_a_worker_is_scraped(place: Place, client: Client, ledger: Ledger) -> None:
    pages = Scraped()
    client.enqueue_many(ledger_app.say, [("a",), ("b",)])
    client.enqueue(ledger_app.fail_until, "c", 1)
    client.publish(b"{}", queue="work", task="no-such-task")
    with Worker(place.url, ledger, "-q", "work", "--metrics", pages.address) as worker:
        pages.wait_for(0, "leveret_tasks_total", task="give_up", outcome="dead")
        pages.wait_for(2, "leveret_tasks_total", task="say", queue="work", outcome="succeeded")
        pages.wait_for(1, "leveret_tasks_total", task="fail_until", outcome="retrying")
        pages.wait_for(1, "leveret_tasks_total", task="fail_until", outcome="succeeded")
        pages.wait_for(1, "leveret_tasks_total", task="(unknown)", outcome="dead")
        assert pages.value("leveret_task_run_seconds_count", task="say") == 2
        assert pages.value("leveret_task_wait_seconds_count", task="say") == 2
        assert 0 <= pages.value("leveret_task_wait_seconds_sum", task="say") < 120
        pages.wait_for(1, "leveret_queue_dead", queue="work")
        pages.wait_for(0, "leveret_queue_ready", queue="work")
        assert pages.value("leveret_queue_consumers", queue="work") == 1
        assert pages.value("leveret_broker_up") == 1
        assert pages.value("leveret_connection_losses_total") == 0
        assert pages.value("process_resident_memory_bytes") > 1e6
        assert pages.get("/live") == (200, "live\n")
        assert pages.get("/ready")[0] == 200

        client.enqueue(ledger_app.pause, "long", 60)
        child = int(ledger.wait_for("start long").split()[-1])
        pages.wait_for(1, "leveret_worker_running")
        os.kill(child, signal.SIGKILL)
        pages.wait_for(1, "leveret_child_restarts_total", reason="died")
        pages.wait_for(1, "leveret_tasks_total", task="pause", outcome="retrying")

        ledger.wait_for("start long", 2)
        worker.signal(signal.SIGTERM)
        pages.wait_until_ready(503)
        assert pages.get("/live")[0] == 200
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0


def test_a_lost_connection_shows(node: Node, ledger: Ledger) -> None:
    pages = Scraped()
    with Proxy(node.port) as proxy, Worker(proxy.url, ledger, "--metrics", pages.address).ready():
        pages.wait_until_ready()
        proxy.cut()
        pages.wait_for(1, "leveret_connection_losses_total")
        pages.wait_until_ready()


def test_a_worker_that_finds_no_broker_is_live_and_not_ready(ledger: Ledger) -> None:
    pages = Scraped()
    (port,) = free_ports(1)
    with Worker(f"amqp://guest:guest@127.0.0.1:{port}/", ledger, "--metrics", pages.address) as worker:
        worker.wait_for("trying again")
        assert pages.get("/live")[0] == 200
        assert pages.get("/ready")[0] == 503
        assert pages.value("leveret_worker_consuming") == 0


def test_a_bad_address_is_one_line(ledger: Ledger, tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    environment = {"LEDGER": str(ledger.path)}
    app = f"{ledger_app.__file__}:app"
    for address, said in (
        ("nonsense", "must be HOST:PORT"),
        ("192.0.2.1:1", "metrics cannot be served on 192.0.2.1:1"),
    ):
        error = leveret("worker", app, "--url", url, "--metrics", address, environment=environment, fails=True)
        assert said in error.splitlines()[-1]
        assert "Traceback" not in error


def spans(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for line in path.read_text().splitlines():
        span = json.loads(line)
        found.setdefault(span["name"], []).append(span)
    return found


def test_one_trace_and_one_log_across_processes(place: Place, ledger: Ledger, tmp_path: Path) -> None:
    """A producer, a worker, its child: one trace of both attempts; and every line is JSON."""
    path = tmp_path / "spans"
    path.touch()
    environment = {"SPANS": str(path)}
    options = ("--log-format", "json", "--log-level", "DEBUG")
    with Worker(place.url, ledger, *options, app=f"{TRACED_APP}:app", environment=environment) as worker:
        worker.wait_for("waiting for tasks on")
        with Program([str(TRACED_APP), place.url], tmp_path / "producer.log", environment) as producer:
            assert producer.exit_code() == 0, producer.output
        wait_until(lambda: len(spans(path).get("process work", ())) == 2, "both attempts are told")
        worker.wait_for(": done")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    found = spans(path)
    (sent,) = found["send work"]
    first, second = found["process work"]
    assert {span["context"]["trace_id"] for span in (sent, first, second, *found["inside"])} == {
        sent["context"]["trace_id"]
    }
    assert first["parent_id"] == second["parent_id"] == sent["context"]["span_id"]
    assert [span["parent_id"] for span in found["inside"]] == [one["context"]["span_id"] for one in (first, second)]
    assert sent["pid"] != first["pid"] != worker.pid
    assert [span["attributes"]["leveret.outcome"] for span in (first, second)] == ["retrying", "succeeded"]
    assert [span["attributes"]["leveret.attempt"] for span in (first, second)] == [1, 2]
    system = "sqlite" if place.node is None else "rabbitmq"
    assert {span["attributes"]["messaging.system"] for span in (sent, first)} == {system}
    assert (sent["kind"], first["kind"]) == ("SpanKind.PRODUCER", "SpanKind.CONSUMER")

    lines = [json.loads(line) for line in worker.output.splitlines()]
    id_ = sent["attributes"]["messaging.message.id"]
    own = [line for line in lines if line["logger"] == "shop"]
    assert [(line["message"], line["level"], line["task_id"], line["task_attempt"]) for line in own] == [
        ("working on a", "INFO", id_, 1),
        ("working on a", "INFO", id_, 2),
    ]
    (failed,) = [line for line in lines if "attempt 1 failed" in line["message"]]
    assert (failed["task_id"], failed["task_name"], failed["task_queue"]) == (id_, "fail_once", "work")
    (ready,) = [line for line in lines if "waiting for tasks on" in line["message"]]
    assert "task_id" not in ready
    assert datetime.fromisoformat(ready["time"]).utcoffset() == timedelta()
