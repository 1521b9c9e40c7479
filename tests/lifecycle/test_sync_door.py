"""`enqueue_sync`: for code without a loop, from threads, before and after a fork."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

from tests.support.workers import Ledger, Worker

if TYPE_CHECKING:
    from tests.conftest import Place
    from tests.support.client import Client

FORKS = """
import os, sys, threading
from tests.support.ledger_app import app, say

app.client.connect_to(sys.argv[1])
say.enqueue_sync("before")

def from_threads(name):
    threads = [threading.Thread(target=say.enqueue_sync, args=(f"{name}-{number}",)) for number in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()

children = []
for number in range(3):
    pid = os.fork()
    if pid == 0:
        from_threads(f"child{number}")
        grandchild = os.fork()
        if grandchild == 0:
            say.enqueue_sync(f"grandchild{number}")
            os._exit(0)
        _, status = os.waitpid(grandchild, 0)
        say.enqueue_sync(f"after{number}")
        os._exit(status)
    children.append(pid)
from_threads("parent")
assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0, 0]
app.wait(say.enqueue_many([("many-0",), ("many-1",)]))
say.enqueue_sync("after")
print("done")
"""

PLAIN = """
import asyncio, sys
from tests.support.ledger_app import app, say

app.client.connect_to(sys.argv[1])
say.enqueue_sync("plain")

async def inside():
    await say.enqueue("with a loop, never closed")

asyncio.run(inside())
asyncio.run(inside())
"""


def run(code: str, url: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_threads_and_forks(place: Place, client: Client, ledger: Ledger) -> None:
    assert run(FORKS, place.url) == "done\n"
    expected = {"before", "after", "many-0", "many-1", *(f"parent-{thread}" for thread in range(8))}
    for number in range(3):
        expected |= {f"after{number}", f"grandchild{number}", *(f"child{number}-{thread}" for thread in range(8))}
    with Worker(place.url, ledger):
        for text in expected:
            ledger.wait_for(f"said {text}")
        client.wait_until_empty("work")
    assert ledger.count("said") == len(expected)


def test_a_program_need_not_close_anything(place: Place, client: Client) -> None:
    """It ends by itself, without a warning, and what it enqueued is stored."""
    assert run(PLAIN, place.url) == ""
    client.wait_until_counts("work", ready=3)
