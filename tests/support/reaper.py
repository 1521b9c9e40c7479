"""Nothing outlives a test run, however it ends: what it starts carries its mark, and a process looks after it.

Every process that a run starts inherits the mark in its environment, whatever process group or session it makes for
itself. Run as a program, this module waits until its standard input ends, which is when the run is over or was killed,
and then ends what carries the mark.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: The environment variable that holds a run's mark.
MARK = "LEVERET_TEST_RUN"
#: What a run's folders begin with, before its mark.
FOLDER = "leveret-node-"
#: How long killed processes may take to be gone (seconds).
PATIENCE = 20.0


def mark_of(pid: int) -> str | None:
    """The mark of the run of a process: its id and when it started, which together are never given again."""
    try:
        started = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return None
    return f"{pid}.{started}"


def own_mark() -> str:
    """The mark of this process's run; a program that is not part of a run is one by itself."""
    return os.environ.setdefault(MARK, mark_of(os.getpid()) or f"{os.getpid()}.0")


def is_over(mark: str) -> bool:
    """Whether the process that the run was is gone."""
    pid, _, _ = mark.partition(".")
    return not pid.isdigit() or mark_of(int(pid)) != mark


class Reaper:
    """Watches over this run from a process of its own."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """``folders``: where runs make their folders. What runs before this one left is removed now."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, own_mark(), *map(str, folders)],
            stdin=subprocess.PIPE,
            env={},
            start_new_session=True,
        )

    def close(self) -> None:
        """End what the run left behind, and name it on the standard error."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def reap(over: Callable[[str], bool], folders: Sequence[Path]) -> Iterator[str]:
    """End the processes and remove the folders of the runs that are over; what each of the processes was."""
    deadline = time.monotonic() + PATIENCE
    while (found := list(_kill(over))) and time.monotonic() < deadline:
        yield from found
        time.sleep(0.05)
    for parent in folders:
        for folder in parent.glob(f"{FOLDER}*.*-*"):
            if over(folder.name.removeprefix(FOLDER).partition("-")[0]):
                shutil.rmtree(folder, ignore_errors=True)


def marked(over: Callable[[str], bool]) -> Iterator[tuple[int, str]]:
    """The processes that carry the mark of such a run: a descriptor, open until the next is asked for, and its name."""
    for entry in Path("/proc").iterdir():
        # It may have ended meanwhile, or be another user's.
        if entry.name.isdigit():
            with suppress(OSError):
                # Opened before its environment is read: the process id cannot become another's in between.
                process = os.pidfd_open(int(entry.name))
                try:
                    if any(over(mark) for mark in _marks(entry)):
                        command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                        yield process, f"{entry.name} {command[:100]}"
                finally:
                    os.close(process)


def _marks(entry: Path) -> Iterator[str]:
    for line in (entry / "environ").read_bytes().split(b"\0"):
        name, _, value = line.decode(errors="replace").partition("=")
        if name == MARK:
            yield value


def _kill(over: Callable[[str], bool]) -> Iterator[str]:
    for process, name in marked(over):
        signal.pidfd_send_signal(process, signal.SIGKILL)
        yield name


def main(mark: str, folders: Sequence[Path]) -> None:
    list(reap(is_over, folders))  # of runs whose reaper was killed as well
    sys.stdin.buffer.read()
    left = sorted(set(reap(lambda other: other == mark, folders)))
    if left:
        sys.stderr.write("\n  ".join(["the tests left processes behind, which are ended:", *left]) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
