"""``leveret dashboard``."""

from __future__ import annotations

import click

from leveret.app import App
from leveret.brokers import connect, location
from leveret.cli.completing import complete_app, complete_queue
from leveret.cli.options import TIMEOUT, loaded, url_option
from leveret.errors import ConfigurationError
from leveret.logs import Logging


@click.command()
@click.argument("app", metavar="[MODULE:APP]", required=False, envvar="LEVERET_APP", shell_complete=complete_app)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="LEVERET_DASHBOARD_HOST",
    help="The address to listen on; not local: with a token.",
)
@click.option(
    "--port",
    type=click.IntRange(0, 65_535),
    default=8484,
    show_default=True,
    envvar="LEVERET_DASHBOARD_PORT",
    help="0: any free one.",
)
@click.option(
    "--token", envvar="LEVERET_DASHBOARD_TOKEN", help="What readers must enter; better in $LEVERET_DASHBOARD_TOKEN."
)
@click.option("--redact", metavar="NAME", multiple=True, help="An argument that is not shown; again for more.")
@click.option(
    "-q",
    "--queue",
    "queues",
    multiple=True,
    shell_complete=complete_queue,
    help="A queue to show besides the application's; again for more.",
)
@url_option
def command(
    app: str | None,
    host: str,
    port: int,
    token: str | None,
    redact: tuple[str, ...],
    queues: tuple[str, ...],
    url: str | None,
) -> None:
    """Serve the dashboard: see and steer queues, tasks, workers and dead letters in a browser.

    It listens on this machine alone, unless --host says otherwise; that needs a token, and a proxy with TLS in front.
    With MODULE:APP it knows the application's queues and the names of its tasks' arguments.

    \b
    Examples:
      leveret dashboard tasks:app
      leveret dashboard --url amqp://guest:guest@localhost/ -q mail --redact password
    """
    from leveret.dashboard import by_name, dashboard

    Logging("WARNING").set_up()
    application = App(url, enqueue_timeout=TIMEOUT) if app is None else loaded(app, url)
    connect(application.url)  # opens nothing: a URL that no broker knows is told now, not on each page
    try:
        from leveret.dashboard.serving import LOCAL_NAMES, is_local, serve
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the dashboard needs {error.name}, which is not installed: pip install 'leveret[dashboard]'"
        ) from error
    if not is_local(host) and token is None:
        raise ConfigurationError(
            f"--host {host} can be reached from other machines: set a token in $LEVERET_DASHBOARD_TOKEN, "
            "or mount the dashboard behind your application's own login"
        )
    served = dashboard(
        application,
        token=token,
        redact=by_name(redact) if redact else None,
        queues=queues,
        hosts=(*LOCAL_NAMES, host) if token is None else (),
    )

    def ready(address: str) -> None:
        click.echo(f"The dashboard of {location(application.url)} is at {address} (Ctrl-C ends it)")

    try:
        serve(served, host, port, ready)
    except KeyboardInterrupt:
        click.echo("Ended.")
