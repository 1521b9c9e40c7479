"""``leveret worker --relay``: a relay beside the worker, in a process of its own, since it imports the application."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from leveret.brokers import backoff

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

log = logging.getLogger("leveret.worker")

#: How long the relay may take to publish what it has at the end (seconds).
_FAREWELL = 10.0


@asynccontextmanager
async def relaying(app: str, url: str | None, database: str) -> AsyncGenerator[Sequence[int]]:
    """Keep a relay of the application running inside the block; its process id, when there is one.

    It ends with this process, however that ends.
    """
    pids: list[int] = []
    keeping = asyncio.create_task(_keep(app, url, database, pids))
    try:
        yield pids
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)


async def _keep(app: str, url: str | None, database: str, pids: list[int]) -> None:
    for pause in backoff():
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "leveret", "relay", app, "--until-eof", *(() if url is None else ("--url", url))),
            stdin=asyncio.subprocess.PIPE,  # its end is the relay's
            env={**os.environ, "LEVERET_DATABASE": database},  # arguments are seen by everybody
            start_new_session=True,
        )
        pids[:] = [process.pid]
        try:
            code = await process.wait()
        except asyncio.CancelledError:
            await _end(process)
            raise
        log.warning("the relay ended with code %s; it is started again in %.1f s", code, pause)
        await asyncio.sleep(pause)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        async with asyncio.timeout(_FAREWELL):
            await process.wait()
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
