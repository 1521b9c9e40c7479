"""A secret of the URL shows nowhere: not in logs, errors and tracebacks, not in process arguments, not in a repr."""

from __future__ import annotations

import logging
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from leveret import App, LeveretError
from leveret.brokers import censor, connect
from leveret.executors import Manifest
from leveret.executors.wire import Begin
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.nodes import free_ports
from tests.support.waiting import until
from tests.support.workers import Ledger, Program, leveret

if TYPE_CHECKING:
    from tests.support.nodes import Node

#: As it is, with characters that confuse a URL's parser, and percent-encoded.
PASSWORDS = ["s3cret", "s3cret/?#[x", "p%40s3cret%2F", "%733cret"]
#: What none of them may leave behind: percent-encoded, decoded, or in part.
TRACES = ("s3cret", "733cret")


def clean(text: str) -> None:
    for trace in TRACES:
        assert trace not in text


@pytest.mark.parametrize(
    "url",
    [
        *(f"amqp://user:{password}@host:1/vhost?heartbeat=5" for password in PASSWORDS),
        *(f"redis://:{password}@host" for password in PASSWORDS),
        "amqps://host/?keyfile=key.pem&key_password=s3cret",
        "amqps://user:s3cret@host/?password=s3cret&heartbeat=5&s3cret",
        "amqps://host/?key_password=a@s3cret",
        "amqps://host/?key_password=s3cret@a",
        "sqlite:///file.db?key=s3cret",
        "sqlite://user:s3cret@host/file.db",
    ],
)
async def test_urls_are_censored(url: str) -> None:
    """In messages, errors with their causes, and the repr of whatever was made with it."""
    clean(censor(url))
    clean(repr(App(url)))
    clean(repr(Begin("tasks:app", url, 1)))
    clean(repr(Manifest(url, [], {}, {}, 1.0)))
    clean(str(vars(Begin)))
    try:
        broker = connect(url, timeout=0.5)
        clean(repr(broker))
        await broker.queues.stats()
    except LeveretError as error:
        clean("".join(traceback.format_exception(error)))
        clean(repr(error))
    else:
        raise AssertionError("there is no such broker")


def test_what_is_not_secret_is_shown() -> None:
    assert censor("amqps://user:pw@host:1/v?heartbeat=5&cafile=/ca.pem&x=1") == (
        "amqps://user:***@host:1/v?heartbeat=5&cafile=/ca.pem&x=***"
    )
    for url in ("sqlite:////tmp/a@b:c.db", "amqp://host/", "amqp://user@host/", "memory://"):
        assert censor(url) == url


def arguments_below(pid: int) -> str:
    """The command lines of a process's children, grandchildren and so on."""
    found = ""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            found += Path(f"/proc/{child}/cmdline").read_text() + arguments_below(child)
    return found


class SecretWorker(Program):
    """A worker that has its URL from the environment, and tells all it can."""

    def __init__(self, url: str, ledger: Ledger) -> None:
        number = len(list(ledger.path.parent.glob("secret-*.log")))
        arguments = ["-m", "leveret", "worker", f"{ledger_app.__file__}:app", "--log-level", "DEBUG"]
        environment = {"LEVERET_URL": url, "LEDGER": str(ledger.path)}
        super().__init__(arguments, ledger.path.with_name(f"secret-{number}.log"), environment)

    def check(self) -> None:
        clean(self.output)
        clean(Path(f"/proc/{self.pid}/cmdline").read_text())


@pytest.mark.parametrize("password", ["s3cret", "p%40s3cret%2F%3F"])
def test_a_worker_in_trouble_keeps_it(node: Node, ledger: Ledger, password: str) -> None:
    """Wrong password, a broker that is away, an alarm, a lost connection: no line and no child's arguments have it."""
    (port,) = free_ports(1)
    node.ctl("add_user", "secretive", password.replace("%40", "@").replace("%2F", "/").replace("%3F", "?"))
    try:
        node.ctl("set_permissions", "secretive", ".*", ".*", ".*")
        with SecretWorker(f"amqp://secretive:{password}@127.0.0.1:{port}/", ledger) as worker:
            worker.wait_for("trying again in", 2)
            clean(arguments_below(worker.pid))
            worker.check()
        with SecretWorker(f"amqp://secretive:wrong{password}@127.0.0.1:{node.port}/", ledger) as worker:
            assert worker.exit_code() == 1
            assert "the user name or password is wrong" in worker.output
            clean(worker.output)
        url = f"amqp://secretive:{password}@127.0.0.1:{node.port}/"
        with SecretWorker(url, ledger) as worker:
            Client(url).enqueue(ledger_app.fail_until, "a", 1)
            ledger.wait_for("end a")
            clean(arguments_below(worker.pid))
            node.ctl("set_vm_memory_high_watermark", "0.0000001")
            blocked = ["enqueue", f"{ledger_app.__file__}:app", "say", "b"]
            app = ledger.path.with_name("hasty.py")
            app.write_text(Path(ledger_app.__file__).read_text().replace("App(", "App(enqueue_timeout=2, "))
            blocked[1] = f"{app}:app"
            environment = {"LEVERET_URL": url, "LEDGER": str(ledger.path)}
            clean(leveret(*blocked, environment=environment, fails=True))
            node.restart()
            worker.wait_for("connected to RabbitMQ again")
            worker.check()
    finally:
        node.ctl("set_vm_memory_high_watermark", "absolute", "2GB")
        node.ctl("delete_user", "secretive")


async def test_the_drivers_log_does_not_have_it(node: Node, caplog: pytest.LogCaptureFixture) -> None:
    """In a program that logs all that aio-pika says, of its URL too when the server ends the connection."""
    node.ctl("add_user", "secretive", "s3cret")
    try:
        node.ctl("set_permissions", "secretive", ".*", ".*", ".*")
        with caplog.at_level(logging.INFO, logger="aiormq"), caplog.at_level(logging.DEBUG, logger="aio_pika"):
            broker = connect(f"amqp://secretive:s3cret@127.0.0.1:{node.port}/", timeout=10)
            await broker.queues.stats(["work"])
            node.ctl("close_all_connections", "an operator did so")

            async def is_told() -> bool:
                return "an operator did so" in caplog.text

            await until(is_told, "the driver tells that its connection was closed")
            await broker.close()
        clean(caplog.text)
    finally:
        node.ctl("delete_user", "secretive")


def test_the_demo_does_not_pass_it_on_as_an_argument(ledger: Ledger) -> None:
    (port,) = free_ports(1)
    url = f"amqp://user:s3cret@127.0.0.1:{port}/"
    with Program(["-m", "leveret", "demo", "--url", url], ledger.path.with_name("demo.log")) as demo:
        demo.wait_for("trying again in", 2)
        found = arguments_below(demo.pid)
        assert "demo_worker" in found
        clean(found)
        clean(demo.output)
        demo.kill_group()
