"""What happens to limits when workers die, whoever admits tasks among them."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from chaos.faults.fault import Fault
from chaos.limited import MOST, app, five, step
from chaos.stage import ROOT, Hung
from leveret.model import RemoveLimit
from tests.support.workers import READY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from chaos.stage import Stage

_APP = f"{ROOT / 'chaos' / 'limited.py'}:app"
#: How often a worker is killed, if all are ready (seconds): on a busy machine none would ever run a task otherwise.
_EVERY = 2.0
#: How long it may take until no permit is left over (seconds): twice each half minute those of tasks that are nowhere
#: are looked for.
_LEFT_OVER = 120.0


def workers_killed(stage: Stage) -> None:
    """The oldest worker is killed again and again, with its children, until all tasks are done."""
    kills, kill_at = 0, 0.0

    def are_done() -> bool:
        nonlocal kills, kill_at
        if time.monotonic() >= kill_at and all(READY in worker.output for worker in stage.workers):
            stage.workers.pop(0).kill_group()
            stage.fault_ended()
            stage.add_worker(app=_APP)
            kills, kill_at = kills + 1, time.monotonic() + _EVERY
        return not stage.book.undone()

    try:
        for _ in range(stage.profile.limited_workers):
            stage.add_worker(app=_APP)
        stage.wait_until_ready()
        began = time.monotonic()
        stage.book.safe.update(dict.fromkeys(asyncio.run(_enqueue(stage)), time.time()))
        stage.wait_for(lambda: len(stage.book.tasks) > MOST, "the first tasks have begun")
        stage.wait_for(are_done, "all tasks are done")
        took = time.monotonic() - began
        asyncio.run(_none_left(stage))
        stage.drain()
        stage.stop_workers()
        # The node is used again.
        stage.ask(lambda broker: broker.limits.ask(RemoveLimit(five.name)))
    finally:
        stage.close()
    most = most_at_once(stage.book.runs.read_text().splitlines())
    stage.note = f"{kills} workers killed in {took:.0f} s; {most} of {MOST} at once at the most, no permit left over"
    if most > MOST:
        raise Hung(f"{most} tasks were under way at once, of {MOST}")


def most_at_once(lines: Sequence[str]) -> int:
    """How many tasks ran at once, by a ledger. One whose worker was killed runs until it has run again."""
    running: set[str] = set()
    most = 0
    for line in lines:
        word, id_, *_ = line.split()
        if word == "start":
            running.add(id_)
            most = max(most, len(running))
        else:
            running.discard(id_)
    return most


async def _enqueue(stage: Stage) -> list[str]:
    app.client.connect_to(stage.url)
    try:
        return [handle.id for handle in await step.enqueue_many([()] * stage.profile.limited)]
    finally:
        await app.close()


async def _none_left(stage: Stage) -> None:
    """Raises Hung if a permit is left over."""
    app.client.connect_to(stage.url)
    try:
        deadline = time.monotonic() + _LEFT_OVER
        while (use := await five.use()).admitted or use.waiting:
            if time.monotonic() > deadline:
                raise Hung(f"{use.admitted} permits are left over, and {use.waiting} tasks wait for one")
            await asyncio.sleep(0.1)
    finally:
        await app.close()


FAULTS = (
    Fault("limited-killed", f"a limit of {MOST}; kill -9 of a worker every 2 s, until all is done", workers_killed),
)
