"""An application whose tasks say on which event loop they run. With $POLICY it sets uvloop's policy, as many do."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time

from leveret import App, current_task

if os.environ.get("POLICY"):
    import uvloop

    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())

app = App()


@app.task
async def loop() -> str:
    return type(asyncio.get_running_loop()).__module__.partition(".")[0]


@app.task
def thread(seconds: float) -> str:
    time.sleep(seconds)
    return "slept"


@app.task
async def steps(count: int) -> int:
    for done in range(count):
        current_task().progress(done + 1, count)
        await asyncio.sleep(0.02)
    return count


@app.task(timeout=0.3, max_attempts=1)
async def slow() -> None:
    await asyncio.sleep(60)


@app.task(max_attempts=3, backoff=0.0)
async def die_once() -> int:
    attempt = current_task().attempt
    if attempt == 1:
        os._exit(3)
    return attempt


@app.task
async def large(size: int) -> str:
    return "x" * size


@app.task
async def command() -> str:
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", "print(6 * 7)", stdout=subprocess.PIPE)
    printed, _ = await process.communicate()
    return printed.decode().strip()


if __name__ == "__main__":
    from leveret.worker.program import run_worker

    run_worker(f"{__file__}:app", queues=["default"])
