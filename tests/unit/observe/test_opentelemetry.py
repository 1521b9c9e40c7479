"""Traces and metrics through OpenTelemetry: what a run and an enqueue tell, read with the SDK's own exporters."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from leveret import BrokerUnavailable, ConfigurationError, Dead, Queue, Retry, TaskCancelled, current_task
from leveret.brokers.memory import MemoryBroker
from leveret.model import Envelope
from leveret.observe.opentelemetry import OpenTelemetry
from tests.support.bench import Bench

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan

    from leveret.brokers import OnConflict


class Traced(Bench):
    """A bench whose application is traced."""

    def __init__(self, broker: MemoryBroker | None = None) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer = provider.get_tracer("test")
        self.telemetry = OpenTelemetry(
            tracer_provider=provider, meter_provider=MeterProvider(metric_readers=[self._reader])
        )
        super().__init__(broker, self.telemetry)

        @self.app.task(queue="work")
        async def succeed(number: int) -> int:
            with self.tracer.start_as_current_span("inside"):
                return number

        @self.app.task(queue="work")
        def succeed_in_thread(number: int) -> int:
            with self.tracer.start_as_current_span("inside"):
                return number

        @self.app.task(queue="work", max_attempts=2, backoff=0)
        async def fail() -> None:
            raise ValueError("it is broken")

        @self.app.task(queue="work")
        async def ask_again() -> None:
            if current_task().attempt == 1:
                raise Retry("not yet")
            raise Dead("enough")

        @self.app.task(queue="work")
        async def check() -> None:
            self.done.append("check")
            await self.gate.wait()
            current_task().check()

    def enqueue(self, name: str, *args: Any) -> Any:
        return self.app.registry.find(name, "work").enqueue(*args)

    def spans(self, name: str) -> list[ReadableSpan]:
        return [span for span in self._exporter.get_finished_spans() if span.name == name]

    def points(self, name: str) -> list[tuple[dict[str, Any], Any]]:
        data = self._reader.get_metrics_data()
        assert data is not None
        metrics = [metric for one in data.resource_metrics for scope in one.scope_metrics for metric in scope.metrics]
        return [
            (dict(point.attributes or {}), getattr(point, "value", None) or getattr(point, "count", None))
            for metric in metrics
            if metric.name == name
            for point in metric.data.data_points
        ]


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


@pytest.mark.parametrize("task", ["succeed", "succeed_in_thread"])
async def test_one_trace_from_the_request_to_inside_the_task(task: str) -> None:
    bench = Traced()
    with bench.app.client.enqueuing_to(bench.broker):
        async with bench.working():
            with bench.tracer.start_as_current_span("request"):
                handle = await bench.enqueue(task, 1)
            await bench.wait_until_settled(1)
    (request,), (sent,), (processed,), (inside,) = (
        bench.spans(name) for name in ("request", "send work", "process work", "inside")
    )
    assert request.context is not None
    assert sent.parent is not None
    assert processed.parent is not None
    assert inside.parent is not None
    assert sent.context is not None
    assert processed.context is not None
    assert {span.context.trace_id for span in (sent, processed, inside) if span.context} == {request.context.trace_id}
    assert sent.parent.span_id == request.context.span_id
    assert processed.parent.span_id == sent.context.span_id
    assert inside.parent.span_id == processed.context.span_id
    assert [link.context.span_id for link in processed.links] == [sent.context.span_id]
    assert (sent.kind, processed.kind) == (SpanKind.PRODUCER, SpanKind.CONSUMER)
    common = {
        "messaging.system": "memory",
        "messaging.destination.name": "work",
        "messaging.message.id": handle.id,
        "leveret.task": task,
    }
    assert attributes(sent) == {
        **common,
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    assert attributes(processed) == {
        **common,
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "leveret.attempt": 1,
        "leveret.outcome": "succeeded",
    }
    assert processed.status.status_code is StatusCode.UNSET


async def test_a_batch_is_one_span() -> None:
    bench = Traced()
    with bench.app.client.enqueuing_to(bench.broker):
        async with bench.working():
            await bench.app.registry.find("succeed", "work").enqueue_many([(1,), (2,), (3,)])
            await bench.wait_until_settled(3)
    (sent,) = bench.spans("send work")
    assert attributes(sent)["messaging.batch.message_count"] == 3
    assert "messaging.message.id" not in attributes(sent)
    assert sent.context is not None
    assert [span.parent and span.parent.span_id for span in bench.spans("process work")] == [sent.context.span_id] * 3
    (point,) = bench.points("messaging.client.sent.messages")
    assert point[1] == 3


async def test_the_outcomes_are_told_apart() -> None:
    bench = Traced()
    async with bench.working():
        await bench.put("succeed", "no number")
        await bench.put("missing", "a")
        with bench.app.client.enqueuing_to(bench.broker):
            await bench.enqueue("fail")
            await bench.enqueue("ask_again")
        await bench.wait_until_settled(6)
    spans = bench.spans("process work")
    told = sorted(
        (
            str(attributes(span).get("leveret.task")),
            attributes(span)["leveret.attempt"],
            attributes(span)["leveret.outcome"],
            attributes(span)["error.type"],
            [event.name for event in span.events],
        )
        for span in spans
    )
    exception = ["exception"]
    assert told == [
        ("ask_again", 1, "retrying", "leveret.Retry", exception),
        ("ask_again", 2, "dead", "leveret.Dead", exception),
        ("fail", 1, "retrying", "ValueError", exception),
        ("fail", 2, "dead", "ValueError", exception),
        ("missing", 1, "dead", "leveret.errors.UnknownTask", exception),
        ("succeed", 1, "dead", "leveret.errors.InvalidArguments", exception),
    ]
    assert {span.status.status_code for span in spans} == {StatusCode.ERROR}
    (first, _) = [span for span in spans if attributes(span)["leveret.task"] == "fail"]
    assert first.status.description == "ValueError: it is broken"
    assert "it is broken" in str((first.events[0].attributes or {})["exception.stacktrace"])
    durations = {
        (point.get("leveret.task"), point["leveret.outcome"]): count
        for point, count in bench.points("messaging.process.duration")
    }
    folded = {("(unknown)" if task == "missing" else task, outcome): 1 for task, _, outcome, _, _ in told}
    assert durations == folded
    assert sum(count for _, count in bench.points("messaging.client.consumed.messages")) == 6


@pytest.mark.parametrize("task", ["wait", "check"])
async def test_a_cancelled_run_is_no_error(task: str) -> None:
    bench = Traced()
    with bench.app.client.enqueuing_to(bench.broker):
        async with bench.working():
            handle = await bench.enqueue(task, *(["a"] if task == "wait" else []))
            await bench.wait_for(lambda: bench.done, "it runs")
            await bench.app.client.cancel(handle.id)
            bench.gate.set()
            await bench.wait_until_settled(1)
            with pytest.raises(TaskCancelled):
                await handle.result(timeout=60)
    (span,) = bench.spans("process work")
    assert attributes(span)["leveret.outcome"] == "cancelled"
    assert "error.type" not in attributes(span)
    assert span.status.status_code is StatusCode.UNSET


async def test_a_run_that_a_stop_interrupts_is_released() -> None:
    bench = Traced()
    await bench.put("wait", "a")
    async with bench.working(grace=0.0):
        await bench.wait_for(lambda: bench.done, "it runs")
    (span,) = bench.spans("process work")
    assert attributes(span)["leveret.outcome"] == "released"
    assert span.status.status_code is StatusCode.UNSET


class Away(MemoryBroker):
    async def publish(self, envelopes: Sequence[Envelope], *, on_conflict: OnConflict = "raise") -> None:
        raise BrokerUnavailable(f"{len(envelopes)} tasks, {on_conflict}")


async def test_an_enqueue_that_fails_is_an_error() -> None:
    bench = Traced()
    with bench.app.client.enqueuing_to(Away()), pytest.raises(BrokerUnavailable):
        await bench.enqueue("succeed", 1)
    (sent,) = bench.spans("send work")
    assert sent.status.status_code is StatusCode.ERROR
    assert attributes(sent)["error.type"] == "leveret.errors.BrokerUnavailable"
    assert [event.name for event in sent.events] == ["exception"]
    ((point, count),) = bench.points("messaging.client.sent.messages")
    assert (point["error.type"], count) == ("leveret.errors.BrokerUnavailable", 1)


@pytest.mark.parametrize("header", [7, None, ["00-" + "1" * 32 + "-" + "2" * 16 + "-01"], "nonsense", b"\xff"])
async def test_headers_that_are_no_trace_begin_a_new_one(header: object) -> None:
    bench = Traced()
    await bench.broker.declare([Queue("work")])
    body = msgspec.json.encode({"args": [1]})
    await bench.broker.publish([Envelope("a", "work", "succeed", body, headers={"traceparent": header})])
    async with bench.working():
        await bench.wait_until_settled(1)
    (span,) = bench.spans("process work")
    assert span.parent is None
    assert list(span.links) == []


async def test_the_brokers_address_is_told_and_no_password() -> None:
    bench = Traced()
    envelope = Envelope("a", "work", "succeed", b"")
    for url in ("amqps://me:secret@mq.example/v", "amqp://me:secret@a:1,b:2/", "sqlite:////tmp/a.db"):
        with bench.telemetry.sending([envelope], url) as marked:
            assert set(marked[0].headers) == {"traceparent"}
    one, several, file = map(attributes, bench.spans("send work"))
    assert (one["server.address"], one["server.port"], one["messaging.system"]) == ("mq.example", 5671, "rabbitmq")
    assert "server.address" not in several
    assert file["messaging.system"] == "sqlite"
    assert "secret" not in f"{one}{several}"


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    monkeypatch.delitem(sys.modules, "leveret.observe.opentelemetry")
    with pytest.raises(ConfigurationError, match=r"pip install 'leveret\[opentelemetry\]'"):
        import leveret.observe.opentelemetry  # noqa: F401


async def test_names_that_anybody_may_send_make_no_series() -> None:
    bench = Traced()
    async with bench.working():
        for number in range(20):
            await bench.put(f"no-such-task-{number}", "a")
        await bench.put("say", "a")
        await bench.wait_until_settled(21)
    for metric in ("messaging.client.consumed.messages", "messaging.process.duration"):
        counted = {told["leveret.task"]: count for told, count in bench.points(metric)}
        assert counted == {"(unknown)": 20, "say": 1}
    named = {attributes(span)["leveret.task"] for span in bench.spans("process work")}
    assert "no-such-task-7" in named, "a span is no series"
