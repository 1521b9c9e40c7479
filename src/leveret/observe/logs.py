"""Where a worker's log goes when its program has not decided that itself, and what a record says of its task.

A record about a task, or made while one runs, has these fields: ``task_id``, ``task_name``, ``task_queue`` and
``task_attempt``.
"""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model import LOG_FIELDS, NoCurrentTask, current_task
from leveret.model.failures import traceback_of
from leveret.model.printable import in_json, in_line, indented

Format: TypeAlias = Literal["text", "json"]


def log_mistake(
    log: logging.Logger, text: str, mistake: BaseException, caller: str, extra: dict[str, Any] | None = None
) -> None:
    """An error with the traceback of the user's code that ``caller`` called (its file)."""
    # As text: a handler that formatted it would run the exception's own code again.
    with suppress(BaseException):  # a handler is the user's too, and there is nowhere else to say it
        log.error("%s:\n%s", text, traceback_of(mistake, caller).rstrip(), extra=extra)


class TaskFields(logging.Filter):
    """Gives each record that a running task makes the task's fields; None to the others, so that any format may name
    them. Add it to your handlers: ``handler.addFilter(TaskFields())``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        if getattr(record, "task_id", None) is None:
            record.__dict__.update(_of_current_task())
        return True


class TextFormatter(logging.Formatter):
    """One line a record: time, level, the task's name and id if there is one, message; tracebacks below.

    Whatever is in it, nothing but a record of its own begins a line.
    """

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        id_ = getattr(record, "task_id", None)
        if id_ is not None:
            who = f"{in_line(getattr(record, 'task_name', None) or '(default task)')} {in_line(str(id_))}"
            text = text if text.startswith(who) else f"{who}: {text}"
        lines = [f"{self.formatTime(record)} {record.levelname:<7} {text}"]
        if record.exc_info:
            lines.append(self.formatException(record.exc_info))
        elif record.exc_text:
            lines.append(record.exc_text)
        if record.stack_info:
            lines.append(self.formatStack(record.stack_info))
        return indented("\n".join(lines))


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
        elif record.exc_text:
            line["exception"] = record.exc_text
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # ASCII alone: whatever the stream's encoding, a line stays JSON.
        return in_json(json.dumps(line, default=str))


class Logging(msgspec.Struct, frozen=True, array_like=True):
    """How a worker and its child processes log: to standard error.

    ``level``: None is INFO, and a program that has set logging up itself keeps its own. Given, it holds for that too,
    and for all loggers.
    """

    level: str | None = None
    form: Format = "text"

    def __post_init__(self) -> None:
        if self.level is not None and self.level not in logging.getLevelNamesMapping():
            raise ConfigurationError(f"log level {self.level!r} is none of {', '.join(logging.getLevelNamesMapping())}")

    def set_up(self) -> None:
        """Do so; the handlers of a program that has set logging up itself are left alone."""
        root = logging.getLogger()
        if not all(map(_is_accidental, root.handlers)):
            if self.level is not None:
                root.setLevel(self.level)
                for set_up in root.handlers:
                    set_up.setLevel(max(set_up.level, logging.getLevelNamesMapping()[self.level]))
            return
        for accidental in list(root.handlers):
            root.removeHandler(accidental)
        handler = logging.StreamHandler()
        handler.addFilter(TaskFields())
        handler.setFormatter(JsonFormatter() if self.form == "json" else TextFormatter())
        root.addHandler(handler)
        root.setLevel(self.level or "INFO")
        handler.setLevel(self.level or "NOTSET")


def _is_accidental(handler: logging.Handler) -> bool:
    """Whether ``logging.info(...)`` has made it by itself, as it does for a module that says something on import."""
    form = handler.formatter
    return (
        type(handler) is logging.StreamHandler
        and handler.stream is sys.stderr
        and handler.level == logging.NOTSET
        and form is not None
        and form._fmt == logging.BASIC_FORMAT  # noqa: SLF001 - there is no other way to read it
    )


def quieten_connections() -> None:
    """For a command that says itself, at its end, that it reached nobody."""
    logging.getLogger("leveret.rabbitmq.publisher").setLevel(logging.CRITICAL)


def _of_current_task() -> dict[str, Any]:
    try:
        current = current_task()
    except NoCurrentTask:
        return dict.fromkeys(LOG_FIELDS)
    return dict(zip(LOG_FIELDS, (current.id, current.task, current.queue, current.attempt), strict=True))
