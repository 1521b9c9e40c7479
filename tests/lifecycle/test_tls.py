"""TLS against nodes that speak nothing else: who is not trusted is told so at once, and nothing is sent to them."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import subprocess
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

import pytest
import trustme

from leveret.brokers import connect
from leveret.brokers.rabbitmq.amqp import connections as amqp
from leveret.brokers.rabbitmq.amqp.hosts import Hosts
from leveret.errors import BrokerRefused, BrokerUnavailable, ConfigurationError
from leveret.model import Queue
from tests.conftest import RABBITMQ
from tests.support import ledger_app
from tests.support.client import Client
from tests.support.silent import accepting
from tests.support.tls import TLSNode
from tests.support.workers import Ledger, Worker, leveret

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator
    from pathlib import Path

    from tests.support.nodes import Node


@pytest.fixture(scope="module", params=RABBITMQ)
def tls_node(request: pytest.FixtureRequest) -> Iterator[TLSNode]:
    node = TLSNode(request.param)
    try:
        node.start()
        node.wait()
        yield node
    finally:
        node.close()


def test_producers_and_workers_use_it(tls_node: TLSNode, ledger: Ledger) -> None:
    """With an authority and a client's certificate of their own."""
    url = tls_node.url_with()
    client = Client(url)
    client.enqueue(ledger_app.say, "sealed")
    with Worker(url, ledger) as worker:
        ledger.wait_for("said sealed")
        client.wait_until_empty("work")
        assert "no_verify_ssl" not in worker.output
    protocol = tls_node.ctl("list_queues", "name")  # it is the node that has them
    assert "work" in protocol


def encrypted(source: str, target: Path) -> str:
    subprocess.run(
        ["openssl", "pkey", "-in", source, "-aes256", "-passout", "pass:s3cret-w0rd", "-out", str(target)], check=True
    )
    return str(target)


@pytest.mark.parametrize(
    ("mistake", "told"),
    [
        ("another authority", "is not trusted"),
        ("no authority", "add ?cafile=ca.pem to the URL"),
        ("another host", "is for another host"),
        ("no client certificate", "add ?certfile=client.pem&keyfile=client.key to the URL"),
        ("client of another authority", "does not trust this client's certificate"),
        ("no such file", "cannot be read"),
        ("encrypted key", "is encrypted, and nobody is there to be asked"),
    ],
)
async def test_who_is_not_trusted_is_told_why(tls_node: TLSNode, tmp_path: Path, mistake: str, told: str) -> None:
    stranger = trustme.CA()
    stranger.cert_pem.write_to_path(tmp_path / "stranger.pem")
    url = {
        "another authority": lambda: tls_node.url_with(cafile=str(tmp_path / "stranger.pem")),
        "no authority": lambda: tls_node.url_with(cafile=None),
        "another host": lambda: tls_node.url_with(host="127.0.0.1"),
        "no client certificate": lambda: tls_node.url_with(certfile=None),
        "client of another authority": lambda: tls_node.url_with(
            certfile=tls_node.issue_client("stranger-client.pem", stranger)
        ),
        "no such file": lambda: tls_node.url_with(certfile=str(tmp_path / "nothing.pem")),
        "encrypted key": lambda: tls_node.url_with(keyfile=encrypted(tls_node.client, tmp_path / "encrypted.key")),
    }[mistake]()
    broker = connect(url, timeout=10)
    with pytest.raises(BrokerRefused, match="cannot connect to amqps://guest:") as caught:
        await broker.queues.stats(["work"])
    await broker.close()
    assert told in str(caught.value)


async def test_a_silent_host_costs_a_moment(tls_node: TLSNode) -> None:
    """One that does not even begin the handshake of TLS; and with no other the caller's time is kept."""
    with accepting() as port:
        broker = connect(tls_node.url_with().replace("@", f"@localhost:{port},", 1), timeout=5.0)
        await broker.declare([Queue("work")])
        await broker.close()
        broker = connect(f"amqps://guest:guest@localhost:{port}/", timeout=1.0)
        with pytest.raises(BrokerUnavailable, match=f"no connection yet, no answer from .*{port}"):
            await broker.declare([Queue("work")])
        async with asyncio.timeout(20):
            await broker.close()


async def test_words_that_a_reset_overtakes_are_heard_by_asking_again(tls_node: TLSNode) -> None:
    """TLS 1.3 lets a client write before the server has looked at its certificate; what was written resets the line."""
    async with where_last_words_get_lost(tls_node.port) as port:
        url = tls_node.url_with(certfile=None).replace(f":{tls_node.port}", f":{port}")
        with pytest.raises(BrokerRefused, match="the server wants a certificate from its clients"):
            await amqp.connect(Hosts(url, timeout=10.0), purpose="test")


@asynccontextmanager
async def where_last_words_get_lost(target: int) -> AsyncGenerator[int]:
    """A port like the target, but what the server says at the end of the first connection is lost."""
    connections = itertools.count()
    relays: list[asyncio.Task[None] | None] = []

    async def relay(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        relays.append(asyncio.current_task())
        loses, pieces = next(connections) == 0, 0
        server, to_server = await asyncio.open_connection("127.0.0.1", target)

        async def forward() -> None:
            nonlocal pieces
            while data := await client.read(65_536):
                pieces += 1
                to_server.write(data)

        forwarding = asyncio.create_task(forward())
        with suppress(ConnectionError):
            while data := await server.read(65_536):
                if not loses or pieces < 2:  # the handshake
                    to_client.write(data)
        if loses:
            to_client.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01" + b"\x00" * 7)
        forwarding.cancel()
        for writer in (to_client, to_server):
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    relaying = await asyncio.start_server(relay, "127.0.0.1")
    async with relaying:
        yield relaying.sockets[0].getsockname()[1]
        await asyncio.gather(*filter(None, relays))


def test_an_expired_certificate_is_refused(tls_node: TLSNode) -> None:
    tls_node.certify(expired=True)
    try:
        assert "has expired" in leveret("queues", "-q", "work", "--url", tls_node.url_with(), fails=True)
    finally:
        tls_node.certify()


def test_a_worker_ends_at_once(tls_node: TLSNode, ledger: Ledger) -> None:
    """It does not try for ever."""
    with Worker(tls_node.url_with(host="127.0.0.1"), ledger) as worker:
        assert worker.exit_code() == 1
        assert "is for another host" in worker.output
        assert "Traceback" not in worker.output


async def test_the_check_can_be_turned_off_with_a_warning(tls_node: TLSNode, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        broker = connect(tls_node.url_with(host="127.0.0.1", cafile=None, no_verify_ssl="1"), timeout=10)
        await broker.queues.stats(["work"])
        await broker.close()
    assert caplog.text.count("certificate is not checked") == 1


async def test_nothing_falls_back_to_plain(tls_node: TLSNode, node: Node) -> None:
    """Neither does TLS against a plain port, nor a plain URL that names certificates."""
    plain = connect(node.url.replace("amqp://", "amqps://"), timeout=5)
    with pytest.raises(BrokerRefused, match="speaks no TLS"):
        await plain.queues.stats(["work"])
    with pytest.raises(ConfigurationError, match="write amqps://"):
        connect(tls_node.url_with(scheme="amqp"))
    broker = connect(tls_node.url_with(scheme="amqp", cafile=None, certfile=None), timeout=2)
    with pytest.raises(BrokerUnavailable):
        await broker.queues.stats(["work"])
    await broker.close()
