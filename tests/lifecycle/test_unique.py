"""Unique tasks beside real workers and producers that die."""

from __future__ import annotations

import asyncio
import itertools
import random
import subprocess
import sys
import time
from collections import defaultdict
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from leveret import BrokerError, Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq.broker import RabbitMQBroker
from leveret.model import UNIQUE_CONFLICT, UNIQUE_KEY, UNIQUE_SCOPE, Envelope, Succeeded, new_id
from leveret.testing.bench import Taken, batches_of
from tests.support import unique_app
from tests.support.cluster import Cluster
from tests.support.proxy import Proxy
from tests.support.waiting import PATIENCE, until
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from leveret.brokers import Broker
    from tests.conftest import Place
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

UNIQUE = Queue("unique")
#: A claim whose program died is completed so soon (seconds).
COMPLETED = 35.0


def producers(url: str, count: int, calls: int, keys: int) -> list[subprocess.Popen[str]]:
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.unique_app", url, str(calls), str(keys), str(number)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(count)
    ]


def fresh() -> int:
    """A key that no test before has used: the log outlives a test."""
    return random.getrandbits(40)


def keyed(key: int) -> Envelope:
    return Envelope(new_id(), UNIQUE.name, "only", b'{"args": [%d]}' % key, headers={UNIQUE_KEY: f"only:{key}"})


async def held(broker: Broker, key: int) -> str:
    """The id of the task that has the key; of a new one if nobody had it."""
    envelope = keyed(key)
    return (await broker.publish([envelope], on_conflict="ignore") or {}).get(envelope.id, envelope.id)


def test_many_producers_admit_one_for_each_key(place: Place) -> None:
    """Measured with 50 producers of 1,000 calls for 100 keys: see ADR 0039."""
    programs = producers(place.url, count=6, calls=200, keys=25)
    printed = [program.communicate(timeout=PATIENCE)[0].splitlines() for program in programs]
    assert [program.returncode for program in programs] == [0] * 6
    assert all(lines[-1] == "done 200 25" for lines in printed)
    admitted = [line for lines in printed for line in lines[:-1]]
    assert (len(admitted), len(set(admitted))) == (25, 25)


async def test_who_has_the_result_can_enqueue_the_next_at_once(place: Place, ledger: Ledger) -> None:
    unique_app.app.client.connect_to(place.url)
    key = fresh()
    with Worker(place.url, ledger, app="tests.support.unique_app:app").ready():
        ids = set()
        for _ in range(20):
            handle = await unique_app.only.enqueue(key)
            assert not handle.existing
            ids.add(handle.id)
            assert await handle.result(timeout=PATIENCE) == key
        assert len(ids) == 20
    await unique_app.app.close()


async def test_a_key_of_what_waits_is_free_when_a_worker_has_taken_it(place: Place, ledger: Ledger) -> None:
    """Also when that worker is killed: what it ran waits again, without its key."""
    unique_app.app.client.connect_to(place.url)
    key, newest = fresh(), unique_app.newest
    first = await newest.enqueue(key)
    assert (await newest.enqueue(key)).id == first.id
    with Worker(place.url, ledger, app="tests.support.unique_app:app").ready() as worker:
        await asyncio.to_thread(ledger.wait_for, f"newest {first.id}")
        worker.kill_group()
    second = await newest.enqueue(key)
    assert second.id != first.id
    assert (await newest.enqueue(key)).id == second.id
    with Worker(place.url, ledger, app="tests.support.unique_app:app").ready():
        await asyncio.to_thread(ledger.wait_for, f"newest {second.id}")
        third = await newest.enqueue(key)
        assert third.id not in (first.id, second.id)
        ledger.release(str(key))
        assert [await one.result(timeout=PATIENCE) for one in (first, second, third)] == [key] * 3
    assert ledger.count(f"newest {first.id}") == 2
    await unique_app.app.close()


async def test_producers_that_are_killed_leave_a_task_or_a_free_key(place: Place) -> None:
    """Each at a random moment. No key has two tasks, and each that is taken has one, at the latest when stated."""
    keys = 200
    for _ in range(4):
        programs = producers(place.url, count=3, calls=3 * keys, keys=keys)
        for program in programs:
            assert program.stdout is not None
            await asyncio.to_thread(program.stdout.readline)
        await asyncio.sleep(random.uniform(0.0, 0.2))  # the moment is what is tried
        for program in programs:
            program.kill()
            program.communicate()
    broker = connect(place.url, timeout=20.0)
    await broker.declare([UNIQUE])
    found: dict[str, set[str]] = {}
    async with broker.consume([UNIQUE], credit=None) as consumer:

        async def collect() -> None:
            async for deliveries in batches_of(consumer):
                for one in deliveries:
                    found.setdefault(one.envelope.headers[UNIQUE_KEY], set()).add(one.envelope.id)

        collecting = asyncio.create_task(collect())
        holders = {f"only:{key}": await held(broker, key) for key in range(keys)}

        def all_are_there() -> bool:
            return all(id_ in found.get(key, ()) for key, id_ in holders.items())

        await until(all_are_there, "each key that is taken has its task", within=COMPLETED)
        collecting.cancel()
    assert {key: list(ids) for key, ids in found.items()} == {key: [id_] for key, id_ in holders.items()}
    await broker.close()


async def test_a_task_whose_producer_died_after_its_claim_is_stored_by_another(node: Node, ledger: Ledger) -> None:
    """By a worker, under its id. Until it has ended, its key is taken."""
    key = fresh()
    died = RabbitMQBroker(node.url, timeout=20.0)
    await died.declare([UNIQUE])
    envelope = keyed(key)
    assert await died._claims.claim([envelope]) == {}
    await died.close()  # without a word more
    broker = connect(node.url, timeout=20.0)
    await broker.declare([UNIQUE])
    assert await held(broker, key) == envelope.id
    unique_app.app.client.connect_to(node.url)
    with Worker(node.url, ledger, app="tests.support.unique_app:app").ready():

        async def has_ended() -> bool:
            return any(one.is_final for one in await broker.statuses.read([envelope.id]))

        await until(has_ended, "the task has run", within=COMPLETED)
        assert await unique_app.only.handle(envelope.id).result(timeout=PATIENCE) == key
        assert await held(broker, key) != envelope.id
    await unique_app.app.close()
    await broker.close()


async def test_a_reader_that_hears_nothing_decides_all_the_same(node: Node) -> None:
    """What was read last may be old: another program has taken, and freed, keys since."""
    one_key, other_key = fresh(), fresh()
    with Proxy(node.port) as proxy:
        deaf, other = RabbitMQBroker(proxy.url, timeout=20.0), RabbitMQBroker(node.url, timeout=20.0)
        for broker in (deaf, other):
            await broker.declare([UNIQUE])
        first, second = await held(deaf, one_key), await held(other, other_key)
        reading = deaf._claims._reader._reading
        assert reading is not None
        reading._take = lambda *_: None
        async with other.consume([UNIQUE], credit=2) as consumer:
            deliveries = await Taken(consumer).next(2)
            await other.settle([(one, Succeeded()) for one in deliveries if one.envelope.id == first])
            began = time.monotonic()
            # By what it has read, the first key is taken, and the second free.
            assert await held(deaf, one_key) != first
            assert await held(deaf, other_key) == second
            assert time.monotonic() - began < 10
            proxy.cut()
            assert await held(deaf, other_key) == second
        await deaf.close()
        await other.close()


@pytest.mark.parametrize("version", ["3.10", "4"])
async def test_nodes_that_are_killed_in_turn_admit_no_second(version: str) -> None:
    """Whatever an enqueue says meanwhile, all answers about a key name one task."""
    with Cluster(version) as cluster:
        brokers = [RabbitMQBroker(cluster.url, timeout=60.0) for _ in range(6)]
        await brokers[0].declare([UNIQUE])
        base, answers = fresh(), defaultdict[int, set[str]](set)
        is_over = asyncio.Event()

        async def ask(broker: RabbitMQBroker, number: int) -> None:
            await broker.declare([UNIQUE])
            for turn in itertools.count(number):
                if is_over.is_set():
                    return
                # A new key every now and then, and the older ones again.
                key = base + (turn // 40 if turn % 2 else random.randrange(turn // 40 + 1))
                with suppress(BrokerError):
                    answers[key].add(await held(broker, key))

        asking = [asyncio.create_task(ask(broker, number)) for number, broker in enumerate(brokers)]
        for node in cluster.nodes:
            await asyncio.sleep(5)  # while they ask
            node.kill()
            await asyncio.sleep(5)  # the same
            before = len(answers)
            await until(lambda: len(answers) > before, "keys are claimed beside a dead node")  # noqa: B023 - now
            await asyncio.to_thread(node.start)
            await asyncio.to_thread(node.wait)
            await asyncio.to_thread(cluster.wait_for_running, 3, node)
        is_over.set()
        await asyncio.gather(*asking)
        assert {key: len(ids) for key, ids in answers.items() if len(ids) > 1} == {}
        assert len(answers) > 20
        for broker in brokers:
            await broker.close()


@pytest.mark.parametrize("version", ["3.10", "4"])
async def test_a_minority_admits_nothing_and_hears_again_afterwards(version: str) -> None:
    """A node that was cut off may leave its readers deaf: what the others did meanwhile counts all the same."""
    with Cluster(version) as cluster:
        home, away = cluster.nodes[0], cluster.nodes[2]
        near, far = RabbitMQBroker(home.url, timeout=60.0), RabbitMQBroker(away.url, timeout=20.0)
        for broker in (near, far):
            await broker.declare([UNIQUE])
        keys = [fresh() for _ in range(4)]
        first = await held(near, keys[0])
        assert await held(far, keys[0]) == first
        await asyncio.to_thread(cluster.cut_off, away)
        try:
            second = await held(near, keys[1])
            with pytest.raises(BrokerError):
                await held(far, keys[2])
        finally:
            await asyncio.to_thread(cluster.rejoin, away)
        await asyncio.to_thread(cluster.wait_for_running, 3)
        assert await held(far, keys[0]) == first
        assert await held(far, keys[1]) == second
        third = await held(near, keys[3])
        assert await held(far, keys[3]) == third
        await near.close()
        await far.close()


async def test_an_operator_sees_and_frees_a_key(place: Place) -> None:
    broker = connect(place.url, timeout=20.0)
    await broker.declare([UNIQUE])
    key = fresh()
    first = await held(broker, key)
    arguments = ("--url", place.url)
    listed = await asyncio.to_thread(leveret, "unique", "list", f"only:{key}", *arguments)
    assert first in listed
    assert f"of task {first} is free" in await asyncio.to_thread(
        leveret, "unique", "release", f"only:{key}", *arguments
    )
    assert "No unique key is taken" in await asyncio.to_thread(leveret, "unique", "list", f"only:{key}", *arguments)
    assert await held(broker, key) != first
    await broker.close()


async def test_what_is_called_while_it_runs_runs_once_more_after_it(place: Place, ledger: Ledger) -> None:
    """With the arguments of the last call. The worker that runs it is killed once."""
    unique_app.app.client.connect_to(place.url)
    repo = fresh()
    app = "tests.support.unique_app:app"
    with Worker(place.url, ledger, app=app).ready() as worker:
        first = await unique_app.build.enqueue(repo, "one")
        await asyncio.to_thread(ledger.wait_for, "begun one")
        second = await unique_app.build.enqueue(repo, "two")
        third = await unique_app.build.enqueue(repo, "three")
        assert not second.existing
        assert (third.existing, third.id) == (True, second.id)
        worker.kill_group()
    with Worker(place.url, ledger, app=app):
        await asyncio.to_thread(ledger.wait_for, "begun one", 2)
        ledger.release(str(repo))
        assert await second.result(timeout=PATIENCE) == "three"
        assert await first.result(timeout=PATIENCE) == "one"
    await unique_app.app.close()
    lines = ledger.lines()
    assert lines[:5] == ["begun one", "begun one", "ended one", "begun three", "ended three"]
    # Who was killed may have stored a copy of it, to wait, and not settled it.
    assert lines[5:] in ([], ["begun three", "ended three"])


async def test_a_thousand_debounced_calls_run_once_with_the_last_arguments(place: Place, ledger: Ledger) -> None:
    """In five seconds. Others, whose ``max_wait`` is shorter than that, run meanwhile."""
    unique_app.app.client.connect_to(place.url)
    calm, busy = fresh(), fresh()
    urgent = unique_app.index.options(max_wait=2.0)
    with Worker(place.url, ledger, app="tests.support.unique_app:app").ready():
        # The first call of a program may take longer than it is put off: it reads the log.
        await unique_app.index.enqueue(fresh(), 0)
        began = time.time()
        first = await unique_app.index.enqueue(calm, 0)
        others = [(await urgent.enqueue(busy, 0)).id]
        for number in range(1, 1000):
            last = time.time()
            assert (await unique_app.index.enqueue(calm, number)).id == first.id
            if number % 10 == 0:
                others.append((await urgent.enqueue(busy, number)).id)
            await asyncio.sleep(began + 5.0 * number / 1000 - time.time())  # spread over five seconds
        number, ran = await first.result(timeout=PATIENCE)
        assert number == 999
        assert last + 0.9 < ran
        runs = [await unique_app.index.handle(id_).result(timeout=PATIENCE) for id_ in dict.fromkeys(others)]
        assert runs[-1][0] == 990
        assert len(runs) > 1
    await unique_app.app.close()


@pytest.mark.parametrize("scope", ["unfinished", "waiting"])
@pytest.mark.parametrize("step", ["delivered", "asked", "taken", "copied", "freed"])
async def test_a_worker_that_is_killed_leaves_the_newest_arguments(place: Place, step: str, scope: str) -> None:
    """At each step of taking a task that was replaced, and of ending it."""
    broker = connect(place.url, timeout=20.0)
    queue = Queue(f"replaced-{fresh()}")
    await broker.declare([queue])

    def task(text: str) -> Envelope:
        headers = {UNIQUE_KEY: queue.name, UNIQUE_CONFLICT: "replace", UNIQUE_SCOPE: scope}
        return Envelope(new_id(), queue.name, "only", text.encode(), headers=headers)

    first = task("first")
    await broker.publish([first])
    for text in ("newer", "newest"):
        later = task(text)
        assert await broker.publish([later], on_conflict="replace") == {later.id: first.id}
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.support.dying_worker", place.url, queue.name, step), stdout=subprocess.PIPE
    )
    printed, _ = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert program.returncode == -9
    assert printed.decode() in ("", "newest\n")
    if place.url.startswith("sqlite") and step in ("freed", "delivered", "asked"):
        # One transaction ends it.
        assert (await broker.queues.stats([queue.name]))[0].ready == 0
    else:
        async with broker.consume([queue], credit=5) as consumer:
            (delivery,) = await Taken(consumer).next()
            assert (delivery.envelope.id, delivery.envelope.body) == (first.id, b"newest")
    await broker.queues.delete(queue.name, force=True)
    await broker.close()
