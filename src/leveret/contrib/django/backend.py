"""A backend for ``django.tasks`` (Django 6 and later)."""

from __future__ import annotations

import datetime as dt
import inspect
import re
from dataclasses import fields
from functools import partial
from math import ceil
from traceback import format_exception
from typing import TYPE_CHECKING, Any

import msgspec
from django.conf import settings
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import Task, TaskContext, TaskError, TaskResult, TaskResultStatus
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued, task_finished, task_started
from django.utils import timezone
from django.utils.json import normalize_json
from django.utils.module_loading import autodiscover_modules

from leveret.contrib.django.application import app, at_commit
from leveret.errors import ConfigurationError, TaskNotFound
from leveret.model import MAX_PRIORITY, MIDDLE_PRIORITY, current_task

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from leveret.client import Task as LeveretTask
    from leveret.model import Status

_OPTIONS = ("ENQUEUE_ON_COMMIT", "MAX_ATTEMPTS", "TIMEOUT")
_STATES = {
    "running": TaskResultStatus.RUNNING,
    "succeeded": TaskResultStatus.SUCCESSFUL,
    "dead": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
}
#: The line of a traceback that names the exception.
_RAISED = re.compile(r"^([A-Za-z_][\w.]*)(?::|$)", re.MULTILINE)
#: What ends an attempt of itself: each of these fails a task. A cancelled run is not ended by its task.
_ENDED = (Exception, SystemExit, KeyboardInterrupt)
#: Django's task behind each of the application's that is one.
_known: dict[str, Task] = {}


class RegisteredTask(Task):
    """A task that the worker knows by its module and name from the moment it is declared."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _register(self)


class LeveretBackend(BaseTaskBackend):
    """Stores Django's tasks with Leveret, whose workers run them.

    OPTIONS: ``ENQUEUE_ON_COMMIT`` (True: a task is stored when the transaction is committed), ``MAX_ATTEMPTS`` (1) and
    ``TIMEOUT`` (seconds; None).
    """

    task_class = RegisteredTask
    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: Mapping[str, Any]) -> None:
        super().__init__(alias, params)
        for name in self.options:
            if name not in _OPTIONS:
                raise ConfigurationError(
                    f"TASKS[{alias!r}]['OPTIONS'] has {name!r}, which is no option; there are: {', '.join(_OPTIONS)}"
                )

    def enqueue(self, task: Task, args: Any, kwargs: Any) -> TaskResult:
        self.validate_task(task)
        result = partial(_result, task, args=list(args), kwargs=dict(kwargs), backend=self.alias)
        checked = result("")  # its arguments are plain JSON now
        try:
            envelope, store = self._chosen(task).prepared(*checked.args, **checked.kwargs)
        except ConfigurationError as error:
            raise InvalidTask(str(error)) from error
        enqueued = result(envelope.id)

        def store_and_tell() -> None:
            store()
            object.__setattr__(enqueued, "enqueued_at", _moment(envelope.enqueued_at or 0.0))
            task_enqueued.send(type(self), task_result=enqueued)

        if self.options.get("ENQUEUE_ON_COMMIT", True):
            at_commit(store_and_tell)
        else:
            store_and_tell()
        return enqueued

    def get_result(self, result_id: str) -> TaskResult:
        try:
            return self._restored(app.wait(app.handle(result_id).status()))
        except TaskNotFound as error:
            raise TaskResultDoesNotExist(result_id) from error

    async def aget_result(self, result_id: str) -> TaskResult:
        try:
            return self._restored(await app.handle(result_id).status())
        except TaskNotFound as error:
            raise TaskResultDoesNotExist(result_id) from error

    def _chosen(self, task: Task) -> LeveretTask[..., Any]:
        chosen = _register(task).options(
            queue=task.queue_name,
            priority=_priority(task.priority),
            max_attempts=self.options.get("MAX_ATTEMPTS", 1),
            timeout=self.options.get("TIMEOUT"),
        )
        if task.run_after is None:
            return chosen
        after = task.run_after if timezone.is_aware(task.run_after) else timezone.make_aware(task.run_after)
        return chosen.options(at=after)

    def _restored(self, status: Status) -> TaskResult:
        if status.task not in _known:
            autodiscover_modules("tasks")
        task = _known.get(status.task or "")
        if task is None:
            raise TaskResultDoesNotExist(f"{status.id}: {status.task!r} is no task of this project's tasks.py modules")
        arguments = msgspec.json.decode(status.body) if status.body else {}
        started = None if status.started_at is None else _moment(status.started_at)
        # A task that waits for its next attempt has had those before it.
        attempts = status.attempt - (started is None or status.state == "retrying")
        state = _STATES.get(status.state, TaskResultStatus.READY)
        result = _result(
            _as_enqueued(task, status.queue, self.alias),
            status.id,
            args=arguments.get("args", []),
            kwargs=arguments.get("kwargs", {}),
            backend=self.alias,
            status=state,
            enqueued_at=None if status.enqueued_at is None else _moment(status.enqueued_at),
            started_at=started,
            last_attempted_at=started,
            finished_at=_moment(status.at) if status.is_final else None,
            errors=[_error(status)] if status.error else [],
            worker_ids=[status.worker or ""] * max(attempts, 0),
        )
        object.__setattr__(result, "_return_value", status.result)
        return result


def _result(task: Task, id_: str, **values: Any) -> TaskResult:
    empty: dict[str, Any] = {"status": TaskResultStatus.READY, "errors": [], "worker_ids": []}
    times = dict.fromkeys(("enqueued_at", "started_at", "finished_at", "last_attempted_at"))
    return TaskResult(task=task, id=id_, **{**empty, **times, **values})


def _as_enqueued(task: Task, queue: str, backend: str) -> Task:
    """The declared task with these two, which ``using`` would hold against the settings of the declared backend."""
    given = {"queue_name": queue, "backend": backend}
    made: Task = object.__new__(type(task))
    for one in fields(task):
        object.__setattr__(made, one.name, given.get(one.name, getattr(task, one.name)))
    return made


def _priority(priority: int) -> int | None:
    """Django's, from -100 to 100, as Leveret's, from 0 to 9: those below and above the middle stay there."""
    if priority == 0:
        return None
    if priority < 0:
        return MIDDLE_PRIORITY - ceil(-priority * MIDDLE_PRIORITY / 100)
    return MIDDLE_PRIORITY + ceil(priority * (MAX_PRIORITY - MIDDLE_PRIORITY) / 100)


def _moment(at: float) -> dt.datetime:
    moment = dt.datetime.fromtimestamp(at, dt.UTC)
    return moment if settings.USE_TZ else timezone.make_naive(moment)


def _error(status: Status) -> TaskError:
    """The class is in the traceback alone; what no exception ended has none."""
    text = status.traceback.rpartition("Traceback (most recent call last):")[2]
    raised = _RAISED.search(text)
    path = "builtins.Exception" if raised is None else raised[1]
    return TaskError(
        exception_class_path=path if "." in path else f"builtins.{path}",
        traceback=status.traceback or status.error or "",
    )


def _register(task: Task) -> LeveretTask[..., Any]:
    name = task.module_path
    before = _known.get(name)
    if before is None or before.func is not task.func or name not in app.registry.tasks:
        run = _run_async if inspect.iscoroutinefunction(task.func) else _run
        _known[name] = task
        app.task(name=name, queue=task.queue_name)(_named(task, run))
    return app.registry.tasks[name]


def _named(task: Task, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function for the application that takes what Django takes: any plain JSON."""
    function: Callable[..., Any]
    if inspect.iscoroutinefunction(run):

        async def function(*args: Any, **kwargs: Any) -> Any:
            return await run(task, args, kwargs)
    else:

        def function(*args: Any, **kwargs: Any) -> Any:
            return run(task, args, kwargs)

    function.__module__, function.__qualname__ = task.func.__module__, task.func.__qualname__
    function.__name__ = task.func.__name__
    return function


def _run(task: Task, args: Any, kwargs: Any) -> Any:
    running = _started(task, args, kwargs)
    task_started.send(LeveretBackend, task_result=running)
    try:
        value = normalize_json(task.func(*_with_context(running), *args, **kwargs))
    except _ENDED as error:
        task_finished.send(LeveretBackend, task_result=_finished(running, error))
        raise
    task_finished.send(LeveretBackend, task_result=_finished(running, value=value))
    return value


async def _run_async(task: Task, args: Any, kwargs: Any) -> Any:
    running = _started(task, args, kwargs)
    await task_started.asend(LeveretBackend, task_result=running)
    try:
        value = normalize_json(await task.func(*_with_context(running), *args, **kwargs))
    except _ENDED as error:
        await task_finished.asend(LeveretBackend, task_result=_finished(running, error))
        raise
    await task_finished.asend(LeveretBackend, task_result=_finished(running, value=value))
    return value


def _with_context(running: TaskResult) -> tuple[TaskContext, ...]:
    return (TaskContext(task_result=running),) if running.task.takes_context else ()


def _started(task: Task, args: Any, kwargs: Any) -> TaskResult:
    current, now = current_task(), timezone.now()
    return _result(
        _as_enqueued(task, current.queue, task.backend),
        current.id,
        args=list(args),
        kwargs=kwargs,
        backend=task.backend,
        status=TaskResultStatus.RUNNING,
        enqueued_at=None if current.enqueued_at is None else _moment(current.enqueued_at),
        started_at=now,
        last_attempted_at=now,
        worker_ids=[""] * current.attempt,
    )


def _finished(running: TaskResult, error: BaseException | None = None, value: Any = None) -> TaskResult:
    state = TaskResultStatus.SUCCESSFUL if error is None else TaskResultStatus.FAILED
    object.__setattr__(running, "status", state)
    object.__setattr__(running, "finished_at", timezone.now())
    object.__setattr__(running, "_return_value", value)
    if error is not None:
        kind = type(error)
        path, text = f"{kind.__module__}.{kind.__qualname__}", "".join(format_exception(error))
        running.errors.append(TaskError(exception_class_path=path, traceback=text))
    return running
