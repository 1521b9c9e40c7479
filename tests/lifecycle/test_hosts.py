"""Several hosts in the URL, some of them silent: what is asked for is done by one that is well, within its time."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest

from leveret import App, BrokerUnavailable, Queue
from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import Hosts
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.model import Envelope, new_id
from leveret.testing.bench import Taken
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import free_ports
from tests.support.proxy import Proxy
from tests.support.silent import ELSEWHERE, accepting, dropping, hanging_up_once
from tests.support.waiting import until
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tests.support.nodes import Node

#: What the issue's callers have (seconds): less than one host may take to connect.
TIMEOUT = 5.0
SHAPES = [
    ("accepting", "well"),
    ("dropping", "well"),
    ("accepting", "dropping", "well"),
    ("well", "accepting"),
    ("dropping", "well", "accepting"),
    (*["accepting"] * 6, "well"),
]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def url_of(ports: Sequence[int]) -> str:
    return f"amqp://guest:guest@{','.join(f'127.0.0.1:{port}' for port in ports)}/"


def arranged(stack: ExitStack, node: Node, shape: Sequence[str]) -> str:
    makers = {"accepting": accepting, "dropping": dropping}
    return url_of([node.port if kind == "well" else stack.enter_context(makers[kind]()) for kind in shape])


def app_on(url: str, timeout: float = TIMEOUT) -> App:
    app = App(url, enqueue_timeout=timeout, queues=[Queue("work")])

    @app.task(queue="work")
    async def say(text: str) -> None: ...

    return app


@pytest.mark.parametrize("shape", SHAPES, ids="-".join)
async def test_a_silent_host_costs_a_moment(node: Node, stack: ExitStack, shape: Sequence[str]) -> None:
    """At the start of a program, wherever it stands: producers and whoever asks."""
    app = app_on(arranged(stack, node, shape))
    (say,) = app.tasks
    await say.enqueue("a")
    assert await app.client.broker.dead_letters.read("work", limit=1) == []
    (stats,) = await app.client.broker.queues.stats(["work"])
    assert stats.ready == 1
    await app.close()


async def test_the_host_that_was_well_is_asked_first(node: Node, stack: ExitStack) -> None:
    """By the later connections of a program: the silent one is not begun with again."""
    url = arranged(stack, node, ("accepting", "well"))
    hosts = Hosts(url, timeout=TIMEOUT)
    link = await amqp.Link.open(hosts, purpose="producer", confirms=False)
    assert str(node.port) in hosts.in_order()[0]
    await link.close()


async def test_a_name_with_several_addresses(node: Node, stack: ExitStack) -> None:
    """The first of which is silent: an address is as good as a host."""
    stack.enter_context(accepting(node.port, ELSEWHERE))
    loop = asyncio.get_running_loop()
    looked_up = loop.getaddrinfo

    async def getaddrinfo(host: str | None, port: int | str | None, **options: int) -> object:
        if host != "cluster.example":
            return await looked_up(host, port, **options)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in (ELSEWHERE, "127.0.0.1")]

    loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign, assignment]
    app = app_on(f"amqp://guest:guest@cluster.example:{node.port}/")
    await app.tasks[0].enqueue("a")
    await app.close()


async def test_a_host_that_falls_silent_in_mid_life(node: Node) -> None:
    """It accepted the connection, and answers nothing any more: what is under way goes by the other, and so on."""
    with Proxy(node.port) as one, Proxy(node.port) as other:
        app = app_on(url_of([one.port, other.port]))
        (say,) = app.tasks
        await say.enqueue("first")
        for silent in (one, other, one):
            silent.swallow()
            await asyncio.gather(*(say.enqueue(str(number)) for number in range(20)))
            await app.client.broker.queues.stats(["work"])
            silent.resume()
            silent.cut()
        await app.close()


async def test_a_question_finds_its_host_silent(node: Node) -> None:
    """Of a program that looks on, and has published nothing since."""
    with Proxy(node.port) as one, Proxy(node.port) as other:
        broker = connect(url_of([one.port, other.port]), timeout=TIMEOUT)
        await broker.declare([Queue("work")])
        one.swallow()
        assert [stats.name for stats in await broker.queues.stats(["work"])] == ["work"]
        await broker.close()


async def test_all_hosts_are_silent(node: Node, stack: ExitStack) -> None:
    """An error in the caller's time, that names them and says that nothing is stored; then one is well again."""
    dead = stack.enter_context(accepting())
    operator = connect(node.url, timeout=20.0)
    await operator.declare([Queue("work")])  # to make a queue takes longer than an enqueue may take here
    await operator.close()
    with Proxy(node.port) as proxy:
        proxy.swallow()
        app = app_on(url_of([dead, proxy.port]), timeout=1.0)
        (say,) = app.tasks
        for _ in range(2):
            async with asyncio.timeout(30):
                with pytest.raises(BrokerUnavailable, match=str(dead)):
                    await say.enqueue("a")
        proxy.resume()
        await until(lambda: enqueued(app), "one is well again")
        await app.close()


async def enqueued(app: App) -> bool:
    try:
        await app.tasks[0].enqueue("b")
    except BrokerUnavailable:
        return False
    return True


async def test_a_url_may_say_how_long_a_host_may_take(stack: ExitStack) -> None:
    url = url_of([stack.enter_context(accepting())]) + "?timeout=0.2"
    broker = connect(url, timeout=1.0)
    with pytest.raises(BrokerUnavailable, match=r"no answer within 0.2 s"):
        await broker.dead_letters.read("work", limit=1)
    await broker.close()


async def test_a_consumer_goes_to_the_other_host(node: Node) -> None:
    """Its connection is silent for longer than three heartbeats."""
    with Proxy(node.port) as one, Proxy(node.port) as other:
        url = url_of([one.port, other.port]) + "?heartbeat=1"
        broker, producer = connect(url, timeout=TIMEOUT), connect(node.url, timeout=TIMEOUT)
        async with broker.consume([Queue("work")], credit=1) as consumer:
            taken = Taken(consumer)
            one.swallow()
            await producer.publish([Envelope(new_id(), "work", "say", b"{}", enqueued_at=time.time())])
            assert len(await taken.next()) == 1
            taken.abandon()
        await broker.close()
        await producer.close()


def test_a_worker_and_the_command_line(node: Node, stack: ExitStack, ledger: Ledger) -> None:
    url = arranged(stack, node, ("accepting", "dropping", "well"))
    client = Client(url)
    client.enqueue(ledger_app.say, "hello")
    with Worker(url, ledger):
        ledger.wait_for("said hello")
    assert "work" in leveret("queues", "-q", "work", "--url", url)
    assert "no dead letters" in leveret("dead", "list", "work", "--url", url)
    assert "is paused" in leveret("queues", "pause", "work", "--url", url)
    assert "goes on" in leveret("queues", "resume", "work", "--url", url)


async def test_another_reason_is_told_too(caplog: pytest.LogCaptureFixture) -> None:
    """The first one may be what passes by itself, and the next one what somebody has to do something about."""
    (port,) = free_ports(1)
    app = app_on(f"{url_of([port])}?timeout=0.3", 60.0)
    enqueuing = asyncio.create_task(app.tasks[0].enqueue("x"))
    await until(lambda: said(caplog, "nothing listens there"), "it says that nothing listens")
    with accepting(port):
        await until(lambda: said(caplog, "no answer within 0.3 s"), "it says that nothing answers", 10.0)
    enqueuing.cancel()
    await asyncio.gather(enqueuing, return_exceptions=True)
    await app.close()
    assert len(caplog.records) == 2


async def said(caplog: pytest.LogCaptureFixture, text: str) -> bool:
    return text in caplog.text


async def test_what_a_host_said_last_is_told() -> None:
    """The next attempt may still wait for an answer when the caller's time is over."""
    with hanging_up_once() as port:
        app = app_on(url_of([port]), timeout=2.0)
        with pytest.raises(BrokerUnavailable, match=r"cannot connect to .*: .*(closed|reset)") as caught:
            await app.tasks[0].enqueue("a")
        assert "no answer" not in str(caught.value)
        await app.close()
