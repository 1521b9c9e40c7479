"""An application with a lifespan, which does what $LIFESPAN says, and notes when it is entered and left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

from leveret import App, CurrentTask, Queue, current_task
from tests.support.ledger_app import note, tried

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

region: ContextVar[str] = ContextVar("region", default="nowhere")


class Pool:
    """What the tasks share in one process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.is_open = True
        self.breaks = asyncio.Event()


async def _break(pool: Pool) -> None:
    await pool.breaks.wait()
    raise ConnectionError("the pool's keeper is gone")


@asynccontextmanager
async def lifespan(given: App) -> AsyncGenerator[Pool]:
    assert given is app
    how = os.environ.get("LIFESPAN", "")
    if how == "fails":
        raise RuntimeError("no database")
    if how == "hangs":
        await asyncio.sleep(600)
    pool = Pool()
    region.set("north")
    note(f"enter {pool.pid}")
    try:
        async with asyncio.timeout(None), asyncio.TaskGroup() as group:
            keeper = group.create_task(_break(pool))
            yield pool
            keeper.cancel()
    finally:
        pool.is_open = False
        if how == "hangs at its end":
            await asyncio.sleep(600)
        if how == "blocks at its end":
            time.sleep(600)  # noqa: ASYNC251 - the loop does not turn
        if how == "fails at its end":
            raise RuntimeError("no goodbye")
        note(f"leave {pool.pid}")


app = App(queues=[Queue("work")], lifespan=lifespan)


def _used(text: str) -> str:
    task: CurrentTask[Pool] = current_task()
    assert task.state.is_open
    assert task.state.pid == os.getpid()
    return f"used {text} {task.state.pid} {region.get()}"


@app.task(queue="work")
async def use(text: str) -> None:
    note(_used(text))


@app.task(queue="work")
def use_in_a_thread(text: str) -> None:
    note(_used(text))


@app.task(queue="work")
async def stay(text: str) -> None:
    note(f"stay {text} {os.getpid()}")
    await asyncio.sleep(600)


@app.task(queue="work", backoff=0)
async def die() -> None:
    if tried("die") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    note(_used("again"))


@app.task(queue="work", max_attempts=1)
async def break_the_pool() -> None:
    if tried("break") == 1:
        task: CurrentTask[Pool] = current_task()
        task.state.breaks.set()
        await asyncio.sleep(0.2)
        raise ConnectionError("closed")
    note(_used("after the break"))
