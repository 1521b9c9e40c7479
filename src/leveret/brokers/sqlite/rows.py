"""A task as a row of the file: the columns of its envelope, the same both ways.

Other programs may write rows, and SQLite keeps any value in any column. So what is read is checked here, once.
"""

from __future__ import annotations

from functools import cache
from operator import add
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.model import LATEST, MAX_HEADERS_DEPTH, Envelope, freed_key, is_flat, unix_time, waiting_key

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ENVELOPE = (
    "task.id, queue.name, task.name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers,"
    " priority"
)
_ALWAYS = ("id", "queue", "state", "name", "body", "content_type", "attempt", "enqueued_at")
#: Most tasks have nothing in most of these, and what is not named costs nothing.
_OTHERS = ("last_error", "due", "expires_at", "priority", "headers", "unique_key", "lane")
#: Numbers that are counted up stay below it: beyond twice that, SQLite makes them floating.
MOST_NUMBER = 2**62
_MOST_ATTEMPTS = 2**31
_NO_OTHERS = (None,) * 4
_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(dict[str, Any]).decode


def insertion(
    envelopes: Sequence[Envelope], queues: Mapping[str, int], now: float, lanes: Mapping[str, int]
) -> tuple[str, Sequence[tuple[Any, ...]]]:
    """The statement that stores tasks, and the rows. ``queues``: their numbers, by name.

    ``lanes``: where those of them wait that have limits, by id.
    """
    rows = [
        (
            one.id,
            queues[one.queue],
            "delayed" if one.due is not None and one.due > now else "limited" if one.id in lanes else "ready",
            one.task,
            one.body,
            one.content_type,
            one.attempt,
            one.enqueued_at,
        )
        for one in envelopes
    ]
    if not any(map(_has_others, envelopes)):
        return _insert(_ALWAYS), rows
    columns = list(zip(*(_others(one, lanes) for one in envelopes), strict=True))
    used = [place for place, column in enumerate(columns) if column.count(None) < len(column)]
    more = zip(*(columns[place] for place in used), strict=True)
    return _insert((*_ALWAYS, *(_OTHERS[place] for place in used))), list(map(add, rows, more))


@cache
def _insert(columns: Sequence[str]) -> str:
    return f"INSERT INTO task ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))})"  # noqa: S608 - constants


def _has_others(one: Envelope) -> bool:
    return bool(one.headers) or (one.last_error, one.due, one.expires_at, one.priority) != _NO_OTHERS


def _others(one: Envelope, lanes: Mapping[str, int]) -> tuple[Any, ...]:
    """In the order of `_OTHERS`."""
    headers, plain = one.headers, (one.last_error, one.due, one.expires_at, one.priority)
    if not headers:
        return (*plain, None, None, lanes.get(one.id))
    return (*plain, _pack(headers), freed_key(headers), lanes.get(one.id))


def replacement(one: Envelope) -> tuple[Any, ...]:
    """The columns that a later call changes."""
    return one.body, one.content_type, one.due, one.expires_at, _pack(one.headers)


def read(row: Sequence[Any]) -> tuple[Envelope, str]:
    """The task, and why it cannot run if its row is not one that Leveret wrote; of that, what could be read."""
    id_, queue, name, body, content_type, attempt, enqueued_at, last_error, due, expires_at, headers, priority = row
    problem = ""
    if not (
        type(id_) is str
        and type(queue) is str
        and (name is None or type(name) is str)
        and type(body) is bytes
        and (content_type is None or type(content_type) is str)
        and type(attempt) is int
        and 0 < attempt <= _MOST_ATTEMPTS
        and (enqueued_at is None or (type(enqueued_at) is float and 0.0 <= enqueued_at <= LATEST))
        and due is last_error is expires_at is priority is None
        and (headers is None or type(headers) is bytes)
    ):
        problem = _problem(row)
        if problem:
            return _repaired(row), f"its row in the file cannot be read: {problem}"
    found, problem = _headers(headers)
    return (
        Envelope(
            id_,
            queue,
            name,
            body,
            content_type,
            attempt,
            enqueued_at,
            last_error,
            due,
            expires_at,
            found,
            priority,
        ),
        problem and f"its row in the file cannot be read: {problem}",
    )


def envelope_of(row: Sequence[Any]) -> Envelope:
    """The task, as far as it can be read."""
    return read(row)[0]


def _problem(row: Sequence[Any]) -> str:
    """What is wrong with the first column that is."""
    for column, value in zip(_COLUMNS, row, strict=True):
        kinds, is_required = _KINDS[column]
        if (value is None and is_required) or (value is not None and type(value) not in kinds):
            wanted = " or ".join(_SQL[kind] for kind in kinds)
            return f"{column} is {_SQL.get(type(value), 'NULL')} and must be {wanted}"
        most = _MOST.get(column)
        if most is not None and value is not None and not most[0] <= value <= most[1]:
            return f"{column} is {value!r} and must be from {most[0]:g} to {most[1]:g}"
    return ""


def _repaired(row: Sequence[Any]) -> Envelope:
    """Of what a dead letter shows, as much as fits."""
    values = dict(zip(_COLUMNS, row, strict=True))
    headers, _ = _headers(values["headers"])
    return Envelope(
        text(values["id"]),
        text(values["queue"]),
        None if values["name"] is None else text(values["name"]),
        values["body"] if type(values["body"]) is bytes else text(values["body"]).encode(errors="replace"),
        None if values["content_type"] is None else text(values["content_type"]),
        values["attempt"] if _is_fine("attempt", values["attempt"]) else 1,
        unix_time(values["enqueued_at"]),
        None if values["last_error"] is None else text(values["last_error"]),
        unix_time(values["due"]),
        unix_time(values["expires_at"]),
        headers,
        values["priority"] if _is_fine("priority", values["priority"]) else None,
    )


def _headers(packed: object) -> tuple[dict[str, Any], str]:
    if not packed:
        return {}, ""
    try:
        headers = _unpack(packed)  # type: ignore[arg-type]
    except Exception as error:  # noqa: BLE001 - bytes that anybody may have written
        return {}, f"headers are no msgpack map with text keys ({type(error).__name__})"
    if not is_flat(headers, MAX_HEADERS_DEPTH):
        return {}, f"headers are nested more than {MAX_HEADERS_DEPTH} deep"
    return headers, ""


def headers_in(packed: object) -> dict[str, Any]:
    """The headers of a row, as far as they can be read."""
    return _headers(packed)[0] if packed else {}


def key_in(packed: object) -> str | None:
    """The unique key in a row's headers that its task has until it ends."""
    return freed_key(_headers(packed)[0]) if packed else None


def waits_in(packed: object) -> bool:
    """Whether a row's headers say that its task has its unique key until it is taken."""
    return bool(packed) and waiting_key(_headers(packed)[0]) is not None


def text(value: object) -> str:
    """A value of a text column, or what is there in its stead, told from text by its looks."""
    return value if type(value) is str else repr(value)


def count(value: object) -> int:
    """A number that tells how often or how many; 0 for anything else."""
    return value if type(value) is int else 0


def _is_fine(column: str, value: object) -> bool:
    lowest, most = _MOST[column]
    return type(value) is int and lowest <= value <= most


_COLUMNS = (
    *("id", "queue", "name", "body", "content_type", "attempt", "enqueued_at", "last_error", "due", "expires_at"),
    *("headers", "priority"),
)
#: What each column may hold, and whether it must.
_KINDS: dict[str, tuple[tuple[type, ...], bool]] = {
    "id": ((str,), True),
    "queue": ((str,), True),
    "name": ((str,), False),
    "body": ((bytes,), True),
    "content_type": ((str,), False),
    "attempt": ((int,), True),
    "enqueued_at": ((float, int), False),
    "last_error": ((str,), False),
    "due": ((float, int), False),
    "expires_at": ((float, int), False),
    "headers": ((bytes,), False),
    "priority": ((int,), False),
}
_SQL = {str: "TEXT", bytes: "a BLOB", int: "an INTEGER", float: "a REAL"}
_MOST: dict[str, tuple[float, float]] = {
    "attempt": (1, _MOST_ATTEMPTS),
    "enqueued_at": (0, LATEST),
    "due": (0, LATEST),
    "expires_at": (0, LATEST),
    "priority": (0, 255),
}
