"""Who may look, and that a change was meant: sessions, forms, and what a browser is told never to do."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import secrets
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlencode, urlsplit

from starlette.datastructures import MutableHeaders

from leveret.model.printable import in_line
from leveret.observe import Counted

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = "leveret_session"
FORM = "leveret_form"
#: How long a session lasts (seconds).
_SESSION_SECONDS = 12 * 3_600
_SESSION_FORM = re.compile(r"([0-9]{1,12})\.([0-9a-f]{32})\.[0-9a-f]{64}", re.ASCII)
#: The parameter of a link that lets its reader in.
LINK = "token"
#: A wrong token costs that (seconds), so many are judged at once, and so many wait; more are refused.
_WRONG_TOKEN = 1.0
_AT_ONCE = 5
_MOST_WAITING = 50

log = logging.getLogger("leveret.dashboard")

_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # With no-referrer a browser sends "Origin: null" with the dashboard's own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Refused(Exception):
    """A change that is not carried out; the text says why."""


class Hardened:
    """Tells the browser with each answer what it must not do, and answers no other host's name."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def hardened(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
            await send(message)

        if self._hosts and _host(scope) not in self._hosts:
            # A page elsewhere whose name was made to point here (DNS rebinding) has that name in "Host".
            await hardened(
                {"type": "http.response.start", "status": 421, "headers": [(b"content-type", b"text/plain")]}
            )
            await hardened(
                {"type": "http.response.body", "body": b"This dashboard does not answer to that host name.\n"}
            )
            return
        await self._app(scope, receive, hardened)


def _host(scope: Scope) -> str:
    header = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"host"), "")
    try:
        return urlsplit(f"//{header}").hostname or ""
    except ValueError:
        return ""


class Door:
    """Lets those in who know the token; without a token everybody.

    ``key``: what sessions are signed with. By default it comes of the token, so that several processes which serve the
    same dashboard know each other's sessions. A session that was ended is refused by the process that was told so.
    """

    def __init__(self, token: str | None, key: bytes | None = None) -> None:
        self._token = token
        self._key = hashlib.sha256(b"leveret dashboard" + (token or "").encode()).digest() if key is None else key
        #: Sessions that were ended before their time, and when they would have ended (Unix time).
        self._ended: dict[str, int] = {}
        self._guesses = _Guesses()

    @property
    def is_locked(self) -> bool:
        return self._token is not None

    def admits(self, request: Request) -> bool:
        """Whether this reader is in, or needs not be."""
        return self._token is None or self._session_of(request) is not None

    async def knows(self, request: Request, token: str) -> bool:
        """Whether it is the token. A wrong one takes its time, and is logged. Raises Crowded."""
        if self._token is None:
            return False
        async with self._guesses.turn():
            if _same(token, self._token):
                return True
            self._guesses.note(request)
            await asyncio.sleep(_WRONG_TOKEN)
            return False

    def open(self, request: Request, response: Response) -> None:
        """Let this browser in from now on."""
        _set_cookie(
            request, response, SESSION, self._signed(int(time.time()) + _SESSION_SECONDS, secrets.token_hex(16))
        )

    def close(self, request: Request, response: Response) -> None:
        """The browser's session ends, whoever else has a copy of its cookie."""
        now = int(time.time())
        self._ended = {id_: expires for id_, expires in self._ended.items() if expires > now}
        session = self._session_of(request)
        if session is not None:
            expires, id_ = session
            self._ended[id_] = expires
        response.set_cookie(SESSION, "", max_age=0, path=None, httponly=True, samesite="strict")

    def _session_of(self, request: Request) -> tuple[int, str] | None:
        given = request.cookies.get(SESSION, "")
        found = _SESSION_FORM.fullmatch(given)
        if found is None:
            return None
        expires, id_ = int(found[1]), found[2]
        is_valid = _same(given, self._signed(expires, id_)) and expires > time.time() and id_ not in self._ended
        return (expires, id_) if is_valid else None

    def _signed(self, expires: int, id_: str) -> str:
        signed = hmac.new(self._key, b"leveret session %d %b" % (expires, id_.encode()), hashlib.sha256)
        return f"{expires}.{id_}.{signed.hexdigest()}"


class Crowded(Exception):
    """More wrong tokens are given than are worth an answer."""


class _Guesses:
    """So many are judged at once, and so many wait for that; each wrong one keeps its place for a while."""

    def __init__(self) -> None:
        self._turns = asyncio.Semaphore(_AT_ONCE)
        self._waiting = 0
        self._wrong = Counted(log, "a wrong token was given to the dashboard, from %s")

    @asynccontextmanager
    async def turn(self) -> AsyncGenerator[None]:
        if self._waiting >= _MOST_WAITING:
            raise Crowded
        self._waiting += 1
        try:
            async with self._turns:
                yield
        finally:
            self._waiting -= 1

    def note(self, request: Request) -> None:
        by = in_line(request.client.host if request.client else "an unknown address")
        self._wrong.warn(by)


def link_without_token(request: Request) -> str:
    """Where the browser goes on when a link has let it in: the same page, and nothing of the token in its address."""
    pairs = [(name, value) for name, value in request.query_params.multi_items() if name != LINK]
    page = request.url.path.rpartition("/")[2]
    return (page if page != "login" else "") + (f"?{urlencode(pairs)}" if pairs else "") or "./"


def form_token(request: Request) -> str:
    """What this browser's forms carry: the same as its cookie, which no other site can read or send."""
    return request.cookies.get(FORM) or secrets.token_urlsafe(32)


def keep_form_token(request: Request, response: Response, token: str) -> None:
    if request.cookies.get(FORM) != token:
        _set_cookie(request, response, FORM, token)


def check_change(request: Request, given: str) -> None:
    """Raises Refused for a form that is not this dashboard's own, shown to this browser."""
    origin, host = request.headers.get("origin"), request.headers.get("host", "")
    if origin is None or not hmac.compare_digest(urlsplit(origin).netloc.encode(), host.encode()):
        raise Refused(
            f"the form came from {origin or 'an unknown page'}, and this is {host}. "
            "If a proxy stands in between, it must pass the Host header on"
        )
    known = request.cookies.get(FORM, "")
    if not known or not _same(given, known):
        raise Refused("the form is older than this browser's session: go back, reload the page and try again")


def _set_cookie(request: Request, response: Response, name: str, value: str) -> None:
    # Without a path it is this folder's, wherever the dashboard is mounted and whatever a proxy calls that.
    response.set_cookie(
        name,
        value,
        path=None,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
    )


def _same(one: str, other: str) -> bool:
    """In a time that tells nothing of either, their lengths included."""
    digests = [hashlib.sha256(text.encode(errors="surrogatepass")).digest() for text in (one, other)]
    return hmac.compare_digest(*digests)
