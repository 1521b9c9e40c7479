"""The inbox: a task's own transaction also holds the mark that it was done, so that its effects are there once."""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from contextvars import ContextVar
from typing import Any, NamedTuple, TypeAlias

from leveret.errors import ConfigurationError, LeveretError
from leveret.model.current import running
from leveret.model.durations import show
from leveret.outbox.connections import Answer, Given, given
from leveret.outbox.statements import keep_result, kept_result, mark

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


class Results(NamedTuple):
    """How a task's result becomes JSON, and is that again. ``encode``: raises LeveretError for what cannot be kept."""

    encode: Callable[[Any], bytes]
    decode: Callable[[bytes], Any]


def within_inbox(
    function: Callable[..., Any], inbox: object, results: Results, *, is_async: bool
) -> Callable[..., Any]:
    """The task's function in a transaction of its own, which holds the mark that it was done, and the result.

    A task whose mark is there does not run, and returns that. Raises ConfigurationError for an inbox that is none.
    """
    begin = _begin(inbox)
    wrapped = _asynchronously(function, begin, results) if is_async else _in_thread(function, begin, results)
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


def _asynchronously(function: Callable[..., Any], begin: Begin, results: Results) -> Callable[..., Any]:
    async def run(*args: Any, **kwargs: Any) -> Any:
        async with begin() as transaction:
            mark = _mark_of(transaction)
            if mark is not None and not (await _told(mark.set()))[0]:
                return _before(mark, results, (await _told(mark.find()))[1])
            token = _open.set(transaction)
            try:
                result = await function(*args, **kwargs)
            finally:
                _open.reset(token)
            if mark is not None and (kept := _encoded(results, result)) is not None:
                await _told(mark.keep(kept))
            return result

    return run


def _in_thread(function: Callable[..., Any], begin: Begin, results: Results) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with begin() as transaction:
            mark = _mark_of(transaction)
            if mark is not None and mark.given.is_async:
                raise ConfigurationError(
                    f"task {mark.task!r} is a plain 'def', and its inbox gives {show(transaction)}, which is "
                    "asynchronous: write it as an 'async def'"
                )
            if mark is not None and not mark.set()[0]:
                return _before(mark, results, mark.find()[1])
            token = _open.set(transaction)
            try:
                result = function(*args, **kwargs)
            finally:
                _open.reset(token)
            if mark is not None and (kept := _encoded(results, result)) is not None:
                mark.keep(kept)
            return result

    return run


class _Mark(NamedTuple):
    """The mark of the task that runs, in a transaction. What it gives is to be awaited where ``given.is_async``."""

    given: Given
    id: str
    task: str | None

    def set(self) -> Any:
        """One that another run has set and not committed yet is waited for."""
        beginning, ending = mark(self.given.dialect)
        sql = f"{beginning} ({', '.join(self.given.places(3))}) {ending}".rstrip()
        return self.given.run(sql, (self.id, self.task, time.time()))

    def keep(self, result: str) -> Any:
        return self.given.run(keep_result(self.given.places(2)), (result, self.id))

    def find(self) -> Any:
        (place,) = self.given.places(1)
        return self.given.run(kept_result(place), (self.id,))


def _mark_of(transaction: object) -> _Mark | None:
    """None: the function was called, and no task runs it."""
    current = running.get(None)
    return None if current is None else _Mark(given(transaction), current.id, current.task)


async def _told(answer: Any) -> Answer:
    found: Answer = await answer if inspect.isawaitable(answer) else answer
    return found


def _encoded(results: Results, result: Any) -> str | None:
    """A result that cannot be kept is none for whoever asks, either."""
    if result is None:
        return None
    with suppress(LeveretError):
        return results.encode(result).decode()
    return None


def _before(mark: _Mark, results: Results, rows: Sequence[Sequence[Any]]) -> Any:
    """What the run before returned."""
    log.info("task %s %s was done before: its mark is in the inbox, and it does not run again", mark.task, mark.id)
    kept = rows[0][0] if rows else None
    return None if kept is None else results.decode(kept.encode())
