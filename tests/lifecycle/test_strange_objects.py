"""Exceptions, results and retry rules that do what none should, in a real worker: none takes its child along."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from leveret.client import load_app
from tests.support import strange_app
from tests.support.waiting import until
from tests.support.workers import Worker

if TYPE_CHECKING:
    from leveret import Status
    from tests.conftest import Place
    from tests.support.workers import Ledger

REFERENCE = f"{Path(strange_app.__file__)}:app"
_ENDED = ("succeeded", "dead", "retrying", "delayed")


def test_each_ends_in_one_outcome_and_the_child_lives(place: Place, ledger: Ledger) -> None:
    """With all of them at once, and a neighbour before and after them."""
    app = load_app(REFERENCE)
    app.client.connect_to(place.url)

    async def run() -> tuple[int, list[Status], int]:
        async with app:
            tasks = {task.name: task for task in app.tasks}
            neighbour = tasks.pop("neighbour")
            first = await (await neighbour.enqueue()).result(timeout=60)
            handles = [await task.enqueue() for task in tasks.values()]

            async def ended() -> bool:
                return all([(await handle.status()).state in _ENDED for handle in handles])

            await until(ended, "each has ended", within=60)
            statuses = [await handle.status() for handle in handles]
            return first, statuses, await (await neighbour.enqueue()).result(timeout=60)

    with Worker(place.url, ledger, "--concurrency", "100", app=REFERENCE) as worker:
        worker.ready()
        before, statuses, after = asyncio.run(run())

    assert before == after, worker.output
    assert {status.task for status in statuses if status.state == "succeeded"} == set(strange_app.ENDING)
    assert "a child process" not in worker.output
