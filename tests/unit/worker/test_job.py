"""A job takes legal steps only, and the table of jobs knows each by what is asked of it."""

from __future__ import annotations

import asyncio
import itertools

import msgspec
import pytest

from leveret.model import Cancelled, DeadLettered, Delivery, Envelope, Outcome, Released, Retrying, Succeeded
from leveret.worker.job import IllegalStep, Job, Jobs, State

LEGAL = {
    (State.WAITING, State.ACKNOWLEDGING),
    (State.WAITING, State.RUNNING),
    (State.WAITING, State.SETTLING),
    (State.WAITING, State.ENDED),
    (State.ACKNOWLEDGING, State.RUNNING),
    (State.ACKNOWLEDGING, State.SETTLING),
    (State.ACKNOWLEDGING, State.ENDED),
    (State.RUNNING, State.WAITING),
    (State.RUNNING, State.SETTLING),
    (State.SETTLING, State.ENDED),
}


class Lease:
    def __init__(self, *, held: bool = True) -> None:
        self.held = held


def delivery(id_: str = "1", *, queue: str = "work", attempt: int = 1) -> Delivery:
    return Delivery(Envelope(id_, queue, "say", b"[]", attempt=attempt), Lease(), tag=1)


def waiting(jobs: Jobs, *ids: str) -> list[Job]:
    made = [jobs.new(delivery(id_)) for id_ in ids]
    jobs.wait(made)
    return made


@pytest.mark.parametrize(("now", "to"), [*itertools.product(State, State)])
def test_only_legal_steps_are_taken(now: State, to: State) -> None:
    job = Job(1, delivery(), now)
    if (now, to) in LEGAL:
        job.step(to)
        assert job.state is to
        return
    with pytest.raises(IllegalStep, match=f"a job that is {now.name} cannot become {to.name}"):
        job.step(to)
    assert job.state is now


@pytest.mark.parametrize(
    ("outcome", "judged"),
    [
        (Succeeded(), Succeeded()),
        (Cancelled("its own word"), Cancelled("its own word")),
        (Retrying("ValueError"), Cancelled("cancelled while it ran")),
        (DeadLettered("ValueError"), Cancelled("cancelled while it ran")),
    ],
)
def test_a_job_that_was_told_to_end_is_cancelled_unless_it_succeeds(outcome: Outcome, judged: Outcome) -> None:
    job = Job(1, delivery())
    assert job.judged(outcome) == outcome
    assert [job.cancel(), job.cancel()] == [True, False]
    assert job.judged(outcome) == judged


def test_no_other_worker_has_a_job_that_is_leased_or_acknowledged() -> None:
    leased = Job(1, delivery())
    lost = Job(2, msgspec.structs.replace(delivery(), lease=Lease(held=False)))
    assert (leased.is_ours, lost.is_ours) == (True, False)
    lost.step(State.ACKNOWLEDGING)
    lost.acknowledged()
    assert (lost.state, lost.is_ours) == (State.RUNNING, True)


def test_those_that_wait_are_taken_in_order() -> None:
    jobs = Jobs()
    first, second, third = waiting(jobs, "1", "2", "3")
    assert jobs.take_waiting(lambda job: job is not second) == [first, third]
    assert list(jobs.waiting) == [second]
    assert jobs.held == 1


async def test_a_job_is_found_as_long_as_it_holds_a_slot() -> None:
    jobs = Jobs()
    job = jobs.new(delivery())
    assert jobs.begun_as(delivery()) is None
    jobs.begin(job, State.RUNNING)
    assert (jobs.begun_as(delivery()), jobs.begun_as(delivery(queue="other"))) == (job, None)
    assert (jobs.begun, jobs.held, jobs.left) == ({job.key: job}, 1, 0)
    jobs.settle(job, Succeeded())
    assert jobs.begun_as(delivery()) is None
    assert (jobs.begun, jobs.held, jobs.left) == ({}, 0, 1)


def test_of_two_with_one_id_the_newer_is_found() -> None:
    jobs = Jobs()
    old, new = jobs.new(delivery()), jobs.new(delivery(attempt=2))
    for job in (old, new):
        jobs.begin(job, State.RUNNING)
    assert jobs.begun_as(delivery()) is new
    jobs.settle(old, Succeeded())
    assert jobs.begun_as(delivery()) is new


def test_a_job_is_found_by_its_attempt_while_its_outcome_is_recorded() -> None:
    jobs = Jobs()
    job = jobs.new(delivery())
    jobs.begin(job, State.RUNNING)
    assert jobs.settling_as(delivery()) is None
    jobs.settle(job, Retrying("again"))
    assert jobs.settling_as(delivery()) is job
    assert jobs.settling_as(delivery(attempt=2)) is None
    jobs.end(job)
    assert jobs.settling_as(delivery()) is None
    assert job.state is State.ENDED


def test_a_job_that_is_handed_back_may_run_when_it_comes_again() -> None:
    jobs = Jobs()
    job = jobs.new(delivery())
    jobs.settle(job, Released())
    assert jobs.settling_as(delivery()) is None
    jobs.end(job)


def test_a_job_that_another_worker_has_gives_its_slot_back() -> None:
    jobs = Jobs()
    job = jobs.new(delivery())
    jobs.begin(job, State.ACKNOWLEDGING)
    jobs.end(job)
    assert (jobs.begun, jobs.begun_as(delivery()), jobs.left) == ({}, None, 1)


def test_a_job_cannot_be_begun_or_settled_twice() -> None:
    jobs = Jobs()
    job = jobs.new(delivery())
    jobs.begin(job, State.RUNNING)
    with pytest.raises(IllegalStep, match="RUNNING cannot become RUNNING"):
        jobs.begin(job, State.RUNNING)
    jobs.settle(job, Succeeded())
    with pytest.raises(IllegalStep, match="SETTLING cannot become SETTLING"):
        jobs.settle(job, Succeeded())


async def test_it_is_known_when_no_job_has_begun() -> None:
    jobs = Jobs()
    await jobs.until_none_begun()
    job = jobs.new(delivery())
    jobs.begin(job, State.RUNNING)
    none_begun = asyncio.ensure_future(jobs.until_none_begun())
    await asyncio.sleep(0)
    assert not none_begun.done()
    jobs.settle(job, Succeeded())
    await asyncio.wait_for(none_begun, 10)
