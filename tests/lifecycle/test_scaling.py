"""--processes MIN-MAX with real workers: more children under a backlog, fewer later, and no task pays for it."""

from __future__ import annotations

import asyncio
import random
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest

from leveret.executors import Finished, RunRequest
from leveret.executors.processes import ProcessExecutor
from leveret.model import Envelope, Succeeded, new_id
from tests.support import ledger_app
from tests.support.waiting import until, wait_until
from tests.support.workers import LEDGER_APP, READY, Ledger, Program, Worker, is_alive, leveret

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client

PROGRAM = str(Path(__file__).parents[1] / "support" / "scaled_worker.py")


def scaled(place: Place, ledger: Ledger, *arguments: object) -> Program:
    program = Program(
        [PROGRAM, place.url, *map(str, arguments)],
        ledger.path.with_name("scaled.log"),
        {"LEDGER": str(ledger.path), "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    program.wait_for(READY)
    return program


def release(ledger: Ledger, *texts: str) -> None:
    for text in texts:
        Path(f"{ledger.path}.{text}").touch()


def child_of(ledger: Ledger, text: str) -> int:
    return int(ledger.wait_for(f"start {text} ").split()[-1])


def test_it_grows_under_a_backlog_and_shrinks_when_idle(place: Place, client: Client, ledger: Ledger) -> None:
    names = [f"task{number}" for number in range(6)]
    with scaled(place, ledger, 1, 3, 1, 0.5) as worker:
        client.enqueue_many(ledger_app.held, [(name,) for name in names])
        ledger.wait_for("start ", 3)
        running = {int(line.split()[-1]) for line in ledger.lines()}
        assert len(running) == 3
        client.wait_until_counts("work", running=3, ready=3)
        release(ledger, *names)
        ledger.wait_for("end ", 6)
        worker.wait_for("2 child processes from now on, not 3")
        worker.wait_for("1 child processes from now on, not 2")
        wait_until(lambda: sum(map(is_alive, running)) == 1, "two children have ended")
        client.enqueue(ledger_app.whose, "later")
        assert int(ledger.wait_for("by later").split()[-1]) in {pid for pid in running if is_alive(pid)}
        client.wait_until_empty("work")
        worker.signal(signal.SIGTERM)
        assert worker.exit_code() == 0
    assert ledger.count("start ") == ledger.count("end ") == 6, "each task ran once"
    assert "lost" not in worker.output
    before, _, _ = worker.output.partition("child processes from now on")
    assert "handed back" not in before, "it took more than it could run"


def test_a_running_task_outlives_the_shrinking(place: Place, client: Client, ledger: Ledger) -> None:
    """Two children with a task each, where one would do: the one that is to go finishes its task first."""
    with scaled(place, ledger, 1, 2, 2, 0.5) as worker:
        client.enqueue_many(ledger_app.held, [("long one",), ("short one",)])
        ledger.wait_for("start ", 2)
        client.enqueue_many(ledger_app.held, [("long two",), ("short two",)])
        children = {child_of(ledger, "long one"), child_of(ledger, "long two")}
        assert len(children) == 2
        release(ledger, "short one", "short two")
        worker.wait_for("1 child processes from now on, not 2")
        assert all(map(is_alive, children)), "each has a task"
        release(ledger, "long one", "long two")
        ledger.wait_for("end long one")
        ledger.wait_for("end long two")
        wait_until(lambda: sum(map(is_alive, children)) == 1, "one child has left")
        client.wait_until_empty("work")
    assert ledger.count("start ") == 4, "none was started again"
    assert "lost" not in worker.output


@pytest.mark.parametrize("place", ["rabbitmq-4"], indirect=True)
def test_two_workers_share_what_one_could_hold(place: Place, client: Client, ledger: Ledger) -> None:
    """On RabbitMQ a worker may hold what its most children run: what waits in it soon has a child."""
    options = ("--processes", "1-3", "--concurrency", "1", "-q", "work")
    with Worker(place.url, ledger, *options).ready(), Worker(place.url, ledger, *options).ready():
        names = [f"task{number}" for number in range(6)]
        client.enqueue_many(ledger_app.held, [(name,) for name in names])
        ledger.wait_for("start ", 6)
        assert len({line.split()[-1] for line in ledger.lines()}) == 6
        release(ledger, *names)
        client.wait_until_empty("work")


async def test_resized_and_reloaded_at_any_moment(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task is run once and succeeds, and in the end there are as many children as there shall be."""
    monkeypatch.setenv("LEDGER", str(ledger.path))
    chance = random.Random(5)
    finished: list[Finished] = []
    executor = ProcessExecutor(LEDGER_APP, url="memory://", concurrency=2)
    await executor.start(lambda reports: finished.extend(one for one in reports if isinstance(one, Finished)))
    reloads: list[asyncio.Task[int]] = []
    try:
        for number in range(40):
            body = msgspec.json.encode({"args": [str(number), chance.random() / 4]})
            executor.submit([RunRequest(number, Envelope(new_id(), "work", "pause", body))])
            executor.resize(chance.randint(1, 4))
            if number % 8 == 0 and (not reloads or reloads[-1].done()):
                reloads.append(asyncio.create_task(executor.reload(lambda _: None)))
            await asyncio.sleep(chance.random() / 5)  # a random moment
        executor.resize(2)
        await asyncio.gather(*reloads)

        async def settled() -> bool:
            return len(finished) == 40 and len(executor.pids) == 2

        await until(settled, "all have run, and two children serve")
        pids = executor.pids
    finally:
        await executor.stop()
    assert all(isinstance(one.outcome, Succeeded) for one in finished)
    assert len(set(ledger.lines())) == len(ledger.lines()), "none was started twice"
    assert ledger.count("start ") == ledger.count("end ") == 40
    assert not any(map(is_alive, pids))


@pytest.mark.parametrize("processes", ["0", "2-1", "0-2", "1-", "-2", "one"])
def test_wrong_numbers_are_told(processes: str) -> None:
    assert "is not a number from 1, or MIN-MAX" in leveret(
        "worker", "tasks:app", f"--processes={processes}", fails=True
    )
