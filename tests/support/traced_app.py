"""An application as a user traces it: each process writes its spans into the file $SPANS, a line of JSON for each."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult

from leveret import App, current_task
from leveret.observe.opentelemetry import OpenTelemetry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from opentelemetry.sdk.trace import ReadableSpan


class Filed(SpanExporter):
    """Appends each span in one write, so that lines of several processes do not mix."""

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        with Path(os.environ["SPANS"]).open("ab", buffering=0) as file:
            file.writelines(map(as_line, spans))
        return SpanExportResult.SUCCESS


def as_line(span: ReadableSpan) -> bytes:
    return json.dumps({**json.loads(span.to_json(indent=None)), "pid": os.getpid()}).encode() + b"\n"


provider = TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(Filed()))
trace.set_tracer_provider(provider)
app = App(telemetry=OpenTelemetry())
log = logging.getLogger("shop")


@app.task(queue="work", backoff=0, max_attempts=2)
async def fail_once(text: str) -> None:
    with trace.get_tracer("shop").start_as_current_span("inside"):
        log.info("working on %s", text)
        if current_task().attempt == 1:
            raise ValueError(text)


if __name__ == "__main__":
    app.client.connect_to(sys.argv[1])
    asyncio.run(fail_once.enqueue("a"))
