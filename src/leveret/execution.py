"""From an envelope to an outcome: find the task, read its arguments, run it, classify how it ended.

Nothing here knows a broker or a process; both executors run tasks through this module alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from leveret.current import NO_LINK, CurrentTask, run_within
from leveret.errors import (
    Dead,
    InvalidArguments,
    NoResult,
    NotSerializable,
    Retry,
    TimedOut,
    UnknownTask,
    UnreadableBody,
)
from leveret.model import Cancelled, DeadLettered, Envelope, Outcome, Released, Retrying, Succeeded, log_fields, shorten
from leveret.retry import RetryRules

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from leveret.app import App
    from leveret.current import Link
    from leveret.task import Task

log = logging.getLogger("leveret.execution")

_CANCELLED = Cancelled("cancelled while it ran")


class Runner:
    """Runs envelopes: ``async def`` tasks on the running loop, plain ``def`` tasks on its own threads."""

    def __init__(self, app: App, *, concurrency: int) -> None:
        self._app = app
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="leveret-task")
        #: Which tasks are ``async def``, by name.
        self._is_async: dict[str, bool] = {}

    async def run(self, envelope: Envelope, link: Link = NO_LINK) -> Outcome:
        """The outcome of one attempt. Raises nothing but the cancellation of this coroutine itself."""
        telemetry = self._app.telemetry
        if telemetry is None:
            return (await self._attempt(envelope, link))[0]
        with telemetry.processing(envelope, self._app.url) as ended:
            try:
                outcome, error = await self._attempt(envelope, link)
            except BaseException as interruption:
                ended(_CANCELLED if link.cancelled else Released(), interruption)
                raise
            ended(_CANCELLED if link.cancelled and not isinstance(outcome, Succeeded) else outcome, error)
            return outcome

    async def _attempt(self, envelope: Envelope, link: Link) -> tuple[Outcome, BaseException | None]:
        """The outcome, and the exception that it comes from."""
        try:
            task = self._app.find(envelope.task, envelope.queue)
            args, kwargs = task.signature.decode(envelope.body)
        except (UnknownTask, UnreadableBody, InvalidArguments) as error:
            return DeadLettered(shorten(f"{type(error).__name__}: {error}")), error
        try:
            current = _current(task, envelope, link)
            value = await run_within(current, self._app.middleware, partial(self._call_here, task, args, kwargs))
        except asyncio.CancelledError as error:
            running = asyncio.current_task()
            if running is not None and running.cancelling():
                raise
            return classify(error, envelope.attempt, task.retry), error
        except BaseException as error:  # noqa: BLE001 - a task may raise anything, SystemExit too; none ends the child
            return classify(error, envelope.attempt, task.retry), error
        return self._succeeded(task, envelope, value) if task.store_result else Succeeded(), None

    def classify(self, error: BaseException, envelope: Envelope) -> Outcome:
        """What an error that left `run` means for its task, by the task's own rules."""
        try:
            rules = self._app.find(envelope.task, envelope.queue).retry
        except UnknownTask:
            rules = RetryRules()
        return classify(error, envelope.attempt, rules)

    def timeout(self, envelope: Envelope) -> float | None:
        """Seconds that an attempt at it may run; None: no limit, or nothing to run."""
        try:
            return self._app.find(envelope.task, envelope.queue).timeout
        except UnknownTask:
            return None

    def is_async(self, envelope: Envelope) -> bool:
        """Whether it can be ended by cancelling the asyncio task that runs it."""
        try:
            return inspect.iscoroutinefunction(self._app.find(envelope.task, envelope.queue).function)
        except UnknownTask:
            return True

    def _succeeded(self, task: Task[..., Any], envelope: Envelope, value: Any) -> Succeeded:
        try:
            return Succeeded(task.returns.encode(value, self._app.max_result_size))
        except (NotSerializable, NoResult) as error:
            log.warning(
                "%s %s succeeded, and its result is not kept: %s",
                task.name,
                envelope.id,
                error,
                extra=log_fields(envelope),
            )
            return Succeeded(problem=shorten(str(error), 1_000))

    def close(self) -> None:
        """Let go of the threads; one that still runs a task is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call_here(self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        pid = os.getpid()
        try:
            return await self._call(task, args, kwargs)
        finally:
            _end_fork(pid)

    async def _call(self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        is_async = self._is_async.get(task.name)
        if is_async is None:
            is_async = self._is_async[task.name] = inspect.iscoroutinefunction(task.function)
        if is_async:
            running = task.function(*args, **kwargs)
            return await (running if task.timeout is None else _within(task, running))
        context = contextvars.copy_context()
        loop = asyncio.get_running_loop()
        result = await loop.run_in_executor(self._threads, lambda: context.run(_guard, task.function, args, kwargs))
        if isinstance(result, _Stopped):
            raise result.error
        return await result if inspect.isawaitable(result) else result


def _current(task: Task[..., Any], envelope: Envelope, link: Link) -> CurrentTask:
    return CurrentTask(
        id=envelope.id,
        task=task.name,
        queue=envelope.queue,
        attempt=envelope.attempt,
        max_attempts=task.retry.policy.max_attempts,
        enqueued_at=envelope.enqueued_at,
        headers=envelope.headers,
        deadline=None if task.timeout is None else time.time() + task.timeout,
        _link=link,
    )


async def _within(task: Task[..., Any], running: Awaitable[Any]) -> Any:
    """Await a coroutine, within its task's timeout."""
    own: TimeoutError | None = None
    try:
        async with asyncio.timeout(task.timeout):
            try:
                return await running
            except TimeoutError as error:
                own = error
                raise
    except TimeoutError as error:
        if error is own:
            raise
        raise TimedOut(f"task {task.name!r} ran longer than its timeout of {task.timeout:g} s") from error


class _Stopped:
    """An exception on its way out of a thread that no future can carry."""

    def __init__(self, error: BaseException) -> None:
        self.error = RuntimeError(f"the task raised {type(error).__name__}")
        self.error.__cause__ = error


def _guard(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    pid = os.getpid()
    try:
        return function(*args, **kwargs)
    except (StopIteration, GeneratorExit) as error:
        return _Stopped(error)
    finally:
        _end_fork(pid)


def _end_fork(pid: int) -> None:
    """In a process that a task forked and that comes back from the task: end, as a program that has come to its end.

    The task is the other process's, and so are the event loop and the threads that this one would go on with.
    """
    if os.getpid() != pid:
        _exit_with(sys.exc_info()[1])


def _exit_with(error: BaseException | None) -> NoReturn:
    code = 0
    if isinstance(error, SystemExit):
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    elif error is not None:
        traceback.print_exception(error)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with suppress(Exception):
            stream.flush()
    os._exit(code & 0xFF)


def classify(error: BaseException, attempt: int, rules: RetryRules) -> Outcome:
    """What an exception means for its task."""
    if isinstance(error, Dead):
        return DeadLettered(shorten(_words(error)) or "the task gave up", _traceback(error))
    if isinstance(error, Retry) and rules.policy.may_try_again(attempt):
        return Retrying(_summary(error), _traceback(error), getattr(error, "delay", 0.0))
    try:
        verdict = rules.next_try(attempt, error)
    except Exception:
        log.exception("the retry rule of a task failed; its policy decides")
        verdict = msgspec.structs.replace(rules, decide=None).next_try(attempt, error)
    if isinstance(verdict, str):
        return DeadLettered(f"{_summary(error)}; {verdict}", _traceback(error))
    return Retrying(_summary(error), _traceback(error), verdict)


def _words(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - an exception's own __str__ may raise anything
        return f"{type(error).__name__} (its message cannot be shown)"


def _summary(error: BaseException) -> str:
    return shorten("".join(traceback.format_exception_only(error)).strip(), 1_000)


def _traceback(error: BaseException) -> str:
    """From the task's own function on: what called it is the same each time, and nobody's mistake."""
    start = at = error.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == __file__:
            start = at.tb_next
        at = at.tb_next
    return shorten("".join(traceback.format_exception(type(error), error, start or error.__traceback__)))
