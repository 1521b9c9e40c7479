"""Text from messages and tasks, made harmless for whoever reads it: a terminal, a log, a page.

Every edge at which text leaves a program passes through here: log lines, what commands print, pages.
"""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: Shown as they are among the characters that have no shape.
_PLAIN = frozenset("\n\t\u200c\u200d")
#: Control, format (the overrides of the writing direction) and surrogate characters, and separators of lines.
_STRANGE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
#: Where the code points begin that UTF-16, and so an escape in JSON, writes as two.
_ASTRAL = 0x10000


def printable(text: str) -> str:
    """The text with what cannot be seen, or would reorder what is around it, written out: ``\\u202e``."""
    return _rewritten(text, _written_out)


def in_line(text: str) -> str:
    """The same in one line: a name or an error cannot pretend to be a line of its own."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def indented(text: str) -> str:
    """The same in as many lines as it has, each but the first indented: none can pretend to begin something new."""
    return printable(text).replace("\n", "\n  ")


def in_json(text: str) -> str:
    """JSON with what cannot be seen as escapes: to a program it is the same JSON."""
    return _rewritten(text, _escaped)


def _rewritten(text: str, rewrite: Callable[[str], str]) -> str:
    """The text with each strange character rewritten. It is looked at once for each that it has, however often: all
    dead letters of a queue are one text of many megabytes.
    """
    if text.isascii() and text.isprintable():
        return text
    found = set(text)
    if not any(map(_is_strange, found)):
        return text
    # With those that stay: to look in vain takes ten times as long.
    return text.translate(
        {ord(character): rewrite(character) if _is_strange(character) else character for character in found}
    )


def _written_out(character: str) -> str:
    return character.encode("unicode_escape").decode()


def _is_strange(character: str) -> bool:
    return character not in _PLAIN and unicodedata.category(character) in _STRANGE


def _escaped(character: str) -> str:
    code = ord(character)
    if code < _ASTRAL:
        return f"\\u{code:04x}"
    high, low = divmod(code - _ASTRAL, 0x400)
    return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
