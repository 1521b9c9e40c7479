"""Limits on RabbitMQ: real workers that are killed, and whoever admits tasks is among them."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import limited_app
from tests.support.limited_app import app, few, step
from tests.support.waiting import until
from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from tests.conftest import Place

APP = f"{Path(limited_app.__file__)}:app"
#: How many there may be at once, and how often a worker is killed (seconds).
MOST, BETWEEN = 5, 2.0
#: How long all may take (seconds).
LONG = 150.0


def most_at_once(ledger: Ledger) -> int:
    """How many tasks ran at once, by what they wrote. One whose worker was killed runs until it has run again."""
    running: set[str] = set()
    most = 0
    for line in ledger.lines():
        word, number, *_ = line.split()
        if word == "began":
            running.add(number)
            most = max(most, len(running))
        elif word == "ended":
            running.discard(number)
    return most


class Workers:
    """Some at once; the oldest one is killed with its children, and another one begins."""

    def __init__(self, url: str, ledger: Ledger, count: int) -> None:
        self._url, self._ledger = url, ledger
        self._running = [self._start() for _ in range(count)]
        for worker in self._running:
            worker.ready()

    def _start(self) -> Worker:
        return Worker(self._url, self._ledger, "--concurrency", "4", app=APP)

    def kill(self) -> None:
        self._running.pop(0).kill_group()
        self._running.append(self._start())

    def close(self) -> None:
        for worker in self._running:
            worker.kill_group()


async def test_never_more_than_allowed_whoever_is_killed(place: Place, ledger: Ledger) -> None:
    count = 1_500
    app.client.connect_to(place.url)
    workers = Workers(place.url, ledger, 4)
    try:
        await step.enqueue_many([(number,) for number in range(count)])
        kill_at = time.monotonic() + BETWEEN
        deadline = time.monotonic() + LONG
        while len({line.split()[1] for line in ledger.lines_of("ended")}) < count:
            assert time.monotonic() < deadline, f"{ledger.count('ended')} have ended: {await few.use()}"
            if time.monotonic() >= kill_at:
                workers.kill()
                kill_at = time.monotonic() + BETWEEN
            await asyncio.sleep(0.1)

        async def none_are_left() -> bool:
            use = await few.use()
            return (use.admitted, use.waiting) == (0, 0)

        await until(none_are_left, "no permit is left")
    finally:
        workers.close()
        await app.close()
    assert most_at_once(ledger) == MOST
