"""The tutorial's programs behave as the tutorial prints, and share their queue with everybody else's."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import aio_pika
import pika
import pytest

from tests.support.waiting import until, wait_until
from tests.support.workers import Program

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Place
    from tests.support.nodes import Node

TUTORIAL = Path(__file__).parents[2] / "examples" / "tutorial"
WAITING = " [*] Waiting for messages. To exit press CTRL+C"


def new_task(url: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, TUTORIAL / "new_task.py", *words],
        env={"LEVERET_URL": url, "PATH": ""},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done.stdout


@contextmanager
def tasks_worker(place: Place | Node, folder: Path, name: str, *options: str) -> Iterator[Program]:
    arguments = [str(TUTORIAL / "tasks_worker.py"), *options]
    with Program(arguments, folder / f"{name}.log", {"LEVERET_URL": place.url}) as worker:
        worker.wait_for(WAITING)
        yield worker


def received(worker: Program) -> list[str]:
    return [line.partition("Received ")[2] for line in worker.output.splitlines() if "Received" in line]


def test_one_task(place: Place, tmp_path: Path) -> None:
    with tasks_worker(place, tmp_path, "c1") as worker:
        assert new_task(place.url, "First", "message.") == " [x] Sent 'First message.'\n"
        worker.wait_for(" [x] Done")
        assert worker.output.splitlines() == [WAITING, " [x] Received 'First message.'", " [x] Done"]


def test_round_robin_dispatching(place: Place, tmp_path: Path) -> None:
    """Two idle workers without a prefetch limit share five messages exactly as printed there."""
    with (
        tasks_worker(place, tmp_path, "c1", "--prefetch", "unlimited") as one,
        tasks_worker(place, tmp_path, "c2", "--prefetch", "unlimited") as two,
    ):
        for text in ("First message.", "Second message.", "Third message.", "Fourth message.", "Fifth message."):
            new_task(place.url, *text.split())
        wait_until(lambda: one.output.count("Done") + two.output.count("Done") == 5, "five are done")
        first, second = sorted([received(one), received(two)])
    assert first == ["'First message.'", "'Third message.'", "'Fifth message.'"]
    assert second == ["'Second message.'", "'Fourth message.'"]


def test_fair_dispatch(place: Place, tmp_path: Path) -> None:
    """With one at a time, no light task waits behind a heavy one, as every second would in turns."""
    heavy = "heavy" + "." * 100
    with tasks_worker(place, tmp_path, "c1") as one, tasks_worker(place, tmp_path, "c2") as two:
        for text in (heavy, "light", "light", "light"):
            new_task(place.url, text)
        wait_until(lambda: (one.output + two.output).count("Done") == 3, "the light ones are done")
        assert sorted([received(one), received(two)]) == [[f"'{heavy}'"], ["'light'"] * 3]


# What RabbitMQ's and aio-pika's tutorials declare for task_queue, and what older ones did.
DECLARED = {"quorum": {"x-queue-type": "quorum"}, "classic": {}}


@pytest.mark.parametrize("kind", DECLARED)
def test_foreign_producers(node: Node, tmp_path: Path, kind: str) -> None:
    """amqp-publish, pika and aio-pika publish plain messages, into a queue that they declared: all run here."""
    parameters = pika.URLParameters(node.url)
    with pika.BlockingConnection(parameters) as connection:
        channel = connection.channel()
        channel.queue_declare("task_queue", durable=True, arguments=DECLARED[kind])
        persistent = pika.BasicProperties(delivery_mode=pika.DeliveryMode.Persistent)
        channel.basic_publish("", "task_queue", b"from pika", persistent)
    amqp_publish(node, "from amqp-publish")
    asyncio.run(aio_pika_new_task(node.url, "from aio-pika"))
    with tasks_worker(node, tmp_path, "c1") as worker:
        worker.wait_for(" [x] Done", 3)
        assert sorted(received(worker)) == ["'from aio-pika'", "'from amqp-publish'", "'from pika'"]
        amqp_publish(node, "later")
        worker.wait_for("'later'")


def amqp_publish(node: Node, text: str) -> None:
    url = f"--url={node.url.removesuffix('/')}"
    subprocess.run(["amqp-publish", url, "-r", "task_queue", "-p", "-b", text], check=True, timeout=30)


async def aio_pika_new_task(url: str, text: str) -> None:
    """As the aio-pika tutorial's new_task.py: the default exchange, persistent."""
    async with await aio_pika.connect(url) as connection:
        channel = await connection.channel()
        message = aio_pika.Message(text.encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
        await channel.default_exchange.publish(message, routing_key="task_queue")


@pytest.mark.parametrize("kind", DECLARED)
@pytest.mark.parametrize("first", ["they declare first", "we declare first"])
def test_foreign_consumers(node: Node, kind: str, first: str) -> None:
    """What is enqueued here as raw text their workers receive, durable and persistent, whoever declares first."""
    if first == "we declare first":
        new_task(node.url, "hello")
    declared = DECLARED[kind] if first == "they declare first" else DECLARED["quorum"]
    messages = asyncio.run(consume(node, declared, first))
    assert [(message.body, message.delivery_mode) for message in messages] == [
        (b"hello", aio_pika.DeliveryMode.PERSISTENT)
    ]


async def consume(node: Node, arguments: dict[str, str], first: str) -> list[aio_pika.abc.AbstractIncomingMessage]:
    """As the tutorial's tasks_worker.py: declares durable, prefetch of one, acknowledges after."""
    got: list[aio_pika.abc.AbstractIncomingMessage] = []

    async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        async with message.process():
            got.append(message)

    async with await aio_pika.connect(node.url) as connection:
        channel = await connection.channel()
        await channel.set_qos(prefetch_count=1)
        queue = await channel.declare_queue("task_queue", durable=True, arguments=dict(arguments))
        await queue.consume(on_message)
        if first == "they declare first":
            await asyncio.to_thread(new_task, node.url, "hello")

        async def arrived() -> bool:
            return bool(got)

        await until(arrived, "the message arrived")
    return got


def test_the_demo(place: Place) -> None:
    """`leveret demo`: two workers, five tasks, one worker killed in mid-task and its task taken over."""
    url = () if place.node is None else ("--url", place.url)
    done = subprocess.run(
        [sys.executable, "-m", "leveret", "demo", *url], capture_output=True, text=True, timeout=90, check=True
    )
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert sum("[x] Sent" in line for line in lines) == 5
    assert sum("kill -9" in line for line in lines) == 1
    assert [line.partition("|")[0] for line in lines if "Received 'Fourth" in line] in (
        ["worker 1 ", "worker 2 "],
        ["worker 2 ", "worker 1 "],
    )
    assert len({line.partition("Done")[2] for line in lines if "Done" in line}) == 5
    assert "5 tasks sent, 5 done, none lost" in done.stdout
