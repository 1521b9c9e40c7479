"""The programs of a measurement: producers that are waited for, workers that are stopped."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING

from benchmarks.peers.ledger import VARIABLE
from benchmarks.peers.producing import QUEUE, URL

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from benchmarks.entrants import Command, Entrant

ROOT = Path(__file__).parents[1]
PEERS_PYTHON = Path(__file__).with_name(".peers") / "bin" / "python"
_NOT_OURS = {"PYTHONDONTWRITEBYTECODE", "PYTHONPATH"}
#: How long a worker may take to stop when it is told to (seconds).
_STOP = 20.0
#: How long a program that is asked may take (seconds).
_ANSWER = 900.0


class ProgramFailed(Exception):
    """A program of a measurement ended when it should not have."""


def environment() -> dict[str, str]:
    """This process's, without what makes Python compile all that it imports at each start, or import other things."""
    return {name: value for name, value in os.environ.items() if name not in _NOT_OURS}


class Programs:
    """Starts an entrant's programs with what they need to know in their environment."""

    def __init__(self, entrant: Entrant, url: str, queue: str, ledger: Path) -> None:
        self._entrant = entrant
        self._worker = [part.format(queue=queue) for part in entrant.worker]
        self._python = Path(sys.executable) if entrant.is_ours else PEERS_PYTHON
        self._environment = {**environment(), URL: url, QUEUE: queue, VARIABLE: str(ledger)}

    def produce(self, first: int, count: int, *, rate: float = 0.0, outstanding: int | None = None) -> dict[str, float]:
        """Enqueue; the seconds that the program says it took, of time and of processor time."""
        order = {
            "first": first,
            "count": count,
            "rate": rate,
            "outstanding": self._entrant.outstanding if outstanding is None else outstanding,
        }
        return self.ask(self._entrant.producer, order)

    def ask(self, command: Command, order: Mapping[str, object]) -> dict[str, float]:
        """Run a program to its end; the numbers in its last line. Raises ProgramFailed."""
        module, *arguments = command
        try:
            done = subprocess.run(
                [str(self._python), "-m", module, json.dumps(order), *arguments],
                cwd=ROOT,
                env=self._environment,
                capture_output=True,
                text=True,
                timeout=_ANSWER,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise ProgramFailed(f"{module} of {self._entrant.name} took more than {_ANSWER:g} s") from error
        if done.returncode:
            raise ProgramFailed(
                f"{module} of {self._entrant.name} ended with {done.returncode}:\n{done.stderr[-3000:]}"
            )
        numbers: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
        return numbers

    @contextmanager
    def beside(self, command: Command, order: Mapping[str, object]) -> Iterator[Worker]:
        """A program that works until it is stopped here. Raises ProgramFailed when it ended by itself."""
        module, *arguments = command
        program = Worker([str(self._python), "-m", module, json.dumps(order), *arguments], self._environment)
        try:
            yield program
            program.check()
        finally:
            program.ask_to_stop()
            program.stop()

    @contextmanager
    def working(self) -> Iterator[list[Worker]]:
        """The entrant's workers; stopped at the end, and what they said shown when they fail."""
        workers: list[Worker] = []
        try:
            command = [str(self._python), "-m", *self._worker]
            # One by one into the list: when one does not start, those before it are stopped.
            workers.extend(Worker(command, self._environment) for _ in range(self._entrant.workers))
            yield workers
        finally:
            for worker in workers:
                worker.ask_to_stop()
            for worker in workers:
                worker.stop()


class Worker:
    """A worker in a process group of its own."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the worker
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def output(self) -> str:
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def check(self) -> None:
        """Raises ProgramFailed when it has ended."""
        if self._process.poll() is not None:
            raise ProgramFailed(f"a worker ended with {self._process.returncode}:\n{self.output[-3000:]}")

    def ask_to_stop(self) -> None:
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Wait for its end, and end what it left of its group."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_STOP)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
