"""Fuzz on the wire: whatever is sent, the worker works on, and each message ends in one place where it can be seen.

``LEVERET_FUZZ`` is the number of messages, and ``LEVERET_FUZZ_SEED`` the seed, for longer runs than this one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import leveret as leveret_package
from leveret.brokers import connect
from leveret.model import Envelope, Queue, new_id
from tests.support import hostile_app
from tests.support.foreign import Raw, publish
from tests.support.hostile import Hostile, hostile
from tests.support.waiting import wait_until
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from leveret.model import DeadLetter
    from tests.support.nodes import Node
    from tests.support.workers import Ledger

APP = f"{Path(hostile_app.__file__)}:app"
COUNT = int(os.environ.get("LEVERET_FUZZ", "150"))
SEED = int(os.environ.get("LEVERET_FUZZ_SEED", "7"))
#: Good tasks among them.
GOOD = range(1_000_000, 1_000_000 + COUNT // 10)
#: For all of them to end, on a busy machine (seconds).
WITHIN = 60.0 + COUNT / 2


class Ends:
    """Where the messages of a queue have ended."""

    def __init__(self, url: str, ledger: Ledger, bodies: dict[int, bytes]) -> None:
        self._url = url
        self._ledger = ledger
        self._bodies = bodies

    def ran(self) -> list[int]:
        return sorted(int(line.removeprefix("ran ")) for line in self._ledger.lines())

    def dead(self) -> list[int]:
        """The numbers of the dead letters, by their bodies, which must be as they were."""
        numbers = {body: number for number, body in self._bodies.items()}
        return sorted(numbers[letter.envelope.body] for letter in asyncio.run(self._letters()))

    def wait(self) -> None:
        """Until each is in exactly one place, and none is in the queue."""
        wait_until(lambda: len(self.ran()) + len(self.dead()) >= len(self._bodies), "all have ended", WITHIN)
        wait_until(lambda: asyncio.run(self._left()) == (0, 0, 0), "nothing is left in the queue", WITHIN)
        assert sorted(self.ran() + self.dead()) == sorted(self._bodies)

    async def _letters(self) -> Sequence[DeadLetter]:
        broker = connect(self._url)
        try:
            return await broker.dead_letters.read("work", limit=len(self._bodies) + 1)
        finally:
            await broker.close()

    async def _stats(self) -> Any:
        broker = connect(self._url)
        try:
            return next(one for one in await broker.queues.stats(["work"]) if one.name == "work")
        finally:
            await broker.close()

    async def _left(self) -> tuple[int, int, int]:
        stats = await self._stats()
        return (stats.ready, stats.running, stats.delayed)


def is_well(worker: Worker) -> None:
    """It still runs, on its first connection and with its first child, and it made no mistake of its own."""
    assert worker.process.poll() is None
    # Tracebacks begin in the tasks: one with a place in this library is of its own.
    own_code = str(Path(leveret_package.__file__).parent)
    for trouble in (own_code, "a mistake", "was lost", "child process", "cannot be", "not recorded"):
        assert trouble not in re.sub("its (properties|row in the file) cannot be read", "", worker.output)


def mixed(messages: list[Hostile]) -> list[Hostile]:
    """Good tasks among the hostile ones."""
    good = [Hostile(number, Raw(type=b"swallow"), b'{"kwargs":{"number":%d}}' % number) for number in GOOD]
    among = messages + good
    random.Random(SEED).shuffle(among)
    return among


@pytest.mark.timeout(3 * WITHIN)
def test_messages_on_rabbitmq(node: Node, ledger: Ledger) -> None:
    """Deaths of dead letters too: some are put into the dead-letter queue as they are, and all dead ones put back."""
    messages = hostile(SEED, COUNT)
    waiting, dead = mixed(messages[COUNT // 5 :]), messages[: COUNT // 5]
    ends = Ends(node.url, ledger, {message.number: message.body for message in waiting + dead})
    with Worker(node.url, ledger, "--concurrency", "4", app=APP) as worker:
        worker.ready()
        publish(node, "work.dead", [(message.properties, message.body) for message in dead], declare=False)
        publish(node, "work", [(message.properties, message.body) for message in waiting])
        ends.wait()
        put_back_all(node.url, ends)
        is_well(worker)


@pytest.mark.timeout(3 * WITHIN)
def test_tasks_on_sqlite(tmp_path: Path, ledger: Ledger) -> None:
    """Where only this library writes to the queue: bodies, names, times and headers may still be anything."""
    url = f"sqlite:///{tmp_path / 'leveret.db'}"
    messages = mixed(hostile(SEED, COUNT))
    ends = Ends(url, ledger, {message.number: message.body for message in messages})
    with Worker(url, ledger, "--concurrency", "4", app=APP) as worker:
        asyncio.run(store(url, [envelope(message) for message in messages]))
        ends.wait()
        put_back_all(url, ends)
        is_well(worker)


def put_back_all(url: str, ends: Ends) -> None:
    """What was dead by its headers alone runs now; the others are dead again."""
    listed = json.loads(leveret("dead", "list", "work", "--json", "--limit", "100000", "--url", url))
    dead = ends.dead()
    assert len(listed) == len(dead)
    assert all(letter["reason"] for letter in listed)
    leveret("dead", "list", "work", "--url", url)
    assert leveret("dead", "retry", "work", "--all", "--url", url).startswith(f"{len(dead)} dead letters")
    ends.wait()
    assert set(ends.dead()) <= set(dead)
    assert set(GOOD) <= set(ends.ran())


def envelope(message: Hostile) -> Envelope:
    chance = random.Random(message.number)
    now = time.time()
    return Envelope(
        new_id(),
        "work",
        chance.choice(("swallow", "particular", "fail", "give_up", "fail_later", "", "é\x00\n\x1b[31m", None))
        if message.number not in GOOD
        else "swallow",
        message.body,
        chance.choice((None, "", "text/plain; charset=utf-16")),
        due=chance.choice((None, -1.0, now - 1, now + 1)),
        expires_at=chance.choice((None, None, 0.0, now + 3_600)) if message.number not in GOOD else None,
        headers=chance.choice(({}, {"": [None, float("nan")], "é": {"a": b"\xff"}})),
    )


async def store(url: str, envelopes: Sequence[Envelope]) -> None:
    broker = connect(url)
    try:
        await broker.declare([Queue("work")])
        await broker.publish(envelopes)
    finally:
        await broker.close()
