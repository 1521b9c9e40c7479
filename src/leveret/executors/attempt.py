"""Jobs that run side by side, each from an envelope to an outcome: find the task, read its arguments, run it, classify
how it ended.

Nothing here knows a broker or a process; both executors run tasks through this module alone.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import logging
import os
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NoReturn

import msgspec

from leveret.errors import InvalidArguments, NoResult, NotSerializable, TimedOut, UnknownTask, UnreadableBody
from leveret.executors.base import Awaits, Finished, Progressed, Report, Returned, RunRequest, Started, running
from leveret.model import (
    NO_RUNTIME,
    Attempted,
    Cancelled,
    CurrentTask,
    Dead,
    DeadLettered,
    Envelope,
    Limited,
    Outcome,
    Progress,
    PutOff,
    Released,
    Retrying,
    RetryRules,
    Succeeded,
    UnreadableSteps,
    leaves,
    limit_refs,
    log_fields,
    next_step,
    own_headers,
    queue_limit,
    run_within,
    scheduled_for,
    shorten,
    steps_in,
    takes_result,
    within_thread,
    wrong_steps,
)
from leveret.model.durations import MAX_DELAY, parse_seconds
from leveret.model.failures import summary, traceback_of, words
from leveret.model.printable import in_line
from leveret.observe import LimitedLog, log_mistake

if TYPE_CHECKING:
    from collections.abc import Awaitable, Mapping, Sequence

    from leveret.client import App, Task
    from leveret.errors import LeveretError
    from leveret.model import Attempt, RunningTask, Runtime, Step

log = logging.getLogger("leveret.execution")

#: Why a message may name a task that is not registered here.
_FOREIGN = "; if another application uses this queue, give each one queues of its own"
_NOT_RUN = Cancelled("cancelled before it ran")
_CANCELLED = Cancelled("cancelled while it ran")
#: Progress within this time is told as one (seconds).
_GATHER = 0.05


class JobRunner:
    """Runs jobs through a runner, ``concurrency`` at once and in order, and reports in batches.

    ``admit``: asked how many of the next jobs may start; those that may not are dropped, they are another's now.
    Both executors use it: `in_process` in the worker's process, `child` in its own.
    """

    def __init__(
        self, runner: Runner, *, concurrency: int, admit: Callable[[int], int] = lambda wanted: wanted
    ) -> None:
        self._runner = runner
        self._admit = admit
        #: The jobs that run, by the asyncio task that runs each.
        self.running: dict[asyncio.Task[Any], RunRequest] = {}
        #: How many jobs have run.
        self.finished = 0
        self._stopping = False
        self._context = contextvars.copy_context()
        self._free = concurrency
        self._waiting: deque[RunRequest] = deque()
        self._reports: list[Report] = []
        self._links: dict[int, _Link] = {}
        #: Jobs that wait and shall not run.
        self._unwanted: set[int] = set()
        #: The latest of each job, from whatever thread; told in a moment.
        self._progress: dict[int, Progress] = {}
        self._progress_lock = threading.Lock()
        self._loop = asyncio.get_running_loop()
        self._report: Callable[[Sequence[Report]], None] = _unheard

    def report_to(self, report: Callable[[Sequence[Report]], None]) -> None:
        self._report = report

    def run_with(self, state: Any, context: contextvars.Context) -> None:
        """Give the tasks what the lifespan has yielded, and the context variables that it has set."""
        self._runner.state = state
        self._context = context.copy()

    def submit(self, jobs: Sequence[RunRequest]) -> None:
        if self._stopping:
            return
        self._waiting.extend(jobs)
        self._start_waiting()

    def cancel(self, keys: Sequence[int]) -> None:
        """Have these jobs not run, or end if they do."""
        for task, job in self.running.items():
            if job.key in keys:
                link = self._links[job.key]
                link.cancelled = True
                if link.interruptible:
                    task.cancel()
        self._unwanted.update(key for key in keys if key not in self._links)

    def recall(self) -> None:
        """Give back those that wait, from behind the last one that may run once only."""
        waiting = list(self._waiting)
        kept = max((place for place, job in enumerate(waiting, 1) if job.once), default=0)
        count = self._admit(len(waiting) - kept)
        self._waiting = deque(waiting[:kept])  # what is not given back here was taken back, to be run elsewhere
        keys = [job.key for job in waiting[kept : kept + count]]
        self._unwanted.difference_update(keys)
        self._say(Returned(keys))

    def running_tasks(self) -> list[RunningTask]:
        return [running(job, self._links[job.key].since) for job in self.running.values()]

    async def stop(self) -> None:
        self._stopping = True
        self._waiting.clear()
        self._runner.close()
        for task in self.running:
            task.cancel()
        await asyncio.gather(*self.running, return_exceptions=True)

    def _start_waiting(self) -> None:
        wanted = min(self._free, len(self._waiting))
        if not wanted:
            return
        admitted = self._admit(wanted)
        self._free -= admitted
        jobs = [self._waiting.popleft() for _ in range(admitted)]
        begun: dict[float | None, list[int]] = {}
        for job in jobs:
            begun.setdefault(self._runner.timeout(job.envelope), []).append(job.key)
        for timeout, keys in begun.items():
            self._say(Started(keys, timeout))
        for job in jobs:
            # A context of its own: what one task sets in a context variable is not the next one's to see.
            link = self._links[job.key] = _Link(job.key, self._note_progress, self._note_awaits)
            link.task = self._loop.create_task(self._run(job, link), context=self._context.copy())
            self.running[link.task] = job
        if admitted < wanted:
            self._waiting.clear()  # taken back, to be run elsewhere
            self._unwanted.clear()

    async def _run(self, job: RunRequest, link: _Link) -> None:
        began = time.monotonic()
        is_unwanted = link.cancelled or job.key in self._unwanted
        try:
            if is_unwanted:
                self._unwanted.discard(job.key)
                outcome: Outcome = _NOT_RUN
            else:
                outcome = await self._runner.run(job.envelope, link)
        except BaseException as error:
            if self._stopping:
                raise
            # The task cancelled the asyncio task that it runs in: it has failed like any other, and costs no slot.
            outcome = _CANCELLED if link.cancelled else self._runner.classify(error, job.envelope)
        self._tell_progress()
        del self._links[job.key]
        # By hand: a callback would be one more round of the loop for each job.
        if link.task is not None:
            self.running.pop(link.task, None)
        self._free += 1
        self.finished += 1
        self._say(Finished(job.key, outcome, None if is_unwanted else time.monotonic() - began))

    def _note_progress(self, key: int, progress: Progress) -> None:
        """From any thread."""
        with self._progress_lock:
            is_first = not self._progress
            self._progress[key] = progress
        if is_first:
            self._loop.call_soon_threadsafe(self._loop.call_later, _GATHER, self._tell_progress)

    def _note_awaits(self, key: int) -> None:
        """From any thread."""
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._tell_awaits, key)

    def _tell_awaits(self, key: int) -> None:
        link = self._links.get(key)
        if link is not None and link.is_told_to_await != (link.awaited > 0):
            link.is_told_to_await = link.awaited > 0
            self._say(Awaits(key, link.is_told_to_await))

    def _tell_progress(self) -> None:
        if not self._progress:
            return
        with self._progress_lock:
            progress, self._progress = self._progress, {}
        for key, told in progress.items():
            if key in self._links:
                self._say(Progressed(key, told))

    def _say(self, report: Report) -> None:
        if not self._reports:
            self._loop.call_soon(self._flush)
        self._reports.append(report)

    def _flush(self) -> None:
        """Tell what has happened. What begins instead of what has ended is told with it, and so before it begins."""
        self._start_waiting()
        reports, self._reports = self._reports, []
        self._report(reports)


class _Link(msgspec.Struct, eq=False):
    """Between a job and its runner; see `leveret.model.Runtime`."""

    key: int
    tell: Callable[[int, Progress], None]
    tell_awaits: Callable[[int], None]
    #: What runs it.
    task: asyncio.Task[None] | None = None
    #: How many tasks it waits for that have not begun, and whether that is told.
    awaited: int = 0
    is_told_to_await: bool = False
    cancelled: bool = False
    #: Not before its asyncio task has taken its first step: cancelled then, it would end without a word.
    interruptible: bool = False
    #: Unix time.
    since: float = msgspec.field(default_factory=time.time)

    def progressed(self, progress: Progress) -> None:
        self.tell(self.key, progress)

    def awaits(self, change: int) -> None:
        self.awaited += change
        self.tell_awaits(self.key)


def _unheard(reports: Sequence[Report]) -> None:
    raise RuntimeError(f"{len(reports)} reports before report_to()")


class Runner:
    """Runs envelopes: ``async def`` tasks on the running loop, plain ``def`` tasks on its own threads."""

    def __init__(self, app: App, *, concurrency: int) -> None:
        self._app = app
        self._warnings = LimitedLog(log)
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="leveret-task")
        self._pid = os.getpid()
        #: What the lifespan has yielded.
        self.state: Any = None
        self._layered: Attempt = self._attempt
        for layer in reversed(app.attempt_layers):
            self._layered = layer(self._layered)

    async def run(self, envelope: Envelope, link: Runtime = NO_RUNTIME) -> Outcome:
        """The outcome of one attempt. Raises nothing but the cancellation of this coroutine itself."""
        attempted = await self._layered(envelope, link)
        if attempted.interrupted and attempted.error is not None:
            try:
                raise attempted.error
            finally:
                del attempted
        return attempted.outcome

    async def _attempt(self, envelope: Envelope, link: Runtime) -> Attempted:
        """The attempt inside of all layers."""
        try:
            task = self._find(envelope)
        except UnknownTask as error:
            return Attempted(_unfit(error, "" if envelope.task is None else _FOREIGN), error)
        try:
            steps = steps_in(envelope.headers) if envelope.headers else ()
        except UnreadableSteps:
            return Attempted(DeadLettered(wrong_steps(envelope.headers)))
        try:
            args, kwargs = task.signature.decode(envelope.body, envelope.content_encoding)
        except (UnreadableBody, InvalidArguments) as error:
            return Attempted(_unfit(error), error)
        except BaseException as error:  # noqa: BLE001 - the types of the arguments are the user's; see below
            return Attempted(classify(error, envelope.attempt, task.retry), error)
        try:
            current = _current(task, envelope, link, self.state)
            link.interruptible = task.is_async
            value = await run_within(current, self._app.middleware, partial(self._call, task, args, kwargs, current))
        except BaseException as error:  # noqa: BLE001 - a task may raise anything, SystemExit too; none ends the child
            return _failed(error, envelope, task, link)
        finally:
            link.interruptible = False
        if steps:
            return Attempted(self._followed(task, envelope, value, steps))
        return Attempted(self._succeeded(task, envelope, value)) if task.store_result else _SUCCEEDED

    def classify(self, error: BaseException, envelope: Envelope) -> Outcome:
        """What an error that left `run` means for its task, by the task's own rules."""
        try:
            rules = self._find(envelope).retry
        except UnknownTask:
            rules = RetryRules()
        return classify(error, envelope.attempt, rules, _limits(envelope))

    def timeout(self, envelope: Envelope) -> float | None:
        """Seconds that an attempt at it may run; None: no limit, or nothing to run."""
        try:
            return self._find(envelope).timeout
        except UnknownTask:
            return None

    def _find(self, envelope: Envelope) -> Task[..., Any]:
        """The task, with the options that the message carries."""
        return self._app.registry.find(envelope.task, envelope.queue).for_message(envelope.headers)

    def _succeeded(self, task: Task[..., Any], envelope: Envelope, value: Any) -> Succeeded:
        try:
            return Succeeded(task.returns.encode(value, self._app.max_result_size))
        except (NotSerializable, NoResult) as error:
            problem = str(error)
        except BaseException as error:  # noqa: BLE001 - what was returned runs the user's code when it is looked at
            problem = f"looking at the result of task {task.name!r} raised {summary(error)}"
        with suppress(Exception):  # a log's handler is the user's too
            self._warnings.warning(
                "%s %s succeeded, and its result is not kept: %s",
                task.name,
                in_line(envelope.id),
                problem,
                extra=log_fields(envelope),
            )
        return Succeeded(problem=shorten(problem, 1_000))

    def _followed(self, task: Task[..., Any], envelope: Envelope, value: Any, steps: Sequence[Step]) -> Outcome:
        """The outcome of a task that others follow. Dead if the next one cannot have what it returned."""
        is_wanted = task.store_result or takes_result(steps)
        outcome = self._succeeded(task, envelope, value) if is_wanted else Succeeded()
        if outcome.problem and takes_result(steps):
            return DeadLettered(f"it succeeded, and the next step, {steps[0].task}, cannot have it: {outcome.problem}")
        following = next_step(envelope, steps, outcome.result, time.time())
        result = outcome.result if task.store_result else None
        return Succeeded(result, outcome.problem, (following,))

    def close(self) -> None:
        """Let go of the threads; one that still runs a task is not waited for."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _call(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], current: CurrentTask
    ) -> Any:
        """Call the function, and await what it returns for as long as that is awaitable."""
        try:
            is_async, timeout, link = task.is_async, task.timeout, current.link
            until = None if timeout is None else asyncio.get_running_loop().time() + timeout
            value = task.function(*args, **kwargs) if is_async else await self._in_thread(task, args, kwargs, current)
            while value is not None and inspect.isawaitable(value):
                if link.cancelled and not is_async:
                    _close(value)
                    raise asyncio.CancelledError  # while its thread ran, which nothing could interrupt
                link.interruptible = True
                value = await (value if until is None else _within(task, value, until))
                link.interruptible = is_async
        finally:
            _end_fork(self._pid, sys.exc_info()[1])
        if value is not None and (inspect.isgenerator(value) or inspect.isasyncgen(value)):
            _close(value)
            raise Dead(
                f"task {task.name!r} returned a generator, and none of its code has run: a task has no 'yield'; "
                "return a value instead, or have its decorator go through the generator"
            )
        return value

    async def _in_thread(
        self, task: Task[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], current: CurrentTask
    ) -> Any:
        context = contextvars.copy_context()
        call = within_thread(current, self._app.thread_middleware, partial(task.function, *args, **kwargs))
        value, error = await asyncio.get_running_loop().run_in_executor(self._threads, context.run, _guarded, call)
        if error is not None:
            try:
                raise _carried(error)
            finally:
                del error
        if inspect.isawaitable(value):
            # The rest runs here, and is to see what the first part has set.
            for variable, content in context.items():
                if variable.get(_UNSET) is not content:
                    variable.set(content)
        return value


_UNSET = object()
_SUCCEEDED = Attempted(Succeeded())
_NO_HEADERS: MappingProxyType[str, Any] = MappingProxyType({})


def _failed(error: BaseException, envelope: Envelope, task: Task[..., Any], link: Runtime) -> Attempted:
    """What an exception means that left the task or its middleware."""
    if isinstance(error, asyncio.CancelledError):
        running = asyncio.current_task()
        if running is not None and running.cancelling():
            return Attempted(_CANCELLED if link.cancelled else Released(), error, interrupted=True)
    return Attempted(
        _CANCELLED if link.cancelled else classify(error, envelope.attempt, task.retry, _limits(envelope)), error
    )


def _limits(envelope: Envelope) -> Mapping[str, str]:
    """The limits that a task may say something of, each with the key that it has of it."""
    return {**dict(limit_refs(envelope.headers)), queue_limit(envelope.queue): ""}


def _unfit(error: LeveretError, more: str = "") -> DeadLettered:
    """A message that no attempt can make run."""
    return DeadLettered(shorten(f"{type(error).__name__}: {error}") + more)


def _current(task: Task[..., Any], envelope: Envelope, link: Runtime, state: Any) -> CurrentTask:
    return CurrentTask(
        id=envelope.id,
        task=task.name,
        queue=envelope.queue,
        attempt=envelope.attempt,
        max_attempts=task.task_options.max_attempts,
        enqueued_at=envelope.enqueued_at,
        headers=MappingProxyType(own_headers(envelope.headers)) if envelope.headers else _NO_HEADERS,
        deadline=None if task.timeout is None else time.time() + task.timeout,
        scheduled_for=scheduled_for(envelope.headers) if envelope.headers else None,
        state=state,
        _link=link,
    )


async def _within(task: Task[..., Any], running: Awaitable[Any], until: float) -> Any:
    """Await what runs, within its task's timeout: until that time of the loop."""
    own: TimeoutError | None = None
    try:
        async with asyncio.timeout_at(until):
            try:
                return await running
            except TimeoutError as error:
                own = error
                raise
    except TimeoutError as error:
        if error is own:
            raise
        raise TimedOut(f"task {task.name!r} ran longer than its timeout of {task.timeout or 0.0:.15g} s") from error


def _guarded(call: Callable[[], Any]) -> tuple[Any, BaseException | None]:
    """What it returned, or what it raised: not every exception can be handed from a thread through a future."""
    pid = os.getpid()
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
        _end_fork(pid, error)
        return None, error
    _end_fork(pid, None)
    return value, None


def _end_fork(pid: int, error: BaseException | None) -> None:
    """In a process that a task forked and that comes back from the task: end, as a program that has come to its end.

    The task is the other process's, and so are the event loop and the threads that this one would go on with.
    """
    if os.getpid() != pid:
        _exit_with(error)


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


def _carried(error: BaseException) -> BaseException:
    """The exception as a coroutine can raise it."""
    if not isinstance(error, (StopIteration, GeneratorExit)):
        return error
    carrier = RuntimeError(f"the task raised {type(error).__name__}")
    carrier.__cause__ = error
    return carrier


def _close(value: Any) -> None:
    """Let go of a coroutine or a generator that is not to run: nobody warns of it then."""
    with suppress(Exception):
        if not inspect.isasyncgen(value):
            value.close()


def classify(
    error: BaseException, attempt: int, rules: RetryRules, limits: Mapping[str, str] = MappingProxyType({})
) -> Outcome:
    """What an exception means for its task. Total: whatever the exception and the rules do, there is an outcome.

    ``limits``: those of the task, each with its key.
    """
    mistakes: list[BaseException] = []
    try:
        outcome = _judged(error, attempt, rules, limits, mistakes)
    except BaseException as mistake:  # noqa: BLE001 - an exception's own code ran, and may raise anything
        mistakes.append(mistake)
        outcome = _charged(summary(error), traceback_of(error, __file__), rules.policy.next_try(attempt))
    for one in mistakes:
        log_mistake(log, "the retry rule of a task failed; its policy decides", one, __file__)
    return outcome


def _judged(
    error: BaseException, attempt: int, rules: RetryRules, limits: Mapping[str, str], mistakes: list[BaseException]
) -> Outcome:
    parts = leaves(error)
    dead = [words(one) for one in parts if isinstance(one, Dead)]
    if dead:
        return DeadLettered(shorten("; ".join(filter(None, dead))) or "the task gave up", traceback_of(error, __file__))
    why = summary(error)
    limited = [one for one in parts if isinstance(one, Limited)]
    if limited and len(limited) == len(parts):
        last = max(limited, key=lambda one: one.delay)
        if last.limit in limits:
            return PutOff(last.limit, limits[last.limit], parse_seconds(last.delay, most=MAX_DELAY))
        why += f"; the task does not have the limit {last.limit!r}: give it limits=[...]"
    return _charged(why, traceback_of(error, __file__), rules.next_try(attempt, error, mistakes))


def _charged(summary: str, traceback_: str, verdict: float | str) -> Outcome:
    if isinstance(verdict, str):
        return DeadLettered(f"{summary}; {verdict}", traceback_)
    return Retrying(summary, traceback_, verdict)
