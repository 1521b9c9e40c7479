"""What ``@app.task`` is given: the function, what it is called, and whether it takes another one's place."""

from __future__ import annotations

import inspect
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec

from leveret.client.payload import entry_point
from leveret.client.task import Task
from leveret.errors import ConfigurationError
from leveret.model import check_task_name
from leveret.model.durations import show

if TYPE_CHECKING:
    from types import FrameType


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
