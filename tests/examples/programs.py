"""Programs run as a user runs them, each ended by its process id."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

EXAMPLES = Path(__file__).parents[2] / "examples"
#: How long a program may take that comes to its end by itself, on a busy machine (seconds).
PATIENCE = 60.0


class Program:
    """A Python program that runs, its output going to a file."""

    def __init__(self, arguments: list[str], *, folder: Path, url: str) -> None:
        self._log = folder / f"{Path(arguments[0]).stem}-{time.monotonic_ns()}.log"
        environment = {**os.environ, "LEVERET_URL": url, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"}
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return self._log.read_text()

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait(self) -> int:
        """Its exit code, when it has come to its end by itself."""
        try:
            return self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the program did not end within {PATIENCE:g} s; it said:\n{self.output}") from None

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that does not help."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def running(*arguments: str, folder: Path, url: str) -> Iterator[Program]:
    """``python ARGUMENTS`` in a working directory, until the block is left."""
    program = Program(list(arguments), folder=folder, url=url)
    try:
        yield program
    finally:
        program.stop()


def worker(tasks: Path, *options: str) -> list[str]:
    """The arguments of a worker for the application of a file."""
    return ["-m", "leveret", "worker", f"{tasks}:app", *options]
