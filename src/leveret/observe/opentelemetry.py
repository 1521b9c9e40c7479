"""Traces and metrics through OpenTelemetry: ``App(telemetry=OpenTelemetry())``. Needs ``leveret[opentelemetry]``.

Names follow the semantic conventions for messaging. A run is a child of the span that enqueued its task, and linked to
it: the trace goes on in the worker by the headers ``traceparent`` and ``tracestate``.
"""

from __future__ import annotations

import time
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from leveret.errors import ConfigurationError, UnknownTask
from leveret.model import Retrying
from leveret.observe.telemetry import UNKNOWN, kind

try:
    from opentelemetry import context, metrics, propagate, trace
    from opentelemetry.trace import Link, SpanKind, StatusCode
except ImportError as error:
    raise ConfigurationError(
        "leveret.observe.opentelemetry needs the OpenTelemetry API: pip install 'leveret[opentelemetry]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import Span, TracerProvider

    from leveret.model import Envelope, Outcome
    from leveret.observe.telemetry import Ended

#: The boundaries that the conventions give for both histograms (seconds), and longer ones: tasks may run for hours.
_BOUNDARIES = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_LONG = (30.0, 60.0, 300.0, 1_800.0, 7_200.0)
_SYSTEMS = {"amqp": "rabbitmq", "amqps": "rabbitmq"}


class OpenTelemetry:
    """One span and some measurements for each enqueue and each attempt: ``App(telemetry=OpenTelemetry())``.

    The SDK and its exporters are the program's to choose. A worker's child processes import the application, so set
    them up in that module.

    The outcome of an attempt is the attribute ``leveret.outcome``: succeeded, retrying, dead, cancelled, or released
    (interrupted by a stop). The exception of a failed attempt is recorded with its traceback, which may hold arguments.

    Args:
        tracer_provider: Makes the spans. None: the provider that the program has set.
        meter_provider: Makes the measurements. None: the provider that the program has set.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = trace.get_tracer("leveret", version("leveret"), tracer_provider)
        meter = metrics.get_meter("leveret", version("leveret"), meter_provider)
        self._sent = meter.create_counter(
            "messaging.client.sent.messages", "{message}", "Number of tasks that were sent to the broker."
        )
        self._send_time = meter.create_histogram(
            "messaging.client.operation.duration",
            "s",
            "How long it took to store tasks.",
            explicit_bucket_boundaries_advisory=_BOUNDARIES,
        )
        self._consumed = meter.create_counter(
            "messaging.client.consumed.messages", "{message}", "Number of attempts that were begun."
        )
        self._process_time = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "How long attempts took.",
            explicit_bucket_boundaries_advisory=(*_BOUNDARIES, *_LONG),
        )

    @contextmanager
    def sending(self, envelopes: Sequence[Envelope], url: str) -> Generator[Sequence[Envelope]]:
        queues = {envelope.queue for envelope in envelopes}
        tasks = {envelope.task for envelope in envelopes}
        measured = _operation("send", url, only(queues), only(tasks))
        spanned = {**measured, "messaging.batch.message_count": len(envelopes)}
        if len(envelopes) == 1:
            del spanned["messaging.batch.message_count"]
            spanned["messaging.message.id"] = envelopes[0].id
        begun = time.perf_counter()
        with self._tracer.start_as_current_span(
            f"send {only(queues) or ''}".rstrip(),
            kind=SpanKind.PRODUCER,
            attributes=spanned,
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            carrier: dict[str, str] = {}
            propagate.inject(carrier)
            try:
                yield [
                    msgspec.structs.replace(envelope, headers={**carrier, **envelope.headers}) for envelope in envelopes
                ]
            except BaseException as error:
                measured["error.type"] = _type(error)
                _fail(span, error, _type(error), str(error))
                raise
            finally:
                self._sent.add(len(envelopes), measured)
                self._send_time.record(time.perf_counter() - begun, measured)

    @contextmanager
    def processing(self, envelope: Envelope, url: str) -> Generator[Ended]:
        # Headers are whatever the message's producer sent.
        carrier = {name: value for name, value in envelope.headers.items() if isinstance(value, str)}
        sender = propagate.extract(carrier)
        creation = trace.get_current_span(sender).get_span_context()
        measured = _operation("process", url, envelope.queue, envelope.task)
        begun = time.perf_counter()

        def ended(outcome: Outcome, error: BaseException | None) -> None:
            measured["leveret.outcome"] = kind(outcome)
            if isinstance(error, UnknownTask):
                measured["leveret.task"] = UNKNOWN  # the span has the name; each name here would be series of their own
            span.set_attribute("leveret.outcome", kind(outcome))
            if measured["leveret.outcome"] in ("retrying", "dead"):
                measured["error.type"] = "_OTHER" if error is None else _type(error)
                _fail(span, error, str(measured["error.type"]), _reason(outcome))

        token = context.attach(sender)
        try:
            with self._tracer.start_as_current_span(
                f"process {envelope.queue}",
                kind=SpanKind.CONSUMER,
                attributes={
                    **measured,
                    "messaging.message.id": envelope.id,
                    "leveret.attempt": envelope.attempt,
                },
                links=[Link(creation)] if creation.is_valid else [],
                record_exception=False,
                set_status_on_exception=False,
            ) as span:
                yield ended
        finally:
            context.detach(token)
            self._consumed.add(1, {name: value for name, value in measured.items() if name != "leveret.outcome"})
            self._process_time.record(time.perf_counter() - begun, measured)


def only(values: set[str] | set[str | None]) -> str | None:
    """The one value, if there is one alone."""
    return next(iter(values)) if len(values) == 1 else None


def _operation(name: str, url: str, queue: str | None, task: str | None) -> dict[str, str | int]:
    """The attributes of an operation's span and of its measurements."""
    scheme = url.partition(":")[0].lower()
    attributes: dict[str, str | int] = {
        "messaging.system": _SYSTEMS.get(scheme, scheme),
        "messaging.operation.name": name,
        "messaging.operation.type": name,
    }
    if queue is not None:
        attributes["messaging.destination.name"] = queue
    if task is not None:
        attributes["leveret.task"] = task
    return attributes | (_server(url) if scheme in _SYSTEMS else {})


def _server(url: str) -> dict[str, str | int]:
    """The broker's address; nothing when there are several, of which any one may be in use."""
    if "," in url:
        return {}
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        return {}
    return (
        {}
        if host is None
        else {"server.address": host, "server.port": port or (5671 if parts.scheme == "amqps" else 5672)}
    )


def _type(error: BaseException) -> str:
    kind_ = type(error)
    return kind_.__qualname__ if kind_.__module__ == "builtins" else f"{kind_.__module__}.{kind_.__qualname__}"


def _reason(outcome: Outcome) -> str:
    return outcome.error if isinstance(outcome, Retrying) else getattr(outcome, "reason", "")


def _fail(span: Span, error: BaseException | None, type_: str, description: str) -> None:
    span.set_status(StatusCode.ERROR, description)
    span.set_attribute("error.type", type_)
    if error is not None:
        span.record_exception(error)
