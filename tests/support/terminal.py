"""A command in a terminal of its own: keys go in, and what it draws comes out."""

from __future__ import annotations

import fcntl
import os
import re
import select
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.support.waiting import PATIENCE, wait_until

if TYPE_CHECKING:
    from typing import Self

_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|[()][A-Z0-9]|[=>])")


class Terminal:
    """``leveret`` with these arguments; ended with its test."""

    def __init__(self, *arguments: str, width: int, height: int) -> None:
        self._ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
        self.before = termios.tcgetattr(self._ours)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "leveret", *arguments],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**environment, "TERM": "xterm-256color"},
            start_new_session=True,
        )
        self._theirs = theirs
        self.raw = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)

    @property
    def settings(self) -> list[object]:
        return termios.tcgetattr(self._ours)

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def frame(self) -> str:
        """The last whole picture, without colours."""
        while select.select([self._ours], [], [], 0)[0]:
            self.raw += os.read(self._ours, 65_536).decode(errors="replace")
        pictures = self.raw.split("leveret top")
        return _ESCAPES.sub("", pictures[-1] if pictures[-1].rstrip().endswith("quit") else "".join(pictures[-2:-1]))

    def shows(self, pattern: str) -> str:
        """Wait until the picture has it; the picture."""
        return wait_until(
            lambda: frame if re.search(pattern, frame := self.frame()) else "", f"the terminal shows {pattern!r}"
        )

    def exit_code(self) -> int:
        wait_until(lambda: (self.frame(), self.process.poll() is not None)[1], "it has ended")
        return self.process.wait(PATIENCE)
