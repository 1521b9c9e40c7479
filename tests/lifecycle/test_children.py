"""The executor of child processes by itself: who is charged when a child blocks or dies, and how a reload ends."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, TypeVar

import msgspec
import pytest

from leveret.errors import AppNotLoaded
from leveret.executors import (
    Blocks,
    Died,
    Finished,
    Manifest,
    Overran,
    Report,
    Returned,
    RunRequest,
    Started,
    processes,
    spawn,
)
from leveret.executors.processes import ProcessExecutor
from leveret.executors.wire import Begin, FrameReader, Run, ToWorker, encoded
from leveret.model import Envelope, Succeeded, new_id
from leveret.observe import ChildReplaced
from tests.support.waiting import PATIENCE, until
from tests.support.workers import LEDGER_APP, Ledger, is_alive

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from leveret.executors import ExecutorEvent

T = TypeVar("T", bound=Report)


GATED_APP = LEDGER_APP.replace("ledger_app", "gated_app")


def job(key: int, task: str, *arguments: object, once: bool = False) -> RunRequest:
    return RunRequest(key, Envelope(new_id(), "work", task, msgspec.json.encode({"args": arguments})), once)


def _keys(event: ExecutorEvent) -> Sequence[int]:
    if isinstance(event, ChildReplaced):
        return ()
    return event.keys if isinstance(event, (Returned, Started)) else [event.key]


class Told:
    """What an executor told of its jobs."""

    def __init__(self) -> None:
        self.events: list[ExecutorEvent] = []

    def take(self, news: Sequence[ExecutorEvent]) -> None:
        self.events.extend(news)

    def of(self, kind: type[T], key: int) -> list[T]:
        return [one for one in self.events if isinstance(one, kind) and key in _keys(one)]

    async def wait_for(self, kind: type[T], key: int) -> T:
        async def told() -> bool:
            return bool(self.of(kind, key))

        await until(told, f"{kind.__name__} of job {key} in {self.events}")
        return self.of(kind, key)[-1]

    async def wait_for_success(self, key: int) -> None:
        assert isinstance((await self.wait_for(Finished, key)).outcome, Succeeded)


class Imports:
    """Of `gated_app`, each by a child of its own."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    async def wait_for(self, number: int) -> int:
        """The child whose import is the first, the second ..."""

        async def begun() -> bool:
            return self._ledger.count("import ") >= number

        await until(begun, f"import {number}")
        return int(self._ledger.lines_of("import ")[number - 1].split()[-1])

    async def release(self, number: int) -> int:
        """Let it end."""
        pid = await self.wait_for(number)
        self._ledger.release(f"{pid}")
        return pid


@asynccontextmanager
async def serving_gated(imports: Imports) -> AsyncGenerator[tuple[ProcessExecutor, Told]]:
    """One child, which has imported the application."""
    executor, told = ProcessExecutor(GATED_APP, concurrency=1), Told()
    try:
        await asyncio.gather(executor.start(told.take), imports.release(1))
        yield executor, told
    finally:
        await executor.stop()


async def serves(executor: ProcessExecutor, pid: int) -> None:
    async def alone() -> bool:
        return executor.pids == [pid]

    await until(alone, f"{pid} serves")


@asynccontextmanager
async def serving(*, concurrency: int = 2) -> AsyncGenerator[tuple[ProcessExecutor, Told]]:
    executor, told = ProcessExecutor(LEDGER_APP, concurrency=concurrency), Told()
    await executor.start(told.take)
    try:
        yield executor, told
    finally:
        await executor.stop()


@pytest.fixture(autouse=True)
def _environment(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER", str(ledger.path))


@pytest.fixture
def imports(ledger: Ledger) -> Imports:
    return Imports(ledger)


@pytest.fixture
def soon_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task has three seconds to end after its timeout, not five: who blocks is known after one."""
    monkeypatch.setattr(processes, "OVERTIME", 3.0)


@pytest.mark.usefixtures("soon_over")
async def test_a_task_that_cannot_end_as_another_blocks_is_not_charged(ledger: Ledger) -> None:
    """What blocks, without a timeout, runs on, once. The other waits for it, and has its time to end after that."""
    async with serving() as (executor, told):
        executor.submit([job(1, "overrun_tidily", "victim", 0.1), job(2, "block_the_loop", "bad", 5)])
        await told.wait_for_success(2)
        await told.wait_for(Finished, 1)
        assert not told.of(Overran, 1)
    assert ledger.count("start bad") == ledger.count("try victim") == ledger.count("end victim") == 1


@pytest.mark.usefixtures("soon_over")
@pytest.mark.parametrize("bad", ["overrun_blocking", "overrun_blocking_in_part"])
async def test_a_task_that_blocks_for_longer_than_its_timeout_is_the_one_charged(ledger: Ledger, bad: str) -> None:
    """Where it is not known which it is, each runs again alone to find out."""
    async with serving() as (executor, told):
        executor.submit([job(1, "overrun", "victim", 0.1), job(2, bad, "bad")])
        await told.wait_for(Overran, 2)
        await told.wait_for_success(1)
        assert not told.of(Overran, 1)
    assert ledger.count("try victim") == 2


@pytest.mark.usefixtures("soon_over")
async def test_a_loop_that_turns_again_excuses_nobody() -> None:
    """Also if the task that blocked it still runs, and says nothing."""
    async with serving() as (executor, told):
        executor.submit([job(1, "overrun_stubbornly", "stubborn"), job(2, "block_and_wait", "blocked", 2)])
        await told.wait_for(Overran, 1)
        assert not told.of(Overran, 2)


async def test_a_job_whose_beginning_could_not_be_told_has_begun(ledger: Ledger) -> None:
    """It waited behind a result larger than the socket's buffer, and killed its process: it does not run again."""
    async with serving() as (executor, told):
        executor.submit([job(1, "held_large", "large", 900_000)])
        await told.wait_for(Started, 1)
        # The loop of this test, which the executor reads on, stands still until the child has died.
        ledger.release("large")
        ledger.wait_for("end large")
        executor.submit([job(2, "kill_the_child", "bad", once=True)])
        ledger.wait_for("try bad")
        await told.wait_for(Died, 2)
        await told.wait_for_success(1)
        assert len(told.of(Started, 2)) == 1, "what has ended has begun, for those who count"
        assert not told.of(Died, 1)
    assert ledger.count("try bad") == 1


async def suspect(executor: ProcessExecutor, told: Told, imports: Imports) -> RunRequest:
    """A job that is run alone, as one of its name killed the first child; the second one serves."""
    killer = job(1, "kill_the_child", "bad")
    executor.submit([killer])
    await told.wait_for(Died, 1)
    await serves(executor, await imports.release(2))
    return RunRequest(2, msgspec.structs.replace(killer.envelope, task="say"))


async def test_a_suspect_whose_ward_is_born_in_a_reload_gets_another(imports: Imports) -> None:
    async with serving_gated(imports) as (executor, told):
        executor.submit([await suspect(executor, told, imports)])
        await imports.wait_for(3)  # its ward, with the old code
        reload = asyncio.create_task(executor.reload(lambda _: None))
        await imports.release(4)
        assert await reload == 1
        await imports.release(3)
        await imports.release(5)
        await told.wait_for_success(2)


async def test_a_ward_with_new_code_is_not_ahead_of_what_the_worker_knows(imports: Imports) -> None:
    """It may be born before the first child of a reload."""
    adopted: list[Manifest] = []
    async with serving_gated(imports) as (executor, told):
        last = await suspect(executor, told, imports)
        reload = asyncio.create_task(executor.reload(adopted.append))
        await imports.wait_for(3)
        executor.submit([last])
        await imports.release(4)
        await told.wait_for(Started, 2)
        assert len(adopted) == 1
        await imports.release(3)
        await reload
        assert len(adopted) == 1


async def test_a_reload_while_the_first_child_is_born(imports: Imports) -> None:
    """It serves with the old code, until one with the new is there."""
    adopted: list[Manifest] = []
    executor = ProcessExecutor(GATED_APP)
    starting = asyncio.create_task(executor.start(lambda _: None))
    try:
        await imports.wait_for(1)
        await executor.reload(adopted.append)
        first = await imports.release(1)
        await starting
        await imports.wait_for(2)
        assert executor.pids == [first]
        assert not adopted
        await serves(executor, await imports.release(2))
        assert len(adopted) == 1
    finally:
        await executor.stop()


async def test_a_reload_while_the_only_child_is_born(imports: Imports) -> None:
    """It never serves, and the worker knows what the one after it has imported."""
    adopted: list[Manifest] = []
    async with serving_gated(imports) as (executor, _):
        os.kill(executor.pids[0], signal.SIGKILL)
        await imports.wait_for(2)
        await executor.reload(adopted.append)
        await imports.release(2)
        await imports.wait_for(3)
        assert not executor.pids
        await serves(executor, await imports.release(3))
        assert len(adopted) == 1


async def test_what_comes_after_the_stop_is_not_taken(ledger: Ledger) -> None:
    """An acknowledgment before the run may end late; the descriptors of the children are others' by then."""
    async with serving() as (executor, _):
        await executor.stop()
        executor.submit([job(1, "say", "late", once=True)])
        executor.cancel([1])
    assert not ledger.lines()


async def test_an_application_that_leaves_a_thread_behind_and_fails(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process, which would wait for the thread, is ended; the failure is told."""
    monkeypatch.setattr(spawn, "SHUTDOWN_TIMEOUT", 0.2)
    (tmp_path / "threads.py").write_text(
        "import os, threading\n"
        "from tests.support.ledger_app import note\n"
        "note(f'import {os.getpid()}')\n"
        "threading.Thread(target=threading.Event().wait).start()\n"
        "raise ImportError('no such thing')\n"
    )
    executor = ProcessExecutor(f"{tmp_path / 'threads.py'}:app")
    with pytest.raises(AppNotLoaded, match="no such thing"):
        async with asyncio.timeout(PATIENCE):
            await executor.start(lambda _: None)
    assert not is_alive(int(ledger.wait_for("import ").split()[-1]))


def whole_batch(end: socket.socket) -> list[ToWorker]:
    reader = FrameReader()
    while data := end.recv(1 << 16):
        for body in reader.feed(data):
            return msgspec.msgpack.decode(body, type=list[ToWorker])
    raise AssertionError("it ended in the middle of a batch")


def test_a_watch_outlives_a_worker_that_does_not_read(ledger: Ledger) -> None:
    """What it has to say does not fit: it says the rest later, and still sees that its worker is gone."""
    ours, theirs = socket.socketpair()
    lifeline, their_lifeline = socket.socketpair()
    their_lifeline.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as little as the system allows
    lifeline.settimeout(PATIENCE)
    tickets_out, tickets_in = os.pipe()
    ends = [theirs.fileno(), their_lifeline.fileno(), tickets_out]
    child = subprocess.Popen([sys.executable, "-m", "leveret.executors.child", *map(str, ends)], pass_fds=ends)
    try:
        theirs.close()
        their_lifeline.close()
        jobs = [job(number, "held", "long") for number in range(100)] + [job(100, "overrun_blocking_in_part", "bad")]
        ours.sendall(encoded([Begin(LEDGER_APP, None, len(jobs))]) + encoded([Run(jobs)]))
        os.write(tickets_in, bytes(len(jobs)))
        ledger.wait_for("try bad")
        select.select([lifeline], [], [], PATIENCE)
        time.sleep(1)  # the worker is stopped, or very busy
        suspects = whole_batch(lifeline)
        assert [one.key for one in suspects if isinstance(one, Blocks)] == list(range(101))
        lifeline.close()
        assert child.wait(PATIENCE) == 1
    finally:
        child.kill()
        child.wait()
        for end in (ours, lifeline):
            end.close()
        for number in (tickets_out, tickets_in):
            os.close(number)
