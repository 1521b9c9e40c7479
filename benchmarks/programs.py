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
#: How long a worker may take to stop when it is told to (seconds).
_STOP = 20.0
#: How long a producer may take (seconds).
_PRODUCE = 600.0


class ProgramFailed(Exception):
    """A program of a measurement ended when it should not have."""


class Programs:
    """Starts an entrant's programs with what they need to know in their environment."""

    def __init__(self, entrant: Entrant, url: str, queue: str, ledger: Path) -> None:
        self._entrant = entrant
        self._python = Path(sys.executable) if entrant.is_ours else PEERS_PYTHON
        self._environment = {**os.environ, "PYTHONPATH": "", URL: url, QUEUE: queue, VARIABLE: str(ledger)}

    def produce(self, first: int, count: int, *, rate: float = 0.0, outstanding: int | None = None) -> float:
        """Enqueue; the seconds that the program says it took."""
        order = {
            "first": first,
            "count": count,
            "rate": rate,
            "outstanding": self._entrant.outstanding if outstanding is None else outstanding,
        }
        module, *arguments = self._entrant.producer
        command = [str(self._python), "-m", module, json.dumps(order), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self._environment, capture_output=True, text=True, timeout=_PRODUCE, check=False
        )
        if done.returncode:
            raise ProgramFailed(f"the producer of {self._entrant.name} ended with {done.returncode}:\n{done.stderr}")
        return float(json.loads(done.stdout.splitlines()[-1])["seconds"])

    @contextmanager
    def working(self) -> Iterator[list[Worker]]:
        """The entrant's workers; stopped at the end, and what they said shown when they fail."""
        workers: list[Worker] = []
        try:
            for _ in range(self._entrant.workers):
                workers.append(Worker([str(self._python), "-m", *self._entrant.worker], self._environment))
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
