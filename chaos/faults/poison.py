"""Tasks that kill, fail, or cannot be run at all, among good ones. Each must end as a dead letter with its reason."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

from chaos.app import QUEUE, fail, leave, out_of_memory, segfault
from chaos.faults.fault import Fault
from leveret.model import Envelope, new_id

if TYPE_CHECKING:
    from chaos.stage import Stage
    from leveret.brokers import Broker
    from leveret.client.task import Task

#: How many poisonous tasks each round brings.
_POISONOUS = 3


def poisonous(task: Task[[], Any], stage: Stage) -> None:
    with stage.busy():
        ids: list[str] = []
        for _ in range(min(2, stage.profile.rounds)):
            ids += stage.put(task, [()] * _POISONOUS)
            stage.pause()
        _all_dead(stage, ids)


def unrunnable(name: str | None, body: bytes, stage: Stage) -> None:
    """Messages that no `Task.enqueue` would send."""
    envelopes = [Envelope(new_id(), QUEUE, name, body) for _ in range(_POISONOUS)]

    async def publish(broker: Broker) -> None:
        await broker.publish(envelopes)

    with stage.busy():
        stage.ask(publish)
        ids = [envelope.id for envelope in envelopes]
        stage.book.safe.update(dict.fromkeys(ids, time.time()))
        _all_dead(stage, ids)


def _all_dead(stage: Stage, ids: list[str]) -> None:
    def dead() -> bool:
        stage.dead_letters()
        return stage.dead.issuperset(ids)

    stage.wait_for(dead, "the poisonous tasks are dead letters")
    stage.fault_ended()
    letters = [letter for letter in stage.dead_letters() if letter.envelope.id in ids]
    others = len(stage.dead.difference(ids))
    stage.note = f"{len(ids)} poisonous: {letters[0].reason.splitlines()[0][:90]}"
    if others:
        stage.note += f"; {others} good ones died with them"


def _poison(kind: str, what: str, task: Task[[], Any]) -> Fault:
    return Fault(f"poison-{kind}", what, partial(poisonous, task))


FAULTS = (
    _poison("segfault", "a task that segfaults", segfault),
    _poison("exit", "a task that calls os._exit", leave),
    _poison("killed", "a task whose process the kernel kills, as for want of memory", out_of_memory),
    _poison("raising", "a task that always raises", fail),
    Fault("poison-unknown", "a task that nobody registered", partial(unrunnable, "nobody", b'{"args": []}')),
    Fault("poison-unreadable", "a body that is no JSON", partial(unrunnable, "work", b"\xff\x00{")),
)
