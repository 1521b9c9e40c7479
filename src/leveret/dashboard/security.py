"""Who may look, and that a change was meant: sessions, forms, and what a browser is told never to do."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

SESSION = "leveret_session"
FORM = "leveret_form"
#: How long a session lasts (seconds).
_SESSION_SECONDS = 12 * 3_600

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
    """Lets those in who know the token; without a token everybody."""

    def __init__(self, token: str | None) -> None:
        self._token = token

    @property
    def is_locked(self) -> bool:
        return self._token is not None

    def admits(self, request: Request) -> bool:
        if self._token is None:
            return True
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self.knows(given):
            return True
        expires, _, _ = request.cookies.get(SESSION, "").partition(".")
        return (
            re.fullmatch(r"[0-9]{1,12}", expires) is not None
            and int(expires) > time.time()
            and _same(request.cookies[SESSION], self._session(int(expires)))
        )

    def knows(self, token: str) -> bool:
        return self._token is not None and _same(token, self._token)

    def open(self, request: Request, response: Response) -> None:
        """Let this browser in from now on."""
        _set_cookie(request, response, SESSION, self._session(int(time.time()) + _SESSION_SECONDS))

    def close(self, response: Response) -> None:
        response.set_cookie(SESSION, "", max_age=0, path=None, httponly=True, samesite="strict")

    def _session(self, expires: int) -> str:
        assert self._token is not None
        signed = hmac.new(self._token.encode(), b"leveret dashboard %d" % expires, hashlib.sha256)
        return f"{expires}.{signed.hexdigest()}"


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
    return hmac.compare_digest(one.encode(errors="surrogatepass"), other.encode(errors="surrogatepass"))
