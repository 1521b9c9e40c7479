"""The fenced table on real nodes: its holder killed, frozen and cut off, its broker restarted, its cluster parted."""

from __future__ import annotations

import asyncio
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aio_pika
import pytest

from leveret.brokers.rabbitmq.amqp import Message, Properties
from leveret.brokers.rabbitmq.coordination import FencedTable, TenureLost
from leveret.brokers.rabbitmq.coordination.entries import requests_queue, table_queue
from leveret.brokers.rabbitmq.queues import Declaration, make_queues
from leveret.errors import BrokerRefused, QueueFull, QueueMismatch, QueueNotFound
from tests.conftest import RABBITMQ
from tests.lifecycle.test_permissions import permissions
from tests.support.cluster import Cluster
from tests.support.nodes import Node
from tests.support.proxy import Proxy
from tests.support.table_holder import TASKS, open_table
from tests.support.waiting import until, wait_until

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from leveret.brokers.rabbitmq.coordination import Tenure

#: How long a candidate may take to become the holder when the one before has just died (seconds). A busy machine.
SOON = 30.0


class Holder:
    """A process that stands by for the table, and what it said."""

    def __init__(self, url: str, name: str, what: str) -> None:
        command = [sys.executable, "-m", "tests.support.table_holder", url, name, what]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, env=dict(os.environ))
        self.said: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.endswith(b"\n"):
                self.said.append(json.loads(line))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [one for one in list(self.said) if one["event"] == event]

    def wait_for(self, event: str, count: int = 1) -> None:
        wait_until(lambda: len(self.of(event)) >= count, f"a candidate says {event!r} {count} times", SOON)

    @property
    def holds(self) -> bool:
        last = [one["event"] for one in list(self.said) if one["event"] in ("held", "lost")]
        return last[-1:] == ["held"]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()


class Group:
    """Some candidates for one table; one that is killed is replaced before."""

    def __init__(self, url: str, what: str, name: str | None = None) -> None:
        self.url = url
        self.name = name or f"t{secrets.token_hex(4)}"
        self.what = what
        self.members: list[Holder] = []
        self.gone: list[Holder] = []

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self.members:
            one.signal(signal.SIGCONT)
            one.kill()

    def join(self, url: str | None = None) -> Holder:
        one = Holder(url or self.url, self.name, self.what)
        self.members.append(one)
        return one

    def holder(self) -> Holder:
        return wait_until(lambda: [one for one in self.members if one.holds], "a candidate holds the table", SOON)[0]

    def wait_for_more(self, count: int) -> None:
        """Wait until so many changes more are told."""
        before = len(self.said("changed"))
        wait_until(lambda: len(self.said("changed")) >= before + count, f"{count} more changes", SOON)

    def kill(self, one: Holder) -> None:
        one.kill()
        self.members.remove(one)
        self.gone.append(one)

    def said(self, event: str) -> list[dict[str, Any]]:
        return sorted((found for one in self.members + self.gone for found in one.of(event)), key=lambda one: one["at"])

    def takeover(self, since: float) -> float:
        """How long after that moment somebody held it (seconds)."""
        moments = wait_until(
            lambda: [one["at"] for one in self.said("held") if one["at"] > since], "another one holds the table", 200.0
        )
        return float(moments[0]) - since


@asynccontextmanager
async def opened(url: str, name: str | None = None) -> AsyncIterator[FencedTable]:
    table, publisher = open_table(url, name or f"t{secrets.token_hex(4)}")
    try:
        yield table
    finally:
        await table.close()
        await publisher.close()


async def declare(url: str, declaration: Declaration) -> None:
    async with await aio_pika.connect(url) as connection:
        await make_queues(connection, [declaration])


async def fill(url: str, name: str, rows: int) -> None:
    async with opened(url, name) as table, table.tenures() as tenures:
        await (await anext(tenures)).change({f"row{number}": b"v" * 200 for number in range(rows)})


async def depth(url: str, queue_name: str) -> int | None:
    async with await aio_pika.connect(url) as connection:
        try:
            channel = await connection.channel()
            return (await channel.declare_queue(queue_name, passive=True)).declaration_result.message_count
        except aio_pika.exceptions.ChannelNotFoundEntity:
            return None


async def ids(url: str, queue_name: str) -> list[str]:
    """Of the messages in a queue, in order; they are taken."""
    async with await aio_pika.connect(url) as connection:
        source = await (await connection.channel()).get_queue(queue_name)
        found = []
        while (message := await source.get(no_ack=True, fail=False)) is not None:
            found.append(str(message.message_id))
        return found


async def test_rows_are_changed_removed_and_read(node: Node) -> None:
    async with opened(node.url) as table, opened(node.url, table.name) as reader:
        assert await reader.read() == {}
        assert await depth(node.url, table_queue(table.name)) is None, "reading has made nothing"
        async with table.tenures() as tenures:
            tenure = await anext(tenures)
            await tenure.change({"a": b"1", "b": b"2"})
            await tenure.change({"a": None, "b": b"3", "\u00e4": b""})
            assert tenure.rows == {"b": b"3", "\u00e4": b""}
            assert await reader.read() == tenure.rows
        assert await reader.read() == {"b": b"3", "\u00e4": b""}, "with nobody there"


async def test_a_reader_leaves_all_as_it_was(node: Node) -> None:
    async with opened(node.url) as table:
        async with table.tenures() as tenures:
            tenure = await anext(tenures)
            await tenure.change({f"k{number}": b"v" for number in range(20)})
            epoch = tenure.epoch
        before = await depth(node.url, table_queue(table.name))
        for _ in range(3):
            assert len(await table.read()) == 20

        async def is_as_before() -> bool:
            return await depth(node.url, table_queue(table.name)) == before

        await until(is_as_before, "all rows are back in the queue")
        async with table.tenures() as tenures:
            assert (await anext(tenures)).epoch == epoch + 1


async def test_many_rows_are_read_in_pieces(node: Node) -> None:
    async with opened(node.url) as table, table.tenures() as tenures:
        tenure = await anext(tenures)
        await tenure.change({f"k{number}": bytes(20_000) for number in range(60)})
        assert await table.read() == tenure.rows


async def test_requests_wait_for_a_holder_and_come_again_until_they_are_done(node: Node) -> None:
    async with opened(node.url) as table:
        assert await table.ask(b"anybody?", 1.0) is None
        await table.post(b"one")
        await table.post(b"two")
        async with table.tenures() as tenures:
            requests = aiter(await anext(tenures))
            first = await anext(requests)
            assert first.body == b"one"
            first.done()
            assert (await anext(requests)).body == b"two"
        async with table.tenures() as tenures:
            requests = aiter(await anext(tenures))
            assert (await anext(requests)).body == b"two", "it was not done"


async def test_a_question_is_answered_by_the_holder(node: Node) -> None:
    async with opened(node.url) as table, opened(node.url, table.name) as other, table.tenures() as tenures:
        tenure = await anext(tenures)
        asking = asyncio.create_task(other.ask(b"7", 20.0))
        request = await anext(aiter(tenure))
        request.answer(b"seven")
        request.done()
        assert await asking == b"seven"


async def test_a_task_and_its_row_are_stored_together_or_not(node: Node) -> None:
    await declare(
        node.url,
        Declaration("full", arguments={"x-queue-type": "classic", "x-max-length": 1, "x-overflow": "reject-publish"}),
    )
    await declare(node.url, Declaration(TASKS, arguments={"x-queue-type": "quorum"}))
    async with opened(node.url) as table, table.tenures() as tenures:
        tenure = await anext(tenures)
        await tenure.change({"last": b"0"})

        async def enqueue(where: str, number: int) -> None:
            properties = Properties(message_id=str(number), message_type="say", headers={"own": "x"}, delivery_mode=2)
            await tenure.enqueue(Message(where, b"{}", properties), "last", b"%d" % number)

        await enqueue(TASKS, 1)
        assert tenure.get("last") == b"1"
        await enqueue("full", 2)
        with pytest.raises(QueueFull):
            await enqueue("full", 3)
        await until(lambda: tenure.get("last") == b"2", "the refused task's row is put back")
        with pytest.raises(QueueNotFound):
            await enqueue("nowhere", 4)
        assert tenure.get("last") == b"2"
        assert not tenure.uncertain
        assert await ids(node.url, TASKS) == ["1"]
        with pytest.raises(ValueError, match="no row"):
            await tenure.enqueue(Message(TASKS, b"{}", Properties(message_id="5")), "none", b"")
    async with opened(node.url, table.name) as table, table.tenures() as tenures:
        assert (await anext(tenures)).rows == {"last": b"2"}


async def test_a_queue_that_deals_to_several_is_refused(node: Node) -> None:
    name = f"t{secrets.token_hex(4)}"
    await declare(node.url, Declaration(table_queue(name), arguments={"x-queue-type": "quorum"}))
    async with opened(node.url, name) as table:
        with pytest.raises(QueueMismatch, match="single-active"):
            async with table.tenures() as tenures:
                await anext(tenures)


async def test_the_documented_permissions_are_enough(node: Node) -> None:
    who = {"worker": "a worker", "producer": "a producer", "operator": "an operator"}
    for user, row in who.items():
        node.ctl("add_user", user, user)
        node.ctl("set_permissions", user, *permissions(row))
    try:
        urls = {user: node.url.replace("guest:guest", f"{user}:{user}") for user in who}
        async with opened(urls["producer"]) as table, opened(urls["worker"], table.name) as worker:
            await table.post(b"request")
            async with worker.tenures() as tenures:
                tenure = await anext(tenures)
                assert (await anext(aiter(tenure))).body == b"request"
                await tenure.change({"a": b"1"})
                for user in who:
                    async with opened(urls[user], table.name) as reader:
                        assert await reader.read() == {"a": b"1"}
            for user in who:
                async with opened(urls[user], table.name) as reader:
                    assert await reader.read() == {"a": b"1"}
    finally:
        for user in who:
            node.ctl("delete_user", user)


async def test_who_may_not_join_is_told(node: Node) -> None:
    node.ctl("add_user", "nobody", "nobody")
    node.ctl("set_permissions", "nobody", "^$", "^amq.default$", "^$")
    try:
        async with opened(node.url.replace("guest:guest", "nobody:nobody")) as table:
            with pytest.raises(BrokerRefused):
                async with table.tenures() as tenures:
                    await anext(tenures)
    finally:
        node.ctl("delete_user", "nobody")


async def test_a_deleted_queue_of_requests_is_made_again(node: Node) -> None:
    async with opened(node.url) as table, table.tenures() as tenures:
        tenure = await anext(tenures)
        await tenure.change({"a": b"1"})
        await table.post(b"one")
        assert (await anext(aiter(tenure))).body == b"one"
        async with await aio_pika.connect(node.url) as connection:
            await (await connection.channel()).queue_delete(requests_queue(table.name))
        await tenure.over()
        tenure = await anext(tenures)
        assert tenure.rows == {"a": b"1"}
        await table.post(b"two")
        assert (await anext(aiter(tenure))).body == b"two"


async def test_a_deleted_table_ends_the_tenure_and_is_made_again(node: Node) -> None:
    async with opened(node.url) as table, table.tenures() as tenures:
        tenure = await anext(tenures)
        await tenure.change({"a": b"1"})
        async with await aio_pika.connect(node.url) as connection:
            await (await connection.channel()).queue_delete(table_queue(table.name))
        await tenure.over()
        with pytest.raises(TenureLost):
            await tenure.change({"a": b"2"})
        assert (await anext(tenures)).rows == {}


async def test_the_next_one_holds_it_when_this_one_leaves(node: Node) -> None:
    async with opened(node.url) as table, opened(node.url, table.name) as other, other.tenures() as later:
        async with table.tenures() as tenures:
            tenure = await anext(tenures)
            await tenure.change({"a": b"1"})
            waiting = asyncio.ensure_future(anext(later))
            await asyncio.sleep(1.0)  # nothing happens: it stands by
            assert not waiting.done()
        async with asyncio.timeout(SOON):
            assert (await waiting).rows == {"a": b"1"}
        with pytest.raises(TenureLost):
            await tenure.change({"a": b"2"})


async def test_a_connection_that_is_cut_ends_the_tenure_and_loses_no_row(node: Node) -> None:
    with Proxy(node.port) as proxy:
        async with opened(proxy.url) as table, table.tenures() as tenures:
            value = 0

            async def count(tenure: Tenure) -> None:
                nonlocal value
                while True:
                    await tenure.change({"a": b"%d" % (value + 1)})
                    value += 1

            for _ in range(5):
                tenure = await anext(tenures)
                assert int(tenure.get("a") or b"0") >= value
                asyncio.get_running_loop().call_later(random.uniform(0.1, 0.5), proxy.cut)
                with pytest.raises(TenureLost):
                    await count(tenure)


async def test_a_connection_that_is_swallowed_is_doubted(node: Node) -> None:
    with Proxy(node.port) as proxy:
        async with opened(proxy.url) as table, table.tenures() as tenures:
            tenure = await anext(tenures)
            proxy.swallow()
            began = time.monotonic()
            with pytest.raises(TenureLost, match="nothing for"):
                await tenure.change({"a": b"1"})
            assert time.monotonic() - began < 10
            proxy.resume()
            proxy.cut()
            await (await anext(tenures)).change({"a": b"2"})


def check_counts(group: Group) -> None:
    """Each holder found what the one before had changed, and no number was told twice."""
    held, changed = group.said("held"), [one["value"] for one in group.said("changed")]
    assert changed == sorted(set(changed))
    for one in held:
        told = [other["value"] for other in group.said("changed") if other["at"] < one["at"]]
        assert one["count"] >= max(told, default=0)


def test_twenty_holders_are_killed_and_no_row_is_lost(node: Node, record_property: Any) -> None:
    with Group(node.url, "count") as group:
        asyncio.run(fill(node.url, group.name, 50))
        takeovers = []
        for _ in range(3):
            group.join()
        for _ in range(20):
            holder = group.holder()
            holder.wait_for("changed")
            wait_until(lambda: all(one.of("standing by") for one in group.members), "the others stand by")
            time.sleep(random.uniform(0.0, 0.3))  # at a random moment
            group.join()
            since = time.monotonic()
            group.kill(holder)
            takeovers.append(group.takeover(since))
        held = group.said("held")
        assert {one["rows"] for one in held[1:]} == {51}
        assert [one["epoch"] for one in held] == sorted({one["epoch"] for one in held})
        check_counts(group)
        takeovers.sort()
        print(f"takeover of 51 rows: median {takeovers[10]:.3f} s, worst {takeovers[-1]:.3f} s")
        record_property("takeover", takeovers)
        assert takeovers[10] < 1.0


def test_no_kill_parts_a_task_from_its_row(node: Node) -> None:
    """Each holder goes on with the number after the row's: a task that was stored without it would come twice, a row
    without its task would leave a gap."""
    asyncio.run(declare(node.url, Declaration(TASKS, arguments={"x-queue-type": "quorum"})))
    with Group(node.url, "enqueue") as group:
        asyncio.run(fill(node.url, group.name, 1))
        asyncio.run(_set(node.url, group.name, "count", b"0"))
        for _ in range(3):
            group.join()
        for _ in range(15):
            holder = group.holder()
            holder.wait_for("changed", 3)
            time.sleep(random.uniform(0.0, 0.2))  # at a random moment
            group.join()
            group.kill(holder)
        last = max(one["count"] for one in group.said("held"))
        print(f"{sum(bool(one['uncertain']) for one in group.said('held'))} of 15 kills left a task uncertain")
        for one in list(group.members):
            group.kill(one)
    found = asyncio.run(ids(node.url, TASKS))
    assert found == [str(number) for number in range(1, len(found) + 1)]
    assert len(found) >= last


async def _set(url: str, name: str, key: str, value: bytes) -> None:
    async with opened(url, name) as table, table.tenures() as tenures:
        await (await anext(tenures)).change({key: value})


def test_a_frozen_holder_that_comes_back_does_nothing(node: Node) -> None:
    asyncio.run(declare(node.url, Declaration(TASKS, arguments={"x-queue-type": "quorum"})))
    with Group(node.url, "enqueue") as group:
        asyncio.run(_set(node.url, group.name, "count", b"0"))
        group.join()
        frozen = group.holder()
        frozen.wait_for("changed")
        other = group.join()
        other.wait_for("standing by")
        frozen.signal(signal.SIGSTOP)
        since = time.monotonic()
        print(f"frozen: taken over after {group.takeover(since):.1f} s")
        other.wait_for("changed", 20)
        resumed = time.monotonic()
        frozen.signal(signal.SIGCONT)
        frozen.wait_for("lost")
        other.wait_for("changed", 60)
        assert not [one for one in frozen.of("changed") if one["at"] > resumed]
        assert len(other.of("held")) == 1
        for one in list(group.members):
            group.kill(one)
    found = asyncio.run(ids(node.url, TASKS))
    assert found == [str(number) for number in range(1, len(found) + 1)]


@pytest.mark.rabbitmq
@pytest.mark.parametrize("version", RABBITMQ)
def test_a_restarted_broker_has_all_rows(version: str) -> None:
    with ExitStack() as stack:
        node = Node(version)
        stack.callback(node.close)
        node.start()
        node.wait()
        group = stack.enter_context(Group(node.url, "count"))
        asyncio.run(fill(node.url, group.name, 50))
        group.join()
        group.join()
        for _ in range(2):
            holder = group.holder()
            group.wait_for_more(10)
            node.restart()
            holder.wait_for("lost")
        group.holder()
        wait_until(lambda: group.said("held")[-1]["rows"] == 51, "all rows are there")
        check_counts(group)


@pytest.fixture(params=RABBITMQ, scope="class")
def cluster(request: pytest.FixtureRequest) -> Iterator[Cluster]:
    with Cluster(request.param) as cluster:
        yield cluster


@pytest.mark.rabbitmq
@pytest.mark.timeout(600)
class TestClusters:
    def test_the_holder_s_node_is_killed(self, cluster: Cluster) -> None:
        urls = [f"amqp://guest:guest@127.0.0.1:{node.port}/" for node in cluster.nodes]
        asyncio.run(declare(urls[0], Declaration(TASKS, arguments={"x-queue-type": "quorum"})))
        with Group(cluster.url, "surely") as group:
            asyncio.run(fill(urls[0], group.name, 50))
            asyncio.run(_set(urls[0], group.name, "count", b"0"))
            group.join(urls[1])
            group.holder()
            group.join(urls[2])
            group.join(urls[0])
            group.wait_for_more(20)
            since = time.monotonic()
            cluster.nodes[1].kill()
            print(f"node killed: taken over after {group.takeover(since):.1f} s")
            wait_until(lambda: group.said("changed")[-1]["at"] > since + 1, "the next one goes on", SOON)
            cluster.nodes[1].start()
            cluster.nodes[1].wait()
            cluster.wait_for_running(3)
            for one in list(group.members):
                group.kill(one)
            assert {one["rows"] for one in group.said("held")} == {51}
            last = max(one["value"] for one in group.said("changed"))
        found = list(map(int, asyncio.run(ids(urls[0], TASKS))))
        assert set(range(1, last + 1)) <= set(found)

    def test_a_minority_with_the_holder_is_parted(self, cluster: Cluster) -> None:
        urls = [f"amqp://guest:guest@127.0.0.1:{node.port}/" for node in cluster.nodes]
        with Group(cluster.url, "count") as group:
            asyncio.run(fill(urls[0], group.name, 50))
            parted = group.join(urls[2])
            group.holder()
            group.join(urls[0])
            group.join(urls[1])
            group.wait_for_more(20)
            since = time.monotonic()
            cluster.cut_off(cluster.nodes[2])
            print(f"parted: taken over after {group.takeover(since):.1f} s (and it took a while to part them)")
            taken = next(one for one in group.said("held") if one["at"] > since)["at"]
            group.wait_for_more(50)
            assert not [one for one in parted.of("changed") if one["at"] > taken]
            cluster.rejoin(cluster.nodes[2])
            cluster.wait_for_running(3)
            group.wait_for_more(100)
            assert {one["rows"] for one in group.said("held") if one["count"]} == {51}
            check_counts(group)
