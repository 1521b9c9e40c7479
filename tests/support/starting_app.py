"""An application whose tasks start processes, in all the ways that Python has, and note who is there."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TYPE_CHECKING

from leveret import App, Queue, current_task
from tests.support.ledger_app import note

if TYPE_CHECKING:
    from collections.abc import Generator

app = App(queues=[Queue("work")])
LONG = "600"
#: Kept, as what is no longer referred to may be ended by its finalizer.
_kept: list[object] = []


def _pids(processes: list[subprocess.Popen[bytes]]) -> list[int]:
    _kept.extend(processes)
    return [process.pid for process in processes]


def _forked(*, twice: bool) -> list[int]:
    """By hand; twice: the one in the middle ends at once, and nobody waits for the other."""
    reads, writes = os.pipe()
    middle = os.fork()
    if middle == 0:
        if not twice or os.fork() == 0:
            os.write(writes, f"{os.getpid()}\n".encode())
            time.sleep(float(LONG))
        os._exit(0)
    if twice:
        os.waitpid(middle, 0)
    pid = int(os.read(reads, 100))
    os.close(reads)
    os.close(writes)
    return [pid]


def _multiprocessing(method: str, *, daemon: bool) -> list[int]:
    context = multiprocessing.get_context(method)
    process = context.Process(target=time.sleep, args=(float(LONG),), daemon=daemon)  # type: ignore[attr-defined]
    process.start()
    _kept.append(process)
    return [process.pid]


def _pool() -> list[int]:
    pool = ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork"))
    _kept.append(pool)
    for _ in range(2):
        pool.submit(time.sleep, float(LONG))
    return [pid for pid in pool._processes]  # noqa: C416


def start(kind: str) -> list[int]:
    """Start processes that run for long; their pids."""
    if kind == "subprocess":
        return _pids([subprocess.Popen(["sleep", LONG])])
    if kind == "stubborn":  # it ignores the polite signals
        return _pids([subprocess.Popen(["sh", "-c", f"trap '' TERM INT HUP; sleep {LONG}; sleep {LONG}"])])
    if kind == "stopped":
        (pid,) = pids = _pids([subprocess.Popen(["sleep", LONG])])
        os.kill(pid, signal.SIGSTOP)
        return pids
    if kind == "group":
        return _pids([subprocess.Popen(["sleep", LONG], process_group=0)])
    if kind == "pipeline":
        shell = subprocess.Popen(f"sleep {LONG} | sleep {LONG} & echo $!; wait", shell=True, stdout=subprocess.PIPE)
        assert shell.stdout is not None
        return [*_pids([shell]), int(shell.stdout.readline())]
    if kind in {"fork", "double fork"}:
        return _forked(twice=kind == "double fork")
    if kind == "pool":
        return _pool()
    method, _, rest = kind.partition(" ")
    return _multiprocessing(method, daemon=rest == "daemon")


KINDS = (
    "subprocess",
    "stubborn",
    "stopped",
    "group",
    "pipeline",
    "fork",
    "double fork",
    "pool",
    "fork daemon",
    "fork plain",
    "spawn daemon",
    "forkserver plain",
)


def begin(kind: str) -> None:
    note(f"started {kind}: {current_task().attempt} {os.getpid()} {' '.join(map(str, start(kind)))}")


@app.task(queue="work")
def leave(kind: str) -> None:
    """Starts something and leaves it."""
    begin(kind)


@app.task(queue="work")
def wait(kind: str) -> None:
    begin(kind)
    time.sleep(float(LONG))


@app.task(queue="work")
async def wait_on_the_loop(kind: str) -> None:
    process = await asyncio.create_subprocess_exec("sleep", LONG)
    note(f"started {kind}: {current_task().attempt} {os.getpid()} {process.pid}")
    await process.wait()


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
def outlast(kind: str) -> None:
    begin(kind)
    time.sleep(float(LONG))


@app.task(queue="work")
def detach() -> None:
    """What makes a session for itself has left on purpose."""
    process = subprocess.Popen(["sleep", LONG], start_new_session=True)
    _kept.append(process)
    note(f"detached {process.pid}")


@app.task(queue="work")
def terminate(method: str) -> None:
    """At once."""
    process = multiprocessing.get_context(method).Process(target=time.sleep, args=(float(LONG),))  # type: ignore[attr-defined]
    process.start()
    process.terminate()
    process.join(20)
    note(f"terminated {method} {process.exitcode}")


@app.task(queue="work")
def interrupt() -> None:
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(writes, b"x")
            while True:
                time.sleep(0.02)
                # Python 3.14 forgets a signal that comes between two calls to a process that a thread has forked, with
                # Leveret and without. This asks for it.
                signal.pthread_sigmask(signal.SIG_BLOCK, [])
        except KeyboardInterrupt as error:
            note(f"interrupted {type(error).__name__}")
        os._exit(0)
    os.read(reads, 1)
    os.kill(pid, signal.SIGINT)
    os.waitpid(pid, 0)


@app.task(queue="work")
def pool_that_is_slow() -> None:
    try:
        with multiprocessing.get_context("fork").Pool(2) as pool:
            pool.apply_async(time.sleep, (float(LONG),)).get(timeout=0.2)
    except multiprocessing.TimeoutError:
        note("left the pool")


@app.task(queue="work")
def pool_that_breaks() -> None:
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("fork")) as pool:
        other = pool.submit(time.sleep, float(LONG))
        try:
            pool.submit(os._exit, 3).result()
        except BrokenProcessPool:
            note("the pool broke")
        other.cancel()
    note("left the pool")


@app.task(queue="work")
def signals_of(kind: str) -> None:
    """What a process sees of signals and descriptors that its parent had."""
    probe = (
        "import os, signal, sys\n"
        "handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]\n"
        "print(handlers == [signal.SIG_DFL, signal.default_int_handler],\n"
        "      [n for n in range(3, 30) if os.path.exists(f'/proc/self/fd/{n}')\n"
        "       and os.readlink(f'/proc/self/fd/{n}').startswith('socket')])"
    )
    if kind == "exec":
        done = subprocess.run([sys.executable, "-c", probe], close_fds=False, capture_output=True, check=True)
        note(f"signals {kind} {done.stdout.decode().strip()}")
        return
    pid = os.fork()
    if pid == 0:
        handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
        note(f"signals {kind} {handlers == [signal.SIG_DFL, signal.default_int_handler]}")
        os._exit(0)
    os.waitpid(pid, 0)


@app.task(queue="work")
def return_from_fork(how: str) -> str:
    """Both processes come back from the task."""
    pid = os.fork()
    if pid == 0:
        note(f"forked {how} {os.getpid()}")
        if how == "raises":
            raise ValueError("in the fork")
        if how == "exits":
            sys.exit(7)
        return "the fork's"
    note(f"code {how} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")
    return "the task's"


@app.task(queue="work")
async def return_from_fork_on_the_loop(how: str) -> str:
    pid = os.fork()
    if pid == 0:
        note(f"forked {how} {os.getpid()}")
        if how == "awaits":
            await asyncio.sleep(0.01)
        if how == "yields":
            await _Yield()
        return "the fork's"
    _note_code(how, pid)
    return "the task's"


def _note_code(how: str, pid: int) -> None:
    note(f"code {how} {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}")


class _Yield:
    """Goes back to the event loop for one turn, without asking which it is."""

    def __await__(self) -> Generator[None, None, None]:
        yield


@app.task(queue="work")
async def say(text: str) -> str:
    note(f"said {text} {os.getpid()}")
    return text
