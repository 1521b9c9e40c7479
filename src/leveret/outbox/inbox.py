"""The inbox: a task's own transaction also holds the mark that it was done, so that its effects are there once."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

from leveret.errors import ConfigurationError, LeveretError
from leveret.model.current import CurrentTask, running
from leveret.model.durations import show
from leveret.outbox.connections import Given, given
from leveret.outbox.statements import mark

log = logging.getLogger("leveret.outbox")

#: Called with nothing; gives the context manager of one transaction, which commits at its end and yields the
#: connection or the session.
Begin: TypeAlias = Callable[[], Any]
_open: ContextVar[Any] = ContextVar("leveret_transaction")


def current_transaction() -> Any:
    """The connection or session of the transaction that a task with ``inbox=`` runs in.

    Returns:
        What the context manager of ``inbox`` gave.

    Raises:
        LeveretError: The code does not run in such a task.
    """
    try:
        return _open.get()
    except LookupError:
        raise LeveretError("current_transaction() is for tasks with @app.task(inbox=...); here is none") from None


def within_inbox(function: Callable[..., Any], inbox: object, *, is_async: bool) -> Callable[..., Any]:
    """The task's function in a transaction of its own, which holds the mark that it was done.

    A task whose mark is there does not run, and returns None. Raises ConfigurationError for an inbox that is none.
    """
    begin = _begin(inbox)
    wrapped = _asynchronously(function, begin) if is_async else _in_thread(function, begin)
    return functools.wraps(function)(wrapped)


def _begin(inbox: Any) -> Begin:
    begin = getattr(inbox, "begin", inbox)
    if not callable(begin):
        raise ConfigurationError(
            f"inbox is {show(inbox)}; it must be an engine or a sessionmaker of SQLAlchemy, or a function that gives "
            "the context manager of a transaction"
        )
    found: Begin = begin
    return found


def _asynchronously(function: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        async with begin() as transaction:
            current = running.get(None)
            if current is not None and not await _is_first(transaction, current):
                return _done(current)
            token = _open.set(transaction)
            try:
                return await function(*args, **kwargs)
            finally:
                _open.reset(token)

    return run


def _in_thread(function: Callable[..., Any], begin: Begin) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with begin() as transaction:
            current = running.get(None)
            if current is not None and not _is_first_sync(transaction, current):
                return _done(current)
            token = _open.set(transaction)
            try:
                return function(*args, **kwargs)
            finally:
                _open.reset(token)

    return run


async def _is_first(transaction: object, current: CurrentTask[Any]) -> bool:
    """Set the mark; one that another run has set and not committed yet is waited for."""
    found = given(transaction)
    told = _run(found, current)
    changed, _ = await told if inspect.isawaitable(told) else told
    return bool(changed)


def _is_first_sync(transaction: object, current: CurrentTask[Any]) -> bool:
    found = given(transaction)
    if found.is_async:
        raise ConfigurationError(
            f"task {current.task!r} is a plain 'def', and its inbox gives {show(transaction)}, which is asynchronous: "
            "write it as an 'async def'"
        )
    changed, _ = _run(found, current)
    return bool(changed)


def _run(found: Given, current: CurrentTask[Any]) -> Any:
    beginning, ending = mark(found.dialect)
    sql = f"{beginning} ({found.placeholders(3)}) {ending}".rstrip()
    return found.run(sql, (current.id, current.task, time.time()))


def _done(current: CurrentTask[Any]) -> None:
    log.info(
        "task %s %s was done before: its mark is in the inbox, and it does not run again", current.task, current.id
    )
