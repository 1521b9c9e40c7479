"""What all pages share: the application, who may look, the observers, the templates, and how a form is read."""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from starlette.exceptions import HTTPException
from starlette.responses import HTMLResponse, Response

from leveret import __version__
from leveret.brokers import censor
from leveret.dashboard import text
from leveret.dashboard.observer import Observer
from leveret.dashboard.security import Door, check_change, form_token, keep_form_token
from leveret.model.printable import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.requests import Request

    from leveret.client import App

#: The largest form that is read (bytes), and its most fields: some thousands of chosen ids.
_LARGEST_FORM = 1024 * 1024
_MOST_FIELDS = 12_000
#: How long sending a form may take (seconds).
_FORM_WITHIN = 10.0
#: What a page says after a change, by the word in its address: no text comes from an address.
_SAID = {
    "paused": "The queue is paused: workers start nothing more of it.",
    "resumed": "The queue goes on.",
    "purged": "All that waited in the queue is deleted.",
    "schedule-paused": "The schedule is paused: it enqueues nothing.",
    "schedule-resumed": "The schedule goes on with its next instant.",
    "triggered": "A task of the schedule is enqueued.",
    "limit-paused": "The limit is paused: its tasks wait.",
    "limit-resumed": "The limit goes on.",
    "retried": "{count} put back into the queue.",
    "dropped": "{count} deleted for good.",
    "none": "Nothing was chosen, so nothing was done.",
    "back": "The task is back in its queue.",
    "gone": "The task is not among the dead letters any more.",
    "cancelled": "The task is cancelled.",
    "again": "The task is enqueued again, as a new one.",
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


class Site:
    """One dashboard."""

    def __init__(self, app: App, queues: Sequence[str], door: Door) -> None:
        self.app = app
        self.door = door
        self._queues = tuple(queues)
        self._environment = _environment()
        self._observers: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, Observer] = weakref.WeakKeyDictionary()

    @property
    def observer(self) -> Observer:
        loop = asyncio.get_running_loop()
        observer = self._observers.get(loop)
        if observer is None:
            observer = self._observers[loop] = Observer(self.app, self._queues)
        return observer

    def page(self, request: Request, template: str, *, status_code: int = 200, **values: Any) -> Response:
        token = form_token(request)
        observer = self.observer
        inside = self.door.admits(request) or getattr(request.state, "is_inside", False)
        said = _SAID.get(request.query_params.get("said", ""), "") if request.method == "GET" else ""
        number = request.query_params.get("count", "")[:9]
        counted = f"{int(number)} dead letter{'' if int(number) == 1 else 's'}" if number.isdecimal() else "They are"
        response = HTMLResponse(
            self._environment.get_template(template).render(
                page=template.removesuffix(".html"),
                broker=censor(self.app.url) if inside else "",
                inside=inside,
                locked=self.door.is_locked,
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


class Form(dict[str, str]):
    """The last value of each name, and all of those that are there more than once."""

    def __init__(self, pairs: Sequence[tuple[str, str]]) -> None:
        super().__init__(pairs)
        self._pairs = pairs

    def getlist(self, name: str) -> list[str]:
        return [value for key, value in self._pairs if key == name]


async def read_form(request: Request, largest: int = _LARGEST_FORM) -> Form:
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
    form = Form(pairs)
    check_change(request, form.get("form", ""))
    return form
