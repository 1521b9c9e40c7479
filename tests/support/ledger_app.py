"""The application that the tests' workers run: each task writes what it does into the file $LEDGER."""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

import msgspec

from leveret import App, Dead, Queue, Retry, current_task

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


@app.task(queue="work")
async def announce(kind: str, number: str) -> None:
    print(kind, number, "is on its way")


@app.task(queue="work")
async def spell(word: str, letter: str) -> str:
    """A step of a chain: the word so far, and one more letter."""
    task = current_task()
    note(f"spelt {word}{letter} {task.id} {os.getpid()}")
    return word + letter


@app.task(queue="other")
def spell_elsewhere(word: str, letter: str) -> str:
    note(f"spelt {word}{letter} {current_task().id} {os.getpid()}")
    return word + letter


@app.task(queue="work", max_attempts=1)
def spell_when_released(word: str, letter: str) -> str:
    """Dead, until its file is there."""
    if not Path(f"{os.environ['LEDGER']}.released").exists():
        raise Dead(f"not yet: {word}")
    return word + letter


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
    library = ctypes.PyDLL(None)
    forked = library.fork()
    if forked == 0:
        library.sleep(60)
        library._exit(0)
    note(f"start {text} {forked} {os.getpid()}")
    time.sleep(60)


@app.task(queue="work", max_attempts=3, backoff=0)
async def fail_always(text: str) -> None:
    note(f"try {text}")
    raise ValueError(text)


@app.task(queue="work", max_attempts=2, backoff=0)
async def fail_loudly(text: str) -> None:
    """With a traceback of the largest size."""
    note(f"try {text}")
    raise ValueError("é" * 20_000)


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


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
async def overrun(text: str, seconds: float) -> None:
    note(f"try {text}")
    await asyncio.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
def overrun_in_thread(text: str, seconds: float) -> None:
    note(f"try {text} {os.getpid()}")
    time.sleep(seconds)
    note(f"end {text}")


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
async def overrun_stubbornly(text: str) -> None:
    note(f"try {text}")
    while True:
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(60)


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
async def overrun_tidily(text: str, seconds: float) -> None:
    """Takes a second to end when it is cancelled."""
    note(f"try {text}")
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        await asyncio.sleep(1)
        raise
    finally:
        note(f"end {text}")


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
async def overrun_blocking(text: str) -> None:
    note(f"try {text}")
    time.sleep(60)  # noqa: ASYNC251 - the fault under test


@app.task(queue="work", timeout=0.5, max_attempts=2, backoff=0)
async def overrun_blocking_in_part(text: str) -> None:
    """In an asyncio task of its own, of which nobody knows whose it is."""
    note(f"try {text}")

    async def part() -> None:
        time.sleep(60)  # noqa: ASYNC251 - the fault under test

    await asyncio.create_task(part())


@app.task(queue="work")
async def block_and_wait(text: str, seconds: float) -> None:
    """Its event loop turns again, though it has not ended."""
    note(f"start {text} {os.getpid()}")
    time.sleep(seconds)  # noqa: ASYNC251 - the fault under test
    await asyncio.sleep(60)


@app.task(queue="work")
async def hold_the_interpreter(text: str) -> None:
    """A C function that lets no other thread of its process run."""
    note(f"start {text} {os.getpid()}")
    ctypes.PyDLL(None).sleep(8)
    note(f"end {text}")


@app.task(queue="work")
async def whose(text: str) -> None:
    note(f"by {text} {os.getpid()}")


_kept: list[bytearray] = []


@app.task(queue="work")
async def leak(text: str, mebibytes: int) -> None:
    _kept.append(bytearray(os.urandom(1024 * 1024) * mebibytes))
    note(f"by {text} {os.getpid()}")


class Size(msgspec.Struct):
    width: int
    height: int


@app.task(queue="work")
async def measure(width: int, height: int) -> Size:
    return Size(width, height)


@app.task(queue="work")
async def steps(text: str, count: int) -> str:
    """Goes on when the test says so: a file for each step."""
    for number in range(count):
        while not Path(f"{os.environ['LEDGER']}.{text}.{number}").exists():  # noqa: ASYNC110, ASYNC240 - by a test
            await asyncio.sleep(0.02)
        current_task().progress(number + 1, count, f"step {number}")
    return text


@app.task(queue="work")
def steps_in_thread(text: str, count: int) -> str:
    for number in range(count):
        while not Path(f"{os.environ['LEDGER']}.{text}.{number}").exists():
            current_task().check()
            time.sleep(0.02)
        current_task().progress(number + 1, count)
    return text


@app.task(queue="work", store_result=False)
async def silent(text: str) -> str:
    note(f"said {text}")
    return text


@app.task(queue="work", backoff=0.2)
async def note_headers() -> None:
    note(f"headers {json.dumps(dict(current_task().headers))}")
    raise ValueError("again")


@app.task(queue="work")
def hang(text: str) -> None:
    note(f"try {text}")
    time.sleep(60)


@app.task(queue="work")
async def large(size: int) -> str:
    return "x" * size


@app.task(queue="work")
async def strange() -> object:
    return object()


@app.task(queue="work")
async def held(text: str) -> None:
    """Ends when the test says so: by a file."""
    note(f"start {text} {os.getpid()}")
    while not Path(f"{os.environ['LEDGER']}.{text}").exists():  # noqa: ASYNC110, ASYNC240 - by a test
        await asyncio.sleep(0.02)
    note(f"end {text}")


@app.task(queue="work")
async def held_large(text: str, size: int) -> str:
    """The same, with a result of that size."""
    await held(text)
    return "x" * size
