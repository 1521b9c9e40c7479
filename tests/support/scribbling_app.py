"""An application whose tasks do to their process what no neighbour should have to bear."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from leveret import App, Queue, current_task
from tests.support.ledger_app import note

app = App(queues=[Queue("work")])
_kept: list[object] = []


@app.task(queue="work", max_attempts=2, backoff=0)
def write(what: str) -> None:
    note(f"try {what} {os.getpid()}")
    data = {"1234": b"1234", "long": b"x" * 4_000, "beginning": b"\xf1LV", "zeros": bytes(12)}[what]
    for number in range(3, 256):
        with suppress(OSError):
            os.write(number, data)


@app.task(queue="work", max_attempts=2, backoff=0)
def write_into_one(which: int) -> None:
    note(f"try {which} {os.getpid()}")
    os.write(int(sys.argv[which]), b"1234")
    time.sleep(600)


@app.task(queue="work", max_attempts=2, backoff=0)
def close_all(text: str) -> None:
    """As a daemon does at its beginning."""
    note(f"try {text} {os.getpid()}")
    os.closerange(3, 256)


@app.task(queue="work", max_attempts=2, backoff=0)
def read_all(text: str) -> None:
    """Takes whatever there is from whoever it is for."""
    note(f"try {text} {os.getpid()}")
    for number in range(3, 256):
        with suppress(OSError):
            os.set_blocking(number, False)
            os.read(number, 100_000)


@app.task(queue="work", max_attempts=1)
async def spoil(how: str) -> None:
    _spoil(how)


def _spoil(how: str) -> None:
    """Leave the process in a state in which others fail."""
    note(f"spoilt {how} {os.getpid()}")
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    elif how in ("memory", "thread"):
        resource.setrlimit(resource.RLIMIT_AS, (_memory(how), resource.getrlimit(resource.RLIMIT_AS)[1]))
    elif how == "file size":
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    elif how == "descriptors":
        with suppress(OSError):
            while True:
                _kept.append(socket.socket())
    elif how == "user":
        os.setegid(65534)
        os.seteuid(65534)
    elif how == "output":
        os.close(1)
    elif how == "folder":
        folder = f"{os.environ['LEDGER']}.folder"
        os.mkdir(folder)  # noqa: PTH102
        os.chdir(folder)
        os.rmdir(folder)  # noqa: PTH106
    elif how == "fails":
        resource.setrlimit(resource.RLIMIT_NOFILE, (4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        raise ValueError("by itself")


def _memory(how: str) -> int:
    """Much too little, or enough for the stack of one more thread and not for it to begin (bytes)."""
    if how == "memory":
        return 50_000_000
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + resource.getrlimit(resource.RLIMIT_STACK)[0] + 12 * 1024


@app.task(queue="work")
async def spoil_and_stay(how: str, text: str) -> None:
    _spoil(how)
    while not Path(f"{os.environ['LEDGER']}.{text}").exists():  # noqa: ASYNC110, ASYNC240 - by a test
        await asyncio.sleep(0.02)


@app.task(queue="work", max_attempts=1)
async def spoil_and_block(text: str) -> None:
    _spoil("limit")
    while not Path(f"{os.environ['LEDGER']}.{text}").exists():  # noqa: ASYNC240 - by a test
        time.sleep(0.02)  # noqa: ASYNC251 - the loop does not turn


@app.task(queue="work", max_attempts=1)
async def suffer(how: str, text: str) -> None:
    """Does well, unless another task has lowered its limit when it is told to go on."""
    await _suffer(how, text)


@app.task(queue="work", max_attempts=1, timeout=0.1)
async def suffer_in_time(how: str, text: str) -> None:
    await _suffer(how, text)


async def _suffer(how: str, text: str) -> None:
    while not Path(f"{os.environ['LEDGER']}.{text}").exists():  # noqa: ASYNC110, ASYNC240 - by a test
        await asyncio.sleep(0.02)
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 4:
        return
    if how == "dies":
        os.abort()
    while True:  # as a thread that no memory is left to begin holds up the loop that has started it
        time.sleep(1)  # noqa: ASYNC251


@app.task(queue="work", max_attempts=1)
def need(text: str) -> None:
    """Needs what tasks need: descriptors, memory, files, the user's rights, an output, a folder. Once is enough."""
    assert current_task().attempt == 1
    os.close(os.open(os.devnull, os.O_RDONLY))
    ends = socket.socketpair()
    for end in ends:
        end.close()
    bytearray(200_000_000)
    path = Path(os.environ["LEDGER"] + f".{text}")
    path.write_bytes(b"x")
    path.unlink()
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    Path.cwd()
    note(f"had {text} {os.getpid()}")


@app.task(queue="work")
async def weigh(data: str) -> int:
    note(f"weighed {len(data)}")
    return len(data)


@app.task(queue="work")
async def say(text: str) -> None:
    note(f"said {text} {os.getpid()}")
