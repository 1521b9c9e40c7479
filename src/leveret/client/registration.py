"""What ``@app.task`` registers: the function, its name, and the tasks and queues of an application."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.client.payload import entry_point
from leveret.client.task import Task
from leveret.errors import ConfigurationError, UnknownTask
from leveret.model import Cron, Every, LimitRule, Queue, Timing, check_task_name, queue_limit
from leveret.model.durations import show
from leveret.model.suggest import did_you_mean

if TYPE_CHECKING:
    from types import FrameType

    from leveret.client.limits import Limit
    from leveret.client.task import Producer
    from leveret.client.unique import Unique
    from leveret.model import Schedule, TaskOptions

#: What a decorator says of its task's schedules.
Scheduling: TypeAlias = "Cron | Every | Sequence[Cron | Every] | Mapping[str, Cron | Every] | None"


class TaskFunction(msgspec.Struct, frozen=True):
    """A function that can be a task, and its name."""

    function: Any
    name: str

    def replaces(self, other: Any, run: object, this_run: object) -> bool:
        """Whether it is that function again: its module was run a second time, or its notebook cell was.

        Two functions of the same name that one run of a module defines are two tasks.
        """
        return (
            run is not None
            and this_run is not None
            and run is not this_run
            and _identity(self.function) == _identity(other)
        )


def task_function(function: Any, name: str | None) -> TaskFunction:
    """Raises ConfigurationError, with the remedy, for what cannot be a task."""
    if isinstance(function, Task):
        function = function.function
    if isinstance(function, staticmethod):
        function = function.__func__
    _check_kind(function)
    if name is None:
        name = getattr(function, "__name__", None)
        if not isinstance(name, str):
            raise ConfigurationError(f"{show(function)} has no name of its own: give it one, app.task(name='...')(...)")
    check_task_name(name)
    code = entry_point(function)
    if inspect.isgeneratorfunction(code) or inspect.isasyncgenfunction(code):
        raise ConfigurationError(f"task {name!r} has a 'yield': calling it would run none of its code; return instead")
    _check_signature(function, name)
    return TaskFunction(function, name)


def _check_kind(function: Any) -> None:
    if isinstance(function, classmethod):
        raise ConfigurationError(
            f"{function.__func__.__qualname__} is a class method, and no worker has the class to call it on: register "
            "it when the class is there, app.task(Class.method), or make it a function outside of the class"
        )
    if isinstance(function, str):
        raise ConfigurationError(
            f"app.task({function!r}): its one positional argument is the function; a name or a queue is given by "
            "keyword, as @app.task(name='...', queue='...')"
        )
    if isinstance(function, type):
        raise ConfigurationError(
            f"{function.__qualname__} is a class: calling it would only make an object. Register a function, or an "
            "object that has __call__"
        )
    if not callable(function):
        raise ConfigurationError(
            f"{show(function)} is no function, so it cannot be a task: put @app.task above a 'def'"
        )


def _check_signature(function: Any, name: str) -> None:
    try:
        parameters = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        raise ConfigurationError(
            f"{show(function)} does not say which arguments it takes: wrap it in a 'def' with parameters of its own"
        ) from None
    if _is_in_class_body(function) and parameters[:1] in (["self"], ["cls"]):
        raise ConfigurationError(
            f"task {name!r} ({function.__qualname__}) is a method, and no worker has the object to call it on: make it "
            "a function outside of the class or a @staticmethod without 'self', or register the method of one object, "
            "app.task(service.method)"
        )


def _is_in_class_body(function: Any) -> bool:
    outer = getattr(function, "__qualname__", "").rpartition(".")[0]
    return bool(outer) and not outer.endswith("<locals>") and not inspect.ismethod(function)


def _identity(function: Any) -> tuple[Any, Any]:
    while isinstance(function, partial):
        function = function.func
    named = function if hasattr(function, "__qualname__") else type(function)
    return getattr(named, "__module__", None), named.__qualname__


def module_run() -> object:
    """What stands for this run of the module, or of the notebook's cell, that calls; None when there is none."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented
    while frame is not None:
        if frame.f_locals is frame.f_globals:
            return frame.f_code
        frame = frame.f_back
    return None


def schedules_named(task: str, given: Scheduling) -> Mapping[str, Cron | Every]:
    """The schedules that a decorator gives a task, by name. Raises ConfigurationError."""
    if given is None:
        return {}
    if isinstance(given, Timing):
        return {task: _timing(task, given)}
    if isinstance(given, Mapping):
        return {str(name): _timing(task, timing) for name, timing in given.items()}
    if not isinstance(given, (list, tuple)):
        return {task: _timing(task, given)}
    names = [task, *(f"{task}-{number}" for number in range(2, len(given) + 1))]
    return {name: _timing(task, timing) for name, timing in zip(names, given, strict=False)}


def _timing(task: str, given: object) -> Cron | Every:
    if isinstance(given, (Cron, Every)):
        return given
    raise ConfigurationError(
        f"task {task!r}: schedule has {show(given)}; it must be cron('0 7 * * *') or every(minutes=5) of leveret, some "
        "of them in a list, or in a dict by their names"
    )


class Registry:
    """The tasks and queues of an application."""

    def __init__(self, queues: Sequence[Queue]) -> None:
        self.queues = {queue.name: queue for queue in queues}
        self._own_queues = frozenset(self.queues)
        self.tasks: dict[str, Task[..., Any]] = {}
        #: The run of a module, or of a notebook's cell, that registered each of them.
        self._runs: dict[str, object] = {}
        #: The task of each queue that takes the messages without a task's name.
        self.default_tasks: dict[str, str] = {}
        #: The schedules of the code, by name.
        self._schedules: dict[str, Schedule] = {}
        #: The limits, by name, and the module and its run that made each.
        self._limits: dict[str, tuple[Limit, str, object]] = {}

    def find(self, name: str | None, queue: str) -> Task[..., Any]:
        """The task for a message. Raises UnknownTask with what is known."""
        wanted = name if name is not None else self.default_tasks.get(queue)
        if wanted is None:
            raise UnknownTask(
                f"the message names no task (AMQP property 'type') and queue {queue!r} has no default task; "
                "register one with @app.task(queue=..., default=True)"
            )
        task = self.tasks.get(wanted)
        if task is None:
            known = ", ".join(sorted(self.tasks)) or "none"
            hint = did_you_mean(wanted, self.tasks)
            raise UnknownTask(f"no task is registered as {wanted!r}{hint}{'' if hint else ';'} known: {known}")
        return task

    def register(
        self,
        function: TaskFunction,
        options: TaskOptions,
        run: object,
        producer: Producer,
        *,
        default: bool,
        schedule: Scheduling = None,
        unique: Unique | None = None,
        limits: tuple[Limit, ...] = (),
    ) -> Task[..., Any]:
        """Raises ConfigurationError for another function of the same name, a second default task of a queue, or a
        schedule that is none; InvalidArguments for one whose arguments do not fit.
        """
        name = function.name
        before = self.tasks.get(name)
        if before is not None and not function.replaces(before.function, self._runs.get(name), run):
            raise ConfigurationError(f"two tasks are called {name!r}; give one another name with @app.task(name=...)")
        holder = self.default_tasks.get(options.queue)
        if default and holder not in (None, name):
            raise ConfigurationError(f"queue {options.queue!r} has a default task already: {holder!r}")
        task: Task[..., Any] = Task(function.function, name, options, producer, unique, limits)
        named = schedules_named(name, schedule)
        scheduled = {one: task.scheduled(one, timing) for one, timing in named.items()}
        for one in scheduled:
            other = self._schedules[one].message.task if one in self._schedules else name
            if other != name:
                raise ConfigurationError(
                    f"two schedules are called {one!r}, of tasks {other!r} and {name!r}; give them names, as "
                    "schedule={'nightly': cron(...)}"
                )
        declared = self.queues.get(options.queue, Queue(options.queue))
        if options.priority is not None:
            declared = msgspec.structs.replace(declared, priorities=True)
        if before is not None:
            self._forget(before)
        self.queues[options.queue] = declared
        self.tasks[name] = task
        self._schedules |= scheduled
        self._runs[name] = run
        if default:
            self.default_tasks[options.queue] = name
        return task

    def schedules(self, origin: str) -> list[Schedule]:
        """The schedules of the code, as an application of that name declares them."""
        return [msgspec.structs.replace(one, origin=origin) for one in self._schedules.values()]

    def add_limit(self, limit: Limit, module: str, run: object) -> None:
        """Raises ConfigurationError for a second limit of a name, unless its module was run again."""
        _, made_in, made_by = self._limits.get(limit.name, (None, module, None))
        is_again = made_in == module and None not in (run, made_by) and made_by is not run
        if limit.name in self._limits and not is_again:
            raise ConfigurationError(
                f"two limits are called {limit.name!r}; make it once, and import it where other tasks need it"
            )
        self._limits[limit.name] = (limit, module, run)

    @property
    def limits(self) -> Mapping[str, Limit]:
        """The limits, by name."""
        return {name: limit for name, (limit, _, _) in self._limits.items()}

    def limit_rules(self) -> dict[str, LimitRule]:
        """What the code says of each limit, those of queues among them."""
        of_queues = {queue_limit(name): queue.rule for name, queue in self.queues.items() if queue.rule is not None}
        return {**{name: limit.rule for name, limit in self.limits.items()}, **of_queues}

    def limited_queues(self) -> list[str]:
        """The queues with tasks that wait for limits, or for their turn."""
        of_tasks = {task.queue for task in self.tasks.values() if task.limits}
        return sorted(of_tasks | {name for name, queue in self.queues.items() if queue.is_limited})

    def _forget(self, task: Task[..., Any]) -> None:
        """A task that another one replaces."""
        del self.tasks[task.name]
        self._schedules = {name: one for name, one in self._schedules.items() if one.message.task != task.name}
        for queue in [queue for queue, name in self.default_tasks.items() if name == task.name]:
            del self.default_tasks[queue]
        if task.queue not in self._own_queues and all(other.queue != task.queue for other in self.tasks.values()):
            self.queues.pop(task.queue, None)
