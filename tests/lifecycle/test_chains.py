"""Chains by real workers: through two queues, past a dead step, cancelled, and with whoever runs them killed."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from leveret import TaskFailed, TaskNotFound
from leveret.model import STEPS, Envelope
from tests.support import ledger_app
from tests.support.ledger_app import spell, spell_elsewhere, spell_when_released
from tests.support.waiting import PATIENCE, wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from leveret import Chain, ChainHandle
    from tests.conftest import Place
    from tests.support.client import Client

#: Workers are killed so often in the end.
_KILLS = 4
_CHAINS, _WORD = 25, "leveret"


def on(place: Place, work: Coroutine[Any, Any, Any]) -> Any:
    """Run something with the application on that broker."""

    async def run() -> Any:
        try:
            return await work
        finally:
            await ledger_app.app.close()

    ledger_app.app.client.connect_to(place.url)
    return asyncio.run(run())


def goes_on(ledger: Ledger, seen: int) -> bool:
    """Whether more has run than was seen, or all chains have ended."""
    return len(ledger.lines()) > seen or ledger.count(f"spelt {_WORD} ") >= _CHAINS


def test_a_dead_step_waits_and_goes_on(place: Place, ledger: Ledger) -> None:
    """Through two queues; whoever waits hears of the dead step, and ``leveret dead retry`` lets the chain go on."""
    chain = spell.step("", "a") | spell_elsewhere.step("b") | spell_when_released.step("c") | spell.step("d")

    async def begin() -> ChainHandle[str]:
        handle = await chain.enqueue()
        with suppress(TaskFailed):
            await handle.result(PATIENCE)
            raise AssertionError("a step is dead, and the chain has a result")
        status = await handle.status()
        assert (status.state, status.id) == ("dead", f"{handle.id}.3")
        return handle

    with Worker(place.url, ledger, "--processes", "1"):
        handle = on(place, begin())
        assert ledger.count("spelt abcd") == 0
        ledger.release("released")
        assert "1" in leveret("dead", "retry", "work", f"{handle.id}.3", "--url", place.url)
        assert on(place, handle.result(PATIENCE)) == "abcd"


def test_what_follows_a_cancelled_step_never_runs(place: Place, ledger: Ledger) -> None:
    """One that runs is ended, and the chain with it."""

    async def cancel() -> None:
        handle = await (ledger_app.pause.step("long", 60.0) | spell.step("a", "b").immutable()).enqueue()
        await asyncio.to_thread(ledger.wait_for, "start long")
        status = await handle.cancel(timeout=PATIENCE)
        assert (status.state, status.id) == ("cancelled", f"{handle.id}.1")
        with suppress(TaskNotFound):
            await handle.steps[1].status()
            raise AssertionError("the step after a cancelled one is there")

    with Worker(place.url, ledger, "--processes", "1"):
        on(place, cancel())


def test_a_foreign_first_step(place: Place, client: Client, ledger: Ledger) -> None:
    """A producer in another language sends the steps that follow in a header; what makes no sense is a dead letter."""
    step = {"task": spell_elsewhere.name, "queue": "other", "args": ["b"]}
    name = spell.name
    body = json.dumps({"args": ["", "a"]}).encode()
    missing = {**step, "task": "no.such.task"}
    with Worker(place.url, ledger, "--processes", "1").ready():
        client.publish_many(
            [
                Envelope("good", "work", name, body, headers={STEPS: json.dumps([step])}),
                Envelope("bad", "work", name, body, headers={STEPS: json.dumps([{**step, "joins": 3}])}),
                Envelope("unknown", "work", name, body, headers={STEPS: json.dumps([missing, step])}),
            ]
        )
        ledger.wait_for("spelt ab good.2")
        (dead,) = client.wait_until_dead("work", 1)
        assert dead.envelope.id == "bad"
        assert "joins" in dead.reason
        (dead,) = client.wait_until_dead("other", 1)
        assert dead.envelope.id == "unknown.2"
        assert "no.such.task" in dead.reason


def test_nothing_is_lost_when_workers_and_children_are_killed(place: Place, ledger: Ledger) -> None:
    """Every chain comes to its end, each of its steps runs, and what runs twice has one id."""
    chain: Chain[str] = spell.step("", _WORD[0])
    for letter in _WORD[1:]:
        chain |= spell.step(letter)

    async def begin() -> list[ChainHandle[str]]:
        return [await chain.enqueue() for _ in range(_CHAINS)]

    async def results(handles: list[ChainHandle[str]]) -> list[str]:
        return [await handle.result(PATIENCE) for handle in handles]

    handles = on(place, begin())
    workers = [Worker(place.url, ledger, "--processes", "1", "--concurrency", "2").ready() for _ in range(2)]
    try:
        for number in range(_KILLS):
            wait_until(partial(goes_on, ledger, len(ledger.lines())), "chains go on")
            if number % 2:
                with suppress(ProcessLookupError):
                    os.kill(int(ledger.lines()[-1].split()[-1]), signal.SIGKILL)
            else:
                workers.pop(0).kill()
                workers.append(Worker(place.url, ledger, "--processes", "1", "--concurrency", "2").ready())
        assert on(place, results(handles)) == [_WORD] * _CHAINS
    finally:
        for worker in workers:
            worker.kill()
    spelt = {(word, id_) for _, word, id_, _ in map(str.split, ledger.lines_of("spelt"))}
    assert spelt == {
        (_WORD[:number], f"{handle.id}.{number}") for handle in handles for number in range(1, len(_WORD) + 1)
    }
