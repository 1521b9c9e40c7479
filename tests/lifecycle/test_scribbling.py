"""What a task does to its process costs neither the worker nor the other tasks: descriptors, limits, the user."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret.executors import Blocks, Died, Finished, Overran, Started, processes, spawn
from leveret.executors.processes import ProcessExecutor
from leveret.model import DeadLettered
from leveret.observe.events import ChildReplaced
from tests.lifecycle.test_children import Told, job
from tests.support import scribbling_app
from tests.support.client import Client
from tests.support.waiting import until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(scribbling_app.__file__)}:app"
DEAF = APP.replace("scribbling_app", "deaf_app")
MIB = 1024 * 1024


@pytest.fixture(autouse=True)
def _environment(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER", str(ledger.path))


@pytest.fixture
def client(place: Place) -> Client:
    return Client(place.url, scribbling_app.app)


class Serving:
    """An executor, and what it tells."""

    def __init__(self, concurrency: int, app: str = APP) -> None:
        self.executor = ProcessExecutor(app, concurrency=concurrency)
        self.told = Told()

    async def __aenter__(self) -> Serving:
        await self.executor.start(self.told.take)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.executor.stop()

    def replaced(self) -> list[str]:
        return [one.reason for one in self.told.events if isinstance(one, ChildReplaced)]

    async def until_replaced(self, reason: str) -> None:
        async def is_replaced() -> bool:
            return reason in self.replaced()

        await until(is_replaced, f"a child is replaced as {reason}, not {self.replaced()}")


@pytest.mark.parametrize("what", ["1234", "long", "beginning", "zeros"])
async def test_what_is_written_into_every_descriptor_costs_its_task_an_attempt(
    what: str, ledger: Ledger, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And nobody else anything: what ran beside it runs again."""
    monkeypatch.setattr(spawn, "_INCOMPLETE", 1.0)
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "write", what)])
        death = await serving.told.wait_for(Died, 1)
        assert "has written into descriptors that are not its own" in death.cause
        assert "written into descriptors" in caplog.text
        serving.executor.submit([job(2, "say", "after")])
        await serving.told.wait_for_success(2)
        assert serving.replaced() == ["died"]
    assert ledger.count(f"try {what}") == 1


@pytest.mark.parametrize("which", [1, 2])
async def test_both_lines_of_a_child_are_guarded(which: int) -> None:
    """The connection, and the lifeline."""
    async with Serving(1) as serving:
        serving.executor.submit([job(1, "write_into_one", which)])
        assert "written into descriptors" in (await serving.told.wait_for(Died, 1)).cause
        serving.executor.submit([job(2, "say", "after")])
        await serving.told.wait_for_success(2)


async def test_a_neighbour_of_one_that_writes_is_not_charged(ledger: Ledger) -> None:
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil_and_stay", "", "go"), job(2, "write", "1234")])
        await serving.told.wait_for(Died, 2)
        ledger.release("go")
        await serving.told.wait_for_success(1)
        assert not serving.told.of(Died, 1)


@pytest.mark.parametrize("task", ["close_all", "read_all"])
async def test_descriptors_that_are_closed_or_read_cost_one_child(task: str, ledger: Ledger) -> None:
    async with Serving(1) as serving:
        serving.executor.submit([job(1, task, "bad")])
        ledger.wait_for("try bad")
        serving.executor.submit([job(key, "say", f"{key}") for key in range(2, 6)])
        for key in range(2, 6):
            await serving.told.wait_for_success(key)


@pytest.mark.parametrize("place", ["sqlite"], indirect=True)
def test_a_worker_goes_on_when_its_tasks_write_into_descriptors(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready() as worker:
        bad = client.enqueue(scribbling_app.write, "1234")
        (letter,) = client.wait_until_dead("work", 1)
        assert letter.envelope.id == bad
        assert "written into descriptors that are not its own" in letter.reason
        worker.wait_for("written into descriptors", 2)
        client.enqueue(scribbling_app.say, "after")
        ledger.wait_for("said after")


@pytest.mark.parametrize("how", ["limit", "memory", "file size", "descriptors", "user", "output", "folder"])
async def test_a_child_that_a_task_has_spoilt_is_replaced(how: str, ledger: Ledger) -> None:
    """The task itself may have succeeded; those that come after it are not charged for it."""
    if how == "user" and os.getuid() != 0:
        pytest.skip("only root can become another user")
    if how == "user":
        ledger.path.parent.chmod(0o755)
        ledger.path.chmod(0o666)
    async with Serving(1) as serving:
        serving.executor.submit([job(1, "spoil", how), *(job(key, "need", f"{key}") for key in range(2, 6))])
        for key in range(1, 6):
            await serving.told.wait_for_success(key)
        assert "unfit" in serving.replaced()
        assert len(serving.executor.pids) == 1


async def test_an_idle_child_that_a_task_has_spoilt_is_replaced() -> None:
    """Before anybody fails in it."""
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil", "limit")])
        await serving.until_replaced("unfit")


async def test_neighbours_fail_beside_one_that_spoils_and_are_not_charged(ledger: Ledger) -> None:
    async with Serving(3) as serving:
        serving.executor.submit([job(1, "spoil_and_stay", "limit", "go")])
        ledger.wait_for("spoilt")
        serving.executor.submit([job(2, "need", "2"), job(3, "need", "3")])
        await serving.told.wait_for_success(2)
        await serving.told.wait_for_success(3)
        assert serving.replaced() == ["unfit"]
        assert not serving.told.of(Finished, 1), "it runs on in the child that leaves"
        ledger.release("go")
        await serving.told.wait_for_success(1)


@pytest.fixture
def soon_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_STUCK", 0.2)


@pytest.mark.usefixtures("soon_stuck")
async def test_a_spoilt_child_that_is_stuck_is_ended(ledger: Ledger, caplog: pytest.LogCaptureFixture) -> None:
    """Nothing finishes in it, so nobody fails either. What ran in it runs again, alone and uncharged."""
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil_and_stay", "limit", "go"), job(2, "suffer", "sticks", "on")])
        ledger.wait_for("spoilt")
        ledger.release("on")
        await serving.told.wait_for_success(2)
        ledger.release("go")
        await serving.told.wait_for_success(1)
        assert not serving.told.of(Died, 1)
        assert serving.replaced() == ["unfit"]

        async def is_served() -> bool:
            return len(serving.executor.pids) == 1

        await until(is_served, "there is one child in its place")  # where they ran alone, there is nobody any more
    assert "did not turn any more" in caplog.text
    assert ledger.count("spoilt") == 2


@pytest.mark.skipif(sys.platform != "linux", reason="only there is it known how much memory is just too little")
@pytest.mark.usefixtures("soon_stuck")
async def test_a_thread_that_finds_no_memory_to_begin_holds_up_nobody_for_ever() -> None:
    async with Serving(10) as serving:
        serving.executor.submit([job(1, "spoil", "thread"), *(job(key, "need", f"{key}") for key in range(2, 6))])
        for key in range(1, 6):
            await serving.told.wait_for_success(key)
        assert serving.replaced() == ["unfit"]


@pytest.mark.usefixtures("soon_stuck")
@pytest.mark.parametrize("how", ["sticks", "dies"])
async def test_the_last_one_in_a_spoilt_child_is_not_charged_for_its_end(how: str, ledger: Ledger) -> None:
    """The one that spoilt it has succeeded, and is not there any more to be suspected."""
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil", "limit"), job(2, "suffer", how, "on")])
        await serving.until_replaced("unfit")
        ledger.release("on")
        await serving.told.wait_for_success(2)
        assert not serving.told.of(Died, 2)


async def test_a_timeout_is_not_held_against_one_that_a_spoilt_child_holds_up(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It could not end. Both times are long enough for the child to tell first that it is spoilt."""
    monkeypatch.setattr(processes, "OVERTIME", 3.0)
    monkeypatch.setattr(processes, "_STUCK", 4.0)
    ledger.release("on")
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil_and_stay", "limit", "go")])
        ledger.wait_for("spoilt")
        serving.executor.submit([job(2, "suffer_in_time", "sticks", "on")])
        await serving.told.wait_for_success(2)
        assert not serving.told.of(Overran, 2)


async def test_one_that_spoils_and_blocks_runs_on_when_it_is_alone(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds up nobody then."""
    monkeypatch.setattr(processes, "_STUCK", -60.0)
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil_and_block", "go")])

        async def blocks_again() -> bool:
            return ledger.count("spoilt") == 2 and len(serving.told.of(Blocks, 1)) == 2

        await until(blocks_again, "it runs again, alone")
        ledger.release("go")
        await serving.told.wait_for_success(1)
        assert not serving.told.of(Died, 1)


async def test_one_that_comes_after_a_spoiler_into_its_ward_is_not_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not alone there, in a way."""
    monkeypatch.setattr(processes, "_MOST_ISOLATED", 1)
    async with Serving(1) as serving:
        suspects = [job(1, "spoil", "limit"), job(2, "need", "2")]
        for suspect in suspects:
            serving.executor._backlog.remember(suspect)
        serving.executor.submit(suspects)
        await serving.told.wait_for_success(1)
        await serving.told.wait_for_success(2)


async def test_one_that_spoils_and_fails_is_charged_in_the_end(ledger: Ledger) -> None:
    """It fails when it is alone, too."""
    async with Serving(2) as serving:
        serving.executor.submit([job(1, "spoil", "fails")])
        outcome = (await serving.told.wait_for(Finished, 1)).outcome
        assert isinstance(outcome, DeadLettered)
        assert "by itself" in outcome.reason
        serving.executor.submit([job(2, "need", "2")])
        await serving.told.wait_for_success(2)
    assert ledger.count("spoilt") == 2


@pytest.mark.parametrize(("count", "size"), [(100, 300_000), (10, 15 * MIB), (1, 48 * MIB)])
async def test_large_tasks_are_no_blocked_child(count: int, size: int, ledger: Ledger) -> None:
    async with Serving(100) as serving:
        serving.executor.submit([job(key, "weigh", "x" * size) for key in range(count)])
        for key in range(count):
            await serving.told.wait_for_success(key)
        assert serving.replaced() == []
    assert ledger.count("weighed") == count


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child seems blocked before it can have begun anything."""
    monkeypatch.setattr(processes, "_PATIENCE", -60.0)


@pytest.mark.usefixtures("impatient")
async def test_a_job_that_no_child_begins_in_time_is_tried_alone(ledger: Ledger) -> None:
    """Instead of going from child to child for ever."""
    async with Serving(4) as serving:
        os.kill(serving.executor.pids[0], signal.SIGSTOP)
        serving.executor.submit([job(1, "say", "hello")])
        await serving.told.wait_for_success(1)
    assert ledger.count("said hello") == 1


async def test_a_job_that_not_even_a_child_of_its_own_begins_is_charged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_PATIENCE", 0.1)
    monkeypatch.setattr(processes, "_LAST_PATIENCE", 0.5)
    async with Serving(1, app=DEAF) as serving:
        serving.executor.submit([job(1, "say", "never")])
        death = await serving.told.wait_for(Died, 1)
        assert "did not begin the task in time" in death.cause
        assert len(serving.told.of(Started, 1)) == 1, "what has ended has begun, for those who count"
