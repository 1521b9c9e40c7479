"""What `@app.task` takes: functions in their many forms, the same one again, and a clear word on all else."""

from __future__ import annotations

import importlib
import sys
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, ConfigurationError, Queue
from leveret.client.registration import module_run

if TYPE_CHECKING:
    from pathlib import Path


class Service:
    """Something with methods."""

    def __init__(self, answer: int = 5) -> None:
        self.answer = answer

    def method(self, number: int) -> int:
        return self.answer + number

    @classmethod
    def of_class(cls, number: int) -> str:
        return f"{cls.__name__} {number}"

    @staticmethod
    def of_none(number: int) -> int:
        return number

    def __call__(self, number: int) -> int:
        return self.answer * number


def plain(number: int, other: int = 1) -> int:
    """A function."""
    return number + other


def fresh() -> App:
    return App("memory://")


@pytest.mark.parametrize(
    ("function", "name", "result"),
    [
        (plain, "plain", 2),
        (Service(7).method, "method", 8),
        (Service.of_class, "of_class", "Service 1"),
        (Service.of_none, "of_none", 1),
        (staticmethod(plain), "plain", 2),
    ],
    ids=["function", "bound method", "bound class method", "static method", "static method object"],
)
def test_a_function_is_called_by_its_name(function: Any, name: str, result: object) -> None:
    task = fresh().task(function)
    assert (task.name, task(1)) == (name, result)
    assert task.signature.decode(b'{"args":[1]}') == ((1,), {})


def test_what_has_no_name_is_given_one() -> None:
    for function, result in ((partial(plain, other=5), 6), (Service(7), 7)):
        with pytest.raises(ConfigurationError, match=r"has no name of its own: give it one, app.task\(name='...'\)"):
            fresh().task(function)
        assert fresh().task(name="named")(function)(1) == result


def test_a_task_of_another_application_is_its_function() -> None:
    first, second = fresh(), fresh()
    task = second.task(first.task(plain))
    assert (task.function, task.name) == (plain, "plain")
    assert task.signature.decode(b'{"args":[1]}') == ((1,), {})


def test_a_method_in_its_class_is_refused() -> None:
    app = fresh()
    with pytest.raises(
        ConfigurationError, match=r"task 'send' \(.*Mail.send\) is a method, and no worker has the object"
    ):

        class Mail:
            @app.task
            def send(self, to: str) -> None: ...

    with pytest.raises(ConfigurationError, match=r"app.task\(service.method\)"):

        class AsyncMail:
            @app.task(queue="mail")
            async def send(self, to: str) -> None: ...

    with pytest.raises(ConfigurationError, match="is a method"):

        class ClassMail:
            @classmethod
            @app.task
            def send(cls, to: str) -> None: ...

    assert app.tasks == ()


def test_a_class_method_in_its_class_is_refused() -> None:
    app = fresh()
    with pytest.raises(ConfigurationError, match=r"Mail.send is a class method.*app.task\(Class.method\)"):

        class Mail:
            @app.task
            @classmethod
            def send(cls, to: str) -> None: ...

    assert app.tasks == ()


def test_a_class_may_hold_functions() -> None:
    app = fresh()

    class Mail:
        @app.task
        def send(to: str) -> str:  # noqa: N805 - no method
            return to

        @staticmethod
        @app.task
        def read(to: str) -> str:
            return to

        @app.task
        @staticmethod
        def delete(to: str) -> str:
            return to

    assert [task.name for task in app.tasks] == ["send", "read", "delete"]
    assert Mail.send("a") == Mail.read("a") == Mail.delete("a") == "a"
    assert app.registry.find("send", "default").signature.encode(("a",), {})[0] == b'{"args":["a"],"kwargs":{}}'


def test_a_function_with_a_parameter_called_self_is_one() -> None:
    def bound(self: int) -> int:
        return self

    assert fresh().task(bound)(3) == 3


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (5, "5 is no function, so it cannot be a task: put @app.task above a 'def'"),
        ([plain], "is no function"),
        (Queue("mail"), "is no function"),
        ("mail", r"app.task\('mail'\): its one positional argument is the function; .* @app.task\(name='...', queue="),
        (Service, "Service is a class: calling it would only make an object"),
        (dict, "dict is a class"),
        (max, "does not say which arguments it takes: wrap it in a 'def'"),
    ],
    ids=["a number", "a list", "a queue", "text", "a class", "a builtin class", "a builtin function"],
)
def test_what_is_no_function_is_refused(function: Any, remedy: str) -> None:
    app = fresh()
    with pytest.raises(ConfigurationError, match=remedy):
        app.task(function)
    with pytest.raises(ConfigurationError, match=remedy if function != "mail" else "mail"):
        app.task(name="x")(function)
    assert app.tasks == ()


@pytest.mark.parametrize("name", [5, b"x", "", ["x"]])
def test_a_name_is_text(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="task name"):
        fresh().task(name=name)(plain)
    with pytest.raises(ConfigurationError, match="queue name"):
        fresh().task(queue=name)(plain)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("delay", r"'await plain.enqueue\(...\)' enqueues it, 'plain.enqueue_sync\(...\)'"),
        ("send", "enqueue"),
        ("kiq", "enqueue"),
        ("apply_async", r"'await plain.options\(delay=60\).enqueue"),
        ("apply", r"'plain\(...\)', runs it here and now"),
        ("map", "enqueue_many"),
        ("AsyncResult", r"plain.handle\(id\)"),
        ("request", "current_task"),
        ("nonsense", "a Leveret task has no 'nonsense'$"),
    ],
)
def test_what_other_queues_call_it_leads_to_what_it_is_called_here(name: str, hint: str) -> None:
    task = fresh().task(plain)
    with pytest.raises(AttributeError, match=hint):
        getattr(task, name)
    assert not hasattr(task, name)


# The same function again


CELL = """
@app.task(queue={queue!r}, default=True)
def work(number: int) -> int:
    return number * {factor}
"""


def run_cell(source: str, names: dict[str, Any]) -> None:
    """As a notebook runs one: compiled anew, in the names of the session."""
    exec(compile(source, "<cell>", "exec"), names)


def test_a_notebooks_cell_is_run_again() -> None:
    app = fresh()
    names = {"app": app, "__name__": "__main__"}
    run_cell(CELL.format(queue="a", factor=2), names)
    before = names["work"]
    run_cell(CELL.format(queue="a", factor=2), names)
    run_cell("\n\n" + CELL.format(queue="b", factor=3), names)
    (work,) = app.tasks
    assert work is names["work"]
    assert (work(5), before(5)) == (15, 10)  # type: ignore[operator]
    assert app.default_tasks == {"b": "work"}
    assert [queue.name for queue in app.queues] == ["b"]


def test_a_queue_of_the_applications_own_stays() -> None:
    app = App("memory://", queues=[Queue("a", max_length=5)])
    names = {"app": app, "__name__": "__main__"}
    run_cell(CELL.format(queue="a", factor=2), names)
    run_cell(CELL.format(queue="b", factor=2), names)
    assert app.queues == (Queue("a", max_length=5), Queue("b"))


def test_one_run_of_a_cell_has_each_name_once() -> None:
    app = fresh()
    names = {"app": app, "__name__": "__main__"}
    with pytest.raises(ConfigurationError, match="two tasks are called 'work'"):
        run_cell(CELL.format(queue="a", factor=2) + CELL.format(queue="b", factor=3), names)
    assert [task.queue for task in app.tasks] == ["a"]


def test_another_function_of_that_name_is_refused() -> None:
    app = fresh()
    run_cell(CELL.format(queue="a", factor=2), {"app": app, "__name__": "one"})
    with pytest.raises(ConfigurationError, match="two tasks are called 'work'"):
        run_cell(CELL.format(queue="a", factor=2), {"app": app, "__name__": "other"})
    with pytest.raises(ConfigurationError, match="two tasks are called 'work'"):
        run_cell("@app.task(name='work')\ndef toil() -> None: ...", {"app": app, "__name__": "one"})


def test_a_module_is_reloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The application is in another one, which is not."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    shop = ModuleType("shop_of_reloading")
    shop.app = fresh()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "shop_of_reloading", shop)
    file = tmp_path / "mails_of_reloading.py"
    source = "from shop_of_reloading import app\n" + CELL + "\nlater = app.task(name='later')(lambda: {factor})\n"
    file.write_text(source.format(queue="a", factor=2))
    try:
        module = importlib.import_module("mails_of_reloading")
        importlib.reload(module)
        file.write_text("\n\n" + source.format(queue="a", factor=30))
        importlib.reload(module)
        assert [task.name for task in shop.app.tasks] == ["work", "later"]
        assert (module.work(5), shop.app.registry.find("work", "a")(5), module.later()) == (150, 150, 30)
        file.write_text(source.format(queue="a", factor=2) + CELL.format(queue="a", factor=400))
        with pytest.raises(ConfigurationError, match="two tasks are called 'work'"):
            importlib.reload(module)
    finally:
        sys.modules.pop("mails_of_reloading", None)


def test_a_function_that_registers_another_may_be_called_once() -> None:
    app = fresh()

    def register() -> None:
        @app.task
        def inner() -> None: ...

    register()
    with pytest.raises(ConfigurationError, match="two tasks are called 'inner'"):
        register()
    assert module_run() is module_run()


async def test_a_handle_of_the_task_before_goes_on() -> None:
    app = fresh()
    names = {"app": app, "__name__": "__main__"}
    run_cell(CELL.format(queue="a", factor=2), names)
    before: Any = names["work"]
    run_cell(CELL.format(queue="a", factor=3), names)
    assert before.handle("id").task == "work"
    assert app.client.restore("work", "a", msgspec.Raw(b"6")) == 6
