"""A worker as a program: children, signals, logs and metrics around a `Worker`."""

from __future__ import annotations

import asyncio
import gc
import signal
from contextlib import nullcontext
from typing import TYPE_CHECKING

from leveret.executors import START_TIMEOUT, STOP_TIMEOUT, ProcessExecutor, Recycling, loops, reaping
from leveret.model import arguments
from leveret.observe import Format, Logging
from leveret.observe.metrics import exporting
from leveret.worker.autoscale import Bounds, Processes, Scaler
from leveret.worker.relaying import relaying
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
#: So long after the start all is imported that stays, and the garbage collector need not look at it any more (seconds).
_IMPORTED = 5.0


def run_worker(
    app: str,
    *,
    url: str | None = None,
    queues: Sequence[str] = (),
    processes: Processes = 1,
    concurrency: int = 10,
    prefetch: Prefetch = "auto",
    grace: float | timedelta = DEFAULT_GRACE,
    start_timeout: float | timedelta = START_TIMEOUT,
    stop_timeout: float | timedelta = STOP_TIMEOUT,
    max_tasks_per_child: int | None = None,
    max_rss: int | None = None,
    reload: bool = False,
    listeners: Sequence[Listener] = (),
    log_level: str | None = None,
    log_format: Format = "text",
    metrics: str | None = None,
    relay: str | None = None,
    loop: Loop = "auto",
) -> None:
    """Run a worker until SIGTERM or Ctrl-C; what ``leveret worker`` calls.

    A second signal stops it at once; nothing is lost. SIGHUP replaces all children.

    Args:
        app: ``MODULE:APP`` or ``FILE.py:APP``, imported by the child processes alone.
        url: The URL of the broker, in place of the application's.
        queues: The names of the queues to work on. Empty: all of the application's.
        processes: The number of child processes, or (fewest, most) for as many as there is work for.
        concurrency: The number of tasks that each child runs at once, at most 10000.
        prefetch: The most deliveries of each queue that the worker holds at once, running or waiting: 1 to 65535.
            "auto": as many as the worker runs at once, and while tasks are short some milliseconds' work
            more. "unlimited": no limit.
        grace: How long what runs may go on when the worker stops (seconds, or a timedelta).
        start_timeout: How long a child may take to import the application and to enter its lifespan (seconds, or a
            timedelta). One that takes longer is an application that cannot be loaded.
        stop_timeout: How long the lifespan of a child may take to end (seconds, or a timedelta); then it is cut off.
        max_tasks_per_child: A child that has run about so many tasks is replaced; the fresh one is ready before the old
            one leaves. None: no limit.
        max_rss: A child that holds so much memory (bytes) is replaced in the same way. Linux only. None: no limit.
        reload: True: a change of the application's source files replaces all children. It needs ``leveret[reload]``.
        listeners: Functions that are called with each event of the worker.
        log_level: The level of this process, its children and all loggers there. None: INFO, or what the program, or
            the application in its children, says if it sets logging up itself.
        log_format: "text" or "json". It holds where neither the program nor the application sets logging up.
        metrics: ``HOST:PORT`` where ``/metrics`` for Prometheus, ``/live`` and ``/ready`` are served. It needs
            ``leveret[prometheus]``. None: nothing is served.
        relay: The URL of a database whose outbox is published while the worker runs, by a process of its own. None: no
            outbox.
        loop: The event loop of the worker and its tasks; "uvloop" needs ``leveret[uvloop]``. "auto": the one of the
            policy that this program sets, and for the tasks the application, else asyncio's.

    Raises:
        AppNotLoaded: The application cannot be imported, or its lifespan cannot be entered.
        ConfigurationError: An argument is not what it must be, or the application cannot be run as it is.
        BrokerRefused: The broker refuses this client.
    """
    bounds = Bounds.of(processes)
    loops.check_loop(loop)
    concurrency = arguments.count("concurrency", concurrency, most=MOST_CONCURRENCY)
    grace = arguments.seconds("grace", grace)
    starting = arguments.seconds("start_timeout", start_timeout, above_zero=True)
    stopping = arguments.seconds("stop_timeout", stop_timeout, above_zero=True)
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
            start_timeout=starting,
            stop_timeout=stopping,
        )
        scaler = Scaler(executor, bounds) if bounds.most > bounds.least else None
        heard = listeners if exporter is None else (*listeners, exporter.hear)
        worker = Worker(executor, queues=queues, prefetch=prefetch, grace=grace, listeners=heard, scaler=scaler)
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, worker.stop)
        asyncio.get_running_loop().call_later(_IMPORTED, gc.freeze)
        async with (
            nullcontext() if exporter is None else exporter.serve(worker),
            reloading(executor, worker, watch=reload),
            nullcontext(()) if relay is None else relaying(app, url, relay) as relays,
            reaping(lambda: [*(child.pid for child in executor.children()), *relays]),
        ):
            await worker.run()

    loops.run(work(), loop)
