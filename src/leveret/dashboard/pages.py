"""The dashboard's pages: what there is to see."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse

from leveret.dashboard import charts, text, views
from leveret.dashboard.dead_letters import MOST_LETTERS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from leveret.dashboard.redaction import Redact
    from leveret.dashboard.site import Site
    from leveret.model import QueueStats

#: A page is told of news at most this often, and that the stream lives at least (seconds).
_SHORTEST_STEP, _LONGEST_STEP = 1.0, 15.0
#: A stream ends after that, and the browser asks for another one: a server that stops waits for no longer (seconds).
_LONGEST_STREAM = 30.0


class Pages:
    """They change nothing."""

    def __init__(self, site: Site, redact: Redact | None) -> None:
        self._site = site
        self._redact = redact

    async def overview(self, request: Request) -> Response:
        observer = self._site.observer
        samples = list(observer.recent.samples)
        return self._site.page(
            request,
            "overview.html",
            charts=[charts.throughput(samples), charts.run_time(samples), charts.depth(samples)],
            totals=views.totals(observer.stats, observer.workers, observer.recent.latest),
            stats=observer.stats,
            latest=observer.tasks.latest()[:8],
            failures=observer.tasks.failures()[:5],
        )

    async def queue(self, request: Request) -> Response:
        observer = self._site.observer
        stats = self._stats(request)
        return self._site.page(
            request,
            "queue.html",
            queue=stats,
            charts=[charts.depth(list(observer.recent.samples), stats.name)],
            latest=observer.tasks.latest(stats.name)[:50],
        )

    async def waiting(self, request: Request) -> Response:
        observer = self._site.observer
        stats = self._stats(request)
        ready = await observer.waiting.shown(stats.name, "ready", self._redact)
        delayed = await observer.waiting.shown(stats.name, "delayed", self._redact)
        states = [("ready", stats.ready, ready), ("delayed", stats.delayed, delayed)]
        return self._site.page(request, "waiting.html", queue=stats, states=states)

    def _stats(self, request: Request) -> QueueStats:
        """Of the queue that is asked for."""
        name = request.query_params.get("name", "")
        stats = views.stats_of(name, self._site.observer.stats)
        if stats is None:
            raise HTTPException(404, f"No queue {text.short(name)!r} is known here.")
        return stats

    async def tasks(self, request: Request) -> Response:
        state = request.query_params.get("state", "")
        wanted = request.query_params.get("task", "").strip()
        found = [
            status
            for status in self._site.observer.tasks.latest()
            if state in ("", status.state) and wanted.casefold() in (status.task or "").casefold()
        ]
        return self._site.page(request, "tasks.html", latest=found[:100], found=len(found), state=state, wanted=wanted)

    async def task(self, request: Request) -> Response:
        id_ = request.query_params.get("id", "").strip()
        status = await self._site.observer.tasks.task(id_) if id_ else None
        if status is None:
            raise HTTPException(404, f"Nothing is known of a task with the id {text.short(id_)!r}.")
        letter = await self._site.observer.dead_letters.whole(status.queue, id_) if status.state == "dead" else None
        view = views.task_view(self._site.app, status, letter, self._redact)
        return self._site.page(request, "task.html", view=view, status=status)

    async def schedules(self, request: Request) -> Response:
        wanted = request.query_params.get("name", "").strip()
        rows = await self._site.app.client.broker.schedules.read()
        found = [row for row in rows if wanted.casefold() in row.name.casefold()]
        shown = [views.schedule_view(self._site.app, row, self._redact) for row in found[: views.SHOWN_SCHEDULES]]
        return self._site.page(request, "schedules.html", schedules=shown, found=len(found), wanted=wanted)

    async def limits(self, request: Request) -> Response:
        wanted = request.query_params.get("name", "").strip()
        uses = await self._site.app.client.broker.limits.read()
        found = [one for one in uses if wanted.casefold() in one.row.name.casefold()]
        now = time.time()
        shown = [views.limit_view(one, now) for one in found[: views.SHOWN_LIMITS]]
        return self._site.page(request, "limits.html", limits=shown, found=len(found), wanted=wanted)

    async def workers(self, request: Request) -> Response:
        return self._site.page(request, "workers.html", workers=self._site.observer.workers)

    async def dead(self, request: Request) -> Response:
        observer = self._site.observer
        search = views.searched(request.query_params, observer.stats)
        stats = views.stats_of(search.queue, observer.stats)
        count = 0 if stats is None else stats.dead
        letters = await observer.dead_letters.listed(search.queue, count) if search.queue else ()
        matching = [letter for letter in reversed(letters) if search.matches(letter)]
        return self._site.page(
            request,
            "dead.html",
            search=search,
            stats=observer.stats,
            matching=len(matching),
            total=len(letters),
            most=MOST_LETTERS,
            letters=matching[: views.SHOWN_LETTERS],
        )

    async def events(self, request: Request) -> Response:
        del request
        return StreamingResponse(self._news(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _news(self) -> AsyncIterator[str]:
        """That there is something new; the page asks for itself then."""
        observer = self._site.observer
        ends = time.monotonic() + _LONGEST_STREAM
        version = observer.version
        yield f"retry: 2000\ndata: {version}\n\n"
        while not observer.closed and time.monotonic() < ends:
            observer.look()
            newer = await observer.beyond(version, _LONGEST_STEP)
            yield f"data: {newer}\n\n" if newer != version else ": it lives\n\n"
            version = newer
            if not observer.closed:
                await asyncio.sleep(_SHORTEST_STEP)
