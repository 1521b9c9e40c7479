"""An application with schedules in its code. Each run notes its id, its instant, and how late it is."""

from __future__ import annotations

import os
import time
from pathlib import Path

from leveret import App, current_task, every

app = App()


def note(text: str) -> None:
    with Path(os.environ["LEDGER"]).open("a") as ledger:
        ledger.write(f"{text}\n")


def scheduled() -> float:
    """The instant of this task (Unix time)."""
    instant = current_task().scheduled_for
    assert instant is not None
    return instant.timestamp()


@app.task(queue="work", schedule=every(seconds=1, overlap="allow"))
async def tick() -> None:
    instant = scheduled()
    note(f"tick {instant:.0f} {current_task().id} {time.time() - instant:.3f}")


@app.task(queue="work")
async def digest(number: int) -> None:
    instant = scheduled()
    note(f"digest-{number} {instant:.0f} {current_task().id} {time.time() - instant:.3f}")
