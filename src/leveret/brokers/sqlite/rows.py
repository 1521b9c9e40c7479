"""A task as a row of the file: the columns of its envelope, the same both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from leveret.model import Envelope, unix_time

if TYPE_CHECKING:
    from collections.abc import Sequence

ENVELOPE = (
    "task.id, queue.name, task.name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers,"
    " priority"
)
INSERT = (
    "INSERT INTO task (id, queue, state, name, body, content_type, attempt, enqueued_at)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
)
#: Most tasks have nothing in the other columns, and what is not named costs nothing.
INSERT_ALL = (
    "INSERT INTO task (id, queue, state, name, body, content_type, attempt, enqueued_at, last_error, due, expires_at,"
    " headers, priority) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
NO_OTHERS = (None,) * 5
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(dict[str, Any]).decode


def row(queue: int, envelope: Envelope, now: float) -> tuple[Any, ...]:
    return (
        envelope.id,
        queue,
        "delayed" if envelope.due is not None and envelope.due > now else "ready",
        envelope.task,
        envelope.body,
        envelope.content_type,
        envelope.attempt,
        envelope.enqueued_at,
    )


def others(envelope: Envelope) -> tuple[Any, ...]:
    """What few tasks have; empty for the others."""
    headers = _pack(envelope.headers) if envelope.headers else None
    found = envelope.last_error, envelope.due, envelope.expires_at, headers, envelope.priority
    return () if found == NO_OTHERS else found


def envelope_of(row: Sequence[Any]) -> Envelope:
    id_, queue, name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers, priority = row
    return Envelope(
        id_,
        queue,
        name,
        body,
        content_type,
        attempt,
        unix_time(enqueued_at),
        last_error,
        unix_time(due),
        unix_time(expires_at),
        _unpack(headers) if headers else {},
        priority,
    )
