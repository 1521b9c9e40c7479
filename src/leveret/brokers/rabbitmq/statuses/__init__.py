"""What became of tasks, on RabbitMQ: written to a stream, and read from it."""

from __future__ import annotations

from leveret.brokers.rabbitmq.statuses.log import StatusLog
from leveret.brokers.rabbitmq.statuses.status_stream import StatusStream
from leveret.brokers.rabbitmq.statuses.streams import (
    SILENCE,
    Batch,
    Place,
    Reading,
    last_offset,
    marks_declaration,
    new_sentinel,
    read,
    to_message,
)

__all__ = [
    "SILENCE",
    "Batch",
    "Place",
    "Reading",
    "StatusLog",
    "StatusStream",
    "last_offset",
    "marks_declaration",
    "new_sentinel",
    "read",
    "to_message",
]
