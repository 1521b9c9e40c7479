"""The application: its registry, its enqueue before anything is sent, how it is found and where it connects."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import threading
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from leveret import (
    App,
    AppNotLoaded,
    ConfigurationError,
    InvalidArguments,
    NotSerializable,
    Queue,
    TaskTooLarge,
    UnknownTask,
)
from leveret.brokers import censor, connect
from leveret.brokers.memory import MemoryBroker
from leveret.brokers.rabbitmq import RabbitMQBroker
from leveret.brokers.sqlite import SQLiteBroker
from leveret.client import load_app
from leveret.model import MAX_QUEUE_NAME
from tests.support.outbox import Outbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


# The registry


def test_two_tasks_of_one_name_are_refused() -> None:
    app = App("memory://")

    @app.task
    def work() -> None: ...

    with pytest.raises(ConfigurationError, match="two tasks are called 'work'; give one another name"):
        app.task(work.function)
    with pytest.raises(ConfigurationError, match="two tasks are called 'work'"):
        app.task(name="work", queue="other")(lambda: None)
    assert app.tasks == (work,)


def test_two_default_tasks_of_a_queue_are_refused() -> None:
    app = App("memory://")
    app.task(name="first", queue="work", default=True)(lambda: None)
    app.task(name="elsewhere", queue="other", default=True)(lambda: None)
    with pytest.raises(ConfigurationError, match="queue 'work' has a default task already: 'first'"):
        app.task(name="second", queue="work", default=True)(lambda: None)
    assert app.default_tasks == {"work": "first", "other": "elsewhere"}
    assert [task.name for task in app.tasks] == ["first", "elsewhere"]


def test_acknowledge_is_before_or_after() -> None:
    app = App("memory://")
    with pytest.raises(ConfigurationError, match="acknowledge is 'never'; it must be 'after' or 'before'"):
        app.task(name="work", acknowledge="never")(lambda: None)  # type: ignore[call-overload]
    assert app.tasks == ()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", f"must be 1 to {MAX_QUEUE_NAME} bytes long"),
        ("x" * (MAX_QUEUE_NAME + 1), f"must be 1 to {MAX_QUEUE_NAME} bytes long"),
        ("é" * (MAX_QUEUE_NAME // 2 + 1), f"must be 1 to {MAX_QUEUE_NAME} bytes long"),
        ("amq.", "the broker's own"),
        ("amq.gen", "the broker's own"),
        (".dead", "the ending of dead-letter queues"),
        ("work.dead", "the ending of dead-letter queues"),
        ("work.delay.1000", "delay queues"),
        ("\ud800", "queue name"),
    ],
)
def test_a_queue_name_that_cannot_be_is_refused(name: str, problem: str) -> None:
    with pytest.raises(ConfigurationError, match=problem):
        Queue(name)
    app = App("memory://")
    with pytest.raises(ConfigurationError, match=problem):
        app.task(name="work", queue=name)(lambda: None)
    assert (app.tasks, app.queues) == ((), ())


@pytest.mark.parametrize(
    "name", ["x", "x" * MAX_QUEUE_NAME, "é" * (MAX_QUEUE_NAME // 2), "amqp.x", "dead", "x.dead.y", "x.delay", "a b/✓"]
)
def test_other_queue_names_are_free(name: str) -> None:
    assert Queue(name).name == name


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128, "\ud800"])
def test_a_task_name_that_does_not_fit_a_message_is_refused(name: str) -> None:
    """AMQP's ``type`` is a short string: 255 bytes. Refused where it is written, not at the first enqueue."""

    def work() -> None: ...

    work.__name__ = name
    with pytest.raises(ConfigurationError):
        App("memory://").task(work)


@pytest.mark.parametrize("limit", [0, -1])
def test_a_length_limit_is_at_least_one(limit: int) -> None:
    with pytest.raises(ConfigurationError, match=f"queue 'work': max_length is {limit}; it must be .*at least 1"):
        Queue("work", max_length=limit)


@pytest.mark.parametrize("queues", ["small", ["small"], [Queue("small"), None], 5, Queue("small")])
def test_queues_are_a_list_of_queues(queues: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"queues has .*; it must be a list of leveret.Queue"):
        App("memory://", queues=queues)


def test_a_queue_is_quorum_or_classic() -> None:
    with pytest.raises(ConfigurationError, match="queue 'work': kind is 'stream', it must be 'quorum' or 'classic'"):
        Queue("work", kind="stream")  # type: ignore[arg-type]


@pytest.mark.parametrize("timeout", [0, -1.0])
def test_an_enqueue_has_time(timeout: float) -> None:
    with pytest.raises(ConfigurationError, match="must be more than 0 seconds"):
        App("memory://", enqueue_timeout=timeout)


def test_a_queue_that_a_task_names_is_the_applications() -> None:
    app = App("memory://", queues=[Queue("small", max_length=1)])
    app.task(name="a", queue="small")(lambda: None)
    app.task(name="b", queue="other")(lambda: None)
    app.task(name="c")(lambda: None)
    assert app.queues == (Queue("small", max_length=1), Queue("other"), Queue("default"))


def test_a_message_finds_its_task_by_name_from_any_queue() -> None:
    app = App("memory://")
    work = app.task(name="work", queue="a")(lambda: None)
    fallback = app.task(name="fallback", queue="a", default=True)(lambda: None)
    assert app.registry.find("work", "b") is work
    assert app.registry.find(None, "a") is fallback


def test_a_message_that_finds_no_task_hears_what_there_is() -> None:
    app = App("memory://")
    with pytest.raises(UnknownTask, match=r"no task is registered as 'work'; known: none"):
        app.registry.find("work", "default")
    app.task(name="b")(lambda: None)
    app.task(name="a")(lambda: None)
    with pytest.raises(UnknownTask, match=r"no task is registered as 'work'; known: a, b"):
        app.registry.find("work", "default")
    with pytest.raises(UnknownTask, match=r"names no task .* and queue 'default' has no default task"):
        app.registry.find(None, "default")


def test_a_task_can_be_called_here_and_now() -> None:
    app = App("memory://")

    @app.task
    def double(number: int) -> int:
        """Twice the number."""
        return 2 * number

    assert double(4) == 8
    assert double.__doc__ == "Twice the number."


# Enqueueing, until it is sent


async def test_what_is_enqueued_is_in_its_handle() -> None:
    app = Outbox()

    @app.task(queue="work")
    def double(number: int) -> None: ...

    handle = await double.enqueue(4)
    (sent,) = app.sent
    assert (handle.id, handle.task, handle.queue) == (sent.id, "double", "work")
    assert (sent.task, sent.queue, sent.attempt) == ("double", "work", 1)
    assert sent.body == b'{"args":[4],"kwargs":{}}'


async def test_ids_sort_by_age_and_differ() -> None:
    app = Outbox()
    work = app.task(name="work")(lambda: None)
    handles = await work.enqueue_many([()] * 100)
    assert len({handle.id for handle in handles}) == 100
    assert [envelope.id for envelope in app.sent] == [handle.id for handle in handles]
    assert all(len(handle.id) == 32 for handle in handles)


async def test_options_change_one_enqueue() -> None:
    app = Outbox()

    @app.task(queue="work", acknowledge="before")
    def note(text: str) -> None: ...

    other = note.options(queue="other")
    await other.enqueue("a")
    await note.enqueue("b")
    assert [envelope.queue for envelope in app.sent] == ["other", "work"]
    assert (other.name, other.acknowledge) == ("note", "before")


@pytest.mark.parametrize(
    ("args", "kwargs", "error"),
    [
        ((), {}, InvalidArguments),
        (("1",), {}, InvalidArguments),
        ((1, 2, 3), {}, InvalidArguments),
        ((1,), {"other": 2}, InvalidArguments),
        ((1, {2}), {}, NotSerializable),
        ((1, "x" * 1_000), {}, TaskTooLarge),
    ],
)
async def test_nothing_is_sent_of_a_call_that_cannot_be(
    args: tuple[Any, ...], kwargs: dict[str, Any], error: type[Exception]
) -> None:
    app = Outbox(max_message_size=1_000)

    @app.task
    def work(number: int, note: Any = None) -> None: ...

    with pytest.raises(error):
        await work.enqueue(*args, **kwargs)
    if not kwargs:
        with pytest.raises(error):
            await work.enqueue_many([(1,), args])
    assert app.sent == []


async def test_the_limit_counts_the_encoded_bytes() -> None:
    app = Outbox(max_message_size=100)

    @app.task
    def raw(body: bytes) -> None: ...

    @app.task
    def text(value: str) -> None: ...

    await raw.enqueue(b"x" * 100)
    with pytest.raises(TaskTooLarge, match="the arguments of task 'raw' are 101 bytes, over the limit of 100"):
        await raw.enqueue(b"x" * 101)
    with pytest.raises(TaskTooLarge, match=r"pass a reference, or raise App\(max_message_size=...\)"):
        await text.enqueue("é" * 50)


async def test_no_calls_are_no_message() -> None:
    app = Outbox()
    work = app.task(name="work")(lambda: None)
    assert await work.enqueue_many([]) == []
    assert app.sent == []


# The synchronous door


def test_enqueue_sync_needs_no_loop() -> None:
    app = Outbox()

    @app.task
    def work(number: int) -> None: ...

    try:
        handle = work.enqueue_sync(1)
        with pytest.raises(InvalidArguments):
            work.enqueue_sync("1")  # type: ignore[arg-type]
        handles = app.wait(work.enqueue_many([(2,), (3,)]))
    finally:
        app.close_sync()
    assert [envelope.id for envelope in app.sent] == [one.id for one in [handle, *handles]]


def test_closing_the_door_waits_for_other_threads() -> None:
    """What they have begun is finished; nobody waits for ever."""
    app, begun, results = App("memory://"), threading.Event(), []

    async def slow() -> str:
        begun.set()
        await asyncio.sleep(0.3)
        return "done"

    other = threading.Thread(target=lambda: results.append(app.wait(slow())), daemon=True)
    other.start()
    begun.wait()
    app.close_sync()
    other.join(10)
    assert results == ["done"]


async def test_enqueue_sync_inside_a_loop_is_refused() -> None:
    """It would block the loop. The coroutine that it made is closed, so that nobody warns of it."""
    app = Outbox()

    @app.task
    def work(number: int) -> None: ...

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RuntimeError, match="await the asynchronous method instead"):
            work.enqueue_sync(1)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []
    assert app.sent == []


# Which broker


def test_the_url_is_the_one_given_else_the_environments_else_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEVERET_URL", raising=False)
    monkeypatch.chdir("/var")
    assert App().url == "sqlite:////var/leveret.db"
    app = App()
    monkeypatch.setenv("LEVERET_URL", "amqp://there/")
    assert app.url == "amqp://there/"
    assert App("memory://").url == "memory://"
    app.client.connect_to("sqlite:///elsewhere.db")
    assert app.url == "sqlite:////var/elsewhere.db"
    monkeypatch.setenv("LEVERET_URL", "")
    assert App().url == "sqlite:////var/leveret.db"


@pytest.mark.parametrize(
    ("url", "kind"),
    [
        ("memory://", MemoryBroker),
        ("sqlite:///tasks.db", SQLiteBroker),
        ("SQLITE:////var/lib/tasks.db", SQLiteBroker),
        ("amqp://guest:guest@localhost/", RabbitMQBroker),
        ("amqps://host1,host2:5672/vhost?heartbeat=5", RabbitMQBroker),
    ],
)
async def test_the_scheme_chooses_the_broker(url: str, kind: type) -> None:
    assert isinstance(connect(url), kind)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "tasks.db",
        "redis://localhost/",
        "http://localhost/",
        "sqlite://",
        "sqlite:///",
        "sqlite://tasks.db",
        "sqlite:///folder/",
        "sqlite:///tasks.db?mode=ro",
        "sqlite:///tasks#1.db",
        "sqlite:///tasks%00.db",
        "amqp:",
        "amqp://",
        "amqp:///vhost",
        "amqp://host:port/",
        "amqp://host:0/",
        "amqp://host:65536/",
        "amqp://host,,other/",
        "amqp://[::1/",
        "amqp://user:p[ss@host/",
    ],
)
async def test_a_url_that_names_no_broker_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError):
        connect(url)


@pytest.mark.parametrize(
    "url",
    [
        "amqp://user:secret@host/vhost",
        "amqp://user:secret@host1,host2:5673/vhost?heartbeat=5",
        "amqp://:secret@[::1]:5672/",
        "amqp://user:se%40%2Fcret@host/",
        "amqp://user:sécret:secret@host/",
        "amqp://user:secret@secret@host/",
        "amqp://user:sec[ret@host/",
        "ampq://user:secret@host/",
        "amqp://user:sec/ret@host/",
        "amqp://user:sec?ret@host/",
        "amqp://user:sec#ret@host/",
    ],
)
def test_a_password_is_not_shown(url: str) -> None:
    """Percent-encoded or not: it is the URL with a mistake that ends up in an error message."""
    shown = censor(url)
    assert not any(part in shown for part in ("sec", "séc", "cret", "ret@"))
    with pytest.raises(ConfigurationError) as caught:
        connect(url.replace("amqp:", "ampq:"))
    assert "ret@" not in str(caught.value)


@pytest.mark.parametrize("url", ["sqlite:///a:b@c.db", "amqp://host/", "amqp://user@host/", "memory://"])
def test_a_url_without_a_password_is_shown_as_it_is(url: str) -> None:
    assert censor(url) == url


def test_the_rest_of_a_url_is_shown() -> None:
    assert censor("amqp://user:secret@host:5673/vhost") == "amqp://user:***@host:5673/vhost"


# Loading an application


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, where modules are imported from; what was imported is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    importlib.invalidate_caches()
    before = dict(sys.modules)
    yield tmp_path
    for name in sys.modules.keys() - before.keys():
        del sys.modules[name]
    sys.modules.update(before)


APPLICATION = "from leveret import App\napp = App('memory://')\nother = 7\n"


@pytest.mark.parametrize("reference", ["tasks_here:app", "tasks_here.py:app", "pack.inner:app", "pack/inner.py:app"])
def test_an_application_is_loaded(folder: Path, reference: str) -> None:
    (folder / "pack").mkdir()
    for path in ("tasks_here.py", "pack/inner.py"):
        (folder / path).write_text(APPLICATION)
    assert load_app(reference).url == "memory://"


def test_a_file_imports_its_neighbours_from_anywhere(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "neighbour_here.py").write_text(APPLICATION)
    (folder / "sub" / "tasks_here.py").write_text("from neighbour_here import app\n")
    assert load_app(f"{folder}/sub/tasks_here.py:app").url == "memory://"


@pytest.mark.parametrize(
    ("reference", "content", "problem"),
    [
        ("", "", "not of the form MODULE:APP (as in tasks:app) or FILE.py:APP"),
        ("tasks_here", APPLICATION, "not of the form"),
        ("tasks_here.py", APPLICATION, "not of the form"),
        (":app", APPLICATION, "not of the form"),
        ("tasks_here:", APPLICATION, "not of the form"),
        ("tasks_missing:app", "", "there is no module 'tasks_missing' in"),
        ("tasks_here.inner:app", APPLICATION, "there is no module 'tasks_here.inner' in"),
        ("missing.inner:app", "", "there is no module 'missing' in"),
        (".tasks_here:app", APPLICATION, "importing '.tasks_here' failed"),
        ("tasks_missing.py:app", "", "there is no file"),
        ("folder.py:app", "", "there is no file"),
        ("tasks_here:tasks", APPLICATION, "'tasks_here' has no application 'tasks'; it has: app"),
        ("tasks_here:other", APPLICATION, "'tasks_here' has no application 'other'; it has: app"),
        ("tasks_here.py:tasks", APPLICATION, "'tasks_here.py' has no application 'tasks'; it has: app"),
        ("tasks_here:app", "x = 1\n", "'tasks_here' has no application 'app'; it has no leveret.App"),
        (
            "tasks_here:app",
            "import tasks_here_not\n",
            "importing 'tasks_here' failed: ModuleNotFoundError: No module named 'tasks_here_not' (",
        ),
        ("tasks_here.py:app", "import absent_x\n", "failed: ModuleNotFoundError: No module named 'absent_x'"),
        ("tasks_here:app", "from os import absent\n", "importing 'tasks_here' failed: ImportError: cannot import name"),
        ("tasks_here:app", "1 / 0\n", "importing 'tasks_here' failed: ZeroDivisionError: division by zero"),
        ("tasks_here.py:app", "1 / 0\n", "failed: ZeroDivisionError: division by zero"),
        ("tasks_here:app", "def (:\n", "importing 'tasks_here' failed: SyntaxError"),
        ("tasks_here.py:app", "def (:\n", "failed: SyntaxError"),
        ("tasks_here:app", "raise SystemExit(3)\n", "importing 'tasks_here' failed: SystemExit: 3"),
        ("tasks_here.py:app", "raise SystemExit(3)\n", "failed: SystemExit: 3"),
        ("tasks_here:app", "x = 'é'\n".encode("latin-1"), "importing 'tasks_here' failed: SyntaxError"),
    ],
)
def test_an_application_that_is_not_there_says_why(
    folder: Path, reference: str, content: str | bytes, problem: str
) -> None:
    (folder / "folder.py").mkdir()
    (folder / "tasks_here.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(AppNotLoaded) as caught:
        load_app(reference)
    assert problem in str(caught.value)


def test_a_file_that_failed_is_not_left_half_imported(folder: Path) -> None:
    """As with any import: who imports it again is told again, instead of getting half a module."""
    (folder / "tasks_here.py").write_text("x = 1\n1 / 0\n")
    with pytest.raises(AppNotLoaded):
        load_app("tasks_here.py:app")
    assert "tasks_here" not in sys.modules


def test_threads_that_begin_together_after_others_ended(tmp_path: Path) -> None:
    """Each loop has its own producer, and lets go of those of ended loops: several may find the same ones."""
    app = App(f"sqlite:///{tmp_path / 'tasks.db'}")
    handles: list[str] = []

    @app.task
    async def job() -> None: ...

    async def enqueue(barrier: threading.Barrier) -> None:
        barrier.wait()
        handles.append((await job.enqueue()).id)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(5):
            loops = [asyncio.new_event_loop() for _ in range(20)]
            for loop in loops:
                loop.run_until_complete(job.enqueue())
                loop.close()
            barrier = threading.Barrier(3)
            threads = [threading.Thread(target=asyncio.run, args=(enqueue(barrier),)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(before)
    assert len(handles) == 15
