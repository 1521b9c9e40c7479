"""Brokers for the tests: every kind that is shipped, RabbitMQ as real nodes of the tests' own."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import aio_pika.exceptions
import pytest

from leveret.brokers import Broker, connect
from leveret.brokers.memory import MemoryBroker, MemoryStore
from leveret.brokers.rabbitmq.coordination.entries import requests_queue, table_queue
from leveret.brokers.rabbitmq.queues.topology import DELAY_STEPS, dead_queue, delay_queue, gate_queue, pause_marker
from leveret.executors import loops
from tests.support import surroundings
from tests.support.client import Client
from tests.support.databases import Databases
from tests.support.nodes import TREES, Node
from tests.support.reaper import MARK, Reaper
from tests.support.workers import Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

TESTS = Path(__file__).parent
RABBITMQ = ("3.10", "4")
#: The queues of the programs in docs/, and a misspelt one that a command has made.
OTHERS = ("letters", "small", "mail", "wrok", "unique", "limited", "fair", "render", "full")
#: An async test that takes longer hangs, and its traceback says where (seconds). Shorter than pytest's own limit, which
#: ends the process.
HANGS = 200.0
#: A queue that forwards what expires, and is deleted so soon after its node has started, may take that node's part of
#: RabbitMQ 3.10 with it that forwards (`rabbit_fifo_dlx_sup` ends for good): then no queue takes delayed tasks any more
#: (seconds).
SETTLED = 3.0
#: How long the deletion of a stream may take; one that comes later takes the next test's log (seconds).
DELETED = 60.0
#: The event loop of the async tests: $LEVERET_TEST_LOOP.
LOOP: loops.Loop = "uvloop" if os.environ.get("LEVERET_TEST_LOOP") == "uvloop" else "asyncio"


#: Fixtures that start nodes.
NODES = {"node", "tls_node", "impatient"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--no-rabbitmq", action="store_true", help="leave out what needs a RabbitMQ node")


def pytest_configure(config: pytest.Config) -> None:
    """The run's reaper; xdist's workers, and a run inside a run, belong to the run that has one."""
    surroundings.settle()
    if MARK not in os.environ:
        reaper = Reaper([tree / "tmp" for tree in TREES.values()])
        config.add_cleanup(reaper.close)


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run ``async def`` tests, each on a loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = pyfuncitem._fixtureinfo.argnames

    async def run() -> None:
        async with asyncio.timeout(HANGS):
            await pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names})

    loops.run(run(), LOOP)
    return True


class Nodes:
    """The session's RabbitMQ nodes; the first that is asked for starts them all, side by side."""

    def __init__(self) -> None:
        self._nodes: dict[str, Node] = {}

    def get(self, version: str) -> Node:
        if not self._nodes:
            self._nodes = {version: Node(version) for version in RABBITMQ}
            for node in self._nodes.values():
                node.start()
        node = self._nodes[version]
        node.wait()
        return node

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> Iterator[None]:
    """Commands that a test runs in this process set loggers, which would hide from a later test what it waits for."""
    before = {name: (one.level, one.disabled, one.propagate) for name, one in our_loggers()}
    yield
    for name, one in our_loggers():
        level, one.disabled, one.propagate = before.get(name, (logging.NOTSET, False, True))
        one.setLevel(level)


def our_loggers() -> list[tuple[str, logging.Logger]]:
    every = list(logging.root.manager.loggerDict.items())
    return [(name, one) for name, one in every if name.startswith("leveret") and isinstance(one, logging.Logger)]


@pytest.fixture(scope="session")
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.close()


@pytest.fixture(scope="session")
def databases() -> Iterator[Databases]:
    databases = Databases()
    yield databases
    databases.close()


class Place:
    """Somewhere to keep tasks: its URL, and as many brokers on it as are wanted."""

    def __init__(self, kind: str, url: str, open_broker: Callable[[], Broker], node: Node | None = None) -> None:
        self.kind = kind
        self.url = url
        self.open = open_broker
        self.node = node

    def __repr__(self) -> str:
        return self.kind


def _place(kind: str, folder: Path, nodes: Nodes) -> Place:
    if kind == "memory":
        store = MemoryStore()
        return Place(kind, "memory://", lambda: MemoryBroker(store))
    node = nodes.get(kind.removeprefix("rabbitmq-")) if kind.startswith("rabbitmq-") else None
    url = node.url if node else f"sqlite:///{folder / 'leveret.db'}"
    return Place(kind, url, lambda: connect(url, timeout=20.0), node)


@pytest.fixture(params=["memory", "sqlite", "rabbitmq-3.10", "rabbitmq-4"])
def any_place(request: pytest.FixtureRequest, tmp_path: Path, nodes: Nodes) -> Place:
    """Every broker."""
    return _place(request.param, tmp_path, nodes)


@pytest.fixture(params=["sqlite", "rabbitmq-3.10", "rabbitmq-4"])
def place(request: pytest.FixtureRequest, tmp_path: Path, nodes: Nodes) -> Iterator[Place]:
    """Every broker that outlives a process; without the queues of the test before."""
    place = _place(request.param, tmp_path, nodes)
    yield place
    if place.node is not None:
        delete_queues(place.node)


@pytest.fixture(params=RABBITMQ)
def node(request: pytest.FixtureRequest, nodes: Nodes) -> Iterator[Node]:
    """Each RabbitMQ version's node; without the queues of the test before."""
    node = nodes.get(request.param)
    yield node
    delete_queues(node)


@pytest.fixture
def client(place: Place) -> Client:
    return Client(place.url)


def delete_queues(node: Node) -> None:
    """Delete the queues that tests share by name; the node may be down, or the queue in use or not there."""

    async def delete() -> None:
        await asyncio.sleep(max(0.0, node.started_at + SETTLED - time.monotonic()))
        connection = await aio_pika.connect(node.url)
        async with connection:
            channel = await connection.channel()
            for name in ("work", "other", "raw", "default", "task_queue", "thumbnails", "leveret-demo", *OTHERS):
                for one in (name, dead_queue(name), gate_queue(name), pause_marker(name).name):
                    await channel.queue_delete(one)
                await channel.exchange_delete(pause_marker(name).name)
            for table in ("schedules", "limits"):
                await channel.queue_delete(table_queue(table))
                await channel.queue_delete(requests_queue(table))
            for milliseconds in DELAY_STEPS:
                await channel.queue_delete(delay_queue("work", milliseconds))
            for stream in ("leveret.events", "leveret.cancelled", "leveret.claims"):
                # After a restart of its node a stream of RabbitMQ 3.10 may stay unavailable for a while.
                with suppress(aio_pika.exceptions.AMQPException, TimeoutError):
                    async with asyncio.timeout(DELETED):
                        await (await connection.channel()).queue_delete(stream)

    asyncio.run(delete())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Quick tests first: a mistake shows in seconds. Then the longest, and those that share a node by their module.

    The rest is mixed: conformance tests mostly wait, and the others mostly compute.
    """
    stages = {"quick": 0, "long": 1, "waiting": 2, "computing": 2}
    total, before = Counter(map(_nature, items)), Counter[str]()

    def place(item: pytest.Function) -> tuple[int, float]:
        nature = _nature(item)
        before[nature] += 1
        return stages[nature], before[nature] / total[nature]

    items.sort(key=place)
    if config.getoption("--no-rabbitmq"):
        config.hook.pytest_deselected(items=[item for item in items if _needs_a_node(item)])
        items[:] = [item for item in items if not _needs_a_node(item)]


def _needs_a_node(item: pytest.Function) -> bool:
    """Whether it needs a RabbitMQ node."""
    params = item.callspec.params.values() if hasattr(item, "callspec") else ()
    on_rabbitmq = any(isinstance(one, str) and one.startswith("rabbitmq") for one in params)
    return on_rabbitmq or bool(NODES & set(item.fixturenames)) or item.get_closest_marker("rabbitmq") is not None


def _nature(item: pytest.Function) -> str:
    folder = item.path.relative_to(TESTS).parts[0]
    if folder in {"unit", "typing"}:
        return "quick"
    if item.get_closest_marker("timeout") or {"tls_node", "impatient"} & set(item.fixturenames):
        return "long"
    return "waiting" if folder == "conformance" else "computing"


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "ledger")
