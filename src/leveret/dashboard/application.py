"""The dashboard as an ASGI application: which address is which page, who is let in, and what is said when it fails."""

from __future__ import annotations

from contextlib import asynccontextmanager
from importlib import resources
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from leveret.dashboard.actions import Actions
from leveret.dashboard.pages import Pages
from leveret.dashboard.security import LINK, Crowded, Door, Hardened, Refused, link_without_token
from leveret.dashboard.site import Site, read_form
from leveret.errors import BrokerError, BrokerUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
    from typing import TypeAlias

    from starlette.requests import Request
    from starlette.types import Receive, Scope, Send

    from leveret.client import App
    from leveret.dashboard.redaction import Redact

    Page: TypeAlias = Callable[[Request], Awaitable[Response]]

#: The largest form of one that anybody may send, whoever he is (bytes).
_LARGEST_LOGIN = 4_096
_STATIC = {"dashboard.css": "text/css", "dashboard.js": "text/javascript", "leveret.svg": "image/svg+xml"}


class Entrance:
    """Lets in whoever has the token, or a session."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._door = site.door

    def guarded(self, page: Page) -> Page:
        async def answer(request: Request) -> Response:
            linked = await self._by_link(request)
            if linked is not None:
                return linked
            if not (self._door.admits(request) or await self._bears_token(request)):
                if request.method == "GET" and not request.url.path.endswith("/events"):
                    return RedirectResponse("login", 303)
                raise HTTPException(401, "Log in first.")
            self._site.observer.look()
            await self._site.observer.first_answer()
            return await page(request)

        return answer

    async def login(self, request: Request) -> Response:
        linked = await self._by_link(request)
        if linked is not None:
            return linked
        if request.method != "POST":
            return RedirectResponse("./", 303) if self._door.admits(request) else self._login_page(request, wrong=False)
        form = await read_form(request, _LARGEST_LOGIN)
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
        return self._site.page(request, "login.html", status_code=403 if wrong else 200, wrong=wrong)

    async def logout(self, request: Request) -> Response:
        await read_form(request)
        response = RedirectResponse("login", 303)
        self._door.close(request, response)
        return response


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
        self._site = site = Site(app, queues, Door(token, session_key))
        entrance, pages, actions = Entrance(site), Pages(site, redact), Actions(site)
        within = entrance.guarded
        routes = [
            Route("/", within(pages.overview)),
            Route("/queue", within(pages.queue)),
            Route("/queue", within(actions.change_queue), methods=["POST"]),
            Route("/waiting", within(pages.waiting)),
            Route("/tasks", within(pages.tasks)),
            Route("/task", within(pages.task)),
            Route("/task", within(actions.change_task), methods=["POST"]),
            Route("/schedules", within(pages.schedules)),
            Route("/schedules", within(actions.change_schedule), methods=["POST"]),
            Route("/limits", within(pages.limits)),
            Route("/limits", within(actions.change_limit), methods=["POST"]),
            Route("/workers", within(pages.workers)),
            Route("/dead", within(pages.dead)),
            Route("/dead", within(actions.change_dead), methods=["POST"]),
            Route("/events", within(pages.events)),
            Route("/login", entrance.login, methods=["GET", "POST"]),
            Route("/logout", within(entrance.logout), methods=["POST"]),
            *(Route(f"/{name}", _asset(name, kind)) for name, kind in _STATIC.items()),
        ]
        served = Starlette(
            routes=routes,
            lifespan=self._lifespan,
            exception_handlers={
                BrokerError: self._broker_failed,
                Refused: self._refused,
                Crowded: self._crowded,
                HTTPException: self._http_error,
            },
        )
        self._asgi = Hardened(served, frozenset(hosts))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._asgi(scope, receive, send)

    def close(self) -> None:
        """End the streams of this loop: a server that stops waits for them."""
        self._site.observer.close()

    @asynccontextmanager
    async def _lifespan(self, _: Starlette) -> AsyncIterator[None]:
        """When it is served by itself; a mounted application has none, and begins with its first page."""
        self._site.observer.look()
        try:
            yield
        finally:
            self.close()

    async def _http_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        page = self._site.page(
            request, "error.html", status_code=error.status_code, title=str(error.status_code), reason=error.detail
        )
        page.headers.update(error.headers or {})
        return page

    async def _broker_failed(self, request: Request, error: Exception) -> Response:
        title = "The broker cannot be reached" if isinstance(error, BrokerUnavailable) else "That did not work"
        return self._site.page(request, "error.html", status_code=503, title=title, reason=str(error))

    async def _crowded(self, request: Request, _: Exception) -> Response:
        reason = "Too many wrong tokens are given just now. Try again in a moment."
        page = self._site.page(request, "error.html", status_code=429, title="Not now", reason=reason)
        page.headers["Retry-After"] = "5"
        return page

    async def _refused(self, request: Request, error: Exception) -> Response:
        reason = f"Nothing was done: {error}."
        return self._site.page(request, "error.html", status_code=403, title="Refused", reason=reason)


def _asset(name: str, media_type: str) -> Page:
    content = resources.files("leveret.dashboard").joinpath("static", name).read_bytes()

    async def asset(_: Request) -> Response:
        return Response(content, media_type=media_type)

    return asset
