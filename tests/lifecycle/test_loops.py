"""Workers, tasks and producers on uvloop: set by a policy, or asked for."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret import TaskFailed, gather_results
from leveret.executors.in_process import InProcessExecutor
from leveret.executors.loops import run
from leveret.executors.processes import ProcessExecutor
from leveret.worker.worker import Worker as WorkerInProgram
from tests.support import loop_app
from tests.support.workers import Program, Worker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from leveret.executors import Executor
    from tests.conftest import Place
    from tests.support.workers import Ledger

APP = f"{loop_app.__file__}:app"
LIMIT = 60.0
#: More than a socket takes at once.
LARGE = 900_000


@pytest.fixture(autouse=True)
def connected(place: Place) -> Iterator[None]:
    before = loop_app.app.url
    loop_app.app.client.connect_to(place.url)
    yield
    loop_app.app.client.connect_to(before)


async def all_that_tasks_do() -> str:
    """Results, progress, large values, a death, a timeout, a delay and a cancellation; the loop that they ran on."""
    async with loop_app.app as app:
        loop = await loop_app.loop.enqueue()
        died = await loop_app.die_once.enqueue()
        late = await loop_app.thread.options(delay=0.5).enqueue(0.1)
        slow = await loop_app.slow.enqueue()
        large = await loop_app.large.enqueue(LARGE)
        command = await loop_app.command.enqueue()
        steps = await loop_app.steps.enqueue(5)
        never = await loop_app.thread.options(delay=3_600).enqueue(0.1)
        assert await gather_results([late, command], timeout=LIMIT) == ["slept", "42"]
        assert await large.result(LIMIT) == "x" * LARGE
        assert await died.result(LIMIT) == 2
        assert [status.state async for status in steps.updates()][-1] == "succeeded"
        with pytest.raises(TaskFailed, match="TimedOut"):
            await slow.result(LIMIT)
        assert (await never.cancel()).state == "cancelled"
        found: str = await app.handle(loop.id).result(LIMIT)
    return found


def check_quiet(output: str) -> None:
    """No exception but those of the tasks, which are told of with their attempts."""
    assert "\nTraceback" not in output
    assert "never retrieved" not in output
    assert "a mistake" not in output


@pytest.mark.parametrize(
    ("options", "policy", "loop"),
    [
        ((), "yes", "uvloop"),
        ((), "", "asyncio"),
        (("--loop", "uvloop"), "", "uvloop"),
        (("--loop", "asyncio"), "yes", "asyncio"),
    ],
)
def test_a_worker_on_uvloop(place: Place, ledger: Ledger, options: tuple[str, ...], policy: str, loop: str) -> None:
    with Worker(place.url, ledger, *options, app=APP, environment={"POLICY": policy}) as worker:
        worker.ready()
        assert asyncio.run(all_that_tasks_do()) == loop
        worker.process.terminate()
        assert worker.exit_code() == 0
        check_quiet(worker.output)


def test_a_program_that_sets_the_policy_and_runs_a_worker(place: Place, tmp_path: Path) -> None:
    environment = {"POLICY": "yes", "LEVERET_URL": place.url, "PYTHONPATH": str(Path.cwd())}
    with Program([loop_app.__file__], tmp_path / "output", environment) as program:
        program.wait_for("waiting for tasks on")
        assert run(all_that_tasks_do(), "uvloop") == "uvloop"
        program.process.terminate()
        assert program.exit_code() == 0
        check_quiet(program.output)


@pytest.mark.parametrize("kind", ["in this process", "in children"])
def test_a_worker_inside_a_program_on_uvloop(place: Place, kind: str) -> None:
    del place

    async def work() -> str:
        executor: Executor = (
            InProcessExecutor(loop_app.app, concurrency=10)
            if kind == "in this process"
            else ProcessExecutor(APP, url=loop_app.app.url, loop="uvloop")
        )
        worker = WorkerInProgram(executor)
        working = asyncio.create_task(worker.run())
        tasks = some_that_tasks_do() if kind == "in this process" else all_that_tasks_do()
        asking = asyncio.create_task(tasks)
        await asyncio.wait([working, asking], return_when=asyncio.FIRST_COMPLETED)
        worker.stop()
        await working
        return await asking

    assert run(work(), "uvloop") == "uvloop"


async def some_that_tasks_do() -> str:
    async with loop_app.app:
        assert await (await loop_app.thread.enqueue(0.01)).result(LIMIT) == "slept"
        with pytest.raises(TaskFailed, match="TimedOut"):
            await (await loop_app.slow.enqueue()).result(LIMIT)
        return await (await loop_app.loop.enqueue()).result(LIMIT)


def test_the_synchronous_door_on_uvloop(place: Place, ledger: Ledger, tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {str(Path(loop_app.__file__).parent)!r})
import loop_app
handle = loop_app.loop.enqueue_sync()
print(loop_app.app.wait(handle.result({LIMIT})), loop_app.app.wait(loop_app.loop.enqueue()).id)
"""
    environment = {"POLICY": "yes", "LEVERET_URL": place.url}
    with (
        Worker(place.url, ledger, app=APP) as worker,
        Program(["-c", program], tmp_path / "output", environment) as run,
    ):
        worker.ready()
        assert run.exit_code() == 0, run.output
        assert run.output.startswith("asyncio "), run.output
