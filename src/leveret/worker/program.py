"""A worker as a program: children, signals, logs and metrics around a `Worker`."""

from __future__ import annotations

import asyncio
import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING

from leveret.executors import ProcessExecutor, Recycling, loops, reaping
from leveret.model import arguments
from leveret.observe import Format, Logging
from leveret.observe.metrics import exporting
from leveret.worker.autoscale import Bounds, Processes, Scaler
from leveret.worker.reload import reloading
from leveret.worker.worker import DEFAULT_GRACE, Worker

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from leveret.executors import Loop
    from leveret.observe import Listener
    from leveret.worker.prefetch import Prefetch

#: Tasks at once in one child: each may be a thread.
MOST_CONCURRENCY = 10_000


def run_worker(
    app: str,
    *,
    url: str | None = None,
    queues: Sequence[str] = (),
    processes: Processes = 1,
    concurrency: int = 10,
    prefetch: Prefetch = "auto",
    grace: float | timedelta = DEFAULT_GRACE,
    max_tasks_per_child: int | None = None,
    max_rss: int | None = None,
    reload: bool = False,
    listeners: Sequence[Listener] = (),
    log_level: str | None = None,
    log_format: Format = "text",
    metrics: str | None = None,
    loop: Loop = "auto",
) -> None:
    """Run a worker until SIGTERM or Ctrl-C; what ``leveret worker`` calls.

    ``app``: ``MODULE:APP`` or ``FILE.py:APP``, imported by the child processes alone. ``url``: instead of the
    application's. ``processes``: so many children, or (fewest, most) for as many as there is work for.
    ``grace``: how long what runs may go on when the worker stops (seconds, or a timedelta).
    ``max_tasks_per_child``, ``max_rss`` (bytes): a child that has run about so many tasks, or holds so much memory, is
    replaced; the fresh one is ready before the old one leaves. SIGHUP replaces all children, and with ``reload`` a
    change of their source files does. ``log_level``: of this process, its children and all loggers there; None: INFO,
    or what a program, or an application in its children, that sets logging up itself says. ``log_format``: where none
    does. ``metrics``: ``HOST:PORT`` of ``/metrics`` for Prometheus (which needs ``leveret[prometheus]``), ``/live`` and
    ``/ready``. ``loop``: the event loop; "uvloop" needs ``leveret[uvloop]``. "auto": the one of the policy that this
    program sets, and for the tasks the application, else asyncio's. A second signal stops at once; nothing is lost.
    Raises AppNotLoaded, ConfigurationError or BrokerRefused when it cannot work.
    """
    bounds = Bounds.of(processes)
    loops.check_loop(loop)
    concurrency = arguments.count("concurrency", concurrency, most=MOST_CONCURRENCY)
    grace = arguments.seconds("grace", grace)
    if max_tasks_per_child is not None:
        max_tasks_per_child = arguments.count("max_tasks_per_child", max_tasks_per_child, none="no limit")
    recycling = Recycling(max_tasks_per_child, max_rss)
    logs = Logging(None if log_level is None else log_level.upper(), log_format)
    logs.set_up()
    exporter = None if metrics is None else exporting(metrics)

    async def work() -> None:
        executor = ProcessExecutor(
            app,
            url=url,
            processes=bounds.least,
            concurrency=concurrency,
            recycling=recycling,
            logs=logs,
            loop=loop,
        )
        scaler = Scaler(executor, bounds) if bounds.most > bounds.least else None
        heard = listeners if exporter is None else (*listeners, exporter.hear)
        worker = Worker(executor, queues=queues, prefetch=prefetch, grace=grace, listeners=heard, scaler=scaler)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, worker.stop)
        async with (
            nullcontext() if exporter is None else exporter.serve(worker),
            reloading(executor, worker, watch=reload),
            reaping(lambda: [child.pid for child in executor.children()]),
        ):
            await worker.run()

    loops.run(work(), loop)
