"""Registrations in an SQLite file whose consumer is gone: the living find each, whatever became of its bell."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sqlite3
import sys
import time
import weakref
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Any

import pytest

from leveret.brokers.sqlite.registrations import Registrations
from leveret.brokers.sqlite.wakeup import WakeUp, WakeUps
from leveret.errors import BrokerUnavailable, LeaseLost
from leveret.model import Succeeded
from leveret.model.status import started
from leveret.testing.bench import batches_of
from tests.support.waiting import until
from tests.unit.brokers.sqlite.test_sqlite import WORK, counts, envelope, locked, names, next_batch, opened, remove

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from leveret.brokers import Consumer
    from leveret.brokers.sqlite import SQLiteBroker
    from leveret.model import Delivery


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "leveret.db"


def folder(path: Path) -> Path:
    return path.with_name("leveret.db-consumers")


def registered(path: Path) -> list[str]:
    """The bells that the file has."""
    with closing(sqlite3.connect(path)) as database:
        return sorted(bell for (bell,) in database.execute("SELECT bell FROM consumer"))


async def all_come(broker: SQLiteBroker, consumer: Consumer, count: int) -> None:
    """Nobody else has any of them: this consumer gets all, one after the other."""
    batches = batches_of(consumer)
    for _ in range(count):
        (delivery,) = await next_batch(batches)
        await broker.settle([(delivery, Succeeded())])
    assert await counts(broker) == (0, 0, 0)


async def taken(consumer: Consumer, count: int) -> Sequence[Delivery]:
    deliveries: list[Delivery] = []
    batches: AsyncIterator[Sequence[Delivery]] = batches_of(consumer)
    while len(deliveries) < count:
        deliveries += await next_batch(batches)
    return deliveries


async def test_a_consumer_that_cannot_say_goodbye_is_found(path: Path) -> None:
    """Another program keeps the file locked when it leaves, so what it had is still its own."""
    async with opened(path, WORK) as broker, opened(path, timeout=0.2) as other:
        await broker.publish([envelope() for _ in range(4)])
        async with broker.consume([WORK], credit=1) as living:
            leaving = other.consume([WORK], credit=3)
            await taken(await leaving.__aenter__(), 3)
            with locked(path), pytest.raises(BrokerUnavailable):
                await leaving.__aexit__(None, None, None)
            assert len(registered(path)) == 2
            await all_come(broker, living, 4)


async def test_a_registration_that_nobody_waits_for_is_taken_back(path: Path) -> None:
    """A worker that is stopped while it registers: its request may have been taken up already."""
    async with opened(path, WORK) as broker, opened(path, WORK) as other:
        async with broker.consume([WORK], credit=1) as living:
            opening = asyncio.ensure_future(registers_unheard(other))
            await opening

            async def is_alone() -> bool:
                return len(registered(path)) == 1

            await until(is_alone, "the registration is gone")
            await broker.publish([envelope() for _ in range(4)])
            await all_come(broker, living, 4)
        assert await other._writer.do(lambda store: store.recipients.receivers()) == []
        assert names(folder(path)) == []


async def registers_unheard(broker: SQLiteBroker) -> None:
    """Cancelled when its registration is being written."""
    opening: asyncio.Future[Any]
    original = Registrations.register
    loop = asyncio.get_running_loop()

    def register(self: Registrations, *args: Any, **kwargs: Any) -> int:
        number = original(self, *args, **kwargs)
        asyncio.run_coroutine_threadsafe(cancel(), loop).result(60)
        return number

    async def cancel() -> None:
        opening.cancel()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Registrations, "register", register)
        opening = asyncio.ensure_future(broker.consume([WORK], credit=3).__aenter__())
        await asyncio.wait([opening])
    assert opening.cancelled()


LEAVES = """
import asyncio, os, signal, sys
from pathlib import Path
from leveret.brokers.sqlite import SQLiteBroker
from leveret.brokers.sqlite.registrations import Registrations
from leveret.model import Queue

folder = Path(sys.argv[1]).with_name("leveret.db-consumers")
others = set(folder.iterdir())

def die(self, consumer):
    (bell,) = set(folder.iterdir()) - others
    bell.unlink()
    os.kill(os.getpid(), signal.SIGKILL)

async def main():
    broker = SQLiteBroker(Path(sys.argv[1]), timeout=20)
    async with broker.consume([Queue("work")], credit=3) as consumer:
        async for _ in consumer:
            break
        Registrations.leave = die

asyncio.run(main())
"""


async def test_a_process_that_died_when_its_bell_was_down_is_found(path: Path) -> None:
    async with opened(path, WORK) as broker:
        await broker.publish([envelope() for _ in range(4)])
        async with broker.consume([WORK], credit=1) as living:
            process = await asyncio.create_subprocess_exec(sys.executable, "-c", LEAVES, str(path))
            assert await process.wait() == -signal.SIGKILL
            await all_come(broker, living, 4)


async def test_a_broker_that_is_closed_hands_back_what_its_consumers_have(path: Path) -> None:
    """At once, and not only when another consumer looks; leaving the consumer then has nothing to do."""
    async with opened(path, WORK) as broker, opened(path) as other:
        await broker.publish([envelope() for _ in range(3)])
        async with other.consume([WORK], credit=3) as leaving:
            batches = batches_of(leaving)
            deliveries = await next_batch(batches)
            await other.close()
            assert registered(path) == []
            with pytest.raises(StopAsyncIteration):
                await next_batch(batches)
        with pytest.raises(LeaseLost):
            await other.settle([(deliveries[0], Succeeded())])
        assert await counts(broker) == (3, 0, 0)
        assert names(folder(path)) == []


async def test_a_consumer_whose_bell_was_deleted_hangs_it_again(path: Path) -> None:
    """Before another one looks and takes it for dead: what it runs stays its own."""
    async with opened(path, WORK) as broker, opened(path) as other, broker.consume([WORK], credit=1) as consumer:
        await broker.publish([envelope()])
        (delivery,) = await taken(consumer, 1)
        bells_before = names(folder(path))
        reading = asyncio.ensure_future(anext(batches_of(consumer)))
        remove(folder(path))

        async def hangs() -> bool:
            return folder(path).exists() and names(folder(path)) == bells_before

        await until(hangs, "the bell hangs again")
        async with other.consume([WORK], credit=1):
            assert await counts(other) == (0, 1, 0)
            await broker.publish([envelope()])
            await broker.settle([(delivery, Succeeded())])
        assert len(await reading) == 1


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """That its bell was deleted is seen by others before the consumer looks for it."""
    monkeypatch.setattr(WakeUp, "is_there", True)


@pytest.mark.usefixtures("unseen")
async def test_a_consumer_whose_bell_was_deleted_registers_again(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Somebody tidied up. The others take it for dead and have its tasks; it gets a new bell and goes on."""
    async with opened(path, WORK) as broker, opened(path) as other, broker.consume([WORK], credit=1) as consumer:
        batches = batches_of(consumer)
        await broker.publish([envelope(body=b"1")])
        (lost,) = await next_batch(batches)
        remove(folder(path))
        assert await counts(other) == (1, 0, 0)
        (again,) = await next_batch(batches)
        assert (again.envelope.id, again.returns, again.lease.held) == (lost.envelope.id, 1, True)
        assert not lost.lease.held
        with pytest.raises(LeaseLost):
            await broker.settle([(lost, Succeeded())])
        await broker.settle([(again, Succeeded())])
        assert len(names(folder(path))) == 1
        assert await counts(other) == (0, 0, 0)
    assert "registering again" in caplog.text


@pytest.mark.usefixtures("unseen")
async def test_a_consumer_that_cannot_register_again_at_once_tries_again(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file may be locked in that moment, as in any other; a worker does not end for that."""
    refusals = [BrokerUnavailable("locked just now")] * 2
    original = Registrations.register

    def register(*args: Any, **kwargs: Any) -> int:
        if refusals:
            raise refusals.pop()
        return original(*args, **kwargs)

    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        monkeypatch.setattr(Registrations, "register", register)
        remove(folder(path))
        await broker.queues.stats()
        await broker.publish([envelope()])
        assert len(await next_batch(batches_of(consumer))) == 1
    assert refusals == []


@pytest.mark.usefixtures("unseen")
async def test_a_consumer_that_is_left_while_it_registers_again_is_gone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would be dealt tasks for as long as its process lives."""
    original = Registrations.register
    async with opened(path, WORK) as broker:
        async with AsyncExitStack() as left:
            consumer = await left.enter_async_context(broker.consume([WORK], credit=1))
            leaving: list[asyncio.Future[None]] = []
            loop = asyncio.get_running_loop()

            def register(self: Registrations, *args: Any, **kwargs: Any) -> int:
                asyncio.run_coroutine_threadsafe(leave(), loop).result(60)
                return original(self, *args, **kwargs)

            async def leave() -> None:
                leaving.append(asyncio.ensure_future(left.aclose()))
                await asyncio.sleep(0)

            remove(folder(path))
            await broker.queues.stats()
            monkeypatch.setattr(Registrations, "register", register)
            with pytest.raises(StopAsyncIteration):
                await next_batch(batches_of(consumer))
            await asyncio.gather(*leaving)
        assert registered(path) == []
        assert names(folder(path)) == []


async def test_a_consumer_without_its_bell_still_looks_by_itself(path: Path) -> None:
    """A lost ring delays a task; it does not lose it."""
    async with opened(path, WORK) as broker, broker.consume([WORK], credit=1) as consumer:
        remove(folder(path))
        await broker.publish([envelope()])
        assert len(await next_batch(batches_of(consumer))) == 1


async def test_a_watch_goes_on_when_its_bell_was_deleted(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though each look at the file by another program takes it for dead again."""
    monkeypatch.setattr("leveret.brokers.sqlite.watcher._ROUND", 0.05)
    async with opened(path, WORK) as broker, opened(path) as other, broker.statuses.watch() as watch:
        remove(folder(path))
        await other.queues.stats()  # sweeps it away

        async def is_back() -> bool:
            return folder(path).exists() and names(folder(path)) == registered(path) != []

        await until(is_back, "it is registered with a bell that hangs")
        await other.queues.stats()
        assert names(folder(path)) == registered(path) != []
        told = started(envelope(), "task", time.time())
        await other.statuses.notify([told])
        async with asyncio.timeout(60):
            assert [status.id for status in await anext(watch)] == [told.id]


async def test_a_bell_without_a_registration_is_removed_when_it_is_old(path: Path) -> None:
    """Its process was killed between the two. One that is young may be about to register."""
    async with opened(path, WORK) as broker:
        async with broker.consume([WORK], credit=1):
            pass
        left, young = folder(path) / "left", folder(path) / "young"
        for bell in (left, young):
            os.mkfifo(bell)
        os.utime(left, (1.0, 1.0))
        held = WakeUps(path).make()
        os.utime(folder(path) / held.name, (1.0, 1.0))
        async with broker.consume([WORK], credit=1):
            there = names(folder(path))
            assert "left" not in there
            assert {"young", held.name} <= set(there)
        held.remove()


def test_bells_that_are_down_leave_nothing_behind(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is to be done after a fork cannot be taken back, so it must not be one thing for each bell."""
    registered_: list[Any] = []
    monkeypatch.setattr(os, "register_at_fork", lambda **callbacks: registered_.append(callbacks))
    held = [WakeUps(path).make() for _ in range(3)]
    left = [weakref.ref(one) for one in held]
    for one in held:
        one.remove()
    del one, held
    gc.collect()
    assert registered_ == []
    assert [one() for one in left] == [None] * 3
