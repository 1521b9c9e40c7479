"""Middleware: what is wrapped around an enqueue and around a run. The first one is the outermost."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, TypeAlias

import msgspec

from leveret.errors import ConfigurationError
from leveret.model.current import CurrentTask, Runtime, running
from leveret.model.durations import show
from leveret.model.messages import Envelope
from leveret.model.outcomes import Outcome

#: Stores tasks durably.
Store: TypeAlias = Callable[[Sequence[Envelope]], Coroutine[Any, Any, None]]
#: Wrapped around each enqueue, in the program that enqueues: awaits ``store(envelopes)`` once, with the same tasks,
#: which may have other headers. What it raises before that is the enqueue's error, and nothing is stored.
EnqueueMiddleware: TypeAlias = Callable[[Sequence[Envelope], Store], Awaitable[None]]
#: Runs what is inside; returns what the task returned.
Inner: TypeAlias = Callable[[], Awaitable[Any]]
#: Wrapped around each run, on the event loop: awaits ``inner()`` once, and may do something before and after, and on an
#: exception.
Middleware: TypeAlias = Callable[[CurrentTask, Inner], Awaitable[Any]]
#: Wrapped around a plain ``def`` task in its thread: a plain ``def`` itself, that returns what ``inner()`` returns.
ThreadMiddleware: TypeAlias = Callable[[CurrentTask, Callable[[], Any]], Any]


class Attempted(msgspec.Struct, frozen=True):
    """How an attempt ended."""

    outcome: Outcome
    #: The exception that it comes from.
    error: BaseException | None = None
    #: It was to end, by a cancellation or a stop: the error goes on to who wanted that.
    interrupted: bool = False


Attempt: TypeAlias = Callable[[Envelope, Runtime], Awaitable[Attempted]]
#: Made of a side of the middleware and what is inside of it: the outermost call of an enqueue, or of an attempt. An
#: attempt raises nothing, and is also one at what turns out to be no task, or to have wrong arguments.
EnqueueLayer: TypeAlias = Callable[[Store], Store]
AttemptLayer: TypeAlias = Callable[[Attempt], Attempt]


def with_other_headers(given: Sequence[Envelope], changed: object) -> list[Envelope]:
    """What a middleware wants to be stored. Raises ConfigurationError when more than headers differs."""
    if not isinstance(changed, Sequence) or isinstance(changed, str):
        raise ConfigurationError(f"it gave {show(changed)}; it must be a list of the envelopes that it was given")
    if len(changed) != len(given):
        raise ConfigurationError(
            f"it gave {len(changed)} tasks of {len(given)}; it must store all of them, or raise to refuse them"
        )
    for before, after in zip(given, changed, strict=True):
        if after is before:
            continue
        if not isinstance(after, Envelope):
            raise ConfigurationError(f"it gave {show(after)}; it must be an Envelope, as envelope.with_headers({{}})")
        if msgspec.structs.replace(after, headers=before.headers) != before:
            fields = [name for name in before.__struct_fields__ if name != "headers"]
            (name, *_) = [name for name in fields if getattr(before, name) != getattr(after, name)]
            raise ConfigurationError(f"it changed {name!r} of task {before.task!r}; it may change headers alone")
    return list(changed)


async def run_within(current: CurrentTask, middleware: Sequence[Middleware], inner: Inner) -> Any:
    """Run ``inner`` as the current task, the first middleware outermost."""
    for layer in reversed(middleware):
        inner = partial(_through, layer, current, inner)
    token = running.set(current)
    try:
        return await inner()
    finally:
        running.reset(token)


async def _through(layer: Middleware, current: CurrentTask, inner: Inner) -> Any:
    return await awaitable(
        "middleware",
        layer,
        layer(current, inner),
        "returns await inner(); what is to run in the thread of plain 'def' tasks is given to "
        "App(thread_middleware=[...])",
    )


def awaitable(kind: str, layer: object, given: Any, remedy: str) -> Awaitable[Any]:
    """What a middleware returned. Raises ConfigurationError when it cannot be awaited."""
    if not inspect.isawaitable(given):
        raise ConfigurationError(
            f"the {kind} {show(layer)} returned {show(given)}, which cannot be awaited: write it as an 'async def' "
            f"that {remedy}"
        )
    return given


def within_thread(
    current: CurrentTask, middleware: Sequence[ThreadMiddleware], inner: Callable[[], Any]
) -> Callable[[], Any]:
    """The call of a plain task with its middleware around it, the first one outermost."""
    for layer in reversed(middleware):
        inner = partial(layer, current, inner)
    return inner
