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


@app.task(queue="work", schedule=every(seconds=1, overlap="allow"))
async def tick() -> None:
    current = current_task()
    assert current.scheduled_for is not None
    instant = current.scheduled_for.timestamp()
    note(f"tick {instant:.0f} {current.id} {time.time() - instant:.3f}")


@app.task(queue="work")
async def digest(number: int) -> None:
    note(f"digest {number} {current_task().id}")
