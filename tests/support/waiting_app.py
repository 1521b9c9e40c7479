"""An application whose tasks wait for others, or leave something unfinished behind."""

from __future__ import annotations

import asyncio
import os
import signal

from leveret import App, Queue, gather_results
from tests.support.ledger_app import note

app = App(queues=[Queue("work"), Queue("other")])


@app.task(queue="work")
async def part(text: str) -> str:
    note(f"part {text}")
    return text


@app.task(queue="work")
async def whole(text: str, how: str) -> str:
    note(f"whole {text}")
    handle = await part.enqueue(text)
    if how == "gather":
        (result,) = await gather_results([handle])
    else:
        result = await handle.result()
    note(f"got {result}")
    return result


async def _later(text: str, seconds: float) -> None:
    await asyncio.sleep(seconds)
    note(f"later {text}")


_kept: list[object] = []


@app.task(queue="work")
async def fire_and_forget(text: str, seconds: float) -> None:
    _kept.append(asyncio.create_task(_later(text, seconds)))
    note(f"fired {text}")


@app.task(queue="work", max_attempts=1)
def alarm() -> None:
    signal.alarm(1)
    note(f"alarm {os.getpid()}")
    signal.pause()


@app.task(queue="work", max_attempts=1)
def leave_orphans(count: int) -> None:
    """Each ends, and its parent had ended before."""
    for _ in range(count):
        middle = os.fork()
        if middle == 0:
            orphan = os.fork()
            if orphan == 0:
                os._exit(0)
            note(f"orphan {orphan}")
            os._exit(0)
        os.waitpid(middle, 0)
    note("left orphans")
