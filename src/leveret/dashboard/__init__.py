"""The dashboard: see what the queues, tasks and workers do, and steer them, in a browser.

``leveret dashboard`` serves it; `dashboard` makes it an ASGI application to mount into another one. It needs the extra
``leveret[dashboard]``.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Final

from leveret.dashboard.redaction import Redact, by_name
from leveret.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from leveret.client import App
    from leveret.dashboard.application import Dashboard

__all__ = ["Redact", "by_name", "dashboard"]


class Undecided(Enum):
    """Nobody has said yet."""

    UNDECIDED = "undecided"


UNDECIDED: Final = Undecided.UNDECIDED
#: A shorter token could be guessed (characters).
_SHORTEST_TOKEN = 12


def dashboard(
    app: App,
    *,
    token: str | Undecided | None = UNDECIDED,
    redact: Redact | None = None,
    queues: Sequence[str] = (),
    hosts: Sequence[str] = (),
) -> Dashboard:
    """The dashboard of an application, to be mounted: ``web.mount("/leveret", dashboard(app, token=...))``.

    Args:
        app: The application.
        token: What readers must enter, or come with as ``?token=...``: at least 12 characters. None: nobody is asked,
            so whatever the dashboard is mounted in must ask, or be reachable by those alone who may read the arguments
            and drop tasks. One of the two must be said.
        redact: Called with a task's name (None: not known), the name of an argument ("return": of the result) and the
            value; what it returns is shown instead. None: all is shown.
        queues: The names of queues to show besides the application's. RabbitMQ cannot list those that nobody consumes.
        hosts: The names under which the dashboard may be asked for, without ports; any other ``Host`` is refused.
            Empty: any.

    Returns:
        An ASGI application.

    Raises:
        ConfigurationError: The extra ``leveret[dashboard]`` is not installed, or the token is too short or not decided.
    """
    if isinstance(token, Undecided):
        raise ConfigurationError(
            "who may look at the dashboard? Give dashboard() a token='...' of at least "
            f"{_SHORTEST_TOKEN} characters, or token=None if the application that it is mounted in asks who they are"
        )
    if token is not None:
        checked(token)
    try:
        from leveret.dashboard.application import Dashboard
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the dashboard needs {error.name}, which is not installed: pip install 'leveret[dashboard]'"
        ) from error
    return Dashboard(app, token=token, redact=redact, queues=queues, hosts=hosts)


def checked(token: str) -> str:
    """Raises ConfigurationError for a token that could be guessed."""
    if len(token) < _SHORTEST_TOKEN:
        raise ConfigurationError(
            f"the dashboard's token has {len(token)} characters; it must have at least {_SHORTEST_TOKEN}"
        )
    return token
