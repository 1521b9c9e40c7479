"""The application that the dashboard is looked at with: a shop's tasks, that go on when the test says so."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from leveret import App, Queue, cron, current_task, every

app = App(queues=[Queue("work"), Queue("other")])


def _gate(name: str) -> Path:
    return Path(f"{os.environ['LEDGER']}.{name}")


@app.task(queue="work")
async def resize(path: str, width: int) -> dict[str, object]:
    await asyncio.sleep(0.005 + width / 4_000)
    return {"path": path, "width": width, "bytes": width * 91}


@app.task(queue="work")
async def import_orders(file: str, rows: int) -> int:
    """Goes half the way, and the rest when it is told."""
    for number in range(rows):
        if number == rows // 2:
            while not _gate("orders").exists():  # noqa: ASYNC110 - by a test
                await asyncio.sleep(0.02)
        current_task().progress(number + 1, rows, f"{file}, row {number + 1}")
    return rows


@app.task(queue="work", max_attempts=2, backoff=0)
async def send_invoice(customer: str, password: str) -> str:
    if not _gate("mail").exists():
        raise ConnectionRefusedError(f"mail.example:25 refused {customer} with a password of {len(password)}")
    return "sent"


@app.task(
    queue="other",
    schedule={
        "monthly report": cron("30 2 1 * *", tz="Europe/Berlin").with_args("last"),
        "report so far": every(days=30, jitter=600).with_args(month="this"),
    },
)
async def nightly_report(month: str) -> str:
    return month
