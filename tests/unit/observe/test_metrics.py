"""The exporter for Prometheus: what it counts, and the HTTP server that nobody can hold."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from leveret import BrokerUnavailable, ConfigurationError
from leveret.model import (
    Cancelled,
    DeadLettered,
    Envelope,
    LimitRow,
    LimitRule,
    LimitUse,
    QueueStats,
    Released,
    Retrying,
    Succeeded,
)
from leveret.observe.events import ChildReplaced, ScheduleAdvanced, TaskFinished, TaskSettled, TaskStarted
from leveret.observe.metrics import Address, Condition, exporting
from leveret.observe.metrics.server import Answer, serving
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from leveret.observe.metrics.prometheus import Exporter

LOCAL = Address("127.0.0.1", 0)


class Source:
    """A worker as a scrape sees it."""

    def __init__(self) -> None:
        self.now = Condition(consuming=True, running=2, waiting=3, losses=4)
        self.asked = 0
        self.fails = False

    def condition(self) -> Condition:
        return self.now

    async def limits(self) -> Sequence[LimitUse]:
        return [LimitUse(LimitRow("stripe", LimitRule(5), paused=True), admitted=4, waiting=7, keys=2)]

    async def stats(self) -> Sequence[QueueStats]:
        self.asked += 1
        if self.fails:
            raise BrokerUnavailable("away")
        return [QueueStats("work", 1, 2, 3, 4, delayed=5, paused=True, limited=6)]

    def tasks(self) -> Sequence[tuple[str, str]]:
        return [("say", "work"), ("idle", "other")]

    def registered(self, envelope: Envelope) -> str | None:
        return None if envelope.task == "evil" else envelope.task


async def exchange(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def get(port: int, path: str) -> tuple[int, str]:
    head, _, body = (await exchange(port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    return int(head.split()[1]), body.decode()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


@asynccontextmanager
async def exported(source: Source) -> AsyncGenerator[tuple[Exporter, int]]:
    port = free_port()
    exporter = exporting(f"127.0.0.1:{port}")
    async with exporter.serve(source):
        yield exporter, port


def samples(text: str) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_what_is_counted() -> None:
    now = time.time()
    first = Envelope("a", "work", "say", b"", enqueued_at=now - 3)
    delayed = Envelope("b", "work", "say", b"", enqueued_at=now - 100, due=now - 1)
    again = Envelope("c", "work", "say", b"", enqueued_at=now - 100, attempt=2)
    evil = Envelope("d", "work", "evil", b"")
    async with exported(Source()) as (exporter, port):
        for envelope, outcome in (
            (first, Succeeded()),
            (delayed, Retrying("no")),
            (again, DeadLettered("no")),
            (evil, DeadLettered("unknown")),
        ):
            exporter.hear(TaskStarted(envelope))
            exporter.hear(TaskFinished(envelope, outcome))
            exporter.hear(TaskSettled(envelope, outcome))
        for other in (Released(), Cancelled("no")):
            exporter.hear(TaskSettled(first, other))
        exporter.hear(TaskSettled(first, Succeeded(), kept=False))
        exporter.hear(ChildReplaced(1, "died"))
        status, text = await get(port, "/metrics")
    assert status == 200
    found = samples(text)
    for outcome_, task, count in (
        ("succeeded", "say", 1),
        ("retrying", "say", 1),
        ("dead", "say", 1),
        ("released", "say", 1),
        ("cancelled", "say", 1),
        ("lost", "say", 1),
        ("dead", "(unknown)", 1),
    ):
        assert found["leveret_tasks_total", outcome_, "work", task] == count
    # Born at 0: of a series that begins at 1 Prometheus sees no increase.
    assert found["leveret_tasks_total", "succeeded", "work", "(unknown)"] == 0
    assert found["leveret_tasks_total", "dead", "other", "idle"] == 0
    assert found["leveret_task_run_seconds_count", "other", "idle"] == 0
    assert found["leveret_task_run_seconds_count", "work", "say"] == 3
    assert found["leveret_task_wait_seconds_count", "work", "say"] == 2
    assert 4 <= found["leveret_task_wait_seconds_sum", "work", "say"] < 60
    assert found["leveret_child_restarts_total", "died"] == 1
    assert found["leveret_child_restarts_total", "recycled"] == 0
    assert found["leveret_connection_losses_total",] == 4
    assert found["leveret_worker_running",] == 2
    assert found["leveret_worker_prefetched",] == 3
    assert found["leveret_worker_consuming",] == 1
    assert found["leveret_broker_up",] == 1
    counts = {"ready": 1, "running": 2, "dead": 3, "consumers": 4, "delayed": 5, "paused": 1, "limited": 6}
    for name, count in counts.items():
        assert found[f"leveret_queue_{name}", "work"] == count
    for name, count in {"admitted": 4, "waiting": 7, "paused": 1}.items():
        assert found[f"leveret_limit_{name}", "stripe"] == count
    assert found["leveret_loop_lag_seconds",] >= 0


async def test_what_is_counted_of_schedules() -> None:
    """Those of the code by name; those that are data, of which there may be any number, together."""
    async with exported(Source()) as (exporter, port):
        exporter.hear(ScheduleAdvanced("nightly", "shop:app", [0.02, 7.0], missed=3))
        exporter.hear(ScheduleAdvanced("nightly", "shop:app", [], skipped=1))
        for name in ("digest:1", "digest:2"):
            exporter.hear(ScheduleAdvanced(name, None, [0.1]))
        found = samples((await get(port, "/metrics"))[1])
    assert found["leveret_schedule_tasks_total", "nightly"] == 2
    assert found["leveret_schedule_missed_total", "nightly"] == 3
    assert found["leveret_schedule_skipped_total", "nightly"] == 1
    assert found["leveret_schedule_lateness_seconds_bucket", "0.05", "nightly"] == 1
    assert found["leveret_schedule_lateness_seconds_count", "nightly"] == 2
    assert found["leveret_schedule_tasks_total", "(data)"] == 2
    assert not [key for key in found if "digest:1" in key]


async def test_what_was_acknowledged_before_it_failed_is_dead() -> None:
    async with exported(Source()) as (exporter, port):
        exporter.hear(TaskSettled(Envelope("a", "work", "say", b""), Retrying("no"), at_most_once=True))
        found = samples((await get(port, "/metrics"))[1])
    assert found["leveret_tasks_total", "dead", "work", "say"] == 1
    assert found["leveret_tasks_total", "retrying", "work", "say"] == 0


async def test_a_broker_that_was_never_reached_is_not_up() -> None:
    class Starting(Source):
        async def stats(self) -> Sequence[QueueStats]:
            return ()

    async with exported(Starting()) as (_, port):
        assert samples((await get(port, "/metrics"))[1])["leveret_broker_up",] == 0


async def test_a_loop_that_is_held_up_shows() -> None:
    async with exported(Source()) as (_, port):
        await get(port, "/live")
        time.sleep(0.6)  # noqa: ASYNC251 - the fault under test

        async def shows() -> bool:
            _, text = await get(port, "/metrics")
            return samples(text)["leveret_loop_lag_seconds",] > 0.2

        await until(shows, "the lag shows")


async def test_the_queues_are_not_counted_at_each_scrape() -> None:
    source = Source()
    async with exported(source) as (_, port):
        await asyncio.gather(*(get(port, "/metrics") for _ in range(5)))
    assert source.asked == 1


async def test_a_broker_that_is_away_has_no_counts() -> None:
    source = Source()
    source.fails = True
    async with exported(source) as (_, port):
        status, text = await get(port, "/metrics")
    assert status == 200
    assert samples(text)["leveret_broker_up",] == 0
    assert not [key for key in samples(text) if key[0].startswith("leveret_queue_")]


async def test_the_probes() -> None:
    source = Source()
    async with exported(source) as (_, port):
        assert await get(port, "/live") == (200, "live\n")
        assert await get(port, "/ready?verbose=1") == (200, "ready\n")
        source.now = Condition(consuming=False, running=0, waiting=0, losses=0)
        assert (await get(port, "/ready"))[0] == 503
        assert (await get(port, "/live"))[0] == 200
        status, text = await get(port, "/")
        assert (status, text) == (404, "here are: /metrics, /live, /ready\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"POST /live HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}", 405),
        (b"HEAD /live HTTP/1.1\r\n\r\n", 405),
        (b"GET /live\r\n\r\n", 400),
        (b"GET /live HTTP/2\r\n\r\n", 400),
        (b"\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\xff\xfe\r\n\r\n", 400),
        (b"GET /\xff%00\xfe HTTP/1.1\r\n\r\n", 404),
        (b"GET /live HTTP/1.1\r\nX: " + b"a" * 9_000 + b"\r\n\r\n", 431),
        (b"a" * 100_000, 431),
    ],
)
async def test_what_is_no_request_is_refused(request_: bytes, status: int) -> None:
    async with exported(Source()) as (_, port):
        answer = await exchange(port, request_)
        # What was sent in excess and not read may cost the client its answer.
        assert answer == b"" or int(answer.split()[1]) == status
        if len(request_) < 8_000:
            assert answer
        assert (status == 405) == (b"Allow: GET" in answer)
        assert await get(port, "/live") == (200, "live\n")


async def test_slow_and_silent_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.observe.metrics.server._PATIENCE", 0.3)
    async with exported(Source()) as (_, port):
        silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        silent[0][1].write(b"GET /live HT")
        assert await get(port, "/live") == (200, "live\n")
        for reader, writer in silent:
            with suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(), 60) == b""
            writer.close()


async def test_a_client_that_does_not_read_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.observe.metrics.server._PATIENCE", 0.3)

    async def large() -> Answer:
        return Answer("x" * 30_000_000)

    async with serving(LOCAL, {"/": large}) as (_, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1_000)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        await asyncio.sleep(0.6)  # longer than its patience
        with suppress(ConnectionError):
            assert len(await asyncio.wait_for(reader.read(), 60)) < 30_000_000
        writer.close()


async def test_the_oldest_idle_connection_goes_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.observe.metrics.server._PATIENCE", 3_600)
    async with exported(Source()) as (_, port):
        held = [await asyncio.open_connection("127.0.0.1", port) for _ in range(80)]
        for _ in range(5):
            assert await get(port, "/live") == (200, "live\n")
        with suppress(ConnectionError):
            assert await held[0][0].read() == b""
        held[-1][1].write(b"GET /live HTTP/1.1\r\n\r\n")
        assert (await held[-1][0].read()).endswith(b"live\n")
        for _, writer in held:
            writer.close()


async def test_a_mistake_in_a_page_is_told(caplog: pytest.LogCaptureFixture) -> None:
    async def broken() -> Answer:
        raise RuntimeError("oh")

    async with serving(LOCAL, {"/": broken}) as (_, port):
        assert (await get(port, "/"))[0] == 500
    assert "cannot be shown" in caplog.text


async def test_ending_does_not_wait_for_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leveret.observe.metrics.server._PATIENCE", 3_600)
    async with exported(Source()) as (_, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        await get(port, "/live")
    writer.close()


@pytest.mark.parametrize("text", ["", "9090", ":9090", "localhost", "localhost:", "localhost:http", "localhost:65536",
                                  "::1:9090", "localhost:-1", "localhost:٣"])  # fmt: skip
def test_an_address_that_is_none(text: str) -> None:
    with pytest.raises(ConfigurationError, match="must be HOST:PORT"):
        Address.parse(text)


def test_addresses() -> None:
    assert Address.parse("[::1]:80") == Address("::1", 80)
    assert str(Address.parse("[::1]:80")) == "[::1]:80"
    assert str(Address.parse("localhost:0")) == "localhost:0"


async def test_an_address_in_use_is_a_clear_error() -> None:
    async with serving(LOCAL, {}) as (_, port):
        with pytest.raises(ConfigurationError, match=rf"metrics cannot be served on 127.0.0.1:{port}.*another"):
            async with exporting(f"127.0.0.1:{port}").serve(Source()):
                pass


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    monkeypatch.delitem(sys.modules, "leveret.observe.metrics.prometheus", raising=False)
    with pytest.raises(ConfigurationError, match=r"pip install 'leveret\[prometheus\]'"):
        exporting("127.0.0.1:0")


DOCS = Path(__file__).parents[3] / "docs"
PROMTOOL = shutil.which("promtool")


@pytest.mark.parametrize("name", ["grafana/leveret.json", "grafana/alerts.yml", "telemetry.md"])
async def test_each_metric_that_is_named_is_there(name: str) -> None:
    envelope = Envelope("a", "work", "say", b"", enqueued_at=1.0)
    async with exported(Source()) as (exporter, port):
        for event in (TaskStarted(envelope), TaskFinished(envelope, Succeeded()), TaskSettled(envelope, Succeeded())):
            exporter.hear(event)
        exporter.hear(ScheduleAdvanced("nightly", "shop:app", [0.1]))
        _, text = await get(port, "/metrics")
    there = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    there |= {family.name for family in text_string_to_metric_families(text)}
    named = set(re.findall(r"\bleveret_\w+", (DOCS / name).read_text()))
    assert named
    assert named <= there


def test_the_dashboards_panels_are_whole() -> None:
    dashboard = json.loads((DOCS / "grafana/leveret.json").read_text())
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in dashboard["panels"]:
        assert panel["title"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")


def test_the_alert_rules_are_rules() -> None:
    rules = yaml.safe_load((DOCS / "grafana/alerts.yml").read_text())["groups"][0]["rules"]
    assert len({rule["alert"] for rule in rules}) == len(rules)
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["expr"]
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed")
def test_promtool_accepts_the_alert_rules() -> None:
    done = subprocess.run(
        [str(PROMTOOL), "check", "rules", str(DOCS / "grafana/alerts.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
