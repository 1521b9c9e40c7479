"""Where a worker's log goes when its program has not decided that itself, and what a record says of its task.

A record about a task, or made while one runs, has these fields: ``task_id``, ``task_name``, ``task_queue`` and
``task_attempt``.
"""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import msgspec

from leveret.current import NoCurrentTask, current_task
from leveret.model import LOG_FIELDS

Format: TypeAlias = Literal["text", "json"]

_FORMAT = "%(asctime)s %(levelname)-7s %(message)s"


class TaskFields(logging.Filter):
    """Gives each record that a running task makes the task's fields; None to the others, so that any format may name
    them. Add it to your handlers: ``handler.addFilter(TaskFields())``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "task_id", None) is None:
            record.__dict__.update(_of_current_task())
        return True


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC), ``level``, ``logger``, ``message``, the task's fields, ``exception``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = {name: getattr(record, name, None) for name in LOG_FIELDS}
        line |= {name: value for name, value in fields.items() if value is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # ASCII alone: whatever the stream's encoding, a line stays JSON.
        return json.dumps(line, default=str)


class Logging(msgspec.Struct, frozen=True, array_like=True):
    """How a program logs that has not decided that itself: to standard error, one line an event."""

    level: str = "INFO"
    form: Format = "text"

    def of_children(self) -> Logging | None:
        """How child processes log; None: as their application says, plainly and no less than warnings by default."""
        return self if self.form == "json" else None

    def set_up(self) -> None:
        """Do so; a program that has set logging up itself is left alone."""
        root = logging.getLogger()
        if root.handlers:
            return
        handler = logging.StreamHandler()
        handler.addFilter(TaskFields())
        handler.setFormatter(JsonFormatter() if self.form == "json" else logging.Formatter(_FORMAT))
        root.addHandler(handler)
        root.setLevel(self.level)


def quieten_connections() -> None:
    """For a command that says itself, at its end, that it reached nobody."""
    logging.getLogger("leveret.rabbitmq.publisher").setLevel(logging.CRITICAL)


def _of_current_task() -> dict[str, Any]:
    try:
        current = current_task()
    except NoCurrentTask:
        return dict.fromkeys(LOG_FIELDS)
    return dict(zip(LOG_FIELDS, (current.id, current.task, current.queue, current.attempt), strict=True))
