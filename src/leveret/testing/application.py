"""An application under test: on a memory broker of its own, with what a test wants to do and to know.

No test framework is needed: ``with under_test(app) as test: ...``. For pytest there is the fixture ``leveret_app``.
"""

from __future__ import annotations

import asyncio
import inspect
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from leveret.errors import LeveretError
from leveret.executors import InProcessExecutor, Manifest
from leveret.model import (
    Dead,
    DeadLettered,
    Declare,
    DeclareLimits,
    Delivery,
    Envelope,
    Outcome,
    Released,
    Retry,
    Retrying,
    Succeeded,
    arguments,
    brief,
    check_overrides,
    leaves,
    overrides_in,
    own_headers,
    unique_key,
)
from leveret.model.durations import show
from leveret.observe import Event, TaskSettled, TaskStarted, WorkerReady
from leveret.testing.clock import ManualClock
from leveret.testing.faulty import FaultyBroker
from leveret.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from datetime import timedelta

    from leveret.client import App, P, R, Task
    from leveret.model import CurrentTask, DeadLetter, Header, Inner
    from leveret.model.arguments import Exceptions
    from leveret.testing.faulty import Faults

_Ending: TypeAlias = Literal["idle", "died", "cut off"]
#: A delay that was asked for as a moment (``at=``) is compared to within this (seconds).
_NEAR = 1.0
#: What runs may finish before a worker of a test leaves: a test's own time limit ends it (seconds).
_GRACE = 86_400.0


class Enqueued(msgspec.Struct, frozen=True):
    """A task as it was enqueued."""

    task: str
    #: Its arguments by name, as its function gets them; for a raw task the body.
    arguments: dict[str, Any] | bytes
    queue: str
    #: Seconds before which it was not to run; 0.0: at once.
    delay: float
    #: Seconds after which it was not to start; None: no limit.
    expires: float | None
    priority: int | None
    id: str
    #: What ``options(...)`` said in place of the task's own options: ``timeout``, ``max_attempts``, ``store_result``.
    options: dict[str, Any] = {}
    #: The headers that it was given.
    headers: dict[str, Any] = {}
    #: Its unique key, the task's name at its beginning. What found its key taken was not enqueued, and is not here.
    unique_key: str | None = None

    def __str__(self) -> str:
        parts = [f"{_call(self.task, self.arguments)} on {self.queue!r}"]
        parts += [f"in {self.delay:g} s"] if self.delay else []
        parts += [f"expires in {self.expires:g} s"] if self.expires is not None else []
        parts += [f"priority {self.priority}"] if self.priority is not None else []
        parts += [f"{name} {value!r}" for name, value in self.options.items()]
        parts += [f"headers {self.headers!r}"] if self.headers else []
        parts += [f"unique key {self.unique_key!r}"] if self.unique_key else []
        return ", ".join(parts)


class Run(msgspec.Struct, frozen=True):
    """One run of a task."""

    task: str
    id: str
    queue: str
    #: 1 for the first.
    attempt: int
    #: Succeeded, Retrying, DeadLettered or PutOff (it raised ``Limited``), of `leveret.model`.
    outcome: Outcome
    #: What it raised; None as well for a task that did not get as far as its code.
    error: BaseException | None = None
    #: False: the outcome was lost, and the task runs again.
    kept: bool = True
    #: What it returned, as whoever waits for it gets it; None as well for a run that failed.
    result: Any = None

    def __repr__(self) -> str:
        """In one line."""
        return brief(
            "Run",
            task=self.task,
            id=self.id,
            queue=self.queue,
            attempt=self.attempt,
            outcome=type(self.outcome),
            error=self.error,
            result=self.result,
            kept=None if self.kept else False,
        )


class TasksFailed(ExceptionGroup[Exception]):
    """Runs failed that the test did not expect to. Holds what they raised."""


class AppUnderTest:
    """An application on a memory broker of its own, with the tools of a test.

    The fixture ``leveret_app`` and ``under_test`` make it.
    """

    def __init__(self, app: App) -> None:
        #: The application itself.
        self.app = app
        #: Moves delays, expiry and the waits between attempts forward.
        self.clock = ManualClock()
        self._broker = FaultyBroker(self.clock, on_crash=self._on_crash, on_cut=self._on_cut)
        manifest = Manifest.of(app)
        self._broker.schedules.do(Declare(manifest.origin, self.clock.time(), manifest.schedules))
        self._broker.declare_limits(DeclareLimits(0.0, manifest.limits, manifest.limited_queues))
        self._runs: list[Run] = []
        self._errors: dict[tuple[str, int], BaseException] = {}
        self._values: dict[tuple[str, int], Any] = {}
        #: Why the worker that works now shall not go on.
        self._ending: asyncio.Future[_Ending] | None = None

    @property
    def faults(self) -> Faults:
        """What is to go wrong."""
        return self._broker.faults

    @property
    def runs(self) -> Sequence[Run]:
        """Every run so far, in the order in which they ended."""
        return tuple(self._runs)

    def enqueued(self, task: Task[..., Any] | None = None) -> list[Enqueued]:
        """What was enqueued in this test; what has run since is there too.

        Args:
            task: The task that is asked for. None: all.

        Returns:
            The tasks, the oldest first.
        """
        return [
            self._enqueued(envelope)
            for envelope in self._broker.published
            if task is None or envelope.task == task.name
        ]

    def assert_enqueued(self, task: Task[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Enqueued:
        """Fail unless the task was enqueued with these arguments. ``expecting`` looks at more than the arguments.

        Args:
            task: The task.
            *args: The arguments that it must have.
            **kwargs: The same, by name.

        Returns:
            The last one that was enqueued so.

        Raises:
            AssertionError: None was.
        """
        return self.expecting().assert_enqueued(task, *args, **kwargs)[-1]

    def expecting(
        self,
        *,
        queue: str | None = None,
        delay: float | timedelta | None = None,
        priority: int | None = None,
        id: str | None = None,  # noqa: A002 - as in Task.options
        timeout: float | timedelta | None = None,
        max_attempts: int | None = None,
        store_result: bool | None = None,
        headers: Mapping[str, Header] | None = None,
        count: int | None = None,
    ) -> Expectation:
        """Say what ``assert_enqueued`` shall look at besides the arguments; what is None does not matter.

        Args:
            queue: The queue.
            delay: The delay (seconds, or a timedelta), to within a second.
            priority: The priority.
            id: The id.
            timeout: What ``options(timeout=...)`` said (seconds, or a timedelta).
            max_attempts: What ``options(max_attempts=...)`` said.
            store_result: What ``options(store_result=...)`` said.
            headers: Headers that it must have, beside any others.
            count: How many there must be: exactly so many, 0 for none. None: one or more.

        Returns:
            The expectation, which has ``assert_enqueued``.

        Raises:
            ConfigurationError: ``delay``, ``timeout``, ``max_attempts`` or ``store_result`` is not what it must be.
        """
        wanted = {"queue": queue, "priority": priority, "id": id}
        overrides = check_overrides({"timeout": timeout, "max_attempts": max_attempts, "store_result": store_result})
        return Expectation(
            self,
            {name: value for name, value in wanted.items() if value is not None},
            arguments.seconds_or_none("delay", delay, none="any"),
            overrides,
            dict(headers or {}),
            count,
        )

    async def dead_letters(self, queue: str | None = None) -> list[DeadLetter]:
        """The dead letters of one queue, or of all.

        Args:
            queue: The name of the queue. None: all.

        Returns:
            The dead letters of each queue, the oldest first.
        """
        names = self._broker.names if queue is None else [queue]
        return [letter for name in names for letter in await self._broker.dead_letters.read(name, limit=1_000_000)]

    def dead_letters_sync(self, queue: str | None = None) -> list[DeadLetter]:
        """``dead_letters`` for a test without an event loop.

        Args:
            queue: The name of the queue. None: all.

        Returns:
            The dead letters of each queue, the oldest first.
        """
        return self.app.wait(self.dead_letters(queue))

    async def drain(
        self,
        *,
        expect: Exceptions = (),
        concurrency: int = 1,
        at_most: int = 10_000,
        schedules: bool = False,
    ) -> list[Run]:
        """Run all that is ready, and what that enqueues, until nothing is. What is delayed stays.

        Limits hold, and rates go by the test's clock: what waits for one stays, too.

        A real worker runs them, in this process and on this loop. A task that is dead without having raised (its
        arguments do not fit, it expired) counts as a ``Dead``. A run that asked for another with ``Retry`` has not
        failed.

        Args:
            expect: The exceptions that runs may raise: one class, or some in a tuple, list or set.
            concurrency: The number of tasks that run at once.
            at_most: The number of runs after which it gives up, because a task enqueues itself for ever.
            schedules: True: the tasks that schedules have due by the test's clock run as well, as after an outage that
                lasted since the last time.

        Returns:
            The runs, in the order in which they ended.

        Raises:
            TasksFailed: At the end, if runs failed that ``expect`` does not cover.
            RuntimeError: There were more than ``at_most`` runs.
        """
        expected = arguments.exceptions("expect", expect)
        before = len(self._runs)
        drain = _Drain(self, self._broker, concurrency, at_most)
        self._broker.schedules.is_kept = schedules
        try:
            await drain.run()
        finally:
            self._broker.schedules.is_kept = False
        runs = self._runs[before:]
        failures = [_failure(run) for run in runs if _is_failure(run) and not _is_one_of(_raised(run), expected)]
        if failures:
            raise TasksFailed(f"{len(failures)} of {len(runs)} runs failed", failures)
        return runs

    def drain_sync(
        self,
        *,
        expect: Exceptions = (),
        concurrency: int = 1,
        at_most: int = 10_000,
        schedules: bool = False,
    ) -> list[Run]:
        """``drain`` for a test without an event loop.

        Args:
            expect: The exceptions that runs may raise: one class, or some in a tuple, list or set.
            concurrency: The number of tasks that run at once.
            at_most: The number of runs after which it gives up, because a task enqueues itself for ever.
            schedules: True: the tasks that schedules have due by the test's clock run as well, as after an outage that
                lasted since the last time.

        Returns:
            The runs, in the order in which they ended.

        Raises:
            TasksFailed: At the end, if runs failed that ``expect`` does not cover.
            RuntimeError: There were more than ``at_most`` runs.
        """
        return self.app.wait(self.drain(expect=expect, concurrency=concurrency, at_most=at_most, schedules=schedules))

    def _enqueued(self, envelope: Envelope) -> Enqueued:
        at = envelope.enqueued_at or 0.0
        return Enqueued(
            envelope.task or "",
            self._arguments(envelope),
            envelope.queue,
            0.0 if envelope.due is None else round(envelope.due - at, 3),
            None if envelope.expires_at is None else round(envelope.expires_at - at, 3),
            envelope.priority,
            envelope.id,
            overrides_in(envelope.headers),
            own_headers(envelope.headers),
            unique_key(envelope.headers),
        )

    def _arguments(self, envelope: Envelope) -> dict[str, Any] | bytes:
        try:
            task = self.app.registry.find(envelope.task, envelope.queue)
            return _arguments(task, envelope.body)
        except LeveretError:
            return envelope.body

    async def _note_errors(self, current: CurrentTask, inner: Inner) -> Any:
        """The outermost middleware: keeps what a run returned, or raised, which an outcome has as text only."""
        try:
            value = self._values[current.id, current.attempt] = await inner()
            return value
        except BaseException as error:
            self._errors[current.id, current.attempt] = error
            raise

    def _note(self, envelope: Envelope, outcome: Outcome, *, kept: bool) -> None:
        error = self._errors.pop((envelope.id, envelope.attempt), None)
        value = self._values.pop((envelope.id, envelope.attempt), None)
        if isinstance(outcome, Succeeded) and outcome.result is not None:
            # As it arrives: a tuple is a list then, unless the task's annotation says otherwise.
            value = self.app.client.restore(envelope.task, envelope.queue, msgspec.Raw(outcome.result))
        name = envelope.task or ""
        self._runs.append(Run(name, envelope.id, envelope.queue, envelope.attempt, outcome, error, kept, value))

    def _on_crash(self, delivery: Delivery, outcome: Outcome) -> None:
        self._note(delivery.envelope, outcome, kept=False)
        self._end("died")

    def _on_cut(self) -> None:
        self._end("cut off")

    def _end(self, why: _Ending) -> None:
        if self._ending is not None and not self._ending.done():
            self._ending.set_result(why)


class _Drain:
    """Workers, one after the other, until nothing is ready: a new one follows one that died or lost its connection."""

    def __init__(self, test: AppUnderTest, broker: FaultyBroker, concurrency: int, at_most: int) -> None:
        self._test = test
        self._broker = broker
        self._concurrency = concurrency
        self._at_most = at_most
        self._started = 0
        #: Workers that have lost their connection and finish what they run.
        self._leaving: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        self._broker.home = asyncio.get_running_loop()
        try:
            await self._broker.declare(self._test.app.queues if self._broker.schedules.is_due else ())
            while self._is_busy(self._broker.names) and self._started <= self._at_most:
                await self._work()
            await asyncio.gather(*self._leaving)
        finally:
            self._broker.home = None
            for leaving in self._leaving:
                leaving.cancel()
        if self._started > self._at_most:
            raise RuntimeError(
                f"{self._started} tasks were started and there is more: does a task enqueue itself for ever? "
                "Else raise drain(at_most=...)"
            )

    def _is_busy(self, queues: Sequence[str]) -> bool:
        return self._broker.is_busy(queues) or self._broker.schedules.is_due

    async def _work(self) -> None:
        """One worker's life."""
        queues = tuple(self._broker.names)

        def listen(event: Event) -> None:
            if isinstance(event, TaskStarted):
                self._started += 1
            elif isinstance(event, TaskSettled) and not isinstance(event.outcome, Released):
                self._test._note(event.envelope, event.outcome, kept=event.kept)  # noqa: SLF001 - one thing in two parts
            settled = isinstance(event, (WorkerReady, TaskSettled))
            if (settled and not self._is_busy(queues)) or self._started > self._at_most:
                self._test._end("idle")  # noqa: SLF001

        executor = InProcessExecutor(self._test.app, concurrency=self._concurrency)
        worker = Worker(executor, queues=queues, grace=_GRACE, listeners=[listen], broker=self._broker)
        ending: asyncio.Future[_Ending] = asyncio.get_running_loop().create_future()
        self._test._ending = ending  # noqa: SLF001
        working = asyncio.create_task(worker.run())
        either: list[asyncio.Future[Any]] = [working, ending]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            why = ending.result() if ending.done() else "idle"
            if why == "cut off":
                self._leaving.append(working)
            if why != "died":
                worker.stop()
            if why == "idle":
                await working
        finally:
            if working not in self._leaving:
                working.cancel()
                await asyncio.wait([working])
                self._broker.bury()


class Expectation(msgspec.Struct, frozen=True):
    """What an enqueued task must be like; made by `AppUnderTest.expecting`."""

    _test: AppUnderTest
    #: The values that its fields must have, by their names.
    _fields: dict[str, Any]
    _delay: float | None
    _options: dict[str, Any]
    _headers: dict[str, Any]
    _count: int | None

    def assert_enqueued(self, task: Task[P, R], /, *args: P.args, **kwargs: P.kwargs) -> list[Enqueued]:
        """Fail unless the task was enqueued with these arguments, and as expected.

        Args:
            task: The task.
            *args: The arguments that it must have.
            **kwargs: The same, by name.

        Returns:
            Those that were enqueued so, the oldest first.

        Raises:
            AssertionError: None was, or not as many as expected.
        """
        body, _ = task.signature.encode(args, kwargs)
        arguments = _arguments(task, body)
        every = self._test.enqueued()
        found = [one for one in every if one.task == task.name and one.arguments == arguments and self._fits(one)]
        if (not found) if self._count is None else len(found) != self._count:
            expected = "at least once" if self._count is None else f"{self._count} times"
            raise AssertionError(
                f"{_call(task.name, arguments)}{self._conditions()} was enqueued {len(found)} times, "
                f"and {expected} was expected.\n{_list(every)}"
            )
        return found

    def _fits(self, one: Enqueued) -> bool:
        return (
            all(getattr(one, name) == value for name, value in self._fields.items())
            and (self._delay is None or abs(self._delay - one.delay) <= _NEAR)
            and self._options.items() <= one.options.items()
            and self._headers.items() <= one.headers.items()
        )

    def _conditions(self) -> str:
        delay = {} if self._delay is None else {"delay": self._delay}
        headers = {"headers": self._headers} if self._headers else {}
        wanted = {**self._fields, **delay, **self._options, **headers}
        return f" with {', '.join(f'{name} {value!r}' for name, value in wanted.items())}" if wanted else ""


@contextmanager
def under_test(app: App) -> Iterator[AppUnderTest]:
    """Put an application on a fresh memory broker inside the block, whatever its URL: ``with under_test(app) as test``.

    Args:
        app: The application.

    Yields:
        The tools of a test.

    Raises:
        AssertionError: At the end of the block, a fault that was asked for has not happened.
    """
    test = AppUnderTest(app)
    middleware = app.middleware
    app.middleware = (test._note_errors, *middleware)  # noqa: SLF001 - one thing in two parts
    try:
        with app.client.enqueuing_to(test._broker):  # noqa: SLF001
            yield test
    finally:
        app.middleware = middleware
    if test.faults.outstanding:
        raise AssertionError(f"the test asked for faults that did not happen: {', '.join(test.faults.outstanding)}")


def _arguments(task: Task[..., Any], body: bytes) -> dict[str, Any] | bytes:
    """By name and with the defaults, so that the same call in another form is equal."""
    if task.signature.raw:
        return body
    args, kwargs = task.signature.decode(body)
    bound = inspect.signature(task.function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _call(task: str, arguments: dict[str, Any] | bytes) -> str:
    if isinstance(arguments, bytes):
        return f"{task}({arguments!r})"
    return f"{task}({', '.join(f'{name}={value!r}' for name, value in arguments.items())})"


def _list(every: Sequence[Enqueued]) -> str:
    if not every:
        return "Nothing was enqueued in this test."
    return "Enqueued in this test, the oldest first:\n" + "\n".join(f"  {one}" for one in every)


def _is_failure(run: Run) -> bool:
    return run.kept and (
        isinstance(run.outcome, DeadLettered)
        or (isinstance(run.outcome, Retrying) and not (run.error and _only_asks(run.error)))
    )


def _only_asks(error: BaseException) -> bool:
    return all(issubclass(type(one), Retry) for one in leaves(error))


def _is_one_of(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    """An exception group is if all is that has failed in it."""
    failed = [one for one in leaves(error) if not issubclass(type(one), Retry)]
    try:
        return isinstance(error, kinds) or (bool(failed) and all(isinstance(one, kinds) for one in failed))
    except Exception:  # noqa: BLE001 - the classes are the user's
        return False


def _raised(run: Run) -> BaseException:
    if run.error is not None:
        return run.error
    return Dead(run.outcome.reason if isinstance(run.outcome, DeadLettered) else "it failed")


def _failure(run: Run) -> Exception:
    """What a run raised, with a note of which run it was."""
    raised = _raised(run)
    if isinstance(raised, Exception):
        failure = raised
    else:
        failure = RuntimeError(f"task {run.task!r} raised {show(raised)}")
        failure.__cause__ = raised
    fate = f"next try in {run.outcome.delay:.1f} s" if isinstance(run.outcome, Retrying) else "the task is dead"
    with suppress(Exception):  # its class is the user's
        failure.add_note(f"in task {run.task!r}, attempt {run.attempt}, id {run.id}: {fate}")
    return failure
