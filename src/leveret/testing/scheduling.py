"""The checks of `conformance` for schedules."""

from __future__ import annotations

import asyncio
import secrets
import time
from typing import TYPE_CHECKING

import msgspec

from leveret.errors import ConfigurationError, QueueNotFound, ScheduleNotFound
from leveret.model import (
    Declare,
    Pause,
    Put,
    Remove,
    Resume,
    Schedule,
    Succeeded,
    Trigger,
    every,
    scheduled_for,
)
from leveret.testing.bench import PATIENCE, Bench, check, refused, settle_all

if TYPE_CHECKING:
    from leveret.brokers import Broker, ScheduleKeeper
    from leveret.model import Every, ScheduleRow


def schedule(bench: Bench, timing: Every | None = None, **changes: object) -> Schedule:
    """One of a name of its own, of tasks in the check's queue."""
    made = Schedule(f"check-{secrets.token_hex(4)}", timing or every(3600), bench.envelope("scheduled"))
    return msgspec.structs.replace(made, message=msgspec.structs.replace(made.message, id=""), **changes)


async def row_of(broker: Broker, name: str) -> ScheduleRow | None:
    rows = [row for row in await broker.schedules.read() if row.name == name]
    assert len(rows) <= 1
    return rows[0] if rows else None


async def stored_by(keeper: ScheduleKeeper, name: str) -> list[str]:
    """Have what is due of a schedule stored; the ids of its tasks, once there are some."""
    async with asyncio.timeout(PATIENCE):
        while True:
            rows, following = await keeper.due()
            if name in {row.name for row in rows}:
                change = await keeper.advance(name, {})
                if change.tasks:
                    return [task.id for task in change.tasks]
            else:
                await keeper.wait(min(following or 1.0, 1.0))


@check
async def a_schedule_is_there_until_it_is_removed(bench: Bench) -> None:
    """What is put can be read by others, put again under its name, and removed; its past stays with it."""
    broker, other = await bench.declared(), bench.broker()
    first = schedule(bench)
    await broker.schedules.ask(Put(first))
    row = await row_of(other, first.name)
    assert row is not None
    assert (row.schedule, row.last, row.paused) == (first, None, False)
    assert row.next is not None
    assert row.next > time.time()
    second = msgspec.structs.replace(first, timing=every(60))
    await other.schedules.ask(Put(second))
    row = await row_of(broker, first.name)
    assert row is not None
    assert row.schedule == second
    await broker.schedules.ask(Remove(first.name))
    assert await row_of(other, first.name) is None


@check
async def what_falls_due_is_stored_once(bench: Bench) -> None:
    """Whoever keeps the schedules stores each instant's task, with an id that tells it, and moves on."""
    broker = await bench.declared()
    made = schedule(bench, every(1))
    await broker.schedules.ask(Put(made))
    ids: list[str] = []
    async with bench.broker().schedules.keep() as keeper:
        while len(ids) < 2:
            ids += await stored_by(keeper, made.name)
    await broker.schedules.ask(Remove(made.name))
    taken = await bench.consumer(broker)
    deliveries = await taken.next(len(ids))
    assert [delivery.envelope.id for delivery in deliveries] == ids
    assert len(set(ids)) == len(ids)
    for delivery in deliveries:
        envelope = delivery.envelope
        instant = scheduled_for(envelope.headers)
        assert instant is not None
        assert envelope.id == f"{made.name}@{instant:%Y%m%dT%H%M%SZ}"
        assert (envelope.task, envelope.body) == (made.message.task, made.message.body)
    await settle_all(broker, deliveries, Succeeded())
    await taken.nothing()


@check
async def what_a_schedule_stored_is_known(bench: Bench) -> None:
    """Its status is there for who asks, though nobody has taken the task: by that it is not overlapped."""
    broker, other = await bench.declared(), bench.broker()
    made = schedule(bench, every(1))
    await broker.schedules.ask(Put(made))
    async with bench.broker().schedules.keep() as keeper:
        (id_,) = (await stored_by(keeper, made.name))[:1]
    await broker.schedules.ask(Remove(made.name))
    found = await other.statuses.read([id_])
    async with asyncio.timeout(PATIENCE):
        while not found:
            await asyncio.sleep(0.05)
            found = await other.statuses.read([id_])
    assert [(status.id, status.state) for status in found] == [(id_, "queued")]


@check
async def keepers_store_a_task_once_between_them(bench: Bench) -> None:
    """Several programs keep the schedules at once, and one of them goes away."""
    broker = await bench.declared()
    made = schedule(bench, every(1))
    await broker.schedules.ask(Put(made))
    ids: list[str] = []

    async def keep(count: int) -> None:
        async with bench.broker().schedules.keep() as keeper:
            while len(ids) < count:
                rows, following = await keeper.due()
                for row in rows:
                    if row.name == made.name:
                        ids.extend([task.id for task in (await keeper.advance(made.name, {})).tasks])
                await keeper.wait(min(following or 0.2, 0.2))

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(keep(2), keep(4))
    await broker.schedules.ask(Remove(made.name))
    taken = await bench.consumer(broker)
    deliveries = await taken.next(len(ids))
    assert sorted(delivery.envelope.id for delivery in deliveries) == sorted(set(ids))
    await settle_all(broker, deliveries, Succeeded())
    await taken.nothing()


@check
async def a_schedule_is_paused_and_resumed(bench: Bench) -> None:
    """Paused it stores nothing, whoever keeps it; resumed it goes on with its next instant."""
    broker = await bench.declared()
    made = schedule(bench, every(1))
    await broker.schedules.ask(Put(made))
    await broker.schedules.ask(Pause(made.name))
    row = await row_of(bench.broker(), made.name)
    assert row is not None
    assert row.paused
    async with bench.broker().schedules.keep() as keeper:
        until = time.time() + 1.5
        while time.time() < until:
            rows, _ = await keeper.due()
            assert made.name not in {row.name for row in rows}
            await keeper.wait(0.2)
        await broker.schedules.ask(Resume(made.name))
        assert len(await stored_by(keeper, made.name)) == 1
        await broker.schedules.ask(Remove(made.name))


@check
async def a_schedule_is_triggered(bench: Bench) -> None:
    """One task more, now; asked for twice with one moment it is one task. The schedule's own instants stay."""
    broker = await bench.declared()
    made = schedule(bench)
    await broker.schedules.ask(Put(made))
    before = await row_of(broker, made.name)
    now = time.time()
    change = await broker.schedules.ask(Trigger(made.name, now))
    (task,) = change.tasks
    taken = await bench.consumer(broker)
    (delivery,) = await taken.next()
    assert delivery.envelope.id == task.id
    after = await row_of(broker, made.name)
    assert before is not None
    assert after is not None
    assert (after.next, after.last) == (before.next, before.last)
    await settle_all(broker, [delivery], Succeeded())
    await broker.schedules.ask(Remove(made.name))


@check
async def the_schedules_of_code_come_and_go_with_it(bench: Bench) -> None:
    """What a newer program does not declare any more is gone; what an older one says otherwise does not count."""
    broker = await bench.declared()
    origin, now = f"check-{secrets.token_hex(4)}:app", time.time()
    one, two = (schedule(bench, origin=origin) for _ in range(2))
    await broker.schedules.ask(Declare(origin, now, [one, two]))
    assert {one.name, two.name} <= {row.name for row in await broker.schedules.read()}
    changed = msgspec.structs.replace(one, timing=every(60))
    await broker.schedules.ask(Declare(origin, now + 1, [changed]))
    row = await row_of(broker, one.name)
    assert row is not None
    assert row.schedule == changed
    assert await row_of(broker, two.name) is None
    change = await broker.schedules.ask(Declare(origin, now, [one, two]))
    assert sorted(change.outdated) == sorted([one.name, two.name])
    with refused(ConfigurationError):
        await broker.schedules.ask(Remove(one.name))
    await broker.schedules.ask(Declare(origin, now + 2, []))
    assert await row_of(broker, one.name) is None


@check
async def what_is_asked_of_a_schedule_that_is_not_there_is_refused(bench: Bench) -> None:
    """By name, and nothing is made of it."""
    broker = await bench.declared()
    for request in (Remove("nosuch"), Pause("nosuch"), Resume("nosuch"), Trigger("nosuch", time.time())):
        with refused(ScheduleNotFound):
            await broker.schedules.ask(request)
    assert await row_of(broker, "nosuch") is None


@check
async def a_task_that_cannot_be_stored_leaves_its_schedule_due(bench: Bench) -> None:
    """Its queue is gone: the schedule stays as it was, and the task is stored when the queue is there."""
    broker = bench.broker()
    made = schedule(bench, every(1))
    await broker.schedules.ask(Put(made))
    async with bench.broker().schedules.keep() as keeper:
        with refused(QueueNotFound):
            await stored_by(keeper, made.name)
        await broker.declare([bench.queue])
        assert await stored_by(keeper, made.name)
    await broker.schedules.ask(Remove(made.name))
