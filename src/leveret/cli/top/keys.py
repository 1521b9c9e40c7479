"""Keys from a terminal, one by one, without waiting for a line's end."""

from __future__ import annotations

import asyncio
import os
import re
import termios
import tty
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_NAMES = {"\x1b[A": "up", "\x1b[B": "down", "\x1bOA": "up", "\x1bOB": "down", "\t": "tab", "\x1b": "escape"}
_KEY = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|O.)|.", re.DOTALL)


def keys_of(text: str) -> list[str]:
    """The keys in what a terminal sent; unknown sequences as they are."""
    return [_NAMES.get(key, key) for key in _KEY.findall(text)]


@contextmanager
def keyboard(terminal: int) -> Iterator[asyncio.Queue[str]]:
    """The keys that are pressed meanwhile; the terminal is as it was at the end. Its end is a ``q``."""
    keys: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            text = os.read(terminal, 1024).decode(errors="replace")
        except OSError:
            text = ""
        if not text:
            loop.remove_reader(terminal)
        for key in keys_of(text) if text else ["q"]:
            keys.put_nowait(key)

    before = termios.tcgetattr(terminal)
    tty.setcbreak(terminal)
    loop.add_reader(terminal, read)
    try:
        yield keys
    finally:
        loop.remove_reader(terminal)
        termios.tcsetattr(terminal, termios.TCSADRAIN, before)
