"""`enqueue_sync` on a file: a thread writes itself, and takes along what others wait to have written."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

import pytest

from leveret import App, Queue
from leveret.brokers.sqlite import SQLiteBroker
from leveret.brokers.sqlite.writer import Writer
from leveret.errors import BrokerUnavailable, EnqueueTimeout, QueueFull
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from leveret.client.task import Task


class Program:
    """An application that has enqueued its first task, ``say``, from a thread without a loop."""

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.app = App(f"sqlite:///{path}", enqueue_timeout=timeout, queues=[Queue("small", max_length=1)])

        @self.app.task(queue="work")
        def say(text: str) -> None: ...

        self.say: Task[[str], None] = say
        say.enqueue_sync("first")

    @property
    def broker(self) -> SQLiteBroker:
        (producer,) = self.app.client._producers.values()
        assert isinstance(producer.broker, SQLiteBroker)
        return producer.broker

    @property
    def writer(self) -> Writer:
        return self.broker._writer

    def stored(self) -> int:
        with closing(sqlite3.connect(self.path)) as database:
            return int(database.execute("SELECT count(*) FROM task").fetchone()[0])


@pytest.fixture
def program(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Program]:
    program = Program(tmp_path / "leveret.db", getattr(request, "param", 20.0))
    yield program
    program.app.close_sync()


def in_threads(count: int, call: Callable[[int], object]) -> tuple[list[threading.Thread], list[BaseException]]:
    """Threads that have begun, and what they will have raised."""
    raised: list[BaseException] = []

    def run(number: int) -> None:
        try:
            call(number)
        except BaseException as error:  # noqa: BLE001 - it is looked at
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    return threads, raised


def join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


async def test_threads_that_wait_share_a_transaction(program: Program, transactions: list[int]) -> None:
    with program.writer._turn:
        threads, raised = in_threads(20, lambda number: program.say.enqueue_sync(str(number)))
        await until(lambda: len(program.writer._here) == 20, "all wait for their turn")
        transactions.clear()
    join(threads)
    assert (raised, transactions) == ([], [20])
    assert program.stored() == 21


async def test_a_refusal_is_its_own(program: Program) -> None:
    small = program.say.options(queue="small")
    await asyncio.to_thread(small.enqueue_sync, "only one fits")
    with program.writer._turn:
        threads, raised = in_threads(2, lambda number: (small if number else program.say).enqueue_sync("another"))
        await until(lambda: len(program.writer._here) == 2, "both wait for their turn")
    join(threads)
    assert [type(error) for error in raised] == [QueueFull]
    assert program.stored() == 3


@pytest.mark.parametrize("program", [2.0], indirect=True)
def test_a_lock_is_waited_for_as_long_as_an_enqueue_may_take(program: Program) -> None:
    """By all threads together, not by one after the other: that would be ten seconds."""
    with closing(sqlite3.connect(program.path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        began = time.monotonic()
        threads, raised = in_threads(5, lambda number: program.say.enqueue_sync(str(number)))
        join(threads)
        took = time.monotonic() - began
        other.execute("ROLLBACK")
    assert len(raised) == 5
    assert all(isinstance(error, (EnqueueTimeout, BrokerUnavailable)) for error in raised)
    assert took < 8
    program.say.enqueue_sync("free again")


def test_a_queue_that_was_deleted_is_made_again(program: Program) -> None:
    program.app.wait(program.broker.queues.delete("work", force=True))
    assert program.stored() == 0
    program.say.enqueue_sync("again")
    assert program.stored() == 1


async def test_who_watches_is_told(program: Program) -> None:
    other = SQLiteBroker(program.path, timeout=20.0)
    async with other.statuses.watch():
        watched = await asyncio.to_thread(program.say.enqueue_sync, "watched")
        await asyncio.to_thread(program.say.options(store_result=False).enqueue_sync, "silent")
        with closing(sqlite3.connect(program.path)) as database:
            assert database.execute("SELECT id FROM record").fetchall() == [(watched.id,)]
    await other.close()


def test_closing_beside_threads_loses_nothing(program: Program) -> None:
    threads, raised = in_threads(4, lambda _: [program.say.enqueue_sync("x") for _ in range(50)])
    for _ in range(10):
        time.sleep(0.01)
        program.app.close_sync()
    join(threads)
    assert raised == []
    assert program.stored() == 201


async def test_a_running_loop_is_refused_as_before(program: Program) -> None:
    with pytest.raises(RuntimeError, match="await the asynchronous method instead"):
        program.say.enqueue_sync("it would block")
    assert program.stored() == 1


async def test_who_is_interrupted_leaves_the_others_theirs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in the thread that wrote for two: the other one's task is stored by itself."""
    commit, interrupted = Writer._commit, threading.Event()

    def interrupting(self: Writer, requests: Any) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        commit(self, requests)

    with program.writer._turn:
        threads, raised = in_threads(2, lambda number: program.say.enqueue_sync(str(number)))
        await until(lambda: len(program.writer._here) == 2, "both wait for their turn")
        monkeypatch.setattr(Writer, "_commit", interrupting)
    join(threads)
    assert [type(error) for error in raised] == [KeyboardInterrupt]
    assert program.stored() == 2
