"""``leveret worker``."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from leveret.cli.completing import complete_app, complete_queue
from leveret.cli.durations import DURATION
from leveret.cli.options import url_option
from leveret.executors import START_TIMEOUT, STOP_TIMEOUT
from leveret.worker import DEFAULT_GRACE, MOST_CONCURRENCY, MOST_PREFETCH, Prefetch, Processes, run_worker

if TYPE_CHECKING:
    from leveret.executors import Loop
    from leveret.observe import Format


#: The options that pyproject.toml and ``LEVERET_*`` can set.
SETTINGS = (
    *("queue", "processes", "concurrency", "prefetch", "grace", "start_timeout", "stop_timeout"),
    *("max_tasks_per_child", "max_rss", "reload"),
    *("log_level", "log_format", "metrics"),
)


class _PrefetchType(click.ParamType[Prefetch]):
    name = "N|auto|unlimited"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Prefetch:
        if value == "auto":
            return "auto"
        if value == "unlimited":
            return "unlimited"
        try:
            number = int(str(value))
        except ValueError:
            number = 0
        if not 1 <= number <= MOST_PREFETCH:
            self.fail(f"{value!r} is not a number from 1 to {MOST_PREFETCH}, 'auto' or 'unlimited'", param, ctx)
        return number


class _ProcessesType(click.ParamType[Processes]):
    name = "N|MIN-MAX"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Processes:
        numbers = re.fullmatch(r"(\d+)(?:-(\d+))?", str(value))
        least, most = (int(one or numbers[1]) for one in numbers.groups()) if numbers else (0, 0)
        if not 1 <= least <= most:
            self.fail(f"{value!r} is not a number from 1, or MIN-MAX as in 1-4", param, ctx)
        return least if least == most else (least, most)


@click.command()
@click.argument("app", metavar="MODULE:APP", envvar="LEVERET_APP", shell_complete=complete_app)
@click.option(
    "-q",
    "--queue",
    "queues",
    multiple=True,
    envvar="LEVERET_QUEUE",
    shell_complete=complete_queue,
    help="A queue to work on; again for more. Default: all the app's.",
)
@click.option(
    "--processes",
    envvar="LEVERET_PROCESSES",
    type=_ProcessesType(),
    default=1,
    show_default=True,
    help="Child processes; MIN-MAX: as many as there is work for.",
)
@click.option(
    "--concurrency",
    envvar="LEVERET_CONCURRENCY",
    type=click.IntRange(1, MOST_CONCURRENCY),
    default=10,
    show_default=True,
    help="Tasks at once in each child process.",
)
@click.option(
    "--prefetch",
    envvar="LEVERET_PREFETCH",
    type=_PrefetchType(),
    default="auto",
    show_default=True,
    help="Most unsettled deliveries of each queue; auto: as many as the worker runs at once, and "
    "some milliseconds' work more while tasks are short.",
)
@click.option(
    "--grace",
    envvar="LEVERET_GRACE",
    type=DURATION,
    default=DEFAULT_GRACE,
    show_default=True,
    help="Time to finish what runs when told to stop (seconds, or 5m); the rest is handed back.",
)
@click.option(
    "--start-timeout",
    envvar="LEVERET_START_TIMEOUT",
    type=DURATION,
    default=START_TIMEOUT,
    show_default=True,
    help="Time for a child process to import the application and to enter its lifespan (seconds, or 5m).",
)
@click.option(
    "--stop-timeout",
    envvar="LEVERET_STOP_TIMEOUT",
    type=DURATION,
    default=STOP_TIMEOUT,
    show_default=True,
    help="Time for the lifespan of a child process to end (seconds, or 5m); then it is cut off.",
)
@click.option(
    "--max-tasks-per-child",
    envvar="LEVERET_MAX_TASKS_PER_CHILD",
    type=click.IntRange(1),
    metavar="N",
    help="Replace a child process after about N tasks; the fresh one is ready before the old one leaves.",
)
@click.option(
    "--max-rss",
    envvar="LEVERET_MAX_RSS",
    type=click.IntRange(1),
    metavar="MIB",
    help="Replace a child process that holds so much memory, in MiB.",
)
@click.option(
    "--reload",
    envvar="LEVERET_RELOAD",
    is_flag=True,
    help="For development: replace the child processes when a source file changes. Needs leveret[reload].",
)
@click.option(
    "--log-level",
    envvar="LEVERET_LOG_LEVEL",
    type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"], case_sensitive=False),
    help="Of the worker, its children and all loggers there; INFO, unless the application sets logging up itself.",
)
@click.option(
    "--log-format",
    envvar="LEVERET_LOG_FORMAT",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="json: one object a line; what the tasks log is there in both, with the task's name and id.",
)
@click.option(
    "--metrics",
    envvar="LEVERET_METRICS",
    metavar="HOST:PORT",
    help="Serve /metrics for Prometheus, /live and /ready there; needs leveret[prometheus].",
)
@click.option(
    "--relay",
    envvar="LEVERET_RELAY",
    metavar="URL",
    help="Publish what waits in the outbox of this database, too: leveret relay, in a process of its own.",
)
@click.option(
    "--loop",
    type=click.Choice(["auto", "asyncio", "uvloop"]),
    default="auto",
    show_default=True,
    help="The event loop of the worker and its tasks; uvloop needs leveret[uvloop]. auto: for the tasks the one of the "
    "policy that the application sets, else asyncio's.",
)
@url_option
def command(
    app: str,
    queues: tuple[str, ...],
    processes: Processes,
    concurrency: int,
    prefetch: Prefetch,
    grace: float,
    start_timeout: float,
    stop_timeout: float,
    max_tasks_per_child: int | None,
    max_rss: int | None,
    reload: bool,
    log_level: str | None,
    log_format: Format,
    metrics: str | None,
    relay: str | None,
    loop: Loop,
    url: str | None,
) -> None:
    """Run the tasks of an application until SIGTERM or Ctrl-C; again to stop at once. Nothing is lost either way.

    The tasks run in child processes: one that blocks or crashes does not touch the connection. MODULE is imported
    there, from the working directory or the installed packages; FILE.py:APP works too. SIGHUP replaces them one by
    one, for changed code.

    \b
    Examples:
      leveret worker tasks:app
      leveret worker tasks:app -q images -q mail --processes 4 --concurrency 1
      leveret worker tasks:app --metrics 0.0.0.0:9090 --log-format json
      leveret worker tasks:app --processes 1-8
      leveret worker shop/tasks.py:app --url amqp://guest:guest@localhost/
    """
    run_worker(
        app,
        url=url,
        queues=queues,
        processes=processes,
        concurrency=concurrency,
        prefetch=prefetch,
        grace=grace,
        start_timeout=start_timeout,
        stop_timeout=stop_timeout,
        max_tasks_per_child=max_tasks_per_child,
        max_rss=None if max_rss is None else max_rss * 1024 * 1024,
        reload=reload,
        log_level=log_level,
        log_format=log_format,
        metrics=metrics,
        relay=relay,
        loop=loop,
    )
