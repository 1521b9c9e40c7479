"""What a task starts: it behaves as it does without Leveret, and ends with the child process that ran the task."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from leveret.executors import RunRequest
from leveret.executors.processes import ProcessExecutor
from leveret.model import Envelope, new_id
from tests.support import starting_app
from tests.support.client import Client
from tests.support.waiting import until, wait_until
from tests.support.workers import Ledger, Worker, is_alive

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(starting_app.__file__)}:app"
ON_SQLITE = pytest.mark.parametrize("place", ["sqlite"], indirect=True)


@pytest.fixture
def client(place: Place) -> Client:
    return Client(place.url, starting_app.app)


def started(line: str) -> tuple[int, list[int]]:
    """The child that ran the task, and what it started."""
    _, child, *pids = line.partition(": ")[2].split()
    return int(child), [int(pid) for pid in pids]


def all_gone(ledger: Ledger) -> bool:
    return not any(map(is_alive, (pid for line in ledger.lines_of("started") for pid in started(line)[1])))


@ON_SQLITE
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_what_a_task_starts_ends_when_it_is_told_to(place: Place, client: Client, ledger: Ledger, method: str) -> None:
    with Worker(place.url, ledger, app=APP).ready():
        client.enqueue(starting_app.terminate, method)
        assert ledger.wait_for("terminated").split()[-1] == str(-signal.SIGTERM)


@ON_SQLITE
def test_what_a_task_forks_is_interrupted(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready():
        client.enqueue(starting_app.interrupt)
        assert ledger.wait_for("interrupted") == "interrupted KeyboardInterrupt"


@ON_SQLITE
def test_pools_can_be_left(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready():
        client.enqueue(starting_app.pool_that_is_slow)
        client.enqueue(starting_app.pool_that_breaks)
        ledger.wait_for("left the pool", 2)


@ON_SQLITE
def test_what_a_task_starts_has_neither_the_childs_signals_nor_its_connections(
    place: Place, client: Client, ledger: Ledger
) -> None:
    with Worker(place.url, ledger, app=APP).ready():
        client.enqueue(starting_app.signals_of, "fork")
        client.enqueue(starting_app.signals_of, "exec")
        assert ledger.wait_for("signals fork") == "signals fork True"
        assert ledger.wait_for("signals exec") == "signals exec True []"


@ON_SQLITE
@pytest.mark.parametrize("how", ["returns", "raises", "exits"])
def test_a_fork_that_comes_back_from_its_task_ends(place: Place, client: Client, ledger: Ledger, how: str) -> None:
    """As a program that has come to its end; the task is the other process's."""
    with Worker(place.url, ledger, app=APP).ready() as worker:
        id_ = client.enqueue(starting_app.return_from_fork, how)
        forked = int(ledger.wait_for(f"forked {how}").split()[-1])
        assert ledger.wait_for("code").split()[-1] == {"returns": "0", "raises": "1", "exits": "7"}[how]
        assert bytes(client.wait_until_ended(id_).encoded_result) == b'"the task\'s"'
        assert not is_alive(forked)
        assert ("in the fork" in worker.output) == (how == "raises")


@ON_SQLITE
@pytest.mark.parametrize("how", ["returns", "awaits", "yields"])
def test_a_fork_never_runs_its_parents_event_loop(place: Place, client: Client, ledger: Ledger, how: str) -> None:
    with Worker(place.url, ledger, app=APP).ready() as worker:
        id_ = client.enqueue(starting_app.return_from_fork_on_the_loop, how)
        forked = int(ledger.wait_for(f"forked {how}").split()[-1])
        assert ledger.wait_for("code").split()[-1] == ("0" if how == "returns" else "1")
        assert bytes(client.wait_until_ended(id_).encoded_result) == b'"the task\'s"'
        assert not is_alive(forked)
        client.enqueue(starting_app.say, "after")
        ledger.wait_for("said after")
        assert "child process" not in worker.output


@ON_SQLITE
@pytest.mark.parametrize("kind", starting_app.KINDS)
def test_no_attempt_runs_beside_what_the_one_before_it_started(
    place: Place, client: Client, ledger: Ledger, kind: str
) -> None:
    """The hard timeout takes it along."""
    with Worker(place.url, ledger, app=APP).ready():
        client.enqueue(starting_app.outlast, kind)
        ledger.wait_for(f"started {kind}: 2")
        first = started(ledger.lines_of(f"started {kind}: 1")[0])[1]
        assert first
        assert not any(map(is_alive, first))
        client.wait_until_dead("work", 1)
        wait_until(lambda: all_gone(ledger), "all that the task started is gone")


@ON_SQLITE
@pytest.mark.parametrize("how", ["child killed", "stopped", "stopped twice", "worker killed", "worker crashed"])
@pytest.mark.parametrize("task", ["wait", "wait_on_the_loop", "leave"])
def test_what_a_task_started_ends_with_its_child(
    place: Place, client: Client, ledger: Ledger, how: str, task: str
) -> None:
    kinds = ["on the loop"] if task == "wait_on_the_loop" else ["subprocess", "stubborn", "group", "double fork"]
    grace = "60" if how == "stopped twice" else "0"
    with Worker(place.url, ledger, "--grace", grace, app=APP).ready() as worker:
        for kind in kinds:
            # One after the other: a fork inherits the pipe on which subprocess waits for a program that begins.
            client.enqueue(getattr(starting_app, task), kind)
            ledger.wait_for(f"started {kind}")
        child, _ = started(ledger.lines()[0])
        if how == "child killed":
            os.kill(child, signal.SIGKILL)
            # What runs again starts more; those of the first attempts are gone by then.
            first = [pid for line in ledger.lines_of("started") for pid in started(line)[1]]
            wait_until(lambda: not any(map(is_alive, first)), "what the killed child's tasks started is gone")
        elif how == "worker killed":
            worker.kill()
        elif how == "worker crashed":
            worker.signal(signal.SIGSEGV)
        else:
            worker.signal(signal.SIGTERM)
            if how == "stopped twice":
                worker.wait_for("stopping")
                worker.signal(signal.SIGTERM)
            assert worker.exit_code() == 0
            assert all_gone(ledger)
        if how != "child killed":
            wait_until(lambda: all_gone(ledger), "what the tasks started is gone")
            wait_until(lambda: not is_alive(child), "the child is gone")


@ON_SQLITE
@pytest.mark.parametrize("how", ["recycled", "too large", "reloaded"])
def test_what_a_task_started_ends_with_a_child_that_leaves(
    place: Place, client: Client, ledger: Ledger, how: str
) -> None:
    options = {"recycled": ["--max-tasks-per-child", "1"], "too large": ["--max-rss", "1"], "reloaded": []}[how]
    with Worker(place.url, ledger, *options, app=APP).ready() as worker:
        client.enqueue(starting_app.leave, "stubborn")
        child, _ = started(ledger.wait_for("started"))
        if how == "reloaded":
            worker.signal(signal.SIGHUP)
        wait_until(lambda: not is_alive(child), "the child leaves")
        wait_until(lambda: all_gone(ledger), "what its task started is gone")


async def test_what_a_task_started_ends_with_a_child_that_is_one_too_many(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LEDGER", str(ledger.path))
    executor = ProcessExecutor(APP, processes=2, concurrency=1)
    await executor.start(lambda _: None)
    try:

        async def both() -> bool:
            return len(executor.pids) == 2

        async def told() -> bool:
            return ledger.count("started") == 2

        await until(both, "two children serve")
        body = msgspec.json.encode({"args": ["subprocess"]})
        executor.submit([RunRequest(key, Envelope(new_id(), "work", "leave", body)) for key in range(2)])
        await until(told, "both tasks have started something")
        executor.resize(1)

        async def one_is_gone() -> bool:
            (left,) = executor.pids
            return all(is_alive(pids[0]) == (child == left) for child, pids in map(started, ledger.lines()))

        await until(one_is_gone, "what the task of the child that left had started is gone")
    finally:
        await executor.stop()
    assert all_gone(ledger)


@ON_SQLITE
def test_what_has_a_session_of_its_own_has_left(place: Place, client: Client, ledger: Ledger) -> None:
    with Worker(place.url, ledger, app=APP).ready() as worker:
        client.enqueue(starting_app.detach)
        pid = int(ledger.wait_for("detached").split()[-1])
        try:
            client.wait_until_empty("work")
            worker.signal(signal.SIGTERM)
            assert worker.exit_code() == 0
            assert is_alive(pid)
        finally:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
