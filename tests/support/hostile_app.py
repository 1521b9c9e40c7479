"""The application for hostile messages: its tasks note the number of the message that they were called by."""

from __future__ import annotations

from typing import Any

from leveret import App, Dead, Queue, Retry
from tests.support.ledger_app import note

app = App(queues=[Queue("work")])


@app.task(queue="work", default=True)
async def swallow(value: Any = None, number: int = -1) -> None:
    """Takes anything."""
    del value
    note(f"ran {number}")


@app.task(queue="work")
def swallow_in_thread(value: Any = None, number: int = -1) -> None:
    del value
    note(f"ran {number}")


@app.task(queue="work")
async def particular(value: dict[str, list[float]], number: int) -> None:
    del value
    note(f"ran {number}")


@app.task(queue="work", max_attempts=2, backoff=0)
async def fail(value: Any = None, number: int = -1) -> None:
    raise ValueError(f"{number}: {value!r}")


@app.task(queue="work")
async def give_up(value: Any = None, number: int = -1) -> None:
    raise Dead(f"{number}: {value!r}")


@app.task(queue="work", max_attempts=2)
async def fail_later(value: Any = None, number: int = -1) -> None:
    del value, number
    raise Retry("not now", delay=0.3)
