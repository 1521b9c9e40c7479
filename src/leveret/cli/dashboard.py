"""``leveret dashboard``."""

from __future__ import annotations

import secrets

import click

from leveret.brokers import connect, location
from leveret.cli.completing import complete_app, complete_queue
from leveret.cli.options import TIMEOUT, loaded, url_option
from leveret.client import App
from leveret.errors import ConfigurationError
from leveret.observe import Logging


@click.command()
@click.argument("app", metavar="[MODULE:APP]", required=False, envvar="LEVERET_APP", shell_complete=complete_app)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    envvar="LEVERET_DASHBOARD_HOST",
    help="The address to listen on.",
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
    "--token",
    envvar="LEVERET_DASHBOARD_TOKEN",
    help="What readers must enter; better in $LEVERET_DASHBOARD_TOKEN. Without it a new one is made at each start, "
    "and is in the address that is printed.",
)
@click.option("--no-token", is_flag=True, help="Ask nobody who they are: for a proxy that asks.")
@click.option(
    "--allow-host",
    "allowed",
    metavar="NAME",
    multiple=True,
    help="With --no-token: a name that the proxy asks for it by, besides those of this machine; again for more.",
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
    no_token: bool,
    allowed: tuple[str, ...],
    redact: tuple[str, ...],
    queues: tuple[str, ...],
    url: str | None,
) -> None:
    """Serve the dashboard: see and steer queues, tasks, workers and dead letters in a browser.

    Whoever opens the address that it prints is in; others are asked for the token. It listens on this machine alone,
    unless --host says otherwise; put a proxy with TLS in front of it then. With MODULE:APP it knows the application's
    queues and the names of its tasks' arguments.

    \b
    Examples:
      leveret dashboard tasks:app
      leveret dashboard --url amqp://guest:guest@localhost/ -q mail --redact password
    """
    from leveret.dashboard import by_name, checked

    Logging("WARNING").set_up()
    application = App(url, enqueue_timeout=TIMEOUT) if app is None else loaded(app, url)
    connect(application.url)  # opens nothing: a URL that no broker knows is told now, not on each page
    try:
        from leveret.dashboard.application import Dashboard
        from leveret.dashboard.serving import LOCAL_NAMES, is_local, serve
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"the dashboard needs {error.name}, which is not installed: pip install 'leveret[dashboard]'"
        ) from error
    token = token or None
    if no_token and token is not None:
        raise click.UsageError("--no-token and a token (--token, or $LEVERET_DASHBOARD_TOKEN) exclude each other")
    if no_token and not is_local(host):
        click.echo(f"Whoever reaches {host} can read arguments and drop tasks: nobody is asked for a token.", err=True)
    asked = None if no_token else token or secrets.token_urlsafe(24)
    names = (*LOCAL_NAMES, host, *allowed) if is_local(host) or allowed else ()
    served = Dashboard(
        application,
        token=None if asked is None else checked(asked),
        redact=by_name(redact) if redact else None,
        queues=queues,
        hosts=names if no_token else (),
        # Sessions end with this process.
        session_key=secrets.token_bytes(32),
    )

    def ready(address: str) -> None:
        shown = address if token is not None or asked is None else f"{address}?token={asked}"
        click.echo(f"The dashboard of {location(application.url)} is at {shown} (Ctrl-C ends it)")

    try:
        serve(served, host, port, ready)
    except KeyboardInterrupt:
        click.echo("Ended.")
