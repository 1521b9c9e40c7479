"""A worker and tasks that somebody cancels, with a broker and an executor in this process."""

from __future__ import annotations

from leveret.model import Cancelled, Envelope, new_id
from leveret.observe.events import TaskSettled, WorkerStopping
from tests.support.bench import Bench


async def test_what_is_cancelled_as_it_comes_waits_for_no_slot() -> None:
    """The mark may be read together with the task, or before it: then too it is settled at once."""
    bench = Bench()
    async with bench.working(concurrency=1, prefetch=10):
        await bench.put("wait", "slow")
        await bench.wait_for(lambda: bench.done, "the only slot is taken")
        envelope = Envelope(new_id(), "work", "say", b'{"args":["a"]}')
        await bench.broker.publish([envelope])
        await bench.broker.control.cancel(envelope.id)
        (settled,) = await bench.wait_until_settled(1)
        assert settled.outcome == Cancelled("cancelled before it ran")
        bench.gate.set()
        await bench.wait_until_settled(2)
    assert bench.done == ["start slow", "end slow"]


async def test_what_runs_on_in_a_worker_that_stops_is_cancelled() -> None:
    """It may run as long as the grace is; to stop must not make it deaf."""
    bench = Bench()
    envelope = Envelope(new_id(), "work", "wait", b'{"args":["a"]}')
    await bench.put("say")
    await bench.broker.publish([envelope])
    async with bench.working(grace=60.0) as worker:
        await bench.wait_for(lambda: bench.done, "it runs")
        worker.stop()
        await bench.wait_for(lambda: bench.told(WorkerStopping), "the worker stops")
        await bench.broker.control.cancel(envelope.id)
    assert [event.outcome for event in bench.told(TaskSettled)] == [Cancelled("cancelled while it ran")]
