"""Text from messages and tasks, made harmless for whoever reads it: a terminal, a log, a page."""

from __future__ import annotations

import unicodedata

#: Shown as they are among the characters that have no shape.
_PLAIN = frozenset("\n\t\u200c\u200d")
#: Control, format (the overrides of the writing direction) and surrogate characters, and separators of lines.
_STRANGE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """The text with what cannot be seen, or would reorder what is around it, written out: ``\\u202e``."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_visible(character) for character in text)


def in_line(text: str) -> str:
    """The same in one line: a name or an error cannot pretend to be a line of its own."""
    return visible(text).replace("\n", "\\n").replace("\t", "\\t")


def _visible(character: str) -> str:
    if character in _PLAIN or unicodedata.category(character) not in _STRANGE:
        return character
    return character.encode("unicode_escape").decode()
