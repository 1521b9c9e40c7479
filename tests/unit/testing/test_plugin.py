"""The pytest plugin, in real runs of pytest: as a user's project has it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest_plugins = ["pytester"]

TASKS = """
from leveret import App

app = App("amqp://nobody@127.0.0.1:1/")
sent = []


@app.task
async def send(address: str) -> None:
    sent.append(address)
    if address == "nobody":
        raise LookupError("no such address")
"""
#: What the projects of this module are run with: nothing of another plugin's that happens to be installed.
QUIET = ("-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:timeout", "-W", "error")


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    pytester.makepyfile(tasks=TASKS)
    pytester.makepyprojecttoml('[tool.pytest.ini_options]\nleveret_app = "tasks:app"\npythonpath = ["."]\n')
    return pytester


def test_a_project_with_the_option(project: pytest.Pytester) -> None:
    """A fresh broker for each test, with and without a loop."""
    project.makepyfile("""
        import asyncio
        import tasks

        def test_one(leveret_app):
            tasks.send.enqueue_sync("ann")
            leveret_app.assert_enqueued(tasks.send, "ann")
            leveret_app.drain_sync()
            assert tasks.sent == ["ann"]

        def test_two(leveret_app):
            assert leveret_app.app is tasks.app
            assert leveret_app.enqueued() == []

            async def test():
                await tasks.send.options(delay=60).enqueue("bob")
                leveret_app.clock.advance(60)
                await leveret_app.drain()
            asyncio.run(test())
            assert tasks.sent == ["ann", "bob"]
    """)
    project.runpytest_subprocess(*QUIET).assert_outcomes(passed=2)


def test_async_tests(project: pytest.Pytester) -> None:
    """Whichever plugin runs them: here anyio's, with a fixture that enqueues on the test's loop."""
    project.makepyfile("""
        import pytest
        import tasks

        pytestmark = pytest.mark.anyio

        @pytest.fixture
        def anyio_backend():
            return "asyncio"

        @pytest.fixture
        async def ann(leveret_app):
            return await tasks.send.enqueue("ann")

        @pytest.mark.parametrize("again", [1, 2])
        async def test_one(leveret_app, ann, again):
            leveret_app.faults.crash_before_settle(tasks.send)
            assert {run.id for run in await leveret_app.drain()} == {ann.id}
            assert tasks.sent == ["ann", "ann"] * again
    """)
    project.runpytest_subprocess(*QUIET).assert_outcomes(passed=2)


def test_a_failed_task_is_shown_with_its_line(project: pytest.Pytester) -> None:
    project.makepyfile("""
        import tasks

        def test_one(leveret_app):
            tasks.send.enqueue_sync("nobody")
            leveret_app.drain_sync()

        def test_two(leveret_app):
            tasks.send.enqueue_sync("ann")
            leveret_app.assert_enqueued(tasks.send, "bob")

        def test_three(leveret_app):
            leveret_app.faults.duplicate_delivery(tasks.send)
    """)
    result = project.runpytest_subprocess(*QUIET)
    result.assert_outcomes(failed=2, passed=1, errors=1)
    result.stdout.fnmatch_lines(
        [
            "*the test asked for faults that did not happen: duplicate_delivery of 'send' (1 times)*",
            '*raise LookupError("no such address")*',
            "*in task 'send', attempt 1, id *: next try in *",
            "*send(address='bob') was enqueued 0 times*",
            "*send(address='ann') on 'default'*",
        ],
        consecutive=False,
    )


def test_an_application_given_by_a_fixture(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        TASKS
        + "\n\n"
        + """
import pytest

@pytest.fixture
def leveret_instance():
    return app

def test_one(leveret_app):
    send.enqueue_sync("ann")
    assert len(leveret_app.drain_sync()) == 1
"""
    )
    pytester.runpytest_subprocess(*QUIET).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("", '*set leveret_app = "tasks:app"*override the fixture leveret_instance*'),
        ("nothing:app", "*leveret_app = 'nothing:app': there is no module 'nothing'*"),
    ],
)
def test_an_application_that_is_not_known(pytester: pytest.Pytester, option: str, message: str) -> None:
    pytester.makepyprojecttoml(f'[tool.pytest.ini_options]\nleveret_app = "{option}"\n')
    pytester.makepyfile("def test_one(leveret_app): pass")
    result = pytester.runpytest_subprocess(*QUIET)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([message])


def test_leveret_works_where_pytest_is_not_installed() -> None:
    """Only the plugin imports it."""
    program = """
import sys
sys.modules["pytest"] = sys.modules["_pytest"] = None
import asyncio, leveret, leveret.cli, leveret.testing, leveret.testing.conformance, leveret.worker
app = leveret.App()
task = app.task(print)
with leveret.testing.under_test(app) as test:
    task.enqueue_sync("it ran")
    test.drain_sync()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "it ran\n"
