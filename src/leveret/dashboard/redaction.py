"""Which arguments and results are not shown, and what is known of a call."""

from __future__ import annotations

import inspect
import unicodedata
from typing import TYPE_CHECKING, Any, TypeAlias

import msgspec

from leveret.dashboard.text import LONGEST_TEXT
from leveret.errors import UnknownTask
from leveret.model import decoded, shallow

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from leveret.client import App, Task
    from leveret.model import Envelope

#: Called with a task's name, an argument's name and its value; returns what is shown.
Redact: TypeAlias = "Callable[[str | None, str, Any], Any]"
#: What a result is called when it is redacted; no parameter can be called so.
RESULT = "return"
HIDDEN = "(hidden)"
#: Values that are nested deeper are shown in one line.
_DEEPEST = 20


class Argument(msgspec.Struct, frozen=True):
    """One argument as it is shown: JSON, or text that says why not."""

    name: str
    value: str


class _Call(msgspec.Struct):
    args: list[Any] = []
    kwargs: dict[str, Any] = {}


class _CallOnly(_Call, forbid_unknown_fields=True):
    """Of a task that is not known here: any other object is a message of somebody else's."""


def by_name(names: Iterable[str]) -> Redact:
    """Hide arguments of these names, and what lies under such keys within others.

    An argument without a name, since its task is not known here, is hidden too.

    Args:
        names: The names.

    Returns:
        A function for ``dashboard(redact=...)``.
    """
    hidden = frozenset(map(_folded, names))

    def within(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: HIDDEN if _folded(key) in hidden else within(one) for key, one in value.items()}
        return [within(one) for one in value] if isinstance(value, list) else value

    def redact(task: str | None, name: str, value: Any) -> Any:
        del task
        return HIDDEN if _folded(name) in hidden or name.isdigit() else within(value)

    return redact


def _folded(name: object) -> str:
    """As names are compared: ``API-Key``, ``api_key`` and ``apiKey`` are one."""
    text = unicodedata.normalize("NFKC", str(name)).casefold()
    return "".join(character for character in text if character not in "-_ .")


def arguments(app: App, envelope: Envelope, redact: Redact | None) -> list[Argument]:
    """What the task was called with, by the names of its parameters where they are known; else the body."""
    task = known_task(app, envelope)
    call = None if task is not None and task.signature.raw else _call(envelope.body, _Call if task else _CallOnly)
    if call is None:
        size = len(envelope.body)
        text = f"({size} bytes, hidden)" if redact else envelope.body.decode(errors="backslashreplace")
        return [Argument("body", text)]
    names = [] if task is None else _parameters(task)
    named = [(names[number] if number < len(names) else str(number), value) for number, value in enumerate(call.args)]
    return [Argument(name, shown(envelope.task, name, value, redact)) for name, value in (*named, *call.kwargs.items())]


def result(task: str | None, encoded: bytes, redact: Redact | None) -> str:
    """A task's result as it is shown."""
    try:
        value = msgspec.json.decode(shallow(encoded))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return HIDDEN if redact else encoded.decode(errors="backslashreplace")
    return shown(task, RESULT, value, redact)


def shown(task: str | None, name: str, value: Any, redact: Redact | None) -> str:
    """A value as JSON, after it was redacted; nothing of it when that fails."""
    if redact is None:
        return _json(value)
    try:
        seen = redact(task, name, value)
        return seen if isinstance(seen, str) and seen == HIDDEN else _json(seen)
    except Exception as error:  # noqa: BLE001 - the user's own; a page must not show what it should have hidden
        return f"(hidden: redact raised {type(error).__name__})"


def _json(value: Any) -> str:
    """Indented, unless that would multiply what somebody has sent: each line by its depth."""
    encoded = msgspec.json.encode(value, enc_hook=repr)
    is_small = len(encoded) <= LONGEST_TEXT and not _is_deep(msgspec.json.decode(encoded), _DEEPEST)
    return (msgspec.json.format(encoded, indent=2) if is_small else encoded).decode()


def _is_deep(value: Any, limit: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return limit < 0 or any(_is_deep(one, limit - 1) for one in inner)


def _call(body: bytes, form: type[_Call]) -> _Call | None:
    return decoded(lambda one: msgspec.json.decode(one, type=form), body)


def known_task(app: App, envelope: Envelope) -> Task[..., Any] | None:
    """The application's own, if it has it."""
    try:
        return app.registry.find(envelope.task, envelope.queue)
    except UnknownTask:
        return None


def _parameters(task: Task[..., Any]) -> list[str]:
    try:
        every = inspect.signature(task.function).parameters.values()
    except (ValueError, TypeError):
        return []
    return [one.name for one in every if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
