"""The worker, with a broker and an executor in this process: what it takes, runs, settles and hands back."""

from __future__ import annotations

import asyncio
import contextvars
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from leveret import App, BrokerError, BrokerRefused, ConfigurationError, LeaseLost, Queue
from leveret.brokers import Deliveries
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.executors.in_process import InProcessExecutor
from leveret.model import DeadLettered, Envelope, Released, Retrying, Settlement, Succeeded, new_id
from leveret.observe.events import Event, TaskFinished, TaskSettled, TaskStarted, WorkerReady, WorkerStopping
from leveret.testing.bench import batches_of
from leveret.worker import prefetch
from leveret.worker.dispatch import MAX_RETURNS
from leveret.worker.worker import Worker
from tests.support.bench import Bench
from tests.support.waiting import until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from leveret.model import Delivery
    from leveret.model.status import Status

owner: contextvars.ContextVar[str] = contextvars.ContextVar("owner", default="nobody")


async def test_tasks_are_run_and_settled() -> None:
    bench = Bench()
    texts = [f"{number}" for number in range(20)]
    await bench.put("say", *texts)
    async with bench.working():
        settled = await bench.wait_until_settled(20)
    assert bench.done == texts
    assert [event.outcome for event in settled] == [Succeeded(b"null")] * 20
    assert all(event.kept and not event.at_most_once for event in settled)
    assert await bench.counts() == (0, 0, 0)


async def test_the_events_of_a_workers_life() -> None:
    bench = Bench()
    await bench.put("say", "a")
    async with bench.working(grace=7.0):
        (settled,) = await bench.wait_until_settled(1)
    envelope = settled.envelope
    assert bench.events == [
        WorkerReady(["work"]),
        TaskStarted(envelope),
        TaskFinished(envelope, Succeeded(b"null")),
        TaskSettled(envelope, Succeeded(b"null"), seconds=settled.seconds),
        WorkerStopping(0, 7.0),
    ]


async def test_what_comes_later_is_run_too() -> None:
    bench = Bench()
    async with bench.working(concurrency=1):
        for number in range(3):
            await bench.put("say", f"{number}")
            await bench.wait_until_settled(number + 1)
    assert bench.done == ["0", "1", "2"]


async def test_a_failed_task_goes_to_the_end_of_its_queue() -> None:
    bench = Bench()
    await bench.put("fail_once", "f")
    await bench.put("say", "a", "b")
    async with bench.working(concurrency=1):
        settled = await bench.wait_until_settled(4)
    assert bench.done == ["f", "a", "b", "f"]
    outcome = settled[0].outcome
    assert isinstance(outcome, Retrying)
    assert outcome.error == "ValueError: f"
    again = settled[3].envelope
    assert (again.id, again.attempt, again.last_error) == (settled[0].envelope.id, 2, "ValueError: f")


@pytest.mark.parametrize(
    ("task", "reason"),
    [("give_up", "a"), ("absent", "UnknownTask: no task"), (None, "UnknownTask: the message names no task")],
)
async def test_what_cannot_run_is_dead_and_its_neighbours_run(task: str | None, reason: str) -> None:
    bench = Bench()
    await bench.put(task, "a")
    await bench.put("say", "b")
    async with bench.working():
        await bench.wait_until_settled(2)
    assert await bench.counts() == (0, 0, 1)
    (letter,) = await bench.broker.dead_letters.read("work", limit=9)
    assert letter.reason.startswith(reason)
    assert bench.done == ["b"]


# How much it takes


@pytest.mark.parametrize(("prefetch", "held"), [(1, 1), (3, 3), ("auto", 2), ("unlimited", 10)])
async def test_prefetch_bounds_what_is_held(prefetch: Any, held: int) -> None:
    bench = Bench()
    await bench.put("wait", *"abcdefghij")
    async with bench.working(concurrency=2, prefetch=prefetch):
        await bench.wait_for(lambda: len(bench.done) == min(held, 2), "as many run as can")
        assert await bench.counts() == (10 - held, held, 0)
        bench.gate.set()
        await bench.wait_until_settled(10)


@pytest.mark.parametrize("prefetch", [0, -1, 65_536])
async def test_prefetch_is_a_number_that_every_broker_knows(prefetch: int) -> None:
    """AMQP carries it in 16 bits, and reads 0 as no limit."""
    with pytest.raises(ConfigurationError, match=f"prefetch is {prefetch}; it must be 1 to 65535"):
        Worker(InProcessExecutor(App("memory://")), prefetch=prefetch)


@pytest.mark.parametrize("prefetch", [10, "unlimited"])
async def test_no_more_run_than_there_are_slots(prefetch: Any) -> None:
    bench = Bench()
    await bench.put("wait", *"abcde")
    async with bench.working(concurrency=3, prefetch=prefetch):
        await bench.wait_for(lambda: len(bench.done) == 3, "three run")
        assert len(bench.told(TaskStarted)) == 3
        bench.gate.set()
        await bench.wait_until_settled(5)
    assert bench.done[:3] == ["start a", "start b", "start c"]


async def test_a_busy_worker_keeps_nothing_from_an_idle_one() -> None:
    """By default nothing waits in a worker that another one could run."""
    store = MemoryStore()
    busy, idle = Bench(MemoryBroker(store)), Bench(MemoryBroker(store))
    async with busy.working(concurrency=1):
        await busy.put("wait", "long")
        await busy.wait_for(lambda: busy.done, "the first is busy")
        async with idle.working(concurrency=1):
            await busy.put("say", *"abcdef")
            await idle.wait_until_settled(6)
        assert busy.done == ["start long"]
        busy.gate.set()
        await busy.wait_until_settled(1)
    assert idle.done == list("abcdef")


@pytest.fixture
def patient_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is a short one even on cores that are busy with other tests."""
    monkeypatch.setattr(prefetch, "AHEAD", 5 * prefetch.AHEAD)
    monkeypatch.setattr(prefetch, "TICK", 5 * prefetch.TICK)


async def until_it_holds(bench: Bench, more_than: int) -> None:
    """Feed short tasks until so many are held."""

    async def fed() -> bool:
        if (await bench.stats()).ready < 500:
            await bench.put("say", *map(str, range(500)))
        return (await bench.stats()).running > more_than

    await until(fed, f"more than {more_than} short tasks are held")


@pytest.mark.usefixtures("patient_measure")
async def test_auto_holds_more_of_short_tasks_and_hands_back_what_waits_behind_slow_ones() -> None:
    """Once it runs only slow ones, all that it does not run is for others."""
    bench = Bench()
    async with bench.working(concurrency=2, prefetch="auto") as worker:
        await until_it_holds(bench, more_than=20)
        await bench.put("wait", *"abcdefghij")
        await until(lambda: become(bench, (8, 2, 0)), "it holds what it runs, and no more")
        bench.gate.set()
        await until(lambda: become(bench, (0, 0, 0)), "all have run")
        worker.stop()
    assert all(isinstance(event.outcome, Released | Succeeded) for event in bench.told(TaskSettled))
    assert sorted(text for text in bench.done if text.startswith("end")) == [f"end {name}" for name in "abcdefghij"]


@pytest.mark.usefixtures("patient_measure")
async def test_what_waits_behind_a_slow_task_goes_to_an_idle_worker() -> None:
    store = MemoryStore()
    busy, idle = Bench(MemoryBroker(store)), Bench(MemoryBroker(store))
    async with busy.working(concurrency=1, prefetch="auto"):
        await until_it_holds(busy, more_than=20)
        await busy.wait_for(lambda: not store.queues["work"].ready, "it has taken all")
        bodies = [("wait", "long"), *(("say", text) for text in "abcdef")]
        await busy.broker.publish(
            [Envelope(new_id(), "work", task, msgspec.json.encode({"args": [text]})) for task, text in bodies]
        )
        await busy.wait_for(lambda: "start long" in busy.done, "it is busy")
        async with idle.working(concurrency=1, prefetch="auto"):
            await idle.wait_for(lambda: set("abcdef") <= {*idle.done, *busy.done}, "another has run the others")
        busy.gate.set()
        await busy.wait_for(lambda: "end long" in busy.done, "the slow one has ended")


async def become(bench: Bench, counts: tuple[int, int, int]) -> bool:
    return await bench.counts() == counts


async def test_only_the_queues_named_are_worked_on() -> None:
    bench = Bench()
    bench.app.task(name="other", queue="other")(lambda: None)
    async with bench.working(queues=["work"]):
        await bench.put("say", "a")
        await bench.wait_until_settled(1)
    assert bench.told(WorkerReady) == [WorkerReady(["work"])]
    assert [stats.name for stats in await bench.broker.queues.stats()] == ["work"]


async def test_a_queue_named_twice_is_one() -> None:
    bench = Bench()
    async with bench.working(queues=["work", "work"]):
        pass
    assert bench.told(WorkerReady) == [WorkerReady(["work"])]


async def test_an_application_without_tasks_has_nothing_to_work_on() -> None:
    with pytest.raises(ConfigurationError, match="the application has no tasks"):
        await Worker(InProcessExecutor(App("memory://"))).run()


async def test_a_worker_of_a_store_of_its_own_is_refused() -> None:
    """Nobody could put anything into it."""
    app = App("memory://")
    app.task(name="work")(lambda: None)
    with pytest.raises(ConfigurationError, match="give the worker the producer's broker"):
        await Worker(InProcessExecutor(app)).run()


# At most once


async def test_at_most_once_is_settled_before_it_runs() -> None:
    """And a failure is told, not tried again."""
    bench = Bench()
    seen: list[tuple[int, int, int]] = []

    @bench.app.task(queue="work", acknowledge="before", default=True)
    async def once(text: str) -> None:
        seen.append(await bench.counts())
        raise ValueError(text)

    async with bench.working():
        await bench.put("once", "a")
        await bench.wait_until_settled(1)
        await bench.put(None, "b")
        settled = await bench.wait_until_settled(2)
    assert seen == [(0, 0, 0), (0, 0, 0)]
    assert [event.at_most_once for event in settled] == [True, True]
    assert all(isinstance(event.outcome, Retrying) for event in settled)
    assert await bench.counts() == (0, 0, 0)


class Losing(MemoryBroker):
    """Every lease is lost before it is settled."""

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        del updates
        raise LeaseLost([delivery.envelope.id for delivery, _ in settlements])


async def test_at_most_once_is_not_run_when_it_could_not_be_settled() -> None:
    """It is another worker's by now; its slot is free again."""
    bench = Bench(Losing())

    @bench.app.task(queue="work", acknowledge="before")
    async def once(text: str) -> None:
        bench.done.append(f"once {text}")

    await bench.put("once", "a")
    await bench.put("say", "b")
    async with bench.working(concurrency=1, prefetch=2):
        await bench.wait_until_settled(1)
    assert bench.done == ["b"]


# Returns


async def test_what_comes_back_again_and_again_is_dead() -> None:
    bench = Bench()
    await bench.put("say", "a", returns=MAX_RETURNS)
    async with bench.working():
        (settled,) = await bench.wait_until_settled(1)
    assert isinstance(settled.outcome, DeadLettered)
    (letter,) = await bench.broker.dead_letters.read("work", limit=9)
    assert letter.reason.startswith(f"it came back {MAX_RETURNS} times without an outcome")
    assert bench.done == []


async def test_one_return_less_is_run() -> None:
    bench = Bench()
    await bench.put("say", "a", returns=MAX_RETURNS - 1)
    async with bench.working():
        await bench.wait_until_settled(1)
    assert bench.done == ["a"]


async def test_what_expired_is_dead_and_what_has_not_is_run() -> None:
    bench = Bench()
    now = time.time()
    await bench.broker.declare([Queue("work")])
    await bench.broker.publish(
        [
            Envelope(new_id(), "work", "say", b'{"args":["late"]}', expires_at=now - 1),
            Envelope(new_id(), "work", "say", b'{"args":["in time"]}', expires_at=now + 60),
        ]
    )
    async with bench.working():
        await bench.wait_until_settled(2)
    assert bench.done == ["in time"]
    (letter,) = await bench.broker.dead_letters.read("work", limit=9)
    assert letter.envelope.body == b'{"args":["late"]}'
    assert letter.reason.startswith("it expired 1.")


# Stopping


async def peek(bench: Bench) -> Sequence[Delivery]:
    """What a next worker would get."""
    async with bench.broker.consume([Queue("work")], credit=None) as consumer, asyncio.timeout(60):
        return await anext(batches_of(consumer))


async def test_a_stopped_worker_finishes_what_runs_and_hands_the_rest_back() -> None:
    """Uncharged: neither an attempt nor a return, in the order in which it stood."""
    bench = Bench()
    await bench.put("wait", *"abc")
    async with bench.working(concurrency=1, prefetch=2) as worker:
        await bench.wait_for(lambda: bench.done, "the first runs")
        worker.stop()
        await bench.wait_for(lambda: bench.told(WorkerStopping), "it is stopping")
        assert bench.told(WorkerStopping) == [WorkerStopping(1, 5.0)]
        bench.gate.set()
    assert bench.done == ["start a", "end a"]
    assert {event.outcome for event in bench.told(TaskSettled)} == {Succeeded(b"null"), Released()}
    assert await bench.counts() == (2, 0, 0)
    batch = await peek(bench)
    assert [msgspec.json.decode(delivery.envelope.body)["args"] for delivery in batch] == [["b"], ["c"]]
    assert [(delivery.envelope.attempt, delivery.returns) for delivery in batch] == [(1, 0), (1, 0)]


async def test_what_does_not_finish_within_the_grace_is_handed_back() -> None:
    bench = Bench()
    await bench.put("wait", "a")
    async with bench.working(grace=0.01):
        await bench.wait_for(lambda: bench.done, "it runs")
    assert [event.outcome for event in bench.told(TaskSettled)] == [Released()]
    (delivery,) = await peek(bench)
    assert (delivery.envelope.attempt, delivery.returns) == (1, 0)


async def test_a_second_stop_does_not_wait() -> None:
    bench = Bench()
    await bench.put("wait", "a")
    async with bench.working(grace=1_000.0) as worker:
        await bench.wait_for(lambda: bench.done, "it runs")
        worker.stop()
        worker.stop()
    assert [event.outcome for event in bench.told(TaskSettled)] == [Released()]
    assert await bench.counts() == (1, 0, 0)


async def test_a_worker_that_is_stopped_while_it_waits_for_the_broker_ends() -> None:
    """It has taken nothing yet, so there is no readiness to tell and nothing to give back."""
    asked = asyncio.Event()

    class Away(MemoryBroker):
        async def declare(self, _: Sequence[Queue]) -> None:
            asked.set()
            await asyncio.Event().wait()

    bench = Bench()
    worker = Worker(InProcessExecutor(bench.app), broker=Away(), listeners=[bench.events.append])
    run = asyncio.create_task(worker.run())
    await asked.wait()
    worker.stop()
    await asyncio.wait_for(run, 60)
    assert bench.events == []


# What goes wrong around the tasks


async def test_a_broker_that_refuses_ends_the_worker() -> None:
    class Refusing(MemoryBroker):
        async def declare(self, queues: Sequence[Queue]) -> None:
            raise BrokerRefused(f"no access to {queues[0].name}")

    with pytest.raises(BrokerRefused, match="no access to work"):
        await Worker(InProcessExecutor(Bench().app), broker=Refusing()).run()


async def test_a_listener_that_fails_is_logged_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()

    def broken(event: Event) -> None:
        raise ValueError(f"cannot hear {type(event).__name__}")

    await bench.put("say", *"abc")
    async with bench.working(listeners=[broken]):
        await bench.wait_until_settled(3)
    assert bench.done == list("abc")
    assert "a listener failed on TaskSettled" in caplog.text
    assert "cannot hear TaskStarted" in caplog.text


async def test_an_outcome_whose_lease_was_lost_is_told_as_not_kept(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench(Losing())
    await bench.put("say", "a")
    async with bench.working():
        (settled,) = await bench.wait_until_settled(1)
    assert (settled.outcome, settled.kept) == (Succeeded(b"null"), False)
    assert "its delivery was lost before its outcome was recorded; it may run again" in caplog.text


async def test_only_those_that_were_lost_are_told_so() -> None:
    class LosingOne(MemoryBroker):
        async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
            await super().settle(settlements, updates)
            lost = [delivery.envelope.id for delivery, _ in settlements if b"lost" in delivery.envelope.body]
            if lost:
                raise LeaseLost(lost)

    bench = Bench(LosingOne())
    await bench.put("say", "a", "lost", "b")
    async with bench.working(concurrency=3):
        settled = await bench.wait_until_settled(3)
    assert {event.envelope.body for event in settled if not event.kept} == {b'{"args":["lost"]}'}


async def test_an_outcome_that_cannot_be_recorded_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("leveret.worker.settler.SETTLE_AGAIN", 0.01)

    class Faltering(MemoryBroker):
        refusals = 3

        async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
            if self.refusals:
                self.refusals -= 1
                raise BrokerError("not now")
            await super().settle(settlements, updates)

    bench = Bench(Faltering())
    await bench.put("say", "a")
    async with bench.working():
        (settled,) = await bench.wait_until_settled(1)
    assert settled.kept
    assert bench.done == ["a"]
    assert await bench.counts() == (0, 0, 0)
    assert caplog.text.count("1 outcomes can't be recorded, trying again") == 2
    assert "2 more in 0 s: 1 outcomes can't be recorded, trying again" in caplog.text


async def test_a_delivery_whose_lease_ended_while_it_waited_is_not_run() -> None:
    """The broker has given it to somebody else by then, or gives it to this one again."""
    bench = Bench()
    held = [True]

    class Lease:
        @property
        def held(self) -> bool:
            return held[0]

    class Renewing(MemoryBroker):
        @asynccontextmanager
        async def consume(self, queues: Sequence[Queue], *, credit: int | None, **options: Any) -> AsyncGenerator[Any]:
            async with super().consume(queues, credit=credit, **options) as consumer:

                class Wrapped:
                    stop = consumer.stop
                    hold_limit = None
                    paused: frozenset[str] = frozenset()

                    async def __aiter__(self) -> AsyncGenerator[Deliveries]:
                        async for batch in batches_of(consumer):
                            yield Deliveries(tuple(msgspec.structs.replace(one, lease=Lease()) for one in batch))

                yield Wrapped()

    bench.broker = Renewing()
    await bench.put("wait", *"ab")
    async with bench.working(concurrency=1, prefetch=2):
        await bench.wait_for(lambda: bench.done, "the first runs")
        held[0] = False
        bench.gate.set()
        await bench.wait_until_settled(1)
    assert bench.done == ["start a", "end a"]


async def test_a_task_that_cancels_itself_costs_no_slot() -> None:
    """It has failed like any other; the worker goes on with as many slots as before."""
    bench = Bench()

    @bench.app.task(queue="work")
    async def cancel_yourself(text: str) -> None:
        if not bench.done:
            bench.done.append(text)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            await asyncio.sleep(0)

    await bench.put("cancel_yourself", "a")
    await bench.put("say", "b")
    async with bench.working(concurrency=1, grace=0.01):
        await bench.wait_for(lambda: "b" in bench.done, "the next one runs")
        settled = await bench.wait_until_settled(2)
    assert isinstance(settled[0].outcome, Retrying)


async def test_a_task_that_cancels_itself_is_tried_again_by_its_own_rules() -> None:
    bench = Bench()

    @bench.app.task(queue="work", max_attempts=1)
    async def cancel_yourself(text: str) -> None:
        bench.done.append(text)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    await bench.put("cancel_yourself", "a")
    async with bench.working(concurrency=1):
        (settled,) = await bench.wait_until_settled(1)
    assert isinstance(settled.outcome, DeadLettered)


async def test_a_tasks_context_is_its_own() -> None:
    """What one task sets in a context variable is not seen by the tasks that come after it."""
    bench = Bench()

    @bench.app.task(queue="work")
    async def sign(text: str) -> None:
        bench.done.append(owner.get())
        owner.set(text)

    await bench.put("sign", "a", "b", "c")
    async with bench.working(concurrency=1, prefetch=10):
        await bench.wait_until_settled(3)
    assert bench.done == ["nobody", "nobody", "nobody"]


class Counting(MemoryBroker):
    """Remembers how many outcomes it was given at once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    async def settle(self, settlements: Sequence[Settlement], updates: Sequence[Status] = ()) -> None:
        self.sizes.append(len(settlements))
        await super().settle(settlements, updates)


async def test_successes_are_recorded_together_while_other_work_waits() -> None:
    broker = Counting()
    bench = Bench(broker)
    await bench.put("say", *(f"{number}" for number in range(200)))
    async with bench.working(concurrency=2, prefetch=200):
        await bench.wait_until_settled(200)
    assert sum(broker.sizes) == 200
    assert len(broker.sizes) < 50
    assert max(broker.sizes) <= 64 + 2


async def test_a_success_is_recorded_at_once_when_nothing_else_waits() -> None:
    broker = Counting()
    bench = Bench(broker)
    async with bench.working(concurrency=4):
        await bench.put("wait", "slow")
        await bench.put("say", "a")
        (settled,) = await bench.wait_until_settled(1)
        assert settled.envelope.task == "say"
        assert broker.sizes == [1]
        bench.gate.set()
        await bench.wait_until_settled(2)


async def test_a_queue_that_no_task_goes_to_is_a_mistake_perhaps(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    async with bench.working(queues=["work", "wrok"]):
        assert "no task of the application goes to wrok by itself; its queues: work" in caplog.text
