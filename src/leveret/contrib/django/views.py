"""The dashboard among a project's own pages."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from django.contrib.admin.views.decorators import staff_member_required
from django.http import HttpResponse
from django.views.decorators.csrf import csrf_exempt

from leveret.contrib.django.application import app
from leveret.dashboard import dashboard

if TYPE_CHECKING:
    from collections.abc import Callable

    from django.http import HttpRequest

    from leveret.dashboard import Redact

#: How long a page may take (seconds).
_WITHIN = 30.0


def dashboard_view(*, redact: Redact | None = None) -> Callable[..., HttpResponse]:
    """The dashboard as a view: ``re_path(r"^leveret/(?P<page>.*)$", dashboard_view())``.

    Django asks who reads it: members of the staff alone. A page shows what is so when it is asked for, and does not
    follow by itself: a stream would hold a thread of the server for each reader.

    Args:
        redact: Called with a task's name, the name of an argument and the value; what it returns is shown instead.

    Returns:
        The view, which takes the rest of the path as ``page``.

    Raises:
        ConfigurationError: The extra ``leveret[dashboard]`` is not installed.
    """
    served = dashboard(app, token=None, redact=redact)

    def view(request: HttpRequest, page: str) -> HttpResponse:
        if page == "events":
            return HttpResponse(status=204)  # a browser does not ask again
        return app.wait(_answer(served, _scope(request, page), request.body))

    # The dashboard's forms have tokens of their own.
    guarded: Callable[..., HttpResponse] = csrf_exempt(staff_member_required(view))
    return guarded


def _scope(request: HttpRequest, page: str) -> dict[str, Any]:
    path = request.path
    headers = [(name.lower().encode(), value.encode("latin-1", "replace")) for name, value in request.headers.items()]
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": request.method,
        "scheme": request.scheme,
        "path": path,
        "raw_path": path.encode(),
        "root_path": path.removesuffix(f"/{unquote(page)}").removesuffix("/"),
        "query_string": request.META.get("QUERY_STRING", "").encode("latin-1", "replace"),
        "headers": headers,
        "client": (request.META.get("REMOTE_ADDR", ""), 0),
        "server": (request.META.get("SERVER_NAME", ""), int(request.META.get("SERVER_PORT") or 0)),
    }


async def _answer(served: Callable[..., Any], scope: dict[str, Any], body: bytes) -> HttpResponse:
    """On the loop of the application, whose connection the dashboard shares."""
    response = HttpResponse()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            response.write(message.get("body", b""))
            return
        response.status_code = message["status"]
        for name, value in message["headers"]:
            _set(response, name.decode("latin-1"), value.decode("latin-1"))

    async with asyncio.timeout(_WITHIN):
        await served(scope, receive, send)
    return response


def _set(response: HttpResponse, name: str, value: str) -> None:
    if name.lower() == "set-cookie":
        response.cookies.load(value)
    elif name.lower() != "content-length":
        response.headers[name] = value
