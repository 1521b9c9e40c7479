"""Those who may write to the broker forge and break what others read: nobody's view of the rest suffers."""

from __future__ import annotations

import asyncio
import json
import re
import sqlite3
from contextlib import asynccontextmanager, closing, suppress
from typing import TYPE_CHECKING

import aio_pika
import aio_pika.exceptions

from leveret.model import DeadLetter, Envelope, new_id
from tests.support import ledger_app
from tests.support.dashboard import bury, visiting
from tests.support.waiting import until
from tests.support.workers import Worker, leveret

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Place
    from tests.support.workers import Ledger


async def test_dead_letters_are_selected_as_they_are_read(any_place: Place) -> None:
    """So that nobody holds the bodies of thousands."""
    broker, queue = any_place.open(), f"selected-{new_id()}"
    try:
        letters = [Envelope(f"{number:032x}", queue, "resize", b"x" * 10) for number in range(6)]
        await bury(broker, letters, "ValueError")
        seen: list[str] = []

        def select(letter: DeadLetter) -> DeadLetter | None:
            seen.append(letter.envelope.id)
            return letter if letter.envelope.id in (letters[1].id, letters[5].id) else None

        found = await broker.dead_letters.read(queue, limit=5, select=select)
        assert [one.envelope.id for one in found] == [letters[1].id]
        assert list(dict.fromkeys(seen))[:5] == [one.id for one in letters[:5]]
        assert await broker.dead_letters.drop(queue, [letters[4].id]) == [letters[4].id]
        assert len(await broker.dead_letters.read(queue, limit=9)) == 5
        await broker.dead_letters.drop(queue, [one.id for one in letters])
    finally:
        await broker.close()


#: Beside one that is good; see tests/unit/brokers/test_bounds.py for more.
_FORGED = (
    '{"id": "forged-1", "state": "running", "at": 1e308, "queue": "work"}',
    '{"id": "forged-2", "state": "dead", "at": -1e300, "queue": "work"}',
    '{"id": "forged-3", "state": "retrying", "at": 1, "due": 9e99, "queue": "work"}',
    f'{{"id": "forged-4", "state": "dead", "at": 1, "queue": "{"é" * 200}"}}',
)
_GOOD = '{"id": "good", "state": "dead", "at": 1764000000.5, "queue": "work", "error": "oh"}'
_REPORTS = (
    '{"running": {"work": 1e999}}',
    '{"running": {"%s": 1}}' % ("é" * 200),
    '{"running": {}, "worker": {"name": "x", "started_at": 1e308, "queues": [], "waiting": 0, "finished": 0, '
    '"failed": 0, "children": []}}',
    '{"running": {}, "worker": {"name": "x", "started_at": 1, "queues": ["theirs"], "waiting": 0, '
    f'"finished": {2**70}, "failed": 0, "children": []}}}}',
    '{"running": {"theirs": 1}, "worker": {"name": "impostor:1", "started_at": 1, "queues": ["theirs"], "waiting": 0, '
    '"finished": 0, "failed": 0, "children": []}}',
    '{"running": %s}' % ("[" * 50_000),
    "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1"),
)


@asynccontextmanager
async def forging(place: Place) -> AsyncIterator[None]:
    """Somebody has told nonsense of tasks, and answers with nonsense when workers are asked."""
    if place.node is None:
        path = place.url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path)) as file, file:
            for update in (*_FORGED, _GOOD):
                file.execute(
                    "INSERT INTO record (id, change, at, status) VALUES (?, (SELECT tick FROM clock), 1.0, ?)",
                    (json.loads(update)["id"], update.encode()),
                )
                file.execute("UPDATE clock SET tick = tick + 1")
            file.execute(
                "INSERT INTO task (queue, state, id, body, attempt, enqueued_at, died_at, reason)"
                " SELECT id, 'dead', 'letter', x'7b7d', 1, -5.0, 1e308, 'oh' FROM queue LIMIT 1"
            )
        yield
        return
    async with await aio_pika.connect(place.url) as connection:
        channel = await connection.channel()
        body = f'{{"v": 1, "updates": [{", ".join((*_FORGED, _GOOD))}]}}'
        await channel.default_exchange.publish(aio_pika.Message(body.encode()), "leveret.events")
        await channel.declare_queue("theirs", exclusive=True)
        impostor = await channel.declare_queue(exclusive=True)
        await impostor.bind("leveret.control")

        async def answer(question: aio_pika.abc.AbstractIncomingMessage) -> None:
            for report in _REPORTS:
                message = aio_pika.Message(report.encode("latin-1", "replace"))
                with suppress(aio_pika.exceptions.AMQPError):
                    await channel.default_exchange.publish(message, question.reply_to or "", mandatory=False)

        await impostor.consume(answer, no_ack=True)
        yield


async def test_nobodys_view_suffers_from_what_somebody_forged(place: Place, ledger: Ledger) -> None:
    ledger_app.app.client.connect_to(place.url)
    with Worker(place.url, ledger) as worker:
        worker.ready()
        async with ledger_app.app:
            said = await ledger_app.say.enqueue("a")
            await said.result(30)
            async with forging(place), visiting(ledger_app.app, token=None) as visitor:
                url = ("--url", place.url)
                for id_ in ("good", said.id):
                    assert id_ in await asyncio.to_thread(leveret, "status", id_, "--json", *url)
                for id_ in ("forged-1", "forged-2"):
                    told = await asyncio.to_thread(leveret, "status", id_, *url, fails=True)
                    assert re.fullmatch(r"leveret: .*forged.*\n", told)
                shown = await asyncio.to_thread(leveret, "top", "--once", *url)
                assert re.search("^queue work ", shown, re.MULTILINE)
                assert "work" in await asyncio.to_thread(leveret, "queues", *url)
                assert "dead" in await asyncio.to_thread(leveret, "dead", "list", "work", *url)

                async def overview() -> bool:
                    page = await visitor.get("/")
                    assert "The broker does not answer" not in page
                    return "good" in page and said.id in page

                await until(overview, "the overview shows what is known")
                assert "impostor" in await visitor.get("/workers") or place.node is None
                for path in ("/tasks", "/dead?queue=work", "/queue?name=work"):
                    await visitor.get(path)
            again = await ledger_app.say.enqueue("b")
            await again.result(30)
