"""A dashboard in the test's own process, a client for it, and tasks in every state."""

from __future__ import annotations

import re
import time
from contextlib import asynccontextmanager
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

import httpx

from leveret.dashboard import dashboard
from leveret.model import DeadLettered, Envelope, Queue
from leveret.model.status import settled
from leveret.testing.bench import batches_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from leveret.brokers import Broker
    from leveret.client.app import App

ADDRESS = "http://dashboard.test"


class Visitor:
    """A browser without scripts: it keeps cookies, and sends forms as the pages have them."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self.client = client

    async def get(self, path: str) -> str:
        answer = await self.client.get(path, follow_redirects=True)
        assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
        return answer.text

    async def post(self, path: str, fields: Sequence[tuple[str, str]], **headers: str) -> httpx.Response:
        """As the page at that path would; ``headers`` instead of its own."""
        page = await self.client.get(path)
        token = re.search(r'name="form" value="([^"]+)"', page.text)
        # A page without a form has given the cookie all the same.
        form = token[1] if token else self.client.cookies["leveret_form"]
        content = httpx.QueryParams([("form", form), *fields])
        given = {"Origin": ADDRESS, "Content-Type": "application/x-www-form-urlencoded", **headers}
        return await self.client.post(path, content=str(content), headers=given, follow_redirects=True)


@asynccontextmanager
async def visiting(app: App, **options: Any) -> AsyncIterator[Visitor]:
    """The dashboard of an application, asked without a network."""
    served = dashboard(app, **{"token": None, **options})
    try:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=served), base_url=ADDRESS) as client:
            yield Visitor(client)
    finally:
        served.close()
        await app.close()


async def bury(broker: Broker, envelopes: Sequence[Envelope], reason: str, traceback: str = "") -> None:
    """Make dead letters of these, as a worker would; the broker must not have other ready tasks in their queues."""
    await take(broker, envelopes, lambda _: DeadLettered(reason, traceback))


async def take(broker: Broker, envelopes: Sequence[Envelope], decide: Any) -> None:
    queues = [Queue(name) for name in dict.fromkeys(envelope.queue for envelope in envelopes)]
    await broker.declare(queues)
    await broker.publish(envelopes)
    async with broker.consume(queues, credit=None) as consumer:
        left = len(envelopes)
        async for batch in batches_of(consumer):
            settlements = [(delivery, decide(delivery.envelope)) for delivery in batch]
            now = time.time()
            told = [settled(one.envelope, one.envelope.task, outcome, now) for one, outcome in settlements]
            await broker.settle(settlements, told)
            left -= len(batch)
            if left <= 0:
                break


class Page(HTMLParser):
    """What a browser makes of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]
