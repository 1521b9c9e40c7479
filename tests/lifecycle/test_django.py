"""A Django project's tasks, run by a worker that manage.py starts; those of ``django.tasks`` where Django has them."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import django
import pytest

from tests.examples.programs import PATIENCE, running

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

MANAGE = """
import os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""
SETTINGS = """
from pathlib import Path
FOLDER = Path(__file__).parent
SECRET_KEY = "of this test"
USE_TZ = True
INSTALLED_APPS = ["leveret.contrib.django", "shop"]
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": FOLDER / "shop.sqlite3", "CONN_MAX_AGE": 0}}
TASKS = {
    "default": {
        "BACKEND": "leveret.contrib.django.backend.LeveretBackend",
        "QUEUES": ["default", "mail"],
        "OPTIONS": {"MAX_ATTEMPTS": 2},
    },
    "now": {
        "BACKEND": "leveret.contrib.django.backend.LeveretBackend",
        "QUEUES": ["default", "bulk"],
        "OPTIONS": {"ENQUEUE_ON_COMMIT": False, "TIMEOUT": 0.5},
    },
}
"""
TASKS = """
import threading
import django
from django.db import connection
from leveret.contrib.django import app

used = []

def ask():
    # Each run finds that the connection of its thread was closed after the run before.
    was_open = connection.connection is not None
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        return [was_open, connection.connection is not None]

@app.task
def plain() -> list[bool]:
    return ask()

@app.task
async def coroutine() -> list[bool]:
    from asgiref.sync import sync_to_async
    first, second = await sync_to_async(ask)(), await sync_to_async(ask)()
    return [*first, *second]

if django.VERSION >= (6, 0):
    from django.tasks import task

    @task
    def add(a, b=1):
        return {"sum": a + b}

    @task(queue_name="mail", takes_context=True)
    async def attempts(context, first):
        return [context.attempt, context.task_result.id, first]

    @task
    def fail():
        raise LookupError("not there")

    @task
    def fail_with_own():
        from django.core.exceptions import FieldError
        raise FieldError("two\\nlines: of it")

    @task
    def unserializable():
        return object()

    @task(backend="now")
    async def wait_for_ever():
        import asyncio
        await asyncio.Event().wait()

    @task(backend="now")
    def leave(how):
        raise {"exit": SystemExit, "interrupt": KeyboardInterrupt}[how]

    @task(backend="now")
    async def leave_loop():
        raise SystemExit(3)
"""
#: Added to the tasks: the worker tells what it told of the end of each run.
ENDS = """
from django.dispatch import receiver
from django.tasks.signals import task_finished

@receiver(task_finished)
def note(task_result, **kwargs):
    with open("ends", "a") as file:
        file.write(f"{task_result.id} {task_result.status}\\n")
"""
#: What each program of a test begins with; it prints what it has found as JSON.
PROGRAM = """
import datetime, json, os, sys
os.environ["DJANGO_SETTINGS_MODULE"] = "settings"
sys.path.insert(0, os.getcwd())
import django
django.setup()
from django.db import transaction
from leveret.contrib.django import app, enqueue_on_commit
import shop.tasks as tasks
"""


@pytest.fixture
def project(tmp_path: Path) -> Callable[[str], Any]:
    """Runs a program in a Django project, and gives what it prints."""
    (tmp_path / "shop").mkdir()
    for name, text in {
        "manage.py": MANAGE,
        "settings.py": SETTINGS,
        "shop/tasks.py": TASKS,
        "shop/__init__.py": "",
    }.items():
        (tmp_path / name).write_text(text)

    def run(program: str) -> Any:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM + program], cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)

    return run


def test_each_run_begins_without_an_open_connection(project: Callable[[str], Any], tmp_path: Path) -> None:
    worker = ("manage.py", "leveret", "worker", "--concurrency", "1")
    with running(*worker, folder=tmp_path, url=f"sqlite:///{tmp_path / 'leveret.db'}"):
        found = project("""
handles = [tasks.plain.enqueue_sync() for _ in range(4)] + [tasks.coroutine.enqueue_sync() for _ in range(2)]
print(json.dumps([app.wait(one.result(60)) for one in handles]))
""")
    assert found == [[False, True]] * 4 + [[False, True, True, True]] * 2


def test_a_task_of_a_transaction_is_stored_with_its_commit_alone(project: Callable[[str], Any]) -> None:
    found = project("""
from leveret.errors import InvalidArguments, TaskNotFound
def known(handle):
    try:
        return app.wait(handle.status()).state
    except TaskNotFound:
        return None
states = []
with transaction.atomic():
    committed = enqueue_on_commit(tasks.plain)
    states.append(known(committed))
    try:
        enqueue_on_commit(tasks.plain, 1)
    except InvalidArguments:
        states.append("refused at once")
states.append(known(committed))
try:
    with transaction.atomic():
        rolled_back = enqueue_on_commit(tasks.plain)
        1 / 0
except ZeroDivisionError:
    states.append(known(rolled_back))
print(json.dumps([*states, known(enqueue_on_commit(tasks.plain))]))
""")
    assert found == [None, "refused at once", "queued", None, "queued"]


def test_no_connection_is_opened_to_find_that_there_is_no_transaction(
    project: Callable[[str], Any], tmp_path: Path
) -> None:
    program = """
from django.db import connection
states = []
def store():
    states.append(app.wait(enqueue_on_commit(tasks.plain).status()).state)
store()
states.append(connection.connection is None)
if connection.settings_dict["NAME"]:
    connection.ensure_connection()
    store()
    transaction.set_autocommit(False)
    try:
        store()
    except transaction.TransactionManagementError:
        states.append("refused")
print(json.dumps(states))
"""
    assert project(program) == ["queued", True, "queued", "refused"]
    (tmp_path / "settings.py").write_text(SETTINGS + "DATABASES = {}")
    assert project(program) == ["queued", True]


def test_manage_py_hands_its_options_on(project: Callable[[str], Any], tmp_path: Path) -> None:
    project("tasks.plain.enqueue_sync(); print(1)")
    command = [sys.executable, "manage.py", "leveret", "queues", "--json", "--settings", "settings"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr.decode()
    assert '"default"' in done.stdout.decode()


def test_a_setting_that_there_is_not_is_named(project: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "settings.py").write_text(SETTINGS + "LEVERET = {'QUEUE': []}")
    with pytest.raises(
        AssertionError, match=r"settings.LEVERET has 'QUEUE', which is no setting; did you mean 'QUEUES"
    ):
        project("print(1)")


@pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks came with Django 6")
def test_tasks_of_django_run_and_tell_their_results(project: Callable[[str], Any], tmp_path: Path) -> None:
    with running("manage.py", "leveret", "worker", folder=tmp_path, url=f"sqlite:///{tmp_path / 'leveret.db'}"):
        found = project("""
import asyncio, time
from django.tasks.exceptions import TaskResultDoesNotExist, TaskResultMismatch
from django.tasks import default_task_backend as backend
def ended(result):
    until = time.monotonic() + 60
    while not result.is_finished:
        assert time.monotonic() < until, result
        time.sleep(0.02)
        result.refresh()
    return result
added, context = ended(tasks.add.enqueue(1, b=2)), ended(asyncio.run(tasks.attempts.aenqueue("x")))
soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=1)
later = ended(tasks.add.using(run_after=soon, priority=-100).enqueue(5))
failed, own, odd = [ended(one.enqueue()) for one in (tasks.fail, tasks.fail_with_own, tasks.unserializable)]
again = asyncio.run(tasks.add.aget_result(added.id))
refused = []
for call in (lambda: tasks.fail.get_result(added.id), lambda: tasks.add.get_result("0" * 32)):
    try:
        call()
    except (TaskResultMismatch, TaskResultDoesNotExist) as error:
        refused.append(type(error).__name__)
print(json.dumps({
    "added": [added.return_value, again.args, again.kwargs, again.attempts, again == added],
    "context": [context.return_value == [1, context.id, "x"], context.task.queue_name],
    "later": later.started_at >= soon,
    "failed": [failed.status, failed.attempts, failed.errors[0].exception_class.__name__],
    "own": own.errors[0].exception_class_path,
    "odd": odd.errors[0].exception_class_path,
    "refused": refused,
    "supports": [backend.supports_defer, backend.supports_async_task, backend.supports_get_result,
                 backend.supports_priority],
}))
""")
    assert found == {
        "added": [{"sum": 3}, [1], {"b": 2}, 1, True],
        "context": [True, "mail"],
        "later": True,
        "failed": ["FAILED", 2, "LookupError"],
        "own": "django.core.exceptions.FieldError",
        "odd": "builtins.TypeError",
        "refused": ["TaskResultMismatch", "TaskResultDoesNotExist"],
        "supports": [True] * 4,
    }


@pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks came with Django 6")
def test_a_task_of_django_waits_for_the_commit_and_for_its_priority(project: Callable[[str], Any]) -> None:
    found = project("""
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from leveret.contrib.django.backend import _priority
with transaction.atomic():
    result = tasks.add.enqueue(1)
    try:
        result.refresh()
    except TaskResultDoesNotExist:
        before = [result.status, result.enqueued_at]
result.refresh()
refused = []
for wrong in ({"queue_name": "none"}, {"priority": 101}, {"run_after": datetime.datetime.now()}):
    try:
        tasks.add.using(**wrong)
    except InvalidTask:
        refused.append(True)
try:
    tasks.add.enqueue(object())
except TypeError:
    refused.append(True)
ranks = [4 if one is None else one for one in map(_priority, range(-100, 101))]
print(json.dumps([before, result.status, result.enqueued_at is not None, refused, ranks == sorted(ranks),
    [_priority(one) for one in (-100, -1, 0, 1, 100)]]))
""")
    assert found == [["READY", None], "READY", True, [True] * 4, True, [0, 3, None, 5, 9]]


@pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks came with Django 6")
def test_a_task_of_django_is_known_as_its_enqueue_has_told_it(project: Callable[[str], Any]) -> None:
    found = project("""
from django.tasks.exceptions import TaskResultDoesNotExist
kept = []
try:
    with transaction.atomic():
        now, later = tasks.add.using(backend="now").enqueue(1, b=[2]), tasks.add.enqueue(1)
        kept.append(now == tasks.add.using(backend="now").get_result(now.id))
        1 / 0
except ZeroDivisionError:
    pass
now.refresh()
try:
    later.refresh()
except TaskResultDoesNotExist:
    kept.append("rolled back")
with transaction.atomic():
    later = tasks.add.enqueue(1)
    own = []
    transaction.on_commit(lambda: own.append(tasks.add.enqueue(1)))  # as Django's guide says
kept.append(own[0] == tasks.add.get_result(own[0].id))
print(json.dumps([*kept, now.enqueued_at is not None, later == tasks.add.get_result(later.id)]))
""")
    assert found == [True, "rolled back", True, True, True]


@pytest.mark.skipif(django.VERSION < (6, 0), reason="django.tasks came with Django 6")
def test_priorities_timeouts_and_ends_of_tasks_of_django(project: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "shop" / "tasks.py").write_text(TASKS + ENDS)
    project("""
ids = {str(rank): tasks.add.using(priority=rank).enqueue(rank).id for rank in (0, -100, 50, -1, 100, 1)}
ids["wait"] = tasks.wait_for_ever.enqueue().id
ids["exit"], ids["interrupt"] = [tasks.leave.enqueue(how).id for how in ("exit", "interrupt")]
ids["loop"] = tasks.leave_loop.enqueue().id
ids["bulk"] = tasks.add.using(backend="now", queue_name="bulk").enqueue(1).id  # add's own backend has no such queue
open("ids", "w").write(json.dumps(ids))
print(1)
""")
    worker = ("manage.py", "leveret", "worker", "--concurrency", "1")
    with running(*worker, folder=tmp_path, url=f"sqlite:///{tmp_path / 'leveret.db'}"):
        results = project("""
import time
from django.tasks import task_backends
results = {}
for name, id_ in json.load(open("ids")).items():
    until = time.monotonic() + 60
    while not (result := task_backends["now"].get_result(id_)).is_finished:
        assert time.monotonic() < until, result
        time.sleep(0.02)
    error = result.errors[0].exception_class_path if result.errors else None
    results[name] = [id_, result.started_at.timestamp(), result.status, error]
print(json.dumps(results))
""")
    ranks = ["100", "50", "1", "0", "-1", "-100"]
    assert sorted(ranks, key=lambda rank: results[rank][1]) == ranks
    assert results["wait"][2:] == ["FAILED", "leveret.errors.TimedOut"]
    assert results["exit"][2:] == results["loop"][2:] == ["FAILED", "builtins.SystemExit"]
    assert results["interrupt"][2] == "FAILED"
    assert results["bulk"][2:] == ["SUCCESSFUL", None]
    told = dict(line.split() for line in (tmp_path / "ends").read_text().splitlines())
    # An attempt that is cut off tells nothing.
    assert told == {results[name][0]: results[name][2] for name in results if name != "wait"}
