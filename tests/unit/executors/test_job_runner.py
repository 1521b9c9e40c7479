"""The crew that runs jobs: what is cancelled, and when."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from leveret import App
from leveret.executors import Finished, Returned, RunRequest
from leveret.executors.attempt import JobRunner, Runner
from leveret.model import Cancelled, Envelope, Succeeded
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.executors import ExecutorEvent
    from leveret.model import Outcome

BEFORE = Cancelled("cancelled before it ran")


class Crewed:
    """One slot, and what was told of its jobs."""

    def __init__(self) -> None:
        self.app = App("memory://")
        self.done: list[str] = []
        self.outcomes: dict[int, Outcome] = {}
        self.returned: list[int] = []
        #: How often it told what it gives back.
        self.answers = 0

        @self.app.task(queue="work")
        async def on_the_loop(text: str) -> None:
            self.done.append(text)

        @self.app.task(queue="work")
        def in_a_thread(text: str) -> None:
            self.done.append(text)

        self.crew = JobRunner(Runner(self.app, concurrency=1), concurrency=1)
        self.crew.report_to(self._take)

    def submit(self, task: str, *keys: int) -> None:
        jobs = [RunRequest(key, Envelope(f"{key}", "work", task, b'{"args": ["%d"]}' % key)) for key in keys]
        self.crew.submit(jobs)

    async def wait_for(self, count: int) -> None:
        async def told() -> bool:
            return len(self.outcomes) >= count

        await until(told, f"{count} jobs have ended, not only {self.outcomes}")

    def _take(self, reports: Sequence[ExecutorEvent]) -> None:
        self.outcomes.update({report.key: report.outcome for report in reports if isinstance(report, Finished)})
        for report in reports:
            if isinstance(report, Returned):
                self.answers += 1
                self.returned += report.keys


@pytest.mark.parametrize("task", ["on_the_loop", "in_a_thread"])
async def test_what_is_cancelled_in_the_turn_in_which_it_comes_costs_no_slot(task: str) -> None:
    """Neither the one that has the slot and has not begun, nor one that waits for it; the next one runs."""
    crewed = Crewed()
    crewed.submit(task, 1, 2, 3)
    crewed.crew.cancel([1, 2])
    await crewed.wait_for(3)
    assert crewed.outcomes == {1: BEFORE, 2: BEFORE, 3: Succeeded(b"null")}
    assert crewed.done == ["3"]
    assert crewed.crew.running_tasks() == []
    crewed.submit(task, 4)
    await crewed.wait_for(4)
    assert crewed.done == ["3", "4"]
    await crewed.crew.stop()


async def test_what_is_cancelled_twice_at_once_is_told_of_once() -> None:
    crewed = Crewed()
    crewed.submit("on_the_loop", 1)
    crewed.crew.cancel([1])
    crewed.crew.cancel([1])
    await crewed.wait_for(1)
    await asyncio.sleep(0)
    assert crewed.outcomes == {1: BEFORE}
    assert crewed.crew.finished == 1
    await crewed.crew.stop()


async def test_what_comes_after_the_stop_does_not_run() -> None:
    """An acknowledgment before the run may end late."""
    crewed = Crewed()
    await crewed.crew.stop()
    crewed.submit("on_the_loop", 1)
    assert not crewed.crew.running_tasks()


async def test_what_waits_is_given_back_and_does_not_run() -> None:
    crewed = Crewed()
    crewed.submit("on_the_loop", 1, 2, 3)
    crewed.crew.recall()
    await crewed.wait_for(1)
    assert (crewed.returned, crewed.done) == ([2, 3], ["1"])
    crewed.submit("on_the_loop", 2)
    await crewed.wait_for(2)
    assert crewed.done == ["1", "2"]
    await crewed.crew.stop()


async def test_what_may_run_once_only_is_not_given_back() -> None:
    """Nor what came before it: the broker has forgotten it, and another worker would never get it."""
    crewed = Crewed()
    envelopes = [Envelope(f"{key}", "work", "on_the_loop", b'{"args": ["%d"]}' % key) for key in range(1, 5)]
    crewed.crew.submit([RunRequest(int(one.id), one, once=one.id == "3") for one in envelopes])
    crewed.crew.recall()
    await crewed.wait_for(3)
    assert (crewed.returned, crewed.done) == ([4], ["1", "2", "3"])
    await crewed.crew.stop()


async def test_a_job_that_was_given_back_may_be_cancelled_or_come_again() -> None:
    """What was wanted of it before does not hold for when it comes again: its worker knows."""
    crewed = Crewed()
    crewed.submit("on_the_loop", 1, 2)
    crewed.crew.cancel([2])
    crewed.crew.recall()
    await crewed.wait_for(1)
    assert crewed.returned == [2]
    crewed.submit("on_the_loop", 2)
    await crewed.wait_for(2)
    assert crewed.outcomes[2] == Succeeded(b"null")
    await crewed.crew.stop()


async def test_a_recall_is_answered_when_nothing_waits() -> None:
    crewed = Crewed()
    crewed.crew.recall()

    async def answered() -> bool:
        return crewed.answers == 1

    await until(answered, "it says that there is nothing")
    assert crewed.returned == []
    await crewed.crew.stop()
