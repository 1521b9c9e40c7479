"""The dashboard's pages and what its forms do: an ASGI application."""

from __future__ import annotations

import asyncio
import time
import weakref
from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route

from leveret import __version__
from leveret.brokers import censor
from leveret.dashboard import charts, text, views
from leveret.dashboard.observer import MOST_LETTERS, Observer
from leveret.dashboard.security import (
    LINK,
    Crowded,
    Door,
    Hardened,
    Refused,
    check_change,
    form_token,
    keep_form_token,
    link_without_token,
)
from leveret.errors import BrokerError, BrokerUnavailable
from leveret.model.printable import printable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from typing import TypeAlias

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from leveret.client import App
    from leveret.dashboard.redaction import Redact

    Page: TypeAlias = Callable[[Request], Awaitable[Response]]

#: The largest form that is read (bytes), and its most fields: some thousands of chosen ids; and of one that anybody may
#: send, whoever he is.
_LARGEST_FORM = 1024 * 1024
_MOST_FIELDS = 12_000
_LARGEST_LOGIN = 4_096
#: How long sending a form may take (seconds).
_FORM_WITHIN = 10.0
#: A page is told of news at most this often, and that the stream lives at least (seconds).
_SHORTEST_STEP, _LONGEST_STEP = 1.0, 15.0
#: A stream ends after that, and the browser asks for another one: a server that stops waits for no longer (seconds).
_LONGEST_STREAM = 30.0
#: How long a cancelled task is waited for (seconds).
_CANCEL = 3.0
_STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "leveret.svg": "image/svg+xml"}
#: What a page says after a change, by the word in its address: no text comes from an address.
_SAID = {
    "paused": "The queue is paused: workers start nothing more of it.",
    "resumed": "The queue goes on.",
    "retried": "{count} put back into the queue.",
    "dropped": "{count} deleted for good.",
    "none": "Nothing was chosen, so nothing was done.",
    "back": "The task is back in its queue.",
    "gone": "The task is not among the dead letters any more.",
    "cancelled": "The task is cancelled.",
    "asked": "The task was told to end; it still runs.",
    "late": "It was too late to cancel: the task has ended.",
    "unknown": "Nothing is known of that task. If it waits, it will not run.",
}


def _environment() -> Environment:
    """Everything that a template writes is escaped, and what cannot be seen is written out."""
    environment = Environment(
        loader=PackageLoader("leveret.dashboard"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_written,
    )
    for name in ("short", "long", "lasted", "ago", "moment", "clock", "count", "size", "packed"):
        environment.filters[name] = getattr(text, name)
    # For what a form sends back unchanged.
    environment.filters["exact"] = escape
    return environment


def _written(value: object) -> object:
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


class Dashboard:
    """See `leveret.dashboard.dashboard`."""

    def __init__(
        self,
        app: App,
        *,
        token: str | None,
        redact: Redact | None,
        queues: Sequence[str],
        hosts: Sequence[str],
        session_key: bytes | None = None,
    ) -> None:
        self._app = app
        self._redact = redact
        self._queues = tuple(queues)
        self._door = Door(token, session_key)
        self._environment = _environment()
        self._observers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Observer] = weakref.WeakKeyDictionary()
        routes = [
            Route("/", self._behind_the_door(self._overview)),
            Route("/queue", self._behind_the_door(self._queue)),
            Route("/queue", self._behind_the_door(self._change_queue), methods=["POST"]),
            Route("/tasks", self._behind_the_door(self._tasks)),
            Route("/task", self._behind_the_door(self._task)),
            Route("/task", self._behind_the_door(self._cancel), methods=["POST"]),
            Route("/workers", self._behind_the_door(self._workers)),
            Route("/dead", self._behind_the_door(self._dead)),
            Route("/dead", self._behind_the_door(self._change_dead), methods=["POST"]),
            Route("/events", self._behind_the_door(self._events)),
            Route("/login", self._login, methods=["GET", "POST"]),
            Route("/logout", self._behind_the_door(self._logout), methods=["POST"]),
            *(Route(f"/{name}", _asset(name, kind)) for name, kind in _STATIC.items()),
        ]
        pages = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                BrokerError: self._broker_failed,
                Refused: self._refused,
                Crowded: self._crowded,
                HTTPException: self._http_error,
            },
        )
        self._asgi = Hardened(pages, frozenset(hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._asgi(scope, receive, send)

    def close(self) -> None:
        """End the streams of this loop: a server that stops waits for them."""
        self._observer.close()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """When it is served by itself; a mounted application has none, and begins with its first page."""
        self._observer.look()
        try:
            yield
        finally:
            self.close()

    @property
    def _observer(self) -> Observer:
        loop = asyncio.get_running_loop()
        observer = self._observers.get(loop)
        if observer is None:
            observer = self._observers[loop] = Observer(self._app, self._queues)
        return observer

    def _behind_the_door(self, page: Page) -> Page:
        async def guarded(request: Request) -> Response:
            linked = await self._by_link(request)
            if linked is not None:
                return linked
            if not (self._door.admits(request) or await self._bears_token(request)):
                if request.method == "GET" and not request.url.path.endswith("/events"):
                    return RedirectResponse("login", 303)
                raise HTTPException(401, "Log in first.")
            self._observer.look()
            await self._observer.first_answer()
            return await page(request)

        return guarded

    # Pages

    async def _overview(self, request: Request) -> Response:
        observer = self._observer
        samples = list(observer.recent.samples)
        return self._page(
            request,
            "overview.html",
            charts=[charts.throughput(samples), charts.run_time(samples), charts.depth(samples)],
            totals=views.totals(observer.stats, observer.workers, observer.recent.latest),
            stats=observer.stats,
            latest=observer.latest()[:8],
            failures=observer.failures()[:5],
        )

    async def _queue(self, request: Request) -> Response:
        observer = self._observer
        name = request.query_params.get("name", "")
        stats = views.stats_of(name, observer.stats)
        if stats is None:
            raise HTTPException(404, f"No queue {text.short(name)!r} is known here.")
        return self._page(
            request,
            "queue.html",
            queue=stats,
            charts=[charts.depth(list(observer.recent.samples), name)],
            latest=observer.latest(name)[:50],
        )

    async def _tasks(self, request: Request) -> Response:
        state = request.query_params.get("state", "")
        wanted = request.query_params.get("task", "").strip()
        found = [
            status
            for status in self._observer.latest()
            if state in ("", status.state) and wanted.casefold() in (status.task or "").casefold()
        ]
        return self._page(request, "tasks.html", latest=found[:100], found=len(found), state=state, wanted=wanted)

    async def _task(self, request: Request) -> Response:
        id_ = request.query_params.get("id", "").strip()
        status = await self._observer.task(id_) if id_ else None
        if status is None:
            raise HTTPException(404, f"Nothing is known of a task with the id {text.short(id_)!r}.")
        letter = await self._observer.letter(status.queue, id_) if status.state == "dead" else None
        view = views.task_view(self._app, status, letter, self._redact)
        return self._page(request, "task.html", view=view, status=status)

    async def _workers(self, request: Request) -> Response:
        return self._page(request, "workers.html", workers=self._observer.workers)

    async def _dead(self, request: Request) -> Response:
        observer = self._observer
        search = views.searched(request.query_params, observer.stats)
        letters = await observer.letters(search.queue) if search.queue else ()
        matching = [letter for letter in reversed(letters) if search.matches(letter)]
        return self._page(
            request,
            "dead.html",
            search=search,
            stats=observer.stats,
            matching=len(matching),
            total=len(letters),
            most=MOST_LETTERS,
            letters=matching[: views.SHOWN_LETTERS],
        )

    async def _events(self, request: Request) -> Response:
        del request
        return StreamingResponse(self._news(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _news(self) -> AsyncIterator[str]:
        """That there is something new; the page asks for itself then."""
        observer = self._observer
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

    # Changes

    async def _change_queue(self, request: Request) -> Response:
        form = await self._form(request)
        queue = text.unpacked(form.get("queue", ""))
        if form.get("action") == "pause":
            await self._app.client.broker.queues.pause(queue)
            said = "paused"
        elif form.get("action") == "resume":
            await self._app.client.broker.queues.resume(queue)
            said = "resumed"
        else:
            raise HTTPException(400, "The form does not say what to do.")
        await self._observer.refresh()
        return RedirectResponse(f"queue?name={text.packed(queue)}&said={said}", 303)

    async def _cancel(self, request: Request) -> Response:
        form = await self._form(request)
        id_ = text.unpacked(form.get("id", ""))
        status = await self._app.client.broker.control.cancel(id_)
        ends = time.monotonic() + _CANCEL
        while status is not None and not status.is_final and time.monotonic() < ends:
            version = self._observer.version
            status = await self._observer.task(id_)
            if status is not None and not status.is_final:
                await self._observer.beyond(version, 0.5)
        await self._observer.refresh()
        if status is None:
            return RedirectResponse("tasks?said=unknown", 303)
        said = "cancelled" if status.state == "cancelled" else "late" if status.is_final else "asked"
        return RedirectResponse(f"task?id={text.packed(id_)}&said={said}", 303)

    async def _change_dead(self, request: Request) -> Response:
        form = await self._form(request)
        search = views.Search(text.unpacked(form.get("queue", "")), form.get("task", ""), form.get("error", ""))
        if form.get("all"):
            letters = await self._observer.current_letters(search.queue)
            ids = [letter.envelope.id for letter in letters if search.matches(letter)]
        else:
            ids = [text.unpacked(one) for one in form.getlist("id")]
        if not ids:
            return RedirectResponse(f"dead?{search.query()}&said=none", 303)
        if form.get("action") == "retry":
            changed = await self._observer.retry_dead(search.queue, ids)
            said = "retried"
        elif form.get("action") == "drop" and not form.get("sure"):
            return self._page(request, "confirm.html", search=search, ids=ids)
        elif form.get("action") == "drop":
            changed = await self._observer.drop_dead(search.queue, ids)
            said = "dropped"
        else:
            raise HTTPException(400, "The form does not say what to do.")
        await self._observer.refresh()
        if said == "retried" and form.get("from") == "task":
            return RedirectResponse(f"task?id={text.packed(ids[0])}&said={'back' if changed else 'gone'}", 303)
        return RedirectResponse(f"dead?{search.query()}&said={said}&count={len(changed)}", 303)

    async def _login(self, request: Request) -> Response:
        linked = await self._by_link(request)
        if linked is not None:
            return linked
        if request.method != "POST":
            return RedirectResponse("./", 303) if self._door.admits(request) else self._login_page(request, wrong=False)
        form = await self._form(request, _LARGEST_LOGIN)
        if await self._door.knows(request, form.get("token", "")):
            return self._let_in(request, "./")
        return self._login_page(request, wrong=True)

    async def _by_link(self, request: Request) -> Response | None:
        """Whoever comes with the token in the address: in, and the address without it."""
        given = request.query_params.get(LINK)
        if given is None or request.method != "GET" or not self._door.is_locked:
            return None
        if await self._door.knows(request, given):
            return self._let_in(request, link_without_token(request))
        return self._login_page(request, wrong=True)

    async def _bears_token(self, request: Request) -> bool:
        """Whether a program has sent the token with its request."""
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            return False
        if await self._door.knows(request, given.strip()):
            request.state.is_inside = True
            return True
        raise HTTPException(401, "That is not the dashboard's token.", {"WWW-Authenticate": "Bearer"})

    def _let_in(self, request: Request, address: str) -> Response:
        response = RedirectResponse(address, 303)
        self._door.open(request, response)
        return response

    def _login_page(self, request: Request, *, wrong: bool) -> Response:
        return self._page(request, "login.html", status_code=403 if wrong else 200, wrong=wrong)

    async def _logout(self, request: Request) -> Response:
        await self._form(request)
        response = RedirectResponse("login", 303)
        self._door.close(request, response)
        return response

    # What they share

    async def _form(self, request: Request, largest: int = _LARGEST_FORM) -> _Form:
        """What was sent, after it was made sure that it was meant. Raises Refused."""
        too_large = HTTPException(413, "The form is too large; choose fewer, or all that match.")
        body = bytearray()
        try:
            async with asyncio.timeout(_FORM_WITHIN):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > largest:
                        raise too_large
        except TimeoutError:
            raise HTTPException(408, "The form took too long to come.") from None
        try:
            pairs = parse_qsl(
                body.decode("latin-1"), keep_blank_values=True, errors="surrogateescape", max_num_fields=_MOST_FIELDS
            )
        except ValueError:
            raise too_large from None
        form = _Form(pairs)
        check_change(request, form.get("form", ""))
        return form

    def _page(self, request: Request, template: str, *, status_code: int = 200, **values: Any) -> Response:
        token = form_token(request)
        observer = self._observer
        inside = self._door.admits(request) or getattr(request.state, "is_inside", False)
        said = _SAID.get(request.query_params.get("said", ""), "") if request.method == "GET" else ""
        number = request.query_params.get("count", "")[:9]
        counted = f"{int(number)} dead letter{'' if int(number) == 1 else 's'}" if number.isdecimal() else "They are"
        response = HTMLResponse(
            self._environment.get_template(template).render(
                page=template.removesuffix(".html"),
                broker=censor(self._app.url) if inside else "",
                inside=inside,
                locked=self._door.is_locked,
                dead=sum(one.dead for one in observer.stats),
                problem=observer.problem if inside else "",
                said=said.format(count=counted),
                form=token,
                now=time.time(),
                version=__version__,
                **values,
            ),
            status_code,
        )
        keep_form_token(request, response, token)
        return response

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        page = self._page(
            request, "error.html", status_code=error.status_code, title=str(error.status_code), reason=error.detail
        )
        page.headers.update(error.headers or {})
        return page

    async def _broker_failed(self, request: Request, error: Exception) -> Response:
        title = "The broker cannot be reached" if isinstance(error, BrokerUnavailable) else "That did not work"
        return self._page(request, "error.html", status_code=503, title=title, reason=str(error))

    async def _crowded(self, request: Request, _: Exception) -> Response:
        reason = "Too many wrong tokens are given just now. Try again in a moment."
        page = self._page(request, "error.html", status_code=429, title="Not now", reason=reason)
        page.headers["Retry-After"] = "5"
        return page

    async def _refused(self, request: Request, error: Exception) -> Response:
        return self._page(request, "error.html", status_code=403, title="Refused", reason=f"Nothing was done: {error}.")


class _Form(dict[str, str]):
    """The last value of each name, and all of those that are there more than once."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def getlist(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]


def _asset(name: str, media_type: str) -> Page:
    content = resources.files("leveret.dashboard").joinpath("static", name).read_bytes()

    async def asset(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return asset
