"""Workers' applications: one with a hundred schedules of which none falls due, and one without any."""

from __future__ import annotations

from benchmarks.peers.producing import queue, url
from leveret import App, cron, current_task, every

SCHEDULES = 100
app, without = App(url(), queues=()), App(url(), queues=())
#: Half of them by elapsed time, half by the clock of a zone: each once a year.
_YEARLY = {
    f"report-{number}": every(days=365) if number % 2 else cron(f"{number % 60} 3 29 2 *", tz="Europe/Berlin")
    for number in range(SCHEDULES)
}


@app.task(queue=queue(), schedule=_YEARLY)
async def report() -> str:
    return current_task().id


@without.task(name="report", queue=queue())
async def unscheduled() -> str:
    return current_task().id
