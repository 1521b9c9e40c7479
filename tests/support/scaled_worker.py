"""``leveret worker --processes MIN-MAX`` for `ledger_app`, that shrinks soon: URL MIN MAX CONCURRENCY SHRINK_AFTER."""

from __future__ import annotations

import asyncio
import signal
import sys

from leveret.executors.processes import ProcessExecutor
from leveret.observe.logs import Logging
from leveret.worker.autoscale import Bounds, Scaler
from leveret.worker.worker import Worker
from tests.support.workers import LEDGER_APP


async def work(url: str, bounds: Bounds, concurrency: int, shrink_after: float) -> None:
    executor = ProcessExecutor(LEDGER_APP, url=url, processes=bounds.least, concurrency=concurrency)
    worker = Worker(executor, queues=["work"], scaler=Scaler(executor, bounds, shrink_after=shrink_after))
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
    await worker.run()


if __name__ == "__main__":
    Logging("DEBUG").set_up()
    asyncio.run(work(sys.argv[1], Bounds(int(sys.argv[2]), int(sys.argv[3])), int(sys.argv[4]), float(sys.argv[5])))
