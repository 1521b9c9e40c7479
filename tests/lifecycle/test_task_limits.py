"""Limits, with real workers that are killed: never too many at once, none too soon, and nothing waits for nothing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support import limits_app
from tests.support.client import Client
from tests.support.waiting import until, wait_until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from leveret.model import LimitUse
    from tests.conftest import Place

APP = f"{Path(limits_app.__file__)}:app"
#: As `limits_app` has it.
FEW = 3


def most_at_once(ledger: Ledger, kind: str) -> int:
    """Of the runs that began and ended. Those of workers that were killed end when the same task begins again."""
    moments = []
    for line in ledger.lines():
        what, *name, at = line.split()
        if name[:1] == [kind]:
            moments.append((float(at), what, " ".join(name)))
    running: set[str] = set()
    most = 0
    for _, what, run in sorted(moments):
        if what == "end":
            running.discard(run)
        else:
            running.add(run)
        most = max(most, len(running))
    return most


async def uses(place: Place) -> dict[str, LimitUse]:
    broker = place.open()
    try:
        return {one.row.name: one for one in await broker.limits.read()}
    finally:
        await broker.close()


def worker(place: Place, ledger: Ledger, *options: str) -> Worker:
    return Worker(place.url, ledger, *options, app=APP)


def test_never_more_at_once_whoever_is_killed(place: Place, ledger: Ledger) -> None:
    client = Client(place.url, limits_app.app)
    workers = [worker(place, ledger).ready() for _ in range(3)]
    try:
        client.enqueue_many(limits_app.under_few, [(number,) for number in range(150)])
        for kill in range(3):
            ledger.wait_for("end few", 30 * (kill + 1))
            workers[kill % 3].kill_group()
            workers[kill % 3] = worker(place, ledger).ready()
        wait_until(lambda: len({line.split()[2] for line in ledger.lines_of("end few")}) == 150, "all have ended")
        client.wait_until_empty("work")
    finally:
        for one in workers:
            one.kill_group()
    assert most_at_once(ledger, "few") == FEW
    found = asyncio.run(uses(place))
    assert (found["few"].admitted, found["few"].waiting) == (0, 0)


def test_what_waits_keeps_nobody_else_up(place: Place, ledger: Ledger) -> None:
    """One tenant's tasks take long, and one at a time; other tenants', and what has no limit, pass them."""
    client = Client(place.url, limits_app.app)
    client.enqueue_many(limits_app.under_both, [("slow", number, 2.0) for number in range(5)])
    client.enqueue_many(limits_app.under_both, [("quick", number) for number in range(5)])
    client.enqueue_many(limits_app.free, [(number,) for number in range(5)])
    with worker(place, ledger, "--concurrency", "2").ready():
        ledger.wait_for("free", 5)
        ledger.wait_for("end both quick", 5)
        assert ledger.count("start both slow") <= 2
        assert ledger.count("end both slow") <= 1


def test_a_queue_serves_tenants_in_turn_and_so_many_at_once(place: Place, ledger: Ledger) -> None:
    client = Client(place.url, limits_app.app)
    client.enqueue_many(limits_app.render, [("many", number) for number in range(30)])
    client.enqueue_many(limits_app.render, [("few", number) for number in range(3)])
    with worker(place, ledger).ready():
        ledger.wait_for("end render few", 3)
        assert ledger.count("start render many") < 15
        ledger.wait_for("end render many", 30)
    assert most_at_once(ledger, "render") == 2


def test_no_stretch_of_time_has_more_than_the_rate(place: Place, ledger: Ledger) -> None:
    client = Client(place.url, limits_app.app)
    workers = [worker(place, ledger).ready() for _ in range(2)]
    try:
        began = time.time()
        client.enqueue_many(limits_app.at_a_rate, [(number,) for number in range(61)])
        ledger.wait_for("rated", 61)
        took = time.time() - began
    finally:
        for one in workers:
            one.kill_group()
    starts = sorted(float(line.split()[-1]) for line in ledger.lines_of("rated"))
    most = max(sum(start <= other < start + 1 for other in starts) for start in starts)
    # The ledger has the moment of the task's own first line, which comes after its start by what the worker needs.
    assert most <= 20 + 3
    assert took > 2.8


def test_a_task_that_is_told_to_wait_is_not_charged_and_its_key_rests(place: Place, ledger: Ledger) -> None:
    client = Client(place.url, limits_app.app)
    with worker(place, ledger).ready() as one:
        client.enqueue(limits_app.refused_once, "acme", 1)
        ledger.wait_for("call acme 1")
        client.enqueue(limits_app.refused_once, "acme", 2)
        client.enqueue(limits_app.free, 1)
        ledger.wait_for("free 1")
        ledger.wait_for("done acme", 2)
        one.wait_for("put off after")
    calls = [(line.split()[2], line.split()[3], float(line.split()[4])) for line in ledger.lines_of("call acme")]
    assert {attempt for _, attempt, _ in calls} == {"1"}
    assert calls[1][2] - calls[0][2] > 1.4
    assert sorted(number for number, _, _ in calls) == ["1", "1", "2"]


async def test_a_limit_is_steered_from_the_command_line(place: Place, ledger: Ledger) -> None:
    """Paused: nothing starts. Set: in force within a second. Reset: as in the code."""
    client = Client(place.url, limits_app.app)

    def limits(*arguments: str) -> str:
        return leveret("limits", *arguments, "--url", place.url)

    with worker(place, ledger).ready():
        assert "few" in await asyncio.to_thread(limits)
        await asyncio.to_thread(limits, "pause", "few")
        await asyncio.to_thread(client.enqueue_many, limits_app.under_few, [(number, 0.3) for number in range(12)])

        async def waiting() -> bool:
            return (await uses(place))["few"].waiting == 12

        await until(waiting, "all wait")
        assert "limited" in await asyncio.to_thread(leveret, "queues", "--url", place.url, "-q", "work")
        assert ledger.count("start few") == 0
        await asyncio.to_thread(limits, "set", "few", "--concurrency", "1")
        await asyncio.to_thread(limits, "resume", "few")
        await asyncio.to_thread(ledger.wait_for, "end few", 2)
        assert most_at_once(ledger, "few") == 1
        await asyncio.to_thread(limits, "set", "few", "--code")
        await asyncio.to_thread(ledger.wait_for, "end few", 12)
        assert most_at_once(ledger, "few") == FEW


def test_a_worker_says_which_limits_are_not_as_in_its_code(place: Place, ledger: Ledger) -> None:
    with worker(place, ledger).ready():
        leveret("limits", "set", "few", "--concurrency", "1", "--url", place.url)
    with worker(place, ledger).ready() as one:
        one.wait_for("limit 'few' is 1 at once, as somebody has set it, and not 3 at once as in the code")


def test_a_reload_brings_changed_limits(place: Place, ledger: Ledger, tmp_path: Path) -> None:
    text = Path(limits_app.__file__).read_text()
    app = tmp_path / "changing_app.py"
    app.write_text(text)
    with Worker(place.url, ledger, app=f"{app}:app").ready() as one:
        app.write_text(text.replace('"FEW", "3"', '"FEW", "7"'))
        one.signal(1)
        one.wait_for("reloaded:")

        def changed() -> bool:
            return asyncio.run(uses(place))["few"].row.rule.concurrency == 7

        wait_until(changed, "the broker has the new rule")
