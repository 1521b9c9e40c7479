"""Worker processes as a user starts them, and the ledger of what their tasks did."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.waiting import PATIENCE, wait_until

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

LEDGER_APP = f"{Path(__file__).with_name('ledger_app.py')}:app"
READY = "waiting for tasks on"


class Ledger:
    """The file that `ledger_app` writes to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.touch()

    def lines(self) -> list[str]:
        return self.path.read_text().splitlines()

    def lines_of(self, beginning: str) -> list[str]:
        return [line for line in self.lines() if line.startswith(beginning)]

    def count(self, beginning: str) -> int:
        return len(self.lines_of(beginning))

    def release(self, text: str) -> None:
        """Let what waits for a file of that name go on."""
        self.path.with_name(f"{self.path.name}.{text}").touch()

    def wait_for(self, beginning: str, count: int = 1, within: float = PATIENCE) -> str:
        """Wait until that many lines begin so; the last one of them."""
        wait_until(lambda: self.count(beginning) >= count, f"{count} lines {beginning!r} in {self.lines()}", within)
        return next(line for line in reversed(self.lines()) if line.startswith(beginning))


class Program:
    """A Python program with its output in a file, ended with its test."""

    def __init__(
        self,
        arguments: Sequence[str],
        output: Path,
        environment: Mapping[str, str] | None = None,
        *,
        folder: Path | None = None,
    ) -> None:
        self._output = output
        with output.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                cwd=folder,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        self.kill()
        if failure is not None:
            sys.stderr.write(f"--- the end of {self._output.name}:\n{self.output[-4_000:]}\n")

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self._output.read_text(errors="replace")

    def wait_for(self, text: str, count: int = 1, within: float = PATIENCE) -> None:
        def said() -> bool:
            assert self.process.poll() is None or self.output.count(text) >= count, f"it ended, saying:\n{self.output}"
            return self.output.count(text) >= count

        wait_until(said, f"{count} times {text!r} in:\n{self.output}", within)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """``kill -9`` of this process alone."""
        with suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()

    def kill_group(self) -> None:
        """``kill -9`` of it and of all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()

    def exit_code(self, within: float = PATIENCE) -> int:
        return self.process.wait(within)


class Worker(Program):
    """``leveret worker``."""

    def __init__(
        self,
        url: str,
        ledger: Ledger,
        *options: str,
        app: str = LEDGER_APP,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        number = len(list(ledger.path.parent.glob("worker-*.log")))
        super().__init__(
            ["-m", "leveret", "worker", app, "--url", url, *options],
            ledger.path.with_name(f"worker-{number}.log"),
            {"LEDGER": str(ledger.path), **(environment or {})},
        )

    def ready(self) -> Self:
        self.wait_for(READY)
        return self


#: A command that takes so long hangs (seconds): on two cores with four clusters a minute may be seconds of work.
_HANGS = 200.0


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def leveret(*arguments: str, environment: Mapping[str, str] | None = None, fails: bool = False) -> str:
    """A ``leveret`` command, run to its end; what it printed. ``fails``: it must exit with 1 or 2, not 0."""
    done = subprocess.run(
        [sys.executable, "-m", "leveret", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_HANGS,
        env={**os.environ, "COLUMNS": "120", **(environment or {})},
        check=False,
    )
    assert done.returncode in ((1, 2) if fails else (0,)), f"exit code {done.returncode}:\n{done.stdout}{done.stderr}"
    assert "/leveret/cli/" not in done.stderr, f"the command itself failed:\n{done.stderr}"
    return done.stderr if fails else done.stdout
