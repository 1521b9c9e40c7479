"""Waiting for a task of which nothing is known ends, and not for one whose enqueue is on its way."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from leveret import App, TaskNotFound, as_finished, gather_results
from leveret.client import handle
from leveret.executors.in_process import InProcessExecutor
from leveret.worker.worker import Worker
from tests.support import loop_app
from tests.support.workers import Program
from tests.support.workers import Worker as WorkerProgram

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence
    from pathlib import Path

    from leveret import Handle
    from leveret.brokers import Broker
    from leveret.model import Envelope
    from tests.conftest import Place
    from tests.support.workers import Ledger

LIMIT = 60.0
#: One that Leveret could have made in 2023.
OLD = f"{1_700_000_000_000:012x}{'0' * 20}"


def application() -> App:
    app = App("memory://")

    @app.task
    async def double(number: int) -> int:
        return 2 * number

    return app


@asynccontextmanager
async def working(broker: Broker) -> AsyncGenerator[App]:
    """An application that enqueues to the broker, and a worker of it; the broker is closed with them."""
    app = application()
    with app.client.enqueuing_to(broker):
        worker = Worker(InProcessExecutor(app, concurrency=2), broker=broker)
        running = asyncio.create_task(worker.run())
        try:
            yield app
        finally:
            worker.stop()
            await running
            await broker.close()


async def read_out(known: Handle[object]) -> None:
    async for _ in known.updates():
        pass


@pytest.mark.parametrize("id_", ["order-17", OLD])
async def test_a_task_that_does_not_exist(any_place: Place, id_: str) -> None:
    broker = any_place.open()
    app = application()
    (double,) = app.tasks
    with app.client.enqueuing_to(broker):
        waits = [
            app.handle(id_).result(),
            double.handle(id_).result(LIMIT),
            read_out(app.handle(id_)),
            app.handle(id_).cancel(),
            gather_results([await double.enqueue(1), app.handle(id_)]),
            anext(as_finished([app.handle(id_)])),
        ]
        for raised in await asyncio.gather(*waits, return_exceptions=True):
            assert isinstance(raised, TaskNotFound), raised
            assert f"nothing is known of task {id_!r}" in str(raised)
    await broker.close()


async def test_a_task_that_is_stored_while_others_wait_for_it(any_place: Place) -> None:
    producer, asker = any_place.open(), any_place.open()
    app, other = application(), application()
    (double,) = app.tasks
    with app.client.enqueuing_to(producer), other.client.enqueuing_to(asker):
        worker = Worker(InProcessExecutor(app, concurrency=2), broker=producer)
        working = asyncio.create_task(worker.run())
        waiting = [asyncio.create_task(one.handle("order-1").result(LIMIT)) for one in (app, other)]
        listed = asyncio.create_task(gather_results([other.handle("order-1")], timeout=LIMIT))
        await asyncio.sleep(0)
        await double.options(id="order-1").enqueue(21)
        assert await asyncio.gather(*waiting) == [42, 42]
        assert await listed == [42]
        worker.stop()
        await working
    for broker in (producer, asker):
        await broker.close()


async def test_a_task_that_this_program_takes_long_to_store(any_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handle, "UNKNOWN", 0.1)
    broker = any_place.open()
    gate, asked = asyncio.Event(), asyncio.Event()
    publish, read = broker.publish, broker.statuses.read

    async def publish_later(envelopes: Sequence[Envelope]) -> None:
        await gate.wait()
        await publish(envelopes)

    async def ask(ids: Sequence[str]) -> Sequence[object]:
        found = await read(ids)
        asked.set()
        return found

    monkeypatch.setattr(broker, "publish", publish_later)
    monkeypatch.setattr(broker.statuses, "read", ask)
    async with working(broker) as app:
        (double,) = app.tasks
        enqueuing = asyncio.create_task(double.options(id="order-2").enqueue(21))
        waiting = asyncio.create_task(app.handle("order-2").result(LIMIT))
        await asyncio.wait_for(asked.wait(), LIMIT)
        gate.set()
        await enqueuing
        assert await waiting == 42


async def test_a_task_that_is_stored_while_it_is_asked_for(any_place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer was given before the task was stored, and comes after."""
    monkeypatch.setattr(handle, "UNKNOWN", 0.1)
    broker = any_place.open()
    gate = asyncio.Event()
    publish, read = broker.publish, broker.statuses.read

    async def publish_later(envelopes: Sequence[Envelope]) -> None:
        await gate.wait()
        await publish(envelopes)

    async def ask(ids: Sequence[str]) -> Sequence[object]:
        found = await read(ids)
        gate.set()
        await enqueuing
        return found

    monkeypatch.setattr(broker, "publish", publish_later)
    monkeypatch.setattr(broker.statuses, "read", ask)
    async with working(broker) as app:
        (double,) = app.tasks
        enqueuing = asyncio.create_task(double.options(id="order-3").enqueue(21))
        assert await app.handle("order-3").result(LIMIT) == 42


PROGRAM = """
import asyncio, sys
sys.path.insert(0, {folder!r})
from loop_app import app, loop

async def main():
    handle = await loop.enqueue()
    {body}

asyncio.run(main())
"""
BODIES = {
    "a result": "await handle.result()",
    "some updates": "async for status in handle.updates(): break",
    "a timeout": """
    from leveret import ResultTimeout
    try: await handle.result(timeout=0.000001)
    except ResultTimeout: pass""",
    "a task that still waits": """
    global waiting
    waiting = asyncio.create_task(app.handle('no-such').result())
    await handle.result()""",
    "the first of many": """
    from leveret import as_finished
    async for one in as_finished([handle, await loop.enqueue()]): break""",
    "a watch": """
    async with app.client.broker.statuses.watch() as watch:
        await loop.enqueue()
        async for batch in watch: break""",
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_program_that_never_closes_its_application_ends_quietly(
    place: Place, ledger: Ledger, tmp_path: Path, body: str
) -> None:
    folder = loop_app.__file__.rpartition("/")[0]
    program = PROGRAM.format(folder=folder, body=body)
    with WorkerProgram(place.url, ledger, app=f"{loop_app.__file__}:app") as worker:
        worker.ready()
        with Program(["-c", program], tmp_path / "output", {"LEVERET_URL": place.url}) as ended:
            assert ended.exit_code() == 0
            assert ended.output == ""
