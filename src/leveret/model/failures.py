"""What an exception says, as text. Its class is the user's: whatever its own code does, there is a text."""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

from leveret.model.text import shorten

if TYPE_CHECKING:
    from collections.abc import Callable


def words(error: BaseException) -> str:
    """What it says of itself."""
    said = _text(lambda: str(error))
    return _described(error) if said is None else said


def summary(error: BaseException) -> str:
    """Its class and what it says."""
    text = _text(lambda: "".join(traceback.format_exception_only(error)).strip()) if _is_formattable(error) else None
    return shorten(_described(error) if text is None else text, 1_000)


def traceback_of(error: BaseException, caller: str) -> str:
    """From the user's own function on: what called it is the same each time, and nobody's mistake.

    ``caller``: the file of the code that called it.
    """
    whole = start = at = _own(error, "__traceback__")
    while at is not None:
        if at.tb_frame.f_code.co_filename == caller:
            start = at.tb_next
        at = at.tb_next
    start = start or whole
    text = None
    if _is_formattable(error):
        text = _text(lambda: "".join(traceback.format_exception(type(error), error, start)))
    if text is None:
        text = f"{_text(lambda: ''.join(traceback.format_tb(start))) or ''}{_described(error)}\n"
    return shorten(text)


#: What the traceback module asks an exception for. A class that answers in its own way may never come to an end.
_ASKED = ("__traceback__", "__cause__", "__context__", "__suppress_context__", "__notes__", "exceptions")
#: Of a class that was made by a class statement, and not in C.
_HEAP_TYPE = 1 << 9
#: Python makes the whole traceback of an exception that brings along more, though it is cut short, and blocks the loop.
_MOST_EXCEPTIONS = 200


def _is_formattable(error: BaseException) -> bool:
    """Whether an exception, and each one that it brings along, is as Python made it, and they are not too many."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if len(seen) > _MOST_EXCEPTIONS:
            return False
        users = [kind for kind in type(one).__mro__ if kind.__flags__ & _HEAP_TYPE]
        if any(name in vars(kind) for kind in users for name in _ASKED):
            return False
        others = [_own(one, "__cause__"), _own(one, "__context__")]
        waiting += [other for other in others if other is not None]
        if issubclass(type(one), BaseExceptionGroup):
            waiting += _own(one, "exceptions")
    return True


def _own(error: BaseException, name: str) -> Any:
    """An attribute that every exception has, whatever its class makes of the name."""
    kind = BaseExceptionGroup if name == "exceptions" else BaseException
    return vars(kind)[name].__get__(error)


def _text(spell: Callable[[], str]) -> str | None:
    """What the user's own code makes of an exception; None when it raises, or gives no text."""
    try:
        return str.__str__(spell())
    except BaseException:  # noqa: BLE001 - an exception's own __str__ may raise anything
        return None


def _described(error: BaseException) -> str:
    """By hand: its class, and what it says if that can be had."""
    name = vars(type)["__name__"].__get__(type(error))
    words = _text(lambda: str(error))
    return f"{name} (its message cannot be shown)" if words is None else f"{name}: {words}"
