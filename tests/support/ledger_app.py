"""The application that the tests' workers run: each task writes what it does into the file $LEDGER."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from leveret import App, Dead, Queue, Retry

app = App(queues=[Queue("work"), Queue("other")])


def note(text: str) -> None:
    """One line, appended in one write, so that lines of several processes do not mix."""
    with Path(os.environ["LEDGER"]).open("ab", buffering=0) as ledger:
        ledger.write(f"{text}\n".encode())


def tried(text: str) -> int:
    """Note a try; how many there were."""
    note(f"try {text}")
    return Path(os.environ["LEDGER"]).read_text().splitlines().count(f"try {text}")


@app.task(queue="work")
async def say(text: str) -> None:
    note(f"said {text}")


@app.task(queue="other")
async def say_elsewhere(text: str) -> None:
    note(f"said {text}")


@app.task(queue="work")
async def pause(text: str, seconds: float) -> None:
    note(f"start {text} {os.getpid()}")
    await asyncio.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work")
def pause_in_thread(text: str, seconds: float) -> None:
    note(f"start {text} {os.getpid()}")
    time.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work")
async def block_the_loop(text: str, seconds: float) -> None:
    note(f"start {text} {os.getpid()}")
    time.sleep(seconds)  # noqa: ASYNC251 - the fault under test
    note(f"end {text}")


@app.task(queue="work", backoff=0)
async def fail_until(text: str, attempts: int) -> None:
    """Raises on its first runs."""
    if tried(text) <= attempts:
        raise ValueError(f"not yet: {text}")
    note(f"end {text}")


@app.task(queue="work", acknowledge="before")
async def at_most_once(text: str, seconds: float) -> None:
    note(f"start {text} {os.getpid()}")
    await asyncio.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work", acknowledge="before")
async def fail_at_most_once(text: str) -> None:
    note(f"try {text}")
    raise ValueError(text)


@app.task(queue="work")
async def give_up(text: str) -> None:
    raise Dead(f"gave up: {text}")


@app.task(queue="work")
def fork_and_wait(text: str) -> None:
    """Leaves a process behind that holds all that this one had open, its socket to the worker too."""
    forked = os.fork()
    if forked == 0:
        time.sleep(60)
        os._exit(0)
    note(f"start {text} {forked} {os.getpid()}")
    time.sleep(60)


@app.task(queue="work", max_attempts=3, backoff=0)
async def fail_always(text: str) -> None:
    note(f"try {text}")
    raise ValueError(text)


@app.task(queue="work", max_attempts=3)
async def kill_the_child(text: str) -> None:
    note(f"try {text}")
    os.kill(os.getpid(), signal.SIGKILL)


@app.task(queue="work")
async def not_now(text: str) -> None:
    note(f"at {text} {time.time()}")
    if tried(text) == 1:
        raise Retry("not now", delay=1.5)
    note(f"end {text}")


@app.task(queue="work", backoff=0)
async def leave(text: str) -> None:
    """Raises what would end a program."""
    if tried(text) == 1:
        sys.exit(3)
    note(f"end {text}")


@app.task(queue="work")
async def enqueue_another(text: str) -> None:
    await say.enqueue(text)


@app.task(queue="raw", default=True)
async def raw(body: bytes) -> None:
    note(f"raw {body!r}")
