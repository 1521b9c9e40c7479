"""What an application is given as middleware, checked; and what becomes of an enqueue in it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from leveret.client.payload import makes_coroutines
from leveret.errors import ConfigurationError
from leveret.model import awaitable, check_headers, with_other_headers
from leveret.model.durations import show

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from leveret.model import EnqueueMiddleware, Envelope, Store

log = logging.getLogger("leveret.app")

_KIND = "enqueue middleware"


def functions(argument: str, given: Sequence[Callable[..., Any]]) -> tuple[Any, ...]:
    """Raises ConfigurationError for what is no list of functions."""
    wrong = [layer for layer in (given if isinstance(given, (list, tuple)) else [given]) if not callable(layer)]
    if wrong or callable(given):
        raise ConfigurationError(
            f"{argument} is {show(given)}; it must be a list of functions, as {argument}=[with_session]"
        )
    return tuple(given)


def thread_functions(argument: str, given: Sequence[Callable[..., Any]]) -> tuple[Any, ...]:
    """Raises ConfigurationError for what is no list of functions, or has one that needs an event loop."""
    for layer in functions(argument, given):
        if makes_coroutines(layer):
            raise ConfigurationError(
                f"{argument} has {show(layer)}, which is asynchronous: a task's thread has no event loop. "
                "Give it to middleware=[...], or write it as a plain 'def'"
            )
    return tuple(given)


def storing_within(layer: EnqueueMiddleware, store: Store) -> Store:
    """``store`` with a middleware around it that cannot hide what became of the tasks."""

    async def through(envelopes: Sequence[Envelope]) -> None:
        before = [dict(envelope.headers) for envelope in envelopes]
        is_stored, failure = False, None

        async def once(changed: Sequence[Envelope]) -> None:
            nonlocal is_stored, failure
            if is_stored:
                raise ConfigurationError(f"{_named(layer)} awaits 'store(...)' again: the tasks are stored already")
            try:
                await store(_accepted(layer, envelopes, before, changed))
            except BaseException as error:
                failure = error
                raise
            is_stored = True

        try:
            await awaitable(_KIND, layer, layer(envelopes, once), "awaits store(envelopes)")
        except Exception:
            if not is_stored:
                raise
            # Who got the error would enqueue again what is stored, and it would run twice.
            log.exception("%s failed after the tasks were stored", _named(layer))
        if failure is not None and not is_stored:
            raise failure
        if not is_stored:
            raise ConfigurationError(
                f"{_named(layer)} returned without 'await store(...)': nothing is stored; it refuses tasks by raising"
            )

    return through


def _named(layer: EnqueueMiddleware) -> str:
    return f"the {_KIND} {show(layer)}"


def _accepted(
    layer: EnqueueMiddleware, given: Sequence[Envelope], before: Sequence[dict[str, Any]], changed: Sequence[Envelope]
) -> Sequence[Envelope]:
    """``before``: the headers as they were, since a dict may be changed in place."""
    try:
        accepted = with_other_headers(given, changed)
        for envelope, headers in zip(accepted, before, strict=True):
            if envelope.headers != headers:
                check_headers(envelope.headers, headers)
    except ConfigurationError as error:
        raise ConfigurationError(f"{_named(layer)}: {error}") from None
    return accepted
